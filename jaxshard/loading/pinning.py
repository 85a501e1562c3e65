"""Pinned memory: what a CUDA device reads by itself, without the processor copying it first.

JAX copies NumPy memory into pinned buffers of its own before it is sent. Memory that the
driver knows to be pinned it sends as it lies: 45 GB/s on an H100, where copying first gave
4 to 24 (docs/decisions/033). Pages stay where they are until they are unpinned.

The driver is asked by the library that JAX's CUDA backend has loaded already. Where it
refuses, memory is sent the other way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

import jax

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
