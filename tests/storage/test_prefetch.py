"""Prefetch: in the order of the load, near ahead of it, and only if a file is not cached."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from ends import From

from jaxshard.api import open_checkpoint
from jaxshard.core.box import Box
from jaxshard.core.catalog import StoredShard, Tensor
from jaxshard.core.dtypes import dtype
from jaxshard.errors import NotFoundError
from jaxshard.loader import load
from jaxshard.planning.copies import move_into
from jaxshard.storage import readers
from jaxshard.storage.io import PrefetchRange, Source
from jaxshard.storage.readers import PrefetchThread, SourceFiles, is_cached, ranges, spans

BF16 = dtype("BF16")


class Disk(Source):
    """Has ``cached`` or not, and tells what it was asked to fetch."""

    def __init__(self, *, cached: bool = False) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self._cached = cached

    def read(self, piece, offset, buffer):
        raise AssertionError("reading ahead reads nothing")

    def is_cached(self, piece, offset):
        return self._cached

    def prefetch(self, wanted):
        self.asked.append((wanted.piece.file, wanted.offset, wanted.num_bytes))


def moves(count: int, shape: tuple[int, ...] = (4, 8)):
    """As many tensors, one after the other in a file, each wanted whole."""
    found = []
    for number in range(count):
        whole = Box.whole(shape)
        size = 2 * whole.size
        tensor = Tensor(f"t{number}", BF16, shape, (StoredShard(0, number * size, whole),))
        found.append(move_into(tensor, {whole: (0,)}))
    return found


def wait_for(condition, what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.001)


def test_the_disk_is_told_of_everything_in_order():
    disk, given = Disk(), moves(50)
    ahead = PrefetchThread(given, disk, window_bytes=8 * 64)
    ahead.start()
    for move in given:
        ahead.reached(move)
    wait_for(lambda: len(disk.asked) == 50, "the disk was not told of all")
    ahead.close()
    assert disk.asked == [(0, n * 64, 64) for n in range(50)]


def test_it_stays_near_and_goes_on_as_the_load_does():
    disk, given = Disk(), moves(50)
    ahead = PrefetchThread(given, disk, window_bytes=8 * 64)
    ahead.start()
    wait_for(lambda: len(disk.asked) == 8, "it did not begin")
    time.sleep(0.05)
    assert len(disk.asked) == 8
    for move in given[:5]:
        ahead.reached(move)
    wait_for(lambda: len(disk.asked) == 13, "it did not go on")
    time.sleep(0.05)
    ahead.close()  # and ends, although it waits
    assert len(disk.asked) == 13


def test_spans_that_follow_each_other_are_told_as_one_run():
    found = [
        (p.offset, p.num_bytes, p.before, p.ends, p.total_bytes) for p in ranges(moves(5), 128)
    ]
    assert found == [
        (0, 128, 0, False, 128),
        (128, 128, 128, False, 256),
        (256, 64, 256, True, 320),
    ]
    apart = moves(5)
    del apart[2]
    assert [(p.offset, p.num_bytes, p.before, p.ends) for p in ranges(apart, 1 << 20)] == [
        (0, 5 * 64, 0, True)  # a gap of less than a page is none
    ]
    far = moves(2, (64, 64)) + moves(5, (64, 64))[4:]
    assert [(p.offset, p.num_bytes, p.before, p.ends) for p in ranges(far, 1 << 20)] == [
        (0, 2 * 8192, 0, True),
        (4 * 8192, 8192, 0, True),
    ]


@pytest.mark.parametrize("source", [Disk(cached=True), From()])
def test_where_nothing_must_be_fetched_no_thread_begins(source):
    before = threading.active_count()
    ahead = PrefetchThread(moves(50), source)
    ahead.start()
    assert threading.active_count() == before
    ahead.close()


def test_a_share_is_fetched_from_its_first_byte_to_its_last_unless_it_is_scattered():
    tensor = Tensor("t", BF16, (8, 100), (StoredShard(3, 1000, Box.whole((8, 100))),))
    rows = move_into(tensor, {Box((2, 0), (4, 100)): (0,)})
    assert list(spans(rows)) == [(tensor.shards[0], 1000 + 400, 400)]
    most = move_into(tensor, {Box((0, 0), (8, 60)): (0,)})
    assert list(spans(most)) == [(tensor.shards[0], 1000, 7 * 200 + 120)]
    two = move_into(tensor, {Box((0, 25 * n), (8, 25 * n + 25)): (n,) for n in range(4)})
    assert list(spans(two)) == [(tensor.shards[0], 1000, 1600)]
    few = move_into(tensor, {Box((0, 25), (8, 50)): (0,)})
    assert list(spans(few)) == []


def test_a_cold_file_is_fetched_and_read_right(tmp_path: Path, monkeypatch):
    arrays = {f"w{n}": np.arange(n, n + 4096 * 64, dtype=np.int32) for n in range(4)}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path)
    if not _made_cold(path):
        pytest.skip("this file system keeps files in memory, or does not say where they are")
    told = []
    begin = SourceFiles.prefetch
    monkeypatch.setattr(
        SourceFiles,
        "prefetch",
        lambda self, wanted: told.append(wanted.num_bytes) or begin(self, wanted),
    )
    found = load(tmp_path, jax.devices()[0])
    assert told == [4 << 20]  # of the four, in one run
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


def read_ahead_marks(monkeypatch, descriptor, offset, num_bytes, *, window=8 << 20, **how):
    """Where a byte is asked for, and what ``fadvise`` is told."""
    asked, told = [], []
    monkeypatch.setattr(readers, "_window_bytes", lambda device: window)

    def preadv(descriptor, buffers, at, flags):
        asked.append(at)
        assert flags == os.RWF_NOWAIT
        raise BlockingIOError

    monkeypatch.setattr(readers.os, "preadv", preadv)
    monkeypatch.setattr(readers.os, "posix_fadvise", lambda *what: told.append(what[1:3]))
    readers.begin_reading(descriptor, offset, num_bytes, **how)
    assert told[0][0] == offset
    assert sum(n for _, n in told) == num_bytes
    return asked


@pytest.fixture
def large_file(tmp_path: Path):
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 256 << 20)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_a_long_run_is_asked_for_closely_first_then_here_and_there(monkeypatch, large_file):
    asked = read_ahead_marks(monkeypatch, large_file, 0, 256 << 20)
    assert asked == sorted(set(asked))
    assert asked[:3] == [0, 4 << 10, 8 << 10]
    assert asked[-2:] == [254 << 20, 255 << 20]
    assert len(asked) < 450
    first = read_ahead_marks(monkeypatch, large_file, 0, 32 << 20, ends=False)
    second = read_ahead_marks(
        monkeypatch, large_file, 32 << 20, 224 << 20, before=32 << 20, ends=True
    )
    assert first + second == asked  # a run told in portions is the same run


def test_what_follows_a_run_is_not_fetched_for_nothing(monkeypatch, large_file):
    asked = read_ahead_marks(monkeypatch, large_file, 64 << 20, 64 << 20)
    assert max(asked) < (128 - 16) << 20  # two readaheads of 8 MiB before the end
    assert read_ahead_marks(monkeypatch, large_file, 64 << 20, 16 << 20) == []
    assert max(read_ahead_marks(monkeypatch, large_file, 64 << 20, 64 << 20, ends=False)) == (
        127 << 20
    )


def test_small_readaheads_are_left_alone(monkeypatch, large_file):
    assert read_ahead_marks(monkeypatch, large_file, 0, 64 << 20, window=128 << 10) == []


@pytest.mark.parametrize("where", ["bdi/{}", "block/{}/../queue"])
def test_the_size_of_a_readahead_is_what_the_system_says(monkeypatch, tmp_path, where):
    places = (f"{tmp_path}/no/{{}}", f"{tmp_path}/{where}")
    monkeypatch.setattr(readers, "_READAHEADS", places)
    device = os.makedev(4095, 77)
    folder = Path(where.format("4095:77"))
    (tmp_path / folder.parts[0] / "4095:77").mkdir(parents=True)
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "read_ahead_kb").write_text("8192\n")
    readers._window_bytes.cache_clear()
    try:
        assert readers._window_bytes(device) == 8 << 20
        assert readers._window_bytes(os.makedev(4095, 78)) == 0
    finally:
        readers._window_bytes.cache_clear()


def test_where_nobody_reads_without_waiting_the_disk_is_told_all_the_same(monkeypatch, large_file):
    told = []

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(readers, "_window_bytes", lambda device: 8 << 20)
    monkeypatch.setattr(readers.os, "preadv", refuse)
    monkeypatch.setattr(readers.os, "posix_fadvise", lambda *what: told.append(what[1:3]))
    readers.begin_reading(large_file, 0, 64 << 20)
    assert sum(n for _, n in told) == 64 << 20


def test_a_file_that_vanished_is_for_its_reader_to_tell(tmp_path: Path):
    safetensors.numpy.save_file({"w": np.zeros(8, np.float32)}, tmp_path / "model.safetensors")
    catalog = open_checkpoint(tmp_path)
    files = SourceFiles(catalog)
    (tmp_path / "model.safetensors").unlink()
    (piece,) = catalog.tensors["w"].shards
    files.prefetch(PrefetchRange(piece, 0, 8))
    with pytest.raises(NotFoundError):
        files.read(piece, 0, memoryview(bytearray(8)))
    files.close()


def test_asking_past_the_end_of_a_file_is_no_matter(tmp_path: Path):
    safetensors.numpy.save_file({"w": np.zeros(8, np.float32)}, tmp_path / "model.safetensors")
    catalog = open_checkpoint(tmp_path)
    files = SourceFiles(catalog)
    (piece,) = catalog.tensors["w"].shards
    files.prefetch(PrefetchRange(piece, 1 << 30, 1 << 20))
    assert files.is_cached(piece, 1 << 30)
    files.close()
