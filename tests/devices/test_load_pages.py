"""Pages: huge ones while they come quickly, small ones where they do not."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest

from jaxshard.devices import host_memory
from jaxshard.devices.host_memory import HUGE_BYTES, Pace, linux, reserve

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are asked for on Linux")
MIB = 1 << 20
QUICK_S, SLOW_S = 0.0002, 0.008


class Clock:
    """Tells that each huge page took what it says next; the last one for ever."""

    def __init__(self, *took_s: float) -> None:
        self._took, self._now, self._asked = list(took_s), 0.0, 0

    def __call__(self) -> float:
        self._asked += 1
        if self._asked % 2 == 0:
            self._now += self._took.pop(0) if len(self._took) > 1 else self._took[0]
        return self._now


class Calls:
    """Writes down what the system is asked for, and does nothing."""

    def __init__(self) -> None:
        self.advice: list[tuple[int, int, int]] = []

    def madvise(self, start: int, num_bytes: int, advice: int) -> int:
        self.advice.append((start // MIB, num_bytes // MIB, advice))
        return 0


def small_after(pace: Pace, calls: Calls) -> bool:
    """Whether 32 MiB that begin on huge pages end on small ones."""
    pace.prepare(calls, 0, 32 * MIB, 32 * MIB)
    return any(advice == mmap.MADV_NOHUGEPAGE for _, _, advice in calls.advice)


def test_pages_that_come_quickly_stay_huge():
    pace, calls = Pace(Clock(QUICK_S)), Calls()
    assert not small_after(pace, calls)
    assert [(start, size) for start, size, _ in calls.advice] == [(2 * i, 2) for i in range(16)]
    assert all(pace.is_huge(MIB) for _ in range(1000))


def test_one_slow_page_among_quick_ones_changes_nothing():
    assert not small_after(Pace(Clock(QUICK_S, QUICK_S, SLOW_S, QUICK_S)), Calls())


def test_where_huge_pages_come_slowly_the_rest_is_small():
    pace, calls = Pace(Clock(SLOW_S)), Calls()
    assert small_after(pace, calls)
    first, rest = calls.advice[1][:2], calls.advice[2][:2]
    assert first == (2, 2)  # two were enough to know
    assert calls.advice[2] == (4, 28, mmap.MADV_NOHUGEPAGE)
    assert rest == (4, 28)
    assert (
        sum(size for _, size, advice in calls.advice if advice == host_memory._POPULATE_WRITE) == 32
    )


def test_after_slow_pages_it_is_tried_again_more_and_more_seldom():
    pace, given = Pace(Clock(SLOW_S)), []
    small_after(pace, Calls())
    for _ in range(3):
        given.append(0)
        while not pace.is_huge(MIB):
            given[-1] += 1
        small_after(pace, Calls())
    assert given == [64, 128, 256]


def test_one_quick_page_ends_the_small_ones():
    pace = Pace(Clock(SLOW_S, SLOW_S, QUICK_S))
    small_after(pace, Calls())
    while not pace.is_huge(MIB):
        pass
    assert not small_after(pace, Calls())
    assert all(pace.is_huge(MIB) for _ in range(100))


def test_reserved_memory_has_no_pages_until_they_are_prepared():
    library = linux()
    size = 3 * HUGE_BYTES + mmap.PAGESIZE
    start = reserve(library, size, huge=True)
    try:
        assert start % HUGE_BYTES == 0
        assert pages_there(library, start, size) == 0
        Pace().prepare(library, start + HUGE_BYTES, start + 2 * HUGE_BYTES, start + size)
        assert pages_there(library, start + HUGE_BYTES, HUGE_BYTES) == HUGE_BYTES // mmap.PAGESIZE
        assert pages_there(library, start, size) < size // mmap.PAGESIZE
    finally:
        library.munmap(start, size)


def pages_there(library: ctypes.CDLL, start: int, num_bytes: int) -> int:
    """How many pages of that memory are there."""
    found = (ctypes.c_ubyte * -(-num_bytes // mmap.PAGESIZE))()
    assert library.mincore(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), found) == 0
    return sum(flag & 1 for flag in found)
