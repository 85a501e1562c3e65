"""Plans: what turning one checkpoint into another reads, copies and writes.

A plan is made from headers alone and knows its numbers before anything runs; the
run must match them. Tensors of one geometry share one cost, so that 90,000 tensors
on 2,048 ranks plan in seconds. Pure: no file, no device, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from .box import Box
from .catalog import Catalog, Piece, Tensor
from .cells import Cell, cells
from .dtypes import DType, in_units
from .errors import CoverageError, JaxshardError
from .layout import Placement
from .outputs import Outputs
from .ranges import blocks, byte_runs

BLOCK_BYTES = 1 << 20  # a block stays in the cache of one core between its read and its write


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
    """

    name: str
    unit_bytes: int
    sources: tuple[Box, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    targets: tuple[Target, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The independent parts of the journey."""
        return cells(self.sources, tuple(t.box for t in self.targets))


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
    """How ``source`` becomes ``outputs``."""

    source: Catalog
    outputs: Outputs
    only: frozenset[int] | None = None
    block_bytes: int = BLOCK_BYTES
    totals: Totals = field(default=Totals(), compare=False)

    def moves(self) -> Iterator[Move]:
        """The journey of each tensor, those that finish the first files first."""
        names = self.outputs.layout.placements
        known = [t for t in self.source.tensors.values() if t.name in names]
        for tensor in sorted(known, key=lambda t: names[t.name][0].first_rank):
            if move := make_move(tensor, self.outputs, self.only):
                yield move


def make_plan(
    source: Catalog,
    outputs: Outputs,
    *,
    only: frozenset[int] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Plan:
    """The plan that fills ``outputs`` (of the ranks ``only``, when given) from ``source``.

    Raises:
        CoverageError: the source lacks elements of a tensor; its name and numbers are said.
        LayoutError: a shard would cut through a byte of a packed dtype.
    """
    numbers = [0] * 6
    files = set(range(len(outputs.paths))) if only is None else only
    num_tensors = 0
    for name, placements in outputs.layout.placements.items():
        tensor = source.tensors.get(name)
        if tensor is None:
            continue
        num_tensors += 1
        for i, n in enumerate(_tensor_cost(tensor, placements, outputs, only, block_bytes)):
            numbers[i] += n
    totals = Totals(num_tensors, len(files), *numbers)
    return Plan(source, outputs, only, block_bytes, totals)


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
    sources, targets, unit = _unit_boxes(tensor.shape, tensor.dtype, tuple(stored), tuple(wanted))
    return Move(
        tensor.name,
        unit,
        sources,
        tuple(map(tuple, stored.values())),
        tuple(map(Target, targets, wanted.values())),
    )


@lru_cache(maxsize=4096)
def _unit_boxes(
    shape: tuple[int, ...], kind: DType, sources: tuple[Box, ...], targets: tuple[Box, ...]
) -> tuple[tuple[Box, ...], tuple[Box, ...], int]:
    _, boxes = in_units(shape, (*sources, *targets), kind)
    return boxes[: len(sources)], boxes[len(sources) :], kind.unit_bytes


def _tensor_cost(
    tensor: Tensor,
    placements: tuple[Placement, ...],
    outputs: Outputs,
    only: frozenset[int] | None,
    block_bytes: int,
) -> tuple[int, ...]:
    sources = tuple(dict.fromkeys(p.box for p in tensor.pieces))
    try:
        if only is None:
            kept = tuple((tensor.name, p.first_rank) in outputs.kept for p in placements)
            plain = tuple((p.axes, p.spec) for p in placements)
            return _whole_cost(tensor.shape, tensor.dtype, sources, plain, kept, block_bytes)
        move = make_move(tensor, outputs, only)
        if move is None:
            return (0,) * 6
        wanted = tuple((t.box, len(t.ranks)) for t in move.targets)
        return _cost(move.sources, wanted, move.unit_bytes, block_bytes)
    except JaxshardError as error:
        raise type(error)(f"{tensor.name}: {error}") from None


@lru_cache(maxsize=4096)
def _whole_cost(
    shape: tuple[int, ...],
    kind: DType,
    sources: tuple[Box, ...],
    placements: tuple[tuple[tuple[tuple[str, int], ...], tuple[tuple[str, ...], ...]], ...],
    kept: tuple[bool, ...],
    block_bytes: int,
) -> tuple[int, ...]:
    wanted: dict[Box, int] = {}
    for (axes, spec), single in zip(placements, kept, strict=True):
        for shard in Placement(axes, spec).shards(shape):
            wanted[shard.box] = wanted.get(shard.box, 0) + (1 if single else len(shard.holders))
    in_source, in_target, unit = _unit_boxes(shape, kind, sources, tuple(wanted))
    counted = tuple(zip(in_target, wanted.values(), strict=True))
    return _cost(in_source, counted, unit, block_bytes)


@lru_cache(maxsize=4096)
def _cost(
    sources: tuple[Box, ...], wanted: tuple[tuple[Box, int], ...], unit: int, block_bytes: int
) -> tuple[int, ...]:
    """(needed, read, reads, written, writes, copies): the engine's steps, counted."""
    needed = read = reads = written = writes = copies = 0
    for cell in cells(sources, tuple(box for box, _ in wanted)):
        for block in blocks(cell.box, unit, block_bytes):
            steps = block_steps(cell, block, sources)
            for index, part in steps.reads:
                stored = sources[index]
                runs = byte_runs(part.within(stored), stored.shape, unit)
                requests = runs.coalesced()
                needed += runs.num_bytes
                read += requests.num_bytes
                reads += len(requests)
            for index, part in steps.writes:
                written += part.size * unit * wanted[index][1]
                writes += wanted[index][1]
            copies += steps.num_copies
    return needed, read, reads, written, writes, copies


@dataclass(frozen=True, slots=True)
class Steps:
    """What happens to one block: parts read into it, parts written from it."""

    block: Box
    reads: tuple[tuple[int, Box], ...]
    writes: tuple[tuple[int, Box], ...]
    num_copies: int


def block_steps(cell: Cell, block: Box, sources: tuple[Box, ...]) -> Steps:
    """The reads and writes of ``block``, and the strided copies between.

    A part that is one run of the block is read straight into it, or written straight
    from it; any other passes through a copy.
    """
    reads = tuple((i, p) for i, box in cell.sources if (p := box.intersect(block)))
    writes = tuple((i, p) for i, box in cell.targets if (p := box.intersect(block)))
    inside = block.shape
    copies = sum(
        bool(byte_runs(part.within(block), inside, 1).outer) for _, part in (*reads, *writes)
    )
    return Steps(block, reads, writes, copies)


def check_covered(tensor: Tensor) -> None:
    """Refuse a tensor whose pieces do not hold all of it.

    Raises:
        CoverageError: with the elements held and missing.
    """
    sources = tuple(dict.fromkeys(p.box for p in tensor.pieces))
    try:
        cells(sources, (Box.whole(tensor.shape),))
    except CoverageError as error:
        raise CoverageError(f"{tensor.name}: {error}") from None
