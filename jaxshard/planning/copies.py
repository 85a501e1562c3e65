"""Copies of one tensor from stored to wanted boxes, in blocks.

A `TensorCopy` is split into *cells*, which are independent, and a cell into *blocks* of about a
megabyte, which are read, copied and written one at a time. ``plan`` counts their cost.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..core.box import Box
from ..core.catalog import ZEROS, Scale, StoredShard, Tensor, View
from ..core.dtypes import DType, in_units
from ..core.ranges import Grid, Runs, blocks, blocks_along, byte_runs, strided_runs, tiles
from ..core.runtime import cached
from ..errors import CoverageError
from .outputs import Outputs

# --- Cells: connected components of overlapping source and target boxes
#
# Boxes that overlap are handled together, so that every byte is read once and written once.
# Boxes of different cells are independent.
#
#   stored   |-----0-----|-----1-----|      two files, columns 0:6 and 6:12
#   wanted   |-a-|-b-|-c-|-d-|-e-|-f-|      six ranks, 2 columns each
#   cells    |    0abc   |    1def   |      two cells: read 0 once, write a, b and c

Part = tuple[int, Box]  # a shard's index, and the part of it (in tensor coordinates)


@dataclass(frozen=True, slots=True)
class Cell:
    """Source parts that together fill target parts; all in tensor coordinates.

    The source parts are disjoint and cover ``box``, which contains every target part.
    """

    box: Box
    sources: tuple[Part, ...]
    targets: tuple[Part, ...]


@cached(4096)
def cells(sources: tuple[Box, ...], targets: tuple[Box, ...]) -> tuple[Cell, ...]:
    """Return the cells that fill every target box from the source boxes.

    Raises:
        CoverageError: the sources lack elements of a target box.

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
    """Whether ``box`` is a band of rows of one source, so that it can be its own cell."""
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
    """Group source and target boxes that no plane of the tensor separates.

    Along each dim, overlapping intervals of the boxes are merged. A box is in exactly one merged
    interval per dim, and these identify its group.
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
    """Whether these distinct boxes are pairwise disjoint."""
    if _is_grid(boxes):
        return True
    return not any(a.intersect(b) for i, a in enumerate(boxes) for b in boxes[:i])


def _is_grid(boxes: Sequence[Box]) -> bool:
    """Whether along every dim the intervals are equal or disjoint, as of even shards."""
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


# --- Forms: memory layout of stored boxes


@dataclass(frozen=True, slots=True)
class Form:
    """Memory layout of a source box in its file, if not contiguous and row-major.

    Attributes:
        strides: bytes between neighbours, per dim.
        item_bytes: bytes of a stored element; 0 for zeros, which are not stored.
        factors: the steps that read a part of their operand with each part of the box, without
            names, files and offsets.
    """

    strides: tuple[int, ...]
    item_bytes: int
    factors: tuple[Scale, ...] = ()

    def runs(self, part: Box, stored: Box, base: int = 0) -> tuple[Runs, tuple[int, ...]]:
        """Return the runs of ``part`` in the box ``stored``, which begins at ``base``."""
        start = part.within(stored).start
        at = base + sum(i * s for i, s in zip(start, self.strides, strict=True))
        return strided_runs(part.shape, self.strides, self.item_bytes, at)

    def is_permuted(self, box: Box) -> bool:
        """Whether the dims of ``box`` have another order in the file."""
        some = [s for s, n in zip(self.strides, box.shape, strict=True) if s and n != 1]
        return any(a < b for a, b in pairwise(some))


Forms = tuple[Form | None, ...]


def form_of(piece: StoredShard) -> Form | None:
    """Return the form of ``piece`` in its file; None if contiguous and row-major."""
    view = piece.view
    if view is None:
        return None
    item_bytes = 0 if piece.file == ZEROS else view.dtype.unit_bytes
    return Form(view.strides, item_bytes, tuple(map(_geometry, view.factors)))


def _geometry(step: Scale) -> Scale:
    """Return ``step`` with nothing but the geometry of its factors, so that layers are equal."""
    shards = tuple(replace(p, file=0, offset=0) for p in firsts(step.scale.shards))
    return replace(step, scale=replace(step.scale, name="", shards=shards), outer=None)


def part_runs(part: Box, stored: Box, form: Form | None, unit: int) -> Runs | None:
    """Return the runs of ``part`` from the first byte of ``stored``; None if it is zeros."""
    if form is None:
        return byte_runs(part.within(stored), stored.shape, unit)
    return form.runs(part, stored)[0] if form.item_bytes else None


def permuted_form(cell: Cell, forms: Forms) -> Form | None:
    """Return the form of the first source of ``cell`` with permuted dims, if any."""
    for i, part in cell.sources:
        form = forms[i]
        if form and form.is_permuted(part):
            return form
    return None


# --- Copies of one tensor, from stored to wanted boxes


@dataclass(frozen=True, slots=True)
class Target:
    """Box of a tensor, and the ranks whose files store it."""

    box: Box
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """Copy of one tensor. Boxes are counted in units of ``unit_bytes``.

    Attributes:
        sources: the distinct stored boxes.
        pieces: for each source, all shards that store it.
        targets: the distinct wanted boxes, with their ranks.
        forms: for each source, its form; None if contiguous and row-major.
        dtype: the target dtype, if a source has a form.
    """

    name: str
    unit_bytes: int
    sources: tuple[Box, ...]
    pieces: tuple[tuple[StoredShard, ...], ...]
    targets: tuple[Target, ...]
    forms: Forms
    dtype: DType

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The independent parts of the copy."""
        return cells(self.sources, tuple(t.box for t in self.targets))

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """Other tensors that the transforms of the sources need."""
        return tuple(dict.fromkeys(t for view in self._views for t in view.operands))

    @property
    def whole_operands(self) -> tuple[Tensor, ...]:
        """The small tensors among ``operands``, which are read whole, once."""
        return tuple(dict.fromkeys(t for view in self._views for t in view.whole_operands))

    @property
    def _views(self) -> tuple[View, ...]:
        return tuple(view for pieces in self.pieces if (view := pieces[0].view))


def make_move(tensor: Tensor, outputs: Outputs, only: frozenset[int] | None) -> TensorCopy | None:
    """Return the copy of ``tensor`` into the files of ``only``, or None if they lack it."""
    wanted: dict[Box, tuple[int, ...]] = {}
    for placement in outputs.layout.placements[tensor.name]:
        for shard in placement.shards(tensor.shape):
            ranks = outputs.holders(tensor.name, placement, shard)
            if only is not None:
                ranks = tuple(r for r in ranks if r in only)
            if ranks:
                wanted[shard.box] = (*wanted.get(shard.box, ()), *ranks)
    return move_into(tensor, wanted) if wanted else None


def move_into(tensor: Tensor, wanted: Mapping[Box, tuple[int, ...]]) -> TensorCopy:
    """Return the copy of ``tensor`` into the boxes ``wanted``, each with its ranks."""
    stored: dict[Box, list[StoredShard]] = {}
    for piece in tensor.shards:
        stored.setdefault(piece.box, []).append(piece)
    fine = tuple(map(tensor.fine, wanted))
    sources, targets, unit = unit_boxes(tensor.fine_shape, tensor.dtype, tuple(stored), fine)
    return TensorCopy(
        tensor.name,
        unit,
        sources,
        tuple(map(tuple, stored.values())),
        tuple(map(Target, targets, wanted.values())),
        tuple(form_of(pieces[0]) for pieces in stored.values()),
        tensor.dtype,
    )


def firsts(pieces: tuple[StoredShard, ...]) -> tuple[StoredShard, ...]:
    """Return the first shard of each distinct box: the one that is read."""
    if len(pieces) == 1:
        return pieces
    found: dict[Box, StoredShard] = {}
    for piece in pieces:
        found.setdefault(piece.box, piece)
    return tuple(found.values())


@cached(4096)
def unit_boxes(
    shape: tuple[int, ...], kind: DType, sources: tuple[Box, ...], targets: tuple[Box, ...]
) -> tuple[tuple[Box, ...], tuple[Box, ...], int]:
    """Return ``sources`` and ``targets`` in units of whole bytes, and the bytes of a unit.

    A unit is one element, or several of a packed dtype.
    """
    _, boxes = in_units(shape, (*sources, *targets), kind)
    return boxes[: len(sources)], boxes[len(sources) :], kind.unit_bytes


def check_covered(tensor: Tensor) -> None:
    """Raise if the stored shards do not cover ``tensor``.

    Raises:
        CoverageError: with the numbers of stored and missing elements.
    """
    sources = tuple(dict.fromkeys(p.box for p in tensor.shards))
    try:
        cells(sources, (Box.whole(tensor.fine_shape),))
    except CoverageError as error:
        raise CoverageError(f"{tensor.name}: {error}") from None


# --- Blocks: cache-sized parts of a cell, with their reads and writes

BLOCK_BYTES = 1 << 20  # fits the cache of one core between its read and its write
STEPPED_BLOCK_BYTES = 2 << 20  # if values are transformed: halves the Python calls
TILE_BYTES = 8 << 20  # transposed reads need more, or their runs become tiny


@dataclass(frozen=True, slots=True)
class Steps:
    """Reads into one block and writes from it."""

    block: Box
    reads: tuple[tuple[int, Box], ...]
    writes: tuple[tuple[int, Box], ...]
    num_copies: int


def cell_blocks(
    cell: Cell,
    forms: Forms,
    unit: int,
    block_bytes: int,
    tile_bytes: int = TILE_BYTES,
    *,
    in_memory: bool = False,
) -> Grid:
    """Return the blocks of ``cell``: tiles if a source is transposed.

    If targets are ``in_memory``, where scattered writes are cheap, a transposed source is read
    in the order of its file.
    """
    found = [form for i, _ in cell.sources if (form := forms[i])]
    if not found:
        return blocks(cell.box, unit, block_bytes)
    widest = max(unit, *(form.item_bytes for form in found))
    permuted = permuted_form(cell, forms)
    if permuted is None:
        return blocks(cell.box, widest, block_bytes)
    strides = permuted.strides
    if not in_memory:
        return tiles(cell.box, strides, widest, tile_bytes)
    # longer rows of the target gain more than a block that fits the cache
    return blocks_along(cell.box, _stored_order(strides), widest, max(block_bytes, tile_bytes // 2))


def _stored_order(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the dims in the order of the file, slowest first.

    A dim along which sources alternate (stride 0, for example rows of two matrices in turns)
    stays inside the dim before it, so that neighbours in the target are written together.
    """
    keys, last = [], 1 << 62
    for dim, stride in enumerate(strides):
        last = stride or last
        keys.append((-last, dim))
    return tuple(dim for _, dim in sorted(keys))


def block_steps(
    cell: Cell, block: Box, sources: tuple[Box, ...], forms: Forms | None = None
) -> Steps:
    """Return the reads and writes of ``block``, and the number of strided copies.

    A part that is one run of the block is read or written in place. Any other part, and a
    source with a form, passes through a copy.
    """
    reads = tuple((i, p) for i, box in cell.sources if (p := box.intersect(block)))
    writes = tuple((i, p) for i, box in cell.targets if (p := box.intersect(block)))
    inside = block.shape
    copies = sum(bool(byte_runs(part.within(block), inside, 1).outer) for _, part in writes)
    for i, part in reads:
        formed = forms is not None and forms[i] is not None
        copies += formed or bool(byte_runs(part.within(block), inside, 1).outer)
    return Steps(block, reads, writes, copies)
