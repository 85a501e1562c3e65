"""Regions: large pieces of memory from the system, and what becomes of them afterwards.

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
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from .pages import Pace, linux, populate, reserve

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
