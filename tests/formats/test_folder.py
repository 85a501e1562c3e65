"""Folders and recognition: file kinds by first bytes, formats by file names."""

from __future__ import annotations

import pytest

from jaxshard.errors import FormatError, NotFoundError
from jaxshard.formats.folder import (
    MemoryFolder,
    describe_kind,
    is_iteration,
    is_orbax,
    is_orbax_item,
    kind_of,
    latest_iteration,
    orbax_item_folder,
)


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a", b"", "empty"),
        ("a", b"\x0a\x10\x0a\x03f32", "weights.ckpt"),
        ("a", b"\x08\x02\x12<", "strategy.ckpt"),
        ("a", b"{}", "strategy.json"),
        ("a.json", b" {}", "strategy.json"),
        ("a", (2).to_bytes(8, "little") + b"{}", "safetensors"),
        ("a", b"PK\x03\x04", "torch"),
        ("a", b"\x80\x02}", "torch"),
        ("a", bytes.fromhex("d85e3a7f"), "AES-GCM"),
        ("a", bytes.fromhex("da5e3a7f"), "SM4-CBC"),
        ("a", b"plain text", "unknown"),
    ],
)
def test_the_first_bytes_show_the_kind_of_a_file(name, data, kind):
    assert kind_of(MemoryFolder({name: data}), name) == kind
    assert describe_kind(kind)


def test_a_missing_file_and_a_read_past_the_end_are_refused():
    folder = MemoryFolder({"a": b"abc"}, root="here")
    with pytest.raises(NotFoundError, match="here has no file b"):
        kind_of(folder, "b")
    with pytest.raises(FormatError, match="a ends at byte 3; bytes 2 to 4 were requested"):
        folder.read("a", 2, 2)


SHARD = "llama-model-0000000-0000001.safetensors"


def test_the_tracker_decides_which_iteration_is_the_latest():
    files = {f"iteration_{n:08d}/{SHARD}": b"" for n in (5, 10)} | {"iteration_00000020/x": b""}
    tracker = "latest_checkpointed_iteration.txt"
    assert latest_iteration(MemoryFolder(files)) == "iteration_00000010"
    assert latest_iteration(MemoryFolder(files | {tracker: b"5\n"})) == "iteration_00000005"
    assert latest_iteration(MemoryFolder(files | {tracker: b"20"})) == "iteration_00000010"
    assert latest_iteration(MemoryFolder({"model.safetensors": b""})) is None


def test_an_iteration_has_metadata_and_shard_files():
    assert is_iteration(["metadata.json", SHARD])
    assert not is_iteration(["metadata.json", "model.safetensors"])
    assert not is_iteration([SHARD])


def test_an_item_in_a_folder_is_recognised_but_is_not_the_checkpoint_itself():
    assert is_orbax_item(["_METADATA", "d/0f"])
    assert not is_orbax_item(["default/_METADATA"])
    assert orbax_item_folder(["1/default/_METADATA"]) == "1/default"


def test_several_steps_are_not_one_checkpoint():
    steps = ["1/default/_METADATA", "2/default/_METADATA"]
    assert is_orbax(steps)
    with pytest.raises(FormatError, match="2 items or steps"):
        orbax_item_folder(steps)
    assert not is_orbax(["model.safetensors", "a/b/c/_METADATA"])
