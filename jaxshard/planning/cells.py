"""Cells: connected components of overlapping source and target boxes.

Source and target boxes that touch must be handled together, so that every byte is
read once and written once. Those that do not are separate work.

    stored   |-----0-----|-----1-----|      two files, columns 0:6 and 6:12
    wanted   |-a-|-b-|-c-|-d-|-e-|-f-|      six ranks, 2 columns each
    cells    |    0abc   |    1def   |      two cells: read 0 once, write a, b and c

Pure geometry on boxes: no files, names or dtypes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.box import Box
from ..core.cache import cached
from ..errors import CoverageError

Part = tuple[int, Box]  # a shard's index, and the part of it (in tensor coordinates)


@dataclass(frozen=True, slots=True)
class Cell:
    """Source parts that are read together to fill target parts; all in tensor coordinates.

    The source parts are disjoint and cover ``box``; every target part lies in ``box``.
    """

    box: Box
    sources: tuple[Part, ...]
    targets: tuple[Part, ...]


@cached(4096)
def cells(sources: tuple[Box, ...], targets: tuple[Box, ...]) -> tuple[Cell, ...]:
    """The cells that fill every distinct target box from the source boxes.

    Raises:
        CoverageError: the sources do not hold every element of some target box.

    >>> [c.targets[0][0] for c in cells((Box((0,), (4,)),), (Box((0,), (2,)), Box((2,), (4,))))]
    [0, 1]
    """
    stored = _disjoint(sources)
    wanted = [(i, box) for i, box in enumerate(targets) if box.size]
    found: list[Cell] = []
    for have, want in _touching(stored, wanted):
        need = sum(box.size for _, box in want)
        if len(want) > 1 and not are_disjoint([b for _, b in want]):
            found.append(_cell(_bounds(b for _, b in want), have, want))
        elif all(_one_source(b, have) for _, b in want) or (
            need < sum(box.size for _, box in have) and need < _bounds(b for _, b in want).size
        ):
            found += [_cell(box, have, [(i, box)]) for i, box in want]
        else:
            found.append(_cell(_bounds(b for _, b in want), have, want))
    return tuple(found)


def _one_source(box: Box, have: Sequence[Part]) -> bool:
    """Whether ``box`` is a band of rows of one source: it then needs no other target's company."""
    for _, source in have:
        if source.contains(box):
            inner = (source.start[1:], source.stop[1:])
            return (box.start[1:], box.stop[1:]) == inner
    return False


def _cell(box: Box, have: Sequence[Part], want: Sequence[Part]) -> Cell:
    parts = tuple((i, part) for i, source in have if (part := source.intersect(box)))
    for _, target in want:
        held = sum(shared.size for _, p in parts if (shared := p.intersect(target)))
        if held != target.size:
            raise CoverageError(
                f"box {target} has {target.size} elements, of which the source holds {held} "
                f"in {len(have)} shards."
            )
    return Cell(box, parts, tuple(want))


def _touching(stored: list[Part], wanted: list[Part]) -> list[tuple[list[Part], list[Part]]]:
    """Source and target boxes in groups that no plane of the tensor separates.

    Along each dim, the intervals of all boxes merge where they overlap; a box lies in
    exactly one merged interval per dim, and those name its group.
    """
    if not wanted:
        return []
    ndim = len(wanted[0][1].start)
    starts = [_merged_starts(stored, wanted, dim) for dim in range(ndim)]
    groups: dict[tuple[int, ...], tuple[list[Part], list[Part]]] = {}
    for side, parts in enumerate((stored, wanted)):
        for part in parts:
            key = tuple(bisect_right(starts[d], part[1].start[d]) for d in range(ndim))
            groups.setdefault(key, ([], []))[side].append(part)
    return [(have, want) for have, want in groups.values() if want]


def _merged_starts(stored: list[Part], wanted: list[Part], dim: int) -> list[int]:
    intervals = sorted({(b.start[dim], b.stop[dim]) for _, b in [*stored, *wanted]})
    starts, end = [], -1
    for a, b in intervals:
        if a >= end:
            starts.append(a)
        end = max(end, b)
    return starts


def _bounds(boxes: Iterable[Box]) -> Box:
    all_boxes = list(boxes)
    return Box(
        tuple(map(min, zip(*(b.start for b in all_boxes), strict=True))),
        tuple(map(max, zip(*(b.stop for b in all_boxes), strict=True))),
    )


def are_disjoint(boxes: Sequence[Box]) -> bool:
    """Whether no two of these distinct boxes share an element."""
    if _is_grid(boxes):
        return True
    return not any(a.intersect(b) for i, a in enumerate(boxes) for b in boxes[:i])


def _is_grid(boxes: Sequence[Box]) -> bool:
    """Whether along every dim the boxes' intervals are equal or apart, as even shards are."""
    for dim in range(len(boxes[0].start)):
        end = -1
        for a, b in sorted({(box.start[dim], box.stop[dim]) for box in boxes}):
            if a < end:
                return False
            end = b
    return len(set(boxes)) == len(boxes)


def _disjoint(boxes: tuple[Box, ...]) -> list[Part]:
    """Each box less what earlier ones hold, so that no element is read twice."""
    parts = [(i, box) for i, box in enumerate(boxes) if box.size]
    if not parts or _is_grid([box for _, box in parts]):
        return parts
    kept: list[Part] = []
    for i, box in parts:
        left = [box]
        for _, earlier in kept:
            left = [piece for part in left for piece in part.minus(earlier)]
        kept += [(i, part) for part in left]
    return kept
