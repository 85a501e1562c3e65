"""View transforms during reads: transpose, cast, scale, shift, dequantize, add adapters.

A part of a source is read in the order of its file, converted in place, and then copied to the
order of the target. ``core.catalog`` defines the steps; NumPy computes them here, in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import frexp
from operator import mul
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import native
from ..core.box import Box
from ..core.catalog import (
    AddProduct,
    Decode,
    IndexMap,
    MultiplyAdd,
    RoundTo,
    Scale,
    Step,
    StoredShard,
    Tensor,
    View,
)
from ..core.dtypes import BY_NAME, CODES, DType
from ..core.numpy_dtypes import Bytes, cast_into, code_values, numpy_dtype
from ..core.ranges import Runs
from ..core.runtime import cached
from ..planning.copies import TensorCopy
from .io import Source

Tile = NDArray[Any]

_TILE = 512  # elements a side: fits a core's cache, and few calls, between which threads wait
_APART = 32  # elements between the rows of a tile: no power of two, or they share cache lines
_SMALL = 1 << 11  # a plane of fewer elements is quick in any order


def copy_into(out: Tile, values: Tile, *, is_final: bool = False) -> None:
    """Copy ``values`` to ``out``, fast even if their memory orders differ.

    ``is_final``: ``out`` is not read soon, so it may bypass the cache.
    """
    to, come = _fastest(out), _fastest(values)
    if to == come or out.shape[to] * out.shape[come] < _SMALL:
        out[...] = values
    else:
        planes = _planes(out, values, to, come)
        left = [plane for plane in planes if not native.turn(*plane, is_final=is_final)]
        if left:
            _copy_tiles(left)


def _planes(out: Tile, values: Tile, to: int, come: int) -> Iterator[tuple[Tile, Tile]]:
    """What is to be turned, plane by plane: along the first dim ``out`` is dense, along the
    second ``values``.
    """
    others = [range(1 if d in (to, come) else n) for d, n in enumerate(out.shape)]
    for corner in product(*others):
        plane = tuple(slice(None) if d in (to, come) else i for d, i in enumerate(corner))
        there, here = (x[plane] if to < come else x[plane].T for x in (out, values))
        yield there, here


def _copy_tiles(planes: Sequence[tuple[Tile, Tile]]) -> None:
    """Planes of one shape by NumPy, in tiles."""
    out = planes[0][0]
    rows, columns = (min(_TILE, n) for n in out.shape)
    spare = np.empty((rows, columns + _APART), out.dtype)
    for out, values in planes:
        for i in range(0, out.shape[0], rows):
            for j in range(0, out.shape[1], columns):
                tile = (slice(i, i + rows), slice(j, j + columns))
                there = out[tile]
                here = spare[: there.shape[0], : there.shape[1]]
                here[...] = values[tile]
                there[...] = here


def _fastest(array: Tile) -> int:
    """The dim whose neighbours are nearest in memory."""
    some = [d for d, n in enumerate(array.shape) if n > 1 and array.strides[d]]
    return min(some, key=lambda d: array.strides[d], default=0)


# --- Views: transposed, repeated, cast or quantized data becomes the tensor's values

Array = NDArray[Any]
Values = Mapping[Tensor, NDArray[np.float32]]
Indices = slice | NDArray[np.intp]
Read = Callable[[Tensor, Box], Bytes]  # the bytes of a box of an operand, row-major

_F64 = BY_NAME["F64"]
_ALONE = 1 << 17  # multiplications that OpenBLAS does in the calling thread
_PRODUCT_ROWS = 64
_IN_CACHE = 1 << 14  # elements of float64 that stay in a core's cache
_AT_A_TIME = 1 << 19  # elements: a call for fewer ends before it lets another thread work


class Operands:
    """The small tensors that the steps of one copy need whole, read once."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tensors
        self._lock = threading.Lock()
        self.values: dict[Tensor, NDArray[np.float32]] = {}

    def load(self, read: Read) -> None:
        """Load ``values``: the first thread reads them, the others wait."""
        with self._lock:
            if not self.values:
                whole = ((t, Box.whole(t.shape)) for t in self._tensors)
                self.values = {t: _as_float32(t, box, read) for t, box in whole}


def _as_float32(tensor: Tensor, box: Box, read: Read) -> NDArray[np.float32]:
    stored = read(tensor, box).view(numpy_dtype(tensor.dtype))
    return stored.reshape(box.shape).astype(np.float32)


class Viewer:
    """One thread's reader of sources that have a form.

    Attributes:
        values: the operands of the steps of the move at hand.
    """

    def __init__(self, source: Source, read: Read) -> None:
        self.values: Values = {}
        self._source, self._read = source, read
        self._buffer = np.empty(0, np.uint8)
        self._spare = Spare()

    def fetch(self, move: TensorCopy, index: int, part: Box, out: Array) -> Runs | None:
        """Fill ``out`` with ``part`` of source ``index``; the runs that were read, if any."""
        form, piece, stored = move.forms[index], move.pieces[index][0], move.sources[index]
        assert form is not None
        view = piece.view
        if out.flags.c_contiguous and view and not view.steps and view.dtype == move.dtype:
            runs, order = form.runs(part, stored, piece.offset)
            if form.item_bytes and runs.num_bytes == out.nbytes and list(order) == sorted(order):
                read_runs(self._source, piece, runs, out.reshape(-1).view(np.uint8))
                return runs
        into = None if form.is_permuted(part) else out.view(numpy_dtype(move.dtype))
        values, read = self.values_of(move, index, part, into)
        if values is not into:
            copy_into(out, values.view(out.dtype))
        return read

    def values_of(
        self, move: TensorCopy, index: int, part: Box, into: Array | None = None
    ) -> tuple[Array, Runs | None]:
        """``part`` of source ``index``, valid until the next, and the runs that were read.

        Where there are steps, and nothing is repeated, they are put ``into`` the memory given.
        """
        form, piece, stored = move.forms[index], move.pieces[index][0], move.sources[index]
        assert form is not None
        assert piece.view is not None
        dtype = numpy_dtype(move.dtype)
        if not form.item_bytes:
            return self._zeros(piece.view, part.shape, part.within(stored).start, dtype), None
        runs, order = form.runs(part, stored, piece.offset)
        compact = self._room(piece.view, runs, order, into, dtype)
        read_runs(self._source, piece, runs, compact)
        values = _in_order(compact.view(numpy_dtype(piece.view.dtype)), part.shape, order)
        start = part.within(stored).start
        if piece.view.steps:
            view, known = self._with_factors(piece.view, start, part.shape)
            values = _expanded(values, view, part.shape)
            if into is not None and into.shape == values.shape:
                _converted(values, view, start, known, into, self._spare)
                return into, runs
            done = np.empty_like(values, dtype)
            _converted(values, view, start, known, done, self._spare)
        else:
            done = values
            if values.dtype != dtype:
                done = np.empty_like(values, dtype)
                cast_into(done, values)
        return np.broadcast_to(done, part.shape), runs

    def _zeros(
        self, view: View, shape: tuple[int, ...], start: tuple[int, ...], dtype: np.dtype[Any]
    ) -> Array:
        """The values of zeros, which no file stores, after the view's steps."""
        done = np.zeros(shape if view.steps else (), dtype)
        if view.steps:
            zeros = np.zeros(shape, numpy_dtype(view.dtype))
            view, known = self._with_factors(view, start, shape)
            _converted(zeros, view, start, known, done, self._spare)
        return np.broadcast_to(done, shape)

    def _with_factors(
        self, view: View, start: tuple[int, ...], lengths: tuple[int, ...]
    ) -> tuple[View, Values]:
        """Read the factors of a part that have a size like its own; the others are known."""
        if not view.factors:
            return view, self.values
        steps, known = list[Step](), dict(self.values)
        for step in view.steps:
            if isinstance(step, Scale) and step.is_by_part:
                box = step.part_of(start, lengths)
                scale = replace(step.scale, shape=box.shape, shards=())
                known[scale] = _as_float32(step.scale, box, self._read)
                steps.append(step.within(box, scale))
            else:
                steps.append(step)
        return replace(view, steps=tuple(steps)), known

    def _room(
        self,
        view: View,
        runs: Runs,
        order: tuple[int, ...],
        into: Array | None,
        dtype: np.dtype[Any],
    ) -> Bytes:
        """Memory to read ``runs`` to: where the values will be, if steps leave them there."""
        if view.steps and into is not None and numpy_dtype(view.dtype) == dtype:
            in_place = into.flags.c_contiguous and list(order) == sorted(order)
            if in_place and runs.num_bytes == into.nbytes:
                return into.reshape(-1).view(np.uint8)
        if runs.num_bytes > len(self._buffer):
            self._buffer = np.empty(runs.num_bytes, np.uint8)
        return self._buffer[: runs.num_bytes]


def _in_order(compact: Array, lengths: tuple[int, ...], order: tuple[int, ...]) -> Array:
    """The elements, stored with dims ``order``, with all dims in theirs; length 1 if repeated."""
    stored = compact.reshape([lengths[d] for d in order])
    ascending = sorted(range(len(order)), key=order.__getitem__)
    index = tuple(slice(None) if d in order else None for d in range(len(lengths)))
    return stored.transpose(ascending)[index]


def _expanded(values: Array, view: View, lengths: tuple[int, ...]) -> Array:
    """Repeat integers along the dims of the values that they pack."""
    step = view.steps[0]
    if not isinstance(step, Decode):
        return values
    pairs = zip(values.shape, lengths, step.at.steps, strict=True)
    return np.broadcast_to(values, [n if along else own for own, n, along in pairs])


def _converted(
    values: Array, view: View, start: tuple[int, ...], known: Values, done: Array, spare: Spare
) -> None:
    """Put ``values``, whose first element is at ``start``, in ``done`` after the view's steps."""
    first = view.steps[0]
    is_wide = _F64 in (view.dtype, first.dtype if isinstance(first, RoundTo) else None)
    work = np.dtype(np.float64 if is_wide else np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # a value too large becomes inf, as in JAX
        if _added_at_once(values, view, start, known, done) or _looked_up(values, view, done):
            return
        wide_memory, table_memory = spare.of(work, _most(values))
        in_place = done.dtype == work and done.strides == values.strides
        is_read_there = in_place and np.may_share_memory(done, values)
        for part, at in _portions(values, start):
            target = done[part]
            wide = target if in_place else _like(wide_memory, values[part])
            if isinstance(first, Decode):
                _decode_into(wide, values[part], first, at)
            elif not is_read_there:
                cast_into(wide, values[part])
            for step in view.steps[isinstance(first, Decode) :]:
                wide = _stepped(wide, step, at, known, table_memory)
            if wide is not target:
                cast_into(target, wide)


def _added_at_once(
    values: Array, view: View, start: tuple[int, ...], known: Values, done: Array
) -> bool:
    """Add an adapter to a matrix of bfloat16 in one pass, if that is all there is to do."""
    step = view.steps[0]
    if len(view.steps) > 1 or not isinstance(step, AddProduct) or step.reproducible:
        return False
    (row_dims, rows), (column_dims, columns) = (_indices(a, start, values.shape) for a in step.at)
    matrix = (*row_dims, *column_dims)
    if len(row_dims) != 1 or len(column_dims) != 1:
        return False
    if any(n > 1 for d, n in enumerate(values.shape) if d not in matrix):
        return False
    plane = tuple(slice(None) if d in matrix else 0 for d in range(values.ndim))
    to, come = (x[plane] if row_dims < column_dims else x[plane].T for x in (done, values))
    b, a = _factors(step, known, rows, columns)
    b, scaling = _scaled_early(b, step.scaling)
    return native.add_product(to, come, b, a, scaling)


def _looked_up(values: Array, view: View, done: Array) -> bool:
    """Convert values of at most 16 bits by a table of all, if no step depends on the place.

    Only where casts are not compiled: one by one, those of F16 and FP8 take ten times as long.
    """
    if values.itemsize > 2 or values.size <= 1 << 8 * values.itemsize:
        return False
    if native.is_there() and values.dtype.name == done.dtype.name == "bfloat16":
        return False
    if not all(isinstance(step, RoundTo | MultiplyAdd) for step in view.steps):
        return False
    table = _table_of(view.dtype, view.steps, done.dtype)
    order = sorted(range(values.ndim), key=lambda d: -values.strides[d])
    bits, out = values.view(_bits(values.dtype)).transpose(order), done.transpose(order)
    for part, _ in _portions(bits, (0,) * bits.ndim):
        out[part] = table.take(bits[part], mode="clip")  # faster than "raise"
    return True


@cached(16)
def _table_of(kind: DType, steps: tuple[Step, ...], dtype: np.dtype[Any]) -> Array:
    """Return what each value of ``kind`` becomes, in the order of their bits."""
    stored = numpy_dtype(kind)
    every = np.arange(1 << 8 * stored.itemsize, dtype=_bits(stored)).view(stored)
    table = np.empty(every.shape, dtype)
    _converted(every, View((), kind, steps), (0,), {}, table, Spare())
    return table


def _bits(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"u{dtype.itemsize}")


class Spare:
    """A thread's memory for what is under way, made once."""

    def __init__(self) -> None:
        self._held = np.empty((2, 0), np.float32)

    def of(self, dtype: np.dtype[Any], size: int) -> Array:
        """Two times ``size`` elements of ``dtype``, of any content."""
        if self._held.dtype != dtype or self._held.shape[1] < size:
            self._held = np.empty((2, size), dtype)
        return self._held


def _most(values: Array) -> int:
    """The most elements of a portion."""
    if not values.ndim or not values.size:
        return 1
    one = int(values.size // values.shape[_slowest(values)])
    return min(int(values.size), max(_AT_A_TIME, one))


def _slowest(values: Array) -> int:
    """The dim whose neighbours are farthest in memory."""
    return max(range(values.ndim), key=lambda d: values.strides[d] if values.shape[d] > 1 else 0)


def _portions(
    values: Array, start: tuple[int, ...]
) -> Iterator[tuple[tuple[Any, ...], tuple[int, ...]]]:
    """Parts of ``values`` that are one piece of memory each, and where each begins."""
    if not values.ndim or not values.size:
        yield (...,), start  # without it, indexing an array without dims makes a number
        return
    slowest = _slowest(values)
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


def _decode_bytes(out: Array, stored: Array, code: str) -> None:
    """Put all values of each integer of ``stored`` in the last dim of ``out``, byte by byte.

    Ten times as fast as one by one.
    """
    values = code_values(code)
    numbers = np.arange(256)
    halves = (numbers & 15, numbers >> 4) if CODES[code].bits == 4 else (numbers,)
    table = np.stack([values[half] for half in halves], axis=-1)
    table = table.view(np.dtype(f"u{table.itemsize * len(halves)}"))[:, 0]
    items = out.view(table.dtype)
    for byte in range(CODES[code].stored_bits // 8):
        items[..., byte] = table[(stored >> (8 * byte)) & 255 if stored.itemsize > 1 else stored]


def _decode_into(out: Array, values: Array, step: Decode, start: tuple[int, ...]) -> None:
    """Put the values that integers pack, each repeated for all of them, in ``out``."""
    bits, stored_bits = CODES[step.code]
    dims, places = _indices(step.at, start, values.shape)
    if len(dims) == 1 and values.shape[dims[0]] * bits == stored_bits:
        beside = np.moveaxis(out, dims[0], -1)
        if beside.strides[-1] == out.itemsize:
            _decode_bytes(beside, values[(slice(None),) * dims[0] + (0,)], step.code)
            return
    shifts = _in_order((_numbers(places) * bits).astype(values.dtype), values.shape, dims)
    numbers = np.right_shift(values, shifts)
    numbers &= (1 << bits) - 1
    out[...] = code_values(step.code)[numbers]


def _stepped(
    values: Array, step: Step, start: tuple[int, ...], known: Values, spare: Array
) -> Array:
    if isinstance(step, RoundTo):
        kind = numpy_dtype(step.dtype)
        if kind != values.dtype:
            rounded = np.empty_like(values, kind)
            cast_into(rounded, values)
            cast_into(values, rounded)
        return values
    if isinstance(step, MultiplyAdd):
        number = numpy_dtype(step.dtype).type
        values = values.astype(number, copy=False)  # exact: the values are rounded to a dtype
        if step.times != 1:
            values *= number(step.times)
        if step.plus:
            values += number(step.plus)
        return values
    assert not isinstance(step, Decode), "always the first step"
    indices = [_indices(a, start, values.shape) for a in step.at]
    order = tuple(d for dims, _ in indices for d in dims)
    if isinstance(step, AddProduct):
        (_, rows), (_, columns) = indices
        b, a = _factors(step, known, rows, columns)
        scaling = np.float32(step.scaling)
        if step.reproducible:
            table = _fused_product(b, a)
        else:
            b, scaling = _scaled_early(b, step.scaling)
            size, same = len(b) * a.shape[1], spare.dtype == b.dtype
            made = spare[:size] if same else np.empty(size, b.dtype)
            table = _product(b, a, made.reshape(len(b), a.shape[1]))
        if scaling != 1:
            table *= scaling
        values += _in_order(table, values.shape, order)
    else:
        table = _table(step, known[step.scale], indices, known)
        values *= _in_order(table, values.shape, order)
    return values


def _table(
    step: Scale, factors: Array, indices: Sequence[tuple[tuple[int, ...], Indices]], known: Values
) -> Array:
    """Return the factor of each element of a portion."""
    if step.outer:
        outer = known[step.outer].reshape(())
        factors = factors / outer if step.divides else factors * outer
    for axis, ((_, numbers), size) in enumerate(zip(indices, step.block, strict=True)):
        factors = _spread(factors, numbers, size, axis)
    return factors


def _spread(factors: Array, indices: Indices, size: int, axis: int) -> Array:
    """Repeat each factor for the elements of its block, along ``axis``."""
    numbers = _numbers(indices)
    count, first, last = len(numbers), int(numbers[0]), int(numbers[-1])
    groups = last // size - first // size + 1
    if last - first + 1 != count or (groups > 1 and groups * size > 2 * count):
        return factors.take(numbers // size, axis)
    before = (slice(None),) * axis
    held = factors[(*before, slice(first // size, last // size + 1))]
    if groups == 1:
        return np.repeat(held, count, axis)
    skipped = first % size
    return np.repeat(held, size, axis)[(*before, slice(skipped, skipped + count))]


def _factors(
    step: AddProduct, known: Values, rows: Indices, columns: Indices
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What of ``b`` and ``a`` the product of ``rows`` and ``columns`` is made of."""
    b, a = _take(known[step.b], rows, 0), _take(known[step.a], columns, 1)
    first, apart = step.columns
    return (b if apart == 1 else np.ascontiguousarray(b[:, first::apart])), a


def _scaled_early(b: NDArray[np.float32], scaling: float) -> tuple[NDArray[np.float32], np.float32]:
    """A power of two goes into the small ``b``, with the same bits; and what scaling is left."""
    if abs(frexp(scaling)[0]) == 0.5:
        return b * np.float32(scaling), np.float32(1)
    return b, np.float32(scaling)


def _product(
    b: NDArray[np.float32], a: NDArray[np.float32], out: NDArray[np.float32]
) -> NDArray[np.float32]:
    """``b @ a`` in ``out``, in products so small that the BLAS starts no threads for them.

    Its threads would fight with ours, and wait for each other when the machine is busy. All
    the small products are one call: with a call for each, ours would wait for the interpreter.
    """
    (rows, rank), columns = b.shape, a.shape[1]
    high = min(rows, _PRODUCT_ROWS)
    wide = min(columns, max(16, _ALONE // (_PRODUCT_ROWS * max(1, rank))))
    down, across = rows // high, columns // wide
    whole_rows, whole_columns = down * high, across * wide
    tiled = out[:whole_rows, :whole_columns]
    np.matmul(
        b[:whole_rows].reshape(down, 1, high, rank),
        a[:, :whole_columns].reshape(rank, across, wide).transpose(1, 0, 2),
        out=_tiled(tiled, down, across),
    )
    if whole_columns < columns:
        _product(b[:whole_rows], a[:, whole_columns:], out[:whole_rows, whole_columns:])
    if whole_rows < rows:
        _product(b[whole_rows:], a, out[whole_rows:])
    return out


def _tiled(array: NDArray[np.float32], down: int, across: int) -> NDArray[np.float32]:
    """A matrix as (down, across, rows, columns), in its own memory."""
    high, wide = array.shape[0] // down, array.shape[1] // across
    row, item = array.strides
    shape, strides = (down, across, high, wide), (high * row, wide * item, row, item)
    return np.lib.stride_tricks.as_strided(array, shape, strides)


def _fused_product(b: NDArray[np.float32], a: NDArray[np.float32]) -> NDArray[np.float32]:
    """``b @ a``, each sum in order of the rank and rounded at every step, for any BLAS.

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
    at: IndexMap, start: tuple[int, ...], lengths: tuple[int, ...]
) -> tuple[tuple[int, ...], Indices]:
    """The dims that ``at`` grows along, largest step first, and its numbers in that order."""
    dims = [d for d, n in enumerate(lengths) if n > 1 and at.steps[d]]
    first = at.start + sum(map(mul, start, at.steps))
    if not dims:
        return (), slice(first, first + 1)
    if len(dims) == 1 and at.steps[dims[0]] == 1:
        return tuple(dims), slice(first, first + lengths[dims[0]])
    dims.sort(key=_by(at.steps))
    numbers = np.array([first])
    for d in dims:
        numbers = (numbers[:, None] + np.arange(lengths[d]) * at.steps[d]).reshape(-1)
    return tuple(dims), numbers


def _numbers(indices: Indices) -> NDArray[np.intp]:
    return np.arange(indices.start, indices.stop) if isinstance(indices, slice) else indices


def _by(steps: tuple[int, ...]) -> Callable[[int], int]:
    return lambda d: -steps[d]


def _take(array: NDArray[np.float32], index: Indices, axis: int) -> NDArray[np.float32]:
    if not isinstance(index, slice):
        first, last = int(index[0]), int(index[-1])
        if last - first + 1 != len(index):
            return array.take(index, axis)
        index = slice(first, last + 1)  # indices grow, so these are all between
    return array[index] if axis == 0 else array[:, index]


# --- Requests: the runs of a box, read from its file with as few requests as their gaps allow


def read_runs(source: Source, piece: StoredShard, runs: Runs, out: Bytes) -> None:
    """Fill ``out`` with ``runs`` of the file that stores ``piece``, one after the other."""
    requests = runs.coalesced()
    share = len(out) // max(1, len(requests))
    if requests.length == share and len(requests) > 1:
        source.read_rows(piece, requests.offsets(), out.data)
        return
    for i, (offset, length) in enumerate(requests):
        chunk = out[i * share : (i + 1) * share]
        if length == share:
            source.read(piece, offset, chunk.data)
        else:
            span = np.empty(length, np.uint8)
            source.read(piece, offset, span.data)
            _pick(span, runs, len(runs.outer) - len(requests.outer), chunk)


def _pick(span: Bytes, runs: Runs, inner: int, out: Bytes) -> None:
    """Copy the runs of the last ``inner`` dims out of the span that was read over them."""
    dims = runs.outer[len(runs.outer) - inner :]
    shape = (*(n for n, _ in dims), runs.length)
    strides = (*(s for _, s in dims), 1)
    view = np.lib.stride_tricks.as_strided(span, shape, strides, writeable=False)
    out.reshape(shape)[...] = view
