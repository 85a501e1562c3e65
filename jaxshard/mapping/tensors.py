"""Geometry of mapped tensors: reshape, transpose, slice and concatenate as views.

The shards of a tensor are strided boxes of a finer shape (see ``catalog.Tensor.factors``). Every
function returns another tensor whose shards are boxes of the same files:

    gate (3, H)  g0 g1 g2     each seen as (3, 1, H), joined along dim 1: (3, 2, H), and
    up   (3, H)  u0 u1 u2     seen as (6, H): rows g0 u0 g1 u1 g2 u2 of two boxes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from operator import mul

from ..core.box import Box
from ..core.catalog import (
    ZEROS,
    Decode,
    IndexMap,
    MultiplyAdd,
    RoundTo,
    Scale,
    Step,
    StoredShard,
    Tensor,
    View,
    places,
    with_places,
)
from ..core.dtypes import CODES, DType
from ..core.dtypes import dtype as dtype_named
from ..errors import LayoutError
from .algebra import (
    check_affine,
    check_bits,
    check_cast,
    check_code,
    check_cut,
    check_join,
    check_order,
    check_repeat,
    check_reshape,
    check_scales,
)

_Turn = Callable[[tuple[int, ...]], tuple[int, ...]]


def with_steps(shard: StoredShard, turn: _Turn) -> StoredShard:
    """``shard`` with every tuple of steps (strides in bytes, places) changed by ``turn``."""
    view = shard.view
    assert view is not None
    steps = tuple(
        with_places(s, tuple(IndexMap(a.start, turn(a.steps)) for a in places(s)))
        for s in view.steps
    )
    return replace(shard, view=View(turn(view.strides), view.dtype, steps))


def moved(shard: StoredShard, dim: int, by: int) -> StoredShard:
    """``shard`` with its first element ``by`` later along ``dim``; its box stays."""
    view = shard.view
    assert view is not None
    if not by:
        return shard
    steps = tuple(with_places(s, tuple(a.moved(dim, by) for a in places(s))) for s in view.steps)
    offset = shard.offset + by * view.strides[dim]
    return StoredShard(shard.file, offset, shard.box, View(view.strides, view.dtype, steps))


def permuted(shard: StoredShard, order: Sequence[int]) -> StoredShard:
    """``shard`` with its dims in another order."""

    def turn(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[i] for i in order)

    return with_steps(replace(shard, box=Box(turn(shard.box.start), turn(shard.box.stop))), turn)


def with_dim(shard: StoredShard, at: int) -> StoredShard:
    """``shard`` with one more dim, of length 1."""
    start, stop = shard.box.start, shard.box.stop
    box = Box((*start[:at], 0, *start[at:]), (*stop[:at], 1, *stop[at:]))
    return with_steps(replace(shard, box=box), lambda s: (*s[:at], 0, *s[at:]))


def without_dim(shard: StoredShard, at: int) -> StoredShard:
    """``shard`` without a dim of length 1."""
    start, stop = shard.box.start, shard.box.stop
    box = Box((*start[:at], *start[at + 1 :]), (*stop[:at], *stop[at + 1 :]))
    return with_steps(replace(shard, box=box), lambda s: (*s[:at], *s[at + 1 :]))


def shifted(shard: StoredShard, dim: int, by: int) -> StoredShard:
    """``shard`` with its box ``by`` later along ``dim``."""
    start, stop = list(shard.box.start), list(shard.box.stop)
    start[dim] += by
    stop[dim] += by
    return replace(shard, box=Box(tuple(start), tuple(stop)))


def part_of(shard: StoredShard, inside: Box) -> StoredShard | None:
    """The part of ``shard`` in ``inside``, in coordinates local to that box."""
    shared = shard.box.intersect(inside)
    if shared is None:
        return None
    for dim, (a, b) in enumerate(zip(shard.box.start, shared.start, strict=True)):
        shard = moved(shard, dim, b - a)
    return replace(shard, box=shared.within(inside))


def split(shard: StoredShard, dim: int, inner: int) -> list[StoredShard]:
    """``shard`` with a fine dim seen as (outer, ``inner``): one box, or up to three."""
    start, stop = shard.box.start[dim], shard.box.stop[dim]
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        parts = [(start, stop)]
    else:
        middle = (-(-start // inner) * inner, stop // inner * inner)
        parts = [p for p in ((start, middle[0]), middle, (middle[1], stop)) if p[0] < p[1]]
    found = []
    for a, b in parts:
        row = a // inner
        rows = max(1, (b - a) // inner)
        box = Box(
            (*shard.box.start[:dim], row, a - row * inner, *shard.box.start[dim + 1 :]),
            (
                *shard.box.stop[:dim],
                row + rows,
                b - (row + rows - 1) * inner,
                *shard.box.stop[dim + 1 :],
            ),
        )
        part = replace(moved(shard, dim, a - start), box=box)
        found.append(with_steps(part, lambda s: (*s[:dim], s[dim] * inner, s[dim], *s[dim + 1 :])))
    return found


def merged(shard: StoredShard, dim: int, inner: int) -> StoredShard | None:
    """``shard`` with fine dims ``dim`` and ``dim + 1`` (of length ``inner``) as one."""
    start, stop, view = shard.box.start, shard.box.stop, shard.view
    assert view is not None
    if stop[dim] - start[dim] > 1:
        if (start[dim + 1], stop[dim + 1]) != (0, inner):
            return None
        all_steps = [view.strides, *(a.steps for s in view.steps for a in places(s))]
        if inner > 1 and any(s[dim] != inner * s[dim + 1] for s in all_steps):
            return None
    keep = dim if inner == 1 else dim + 1  # the steps of a dim of length 1 are arbitrary
    box = Box(
        (*start[:dim], start[dim] * inner + start[dim + 1], *start[dim + 2 :]),
        (*stop[:dim], (stop[dim] - 1) * inner + stop[dim + 1], *stop[dim + 2 :]),
    )
    return with_steps(replace(shard, box=box), lambda s: (*s[:dim], s[keep], *s[dim + 2 :]))


def rows_of(shard: StoredShard, dim: int) -> list[StoredShard]:
    """``shard`` split into one shard for each index of a fine dim."""
    start, stop = shard.box.start, shard.box.stop
    return [
        replace(
            moved(shard, dim, i - start[dim]),
            box=Box((*start[:dim], i, *start[dim + 1 :]), (*stop[:dim], i + 1, *stop[dim + 1 :])),
        )
        for i in range(start[dim], stop[dim])
    ]


# --- Operations on whole tensors

Factors = tuple[tuple[int, ...], ...]


def transpose(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Dim ``i`` of the result is dim ``order[i]`` of ``tensor``."""
    check_order(tensor.name, order, tensor.shape)
    tensor = viewed(tensor)
    factors = _factors(tensor)
    first = _offsets(factors)
    fine = [i for d in order for i in range(first[d], first[d] + len(factors[d]))]
    return replace(
        tensor,
        shape=tuple(tensor.shape[d] for d in order),
        shards=tuple(permuted(p, fine) for p in tensor.shards),
        factors=tuple(factors[d] for d in order),
    )


def reshape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same elements in the same row-major order, as a tensor of ``shape``.

    Raises:
        LayoutError: another number of elements.
    """
    check_reshape(tensor.name, tensor.shape, shape)
    if not prod(shape):
        return Tensor(tensor.name, tensor.dtype, shape, (), tuple((n,) for n in shape))
    tensor = viewed(tensor)
    made = _refactored(tensor, shape)
    if made is None:  # the shards are boxes of other groups: split them into runs
        flat = _refactored(tensor, (prod(shape),))
        assert flat is not None
        made = _refactored(_flat_dim(flat, 0), shape)
        assert made is not None
    return _simple(made)


def _refactored(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """``tensor`` viewed as ``shape``, or None if a factor neither splits nor merges into it."""
    fine, shards = [n for n in tensor.fine_shape if n != 1], tensor.shards
    for i, n in reversed(list(enumerate(tensor.fine_shape))):
        if n == 1:
            shards = tuple(without_dim(p, i) for p in shards)
    factors: list[tuple[int, ...]] = []
    at = 0
    for n in shape:
        begin, left = at, n
        while left > 1:
            if left % fine[at]:
                if fine[at] % left:
                    return None
                shards = tuple(q for p in shards for q in split(p, at, fine[at] // left))
                fine[at : at + 1] = [left, fine[at] // left]
            left //= fine[at]
            at += 1
        if begin == at:
            shards = tuple(with_dim(p, at) for p in shards)
            fine.insert(at, 1)
            at += 1
        factors.append(tuple(fine[begin:at]))
    return replace(tensor, shape=shape, shards=shards, factors=tuple(factors))


def cut(tensor: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """The elements ``start:stop`` along ``dim``."""
    check_cut(tensor.name, tensor.shape, dim, start, stop)
    tensor = viewed(tensor)
    shape = (*tensor.shape[:dim], stop - start, *tensor.shape[dim + 1 :])
    box = Box.whole(tensor.shape)
    box = Box(
        (*box.start[:dim], start, *box.start[dim + 1 :]),
        (*box.stop[:dim], stop, *box.stop[dim + 1 :]),
    )
    try:
        inside = tensor.fine(box)
    except LayoutError:
        tensor = _flat_dim(tensor, dim)
        inside = tensor.fine(box)
    shards = [q for p in tensor.shards if (q := part_of(p, inside))]
    factors = _factors(tensor)
    first = _offsets(factors)[dim]
    extents = inside.shape[first : first + len(factors[dim])]
    made = (*factors[:dim], extents, *factors[dim + 1 :])
    return _simple(replace(tensor, shape=shape, shards=tuple(shards), factors=made))


def join(tensors: Sequence[Tensor], dim: int, name: str) -> Tensor:
    """Concatenate the tensors along ``dim``.

    Raises:
        LayoutError: their other dims or their dtypes differ.
    """
    first = tensors[0]
    check_join(name, dim, [(t.name, t.shape, t.dtype) for t in tensors])
    aligned = _aligned([viewed(t) for t in tensors], dim)
    factors = _factors(aligned[0])
    at = _offsets(factors)[dim]
    shards, done = [], 0
    for t in aligned:
        shards += [shifted(p, at, done) for p in t.shards]
        done += _factors(t)[dim][0]
    made = (*factors[:dim], (done, *factors[dim][1:]), *factors[dim + 1 :])
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    joined = Tensor(name, first.dtype, tuple(shape), tuple(shards), made)
    return _simple(joined)


def repeat(tensor: Tensor, dim: int, times: int) -> Tensor:
    """A tensor whose ``dim``, of length 1, is repeated ``times`` times."""
    check_repeat(tensor.name, tensor.shape, dim)
    tensor = viewed(tensor)
    at = _offsets(_factors(tensor))[dim]
    shards = []
    for p in tensor.shards:
        box = Box(p.box.start, (*p.box.stop[:at], times, *p.box.stop[at + 1 :]))
        shards.append(with_steps(replace(p, box=box), lambda s: (*s[:at], 0, *s[at + 1 :])))
    factors = _factors(tensor)
    made = (*factors[:dim], (times,), *factors[dim + 1 :])
    shape = (*tensor.shape[:dim], times, *tensor.shape[dim + 1 :])
    return replace(tensor, shape=shape, shards=tuple(shards), factors=made)


def zeros(shape: tuple[int, ...], dtype: DType) -> Tensor:
    """Return a tensor of zeros, which no file stores."""
    view = View((0,) * len(shape), dtype)
    shard = StoredShard(ZEROS, 0, Box.whole(shape), view)
    return Tensor("zeros", dtype, shape, (shard,), tuple((n,) for n in shape))


def cast(tensor: Tensor, dtype: DType) -> Tensor:
    """Return the same values, rounded to ``dtype``."""
    if dtype == tensor.dtype:
        return tensor
    check_cast(tensor.dtype, dtype)
    _refuse_packed(dtype, tensor.name)
    return replace(_rounded(tensor), dtype=dtype)


def affine(tensor: Tensor, times: float, plus: float) -> Tensor:
    """Return each value times ``times`` plus ``plus``, rounded once to the tensor's dtype."""
    width = check_affine(tensor.dtype)
    if (times, plus) == (1, 0):
        return tensor
    step = MultiplyAdd(times, plus, width)
    return _stepped(_rounded(tensor), lambda view: (*view.steps, step))


def _rounded(tensor: Tensor) -> Tensor:
    """Round the values to the dtype of ``tensor`` before the next step."""
    kind = tensor.dtype

    def steps(view: View) -> tuple[Step, ...]:
        last = view.steps[-1] if view.steps else RoundTo(view.dtype)
        is_rounded = isinstance(last, Decode) or (
            isinstance(last, RoundTo | MultiplyAdd) and last.dtype == kind
        )
        return view.steps if is_rounded else (*view.steps, RoundTo(kind))

    return _stepped(viewed(tensor), steps)


def _stepped(tensor: Tensor, steps: Callable[[View], tuple[Step, ...]]) -> Tensor:
    """Replace the steps of each view of ``tensor`` by those that ``steps`` returns."""
    shards = []
    for p in tensor.shards:
        assert p.view is not None
        shards.append(replace(p, view=replace(p.view, steps=steps(p.view))))
    return replace(tensor, shards=tuple(shards))


def decoded(tensor: Tensor, code: str) -> Tensor:
    """Return the values that each integer packs; the last dim has one more factor, for them."""
    check_code(tensor.name, tensor.shape, tensor.dtype, code)
    tensor = viewed(tensor)
    count = CODES[code].num_values
    end = len(tensor.fine_shape)
    shards = []
    for p in tensor.shards:
        wide = with_dim(p, end)
        assert wide.view is not None
        step = Decode(code, IndexMap(0, (*(0 for _ in range(end)), 1)))
        box = Box(wide.box.start, (*wide.box.stop[:-1], count))
        view = replace(wide.view, steps=(*wide.view.steps, step))
        shards.append(replace(wide, box=box, view=view))
    *rows, last = _factors(tensor)
    shape = (*tensor.shape[:-1], tensor.shape[-1] * count)
    factors = (*rows, (*last, count))
    return Tensor(tensor.name, dtype_named("F32"), shape, tuple(shards), factors)


def bits_as(tensor: Tensor, kind: DType) -> Tensor:
    """Return the bits as values of ``kind``."""
    check_bits(tensor.name, tensor.dtype, kind)
    shards = tuple(
        replace(p, view=replace(p.view, dtype=kind)) if p.view else p for p in tensor.shards
    )
    return replace(tensor, dtype=kind, shards=shards)


def scaled(
    tensor: Tensor,
    scale: Tensor,
    block: tuple[int, int],
    dtype: DType,
    outer: Tensor | None = None,
    *,
    divides: bool = False,
) -> Tensor:
    """Return the values in ``dtype`` of a weight with a factor for each block.

    Raises:
        LayoutError: the factors do not match the blocks.
    """
    check_scales(tensor.name, tensor.shape, scale.name, scale.shape, block)
    per = (*(block[0] for _ in scale.shape[:-1]), block[1])
    made = _with_step(_rounded(tensor), lambda at: Scale(scale, per, at, outer, divides))
    return replace(made, dtype=dtype)


def with_step(tensor: Tensor, make: Callable[[tuple[IndexMap, IndexMap]], Step]) -> Tensor:
    """Append to each shard of a matrix the step that ``make`` returns for its position."""
    tensor = viewed(tensor)
    if [len(f) for f in _factors(tensor)] != [1, 1]:
        raise LayoutError(
            f"{tensor.name}: a scale or an adapter needs a matrix that is not fused or reshaped, "
            "got "
            f"shape {tensor.shape}. Apply it before other operations."
        )
    return _with_step(tensor, lambda at: make((at[0], at[1])))


def _with_step(tensor: Tensor, make: Callable[[tuple[IndexMap, ...]], Step]) -> Tensor:
    """Append to each shard the step that ``make`` returns for the indices of its elements."""
    fine, factors = tensor.fine_shape, _factors(tensor)
    along: list[tuple[int, ...]] = []
    for first, dim in zip(_offsets(factors), factors, strict=True):
        inside = range(first, end := first + len(dim))
        along.append(tuple(prod(fine[i + 1 : end]) * (i in inside) for i in range(len(fine))))
    shards = []
    for p in tensor.shards:
        start, view = p.box.start, p.view
        assert view is not None
        at = tuple(IndexMap(sum(map(mul, start, steps)), steps) for steps in along)
        shards.append(replace(p, view=replace(view, steps=(*view.steps, make(at)))))
    return replace(tensor, shards=tuple(shards))


def viewed(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with a view of every shard and factors of every dim.

    Raises:
        LayoutError: the dtype packs several elements in a byte.
    """
    if tensor.factors is not None:
        return tensor
    _refuse_packed(tensor.dtype, tensor.name)
    shards = tuple(_viewed_shard(p, tensor.dtype) for p in tensor.shards)
    return replace(tensor, shards=shards, factors=tuple((n,) for n in tensor.shape))


def _viewed_shard(shard: StoredShard, dtype: DType) -> StoredShard:
    if shard.view is not None:
        return shard
    shape, size = shard.box.shape, dtype.unit_bytes
    strides = tuple(size * prod(shape[i + 1 :]) for i in range(len(shape)))
    return replace(shard, view=View(strides, dtype))


def _refuse_packed(dtype: DType, name: str) -> None:
    if dtype.unit_elements > 1:
        raise LayoutError(
            f"{name}: {dtype} packs {dtype.unit_elements} elements in {dtype.unit_bytes} byte(s), "
            "so it can only be renamed."
        )


def _factors(tensor: Tensor) -> Factors:
    assert tensor.factors is not None
    return tensor.factors


def _offsets(factors: Factors) -> list[int]:
    """Return the first fine dim of each dim."""
    found, at = [], 0
    for dim in factors:
        found.append(at)
        at += len(dim)
    return found


def _simple(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with the fewest factors, so that targets may be cut anywhere."""
    for dim in range(len(tensor.shape)):
        at = 0
        while at + 1 < len(_factors(tensor)[dim]):
            made = _merge(tensor, dim, at)
            if made is None:
                at += 1
            else:
                tensor = made
    return tensor


def _merge(tensor: Tensor, dim: int, at: int, *, force: bool = False) -> Tensor | None:
    """Merge factors ``at`` and ``at + 1`` of ``dim``, if all shards allow it.

    With ``force`` the other shards are split into single rows, which always allow it.
    """
    factors = _factors(tensor)
    fine, inner = _offsets(factors)[dim] + at, factors[dim][at + 1]
    shards: list[StoredShard] = []
    for p in tensor.shards:
        one = merged(p, fine, inner)
        if one is not None:
            shards.append(one)
        elif force:
            shards += [m for row in rows_of(p, fine) if (m := merged(row, fine, inner))]
        else:
            return None
    now = (*factors[dim][:at], factors[dim][at] * inner, *factors[dim][at + 2 :])
    return replace(tensor, shards=tuple(shards), factors=(*factors[:dim], now, *factors[dim + 1 :]))


def _flat_dim(tensor: Tensor, dim: int) -> Tensor:
    """Merge all factors of ``dim``, splitting shards as far as necessary."""
    while len(_factors(tensor)[dim]) > 1:
        made = _merge(tensor, dim, 0, force=True)
        assert made is not None
        tensor = made
    return tensor


def _aligned(tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Refine the tensors to equal factors, except the outermost of ``dim``."""
    for d in range(len(tensors[0].shape)):
        lengths = {t.shape[d] for t in tensors}
        bounds = sorted({b for t in tensors for b in _bounds(_factors(t)[d])})
        usable = [b for b in bounds if all(n % b == 0 for n in lengths)]
        if d == dim:
            chain: list[int] = []
            for b in usable:
                if not chain or b % chain[-1] == 0:
                    chain.append(b)
        else:
            chain = usable
            if any(b % a for a, b in pairwise(chain)):
                every = sorted({_factors(t)[d] for t in tensors})
                raise LayoutError(
                    f"{', '.join(t.name for t in tensors[:3])} …: the factors of dim {d} do "
                    f"not divide each other ({every})."
                )
        tensors = [_refined(t, d, chain) for t in tensors]
    return list(tensors)


def _bounds(factors: tuple[int, ...]) -> list[int]:
    """Return the lengths of the groups inside a dim: (2, 3, 4) has groups of 12 and of 4."""
    return [prod(factors[i:]) for i in range(1, len(factors))]


def _refined(tensor: Tensor, dim: int, bounds: Sequence[int]) -> Tensor:
    """Refine ``dim`` to exactly the groups ``bounds`` (rising, each divides the next)."""
    while (own := _bounds(_factors(tensor)[dim])) != (wanted := sorted(bounds, reverse=True)):
        extra = next((i for i, b in enumerate(own) if b not in wanted), None)
        if extra is not None:
            made = _merge(tensor, dim, extra, force=True)
            assert made is not None
            tensor = made
            continue
        missing = next(b for b in wanted if b not in own)
        factors = _factors(tensor)[dim]
        at = sum(b > missing for b in own)  # the factor that contains the new group
        inner = missing // prod(factors[at + 1 :])
        fine = _offsets(_factors(tensor))[dim] + at
        shards = tuple(q for p in tensor.shards for q in split(p, fine, inner))
        now = (*factors[:at], factors[at] // inner, inner, *factors[at + 1 :])
        every = _factors(tensor)
        tensor = replace(tensor, shards=shards, factors=(*every[:dim], now, *every[dim + 1 :]))
    return tensor


class Geometry:
    """The algebra of tensors in files: it computes views and reads nothing."""

    shape = staticmethod(lambda x: x.shape)
    transpose = staticmethod(transpose)
    reshape = staticmethod(reshape)
    cut = staticmethod(cut)
    join = staticmethod(join)
    repeat = staticmethod(repeat)
    cast = staticmethod(cast)
    affine = staticmethod(affine)
    decoded = staticmethod(decoded)
    bits_as = staticmethod(bits_as)
    scaled = staticmethod(scaled)

    @staticmethod
    def pad(x: Tensor, dim: int, length: int) -> Tensor:
        """``x`` with zeros after it along ``dim``, up to ``length``."""
        rest = (*x.shape[:dim], length - x.shape[dim], *x.shape[dim + 1 :])
        return join([x, zeros(rest, x.dtype)], dim, x.name)
