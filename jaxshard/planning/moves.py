"""Moves: the journey of one tensor, from the boxes that are stored to those that are wanted.

It says from where and to where. In which blocks it is carried, ``blocks`` decides; what it
costs, ``costs`` counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ..box import Box
from ..catalog import Piece, Tensor
from ..cells import Cell, cells
from ..dtypes import DType, in_units
from ..errors import CoverageError
from .forms import Forms, form_of
from .outputs import Outputs


@dataclass(frozen=True, slots=True)
class Target:
    """A box of a tensor, and the ranks whose files it goes into."""

    box: Box
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """The journey of one tensor. Boxes are counted in units of ``unit_bytes``.

    Attributes:
        sources: the distinct stored boxes.
        pieces: for each of them, every place that stores it.
        targets: the distinct boxes wanted, and by whom.
        forms: for each source, how it lies; None for contiguous and row-major.
        dtype: what an element becomes, where a source has a form.
    """

    name: str
    unit_bytes: int
    sources: tuple[Box, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    targets: tuple[Target, ...]
    forms: Forms
    dtype: DType

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The independent parts of the journey."""
        return cells(self.sources, tuple(t.box for t in self.targets))

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The small tensors that steps of the sources need whole."""
        views = (pieces[0].view for pieces in self.pieces)
        return tuple(dict.fromkeys(t for view in views if view for t in view.operands))


def make_move(tensor: Tensor, outputs: Outputs, only: frozenset[int] | None) -> Move | None:
    """The journey of ``tensor`` into the files of ``only``, or None if they hold none of it."""
    wanted: dict[Box, tuple[int, ...]] = {}
    for placement in outputs.layout.placements[tensor.name]:
        for shard in placement.shards(tensor.shape):
            ranks = outputs.holders(tensor.name, placement, shard)
            if only is not None:
                ranks = tuple(r for r in ranks if r in only)
            if ranks:
                wanted[shard.box] = (*wanted.get(shard.box, ()), *ranks)
    return move_into(tensor, wanted) if wanted else None


def move_into(tensor: Tensor, wanted: Mapping[Box, tuple[int, ...]]) -> Move:
    """The journey of ``tensor`` into the boxes ``wanted``, each with whoever wants it."""
    stored: dict[Box, list[Piece]] = {}
    for piece in tensor.pieces:
        stored.setdefault(piece.box, []).append(piece)
    fine = tuple(map(tensor.fine, wanted))
    sources, targets, unit = unit_boxes(tensor.fine_shape, tensor.dtype, tuple(stored), fine)
    return Move(
        tensor.name,
        unit,
        sources,
        tuple(map(tuple, stored.values())),
        tuple(map(Target, targets, wanted.values())),
        tuple(form_of(pieces[0]) for pieces in stored.values()),
        tensor.dtype,
    )


def firsts(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The first piece of each distinct box: the one that is read."""
    if len(pieces) == 1:
        return pieces
    found: dict[Box, Piece] = {}
    for piece in pieces:
        found.setdefault(piece.box, piece)
    return tuple(found.values())


@lru_cache(maxsize=4096)
def unit_boxes(
    shape: tuple[int, ...], kind: DType, sources: tuple[Box, ...], targets: tuple[Box, ...]
) -> tuple[tuple[Box, ...], tuple[Box, ...], int]:
    """``sources`` and ``targets`` in units of whole bytes, and the bytes of a unit.

    An element is a unit, but of a packed dtype, of which several make one.
    """
    _, boxes = in_units(shape, (*sources, *targets), kind)
    return boxes[: len(sources)], boxes[len(sources) :], kind.unit_bytes


def check_covered(tensor: Tensor) -> None:
    """Refuse a tensor whose pieces do not hold all of it.

    Raises:
        CoverageError: with the elements held and missing.
    """
    sources = tuple(dict.fromkeys(p.box for p in tensor.pieces))
    try:
        cells(sources, (Box.whole(tensor.fine_shape),))
    except CoverageError as error:
        raise CoverageError(f"{tensor.name}: {error}") from None
