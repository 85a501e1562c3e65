"""Pages: how memory that nobody has touched yet comes by its pages, many at a time.

A fault for every page of 4 KiB costs several times what reading the page's bytes from a
warm file does, and a huge page costs hardly more than a small one. Except on a virtual machine
that hands free memory back to its host: there a huge page may have to be fetched again, at a
twentieth of the speed, while small ones are taken from what was used a moment ago. The same
machine does the one now and the other a second later, so it is asked by being timed:

    huge pages    until some come slowly
    small ones    for the next 64 MiB, then it is tried again; twice as many each time in vain

Linux only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable
from functools import lru_cache

HUGE_BYTES = 2 << 20

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE: Python has no name for it
_STEP_BYTES = 8 << 20  # of small pages: what one call asks for
_SLOW_S = 0.0015  # what the small pages take that a huge one stands for; clearing it: 0.0002
_THERE_S = 0.00002  # it was there already
_LAST = 8  # how many pages the mean is about
_LEAST_SMALL_BYTES = 64 << 20
_MOST_SMALL_BYTES = 1 << 30
_FAILED = ctypes.c_void_p(-1).value


@lru_cache(maxsize=1)
def linux() -> ctypes.CDLL | None:
    """The C library, where it is Linux's."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    library.mmap.restype = pointer
    library.munmap.argtypes = [pointer, size]
    library.madvise.argtypes = [pointer, size, number]
    return library


def reserve(library: ctypes.CDLL, num_bytes: int, *, huge: bool) -> int:
    """The address of ``num_bytes`` that have no pages yet, on a huge page's boundary.

    Raises:
        MemoryError: the system refuses.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    wide = num_bytes + HUGE_BYTES
    address = library.mmap(None, wide, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address in (None, _FAILED):
        raise MemoryError(f"{num_bytes} bytes for shards: {os.strerror(ctypes.get_errno())}")
    start = -(-address // HUGE_BYTES) * HUGE_BYTES
    if start > address:
        library.munmap(address, start - address)
    if address + wide > start + num_bytes:
        library.munmap(start + num_bytes, address + wide - start - num_bytes)
    # a wish: kernels without huge pages refuse it
    library.madvise(start, num_bytes, mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    return int(start)


def populate(library: ctypes.CDLL, start: int, end: int, step_bytes: int = _STEP_BYTES) -> None:
    """Have the pages from ``start`` to ``end`` there; kernels before 5.14 refuse: then not."""
    for at in range(start, end, step_bytes):
        library.madvise(at, min(step_bytes, end - at), _POPULATE_WRITE)


class Pace:
    """Which pages are taken next, by how quickly the last huge ones came.

    Threads share it without a lock: the worst that a race does is one more trial.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._mean_s = 0.0  # what a huge page takes, the last ones counting most
        self._small_bytes = 0  # left to be taken as small pages
        self._next_small_bytes = _LEAST_SMALL_BYTES

    def is_huge(self, num_bytes: int) -> bool:
        """Whether the next ``num_bytes`` are to lie on huge pages."""
        if self._small_bytes <= 0:
            return True
        self._small_bytes -= num_bytes
        return False

    def prepare(self, library: ctypes.CDLL, start: int, end: int, last: int) -> None:
        """Have the pages from ``start`` to ``end`` there, of memory on huge pages up to ``last``.

        Where they come slowly, what is left up to ``last`` is laid on small ones.
        """
        while start < end:
            stop = min(end, start // HUGE_BYTES * HUGE_BYTES + HUGE_BYTES)
            before = self._clock()
            populate(library, start, stop)
            if self._is_slow(self._clock() - before):
                library.madvise(stop, last - stop, mmap.MADV_NOHUGEPAGE)
                populate(library, stop, end)
                return
            start = stop

    def _is_slow(self, took_s: float) -> bool:
        """Learn from one huge page; whether small ones are better for a while."""
        if took_s < _THERE_S:
            return False
        self._mean_s += (took_s - self._mean_s) / _LAST
        if self._mean_s <= _SLOW_S:
            if took_s < _SLOW_S:
                self._next_small_bytes = _LEAST_SMALL_BYTES
            return False
        self._mean_s = _SLOW_S  # one quick page is then enough to go on with huge ones
        if self._small_bytes <= 0:
            self._small_bytes = self._next_small_bytes
            self._next_small_bytes = min(2 * self._next_small_bytes, _MOST_SMALL_BYTES)
        return True
