"""What a load from a store requests: the bytes that it needs, once, and few requests."""

import re

import checkpoints
import jax
import pytest
from remote_store import store  # noqa: F401 - a fixture

import jaxshard as js
from jaxshard.storage import fetch
from jaxshard.storage.fetch import RemoteFiles


@pytest.fixture
def llama(store, tmp_path, monkeypatch):  # noqa: F811
    """Serve a model of 3.5 MB, with requests of 64 KiB, so that each tensor takes several."""
    monkeypatch.setattr(fetch, "REQUEST_BYTES", 64 << 10)
    monkeypatch.setattr(RemoteFiles, "request_bytes", 64 << 10)
    monkeypatch.setattr(fetch, "GAP_BYTES", 16 << 10)
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


def test_opening_fetches_headers_only(store, llama):  # noqa: F811
    store.objects.log.clear()
    js.plan("s3://bucket/llama", "dp2mp4")
    assert _fetched(store) <= 3 * (64 << 10)


def test_part_of_the_devices_fetch_their_part(store, llama):  # noqa: F811
    catalog = js.open("s3://bucket/llama")
    store.objects.log.clear()
    js.load(catalog, "pp2", devices=jax.devices()[:2])
    assert _fetched(store) <= 1.02 * llama
