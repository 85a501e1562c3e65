"""Reading ahead: the disk is told what comes, in order, near, and only where it must be fetched."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxshard.api import open_checkpoint
from jaxshard.box import Box
from jaxshard.catalog import Piece, Tensor
from jaxshard.dtypes import dtype
from jaxshard.loading import load
from jaxshard.loading.ahead import ReadingAhead, spans
from jaxshard.planning import move_into
from jaxshard.storage.linux import is_cached
from jaxshard.storage.reading import SourceFiles

BF16 = dtype("BF16")


class Disk:
    """Has ``cached`` or not, and tells what it was asked to fetch."""

    def __init__(self, *, cached: bool = False) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self._cached = cached

    def is_cached(self, piece, offset):
        return self._cached

    def begin_reading(self, piece, offset, num_bytes):
        self.asked.append((piece.file, offset, num_bytes))


def moves(count: int, shape: tuple[int, ...] = (4, 8)):
    """As many tensors, one after the other in a file, each wanted whole."""
    found = []
    for number in range(count):
        whole = Box.whole(shape)
        size = 2 * whole.size
        tensor = Tensor(f"t{number}", BF16, shape, (Piece(0, number * size, whole),))
        found.append(move_into(tensor, {whole: (0,)}))
    return found


def wait_for(condition, what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.001)


def test_the_disk_is_told_of_everything_in_order():
    disk, given = Disk(), moves(50)
    ahead = ReadingAhead(given, disk)
    ahead.start()
    wait_for(lambda: len(disk.asked) == 50, "the disk was not told of all")
    ahead.close()
    assert disk.asked == [(0, n * 64, 64) for n in range(50)]


def test_it_stays_near_and_goes_on_as_the_load_does():
    disk, given = Disk(), moves(50)
    ahead = ReadingAhead(given, disk, window_bytes=10 * 64)
    ahead.start()
    wait_for(lambda: len(disk.asked) == 10, "it did not begin")
    time.sleep(0.05)
    assert len(disk.asked) == 10
    for move in given[:5]:
        ahead.reached(move)
    wait_for(lambda: len(disk.asked) == 15, "it did not go on")
    ahead.close()  # and ends, although it waits
    assert len(disk.asked) == 15


@pytest.mark.parametrize("disk", [Disk(cached=True), None])
def test_where_nothing_must_be_fetched_no_thread_begins(disk):
    before = threading.active_count()
    ahead = ReadingAhead(moves(50), disk)
    ahead.start()
    assert threading.active_count() == before
    ahead.close()
    assert disk is None or disk.asked == []


def test_a_share_is_fetched_from_its_first_byte_to_its_last_unless_it_is_scattered():
    tensor = Tensor("t", BF16, (8, 100), (Piece(3, 1000, Box.whole((8, 100))),))
    rows = move_into(tensor, {Box((2, 0), (4, 100)): (0,)})
    assert list(spans(rows)) == [(tensor.pieces[0], 1000 + 400, 400)]
    most = move_into(tensor, {Box((0, 0), (8, 60)): (0,)})
    assert list(spans(most)) == [(tensor.pieces[0], 1000, 7 * 200 + 120)]
    two = move_into(tensor, {Box((0, 25 * n), (8, 25 * n + 25)): (n,) for n in range(4)})
    assert list(spans(two)) == [(tensor.pieces[0], 1000, 1600)]
    few = move_into(tensor, {Box((0, 25), (8, 50)): (0,)})
    assert list(spans(few)) == []


def test_a_cold_file_is_fetched_and_read_right(tmp_path: Path, monkeypatch):
    arrays = {f"w{n}": np.arange(n, n + 4096 * 64, dtype=np.int32) for n in range(4)}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path)
    if not _made_cold(path):
        pytest.skip("this file system keeps files in memory, or does not say where they are")
    told = []
    begin = SourceFiles.begin_reading
    monkeypatch.setattr(
        SourceFiles, "begin_reading", lambda self, *what: told.append(what) or begin(self, *what)
    )
    found = load(tmp_path, jax.devices()[0])
    assert len(told) == 4
    for name, array in arrays.items():
        assert np.array_equal(np.asarray(found[name]), array)
    told.clear()
    load(tmp_path, jax.devices()[0])
    assert told == []


def _made_cold(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return not is_cached(descriptor, path.stat().st_size - 1)
    finally:
        os.close(descriptor)


def test_asking_past_the_end_of_a_file_is_no_matter(tmp_path: Path):
    safetensors.numpy.save_file({"w": np.zeros(8, np.float32)}, tmp_path / "model.safetensors")
    catalog = open_checkpoint(tmp_path)
    files = SourceFiles(catalog)
    (piece,) = catalog.tensors["w"].pieces
    files.begin_reading(piece, 1 << 30, 1 << 20)
    assert files.is_cached(piece, 1 << 30)
    files.close()
