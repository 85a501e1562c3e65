"""Pinned host memory and a pool of transfer buffers.

JAX copies NumPy memory into pinned buffers of its own before it is sent. Memory that the
driver knows to be pinned it sends as it lies: 45 GB/s on an H100, where copying first gave
4 to 24 (docs/decisions/033). Pages stay where they are until they are unpinned.

The driver is asked by the library that JAX's CUDA backend has loaded already. Where it
refuses, memory is sent the other way.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache

import jax

from ..core.numpy_dtypes import Bytes
from .host_memory import region

_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: for all contexts, so for all devices

Pin = Callable[[int, int], Callable[[], None] | None]
"""``pin(address, num_bytes)``: what unpins it, or None if it could not be pinned."""


def pin_for(device: jax.Device) -> Pin | None:
    """How memory is pinned for ``device``; None where it is no CUDA device or has no driver."""
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
    """The context that calls of this thread are about, while it is open."""

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
    """The context that JAX uses on that device too; asking for it makes it only if none is there.

    It is never let go of: it lives as long as JAX's backend.
    """
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuDeviceGet(ctypes.byref(device), ordinal):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    return context


# --- Staging: host memory that shards pass through on their way to a device, used again and again

ARENA_BYTES = 64 << 20
_ALIGNMENT = 64


class Staging:
    """At most ``most_bytes`` of memory, or as much as one tensor needs if that is more.

    Threads may give while one takes.
    """

    def __init__(self, most_bytes: int, pin: Pin | None = None) -> None:
        self._most, self._pin = most_bytes, pin
        self._arenas: list[_Arena] = []
        self._stopped = False
        self._changed = threading.Condition()

    @property
    def num_bytes(self) -> int:
        """Bytes of all arenas."""
        return sum(arena.memory.size for arena in self._arenas)

    def take(self, num_bytes: int) -> Bytes | None:
        """Memory of that length, on a cache line; None if all was stopped meanwhile."""
        size = -(-max(num_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
        with self._changed:
            while (place := self._place(size)) is None:
                if self._make_room(size):
                    self._arenas.append(_Arena(max(size, min(ARENA_BYTES, self._most)), self._pin))
                elif self._stopped:
                    return None
                else:
                    self._changed.wait()
        return place[:num_bytes]

    def give(self, memory: Bytes) -> None:
        """Take back what was taken; nobody may look at it any more."""
        with self._changed:
            address = memory.ctypes.data
            next(arena for arena in self._arenas if arena.holds(address)).free(address)
            self._changed.notify_all()

    def stop(self) -> None:
        """Wake whoever waits: nothing more will be given back."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Unpin all, and let go of it; nothing may be on its way to a device."""
        for arena in self._arenas:
            arena.close()
        self._arenas.clear()

    def _place(self, size: int) -> Bytes | None:
        return next((p for arena in self._arenas if (p := arena.cut(size)) is not None), None)

    def _make_room(self, size: int) -> bool:
        """Whether another arena may be made, without those in which nothing lies if need be."""
        wanted = max(size, min(ARENA_BYTES, self._most))
        if self.num_bytes + wanted > self._most:
            idle = [arena for arena in self._arenas if arena.is_idle]
            left = self.num_bytes - sum(arena.memory.size for arena in idle)
            if left and left + wanted > self._most:
                return False
            for arena in idle:
                arena.close()
                self._arenas.remove(arena)
        return True


class _Arena:
    """One piece of memory, and what of it is in use: (start, end), in order."""

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
        """The first free bytes of that length."""
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
        """Before each part that is used, and after the last; some are empty."""
        at = 0
        for start, end in self._used:
            yield at, start
            at = end
        yield at, self.memory.size
