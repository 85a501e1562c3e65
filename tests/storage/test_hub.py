"""Repositories of the Hub: commits, tokens, links."""

import json

import checkpoints
import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from remote_store import point_hub_at, store  # noqa: F401 - a fixture

import jaxshard as js
from jaxshard.cli import main
from jaxshard.errors import NotFoundError, StorageError
from jaxshard.storage import writers


@pytest.fixture
def llama(store, tmp_path):  # noqa: F811
    arrays = checkpoints.write_llama(tmp_path / "llama", num_files=2)
    store.add("llama", tmp_path / "llama")
    return arrays


def _load(url):
    loaded = js.load(url, "mp2", stream=True)
    return {name: np.asarray(array) for name, array in loaded.items()}


def test_each_weight_file_is_resolved_once(store, llama):  # noqa: F811
    catalog = js.open("hf://org/llama")
    store.objects.log.clear()
    js.load(catalog, "mp8", stream=True)
    assert len(store.lines("HEAD /org/llama/resolve")) == 2


def test_a_link_that_has_expired_is_resolved_again(store, llama):  # noqa: F811
    catalog = js.open("hf://org/llama")
    store.fail("403", "GET /cdn/", times=1)
    assert _load(catalog).keys() == llama.keys()


def test_a_refusal_by_the_content_network_says_what_to_do(store, llama):  # noqa: F811
    catalog = js.open("hf://org/llama")
    store.fail("403", "GET /cdn/", times=99)
    with pytest.raises(StorageError, match=r"Hub refuses access.* set HF_TOKEN") as caught:
        _load(catalog)
    assert "signature" not in str(caught.value)


def test_a_repository_is_listed_by_one_request(store, llama):  # noqa: F811
    js.open("hf://org/llama")
    assert len(store.lines("/api/models")) == 1


def test_the_token_is_sent_to_the_hub_only(store, llama, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    store.objects.repositories["org/llama"].token = "hf_secret"
    _load("hf://org/llama")
    sent = {e["line"].split("/")[1] for e in store.objects.log if e["has_token"]}
    assert sent == {"api", "org"}
    assert store.lines("/cdn/")


def test_a_gated_repository_names_the_page_with_its_terms(store, llama):  # noqa: F811
    store.objects.repositories["org/llama"].token = "hf_secret"
    with pytest.raises(StorageError, match=r"gated. Accept its terms at http.*/org/llama"):
        js.open("hf://org/llama")


def test_a_commit_is_read_although_the_branch_moves_on(store, llama, tmp_path):  # noqa: F811
    catalog = js.open("hf://org/llama")
    other = checkpoints.write_llama(tmp_path / "newer", num_files=2, seed=1)
    store.objects.add_folder("bucket/newer", tmp_path / "newer")
    store.objects.add_repository("org/llama", "bucket/newer", "d" * 40)
    name = "model.norm.weight"
    assert np.array_equal(_load(catalog)[name], llama[name])
    assert np.array_equal(_load("hf://org/llama")[name], other[name])


def test_a_subfolder_and_a_file_of_a_repository_are_checkpoints(store, llama, tmp_path):  # noqa: F811
    store.objects.add_folder("bucket/deep/sub/model", tmp_path / "llama")
    store.objects.add_repository("org/deep", "bucket/deep")
    assert _load("hf://org/deep/sub/model").keys() == llama.keys()
    with pytest.raises(NotFoundError):
        js.open("hf://org/deep/sub/none")


def test_urls_that_are_no_repository_are_refused():
    with pytest.raises(js.LayoutError, match="expected hf://ORG/NAME"):
        js.open("hf://org")


def _download(name, revision=None):
    return huggingface_hub.snapshot_download(name, revision=revision)


def test_a_repository_in_the_local_cache_is_read_from_there(store, llama):  # noqa: F811
    folder = _download("org/llama")
    store.objects.log.clear()
    catalog = js.open("hf://org/llama")
    assert catalog.root == folder
    assert _load(catalog).keys() == llama.keys()
    assert not [line for line in store.lines() if "/api/models" not in line]


def test_a_cache_of_another_commit_is_not_read(store, llama, tmp_path):  # noqa: F811
    _download("org/llama")
    checkpoints.write_llama(tmp_path / "newer", num_files=2, seed=1)
    store.objects.add_folder("bucket/newer", tmp_path / "newer")
    store.objects.add_repository("org/llama", "bucket/newer", "d" * 40)
    assert js.open("hf://org/llama").root == "hf://org/llama@" + "d" * 40


def _cached(tmp_path):
    """The names of the weight files in the local cache."""
    return sorted(p.name for p in (tmp_path / "hub").rglob("*.safetensors"))


def test_a_load_downloads_to_the_cache_and_later_ones_read_it_there(store, llama, tmp_path):  # noqa: F811
    loaded = js.load("hf://org/llama", "mp2")
    for name, array in llama.items():
        assert np.array_equal(np.asarray(loaded[name]).view(np.uint8), array.view(np.uint8))
    assert len(_cached(tmp_path)) == 2
    store.objects.log.clear()
    assert js.load("hf://org/llama", "mp4").keys() == llama.keys()
    assert all("/api/models" in line for line in store.lines())


def test_a_conversion_downloads_only_the_files_that_it_reads(store, llama, tmp_path):  # noqa: F811
    catalog = js.open("hf://org/llama")
    file = catalog.tensors["model.norm.weight"].shards[0].file
    js.convert(catalog, tmp_path / "norm", include="model.norm.weight")
    assert _cached(tmp_path) == [catalog.files[file].path]
    assert (tmp_path / "norm/tokenizer.json").exists()
    shares = js.load_rank("hf://org/llama", "mp2", include="model.norm.weight")
    assert np.array_equal(shares["model.norm.weight"], llama["model.norm.weight"])
    assert _cached(tmp_path) == [catalog.files[file].path]


def test_streamed_inspected_and_planned_nothing_is_written_to_the_disk(store, llama, tmp_path):  # noqa: F811
    js.load("hf://org/llama", "mp2", stream=True)
    js.load_rank("hf://org/llama", "mp2", stream=True)
    js.slice("hf://org/llama", tmp_path / "cut", "mp2", stream=True)
    js.plan("hf://org/llama", "mp2")
    assert main(["inspect", "hf://org/llama"]) == 0
    assert main(["merge", "hf://org/llama", str(tmp_path / "out"), "--stream", "--quiet"]) == 0
    assert not js.verify(tmp_path / "cut", "hf://org/llama").problems
    assert not _cached(tmp_path)


def test_a_download_may_be_mapped_and_verified(store, llama, tmp_path):  # noqa: F811
    js.convert(tmp_path / "llama", tmp_path / "summed", checksums=True)
    store.add("summed", tmp_path / "summed")
    assert js.load("hf://org/summed", "mp2", verify=True, mmap=True).keys() == llama.keys()


@pytest.mark.parametrize("stream", [True, False])
def test_a_conversion_from_the_hub_is_resumed(stream, store, llama, tmp_path):  # noqa: F811
    out, finish = tmp_path / "out", writers.OutputFiles._finish
    calls = []

    def fail_second(self, rank):
        calls.append(rank)
        if len(calls) == 2:
            raise StorageError("the disk is full")
        finish(self, rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers.OutputFiles, "_finish", fail_second)
        with pytest.raises(StorageError, match="full"):
            js.slice("hf://org/llama", out, "mp2", stream=stream, workers=1)
    report = js.slice("hf://org/llama", out, "mp2", resume=True)
    assert report.skipped_files == 1
    assert not js.verify(out, tmp_path / "llama").problems


def test_a_branch_that_moves_before_the_download_is_not_followed(store, llama, tmp_path):  # noqa: F811
    catalog = js.open("hf://org/llama")
    other = checkpoints.write_llama(tmp_path / "newer", num_files=2, seed=1)
    store.objects.add_folder("bucket/newer", tmp_path / "newer")
    store.objects.add_repository("org/llama", "bucket/newer", "d" * 40)
    name = "model.norm.weight"
    assert np.array_equal(np.asarray(js.load(catalog, "mp2")[name]), llama[name])
    assert np.array_equal(np.asarray(js.load("hf://org/llama", "mp2")[name]), other[name])


def test_a_hub_that_cannot_be_reached_is_an_error(store, llama, tmp_path, monkeypatch):  # noqa: F811
    point_hub_at("http://127.0.0.1:9", monkeypatch, tmp_path / "hub")
    with pytest.raises(StorageError, match="Check HF_ENDPOINT"):
        js.open("hf://org/llama")


def test_offline_what_was_downloaded_is_loaded(store, llama, monkeypatch):  # noqa: F811
    js.load("hf://org/llama", "mp2")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    store.objects.log.clear()
    assert js.load("hf://org/llama", "mp4").keys() == llama.keys()
    assert not store.lines()


def test_offline_only_the_cache_is_read(store, llama, monkeypatch):  # noqa: F811
    folder = _download("org/llama")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    store.objects.log.clear()
    assert js.open("hf://org/llama").root == folder
    with pytest.raises(StorageError, match="not in the local cache"):
        js.open("hf://org/other")
    assert not store.lines()


def test_adapters_and_their_base_are_merged_from_a_bucket(store, tmp_path):  # noqa: F811
    arrays = checkpoints.write_llama(tmp_path / "llama")
    folder = tmp_path / "adapter"
    folder.mkdir()
    rows, columns = arrays["model.layers.0.self_attn.q_proj.weight"].shape
    module = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {
        f"{module}A.weight": np.ones((2, columns), np.float32),
        f"{module}B.weight": np.ones((rows, 2), np.float32),
    }
    safetensors.numpy.save_file(pair, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    store.add("llama", tmp_path / "llama")
    store.add("adapter", folder)
    js.merge_lora("s3://bucket/llama", tmp_path / "here", adapter="s3://bucket/adapter")
    js.merge_lora(tmp_path / "llama", tmp_path / "there", adapter=folder)
    js.merge_lora("s3://bucket/llama", tmp_path / "local adapter", adapter=folder)
    js.merge_lora(tmp_path / "llama", tmp_path / "local base", adapter="hf://org/adapter")
    for name in ("here", "local adapter", "local base"):
        assert not js.verify(tmp_path / name, tmp_path / "there").problems
