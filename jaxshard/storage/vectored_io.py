"""Scattered reads: one system call fills many ranges of memory.

``os.preadv`` takes a list, and gets the memory of each of its objects while no other thread can
run Python. With rows of a few kilobytes that takes as long as copying them once more. So the
addresses are laid out by NumPy as an array of ``struct iovec``, which is passed to the C library.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.box import Box
from ..core.numpy_dtypes import Bytes
from ..core.ranges import Runs, byte_runs
from ..planning.copies import Steps, TensorCopy
from .fs import IOV_MAX

Table = NDArray[np.uint64]


class IOVec:
    """Ranges of memory, in the order in which a file has their bytes.

    Args:
        table: for each range its address and its bytes, any shape of ``(..., 2)``.
        held: keeps the memory alive.
    """

    __slots__ = ("_held", "_table", "num_bytes")

    def __init__(self, table: Table, held: object) -> None:
        self._table, self._held = np.ascontiguousarray(table, np.uint64).reshape(-1, 2), held
        self.num_bytes = int(self._table[:, 1].sum())

    def fill(self, descriptor: int, offset: int) -> int:
        """Fill them from byte ``offset`` of a file; return the bytes, fewer where it ends.

        Raises:
            OSError: the disk fails.
        """
        total, left = 0, self._table
        while total < self.num_bytes:
            done = _read(descriptor, left[:IOV_MAX], offset + total)
            if not done:
                break
            total += done
            left = _rest(left, done)
        return total


def _rest(table: Table, done: int) -> Table:
    """The ranges after the first ``done`` bytes, which one request filled."""
    ends = np.cumsum(table[:IOV_MAX, 1])
    first = int(np.searchsorted(ends, np.uint64(done), side="right"))
    rest, skip = table[first:], done - int(ends[first - 1]) if first else done
    if skip:  # the kernel may stop within a range
        rest = rest.copy()
        rest[0] += np.array([skip, -skip], np.int64).view(np.uint64)
    return rest


def _read(descriptor: int, ranges: Table, offset: int) -> int:
    """One request; the bytes that came."""
    call = _preadv()
    if call is None:
        return os.preadv(descriptor, [_memory(*one) for one in ranges.tolist()], offset)
    while (done := call(descriptor, ranges.ctypes.data, len(ranges), offset)) < 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return int(done)


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


# --- Scattering: a block that several targets share by columns, read straight into their memory

_LEAST_BYTES = 1 << 10  # of a row: below, a copy by NumPy is as quick as the kernel's


@dataclass(frozen=True, slots=True)
class Scatter:
    """Where the bytes of a block lie and go.

    Attributes:
        source: which source of the move.
        runs: its bytes in the source's file: one run.
        num_rows: rows of the block, each cut alike.
        parts: for each target in the order of a row: its number, where its bytes begin in
            the target, and how many of a row it gets.
    """

    source: int
    runs: Runs
    num_rows: int
    parts: tuple[tuple[int, int, int], ...]


def scatter_of(move: TensorCopy, steps: Steps) -> Scatter | None:
    """How a block can be scattered; None if it is not one run that is cut by columns."""
    if len(steps.reads) != 1 or len(steps.writes) < 2 or steps.reads[0][1] != steps.block:
        return None
    source = steps.reads[0][0]
    dim = _cut(steps.block, [part for _, part in steps.writes])
    if move.forms[source] is not None or dim is None:
        return None
    stored, unit, shape = move.sources[source], move.unit_bytes, steps.block.shape
    runs = byte_runs(
        steps.block.within(stored), stored.shape, unit, move.pieces[source][0].offset
    ).coalesced()
    parts = []
    for index, part in sorted(steps.writes, key=lambda write: write[1].start[dim]):
        target = move.targets[index].box
        there = byte_runs(part.within(target), target.shape, unit)
        width = unit * prod(part.shape[dim:])
        if there.outer or width < _LEAST_BYTES:
            return None
        parts.append((index, there.offset, width))
    if runs.outer or runs.num_bytes != steps.block.size * unit:
        return None
    return Scatter(source, runs, prod(shape[:dim]), tuple(parts))


def _cut(block: Box, parts: Sequence[Box]) -> int | None:
    """The one dim along which ``parts``, side by side, are ``block``."""
    one = parts[0]
    cut = [d for d in range(len(block.start)) if one.shape[d] != block.shape[d]]
    if len(cut) != 1:
        return None
    dim, at = cut[0], block.start[cut[0]]
    for part in sorted(parts, key=lambda part: part.start[dim]):
        wide = [d for d in range(len(block.start)) if d != dim and part.shape[d] != block.shape[d]]
        if wide or part.start[dim] != at:
            return None
        at = part.stop[dim]
    return dim if at == block.stop[dim] else None


def iovec_of(scatter: Scatter, memory: Sequence[Bytes]) -> IOVec:
    """The ranges to fill, where ``memory`` is what each target gets of the block."""
    table = np.empty((scatter.num_rows, len(memory), 2), np.uint64)
    rows = np.arange(scatter.num_rows, dtype=np.uint64)
    for k, (data, (_, _, width)) in enumerate(zip(memory, scatter.parts, strict=True)):
        table[:, k, 0] = data.ctypes.data + rows * np.uint64(width)
        table[:, k, 1] = width
    return IOVec(table, memory)
