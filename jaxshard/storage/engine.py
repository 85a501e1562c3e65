"""Engine: executes a plan block by block on several threads.

Each block is read once from every source that stores a part of it, and written once to every
target that holds a part of it, while it is in the cache of one core. Each thread needs memory for
a few blocks, for tensors of any size. Memory at either end saves a copy (see ``io``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import islice
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.box import Box
from ..core.catalog import StoredShard, Tensor
from ..core.dtypes import DType, num_bytes
from ..core.numpy_dtypes import Bytes, Conversion, numpy_dtype
from ..core.ranges import Runs, byte_runs
from ..planning.bundles import Bundle
from ..planning.copies import (
    Cell,
    Steps,
    TensorCopy,
    block_steps,
    cell_blocks,
    move_into,
    permuted_form,
)
from .io import GAP_BYTES, Sink, Source, Span, copy_bundle
from .resources import BATCH_BLOCKS, Batch, Budget, Counts, WorkQueue, run_threads
from .transforms import Operands, Viewer, copy_into, read_runs
from .vectored_io import iovec_of, scatter_of

_Given = tuple[Batch, Operands | None] | Bundle

_FETCH_BYTES = 224 << 20  # 56 requests in flight: enough for 50 ms at 50 MB/s a connection
_STRAIGHT_BYTES = 8 << 20  # read at once where no block is between: fewer steps, no memory


def run(
    moves: Iterable[TensorCopy | Bundle],
    source: Source,
    sink: Sink,
    *,
    budget: Budget,
    progress: Callable[[int], None] | None = None,
    ahead: Iterable[TensorCopy | Bundle] | None = None,
) -> Counts:
    """Execute ``moves`` and return the counts of what was done.

    ``progress`` is called with the bytes written since its last call, from any thread. The first
    error of any thread stops all of them and is raised. ``ahead`` are the same moves again, for a
    source that fetches: its walk over them waits for no memory of ``sink``.
    """
    workers = [Worker(source, sink, budget, progress) for _ in range(budget.workers)]
    batches = _batches(moves, budget, source, sink)
    requests = Counts()
    if source.request_bytes and ahead is not None:
        before = source.requested
        following = _batches(ahead, budget, source, sink)
        _run_fetched(workers, batches, following, source, sink, budget)
        num_requests, num_bytes = (b - a for a, b in zip(before, source.requested, strict=True))
        requests = Counts(num_requests=num_requests, bytes_fetched=num_bytes)
    else:
        run_threads([w.work for w in workers], WorkQueue(batches, sink.stop))
    return sum((w.counts for w in workers), requests)


def _run_fetched(
    workers: Sequence[Worker],
    batches: Iterator[_Given],
    ahead: Iterator[_Given],
    source: Source,
    sink: Sink,
    budget: Budget,
) -> None:
    """Execute ``batches``, each once its bytes are fetched; the two walks give equal batches."""

    def stop() -> None:
        sink.stop()
        source.stop()

    limit = budget.limit_bytes or _FETCH_BYTES
    window_bytes = min(_FETCH_BYTES, limit - budget.host_bytes)
    fetched = source.fetched(map(_spans, ahead), window_bytes)
    try:
        both = zip(batches, fetched, strict=False)  # either may be stopped before its end
        run_threads([w.work_fetched for w in workers], WorkQueue(both, stop))
    finally:
        source.stop()
        fetched.close()


def _spans(given: _Given) -> list[Span]:
    """Return what a batch reads, in the order of the file, without large gaps."""
    if isinstance(given, Bundle):
        return sorted((s.piece.file, s.offset, s.offset + s.num_bytes) for s in given.reads)
    (move, cell, blocks), _ = given
    spans: list[Span] = []
    for block in blocks:
        spans += _spans_of(move, block_steps(cell, block, move.sources, move.forms).reads)
    return sorted(spans)


def _spans_of(move: TensorCopy, reads: Iterable[tuple[int, Box]]) -> list[Span]:
    spans: list[Span] = []
    for index, part in reads:
        piece, stored, form = move.pieces[index][0], move.sources[index], move.forms[index]
        if form is None:
            runs = byte_runs(part.within(stored), stored.shape, move.unit_bytes, piece.offset)
        else:
            runs, _ = form.runs(part, stored, piece.offset)
        if not runs.num_bytes:
            continue
        if runs.outer and min(stride for _, stride in runs.outer) - runs.length > GAP_BYTES:
            spans.extend((piece.file, at, at + length) for at, length in runs)
        else:
            last = sum((n - 1) * stride for n, stride in runs.outer)
            spans.append((piece.file, runs.offset, runs.offset + last + runs.length))
        for step in piece.view.factors if piece.view else ():
            box = step.part_of(part.within(stored).start, part.shape)
            factors = move_into(step.scale, {box: (0,)})
            spans += _spans_of(factors, [p for cell in factors.cells for p in cell.sources])
    return spans


class _NotRead(Source):
    def read(self, piece: StoredShard, offset: int, buffer: memoryview) -> None:
        raise NotImplementedError


class _NotWritten(Sink):
    def write(self, move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        raise NotImplementedError


def planned_requests(
    moves: Iterable[TensorCopy | Bundle], *, budget: Budget, is_in_order: bool = False
) -> Counts:
    """Return the requests of ``run`` for ``moves`` from a store to files, and their bytes."""
    from .fetch import REQUEST_BYTES, planned  # noqa: PLC0415 - for stores only

    source, sink, moves = _NotRead(), _NotWritten(), list(moves)
    source.request_bytes, sink.is_in_order = REQUEST_BYTES, is_in_order
    requests, num_bytes = planned(map(_spans, _batches(moves, budget, source, sink)))
    for operand in (t for m in moves if isinstance(m, TensorCopy) for t in m.whole_operands):
        requests, num_bytes = requests + len(operand.shards), num_bytes + operand.num_bytes
    return Counts(num_requests=requests, bytes_fetched=num_bytes)


def fetched_bytes(move: TensorCopy) -> int:
    """Return how many bytes of the files a source that fetches requests for ``move``."""
    cells = move.cells
    spans = sorted(s for cell in cells for s in _spans((Batch(move, cell, (cell.box,)), None)))
    total, last = 0, (-1, 0, 0)
    for file, start, stop in spans:
        if file != last[0] or start > last[2] + GAP_BYTES:
            last = (file, start, start)
        total += max(0, stop - last[2])
        last = (file, start, max(stop, last[2]))
    return total


def _batches(
    moves: Iterable[TensorCopy | Bundle], budget: Budget, source: Source, sink: Sink
) -> Iterator[_Given]:
    for move in moves:
        if isinstance(move, Bundle):
            yield move
        elif source.request_bytes:  # a request covers adjacent bytes of a file, of several cells
            yield from sorted(_batches_of(move, budget, source, sink), key=_spans)
        else:
            yield from _batches_of(move, budget, source, sink)


def _batches_of(
    move: TensorCopy, budget: Budget, source: Source, sink: Sink
) -> Iterator[tuple[Batch, Operands | None]]:
    operands = operands_of(move)
    for cell in move.cells:
        limit = budget.block_bytes
        if source.request_bytes:  # a batch is at most one request, even if memory allows more
            limit = min(limit, source.request_bytes)
        elif _needs_no_block(move, cell, source, sink):
            limit = max(limit, _STRAIGHT_BYTES)
        all_blocks = iter(
            cell_blocks(
                cell,
                move.forms,
                move.unit_bytes,
                limit,
                budget.tile_bytes,
                in_memory=sink.is_memory,
            )
        )
        batch_bytes = source.request_bytes or BATCH_BLOCKS * budget.block_bytes
        most = 1 if sink.is_in_order else max(1, batch_bytes // limit)
        while batch := tuple(islice(all_blocks, most)):
            yield Batch(move, cell, batch), operands


def operands_of(move: TensorCopy) -> Operands | None:
    """The small tensors that steps of ``move`` need, to be read once for all its batches."""
    return Operands(move.whole_operands) if any(move.forms) and move.whole_operands else None


def _needs_no_block(move: TensorCopy, cell: Cell, source: Source, sink: Sink) -> bool:
    """Return whether ``cell`` is one run of one source, read into one target or scattered."""
    if not sink.is_memory or len(cell.sources) != 1:
        return False
    if any(sink.place(move, target, 0, 0) is None for target, _ in cell.targets):
        return False
    if len(cell.targets) > 1:
        whole = block_steps(cell, cell.box, move.sources, move.forms)
        return source.can_scatter and scatter_of(move, whole) is not None
    (index, part), (_, box) = cell.sources[0], cell.targets[0]
    stored = move.sources[index]
    return (
        move.forms[index] is None
        and part == box == cell.box
        and not byte_runs(box.within(stored), stored.shape, move.unit_bytes).outer
    )


class Worker:
    """One thread's buffers and counts."""

    def __init__(
        self,
        source: Source,
        sink: Sink,
        budget: Budget,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.counts = Counts()
        self._source, self._sink = source, sink
        self._budget, self._progress = budget, progress
        self._block = np.empty(budget.block_bytes, np.uint8)
        self._spare = np.empty(budget.block_bytes, np.uint8)
        self._viewer = Viewer(source, self._read_operand)

    def work(self, batches: WorkQueue[_Given]) -> None:
        """Execute ``batches`` until none are left."""
        while given := batches.next():
            self._execute_given(given)

    def work_fetched(self, batches: WorkQueue[tuple[_Given, Callable[[], None]]]) -> None:
        """Execute ``batches``, and release the bytes that were fetched for each."""
        while fetched := batches.next():
            given, release = fetched
            try:
                self._execute_given(given)
            finally:
                release()

    def _execute_given(self, given: _Given) -> None:
        if isinstance(given, Bundle):
            self._copy_bundle(given)
        else:
            self.execute(*given)

    def execute(self, batch: Batch, operands: Operands | None) -> None:
        """Execute one batch."""
        before = self.counts.bytes_written
        if operands:
            operands.load(self._read_operand)
            self._viewer.values = operands.values
        permuted = permuted_form(batch.cell, batch.move.forms) is not None
        copy = self._copy_permuted if permuted and self._sink.is_memory else self._copy
        for block in batch.blocks:
            copy(batch.move, batch.cell, block)
        if self._progress:
            self._progress(self.counts.bytes_written - before)

    def _copy_bundle(self, bundle: Bundle) -> None:
        done = copy_bundle(bundle, self._block.data, self._source, self._sink)
        self.counts += done
        if self._progress:
            self._progress(done.bytes_written)

    def _copy(self, move: TensorCopy, cell: Cell, block: Box) -> None:
        steps = block_steps(cell, block, move.sources, move.forms)
        unit = move.unit_bytes
        if self._scattered(move, steps):
            return
        if block.size * unit > len(self._block):  # a tile
            self._block = np.empty(block.size * unit, np.uint8)
            self._spare = np.empty(block.size * unit, np.uint8)
        filled = self._lent(move, steps)
        if filled is None:
            filled = self._final_place(move, steps)
            if filled is None:
                filled = self._block[: block.size * unit]
            self._gather(move, steps, filled.view(_element(unit)).reshape(block.shape))
        buffer = filled.view(_element(unit)).reshape(block.shape)
        for index, part in steps.writes:
            inside = _inside(buffer, part.within(block))
            num_bytes = part.size * unit
            target = move.targets[index].box
            runs = byte_runs(part.within(target), target.shape, unit)
            if runs.outer:
                self._write_runs(move, index, runs, inside)
                continue
            at = runs.offset
            out = self._place(move, index, at, num_bytes)
            if out is not None:
                if out.ctypes.data != inside.ctypes.data:
                    out.view(buffer.dtype).reshape(inside.shape)[...] = inside
            elif inside.flags.c_contiguous:
                out = _flat(inside)
            else:
                out = self._spare[:num_bytes]
                out.view(buffer.dtype).reshape(inside.shape)[...] = inside
            writes = self._sink.write(move, index, at, out.data)
            self.counts.num_writes += writes
            self.counts.bytes_written += writes * num_bytes
        self.counts.num_copies += steps.num_copies

    def _scattered(self, move: TensorCopy, steps: Steps) -> bool:
        """Carry out a block without one, if its targets' memory can be filled as it is read."""
        if not (self._sink.is_memory and self._source.can_scatter):
            return False
        scatter = scatter_of(move, steps)
        if scatter is None:
            return False
        memory = []
        for index, at, width in scatter.parts:
            place = self._place(move, index, at, scatter.num_rows * width)
            if place is None:
                return False
            memory.append(place)
        piece = move.pieces[scatter.source][0]
        self._source.read_scattered(piece, scatter.runs.offset, iovec_of(scatter, memory))
        self._count_reads(scatter.runs)
        for data, (index, at, _) in zip(memory, scatter.parts, strict=True):
            writes = self._sink.write(move, index, at, data.data)
            self.counts.num_writes += writes
            self.counts.bytes_written += writes * len(data)
        self.counts.num_copies += steps.num_copies
        return True

    def _copy_permuted(self, move: TensorCopy, cell: Cell, block: Box) -> None:
        """As ``_carry``, from sources in another order straight into memory, with no block."""
        steps = block_steps(cell, block, move.sources, move.forms)
        for index, part in steps.reads:
            values, runs = self._viewer.values_of(move, index, part)
            self._count_reads(runs)
            plain = values.view(_element(move.unit_bytes))
            for target, wanted in steps.writes:
                shared = part.intersect(wanted)
                if shared is not None:
                    inside = _inside(plain, shared.within(part))
                    self._put(move, target, shared.within(move.targets[target].box), inside)
        self.counts.num_copies += steps.num_copies

    def _put(self, move: TensorCopy, target: int, part: Box, values: NDArray[np.generic]) -> None:
        """Store ``part`` of a target."""
        shape = move.targets[target].box.shape
        runs = byte_runs(part, shape, move.unit_bytes)
        last = sum((n - 1) * stride for n, stride in runs.outer)
        memory = self._place(move, target, runs.offset, last + runs.length)
        if memory is None:
            flat = np.empty(part.shape, values.dtype)
            copy_into(flat, values)
            self._write_runs(move, target, runs, flat)
            return
        strides = [move.unit_bytes * prod(shape[i + 1 :]) for i in range(len(shape))]
        out = np.lib.stride_tricks.as_strided(memory.view(values.dtype), part.shape, strides)
        copy_into(out, values, is_final=True)
        writes = self._sink.write(move, target, runs.offset, memory[: runs.num_bytes].data)
        self.counts.num_writes += writes
        self.counts.bytes_written += writes * runs.num_bytes

    def _write_runs(
        self, move: TensorCopy, index: int, runs: Runs, inside: NDArray[np.generic]
    ) -> None:
        """Write a part of a tile that is several runs of its target."""
        flat = _flat(np.ascontiguousarray(inside))
        last = sum((n - 1) * stride for n, stride in runs.outer)
        span = self._place(move, index, runs.offset, last + runs.length)
        if span is not None:
            shape = (*(n for n, _ in runs.outer), runs.length)
            strides = (*(stride for _, stride in runs.outer), 1)
            np.lib.stride_tricks.as_strided(span, shape, strides)[...] = flat.reshape(shape)
            writes = self._sink.write(move, index, runs.offset, flat.data)
        else:
            for i, (at, length) in enumerate(runs):
                chunk = flat[i * length : (i + 1) * length]
                writes = self._sink.write(move, index, at, chunk.data)
        self.counts.num_writes += writes * len(runs)
        self.counts.bytes_written += writes * runs.num_bytes

    def _read_operand(self, tensor: Tensor, box: Box) -> Bytes:
        """Read ``box`` of a tensor that a step needs."""
        out = np.empty(num_bytes(box.shape, tensor.dtype), np.uint8)
        move = move_into(tensor, {box: (0,)})
        if (
            len(move.sources) == 1
            and move.forms[0] is None
            and len(out) <= self._budget.block_bytes
        ):
            self._fetch(move, 0, move.targets[0].box, out)
            return out

        budget = Budget(1, self._budget.block_bytes, self._budget.tile_bytes)
        done = run([move], self._source, _Buffer(out), budget=budget)
        self.counts += Counts(done.bytes_needed, done.bytes_read, done.num_reads)
        return out

    def _gather(self, move: TensorCopy, steps: Steps, buffer: NDArray[np.generic]) -> None:
        """Fill ``buffer``, which is the block, from all sources of its parts."""
        for index, part in steps.reads:
            inside = _inside(buffer, part.within(steps.block))
            if move.forms[index] is not None:
                runs = self._viewer.fetch(move, index, part, inside)
                self._count_reads(runs)
            elif inside.flags.c_contiguous:
                self._fetch(move, index, part, _flat(inside))
            else:
                spare = self._spare[: part.size * move.unit_bytes]
                self._fetch(move, index, part, spare)
                inside[...] = spare.view(buffer.dtype).reshape(inside.shape)

    def _final_place(self, move: TensorCopy, steps: Steps) -> Bytes | None:
        """Return the destination buffer if the block has exactly one destination."""
        if len(steps.writes) != 1 or steps.writes[0][1] != steps.block:
            return None
        index, part = steps.writes[0]
        target = move.targets[index].box
        runs = byte_runs(part.within(target), target.shape, move.unit_bytes)
        if runs.outer:
            return None
        return self._place(move, index, runs.offset, part.size * move.unit_bytes)

    def _place(self, move: TensorCopy, index: int, at: int, num_bytes: int) -> Bytes | None:
        if not self._sink.is_memory:
            return None
        memory = self._sink.place(move, index, at, num_bytes)
        return None if memory is None else np.frombuffer(memory, np.uint8)

    def _lent(self, move: TensorCopy, steps: Steps) -> Bytes | None:
        """Return the source memory of the whole block, if it is lent in one piece."""
        if not self._source.can_lend or len(steps.reads) != 1 or steps.reads[0][1] != steps.block:
            return None
        index = steps.reads[0][0]
        if move.forms[index] is not None:
            return None
        stored = move.sources[index]
        piece = move.pieces[index][0]
        runs = byte_runs(
            steps.block.within(stored), stored.shape, move.unit_bytes, piece.offset
        ).coalesced()
        if runs.outer or runs.num_bytes != steps.block.size * move.unit_bytes:
            return None
        memory = self._source.lend(piece, runs.offset, runs.num_bytes)
        if memory is None:
            return None
        self.counts.bytes_needed += runs.num_bytes
        self.counts.bytes_read += runs.num_bytes
        self.counts.num_reads += 1
        return np.frombuffer(memory, np.uint8)

    def _fetch(self, move: TensorCopy, index: int, part: Box, out: Bytes) -> None:
        """Fill ``out`` with ``part`` of source ``index``, in row-major order."""
        stored = move.sources[index]
        piece = move.pieces[index][0]
        runs = byte_runs(part.within(stored), stored.shape, move.unit_bytes, piece.offset)
        if not self._copied_from_lent(piece, runs, out):
            read_runs(self._source, piece, runs, out)
        self._count_reads(runs)

    def _copied_from_lent(self, piece: StoredShard, runs: Runs, out: Bytes) -> bool:
        """Copy runs from lent memory in one copy; return whether it was lent."""
        if not self._source.can_lend:
            return False
        last = sum((n - 1) * stride for n, stride in runs.outer)
        memory = self._source.lend(piece, runs.offset, last + runs.length)
        if memory is None:
            return False
        shape = (*(n for n, _ in runs.outer), runs.length)
        strides = (*(stride for _, stride in runs.outer), 1)
        span = np.frombuffer(memory, np.uint8)
        out.reshape(shape)[...] = np.lib.stride_tricks.as_strided(span, shape, strides)
        return True

    def _count_reads(self, runs: Runs | None) -> None:
        if runs is not None:
            requests = runs.coalesced()
            self.counts.bytes_needed += runs.num_bytes
            self.counts.bytes_read += requests.num_bytes
            self.counts.num_reads += len(requests)


def _element(unit_bytes: int) -> np.dtype[np.generic]:
    """A NumPy dtype as wide as one unit: only its width matters."""
    return np.dtype(f"u{unit_bytes}" if unit_bytes in (1, 2, 4, 8) else f"V{unit_bytes}")


def _inside(array: NDArray[np.generic], box: Box) -> NDArray[np.generic]:
    """The view of ``box`` of ``array``; with no dims to slice, plain indexing would copy."""
    return array[box.slices] if box.start else array[...]


def _flat(array: NDArray[np.generic]) -> Bytes:
    return array.reshape(-1).view(np.uint8)


class _Buffer(Sink):
    """The bytes of one whole tensor."""

    def __init__(self, out: Bytes) -> None:
        self._out = out

    def write(self, move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        self._out[offset : offset + len(buffer)] = np.frombuffer(buffer, np.uint8)
        return 1


class HostArrays(Sink):
    """A box of each of some tensors in host memory, by name."""

    is_memory = True

    def __init__(
        self,
        boxes: Iterable[tuple[str, DType, tuple[int, ...]]],
        allocate: Callable[[int], Bytes] | None = None,
    ) -> None:
        """Allocate memory for the name, the stored dtype and the shape of each box."""
        self._memory: dict[str, Bytes] = {}
        self._boxes: dict[str, tuple[tuple[int, ...], Conversion, bool]] = {}
        for name, dtype, shape in boxes:
            conversion = Conversion(dtype, numpy_dtype(dtype))
            num_bytes = conversion.num_bytes(shape)
            self._memory[name] = allocate(num_bytes) if allocate else np.empty(num_bytes, np.uint8)
            self._boxes[name] = shape, conversion, self.is_memory and conversion.is_copy

    def place(
        self, move: TensorCopy, target: int, offset: int, num_bytes: int
    ) -> memoryview | None:
        """Return the memory of those bytes, unless they are converted on their way there."""
        is_placed = self._boxes[move.name][2]
        return self._memory[move.name][offset : offset + num_bytes].data if is_placed else None

    def write(self, move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        """Convert stored bytes into the array, unless they were read into it."""
        _, conversion, is_placed = self._boxes[move.name]
        if not is_placed:
            conversion.fill(self._memory[move.name], offset, np.frombuffer(buffer, np.uint8))
        return 1

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        return {
            name: self._memory[name].view(conversion.dtype).reshape(shape)
            for name, (shape, conversion, _) in self._boxes.items()
        }


COUNTED = tuple(f.name for f in fields(Counts))
