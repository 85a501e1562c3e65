"""Page-aligned host memory: allocation, pre-faulting and reuse of large regions.

    arenas   regions are allocated consecutively from larger mappings, so that they share huge
             pages; each is unmapped by itself
    reuse    a released region is cached and marked with MADV_FREE: the kernel may reclaim its
             pages, and until then a region of the same size needs no page faults. The resident
             size of the process does not shrink.
    pinned   buffers for transfers to CUDA devices are registered with the driver

Linux only; elsewhere NumPy allocates.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import jax
import numpy as np
from numpy.typing import NDArray

from ..core.numpy_dtypes import Bytes
from ..core.runtime import clears

HUGE_BYTES = 2 << 20

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which the mmap module lacks
_STEP_BYTES = 8 << 20  # of small pages per call
_SLOW_S = 0.0015  # faults of the small pages of one huge page; zeroing it takes 0.0002
_THERE_S = 0.00002  # the page was resident
_LAST = 8  # pages in the running mean
_LEAST_SMALL_BYTES = 64 << 20
_MOST_SMALL_BYTES = 1 << 30
_FAILED = ctypes.c_void_p(-1).value


@lru_cache(maxsize=1)
def linux() -> ctypes.CDLL | None:
    """Return the C library on Linux; None elsewhere."""
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
    """Map ``num_bytes`` without pages at a huge-page boundary; return the address.

    Raises:
        MemoryError: mmap failed.
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
    # advice: kernels without huge pages return an error
    library.madvise(start, num_bytes, mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    return int(start)


def populate(library: ctypes.CDLL, start: int, end: int, step_bytes: int = _STEP_BYTES) -> None:
    """Fault in the pages from ``start`` to ``end``; a no-op on kernels before 5.14."""
    for at in range(start, end, step_bytes):
        library.madvise(at, min(step_bytes, end - at), _POPULATE_WRITE)


class Pace:
    """Choice of huge or small pages by the latency of recent huge-page faults.

    Threads share it without a lock: a race costs one more measurement.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._mean_s = 0.0  # exponential mean of a huge-page fault
        self._small_bytes = 0  # remaining bytes for small pages
        self._next_small_bytes = _LEAST_SMALL_BYTES

    def is_huge(self, num_bytes: int) -> bool:
        """Return whether the next ``num_bytes`` should use huge pages."""
        if self._small_bytes <= 0:
            return True
        self._small_bytes -= num_bytes
        return False

    def prepare(self, library: ctypes.CDLL, start: int, end: int, last: int) -> None:
        """Fault in the pages from ``start`` to ``end`` of memory on huge pages up to ``last``.

        If huge pages are slow, the rest up to ``last`` uses small ones.
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
        """Record the latency of one huge page; return whether small ones are faster for now."""
        if took_s < _THERE_S:
            return False
        self._mean_s += (took_s - self._mean_s) / _LAST
        if self._mean_s <= _SLOW_S:
            if took_s < _SLOW_S:
                self._next_small_bytes = _LEAST_SMALL_BYTES
            return False
        self._mean_s = _SLOW_S  # one fast page then returns to huge ones
        if self._small_bytes <= 0:
            self._small_bytes = self._next_small_bytes
            self._next_small_bytes = min(2 * self._next_small_bytes, _MOST_SMALL_BYTES)
        return True


# --- Regions: large allocations, cached for reuse after their release

MIN_REGION_BYTES = 256 << 10  # NumPy is as fast below

_ARENA_BYTES = 256 << 20

Prepare = Callable[[int, int], None]
"""``prepare(offset, num_bytes)`` of a region."""

_kept: dict[int, list[int]] = {}  # size -> addresses; every operation on it is atomic
_pace = Pace()


class _RegionArena:
    """Bump allocator of regions."""

    def __init__(self, *, huge: bool) -> None:
        self._huge = huge
        self._at, self._left, self._lock = 0, 0, threading.Lock()

    def cut(self, library: ctypes.CDLL, size: int) -> int:
        """Return the address of ``size`` unused bytes.

        Raises:
            MemoryError: mmap failed.
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


_arenas = {huge: _RegionArena(huge=huge) for huge in (False, True)}


def region(num_bytes: int) -> tuple[NDArray[np.uint8], Prepare | None]:
    """Allocate ``num_bytes`` of uninitialized memory at a page boundary.

    If its pages are not resident, also return a function that faults in a range of them: one
    call is cheaper than a fault per page.

    Raises:
        MemoryError: mmap failed.
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
    """Fault in a range of a region; ``last``: its end, if it is on huge pages."""
    start = address + offset // mmap.PAGESIZE * mmap.PAGESIZE
    end = address + _in_pages(offset + num_bytes)
    if last:
        _pace.prepare(library, start, end, last)
    else:
        populate(library, start, end)


def _in_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class _Region:
    """Owns one region. On deletion the region is cached for reuse or unmapped."""

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


@clears
def forget() -> None:
    """Unmap all cached regions."""
    library = linux()
    for size in list(_kept):
        for address in _kept.pop(size, []):
            assert library is not None
            library.munmap(address, size)


def kept_bytes() -> int:
    """Bytes of all cached regions."""
    return sum(size * len(held) for size, held in list(_kept.items()))


@lru_cache(maxsize=1)
def _most_kept() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


# --- Alignment: XLA's CPU backend aliases aligned memory and copies the rest

ALIGNMENT = 64  # what XLA's CPU backend requires of memory that it aliases
UNALIGNED = 16  # enough for every dtype, and too little for the backend


def allocate(num_bytes: int) -> tuple[Bytes, Prepare | None]:
    """Allocate aligned memory; also return a pre-fault callback if its pages are not resident."""
    if num_bytes >= MIN_REGION_BYTES:
        return region(num_bytes)
    memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes], None


def aligned_empty(num_bytes: int) -> Bytes:
    """Allocate uninitialized memory at an aligned address."""
    return allocate(num_bytes)[0]


def unaligned_empty(num_bytes: int) -> Bytes:
    """Allocate uninitialized memory that is aligned for every dtype but never aliased by XLA."""
    memory = np.empty(num_bytes + ALIGNMENT + UNALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT + UNALIGNED
    return memory[start : start + num_bytes]


def is_aligned(memory: Bytes) -> bool:
    """Return whether JAX's CPU backend would alias ``memory``."""
    return memory.ctypes.data % ALIGNMENT == 0


# --- Pinned host memory and a pool of transfer buffers

_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned in all contexts

Pin = Callable[[int, int], Callable[[], None] | None]
"""``pin(address, num_bytes)`` returns a function that unpins it; None if pinning failed."""


def pin_for(device: jax.Device) -> Pin | None:
    """Return the function that pins memory for ``device``; None without a CUDA driver."""
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return None
    driver = _driver()
    context = driver and _context(driver, device.local_hardware_id)
    if not driver or not context:
        return None
    return lambda address, num_bytes: _pin(driver, context, address, num_bytes)


def _pin(
    driver: ctypes.CDLL, context: ctypes.c_void_p, address: int, num_bytes: int
) -> Callable[[], None] | None:
    def unpin() -> None:
        with _Current(driver, context):
            driver.cuMemHostUnregister(address)

    with _Current(driver, context):
        refused = driver.cuMemHostRegister_v2(address, num_bytes, _PORTABLE)
    return None if refused else unpin


class _Current:
    """Context manager that makes a CUDA context current in this thread."""

    def __init__(self, driver: ctypes.CDLL, context: ctypes.c_void_p) -> None:
        self._driver, self._context = driver, context

    def __enter__(self) -> None:
        self._driver.cuCtxPushCurrent_v2(self._context)

    def __exit__(self, *_: object) -> None:
        self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    driver.cuMemHostRegister_v2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
    driver.cuMemHostUnregister.argtypes = [ctypes.c_void_p]
    driver.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]
    return driver


@lru_cache(maxsize=64)
def _context(driver: ctypes.CDLL, ordinal: int) -> ctypes.c_void_p | None:
    """Retain the primary context of the device, which JAX uses as well.

    It is never released: it lives as long as JAX's backend.
    """
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuDeviceGet(ctypes.byref(device), ordinal):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    return context


# --- Buffer pool: host memory for transfers to devices, reused

ARENA_BYTES = 64 << 20


class BufferPool:
    """Pool of at most ``max_bytes``, or the size of one larger buffer.

    Other threads may give while one takes.
    """

    def __init__(self, max_bytes: int, pin: Pin | None = None) -> None:
        self._max, self._pin = max_bytes, pin
        self._arenas: list[_BufferArena] = []
        self._stopped = False
        self._changed = threading.Condition()

    @property
    def num_bytes(self) -> int:
        """Bytes of all arenas."""
        return sum(arena.memory.size for arena in self._arenas)

    def take(self, num_bytes: int) -> Bytes | None:
        """Return an aligned buffer; wait for one if necessary. None if the pool was stopped."""
        size = -(-max(num_bytes, 1) // ALIGNMENT) * ALIGNMENT
        with self._changed:
            while (place := self._place(size)) is None:
                if self._make_room(size):
                    self._arenas.append(
                        _BufferArena(max(size, min(ARENA_BYTES, self._max)), self._pin)
                    )
                elif self._stopped:
                    return None
                else:
                    self._changed.wait()
        return place[:num_bytes]

    def give(self, memory: Bytes) -> None:
        """Return a buffer to the pool; the caller must not use it again."""
        with self._changed:
            address = memory.ctypes.data
            next(arena for arena in self._arenas if arena.holds(address)).free(address)
            self._changed.notify_all()

    def stop(self) -> None:
        """Wake the threads that wait in `take`: no buffer will be returned."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Unpin and release all memory; no transfer may be in flight."""
        for arena in self._arenas:
            arena.close()
        self._arenas.clear()

    def _place(self, size: int) -> Bytes | None:
        return next((p for arena in self._arenas if (p := arena.cut(size)) is not None), None)

    def _make_room(self, size: int) -> bool:
        """Return True if a new arena fits, evicting idle arenas if necessary."""
        wanted = max(size, min(ARENA_BYTES, self._max))
        if self.num_bytes + wanted > self._max:
            idle = [arena for arena in self._arenas if arena.is_idle]
            left = self.num_bytes - sum(arena.memory.size for arena in idle)
            if left and left + wanted > self._max:
                return False
            for arena in idle:
                arena.close()
                self._arenas.remove(arena)
        return True


class _BufferArena:
    """First-fit allocator in one (pinned) region; used ranges are (start, end), in order."""

    def __init__(self, num_bytes: int, pin: Pin | None) -> None:
        self.memory, prepare = region(num_bytes)
        self._address = self.memory.ctypes.data
        if prepare:
            prepare(0, num_bytes)
        self._unpin: Callable[[], None] | None = pin and pin(self._address, num_bytes)
        self._used: list[tuple[int, int]] = []

    @property
    def is_idle(self) -> bool:
        return not self._used

    def holds(self, address: int) -> bool:
        return 0 <= address - self._address < self.memory.size

    def cut(self, size: int) -> Bytes | None:
        """Return the first free range of ``size`` bytes; None if there is not one."""
        for number, (start, end) in enumerate(self._gaps()):
            if end - start >= size:
                self._used.insert(number, (start, start + size))
                return self.memory[start : start + size]
        return None

    def free(self, address: int) -> None:
        self._used = [used for used in self._used if used[0] != address - self._address]

    def close(self) -> None:
        if self._unpin:
            self._unpin()

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """Yield the free ranges, of which some are empty."""
        at = 0
        for start, end in self._used:
            yield at, start
            at = end
        yield at, self.memory.size
