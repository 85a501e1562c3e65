"""Vectors: one request for many places in memory, which the kernel is told as addresses.

``os.preadv`` takes a list, and asks each of its objects for its memory while no other thread
may run Python. Rows of a few kilobytes take as long that way as copying them once more. So
the addresses are laid out beforehand, as ``struct iovec`` has them, and the C library's own
call takes them as they are. Where it is not offered, ``os.preadv`` does the same.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST = 1024  # IOV_MAX of Linux

Table = NDArray[np.uint64]


class Places:
    """Places in memory, in the order in which a file has their bytes.

    Args:
        table: for each place its address and its bytes, any shape of ``(..., 2)``.
        held: what keeps the memory alive.
    """

    __slots__ = ("_held", "_table", "num_bytes")

    def __init__(self, table: Table, held: object) -> None:
        self._table, self._held = np.ascontiguousarray(table, np.uint64).reshape(-1, 2), held
        self.num_bytes = int(self._table[:, 1].sum())

    def fill(self, descriptor: int, offset: int) -> int:
        """Fill them from byte ``offset`` of a file; how many bytes came, fewer if it ends there.

        Raises:
            OSError: the disk refused.
        """
        total = 0
        for some in self._requests():
            want, done = int(some[:, 1].sum()), _read(descriptor, some, offset + total)
            if done < want:
                done += _read_rest(descriptor, some, offset + total, done)
            total += done
            if done < want:
                break
        return total

    def _requests(self) -> Iterator[Table]:
        for first in range(0, len(self._table), _MOST):
            yield self._table[first : first + _MOST]


def _read(descriptor: int, places: Table, offset: int) -> int:
    """One request; the bytes that came."""
    call = _preadv()
    if call is None:
        return os.preadv(descriptor, [_memory(*place) for place in places.tolist()], offset)
    while (done := call(descriptor, places.ctypes.data, len(places), offset)) < 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return int(done)


def _read_rest(descriptor: int, places: Table, offset: int, done: int) -> int:
    """What a request of which ``done`` bytes came has left, place by place."""
    more, before = 0, 0
    for address, length in places.tolist():
        skip = max(0, min(length, done - before))
        while skip < length:
            memory = _memory(address + skip, length - skip)
            came = os.preadv(descriptor, [memory], offset + before + skip)
            if not came:
                return more
            skip += came
            more += came
        before += length
    return more


def _memory(address: int, num_bytes: int) -> memoryview:
    return memoryview((ctypes.c_uint8 * num_bytes).from_address(address)).cast("B")


@cache
def _preadv() -> Callable[..., Any] | None:
    """The C library's ``preadv`` with offsets of 64 bits; None where its words have fewer."""
    if ctypes.sizeof(ctypes.c_void_p) != np.dtype(np.uint64).itemsize:
        return None
    try:
        call = ctypes.CDLL(None, use_errno=True).preadv64
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
    call.restype = ctypes.c_ssize_t
    return call
