"""Plans: what turning one checkpoint into another reads, copies and writes.

A plan is made from headers alone and knows its numbers before anything runs; the
run must match them. Tensors of one geometry share one cost, so that 90,000 tensors
on 2,048 ranks plan in seconds. Pure: no file, no device, no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

from .box import Box
from .catalog import Catalog, Piece, Tensor
from .cells import Cell, cells
from .coverage import gaps_error
from .dtypes import DType, in_units
from .errors import CoverageError, JaxshardError
from .layout import Placement
from .outputs import Outputs
from .ranges import Runs, blocks, blocks_along, byte_runs, strided_runs, tiles
from .views import ZEROS

BLOCK_BYTES = 1 << 20  # a block stays in the cache of one core between its read and its write
STEPPED_BLOCK_BYTES = 2 << 20  # where values are computed: half the steps of Python for them
TILE_BYTES = 8 << 20  # what is read transposed needs more, or it is read in tiny runs


@dataclass(frozen=True, slots=True)
class Target:
    """A box of a tensor, and the ranks whose files it goes into."""

    box: Box
    ranks: tuple[int, ...]


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


@dataclass(frozen=True, slots=True)
class Totals:
    """What a plan will do. The run's own counters must equal these numbers."""

    num_tensors: int = 0
    num_files: int = 0
    bytes_needed: int = 0  # distinct source bytes that some target holds
    bytes_read: int = 0  # those, and the gaps read along
    num_reads: int = 0
    bytes_written: int = 0  # tensor bytes, headers not counted
    num_writes: int = 0
    num_copies: int = 0  # strided copies in memory


@dataclass(frozen=True)
class Plan:
    """How ``source`` becomes ``outputs``; ``print`` shows it as ``jaxshard plan`` does.

    Attributes:
        only: the numbers of the outputs' files that are made; None for all.
        block_bytes, tile_bytes: what is carried at a time; tiles where it is transposed.
        host_bytes: the most memory for data that a run in such blocks takes, on all its
            threads; 0 where that is not decided.
        reads: requests to each file of the source, in their order.
    """

    source: Catalog
    outputs: Outputs
    only: frozenset[int] | None = None
    block_bytes: int = BLOCK_BYTES
    tile_bytes: int = TILE_BYTES
    host_bytes: int = 0
    totals: Totals = field(default=Totals(), compare=False)
    reads: tuple[int, ...] = field(default=(), compare=False, repr=False)

    def moves(self) -> Iterator[Move]:
        """The journey of each tensor, those that finish the first files first."""
        names = self.outputs.layout.placements
        known = [t for t in self.source.tensors.values() if t.name in names]
        for tensor in sorted(known, key=lambda t: names[t.name][0].first_rank):
            if move := make_move(tensor, self.outputs, self.only):
                yield move

    def of(self, only: frozenset[int] | None) -> Plan:
        """The same for the files ``only``."""
        made = make_plan(
            self.source,
            self.outputs,
            only=only,
            block_bytes=self.block_bytes,
            tile_bytes=self.tile_bytes,
        )
        return replace(made, host_bytes=self.host_bytes)

    def __str__(self) -> str:
        from .picture import plan_text  # noqa: PLC0415 - which draws plans, and so imports this

        return plan_text(self)


def make_plan(
    source: Catalog,
    outputs: Outputs,
    *,
    only: frozenset[int] | None = None,
    block_bytes: int = BLOCK_BYTES,
    tile_bytes: int = TILE_BYTES,
) -> Plan:
    """The plan that fills ``outputs`` (of the ranks ``only``, when given) from ``source``.

    Raises:
        CoverageError: the source lacks elements of some tensors; names, numbers, and which
            ranks' files would bring them, are said.
        LayoutError: a shard would cut through a byte of a packed dtype, or a group of rows
            that belong together.
    """
    numbers, reads = [0] * 6, Counter[int]()
    files = set(range(len(outputs.paths))) if only is None else only
    gaps: dict[str, CoverageError] = {}
    num_tensors = 0
    for name, placements in outputs.layout.placements.items():
        tensor = source.tensors.get(name)
        if tensor is None:
            continue
        num_tensors += 1
        try:
            cost = _tensor_cost(tensor, placements, outputs, only, (block_bytes, tile_bytes))
        except CoverageError as error:
            gaps[name] = error
            continue
        for i, n in enumerate(cost.numbers):
            numbers[i] += n
        for file, n in cost.reads:
            reads[file] += n
    if gaps:
        raise gaps_error(source, gaps)
    totals = Totals(num_tensors, len(files), *numbers)
    plan = Plan(source, outputs, only, block_bytes, tile_bytes, totals=totals)
    return replace(plan, reads=tuple(reads[file] for file in range(len(source.files))))


def block_bytes_for(source: Catalog) -> int:
    """The blocks that suit ``source``: larger ones where values are computed on their way."""
    first = (tensor.pieces[0].view for tensor in source.tensors.values() if tensor.pieces)
    return STEPPED_BLOCK_BYTES if any(view and view.steps for view in first) else BLOCK_BYTES


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
    sources, targets, unit = _unit_boxes(tensor.fine_shape, tensor.dtype, tuple(stored), fine)
    return Move(
        tensor.name,
        unit,
        sources,
        tuple(map(tuple, stored.values())),
        tuple(map(Target, targets, wanted.values())),
        tuple(_form(pieces[0]) for pieces in stored.values()),
        tensor.dtype,
    )


def _form(piece: Piece) -> Form | None:
    view = piece.view
    if view is None:
        return None
    item_bytes = 0 if piece.file == ZEROS else view.dtype.unit_bytes
    return Form(view.strides, item_bytes)


def firsts(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The first piece of each distinct box: the one that is read."""
    if len(pieces) == 1:
        return pieces
    found: dict[Box, Piece] = {}
    for piece in pieces:
        found.setdefault(piece.box, piece)
    return tuple(found.values())


@lru_cache(maxsize=4096)
def _unit_boxes(
    shape: tuple[int, ...], kind: DType, sources: tuple[Box, ...], targets: tuple[Box, ...]
) -> tuple[tuple[Box, ...], tuple[Box, ...], int]:
    _, boxes = in_units(shape, (*sources, *targets), kind)
    return boxes[: len(sources)], boxes[len(sources) :], kind.unit_bytes


_Limits = tuple[int, int]  # bytes of a block, and of a tile
_Numbers = tuple[int, ...]  # bytes needed, bytes read, reads, bytes written, writes, copies
_Geometry = tuple[_Numbers, tuple[int, ...]]  # those, and the reads of each source


@dataclass(frozen=True, slots=True)
class _TensorCost:
    """What one tensor's journey takes."""

    numbers: _Numbers
    reads: tuple[tuple[int, int], ...]  # (file, requests to it)


def _tensor_cost(
    tensor: Tensor,
    placements: tuple[Placement, ...],
    outputs: Outputs,
    only: frozenset[int] | None,
    limits: _Limits,
) -> _TensorCost:
    read = firsts(tensor.pieces)
    if tensor.factors is not None:
        for placement in placements:
            tensor.check_groups(placement)
    try:
        if only is None:
            kept = tuple((tensor.name, p.first_rank) in outputs.kept for p in placements)
            plain = tuple((p.axes, p.spec) for p in placements)
            shape = _Shape(tensor.shape, tensor.factors, tensor.dtype)
            sources = tuple(p.box for p in read)
            forms = tuple(map(_form, read))
            numbers, reads = _whole_cost(shape, sources, forms, plain, kept, limits)
        else:
            move = make_move(tensor, outputs, only)
            if move is None:
                return _TensorCost((0,) * 6, ())
            wanted = tuple((t.box, len(t.ranks)) for t in move.targets)
            numbers, reads = _cost(move.sources, move.forms, wanted, move.unit_bytes, limits)
        return _with_operands(_TensorCost(numbers, _by_file(read, reads)), read, limits)
    except JaxshardError as error:
        raise type(error)(f"{tensor.name}: {error}") from None


def _by_file(pieces: Iterable[Piece], reads: Iterable[int]) -> tuple[tuple[int, int], ...]:
    return tuple((p.file, n) for p, n in zip(pieces, reads, strict=True) if n)


def _with_operands(cost: _TensorCost, pieces: Iterable[Piece], limits: _Limits) -> _TensorCost:
    """``cost`` and the reads of the small tensors that steps need, once each."""
    views = dict.fromkeys(p.view for p in pieces if p.view and p.view.steps)
    for operand in dict.fromkeys(t for view in views for t in view.operands):
        move = move_into(operand, {Box.whole(operand.shape): (0,)})
        wanted = ((move.targets[0].box, 1),)
        numbers, reads = _cost(move.sources, move.forms, wanted, move.unit_bytes, limits)
        added = (a + b for a, b in zip(cost.numbers[:3], numbers[:3], strict=True))
        files = _by_file((p[0] for p in move.pieces), reads)
        cost = _TensorCost((*added, *cost.numbers[3:]), (*cost.reads, *files))
    return cost


@dataclass(frozen=True, slots=True)
class _Shape:
    """The geometry of a tensor, without its name."""

    shape: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...] | None
    dtype: DType

    def fine(self, boxes: Iterable[Box]) -> tuple[tuple[int, ...], tuple[Box, ...]]:
        tensor = Tensor("", self.dtype, self.shape, (), self.factors)
        return tensor.fine_shape, tuple(map(tensor.fine, boxes))


@lru_cache(maxsize=4096)
def _whole_cost(
    shape: _Shape,
    sources: tuple[Box, ...],
    forms: Forms,
    placements: tuple[tuple[tuple[tuple[str, int], ...], tuple[tuple[str, ...], ...]], ...],
    kept: tuple[bool, ...],
    limits: _Limits,
) -> _Geometry:
    wanted: dict[Box, int] = {}
    for (axes, spec), single in zip(placements, kept, strict=True):
        for shard in Placement(axes, spec).shards(shape.shape):
            wanted[shard.box] = wanted.get(shard.box, 0) + (1 if single else len(shard.holders))
    fine_shape, fine = shape.fine(wanted)
    in_source, in_target, unit = _unit_boxes(fine_shape, shape.dtype, sources, fine)
    counted = tuple(zip(in_target, wanted.values(), strict=True))
    return _cost(in_source, forms, counted, unit, limits)


@lru_cache(maxsize=4096)
def _cost(
    sources: tuple[Box, ...],
    forms: Forms,
    wanted: tuple[tuple[Box, int], ...],
    unit: int,
    limits: _Limits,
) -> _Geometry:
    """The engine's steps, counted."""
    needed = read = written = writes = copies = 0
    reads = [0] * len(sources)
    for cell in cells(sources, tuple(box for box, _ in wanted)):
        for block in cell_blocks(cell, forms, unit, *limits):
            steps = block_steps(cell, block, sources, forms)
            for index, part in steps.reads:
                runs = part_runs(part, sources[index], forms[index], unit)
                if runs is not None:
                    requests = runs.coalesced()
                    needed += runs.num_bytes
                    read += requests.num_bytes
                    reads[index] += len(requests)
            for index, part in steps.writes:
                target = wanted[index][0]
                written += part.size * unit * wanted[index][1]
                spans = byte_runs(part.within(target), target.shape, unit)
                writes += len(spans) * wanted[index][1]
            copies += steps.num_copies
    return (needed, read, sum(reads), written, writes, copies), tuple(reads)


@dataclass(frozen=True, slots=True)
class Steps:
    """What happens to one block: parts read into it, parts written from it."""

    block: Box
    reads: tuple[tuple[int, Box], ...]
    writes: tuple[tuple[int, Box], ...]
    num_copies: int


def part_runs(part: Box, stored: Box, form: Form | None, unit: int) -> Runs | None:
    """Where ``part`` lies, from the first byte of the box ``stored``; None if nothing does."""
    if form is None:
        return byte_runs(part.within(stored), stored.shape, unit)
    return form.runs(part, stored)[0] if form.item_bytes else None


def cell_blocks(
    cell: Cell,
    forms: Forms,
    unit: int,
    block_bytes: int,
    tile_bytes: int = TILE_BYTES,
    *,
    in_memory: bool = False,
) -> Iterator[Box]:
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


def permuted_form(cell: Cell, forms: Forms) -> Form | None:
    """The form of a source of ``cell`` that lies in another order of dims, if there is one."""
    for i, part in cell.sources:
        form = forms[i]
        if form and form.is_permuted(part):
            return form
    return None


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
