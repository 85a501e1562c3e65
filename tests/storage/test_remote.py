"""Checkpoints in remote stores: opened, loaded and converted by ranges, wrong data never."""

import json
import threading
from pathlib import Path

import checkpoints
import numpy as np
import object_server
import pytest
from remote_store import COMMIT, store  # noqa: F401 - a fixture

import jaxshard as js
from jaxshard.cli import main
from jaxshard.errors import FormatError, JaxshardError, NotFoundError, StorageError

KINDS = ("s3", "gs", "http", "hub")


@pytest.fixture
def llama(store, tmp_path):  # noqa: F811
    """Serve a small Llama in three files; its arrays and its local folder."""
    folder = tmp_path / "llama"
    arrays = checkpoints.write_llama(folder, num_files=3)
    store.add("llama", folder)
    return arrays


def _equal(loaded, arrays):
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(
            np.asarray(loaded[name]).view(np.uint8), array.view(np.uint8), err_msg=name
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["dp2mp4", "mp8", "dp1mp2pp2"])
def test_a_remote_checkpoint_loads_as_the_local_one_does(kind, to, store, llama):  # noqa: F811
    url = store.urls("llama")[kind]
    if to.endswith("pp2"):
        loaded = {n: a for n, a in js.load(url, to, stream=True).items() if a is not None}
    else:
        loaded = js.load(url, to, stream=True)
    _equal(loaded, llama)


@pytest.mark.parametrize("kind", KINDS)
def test_a_remote_checkpoint_is_cut_merged_and_verified(kind, store, llama, tmp_path):  # noqa: F811
    url = store.urls("llama")[kind]
    js.slice(url, tmp_path / "cut", "dp2mp2", stream=True)
    js.merge(tmp_path / "cut", tmp_path / "whole")
    assert not js.verify(tmp_path / "whole", url).problems
    assert not js.verify(url).problems
    local = js.load_rank(tmp_path / "llama", "dp2mp2", rank=1)
    _equal(js.load_rank(url, "dp2mp2", rank=1, stream=True), local)
    js.convert(url, tmp_path / "copy")
    config = (tmp_path / "llama/config.json").read_bytes()
    assert (tmp_path / "copy/config.json").read_bytes() == config


def test_rank_folders_and_their_strategy_are_read_from_a_bucket(store, llama, tmp_path):  # noqa: F811
    js.slice(tmp_path / "llama", tmp_path / "cut", "mp2", format="ranks")
    store.add("cut", tmp_path / "cut")
    _equal(js.load("s3://bucket/cut", "mp4"), llama)


@pytest.mark.parametrize("format", ["ckpt", "unified", "iteration"])
def test_mindspores_formats_are_read_from_a_bucket(format, store, llama, tmp_path):  # noqa: F811
    js.convert(tmp_path / "llama", tmp_path / "other", format=format)
    store.add("other", tmp_path / "other")
    _equal(js.load("s3://bucket/other", "mp2"), llama)


def test_a_single_file_is_a_checkpoint(store, llama, tmp_path):  # noqa: F811
    js.convert(tmp_path / "llama", tmp_path / "one.safetensors")
    store.objects.put("bucket/d/one.safetensors", (tmp_path / "one.safetensors").read_bytes())
    _equal(js.load("s3://bucket/d/one.safetensors", "mp2"), llama)
    _equal(js.load(f"{store.address}/http/bucket/d/one.safetensors", "mp2"), llama)


def test_headers_of_all_files_take_one_round(store, llama):  # noqa: F811
    store.objects.log.clear()
    js.open("s3://bucket/llama")
    assert len(store.lines("list-type")) == 1
    assert len(store.lines()) == 1 + 6  # three files, their index, config.json, tokenizer.json


def test_the_command_line_takes_urls(store, llama, tmp_path, capsys):  # noqa: F811
    assert main(["inspect", "s3://bucket/llama"]) == 0
    assert "llama model with 2 layers" in capsys.readouterr().out
    assert main(["plan", "s3://bucket/llama", "--to", "mp2"]) == 0
    assert main(["convert", "s3://bucket/llama", str(tmp_path / "out"), "--quiet"]) == 0
    _equal(js.load(tmp_path / "out", "mp2"), llama)


def test_the_catalog_of_a_repository_names_its_commit(store, llama):  # noqa: F811
    assert js.open("hf://org/llama").root == f"hf://org/llama@{COMMIT}"
    assert js.open("hf://org/llama@main").root == f"hf://org/llama@{COMMIT}"


def test_a_name_that_looks_like_a_repository_is_explained():
    with pytest.raises(NotFoundError, match=r"write hf://org/llama"):
        js.open("org/llama")


def test_unknown_places_are_refused_with_what_to_do(store, llama):  # noqa: F811
    with pytest.raises(NotFoundError, match=r"s3://bucket/nothing does not exist, or is empty"):
        js.open("s3://bucket/nothing")
    with pytest.raises(NotFoundError, match="org/none does not exist, or is private"):
        js.open("hf://org/none")
    with pytest.raises(NotFoundError, match="no such revision"):
        js.open("hf://org/llama@gone")
    with pytest.raises(js.LayoutError, match="unknown kind of store"):
        js.open("ftp://host/llama")
    with pytest.raises(js.LayoutError, match="Pass the URL as text"):
        js.open(Path("s3://bucket/llama"))
    with pytest.raises(js.LayoutError, match="cannot be mapped"):
        js.load("s3://bucket/llama", "mp2", mmap=True)
    with pytest.raises(js.LayoutError, match="reads whole files"):
        js.load("s3://bucket/llama", "mp2", verify=True)


# --- Faults --------------------------------------------------------------------------------

FAULTS = ("500", "503", "429", "reset", "truncate", "stall", "hang", "length", "short", "whole")


@pytest.mark.parametrize(
    ("kind", "fault", "times"),
    [
        *(("s3", fault, times) for fault in FAULTS for times in (1, 99)),
        *((kind, fault, 1) for kind in ("http", "hub") for fault in ("truncate", "short")),
    ],
)
def test_a_fault_ends_in_the_right_data_or_in_an_error(fault, times, kind, store, llama):  # noqa: F811
    catalog = js.open(store.urls("llama")[kind])
    store.fail(fault, "GET .*model-", times=times, seconds=1.5)
    try:
        loaded = js.load(catalog, "mp2", stream=True)
    except (StorageError, FormatError) as error:
        text = str(error)
    else:
        _equal(loaded, llama)
        text = ""
    assert "signature=" not in text
    _no_thread_is_left()


def _no_thread_is_left():
    """Threads end with the request that they make, whose time-out is a second here."""
    for thread in threading.enumerate():
        if thread.name == "jaxshard fetch":
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_an_object_that_changes_is_an_error(kind, store, llama):  # noqa: F811
    catalog = js.open(store.urls("llama")[kind])
    key = "bucket/llama/model-00002-of-00003.safetensors"
    data = bytes(store.objects.data[key][0])
    store.objects.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FormatError, match="changed while being read"):
        js.load(catalog, "mp2")


def test_a_server_that_ignores_conditions_is_found_by_its_tags(store, llama, monkeypatch):  # noqa: F811
    catalog = js.open("s3://bucket/llama")
    key = "bucket/llama/model-00002-of-00003.safetensors"
    data, _ = store.objects.data[key]
    store.objects.data[key] = (data, '"another"')
    monkeypatch.setattr(object_server.Handler, "is_current", lambda self, tag: True)
    with pytest.raises(FormatError, match="changed while being read"):
        js.load(catalog, "mp2")


def test_refused_credentials_are_explained(store, llama):  # noqa: F811
    catalog = js.open("s3://bucket/llama")
    store.fail("403", "GET .*model-", times=99)
    with pytest.raises(StorageError, match="refuses these credentials, or they have expired"):
        js.load(catalog, "mp2")


def test_an_index_may_not_name_files_outside_its_folder(store, tmp_path):  # noqa: F811
    index = {"weight_map": {"a": "../secret.safetensors"}}
    store.objects.put("bucket/evil/model.safetensors.index.json", json.dumps(index).encode())
    with pytest.raises(JaxshardError, match="outside"):
        js.open(f"{store.address}/http/bucket/evil")
    with pytest.raises(JaxshardError):
        js.open("s3://bucket/evil")
    assert not store.lines("secret")
