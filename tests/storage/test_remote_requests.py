"""What a load from a store requests: the bytes that it needs, once, and few requests."""

import json
import os
import re
from dataclasses import asdict

import checkpoints
import jax
import numpy as np
import pytest
from processes import answers, run_processes
from remote_store import store  # noqa: F401 - a fixture
from safetensors.numpy import save_file

import jaxshard as js
from jaxshard.cli import main
from jaxshard.storage import engine, fetch
from jaxshard.storage.engine import COUNTED
from jaxshard.storage.fetch import RemoteFiles


@pytest.fixture
def llama(store, tmp_path, monkeypatch):  # noqa: F811
    """Serve a model of 3.5 MB, with requests of 64 KiB, so that each tensor takes several."""
    monkeypatch.setattr(fetch, "REQUEST_BYTES", 64 << 10)
    monkeypatch.setattr(RemoteFiles, "request_bytes", 64 << 10)
    monkeypatch.setattr(fetch, "GAP_BYTES", 16 << 10)
    monkeypatch.setattr(engine, "GAP_BYTES", 16 << 10)
    folder = tmp_path / "llama"
    arrays = checkpoints.write_llama(folder, num_files=3, layers=4, hidden=256, vocab=512)
    store.add("llama", folder)
    return sum(array.nbytes for array in arrays.values())


def _fetched(store):  # noqa: F811
    """The bytes that were requested of weight files since the last reset."""
    total = 0
    for entry in store.objects.log:
        if re.search(r"GET .*model-.*safetensors", entry["line"]):
            first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", entry["range"]).groups()
            total += int(last) - int(first) + 1
    return total


@pytest.mark.parametrize("to", ["dp2mp4", "mp8", "dp8", "dp4mp2"])
def test_a_load_fetches_each_byte_once(to, store, llama):  # noqa: F811
    catalog = js.open("s3://bucket/llama")
    store.objects.log.clear()
    js.load(catalog, to)
    assert _fetched(store) <= 1.02 * llama


@pytest.mark.parametrize("names", ["auto:nnx", "auto:nnx-scan"])
def test_a_mapped_load_fetches_each_byte_once(names, store, llama):  # noqa: F811
    catalog = js.open("s3://bucket/llama")
    store.objects.log.clear()
    js.load(catalog, "mp8", names=names)
    assert _fetched(store) <= 1.05 * llama


def test_a_conversion_fetches_each_byte_once(store, llama, tmp_path):  # noqa: F811
    catalog = js.open("s3://bucket/llama")
    store.objects.log.clear()
    js.convert(catalog, tmp_path / "out", "dp2mp4")
    assert _fetched(store) <= 1.02 * llama


@pytest.mark.parametrize("out", ["local", "s3"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"to": "dp2mp2"},
        {"to": "mp4"},
        {"max_shard_size": 200_000},
        {"names": "auto:nnx-scan"},
        {"include": "norm|q_proj"},
    ],
    ids=str,
)
def test_the_totals_of_a_plan_are_the_counts_of_its_run(how, out, store, llama, tmp_path):  # noqa: F811
    destination = tmp_path / "out" if out == "local" else "s3://bucket/out"
    how = {**how, "host_bytes": "1MiB", "workers": 2}  # blocks of a request
    totals = js.plan("s3://bucket/llama", destination=destination, **how).totals
    catalog = js.open("s3://bucket/llama")
    store.objects.log.clear()
    counts = js.convert(catalog, destination, **how).counts
    assert {name: getattr(totals, name) for name in COUNTED} == asdict(counts)
    assert totals.num_requests == len(store.lines("GET /bucket/llama/model-"))
    assert totals.bytes_fetched == _fetched(store)
    assert totals.num_requests > (3 if "include" in how else 50)


def test_a_plan_shows_its_requests(store, llama, capsys):  # noqa: F811
    assert main(["plan", "s3://bucket/llama", "--to", "mp2"]) == 0
    assert re.search(r"fetches 5\.25 MB in \d+ requests to the store", capsys.readouterr().out)


@pytest.mark.parametrize(("count", "devices"), [(2, 4), (4, 2)])
def test_several_processes_fetch_each_byte_once_in_all(count, devices, store, llama, tmp_path):  # noqa: F811
    """Column shards are fetched as rows, and resharded; unbalanced, rows are fetched again."""
    environ = {n: v for n, v in os.environ.items() if n.startswith("AWS_")}
    work = "multiprocess_files:load_from_store"
    source = str(tmp_path / "llama")
    ended = run_processes(work, count, devices, "s3://bucket/llama", source, environ=environ)
    for strategy, (is_balanced_right, is_plain_right, *_) in answers(ended)[0].items():
        assert is_balanced_right, strategy
        assert is_plain_right, strategy
        balanced = sum(answer[strategy][2] for answer in answers(ended))
        assert balanced <= 1.02 * llama, strategy
        plain = sum(answer[strategy][3] for answer in answers(ended))
        assert plain > 1.25 * llama, strategy


def test_opening_fetches_headers_only(store, llama):  # noqa: F811
    store.objects.log.clear()
    js.plan("s3://bucket/llama", "dp2mp4")
    assert _fetched(store) <= 3 * (64 << 10)


def test_part_of_the_devices_fetch_their_part(store, llama):  # noqa: F811
    catalog = js.open("s3://bucket/llama")
    store.objects.log.clear()
    js.load(catalog, "pp2", devices=jax.devices()[:2])
    assert _fetched(store) <= 1.02 * llama


@pytest.mark.parametrize("to", ["mp1", "mp8"])
def test_a_quantized_load_fetches_its_factors_with_their_weights(
    to,
    store,  # noqa: F811
    llama,
    tmp_path,
    monkeypatch,
):
    random = np.random.default_rng(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    arrays = {
        f"{name}_blocks": random.integers(0, 256, (4, 512, 16, 16), np.uint8),
        f"{name}_scales": random.integers(120, 130, (4, 512, 16), np.uint8),
    }
    folder = tmp_path / "mxfp4"
    folder.mkdir()
    save_file(arrays, folder / "model-00001-of-00001.safetensors")
    config = {"model_type": "unheard_of", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    store.add("mxfp4", folder)
    mesh = jax.make_mesh((int(to[2:]),), ("mp",), devices=jax.devices()[: int(to[2:])])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "mp"))
    lend, alone = RemoteFiles.lend, []

    def lent(self, piece, offset, num_bytes):
        found = lend(self, piece, offset, num_bytes)
        alone.extend([(offset, num_bytes)] if found is None else [])
        return found

    monkeypatch.setattr(RemoteFiles, "lend", lent)
    catalog = js.open("s3://bucket/mxfp4")
    store.objects.log.clear()
    loaded = js.load(catalog, {name: sharding}, names="auto")
    assert _fetched(store) <= 1.05 * sum(x.nbytes for x in arrays.values())
    assert alone == []  # no thread waits for a request of its own
    totals = js.plan(catalog, names="auto", workers=1).totals
    counts = js.convert(catalog, tmp_path / "true", names="auto", workers=1, stream=True).counts
    assert {n: getattr(totals, n) for n in COUNTED} == asdict(counts)
    local = js.load(folder, {name: sharding}, names="auto")
    np.testing.assert_array_equal(np.asarray(loaded[name]), np.asarray(local[name]), strict=True)
