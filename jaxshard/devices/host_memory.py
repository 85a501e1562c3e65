"""Page-aligned host memory: allocation, pre-faulting and reuse of large regions.

    arenas   regions are cut one after the other from larger pieces, so that they lie together
             on huge pages; each is given back by itself
    reuse    a region that nobody holds any more is kept, and told to the system as free
             (MADV_FREE): it takes the pages when it needs them, and until then a region
             of the same size costs nothing. The process still *looks* as large.

Linux only; elsewhere NumPy allocates.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

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


# --- Regions: large pieces of memory from the system, and what becomes of them afterwards

LEAST_BYTES = 256 << 10  # below, NumPy's own memory is as good

_ARENA_BYTES = 256 << 20

Prepare = Callable[[int, int], None]
"""``prepare(offset, num_bytes)`` of a region."""

_kept: dict[int, list[int]] = {}  # size -> addresses; every step on it is atomic
_pace = Pace()


class _Arena:
    """A piece of memory that regions are cut from, one after the other."""

    def __init__(self, *, huge: bool) -> None:
        self._huge = huge
        self._at, self._left, self._lock = 0, 0, threading.Lock()

    def cut(self, library: ctypes.CDLL, size: int) -> int:
        """The address of ``size`` fresh bytes.

        Raises:
            MemoryError: the system refuses.
        """
        with self._lock:
            if size > self._left:
                if size >= _ARENA_BYTES // 4:
                    return reserve(library, size, huge=self._huge)
                at = reserve(library, _ARENA_BYTES, huge=self._huge)
                if self._left:
                    library.munmap(self._at, self._left)
                self._at, self._left = at, _ARENA_BYTES
            at = self._at
            self._at += size
            self._left -= size
            return at


_arenas = {huge: _Arena(huge=huge) for huge in (False, True)}


def region(num_bytes: int) -> tuple[NDArray[np.uint8], Prepare | None]:
    """Memory of ``num_bytes`` that starts on a page, of any content.

    If it is fresh, also what has the pages of a part of it there, at once: one call
    costs less than a fault for each of them.

    Raises:
        MemoryError: the system refuses.
    """
    library = linux()
    if library is None:
        memory = np.empty(num_bytes + mmap.PAGESIZE, np.uint8)
        return memory[-memory.ctypes.data % mmap.PAGESIZE :][:num_bytes], None
    size = _in_pages(num_bytes)
    prepare: Prepare | None = None
    try:
        address = _kept[size].pop()
    except (KeyError, IndexError):
        huge = _pace.is_huge(size)
        address = _arenas[huge].cut(library, size)
        prepare = partial(_prepare, library, address, address + size if huge else 0)
    held = (ctypes.c_uint8 * num_bytes).from_address(address)
    setattr(held, "region", _Region(address, size))  # noqa: B010 - ctypes knows no attributes
    return np.ctypeslib.as_array(held), prepare


def _prepare(library: ctypes.CDLL, address: int, last: int, offset: int, num_bytes: int) -> None:
    """Have the pages of some bytes of a region there; ``last``: its end, if on huge pages."""
    start = address + offset // mmap.PAGESIZE * mmap.PAGESIZE
    end = address + _in_pages(offset + num_bytes)
    if last:
        _pace.prepare(library, start, end, last)
    else:
        populate(library, start, end)


def _in_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class _Region:
    """Who holds it holds the region; with it gone, the region is kept or given back."""

    __slots__ = ("_address", "_size")

    def __init__(self, address: int, size: int) -> None:
        self._address, self._size = address, size

    def __del__(self) -> None:
        library = linux()
        if library is None or sys.is_finalizing():
            return
        if (
            kept_bytes() + self._size > _most_kept()
            or library.madvise(self._address, self._size, mmap.MADV_FREE) != 0
        ):
            library.munmap(self._address, self._size)
        else:
            _kept.setdefault(self._size, []).append(self._address)


def forget() -> None:
    """Give everything that is kept back to the system."""
    library = linux()
    for size in list(_kept):
        for address in _kept.pop(size, []):
            assert library is not None
            library.munmap(address, size)


def kept_bytes() -> int:
    """Bytes of all regions that are kept for reuse."""
    return sum(size * len(held) for size, held in list(_kept.items()))


@lru_cache(maxsize=1)
def _most_kept() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
