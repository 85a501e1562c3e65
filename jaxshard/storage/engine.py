"""The engine: executes a plan block by block on several threads.

Each block is read once from wherever its parts are stored, and written once to
everybody who wants some of it, while it is still in the cache of one core. The
ends are given: ``read`` may be a file or an array, ``write`` a file, a buffer or a
comparison. Memory is a few blocks a thread, whatever the tensors' size.

An end that is memory itself says so, and one copy falls away:

    file  → block → file        read, write
    file  ───────→ memory       place: where the bytes shall be in the end
    memory ──────→ file         lend:  where they are already
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from math import prod

import numpy as np
from numpy.typing import NDArray

from ..core.box import Box
from ..core.catalog import StoredShard, Tensor
from ..core.ranges import Runs, byte_runs
from ..planning.bundles import Bundle
from ..planning.cells import Cell
from ..planning.copies import Steps, TensorCopy, block_steps, cell_blocks, move_into, permuted_form
from .bundle_io import WriteBundle, carry
from .resources import Budget, Counts, fit_budget
from .transforms import Operands, Viewer, copy_into
from .vectored_io import Bytes, Places, Read, ReadRows, places_of, read_runs, scatter_of
from .work_queue import BATCH_BLOCKS, Batch, Shared, in_threads

__all__ = ["COUNTED", "Budget", "Counts", "Lend", "Place", "Read", "Write", "fit_budget", "run"]

Write = Callable[[TensorCopy, int, int, memoryview], int]
"""``write(move, target, offset, buffer)`` stores it there; returns how many writes that took."""
Place = Callable[[TensorCopy, int, int, int], memoryview | None]
"""``place(move, target, offset, num_bytes)``: memory to fill instead, or None. ``write`` is then
still told how many bytes are in place, and has nothing to copy."""
Lend = Callable[[StoredShard, int, int], memoryview | None]
"""``lend(piece, offset, num_bytes)``: the bytes that ``read`` would copy, or None."""
ReadPlaces = Callable[[StoredShard, int, Places], None]
"""``scatter(piece, offset, places)`` fills places in memory, one after the other, as ``read``."""
_Given = tuple[Batch, Operands | None] | Bundle

_STRAIGHT_BYTES = 8 << 20  # read at once where no block is between: fewer steps, no memory


def run(
    moves: Iterable[TensorCopy | Bundle],
    read: Read,
    write: Write,
    *,
    budget: Budget,
    progress: Callable[[int], None] | None = None,
    write_bundle: WriteBundle | None = None,
    place: Place | None = None,
    lend: Lend | None = None,
    rows: ReadRows | None = None,
    scatter: ReadPlaces | None = None,
    stopped: Callable[[], None] | None = None,
) -> Counts:
    """Carry out ``moves``; the counts of what was done.

    ``progress`` is told the bytes written since it was last told, from any thread.
    The first error of any thread stops all of them and is raised; ``stopped`` is called then,
    so that ``moves`` can stop waiting for what will not be done (and at the end as well).
    """
    ends = Ends(read, write, place, lend, rows, scatter, write_bundle)
    workers = [Worker(ends, budget, progress) for _ in range(budget.workers)]
    in_threads([w.work for w in workers], Shared(_batches(moves, budget, ends), stopped))
    return sum((w.counts for w in workers), Counts())


def _batches(moves: Iterable[TensorCopy | Bundle], budget: Budget, ends: Ends) -> Iterator[_Given]:
    for move in moves:
        if isinstance(move, Bundle):
            yield move
            continue
        operands = operands_of(move)
        for cell in move.cells:
            limit = budget.block_bytes
            if _needs_no_block(move, cell, ends):
                limit = max(limit, _STRAIGHT_BYTES)
            all_blocks = iter(
                cell_blocks(
                    cell,
                    move.forms,
                    move.unit_bytes,
                    limit,
                    budget.tile_bytes,
                    in_memory=ends.place is not None,
                )
            )
            most = max(1, BATCH_BLOCKS * budget.block_bytes // limit)
            while batch := tuple(islice(all_blocks, most)):
                yield Batch(move, cell, batch), operands


def operands_of(move: TensorCopy) -> Operands | None:
    """The small tensors that steps of ``move`` need, to be read once for all its batches."""
    return Operands(move.operands) if any(move.forms) and move.operands else None


def _needs_no_block(move: TensorCopy, cell: Cell, ends: Ends) -> bool:
    """Whether a run of one source is a run of one target's own memory, or scattered to several."""
    place = ends.place
    if place is None or len(cell.sources) != 1:
        return False
    if any(place(move, target, 0, 0) is None for target, _ in cell.targets):
        return False
    if len(cell.targets) > 1:
        whole = block_steps(cell, cell.box, move.sources, move.forms)
        return ends.scatter is not None and scatter_of(move, whole) is not None
    (source, part), (_, box) = cell.sources[0], cell.targets[0]
    stored = move.sources[source]
    return (
        move.forms[source] is None
        and part == box == cell.box
        and not byte_runs(box.within(stored), stored.shape, move.unit_bytes).outer
    )


@dataclass(frozen=True, slots=True)
class Ends:
    """Where bytes come from and go to."""

    read: Read
    write: Write
    place: Place | None
    lend: Lend | None
    rows: ReadRows | None = None
    scatter: ReadPlaces | None = None
    write_bundle: WriteBundle | None = None


class Worker:
    """One thread's buffers and counts."""

    def __init__(self, ends: Ends, budget: Budget, progress: Callable[[int], None] | None) -> None:
        self.counts = Counts()
        self._ends, self._budget, self._progress = ends, budget, progress
        self._block = np.empty(budget.block_bytes, np.uint8)
        self._spare = np.empty(budget.block_bytes, np.uint8)
        self._viewer = Viewer(ends.read)

    def work(self, source: Shared[_Given]) -> None:
        """Carry out what ``source`` gives until it has no more."""
        while given := source.next():
            if isinstance(given, Bundle):
                self._carry_bundle(given)
            else:
                self.carry(*given)

    def carry(self, batch: Batch, operands: Operands | None) -> None:
        """Carry out one batch."""
        before = self.counts.bytes_written
        if operands:
            operands.load(self._read_operand)
            self._viewer.values = operands.values
        permuted = permuted_form(batch.cell, batch.move.forms) is not None
        carry = self._carry_permuted if permuted and self._ends.place else self._carry
        for block in batch.blocks:
            carry(batch.move, batch.cell, block)
        if self._progress:
            self._progress(self.counts.bytes_written - before)

    def _carry_bundle(self, bundle: Bundle) -> None:
        ends = self._ends
        assert ends.write_bundle is not None
        done = carry(bundle, self._block.data, ends.read, ends.write_bundle, ends.lend)
        self.counts += done
        if self._progress:
            self._progress(done.bytes_written)

    def _carry(self, move: TensorCopy, cell: Cell, block: Box) -> None:
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
            writes = self._ends.write(move, index, at, out.data)
            self.counts.num_writes += writes
            self.counts.bytes_written += writes * num_bytes
        self.counts.num_copies += steps.num_copies

    def _scattered(self, move: TensorCopy, steps: Steps) -> bool:
        """Carry out a block without one, if its targets' memory can be filled as it is read."""
        scatter = scatter_of(move, steps) if self._ends.scatter and self._ends.place else None
        if scatter is None:
            return False
        memory = []
        for index, at, width in scatter.parts:
            place = self._place(move, index, at, scatter.num_rows * width)
            if place is None:
                return False
            memory.append(place)
        assert self._ends.scatter is not None
        piece = move.pieces[scatter.source][0]
        self._ends.scatter(piece, scatter.runs.offset, places_of(scatter, memory))
        self._count_reads(scatter.runs)
        for data, (index, at, _) in zip(memory, scatter.parts, strict=True):
            writes = self._ends.write(move, index, at, data.data)
            self.counts.num_writes += writes
            self.counts.bytes_written += writes * len(data)
        self.counts.num_copies += steps.num_copies
        return True

    def _carry_permuted(self, move: TensorCopy, cell: Cell, block: Box) -> None:
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
        """Store ``part`` of a target, wherever its elements come from."""
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
        writes = self._ends.write(move, target, runs.offset, memory[: runs.num_bytes].data)
        self.counts.num_writes += writes
        self.counts.bytes_written += writes * runs.num_bytes

    def _write_runs(
        self, move: TensorCopy, index: int, runs: Runs, inside: NDArray[np.generic]
    ) -> None:
        """Write a part of a tile that is not one run of its target."""
        flat = _flat(np.ascontiguousarray(inside))
        last = sum((n - 1) * stride for n, stride in runs.outer)
        span = self._place(move, index, runs.offset, last + runs.length)
        if span is not None:
            shape = (*(n for n, _ in runs.outer), runs.length)
            strides = (*(stride for _, stride in runs.outer), 1)
            np.lib.stride_tricks.as_strided(span, shape, strides)[...] = flat.reshape(shape)
            writes = self._ends.write(move, index, runs.offset, flat.data)
        else:
            for i, (at, length) in enumerate(runs):
                chunk = flat[i * length : (i + 1) * length]
                writes = self._ends.write(move, index, at, chunk.data)
        self.counts.num_writes += writes * len(runs)
        self.counts.bytes_written += writes * runs.num_bytes

    def _read_operand(self, tensor: Tensor) -> Bytes:
        """All bytes of a small tensor that a step needs."""
        whole = Box.whole(tensor.shape)
        out = np.empty(tensor.num_bytes, np.uint8)
        pieces = tensor.pieces
        if len(pieces) == 1 and pieces[0].view is None and len(out) <= self._budget.block_bytes:
            self._ends.read(pieces[0], pieces[0].offset, out.data)
            self.counts += Counts(len(out), len(out), 1)
            return out

        def write(move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
            out[offset : offset + len(buffer)] = np.frombuffer(buffer, np.uint8)
            return 1

        budget = Budget(1, self._budget.block_bytes, self._budget.tile_bytes)
        done = run([move_into(tensor, {whole: (0,)})], self._ends.read, write, budget=budget)
        self.counts += Counts(done.bytes_needed, done.bytes_read, done.num_reads)
        return out

    def _gather(self, move: TensorCopy, steps: Steps, buffer: NDArray[np.generic]) -> None:
        """Fill ``buffer``, which is the block, from all that stores parts of it."""
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
        """The memory that the whole block is for, if it is for one target alone."""
        if len(steps.writes) != 1 or steps.writes[0][1] != steps.block:
            return None
        index, part = steps.writes[0]
        target = move.targets[index].box
        runs = byte_runs(part.within(target), target.shape, move.unit_bytes)
        if runs.outer:
            return None
        return self._place(move, index, runs.offset, part.size * move.unit_bytes)

    def _place(self, move: TensorCopy, index: int, at: int, num_bytes: int) -> Bytes | None:
        if self._ends.place is None:
            return None
        memory = self._ends.place(move, index, at, num_bytes)
        return None if memory is None else np.frombuffer(memory, np.uint8)

    def _lent(self, move: TensorCopy, steps: Steps) -> Bytes | None:
        """The memory where the whole block lies in its source, if it does."""
        if self._ends.lend is None or len(steps.reads) != 1 or steps.reads[0][1] != steps.block:
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
        memory = self._ends.lend(piece, runs.offset, runs.num_bytes)
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
            read_runs(self._ends.read, piece, runs, out, self._ends.rows)
        self._count_reads(runs)

    def _copied_from_lent(self, piece: StoredShard, runs: Runs, out: Bytes) -> bool:
        """Whether runs that lie in memory already were copied from there, all in one copy."""
        if self._ends.lend is None:
            return False
        last = sum((n - 1) * stride for n, stride in runs.outer)
        memory = self._ends.lend(piece, runs.offset, last + runs.length)
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


COUNTED = tuple(f.name for f in fields(Counts))
