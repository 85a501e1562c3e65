"""Copies of one tensor between stored and wanted boxes, in blocks.

It says from where and to where. In which blocks it is carried, ``blocks`` decides; what it
costs, ``costs`` counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from ..core.box import Box
from ..core.cache import cached
from ..core.catalog import ZEROS, StoredShard, Tensor
from ..core.dtypes import DType, in_units
from ..core.ranges import Grid, Runs, blocks, blocks_along, byte_runs, strided_runs, tiles
from ..errors import CoverageError
from .cells import Cell, cells
from .outputs import Outputs


@dataclass(frozen=True, slots=True)
class Form:
    """How a source box lies in its file, where that is not contiguous and row-major.

    Attributes:
        strides: bytes between neighbours, per dim.
        item_bytes: bytes of a stored element; 0 if nothing is stored (zeros).
    """

    strides: tuple[int, ...]
    item_bytes: int

    def runs(self, part: Box, stored: Box, base: int = 0) -> tuple[Runs, tuple[int, ...]]:
        """Where ``part`` lies of the box ``stored`` that begins at ``base``; see ranges."""
        start = part.within(stored).start
        at = base + sum(i * s for i, s in zip(start, self.strides, strict=True))
        return strided_runs(part.shape, self.strides, self.item_bytes, at)

    def is_permuted(self, box: Box) -> bool:
        """Whether its dims have another order in the file, as far as ``box`` has them."""
        some = [s for s, n in zip(self.strides, box.shape, strict=True) if s and n != 1]
        return any(a < b for a, b in pairwise(some))


Forms = tuple[Form | None, ...]


def form_of(piece: StoredShard) -> Form | None:
    """How ``piece`` lies in its file; None for contiguous and row-major."""
    view = piece.view
    if view is None:
        return None
    item_bytes = 0 if piece.file == ZEROS else view.dtype.unit_bytes
    return Form(view.strides, item_bytes)


def part_runs(part: Box, stored: Box, form: Form | None, unit: int) -> Runs | None:
    """Where ``part`` lies, from the first byte of the box ``stored``; None if nothing does."""
    if form is None:
        return byte_runs(part.within(stored), stored.shape, unit)
    return form.runs(part, stored)[0] if form.item_bytes else None


def permuted_form(cell: Cell, forms: Forms) -> Form | None:
    """The form of a source of ``cell`` that lies in another order of dims, if there is one."""
    for i, part in cell.sources:
        form = forms[i]
        if form and form.is_permuted(part):
            return form
    return None


# --- Moves: the journey of one tensor, from the boxes that are stored to those that are wanted


@dataclass(frozen=True, slots=True)
class Target:
    """A box of a tensor, and the ranks whose files it goes into."""

    box: Box
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorCopy:
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
    pieces: tuple[tuple[StoredShard, ...], ...]
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


def make_move(tensor: Tensor, outputs: Outputs, only: frozenset[int] | None) -> TensorCopy | None:
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


def move_into(tensor: Tensor, wanted: Mapping[Box, tuple[int, ...]]) -> TensorCopy:
    """The journey of ``tensor`` into the boxes ``wanted``, each with whoever wants it."""
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
    """The first piece of each distinct box: the one that is read."""
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
    sources = tuple(dict.fromkeys(p.box for p in tensor.shards))
    try:
        cells(sources, (Box.whole(tensor.fine_shape),))
    except CoverageError as error:
        raise CoverageError(f"{tensor.name}: {error}") from None


# --- Blocks: what of a journey is carried at a time, and what happens to it between

BLOCK_BYTES = 1 << 20  # a block stays in the cache of one core between its read and its write
STEPPED_BLOCK_BYTES = 2 << 20  # where values are computed: half the steps of Python for them
TILE_BYTES = 8 << 20  # what is read transposed needs more, or it is read in tiny runs


@dataclass(frozen=True, slots=True)
class Steps:
    """What happens to one block: parts read into it, parts written from it."""

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
    """The blocks that ``cell`` is carried in: tiles where a source lies transposed.

    Where targets are ``in_memory``, which is written anywhere at no cost, a transposed source
    is read in the order of its file.
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
    # longer rows of the target at a time are worth more than a block that stays in a cache
    return blocks_along(cell.box, _stored_order(strides), widest, max(block_bytes, tile_bytes // 2))


def _stored_order(strides: tuple[int, ...]) -> tuple[int, ...]:
    """The dims as they lie in the file, slowest first.

    A dim along which sources follow each other (stride 0: rows of two matrices in turns, say)
    stays inside the dim before it, so that what lies together in the target is done together.
    """
    keys, last = [], 1 << 62
    for dim, stride in enumerate(strides):
        last = stride or last
        keys.append((-last, dim))
    return tuple(dim for _, dim in sorted(keys))


def block_steps(
    cell: Cell, block: Box, sources: tuple[Box, ...], forms: Forms | None = None
) -> Steps:
    """The reads and writes of ``block``, and the strided copies between.

    A part that is one run of the block is read straight into it, or written straight
    from it; any other passes through a copy, and so does what has a form.
    """
    reads = tuple((i, p) for i, box in cell.sources if (p := box.intersect(block)))
    writes = tuple((i, p) for i, box in cell.targets if (p := box.intersect(block)))
    inside = block.shape
    copies = sum(bool(byte_runs(part.within(block), inside, 1).outer) for _, part in writes)
    for i, part in reads:
        formed = forms is not None and forms[i] is not None
        copies += formed or bool(byte_runs(part.within(block), inside, 1).outer)
    return Steps(block, reads, writes, copies)
