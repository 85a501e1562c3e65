"""Regions: large pieces of memory from the system, and what becomes of them afterwards.

Touching a fresh page costs several times what reading a page of a file does. So
pages are asked for many at a time, and:

    huge pages   are asked for, unless this is a virtual machine that hands free memory back
                 to its host: there a huge page costs most (measured: five times as much)
    reuse        a region that nobody holds any more is kept, and told to the system as free
                 (MADV_FREE): it takes the pages when it needs them, and until then a region
                 of the same size costs nothing. The process still *looks* as large.

Linux only; elsewhere NumPy allocates.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LEAST_BYTES = 256 << 10  # below, NumPy's own memory is as good

_HUGE_BYTES = 2 << 20
_BALLOONS = "/sys/bus/virtio/drivers/virtio_balloon"
_REPORTS_FREE_PAGES = 5  # VIRTIO_BALLOON_F_REPORTING: the bit's number
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE: Python has no name for it
_FAILED = ctypes.c_void_p(-1).value

_kept: dict[int, list[int]] = {}  # size -> addresses; every step on it is atomic


def region(num_bytes: int) -> tuple[NDArray[np.uint8], bool]:
    """Memory of ``num_bytes`` that starts on a page, of any content; and whether it is fresh.

    Raises:
        MemoryError: the system refuses.
    """
    system = _system()
    if system is None:
        memory = np.empty(num_bytes + mmap.PAGESIZE, np.uint8)
        return memory[-memory.ctypes.data % mmap.PAGESIZE :][:num_bytes], False
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        address, is_fresh = _kept[size].pop(), False
    except (KeyError, IndexError):
        address, is_fresh = _fresh(system, size), True
    held = (ctypes.c_uint8 * num_bytes).from_address(address)
    setattr(held, "region", _Region(address, size))  # noqa: B010 - ctypes knows no attributes
    return np.ctypeslib.as_array(held), is_fresh


def prepare(address: int, num_bytes: int) -> None:
    """Have the fresh pages there at once: one call costs less than a fault for each of them."""
    system = _system()
    if system is not None and num_bytes:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(address + num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        system.madvise(start, end - start, _POPULATE_WRITE)  # kernels before 5.14 refuse: then not


class _Region:
    """Who holds it holds the region; with it gone, the region is kept or given back."""

    __slots__ = ("_address", "_size")

    def __init__(self, address: int, size: int) -> None:
        self._address, self._size = address, size

    def __del__(self) -> None:
        system = _system()
        if system is None or sys.is_finalizing():
            return
        if (
            sum(size * len(held) for size, held in list(_kept.items())) + self._size > _most_kept()
            or system.madvise(self._address, self._size, mmap.MADV_FREE) != 0
        ):
            system.munmap(self._address, self._size)
        else:
            _kept.setdefault(self._size, []).append(self._address)


def forget() -> None:
    """Give everything that is kept back to the system."""
    system = _system()
    for size in list(_kept):
        for address in _kept.pop(size, []):
            assert system is not None
            system.munmap(address, size)


def kept_bytes() -> int:
    """Bytes of all regions that are kept for reuse."""
    return sum(size * len(held) for size, held in list(_kept.items()))


def _fresh(system: ctypes.CDLL, size: int) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = system.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address in (None, _FAILED):
        raise MemoryError(f"{size} bytes for a shard: {os.strerror(ctypes.get_errno())}")
    if size >= 2 * _HUGE_BYTES:
        advice = mmap.MADV_NOHUGEPAGE if hands_memory_back() else mmap.MADV_HUGEPAGE
        system.madvise(address, size, advice)  # a wish: refused by kernels without huge pages
    return int(address)


@lru_cache(maxsize=1)
def hands_memory_back(balloons: str = _BALLOONS) -> bool:
    """Whether this machine is a virtual one that reports its free pages to its host."""
    try:
        found = [path.read_text() for path in Path(balloons).glob("virtio*/features")]
    except OSError:
        return False
    return any(bits[_REPORTS_FREE_PAGES : _REPORTS_FREE_PAGES + 1] == "1" for bits in found)


@lru_cache(maxsize=1)
def _most_kept() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


@lru_cache(maxsize=1)
def _system() -> ctypes.CDLL | None:
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
