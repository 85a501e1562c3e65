"""Memory for shards: kept when nobody holds it any more, and never given out twice."""

from __future__ import annotations

import gc
import mmap
import sys

import jax
import numpy as np
import pytest

from jaxshard.devices import host_memory
from jaxshard.devices.host_memory import aligned_empty, is_aligned

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="regions are Linux's")
SIZE = 5 << 20


@pytest.fixture(autouse=True)
def _nothing_kept():
    gc.collect()
    host_memory.forget()
    yield
    gc.collect()
    host_memory.forget()


def test_a_region_that_nobody_holds_is_used_again():
    memory, prepare = host_memory.region(SIZE)
    where = memory.ctypes.data
    assert prepare is not None
    del memory, prepare
    assert host_memory.kept_bytes() == SIZE
    again, prepare = host_memory.region(SIZE)
    assert (again.ctypes.data, prepare) == (where, None)
    assert host_memory.kept_bytes() == 0


def test_a_region_that_somebody_looks_at_is_not():
    memory, _ = host_memory.region(SIZE)
    view = memory[100:200].view(np.uint16)
    where = memory.ctypes.data
    del memory
    other, _ = host_memory.region(SIZE)
    assert other.ctypes.data != where
    view[:] = 7
    other[:] = 0
    assert view.tolist() == [7] * 50


def test_an_array_holds_the_region_it_was_made_of():
    memory = aligned_empty(SIZE)
    assert is_aligned(memory)
    memory[:] = 1
    where = memory.ctypes.data
    array = jax.device_put(memory, jax.devices()[2])
    del memory
    assert array.unsafe_buffer_pointer() == where
    other = aligned_empty(SIZE)
    other[:] = 2
    assert np.asarray(array).sum() == SIZE
    array.delete()
    gc.collect()
    assert host_memory.kept_bytes() == SIZE


def test_no_more_is_kept_than_a_part_of_the_machines_memory(monkeypatch):
    monkeypatch.setattr(host_memory, "_most_kept", lambda: 2 * SIZE)
    held = [host_memory.region(SIZE)[0] for _ in range(4)]
    held.clear()
    assert host_memory.kept_bytes() == 2 * SIZE


def test_prepared_pages_are_there_and_keep_what_is_in_them():
    memory, prepare = host_memory.region(SIZE)
    memory[5000] = 9
    prepare(4000, 3000)
    assert memory[5000] == 9
    prepare(0, SIZE)
    assert int(memory.sum()) == 9


def test_regions_lie_side_by_side_and_are_given_back_one_by_one(monkeypatch):
    monkeypatch.setattr(host_memory, "_most_kept", lambda: 0)
    pages = SIZE // mmap.PAGESIZE
    held = [host_memory.region(SIZE)[0] for _ in range(4)]
    for number, memory in enumerate(held):
        memory[:] = number
    steps = np.diff([memory.ctypes.data for memory in held]) // mmap.PAGESIZE
    assert list(steps).count(pages) >= 2  # at most one of them begins another arena
    del held[1], memory
    gc.collect()
    assert [int(memory[-1]) for memory in held] == [0, 2, 3]


def test_elsewhere_numpy_allocates(monkeypatch):
    monkeypatch.setattr(host_memory, "linux", lambda: None)
    memory, prepare = host_memory.region(SIZE)
    assert (memory.size, prepare) == (SIZE, None)
    assert is_aligned(memory)
