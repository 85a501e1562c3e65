"""Pieces of mapped tensors: a strided box seen in more dims, fewer, or another order.

Every function gives pieces of the same file: only where they begin, how far apart their
elements are, and the places their steps know them by are told anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..box import Box
from ..catalog import Piece
from ..views import Affine, View, places, with_places

_Turn = Callable[[tuple[int, ...]], tuple[int, ...]]


def with_steps(piece: Piece, turn: _Turn) -> Piece:
    """``piece`` with every tuple of steps (strides in bytes, places) changed alike."""
    view = piece.view
    assert view is not None
    steps = tuple(
        with_places(s, tuple(Affine(a.start, turn(a.steps)) for a in places(s))) for s in view.steps
    )
    return replace(piece, view=View(turn(view.strides), view.dtype, steps))


def moved(piece: Piece, dim: int, by: int) -> Piece:
    """``piece`` with its first element ``by`` later along ``dim``; its box stays."""
    view = piece.view
    assert view is not None
    if not by:
        return piece
    steps = tuple(with_places(s, tuple(a.moved(dim, by) for a in places(s))) for s in view.steps)
    offset = piece.offset + by * view.strides[dim]
    return Piece(piece.file, offset, piece.box, View(view.strides, view.dtype, steps))


def permuted(piece: Piece, order: Sequence[int]) -> Piece:
    """``piece`` with its dims in another order."""

    def turn(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[i] for i in order)

    return with_steps(replace(piece, box=Box(turn(piece.box.start), turn(piece.box.stop))), turn)


def with_dim(piece: Piece, at: int) -> Piece:
    """``piece`` with one more dim, of length 1."""
    start, stop = piece.box.start, piece.box.stop
    box = Box((*start[:at], 0, *start[at:]), (*stop[:at], 1, *stop[at:]))
    return with_steps(replace(piece, box=box), lambda s: (*s[:at], 0, *s[at:]))


def without_dim(piece: Piece, at: int) -> Piece:
    """``piece`` less a dim of length 1."""
    start, stop = piece.box.start, piece.box.stop
    box = Box((*start[:at], *start[at + 1 :]), (*stop[:at], *stop[at + 1 :]))
    return with_steps(replace(piece, box=box), lambda s: (*s[:at], *s[at + 1 :]))


def shifted(piece: Piece, dim: int, by: int) -> Piece:
    """``piece`` with its box ``by`` later along ``dim``."""
    start, stop = list(piece.box.start), list(piece.box.stop)
    start[dim] += by
    stop[dim] += by
    return replace(piece, box=Box(tuple(start), tuple(stop)))


def part_of(piece: Piece, inside: Box) -> Piece | None:
    """What of ``piece`` lies in ``inside``, in coordinates local to it."""
    shared = piece.box.intersect(inside)
    if shared is None:
        return None
    for dim, (a, b) in enumerate(zip(piece.box.start, shared.start, strict=True)):
        piece = moved(piece, dim, b - a)
    return replace(piece, box=shared.within(inside))


def split(piece: Piece, dim: int, inner: int) -> list[Piece]:
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


def merged(piece: Piece, dim: int, inner: int) -> Piece | None:
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


def rows_of(piece: Piece, dim: int) -> list[Piece]:
    """``piece`` as one piece for each index along a fine dim."""
    start, stop = piece.box.start, piece.box.stop
    return [
        replace(
            moved(piece, dim, i - start[dim]),
            box=Box((*start[:dim], i, *start[dim + 1 :]), (*stop[:dim], i + 1, *stop[dim + 1 :])),
        )
        for i in range(start[dim], stop[dim])
    ]
