"""File-to-file engine: vectored reads and writes without NumPy.

The columns of a block that one file stores are one run of that file and many ranges of the block,
so one vectored request transfers them. No bytes are copied in between, and only the standard
library is needed:

    rank 0's file  |aaaaaa|                          preadv puts each row in its place
    rank 1's file  |bbbbbb|      block   aabb        pwrite stores the block
                                         aabb
                                         aabb

The general engine does the rest: elements that are converted, reads with gaps, and rows so short
that the kernel would be slower. Both use the same blocks and count alike.
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
from ..planning.copies import Cell, TensorCopy, cell_blocks, cells
from .io import Source, copy_bundle
from .resources import BATCH_BLOCKS, Batch, Budget, Counts, WorkQueue, run_threads
from .writers import OutputFiles

if TYPE_CHECKING:
    from .engine import Worker

_LEAST_RUN = 512  # bytes of a row; NumPy copies shorter ones faster than the kernel
_MAX_VIEWS = 1 << 14  # that a thread keeps for reuse: some megabytes
_MAX_REQUESTS = 1024  # of a geometry that are cached for the next tensor that has it


def run(
    moves: Iterable[TensorCopy | Bundle],
    source: Source,
    target: OutputFiles,
    *,
    budget: Budget,
    progress: Callable[[int], None] | None = None,
) -> Counts:
    """Execute ``moves`` from files to files, with the results and counts of ``engine.run``."""
    streams = [_Stream(source, target, budget, progress) for _ in range(budget.workers)]
    run_threads([s.work for s in streams], WorkQueue(_batches(moves, budget)))
    return sum((s.all_counts for s in streams), Counts())


class Stripe(NamedTuple):
    """A part of a cell: its byte offsets in its file, and in each block of the cell.

    A block is a range of rows of one dim, with one element of each dim before.

    Attributes:
        which: the number of a source or target of the move.
        first: its first row.
        last: the row after its last.
        outer: for each dim before, (start, stop, bytes between neighbours in the file).
        base: the offset of row 0 from the first byte of the source or target.
        row_bytes: bytes of one row, which follow each other in the file.
        runs: the bytes of one row in a row of the block; None if they are all of it.
    """

    which: int
    first: int
    last: int
    outer: tuple[tuple[int, int, int], ...]
    base: int
    row_bytes: int
    runs: Runs | None

    def request(self, block: Box, dim: int, block_row_bytes: int) -> BlockRequest | None:
        """Return the request for its part of ``block``, if it has one."""
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
        span = BlockSpan(start, num_rows, block_row_bytes, self.runs) if self.runs else None
        return BlockRequest(self.which, at + first * self.row_bytes, num_bytes, start, span)


class BlockSpan(NamedTuple):
    """The bytes of a request in a block: ``runs`` of each row from byte ``start`` on."""

    start: int
    num_rows: int
    row_bytes: int
    runs: Runs

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the (first byte, bytes) of each run, in the order of the file."""
        inner, end = self.runs, self.start + self.num_rows * self.row_bytes
        for base in range(self.start, end, self.row_bytes):
            yield from Runs(base + inner.offset, inner.length, inner.outer)


class BlockRequest(NamedTuple):
    """One read into a block, or one write from it.

    Attributes:
        which: the number of a source or target of the move.
        offset: from the first byte of that source or target.
        num_bytes: the bytes it transfers.
        start: the first byte in the block.
        span: the bytes in the block; None where they are one run.
    """

    which: int
    offset: int
    num_bytes: int
    start: int
    span: BlockSpan | None


class BlockIO(NamedTuple):
    """The reads that fill one block, and the writes from it."""

    num_bytes: int
    reads: tuple[BlockRequest, ...]
    writes: tuple[BlockRequest, ...]


class StripedCell(NamedTuple):
    """A cell whose blocks are rows of ``dim``, each ``row_bytes`` wide."""

    dim: int
    row_bytes: int
    sources: tuple[Stripe, ...]
    targets: tuple[Stripe, ...]

    def io(self, block: Box) -> BlockIO:
        """Return the requests of ``block``."""
        dim, width = self.dim, self.row_bytes
        reads = (stripe.request(block, dim, width) for stripe in self.sources)
        writes = (stripe.request(block, dim, width) for stripe in self.targets)
        num_bytes = (block.stop[dim] - block.start[dim]) * width
        return BlockIO(num_bytes, tuple(filter(None, reads)), tuple(filter(None, writes)))


def striped(
    cell: Cell, sources: Sequence[Box], targets: Sequence[Box], unit: int, block_bytes: int
) -> StripedCell | None:
    """Return the stripes of ``cell``, or None if the general engine has to do it.

    Args:
        cell: a part of the copy, of elements of ``unit`` bytes.
        sources: the stored boxes.
        targets: the target boxes.
        unit: bytes of an element.
        block_bytes: the most bytes of a block.
    """
    if not cell.box.start:
        return None
    dim = block_dim(cell.box, unit, block_bytes)
    row_bytes = unit * prod(cell.box.shape[dim + 1 :])
    into = [_stripe(i, part, targets[i], cell.box, dim, unit) for i, part in cell.targets]
    out_of = [_stripe(i, part, sources[i], cell.box, dim, unit) for i, part in cell.sources]
    good_into = tuple(filter(None, into))
    good_out_of = tuple(filter(None, out_of))
    if len(good_into) + len(good_out_of) < len(into) + len(out_of):
        return None
    return StripedCell(dim, row_bytes, good_out_of, good_into)


def _stripe(index: int, part: Box, stored: Box, cell: Box, dim: int, unit: int) -> Stripe | None:
    """Return the stripe of ``part`` of the box ``stored``."""
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
    return Stripe(
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


_Known = tuple[Cell, StripedCell | None, tuple[BlockIO, ...] | None]


@lru_cache(maxsize=256)
def _striped_cells(
    sources: tuple[Box, ...], targets: tuple[Box, ...], unit: int, block_bytes: int
) -> tuple[_Known, ...]:
    """Return the cells of a geometry, their stripes, and their requests while those are few."""
    found, left = list[_Known](), _MAX_REQUESTS
    for cell in cells(sources, targets):
        stripes, requests = striped(cell, sources, targets, unit, block_bytes), None
        if stripes:
            left -= (len(cell.sources) + len(cell.targets)) * (
                1 + cell.box.size * unit // block_bytes
            )
            if left >= 0:
                requests = tuple(map(stripes.io, blocks(cell.box, unit, block_bytes)))
        found.append((cell, stripes, requests))
    return tuple(found)


class _Blocks(NamedTuple):
    """Adjacent blocks of one cell, as requests."""

    move: TensorCopy
    blocks: tuple[BlockIO, ...]


class _EngineBatch(NamedTuple):
    """Adjacent blocks of one cell for the general engine."""

    batch: Batch
    operands: Any


_Given = _Blocks | _EngineBatch | Bundle


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
        for cell, stripes, known in _striped_cells(move.sources, targets, move.unit_bytes, limit):
            if stripes is None or any(move.forms[i] for i, _ in cell.sources):
                yield from _for_engine(move, cell, budget, operands)
                continue
            requests = iter(known or map(stripes.io, blocks(cell.box, move.unit_bytes, limit)))
            while some := tuple(islice(requests, BATCH_BLOCKS)):
                yield _Blocks(move, some)


def _for_engine(
    move: TensorCopy, cell: Cell, budget: Budget, operands: Any
) -> Iterator[_EngineBatch]:
    limit, tile = budget.block_bytes, budget.tile_bytes
    all_blocks = iter(cell_blocks(cell, move.forms, move.unit_bytes, limit, tile))
    while batch := tuple(islice(all_blocks, BATCH_BLOCKS)):
        yield _EngineBatch(Batch(move, cell, batch), operands)


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
        self._views: dict[BlockSpan, list[memoryview]] = {}
        self._num_views = 0
        self._engine: Worker | None = None

    @property
    def all_counts(self) -> Counts:
        """The counts of this thread, with those of the general engine."""
        return self._counts + self._engine.counts if self._engine else self._counts

    def work(self, batches: WorkQueue[_Given]) -> None:
        """Execute ``batches`` until none are left."""
        while given := batches.next():
            if isinstance(given, _EngineBatch):
                self._worker().execute(given.batch, given.operands)
                continue
            before = self._counts.bytes_written
            if isinstance(given, Bundle):
                self._counts += copy_bundle(given, self._block, self._source, self._target)
            else:
                for one in given.blocks:
                    self._copy(given.move, one)
            if self._progress:
                self._progress(self._counts.bytes_written - before)

    def _worker(self) -> Worker:
        if self._engine is None:
            from .engine import Worker  # noqa: PLC0415 - NumPy, only where it is needed

            self._engine = Worker(self._source, self._target, self._budget, self._progress)
        return self._engine

    def _copy(self, move: TensorCopy, one: BlockIO) -> None:
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

    def _memory(self, request: BlockRequest) -> Sequence[memoryview]:
        """Return the ranges of the block that ``request`` reads or writes."""
        span = request.span
        if span is None:
            return (self._block[request.start : request.start + request.num_bytes],)
        found = self._views.get(span)
        if found is None:
            if self._num_views > _MAX_VIEWS:
                self._views.clear()
                self._num_views = 0
            found = [self._block[at : at + length] for at, length in span.ranges()]
            self._views[span] = found
            self._num_views += len(found)
        return found
