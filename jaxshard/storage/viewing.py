"""Viewing: what lies transposed, repeated, in another dtype or quantised becomes what is meant.

A part of a source is read in the order of its file; the values are then converted where
they lie, and last copied to the order wanted. The steps are said in ``views``; here they
are computed, with NumPy, in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
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
from .turning import copy_into

Array = NDArray[Any]
Values = Mapping[Tensor, NDArray[np.float32]]

_ALONE = 1 << 17  # multiplications that OpenBLAS does in the calling thread
_IN_CACHE = 1 << 14  # elements of float64 that stay in a core's cache
_AT_A_TIME = 1 << 16  # elements that steps are done on: what they need stays in a core's cache


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
    """``values``, whose first element is at ``start``, after the view's steps, in ``dtype``.

    Where there are steps and the dtype stays, ``values`` are overwritten.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a value too large becomes inf, as in JAX
        if not view.steps:
            return values.astype(dtype, copy=False)
        done = values if values.dtype == dtype else np.empty_like(values, dtype)
        work = np.dtype(np.float64 if values.dtype == np.float64 else np.float32)
        spare = np.empty((2, min(values.size, _most(values))), work)
        for part, at in _portions(values, start):
            wide = _like(spare[0], values[part])
            np.copyto(wide, values[part], casting="unsafe")
            for step in view.steps:
                wide = _stepped(wide, step, at, known, spare[1])
            np.copyto(done[part], wide, casting="unsafe")
        return done


def _most(values: Array) -> int:
    """The most elements of a portion."""
    rows = max(values.shape, default=1) if values.ndim else 1
    return max(_AT_A_TIME, values.size // max(1, rows))


def _portions(
    values: Array, start: tuple[int, ...]
) -> Iterator[tuple[tuple[slice, ...], tuple[int, ...]]]:
    """Parts of ``values`` that are one piece of memory each, and where each begins."""
    if not values.ndim or not values.size:
        yield (), start
        return
    slowest = max(range(values.ndim), key=lambda d: (values.shape[d] > 1) * values.strides[d])
    rows, one = values.shape[slowest], values.size // values.shape[slowest]
    step = max(1, _AT_A_TIME // one)
    for first in range(0, rows, step):
        part = [slice(None)] * values.ndim
        part[slowest] = slice(first, first + step)
        at = tuple(a + first if d == slowest else a for d, a in enumerate(start))
        yield tuple(part), at


def _like(spare: Array, values: Array) -> Array:
    """Memory of ``spare`` in the shape of ``values``, in the same order."""
    order = sorted(range(values.ndim), key=lambda d: -values.strides[d])
    made = spare[: values.size].reshape([values.shape[d] for d in order])
    return made.transpose([order.index(d) for d in range(values.ndim)])


def _stepped(
    values: Array, step: Step, start: tuple[int, ...], known: Values, spare: Array
) -> Array:
    if isinstance(step, Round):
        return values.astype(numpy_dtype(step.dtype)).astype(values.dtype)
    (row_dims, rows), (column_dims, columns) = (_indices(a, start, values.shape) for a in step.at)
    if isinstance(step, AddProduct):
        b, a = _take(known[step.b], rows, 0), _take(known[step.a], columns, 1)
        if step.reproducible:
            table = _fused_product(b, a)
        else:
            same = spare.dtype == b.dtype
            made = spare[: len(rows) * len(columns)] if same else np.empty(values.size, b.dtype)
            table = _product(b, a, made.reshape(len(rows), len(columns)))
        if step.scaling != 1:
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


def _product(
    b: NDArray[np.float32], a: NDArray[np.float32], out: NDArray[np.float32]
) -> NDArray[np.float32]:
    """``b @ a`` in ``out``, in products so small that the BLAS starts no threads for them.

    Its threads would fight with ours, and wait for each other when the machine is busy.
    """
    rows, columns = 16, max(64, _ALONE // (16 * max(1, a.shape[0])))
    for i in range(0, b.shape[0], rows):
        for j in range(0, a.shape[1], columns):
            np.matmul(
                b[i : i + rows], a[:, j : j + columns], out=out[i : i + rows, j : j + columns]
            )
    return out


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
