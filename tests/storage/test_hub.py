"""Repositories of the Hub: commits, tokens, links."""

import json

import checkpoints
import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from remote_store import store  # noqa: F401 - a fixture

import jaxshard as js
from jaxshard.errors import NotFoundError, StorageError


@pytest.fixture
def llama(store, tmp_path):  # noqa: F811
    arrays = checkpoints.write_llama(tmp_path / "llama", num_files=2)
    store.add("llama", tmp_path / "llama")
    return arrays


def _load(url):
    return {name: np.asarray(array) for name, array in js.load(url, "mp2").items()}


def test_each_weight_file_is_resolved_once(store, llama):  # noqa: F811
    catalog = js.open("hf://org/llama")
    store.objects.log.clear()
    js.load(catalog, "mp8")
    assert len(store.lines("HEAD /org/llama/resolve")) == 2


def test_a_link_that_has_expired_is_resolved_again(store, llama):  # noqa: F811
    catalog = js.open("hf://org/llama")
    store.fail("403", "GET /cdn/", times=1)
    assert _load(catalog).keys() == llama.keys()


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


def test_nothing_is_written_to_a_store(store, llama, tmp_path):  # noqa: F811
    for write in (
        lambda: js.convert(tmp_path / "llama", "s3://bucket/out"),
        lambda: js.save(js.load(tmp_path / "llama", "mp2"), "gs://bucket/out"),
        lambda: js.slice(tmp_path / "llama", "hf://org/out", "mp2"),
    ):
        with pytest.raises(js.LayoutError, match="local paths only"):
            write()
    assert not [path for path in tmp_path.iterdir() if ":" in path.name]
