"""File-to-file engine: vectored reads and writes without NumPy.

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
from functools import lru_cache
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.box import Box
from ..core.ranges import Runs, block_dim, blocks, byte_runs
from ..planning.bundles import Bundle
from ..planning.cells import Cell, cells
from ..planning.copies import TensorCopy, cell_blocks
from .io import Source, copy_bundle
from .resources import Budget, Counts
from .work_queue import BATCH_BLOCKS, Batch, Shared, in_threads
from .writers import OutputFiles

if TYPE_CHECKING:
    from .engine import Worker

_LEAST_RUN = 512  # bytes of a row below which a copy by NumPy is quicker than the kernel's
_MOST_VIEWS = 1 << 14  # kept for reuse by a thread: some megabytes
_MOST_REQUESTS = 1024  # of a geometry, to be kept for the next tensor that has it: a tenth of one


def run(
    moves: Iterable[TensorCopy | Bundle],
    source: Source,
    target: OutputFiles,
    *,
    budget: Budget,
    progress: Callable[[int], None] | None = None,
) -> Counts:
    """Carry out ``moves`` from files to files; as ``engine.run``, in what it does and counts."""
    streams = [_Stream(source, target, budget, progress) for _ in range(budget.workers)]
    in_threads([s.work for s in streams], Shared(_batches(moves, budget)))
    return sum((s.all_counts for s in streams), Counts())


class Lane(NamedTuple):
    """A part of a cell, in bytes: where it lies in its file, and in each block of the cell.

    A block is rows ``a`` to ``b`` of one dim; of the dims before it has one element each.

    Attributes:
        which: the number of a source or target of the move.
        first: its first row.
        last: the row after its last.
        outer: for each dim before, (first, end, bytes between neighbours in the file).
        base: where row 0 would be, from the first byte of the source or target.
        row_bytes: bytes of one row of it: what lies between two rows in the file.
        runs: where one row of it lies in a row of the block; None if that is all of it.
    """

    which: int
    first: int
    last: int
    outer: tuple[tuple[int, int, int], ...]
    base: int
    row_bytes: int
    runs: Runs | None

    def request(self, block: Box, dim: int, block_row_bytes: int) -> Request | None:
        """The request for what it holds of ``block``, if anything."""
        at = self.base
        for i, (start, stop, stride) in zip(block.start, self.outer, strict=False):
            if not start <= i < stop:
                return None
            at += i * stride
        first, end = max(block.start[dim], self.first), min(block.stop[dim], self.last)
        if first >= end:
            return None
        start, num_rows = (first - block.start[dim]) * block_row_bytes, end - first
        num_bytes = num_rows * self.row_bytes
        place = Place(start, num_rows, block_row_bytes, self.runs) if self.runs else None
        return Request(self.which, at + first * self.row_bytes, num_bytes, start, place)


class Place(NamedTuple):
    """Where a request's bytes lie in a block: ``runs`` of each of its rows from byte ``start``."""

    start: int
    num_rows: int
    row_bytes: int
    runs: Runs

    def spans(self) -> Iterator[tuple[int, int]]:
        """(first byte, bytes) of each, in the order of the file."""
        inner, end = self.runs, self.start + self.num_rows * self.row_bytes
        for base in range(self.start, end, self.row_bytes):
            yield from Runs(base + inner.offset, inner.length, inner.outer)


class Request(NamedTuple):
    """What one call reads into a block, or writes from it.

    Attributes:
        which: the number of a source or target of the move.
        offset: from the first byte of that source or target.
        num_bytes: in all.
        start: the first byte of the block that it fills or takes.
        place: where the bytes are in the block; None where they are one run of it.
    """

    which: int
    offset: int
    num_bytes: int
    start: int
    place: Place | None


class Round(NamedTuple):
    """One block: what fills it, and then what is written from it."""

    num_bytes: int
    reads: tuple[Request, ...]
    writes: tuple[Request, ...]


class Lanes(NamedTuple):
    """A cell as a stream: its blocks are rows of ``dim``, each ``row_bytes`` wide."""

    dim: int
    row_bytes: int
    sources: tuple[Lane, ...]
    targets: tuple[Lane, ...]

    def round(self, block: Box) -> Round:
        """The requests that carry ``block``."""
        dim, width = self.dim, self.row_bytes
        reads = (lane.request(block, dim, width) for lane in self.sources)
        writes = (lane.request(block, dim, width) for lane in self.targets)
        num_bytes = (block.stop[dim] - block.start[dim]) * width
        return Round(num_bytes, tuple(filter(None, reads)), tuple(filter(None, writes)))


def lanes_of(
    cell: Cell, sources: Sequence[Box], targets: Sequence[Box], unit: int, block_bytes: int
) -> Lanes | None:
    """The lanes of ``cell`` between boxes that lie as they are, or None: work for the engine.

    Args:
        cell: a part of the journey, of elements of ``unit`` bytes.
        sources: the stored boxes.
        targets: the wanted ones.
        unit: bytes of an element.
        block_bytes: the most bytes of a block.
    """
    if not cell.box.start:
        return None
    dim = block_dim(cell.box, unit, block_bytes)
    row_bytes = unit * prod(cell.box.shape[dim + 1 :])
    into = [_lane(i, part, targets[i], cell.box, dim, unit) for i, part in cell.targets]
    out_of = [_lane(i, part, sources[i], cell.box, dim, unit) for i, part in cell.sources]
    good_into = tuple(lane for lane in into if lane)
    good_out_of = tuple(lane for lane in out_of if lane)
    if len(good_into) + len(good_out_of) < len(into) + len(out_of):
        return None
    return Lanes(dim, row_bytes, good_out_of, good_into)


def _lane(index: int, part: Box, stored: Box, cell: Box, dim: int, unit: int) -> Lane | None:
    """The lane of ``part`` of the box ``stored``."""
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
        -sum(a * s for a, s in starts),
        row_bytes,
        runs,
    )


def _inner(box: Box, dim: int) -> Box:
    return Box(box.start[dim + 1 :], box.stop[dim + 1 :])


_Leg = tuple[Cell, Lanes | None, tuple[Round, ...] | None]


@lru_cache(maxsize=256)
def _legs(
    sources: tuple[Box, ...], targets: tuple[Box, ...], unit: int, block_bytes: int
) -> tuple[_Leg, ...]:
    """The cells of a geometry, their lanes, and their rounds as long as those are few."""
    legs, left = list[_Leg](), _MOST_REQUESTS
    for cell in cells(sources, targets):
        lanes, rounds = lanes_of(cell, sources, targets, unit, block_bytes), None
        if lanes:
            left -= (len(cell.sources) + len(cell.targets)) * (
                1 + cell.box.size * unit // block_bytes
            )
            if left >= 0:
                rounds = tuple(map(lanes.round, blocks(cell.box, unit, block_bytes)))
        legs.append((cell, lanes, rounds))
    return tuple(legs)


class _Rounds(NamedTuple):
    """Neighbouring blocks of one cell, as requests."""

    move: TensorCopy
    rounds: tuple[Round, ...]


class _Work(NamedTuple):
    """Neighbouring blocks of one cell that the engine carries."""

    batch: Batch
    operands: Any


_Given = _Rounds | _Work | Bundle


def _batches(moves: Iterable[TensorCopy | Bundle], budget: Budget) -> Iterator[_Given]:
    limit = budget.block_bytes
    for move in moves:
        if isinstance(move, Bundle):
            yield move
            continue
        operands = None
        if any(move.forms):
            from .engine import operands_of  # noqa: PLC0415 - NumPy, only where it is needed

            operands = operands_of(move)
        targets = tuple(target.box for target in move.targets)
        for cell, lanes, known in _legs(move.sources, targets, move.unit_bytes, limit):
            if lanes is None or any(move.forms[i] for i, _ in cell.sources):
                yield from _for_engine(move, cell, budget, operands)
                continue
            rounds = iter(known or map(lanes.round, blocks(cell.box, move.unit_bytes, limit)))
            while some := tuple(islice(rounds, BATCH_BLOCKS)):
                yield _Rounds(move, some)


def _for_engine(move: TensorCopy, cell: Cell, budget: Budget, operands: Any) -> Iterator[_Work]:
    limit, tile = budget.block_bytes, budget.tile_bytes
    all_blocks = iter(cell_blocks(cell, move.forms, move.unit_bytes, limit, tile))
    while batch := tuple(islice(all_blocks, BATCH_BLOCKS)):
        yield _Work(Batch(move, cell, batch), operands)


class _Stream:
    """One thread's buffer and counts."""

    def __init__(
        self,
        source: Source,
        target: OutputFiles,
        budget: Budget,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._counts = Counts()
        self._source, self._target = source, target
        self._budget, self._progress = budget, progress
        self._block = memoryview(bytearray(budget.block_bytes))
        self._views: dict[Place, list[memoryview]] = {}
        self._num_views = 0
        self._engine: Worker | None = None

    @property
    def all_counts(self) -> Counts:
        """What was done, by the engine too."""
        return self._counts + self._engine.counts if self._engine else self._counts

    def work(self, batches: Shared[_Given]) -> None:
        """Carry out what ``batches`` gives until it has no more."""
        while given := batches.next():
            if isinstance(given, _Work):
                self._worker().carry(given.batch, given.operands)
                continue
            before = self._counts.bytes_written
            if isinstance(given, Bundle):
                self._counts += copy_bundle(given, self._block, self._source, self._target)
            else:
                for one in given.rounds:
                    self._carry(given.move, one)
            if self._progress:
                self._progress(self._counts.bytes_written - before)

    def _worker(self) -> Worker:
        if self._engine is None:
            from .engine import Worker  # noqa: PLC0415 - NumPy, only where it is needed

            self._engine = Worker(self._source, self._target, self._budget, self._progress)
        return self._engine

    def _carry(self, move: TensorCopy, one: Round) -> None:
        counts = self._counts
        if one.num_bytes > len(self._block):  # one element may exceed the limit
            self._block = memoryview(bytearray(one.num_bytes))
            self._views.clear()
        for request in one.reads:
            views, num_bytes = self._memory(request), request.num_bytes
            piece = move.pieces[request.which][0]
            self._source.read_views(piece, piece.offset + request.offset, views)
            counts.bytes_needed += num_bytes
            counts.bytes_read += num_bytes
            counts.num_reads += 1
            counts.num_copies += len(views) > 1
        for request in one.writes:
            views, num_bytes = self._memory(request), request.num_bytes
            writes = self._target.write_views(move, request.which, request.offset, views, num_bytes)
            counts.bytes_written += writes * num_bytes
            counts.num_writes += writes
            counts.num_copies += len(views) > 1

    def _memory(self, request: Request) -> Sequence[memoryview]:
        """The parts of the block that ``request`` fills or takes."""
        place = request.place
        if place is None:
            return (self._block[request.start : request.start + request.num_bytes],)
        found = self._views.get(place)
        if found is None:
            if self._num_views > _MOST_VIEWS:
                self._views.clear()
                self._num_views = 0
            found = [self._block[at : at + length] for at, length in place.spans()]
            self._views[place] = found
            self._num_views += len(found)
        return found
