"""Vectors: many places in memory filled by few requests, each bit in its place, or an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxshard.errors import FormatError, StorageError
from jaxshard.storage import vectored_io
from jaxshard.storage.local import Handles
from jaxshard.storage.vectored_io import IOVec

DATA = bytes(np.random.default_rng(0).integers(0, 256, 40_000, np.uint8))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(DATA)
    return tmp_path / "f"


def places(*lengths: int) -> tuple[IOVec, np.ndarray]:
    """Ranges of these lengths, the first of them last in memory, with a byte between them."""
    memory = np.zeros(sum(lengths) + len(lengths), np.uint8)
    table, end = [], len(memory)
    for length in lengths:
        end -= length + 1
        table.append((memory.ctypes.data + end, length))
    return IOVec(np.array(table, np.uint64), memory), memory


def parts(memory: np.ndarray, *lengths: int) -> bytes:
    """The bytes of the places, in their order."""
    found, end = b"", len(memory)
    for length in lengths:
        end -= length + 1
        found += memory[end : end + length].tobytes()
        assert memory[end + length] == 0, "written beyond the place"
    return found


LENGTHS = [1, 0, 7, 30] * 800  # more than the kernel takes at once


@pytest.mark.parametrize("how", ["whole", "half", "not offered"])
def test_places_are_filled_in_order(file, monkeypatch, how):
    if how == "half":
        cut = _cut(vectored_io._preadv())
        monkeypatch.setattr(vectored_io, "_preadv", lambda: cut)
    if how == "not offered":
        monkeypatch.setattr(vectored_io, "_preadv", lambda: None)
    wanted, memory = places(*LENGTHS)
    Handles(file.parent).read_scattered("f", 11, wanted)
    assert parts(memory, *LENGTHS) == DATA[11 : 11 + sum(LENGTHS)]


def _cut(real):
    """A kernel that ends each request within a place."""

    def call(descriptor, address, count, offset):
        table = np.ctypeslib.as_array(
            (vectored_io.ctypes.c_uint64 * (2 * count)).from_address(address)
        )
        cut = table.reshape(-1, 2)[: max(1, count // 2)].copy()
        cut[-1, 1] -= cut[-1, 1] // 2
        return real(descriptor, cut.ctypes.data, len(cut), offset)

    return call


@pytest.mark.parametrize("offset", [0, 38_000, 40_000, 50_000])
def test_a_file_that_ends_first_is_an_error(file, offset):
    wanted, _ = places(*[3000] * 15)
    with pytest.raises(FormatError, match="ends at byte 40000"):
        Handles(file.parent).read_scattered("f", offset, wanted)


def test_what_the_disk_refuses_is_an_error(file):
    wanted, _ = places(10, 10)
    with pytest.raises(StorageError, match="cannot be read at byte 5: Is a directory"):
        Handles(file.parent.parent).read_scattered(file.parent.name, 5, wanted)


def test_a_request_that_was_interrupted_is_made_again(file, monkeypatch):
    real, calls = vectored_io._preadv(), []

    def call(*arguments):
        calls.append(1)
        if len(calls) == 1:
            vectored_io.ctypes.set_errno(vectored_io.errno.EINTR)
            return -1
        return real(*arguments)

    monkeypatch.setattr(vectored_io, "_preadv", lambda: call)
    wanted, memory = places(5, 6)
    Handles(file.parent).read_scattered("f", 0, wanted)
    assert parts(memory, 5, 6) == DATA[:11]
    assert len(calls) == 2
