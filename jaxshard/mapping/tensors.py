"""Geometry of mapped tensors: reshape, transpose, slice and concatenate as views.

A tensor's pieces are strided boxes of a finer shape (see ``catalog.Tensor.factors``). Every
function here gives another tensor whose pieces are boxes of the same files:

    gate (3, H)  g0 g1 g2     each seen as (3, 1, H), joined along dim 1: (3, 2, H), and
    up   (3, H)  u0 u1 u2     seen as (6, H): rows g0 u0 g1 u1 g2 u2 of two boxes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

from ..core.box import Box
from ..core.catalog import (
    ZEROS,
    Affine,
    RoundTo,
    Scale,
    Step,
    StoredShard,
    Tensor,
    View,
    places,
    with_places,
)
from ..core.dtypes import DType
from ..errors import LayoutError
from .algebra import (
    check_cast,
    check_cut,
    check_join,
    check_order,
    check_repeat,
    check_reshape,
    check_scales,
)

_Turn = Callable[[tuple[int, ...]], tuple[int, ...]]


def with_steps(piece: StoredShard, turn: _Turn) -> StoredShard:
    """``piece`` with every tuple of steps (strides in bytes, places) changed alike."""
    view = piece.view
    assert view is not None
    steps = tuple(
        with_places(s, tuple(Affine(a.start, turn(a.steps)) for a in places(s))) for s in view.steps
    )
    return replace(piece, view=View(turn(view.strides), view.dtype, steps))


def moved(piece: StoredShard, dim: int, by: int) -> StoredShard:
    """``piece`` with its first element ``by`` later along ``dim``; its box stays."""
    view = piece.view
    assert view is not None
    if not by:
        return piece
    steps = tuple(with_places(s, tuple(a.moved(dim, by) for a in places(s))) for s in view.steps)
    offset = piece.offset + by * view.strides[dim]
    return StoredShard(piece.file, offset, piece.box, View(view.strides, view.dtype, steps))


def permuted(piece: StoredShard, order: Sequence[int]) -> StoredShard:
    """``piece`` with its dims in another order."""

    def turn(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[i] for i in order)

    return with_steps(replace(piece, box=Box(turn(piece.box.start), turn(piece.box.stop))), turn)


def with_dim(piece: StoredShard, at: int) -> StoredShard:
    """``piece`` with one more dim, of length 1."""
    start, stop = piece.box.start, piece.box.stop
    box = Box((*start[:at], 0, *start[at:]), (*stop[:at], 1, *stop[at:]))
    return with_steps(replace(piece, box=box), lambda s: (*s[:at], 0, *s[at:]))


def without_dim(piece: StoredShard, at: int) -> StoredShard:
    """``piece`` less a dim of length 1."""
    start, stop = piece.box.start, piece.box.stop
    box = Box((*start[:at], *start[at + 1 :]), (*stop[:at], *stop[at + 1 :]))
    return with_steps(replace(piece, box=box), lambda s: (*s[:at], *s[at + 1 :]))


def shifted(piece: StoredShard, dim: int, by: int) -> StoredShard:
    """``piece`` with its box ``by`` later along ``dim``."""
    start, stop = list(piece.box.start), list(piece.box.stop)
    start[dim] += by
    stop[dim] += by
    return replace(piece, box=Box(tuple(start), tuple(stop)))


def part_of(piece: StoredShard, inside: Box) -> StoredShard | None:
    """What of ``piece`` lies in ``inside``, in coordinates local to it."""
    shared = piece.box.intersect(inside)
    if shared is None:
        return None
    for dim, (a, b) in enumerate(zip(piece.box.start, shared.start, strict=True)):
        piece = moved(piece, dim, b - a)
    return replace(piece, box=shared.within(inside))


def split(piece: StoredShard, dim: int, inner: int) -> list[StoredShard]:
    """``piece`` with a fine dim seen as (outer, ``inner``): one box, or up to three."""
    start, stop = piece.box.start[dim], piece.box.stop[dim]
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
            (*piece.box.start[:dim], row, a - row * inner, *piece.box.start[dim + 1 :]),
            (
                *piece.box.stop[:dim],
                row + rows,
                b - (row + rows - 1) * inner,
                *piece.box.stop[dim + 1 :],
            ),
        )
        part = replace(moved(piece, dim, a - start), box=box)
        found.append(with_steps(part, lambda s: (*s[:dim], s[dim] * inner, s[dim], *s[dim + 1 :])))
    return found


def merged(piece: StoredShard, dim: int, inner: int) -> StoredShard | None:
    """``piece`` with fine dims ``dim`` and ``dim + 1`` (of length ``inner``) as one."""
    start, stop, view = piece.box.start, piece.box.stop, piece.view
    assert view is not None
    if stop[dim] - start[dim] > 1:
        if (start[dim + 1], stop[dim + 1]) != (0, inner):
            return None
        all_steps = [view.strides, *(a.steps for s in view.steps for a in places(s))]
        if inner > 1 and any(s[dim] != inner * s[dim + 1] for s in all_steps):
            return None
    keep = dim if inner == 1 else dim + 1  # of a dim of length 1 the steps say nothing
    box = Box(
        (*start[:dim], start[dim] * inner + start[dim + 1], *start[dim + 2 :]),
        (*stop[:dim], (stop[dim] - 1) * inner + stop[dim + 1], *stop[dim + 2 :]),
    )
    return with_steps(replace(piece, box=box), lambda s: (*s[:dim], s[keep], *s[dim + 2 :]))


def rows_of(piece: StoredShard, dim: int) -> list[StoredShard]:
    """``piece`` as one piece for each index along a fine dim."""
    start, stop = piece.box.start, piece.box.stop
    return [
        replace(
            moved(piece, dim, i - start[dim]),
            box=Box((*start[:dim], i, *start[dim + 1 :]), (*stop[:dim], i + 1, *stop[dim + 1 :])),
        )
        for i in range(start[dim], stop[dim])
    ]


# --- Geometry of mapped tensors: reshape, transpose, cut, join, without reading anything

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
    if made is None:  # its pieces are boxes of other groups than these: cut them into runs
        flat = _refactored(tensor, (prod(shape),))
        assert flat is not None
        made = _refactored(_flat_dim(flat, 0), shape)
        assert made is not None
    return _simple(made)


def _refactored(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """``tensor`` seen as ``shape``, or None if a factor neither splits nor merges into it."""
    fine, pieces = [n for n in tensor.fine_shape if n != 1], tensor.shards
    for i, n in reversed(list(enumerate(tensor.fine_shape))):
        if n == 1:
            pieces = tuple(without_dim(p, i) for p in pieces)
    factors: list[tuple[int, ...]] = []
    at = 0
    for n in shape:
        begin, left = at, n
        while left > 1:
            if left % fine[at]:
                if fine[at] % left:
                    return None
                pieces = tuple(q for p in pieces for q in split(p, at, fine[at] // left))
                fine[at : at + 1] = [left, fine[at] // left]
            left //= fine[at]
            at += 1
        if begin == at:
            pieces = tuple(with_dim(p, at) for p in pieces)
            fine.insert(at, 1)
            at += 1
        factors.append(tuple(fine[begin:at]))
    return replace(tensor, shape=shape, shards=pieces, factors=tuple(factors))


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
    pieces = [q for p in tensor.shards if (q := part_of(p, inside))]
    factors = _factors(tensor)
    first = _offsets(factors)[dim]
    extents = inside.shape[first : first + len(factors[dim])]
    made = (*factors[:dim], extents, *factors[dim + 1 :])
    return _simple(replace(tensor, shape=shape, shards=tuple(pieces), factors=made))


def join(tensors: Sequence[Tensor], dim: int, name: str) -> Tensor:
    """The tensors one after the other along ``dim``.

    Raises:
        LayoutError: their other dims or their dtypes differ.
    """
    first = tensors[0]
    check_join(name, dim, [(t.name, t.shape, t.dtype) for t in tensors])
    aligned = _aligned([viewed(t) for t in tensors], dim)
    factors = _factors(aligned[0])
    at = _offsets(factors)[dim]
    pieces, done = [], 0
    for t in aligned:
        pieces += [shifted(p, at, done) for p in t.shards]
        done += _factors(t)[dim][0]
    made = (*factors[:dim], (done, *factors[dim][1:]), *factors[dim + 1 :])
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    joined = Tensor(name, first.dtype, tuple(shape), tuple(pieces), made)
    return _simple(joined)


def repeat(tensor: Tensor, dim: int, times: int) -> Tensor:
    """A tensor whose ``dim``, of length 1, is repeated ``times`` times."""
    check_repeat(tensor.name, tensor.shape, dim)
    tensor = viewed(tensor)
    at = _offsets(_factors(tensor))[dim]
    pieces = []
    for p in tensor.shards:
        box = Box(p.box.start, (*p.box.stop[:at], times, *p.box.stop[at + 1 :]))
        pieces.append(with_steps(replace(p, box=box), lambda s: (*s[:at], 0, *s[at + 1 :])))
    factors = _factors(tensor)
    made = (*factors[:dim], (times,), *factors[dim + 1 :])
    shape = (*tensor.shape[:dim], times, *tensor.shape[dim + 1 :])
    return replace(tensor, shape=shape, shards=tuple(pieces), factors=made)


def zeros(shape: tuple[int, ...], dtype: DType) -> Tensor:
    """A tensor that no file stores."""
    view = View((0,) * len(shape), dtype)
    piece = StoredShard(ZEROS, 0, Box.whole(shape), view)
    return Tensor("zeros", dtype, shape, (piece,), tuple((n,) for n in shape))


def cast(tensor: Tensor, dtype: DType) -> Tensor:
    """The same values, rounded to ``dtype``."""
    if dtype == tensor.dtype:
        return tensor
    check_cast(tensor.dtype, dtype)
    tensor = viewed(tensor)
    _refuse_packed(dtype, tensor.name)
    pieces = []
    for p in tensor.shards:
        view = p.view
        assert view is not None
        if view.dtype != tensor.dtype or view.steps:
            view = replace(view, steps=(*view.steps, RoundTo(tensor.dtype)))
        pieces.append(replace(p, view=view))
    return replace(tensor, dtype=dtype, shards=tuple(pieces))


def scaled(tensor: Tensor, scale: Tensor, block: tuple[int, int], dtype: DType) -> Tensor:
    """A matrix stored in blocks that each have a factor, as its true values in ``dtype``.

    Raises:
        LayoutError: the factors are not one for each block.
    """
    check_scales(tensor.name, tensor.shape, scale.name, scale.shape, block)
    made = with_step(tensor, lambda at: Scale(scale, block, at))
    return replace(made, dtype=dtype)


def with_step(tensor: Tensor, make: Callable[[tuple[Affine, Affine]], Step]) -> Tensor:
    """A matrix whose values go through the step that ``make`` gives for their places."""
    tensor = viewed(tensor)
    if [len(f) for f in _factors(tensor)] != [1, 1]:
        raise LayoutError(
            f"{tensor.name}: a scale or an adapter goes on a matrix, before it is fused or "
            f"reshaped; this has shape {tensor.shape}."
        )
    pieces = []
    for p in tensor.shards:
        at = (Affine(p.box.start[0], (1, 0)), Affine(p.box.start[1], (0, 1)))
        assert p.view is not None
        pieces.append(replace(p, view=replace(p.view, steps=(*p.view.steps, make(at)))))
    return replace(tensor, shards=tuple(pieces))


def viewed(tensor: Tensor) -> Tensor:
    """``tensor`` with a view on every piece and factors on every dim.

    Raises:
        LayoutError: its dtype packs several elements in a byte.
    """
    if tensor.factors is not None:
        return tensor
    _refuse_packed(tensor.dtype, tensor.name)
    pieces = tuple(_viewed_piece(p, tensor.dtype) for p in tensor.shards)
    return replace(tensor, shards=pieces, factors=tuple((n,) for n in tensor.shape))


def _viewed_piece(piece: StoredShard, dtype: DType) -> StoredShard:
    if piece.view is not None:
        return piece
    shape, size = piece.box.shape, dtype.unit_bytes
    strides = tuple(size * prod(shape[i + 1 :]) for i in range(len(shape)))
    return replace(piece, view=View(strides, dtype))


def _refuse_packed(dtype: DType, name: str) -> None:
    if dtype.unit_elements > 1:
        raise LayoutError(
            f"{name}: {dtype} packs {dtype.unit_elements} elements in {dtype.unit_bytes} byte(s); "
            "such a tensor can be renamed, and nothing else."
        )


def _factors(tensor: Tensor) -> Factors:
    assert tensor.factors is not None
    return tensor.factors


def _offsets(factors: Factors) -> list[int]:
    """The first fine dim of each dim."""
    found, at = [], 0
    for dim in factors:
        found.append(at)
        at += len(dim)
    return found


def _simple(tensor: Tensor) -> Tensor:
    """``tensor`` with as few factors as its pieces allow: targets may then be cut anywhere."""
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
    """``tensor`` with factors ``at`` and ``at + 1`` of ``dim`` as one, if all pieces allow it.

    With ``force`` the others are cut in single rows, which always do.
    """
    factors = _factors(tensor)
    fine, inner = _offsets(factors)[dim] + at, factors[dim][at + 1]
    pieces: list[StoredShard] = []
    for p in tensor.shards:
        one = merged(p, fine, inner)
        if one is not None:
            pieces.append(one)
        elif force:
            pieces += [m for row in rows_of(p, fine) if (m := merged(row, fine, inner))]
        else:
            return None
    now = (*factors[dim][:at], factors[dim][at] * inner, *factors[dim][at + 2 :])
    return replace(tensor, shards=tuple(pieces), factors=(*factors[:dim], now, *factors[dim + 1 :]))


def _flat_dim(tensor: Tensor, dim: int) -> Tensor:
    """``tensor`` with one factor for ``dim``, its pieces cut as small as that takes."""
    while len(_factors(tensor)[dim]) > 1:
        made = _merge(tensor, dim, 0, force=True)
        assert made is not None
        tensor = made
    return tensor


def _aligned(tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
    """The tensors with equal factors everywhere, but for the outermost of ``dim``."""
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
                    f"{', '.join(t.name for t in tensors[:3])} …: their dim {d} is made of "
                    f"factors that do not fit each other ({every})."
                )
        tensors = [_refined(t, d, chain) for t in tensors]
    return list(tensors)


def _bounds(factors: tuple[int, ...]) -> list[int]:
    """The lengths of the groups inside a dim: (2, 3, 4) has groups of 12 and of 4."""
    return [prod(factors[i:]) for i in range(1, len(factors))]


def _refined(tensor: Tensor, dim: int, bounds: Sequence[int]) -> Tensor:
    """``tensor`` with exactly the groups ``bounds`` (rising, each divides the next) in ``dim``."""
    while (own := _bounds(_factors(tensor)[dim])) != (wanted := sorted(bounds, reverse=True)):
        extra = next((i for i, b in enumerate(own) if b not in wanted), None)
        if extra is not None:
            made = _merge(tensor, dim, extra, force=True)
            assert made is not None
            tensor = made
            continue
        missing = next(b for b in wanted if b not in own)
        factors = _factors(tensor)[dim]
        at = sum(b > missing for b in own)  # the factor that the new group is inside of
        inner = missing // prod(factors[at + 1 :])
        fine = _offsets(_factors(tensor))[dim] + at
        pieces = tuple(q for p in tensor.shards for q in split(p, fine, inner))
        now = (*factors[:at], factors[at] // inner, inner, *factors[at + 1 :])
        every = _factors(tensor)
        tensor = replace(tensor, shards=pieces, factors=(*every[:dim], now, *every[dim + 1 :]))
    return tensor


class Geometry:
    """The algebra of tensors in files: nothing is read, only where it lies is told anew."""

    shape = staticmethod(lambda x: x.shape)
    transpose = staticmethod(transpose)
    reshape = staticmethod(reshape)
    cut = staticmethod(cut)
    join = staticmethod(join)
    repeat = staticmethod(repeat)
    cast = staticmethod(cast)
    scaled = staticmethod(scaled)

    @staticmethod
    def pad(x: Tensor, dim: int, length: int) -> Tensor:
        """``x`` with zeros after it along ``dim``, up to ``length``."""
        rest = (*x.shape[:dim], length - x.shape[dim], *x.shape[dim + 1 :])
        return join([x, zeros(rest, x.dtype)], dim, x.name)
