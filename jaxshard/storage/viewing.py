"""Viewing: what lies transposed, repeated, in another dtype or quantised becomes what is meant.

A part of a source is read in the order of its file; the values are then converted where
they lie, and last copied to the order wanted. The steps are said in ``views``; here they
are computed, with NumPy, in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..box import Box
from ..catalog import Tensor
from ..elements import numpy_dtype
from ..planning import Move
from ..ranges import Runs
from ..views import AddProduct, Affine, Round, Step, View
from .requests import Bytes, Read, read_runs

Array = NDArray[Any]
Values = Mapping[Tensor, NDArray[np.float32]]

_TILE = (256, 256)  # elements along what is consecutive where it goes, and where it comes from
_APART = 32  # elements between the rows of a tile
_ALONE = 1 << 17  # multiplications that OpenBLAS does in the calling thread
_IN_CACHE = 1 << 14  # elements of float64 that stay in a core's cache
_SMALL = 1 << 11  # a plane of fewer elements is quick in any order


class Operands:
    """The small tensors that the steps of one move need whole, read once."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tensors
        self._lock = threading.Lock()
        self.values: dict[Tensor, NDArray[np.float32]] = {}

    def load(self, read: Callable[[Tensor], Bytes]) -> None:
        """Have ``values``; the first thread that comes reads them, the others wait."""
        with self._lock:
            if not self.values:
                self.values = {t: _as_float32(t, read(t)) for t in self._tensors}


def _as_float32(tensor: Tensor, data: Bytes) -> NDArray[np.float32]:
    return data.view(numpy_dtype(tensor.dtype)).reshape(tensor.shape).astype(np.float32)


class Viewer:
    """One thread's reader of sources that have a form.

    Attributes:
        values: the operands of the steps of the move at hand.
    """

    def __init__(self, read: Read) -> None:
        self.values: Values = {}
        self._read = read
        self._buffer = np.empty(0, np.uint8)

    def fetch(self, move: Move, index: int, part: Box, out: Array) -> Runs | None:
        """Fill ``out`` with ``part`` of source ``index``; the runs that were read, if any."""
        form, piece, stored = move.forms[index], move.pieces[index][0], move.sources[index]
        assert form is not None
        view = piece.view
        if out.flags.c_contiguous and view and not view.steps and view.dtype == move.dtype:
            runs, order = form.runs(part, stored, piece.offset)
            if form.item_bytes and runs.num_bytes == out.nbytes and list(order) == sorted(order):
                read_runs(self._read, piece, runs, out.reshape(-1).view(np.uint8))
                return runs
        values, read = self.values_of(move, index, part)
        copy_into(out, values.view(out.dtype))
        return read

    def values_of(self, move: Move, index: int, part: Box) -> tuple[Array, Runs | None]:
        """``part`` of source ``index``, valid until the next, and the runs that were read."""
        form, piece, stored = move.forms[index], move.pieces[index][0], move.sources[index]
        assert form is not None
        assert piece.view is not None
        dtype = numpy_dtype(move.dtype)
        if not form.item_bytes:
            return np.broadcast_to(np.zeros((), dtype), part.shape), None
        runs, order = form.runs(part, stored, piece.offset)
        if runs.num_bytes > len(self._buffer):
            self._buffer = np.empty(runs.num_bytes, np.uint8)
        compact = self._buffer[: runs.num_bytes]
        read_runs(self._read, piece, runs, compact)
        values = _in_order(compact.view(numpy_dtype(piece.view.dtype)), part.shape, order)
        start = part.within(stored).start
        done = _converted(values, piece.view, start, dtype, self.values)
        return np.broadcast_to(done, part.shape), runs


def _in_order(compact: Array, lengths: tuple[int, ...], order: tuple[int, ...]) -> Array:
    """The elements, stored with dims ``order``, with all dims in theirs; length 1 if repeated."""
    stored = compact.reshape([lengths[d] for d in order])
    ascending = sorted(range(len(order)), key=order.__getitem__)
    index = tuple(slice(None) if d in order else None for d in range(len(lengths)))
    return stored.transpose(ascending)[index]


def _converted(
    values: Array, view: View, start: tuple[int, ...], dtype: np.dtype[np.generic], known: Values
) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):  # a value too large becomes inf, as in JAX
        if view.steps:
            work = np.float64 if values.dtype == np.float64 else np.float32
            wide = values.astype(work)  # keeps the order in memory, and is ours to change
            for step in view.steps:
                wide = _stepped(wide, step, start, known)
            values = wide
        return values.astype(dtype, copy=False)


def _stepped(values: Array, step: Step, start: tuple[int, ...], known: Values) -> Array:
    if isinstance(step, Round):
        return values.astype(numpy_dtype(step.dtype)).astype(values.dtype)
    (row_dims, rows), (column_dims, columns) = (_indices(a, start, values.shape) for a in step.at)
    if isinstance(step, AddProduct):
        b, a = _take(known[step.b], rows, 0), _take(known[step.a], columns, 1)
        table = _fused_product(b, a) if step.reproducible else _product(b, a)
        table *= np.float32(step.scaling)
    else:
        table = known[step.scale][rows // step.block[0]][:, columns // step.block[1]]
    dims = (*row_dims, *column_dims)
    table = _in_order(table, values.shape, dims)
    if isinstance(step, AddProduct):
        values += table
    else:
        values *= table
    return values


def _product(b: NDArray[np.float32], a: NDArray[np.float32]) -> NDArray[np.float32]:
    """``b @ a``, in products so small that the BLAS starts no threads for them.

    Its threads would fight with ours, and wait for each other when the machine is busy.
    """
    made = np.empty((b.shape[0], a.shape[1]), np.float32)
    rows, columns = 16, max(64, _ALONE // (16 * max(1, a.shape[0])))
    for i in range(0, b.shape[0], rows):
        for j in range(0, a.shape[1], columns):
            out = made[i : i + rows, j : j + columns]
            np.matmul(b[i : i + rows], a[:, j : j + columns], out=out)
    return made


def _fused_product(b: NDArray[np.float32], a: NDArray[np.float32]) -> NDArray[np.float32]:
    """``b @ a``, each sum in order of the rank and rounded at every step, whatever the BLAS.

    A fused multiply-add in float32: the product of two is exact in float64.
    """
    made = np.zeros((b.shape[0], a.shape[1]), np.float32)
    step = max(1, _IN_CACHE // max(1, a.shape[1]))
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    for first in range(0, len(made), step):
        rows = slice(first, first + step)
        total = np.zeros(made[rows].shape, np.float64)
        for k in range(a.shape[0]):
            total += wide_b[rows, k, None] * wide_a[k]
            made[rows] = total
            total[...] = made[rows]
    return made


def _indices(
    at: Affine, start: tuple[int, ...], lengths: tuple[int, ...]
) -> tuple[tuple[int, ...], NDArray[np.intp]]:
    """The dims that ``at`` grows along, largest step first, and its numbers in that order."""
    dims = sorted((d for d, n in enumerate(lengths) if n > 1 and at.steps[d]), key=_by(at.steps))
    numbers = np.array([at.start + sum(i * s for i, s in zip(start, at.steps, strict=True))])
    for d in dims:
        numbers = (numbers[:, None] + np.arange(lengths[d]) * at.steps[d]).reshape(-1)
    return tuple(dims), numbers


def _by(steps: tuple[int, ...]) -> Callable[[int], int]:
    return lambda d: -steps[d]


def _take(array: NDArray[np.float32], index: NDArray[np.intp], axis: int) -> NDArray[np.float32]:
    first, last = int(index[0]), int(index[-1])
    if last - first + 1 == len(index):  # indices grow, so these are all between
        return array[first : last + 1] if axis == 0 else array[:, first : last + 1]
    return array.take(index, axis)


def copy_into(out: Array, values: Array) -> None:
    """``out[...] = values``, in tiles where the two lie in memory in different orders.

    A plain transposed copy touches a new cache line with every element; here each line
    that was fetched is used up before it is dropped. Tiles pass through memory whose rows
    are no power of two apart: otherwise they would push each other out of the cache.
    """
    to, come = _fastest(out), _fastest(values)
    if to == come or out.shape[to] * out.shape[come] < _SMALL:
        out[...] = values
        return
    others = [range(1 if d in (to, come) else n) for d, n in enumerate(out.shape)]
    rows, columns = _TILE
    spare = np.empty((rows, columns + _APART), out.dtype)
    for corner in product(*others):
        plane = tuple(slice(None) if d in (to, come) else i for d, i in enumerate(corner))
        a, b = (x[plane] if to < come else x[plane].T for x in (out, values))
        for i in range(0, a.shape[0], rows):
            for j in range(0, a.shape[1], columns):
                tile = (slice(i, i + rows), slice(j, j + columns))
                there = a[tile]
                here = spare[: there.shape[0], : there.shape[1]]
                here[...] = b[tile]
                there[...] = here


def _fastest(array: Array) -> int:
    """The dim whose neighbours are nearest in memory."""
    some = [d for d, n in enumerate(array.shape) if n > 1 and array.strides[d]]
    return min(some, key=lambda d: array.strides[d], default=0)
