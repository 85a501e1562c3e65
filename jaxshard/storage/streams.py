"""Streams: from file to file, each block scattered and gathered by the kernel.

The columns of a block that one file stores, or wants, are many places in memory but one
run in that file, so they are one vectored request. Nothing is copied in between, and
nothing but the standard library is needed:

    rank 0's file  |aaaaaa|                          preadv puts row after row in its place
    rank 1's file  |bbbbbb|      block   aabb        pwrite stores the block
                                         aabb
                                         aabb

What this cannot do is left to the engine, which does everything: elements that change on
the way, gaps between what is read, and rows so short that the kernel would be slower. Both
take the same blocks and count the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any

from ..box import Box
from ..cells import Cell
from ..planning import Move, cell_blocks
from ..ranges import Runs, block_dim, byte_runs
from .batches import BATCH_BLOCKS, Batch, Shared, in_threads
from .budget import Budget, Counts
from .sources import OpenSource
from .writing import OutputFiles

if TYPE_CHECKING:
    from .engine import Worker

_LEAST_RUN = 512  # bytes of a row below which a copy by NumPy is quicker than the kernel's
_MOST_VIEWS = 1 << 14  # kept for reuse by a thread: some megabytes


def run(
    moves: Iterable[Move],
    source: OpenSource,
    target: OutputFiles,
    *,
    budget: Budget,
    progress: Callable[[int], None] | None = None,
) -> Counts:
    """Carry out ``moves`` from files to files; as ``engine.run``, in what it does and counts."""
    streams = [_Stream(source, target, budget, progress) for _ in range(budget.workers)]
    in_threads([s.work for s in streams], Shared(_batches(moves, budget)))
    return sum((s.all_counts for s in streams), Counts())


@dataclass(frozen=True, slots=True)
class Lane:
    """A part of a cell, in bytes: where it lies in its file, and in each block of the cell.

    A block is rows ``a`` to ``b`` of one dim; of the dims before it has one element each.

    Attributes:
        index: which source or target of the move.
        first: its first row.
        last: the row after its last.
        outer: for each dim before, (first, end, bytes between neighbours in the file).
        base: where row 0 would be in the file (or in the target's data).
        row_bytes: bytes of one row of it: what lies between two rows in the file.
        runs: where one row of it lies in a row of the block; None if that is all of it.
    """

    index: int
    first: int
    last: int
    outer: tuple[tuple[int, int, int], ...]
    base: int
    row_bytes: int
    runs: Runs | None

    def rows(self, block: Box, dim: int) -> tuple[int, int]:
        """The rows of ``block`` that it holds: ``(first, end)``, empty if end <= first."""
        for at, (start, stop, _) in zip(block.start, self.outer, strict=False):
            if not start <= at < stop:
                return 0, 0
        return max(block.start[dim], self.first), min(block.stop[dim], self.last)

    def offset(self, block: Box, row: int) -> int:
        """Where ``row`` of ``block`` lies in the file."""
        at = self.base + row * self.row_bytes
        for i, (_, _, stride) in zip(block.start, self.outer, strict=False):
            at += i * stride
        return at


@dataclass(frozen=True, slots=True)
class Lanes:
    """A cell as a stream: its blocks are rows of ``dim``, each ``row_bytes`` wide."""

    dim: int
    row_bytes: int
    sources: tuple[Lane, ...]
    targets: tuple[Lane, ...]


def lanes_of(move: Move, cell: Cell, block_bytes: int) -> Lanes | None:
    """The lanes of ``cell``, or None where it is work for the engine."""
    if any(move.forms[i] is not None for i, _ in cell.sources) or not cell.box.start:
        return None
    dim = block_dim(cell.box, move.unit_bytes, block_bytes)
    row_bytes = move.unit_bytes * prod(cell.box.shape[dim + 1 :])
    targets = [
        _lane(i, part, move.targets[i].box, 0, cell.box, dim, move.unit_bytes)
        for i, part in cell.targets
    ]
    sources = [
        _lane(i, part, move.sources[i], move.pieces[i][0].offset, cell.box, dim, move.unit_bytes)
        for i, part in cell.sources
    ]
    good_sources = [lane for lane in sources if lane]
    good_targets = [lane for lane in targets if lane]
    if len(good_sources) + len(good_targets) < len(sources) + len(targets):
        return None
    return Lanes(dim, row_bytes, tuple(good_sources), tuple(good_targets))


def _lane(
    index: int, part: Box, stored: Box, base: int, cell: Box, dim: int, unit: int
) -> Lane | None:
    """The lane of ``part`` of the box ``stored``, whose data begins at ``base``."""
    shape = stored.shape
    strides = [unit * prod(shape[d + 1 :]) for d in range(dim + 1)]
    row_bytes = unit * prod(part.shape[dim + 1 :])
    if row_bytes != strides[dim]:  # gaps between its rows in the file
        return None
    runs: Runs | None = None
    if part.shape[dim + 1 :] != cell.shape[dim + 1 :]:
        runs = byte_runs(_inner(part, dim).within(_inner(cell, dim)), cell.shape[dim + 1 :], unit)
        if runs.length < _LEAST_RUN:
            return None
    starts = zip(stored.start, strides, strict=False)
    return Lane(
        index,
        part.start[dim],
        part.stop[dim],
        tuple(zip(part.start[:dim], part.stop[:dim], strides, strict=False)),
        base - sum(a * s for a, s in starts),
        row_bytes,
        runs,
    )


def _inner(box: Box, dim: int) -> Box:
    return Box(box.start[dim + 1 :], box.stop[dim + 1 :])


_Given = tuple[Batch, Lanes | None, Any]


def _batches(moves: Iterable[Move], budget: Budget) -> Iterator[_Given]:
    for move in moves:
        operands = None
        if any(move.forms):
            from .engine import operands_of  # noqa: PLC0415 - NumPy, only where it is needed

            operands = operands_of(move)
        for cell in move.cells:
            limit = budget.block_bytes
            blocks = cell_blocks(cell, move.forms, move.unit_bytes, limit, budget.tile_bytes)
            lanes = lanes_of(move, cell, limit)
            while batch := tuple(islice(blocks, BATCH_BLOCKS)):
                yield Batch(move, cell, batch), lanes, operands


class _Stream:
    """One thread's buffer and counts."""

    def __init__(
        self,
        source: OpenSource,
        target: OutputFiles,
        budget: Budget,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._counts = Counts()
        self._source, self._target = source, target
        self._budget, self._progress = budget, progress
        self._block = memoryview(bytearray(budget.block_bytes))
        self._views: dict[tuple[int, int, Runs], list[memoryview]] = {}
        self._num_views = 0
        self._engine: Worker | None = None

    @property
    def all_counts(self) -> Counts:
        """What was done, by the engine too."""
        return self._counts + self._engine.counts if self._engine else self._counts

    def work(self, batches: Shared[_Given]) -> None:
        """Carry out what ``batches`` gives until it has no more."""
        while given := batches.next():
            batch, lanes, operands = given
            if lanes is None:
                self._worker().carry(batch, operands)
                continue
            before = self._counts.bytes_written
            for block in batch.blocks:
                self._carry(batch.move, lanes, block)
            if self._progress:
                self._progress(self._counts.bytes_written - before)

    def _worker(self) -> Worker:
        if self._engine is None:
            from .engine import Ends, Worker  # noqa: PLC0415 - NumPy, only where it is needed

            source = self._source
            ends = Ends(source.read, self._target.write, None, None, source.read_rows)
            self._engine = Worker(ends, self._budget, self._progress)
        return self._engine

    def _carry(self, move: Move, lanes: Lanes, block: Box) -> None:
        dim, counts = lanes.dim, self._counts
        if block.size * move.unit_bytes > len(self._block):  # one element may exceed the limit
            self._block = memoryview(bytearray(block.size * move.unit_bytes))
            self._views.clear()
        a = block.start[dim]
        for lane in lanes.sources:
            first, end = lane.rows(block, dim)
            if first < end:
                views = self._places(lane, lanes.row_bytes, first - a, end - first)
                piece = move.pieces[lane.index][0]
                self._source.read_views(piece, lane.offset(block, first), views)
                num_bytes = (end - first) * lane.row_bytes
                counts.bytes_needed += num_bytes
                counts.bytes_read += num_bytes
                counts.num_reads += 1
                counts.num_copies += len(views) > 1
        for lane in lanes.targets:
            first, end = lane.rows(block, dim)
            if first < end:
                views = self._places(lane, lanes.row_bytes, first - a, end - first)
                num_bytes = (end - first) * lane.row_bytes
                writes = self._target.write_views(
                    move, lane.index, lane.offset(block, first), views, num_bytes
                )
                counts.bytes_written += writes * num_bytes
                counts.num_writes += writes
                counts.num_copies += len(views) > 1

    def _places(self, lane: Lane, row_bytes: int, row: int, num_rows: int) -> Sequence[memoryview]:
        """Where ``num_rows`` rows of ``lane`` lie in the block, from its row ``row`` on."""
        start = row * row_bytes
        if lane.runs is None:
            return (self._block[start : start + num_rows * row_bytes],)
        key = (start, num_rows, lane.runs)
        found = self._views.get(key)
        if found is None:
            if self._num_views > _MOST_VIEWS:
                self._views.clear()
                self._num_views = 0
            found = self._views[key] = [
                self._block[at : at + length]
                for base in range(start, start + num_rows * row_bytes, row_bytes)
                for at, length in Runs(base + lane.runs.offset, lane.runs.length, lane.runs.outer)
            ]
            self._num_views += len(found)
        return found
