"""Reading a load's shards into their buffers through the engine.

Reading and placing overlap: the thread that fills the last byte of a tensor places it,
while the others read on. Where placing copies to a device, tensors pass through memory that
is bounded and used again: a thread that needs more of it waits for one to be placed.
"""

from __future__ import annotations

import threading
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass

import jax
import numpy as np

from ..core.catalog import StoredShard
from ..core.numpy_dtypes import Bytes
from ..core.ranges import byte_runs
from ..devices.host_memory import BufferPool, is_aligned
from ..planning.copies import TensorCopy
from ..storage.engine import run
from ..storage.io import Sink, Source
from ..storage.readers import MappedFiles
from ..storage.resources import Budget, Counts
from .make_arrays import place
from .requests import TensorRequest, adopts, is_kept
from .shard_memory import RequestBuffers, staged_bytes


def carry(
    jobs: Sequence[TensorRequest],
    source: Source,
    *,
    budget: Budget,
    staging: BufferPool | None = None,
    adopted: bool = True,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[list[jax.Array]], Counts]:
    """The arrays of every job, and the counts of what was read.

    Args:
        jobs: what is wanted, in the order of the files.
        source: where bytes come from.
        budget: threads and the size of their blocks.
        staging: memory for what is copied to devices; closed with the load.
        adopted: whether CPU devices use the memory that was read into.
        progress: told of bytes as they are read.
    """
    carried = _LoadSink(jobs, source, staging or BufferPool(0), adopted=adopted)
    try:
        counts = run(
            carried.moves(),
            source,
            carried,
            budget=budget,
            progress=progress,
            ahead=[move for *_, move in carried.todo if move],
        )
    finally:
        carried.close()
    return carried.arrays(), counts


class _LoadSink(Sink):
    """The jobs of one load: those not begun, in flight, and done.

    Raises:
        CoverageError: the source lacks part of a shard.
        LayoutError: a shard would cut through a byte of a packed dtype.
    """

    is_memory = True

    def __init__(
        self, jobs: Sequence[TensorRequest], source: Source, staging: BufferPool, *, adopted: bool
    ) -> None:
        self._jobs, self._staging, self._adopted = jobs, staging, adopted
        mapped = source if isinstance(source, MappedFiles) else None
        given = [in_place(job, mapped) if mapped else {} for job in jobs]
        self.todo = [(job, have, job.move(have)) for job, have in zip(jobs, given, strict=True)]
        self._memory: dict[str, RequestBuffers] = {}
        self._done: dict[str, list[jax.Array]] = {}
        self._lock = threading.Lock()
        self._ahead = PrefetchThread([move for *_, move in self.todo if move], source)

    def stop(self) -> None:
        """Wake the threads that wait for memory."""
        self._staging.stop()

    def moves(self) -> Iterator[TensorCopy]:
        """The journeys, each once there is memory for it."""
        self._ahead.start()
        for job, given, move in self.todo:
            memory = self._memory_for(job, given)
            if memory is None:
                return
            if move is None:
                self._finish(memory)
                continue
            memory.left_bytes = sum(
                target.box.size * move.unit_bytes * len(target.ranks) for target in move.targets
            )
            self._memory[job.tensor.name] = memory
            self._ahead.reached(move)
            yield move

    def close(self) -> None:
        """Let go of what is only needed on the way."""
        self._ahead.close()
        self._staging.close()

    def place(
        self, move: TensorCopy, target: int, offset: int, num_bytes: int
    ) -> memoryview | None:
        return self._memory[move.name].place(move.targets[target].ranks, offset, num_bytes)

    def write(self, move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        memory = self._memory[move.name]
        shards = move.targets[target].ranks
        memory.fill(shards, offset, buffer)
        with self._lock:
            memory.left_bytes -= len(buffer) * len(shards)
            full = not memory.left_bytes
        if full:
            self._finish(self._memory.pop(move.name))
        return len(shards)

    def arrays(self) -> list[list[jax.Array]]:
        return [self._done[job.tensor.name] for job in self._jobs]

    def _finish(self, memory: RequestBuffers) -> None:
        job = memory.job
        self._done[job.tensor.name] = place(job, memory.shards, adopted=self._adopted)
        memory.shards.clear()
        if memory.staged is not None:
            self._staging.give(memory.staged)

    def _memory_for(self, job: TensorRequest, given: dict[int, Bytes]) -> RequestBuffers | None:
        """Where ``job`` is read to; waits for room, and is None if the load has stopped."""
        if is_kept(job, adopted=self._adopted):
            return RequestBuffers(job, given)
        staged = self._staging.take(staged_bytes(job))
        return None if staged is None else RequestBuffers(job, given, staged)


def in_place(job: TensorRequest, mapped: MappedFiles) -> dict[int, Bytes]:
    """The shards of ``job`` that lie in a file as the CPU backend would have them in memory."""
    devices: dict[int, list[jax.Device]] = {number: [] for number in range(len(job.shards))}
    for use in job.uses:
        for device, number in use:
            devices[number].append(device)
    found = {}
    for number, shard in enumerate(job.shards):
        if shard.conversion.is_copy and shard.box.size and adopts(devices[number]):
            memory = _stored(job, number, mapped)
            if memory is not None and is_aligned(memory):
                found[number] = memory
    return found


def _stored(job: TensorRequest, number: int, mapped: MappedFiles) -> Bytes | None:
    """The shard's bytes in a file, if they are one run of one piece."""
    shard, tensor = job.shards[number], job.tensor
    if tensor.factors is not None:
        return None
    for piece in tensor.shards:
        if piece.view is None and piece.box.contains(shard.box):
            runs = byte_runs(
                shard.box.within(piece.box),
                piece.box.shape,
                tensor.dtype.unit_bytes,
                piece.offset,
            )
            if not runs.outer:
                memory = mapped.lend(piece, runs.offset, runs.length)
                return None if memory is None else np.frombuffer(memory, np.uint8)
    return None


# --- Prefetch thread: readahead for the next tensors of a load

WINDOW_BYTES = 256 << 20  # how far ahead: little beside the page cache, much for any disk
_PORTIONS = 8  # in a window: what is told at once of a run of bytes that is wanted without a gap
_GAP_BYTES = 4 << 10
_PROBES = 32
_SPARSE = 2  # a span of which less than one part in so many is wanted is left to the reads


@dataclass(slots=True)
class PrefetchRange:
    """Bytes of one file that are wanted without a gap, and where they are in all that are.

    Args:
        piece: names the file.
        offset: the first byte.
        num_bytes: how many.
        before: how many just before ``offset`` are wanted as well.
        ends: whether those that follow are not wanted.
        told_bytes: of all moves that begin before the end, what they are about.
    """

    piece: StoredShard
    offset: int
    num_bytes: int
    before: int = 0
    ends: bool = True
    told_bytes: int = 0


class PrefetchThread:
    """A thread that stays up to ``window_bytes`` ahead of the move that was begun last."""

    def __init__(
        self, moves: Sequence[TensorCopy], source: Source, *, window_bytes: int = WINDOW_BYTES
    ) -> None:
        self._moves, self._source, self._window = moves, source, window_bytes
        self._changed = threading.Condition()
        self._begun_bytes, self._ended = 0, False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, if there is something to wait for."""
        if _is_all_cached(self._moves, self._source):
            return
        self._thread = threading.Thread(target=self._work, name="jaxshard prefetch")
        self._thread.start()

    def reached(self, move: TensorCopy) -> None:
        """The load has come to ``move``; all moves are told, in their order."""
        if self._thread is not None:
            with self._changed:
                self._begun_bytes += _num_bytes(move)
                self._changed.notify()

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            with self._changed:
                self._ended = True
                self._changed.notify()
            self._thread.join()

    def _work(self) -> None:
        told_bytes = 0
        for part in portions(self._moves, self._window // _PORTIONS):
            with self._changed:
                while not self._ended and told_bytes >= self._begun_bytes + self._window:
                    self._changed.wait()
            if self._ended:
                return
            self._source.prefetch(
                part.piece, part.offset, part.num_bytes, before=part.before, ends=part.ends
            )
            told_bytes = part.told_bytes


def portions(moves: Iterable[TensorCopy], portion_bytes: int) -> Iterator[PrefetchRange]:
    """What ``moves`` read, in their order; spans that follow each other in a file are joined.

    Those of a long run are joined until there are ``portion_bytes``.
    """
    last: PrefetchRange | None = None
    told_bytes = 0
    for move in moves:
        told_bytes += _num_bytes(move)
        for piece, offset, num_bytes in spans(move):
            if last is not None and not _goes_on(last, piece, offset):
                yield last
                last = None
            if last is not None and last.num_bytes >= portion_bytes:
                last.ends = False
                yield last
                last = PrefetchRange(piece, offset, 0, last.before + offset - last.offset)
            if last is None:
                last = PrefetchRange(piece, offset, 0)
            last.num_bytes = offset + num_bytes - last.offset
            last.told_bytes = told_bytes
    if last is not None:
        yield last


def _goes_on(last: PrefetchRange, piece: StoredShard, offset: int) -> bool:
    """Whether ``offset`` comes after ``last`` at once, padding between tensors not counted."""
    gap = offset - last.offset - last.num_bytes
    return piece.file == last.piece.file and 0 <= gap < _GAP_BYTES


def spans(move: TensorCopy) -> Iterator[tuple[StoredShard, int, int]]:
    """(piece, file offset, bytes) of what ``move`` reads of each source, from first to last.

    What lies scattered is left out: most of what is between would be fetched for nothing.
    """
    wanted: dict[int, list[tuple[int, int, int]]] = {}
    for cell in move.cells:
        for index, part in cell.sources[:1]:
            form, piece, stored = move.forms[index], move.pieces[index][0], move.sources[index]
            if form is None:
                runs = byte_runs(part.within(stored), stored.shape, move.unit_bytes, piece.offset)
            else:
                runs, _ = form.runs(part, stored, piece.offset)
            if runs.num_bytes:
                last = sum((n - 1) * stride for n, stride in runs.outer)
                span = (runs.offset, runs.offset + last + runs.length, runs.num_bytes)
                wanted.setdefault(index, []).append(span)
    for index, found in wanted.items():
        start, stop = min(a for a, _, _ in found), max(b for _, b, _ in found)
        if sum(n for _, _, n in found) * _SPARSE >= stop - start:
            yield move.pieces[index][0], start, stop - start


def _num_bytes(move: TensorCopy) -> int:
    return sum(target.box.size for target in move.targets) * move.unit_bytes


def _is_all_cached(moves: Sequence[TensorCopy], source: Source) -> bool:
    """By a look at a few places in all the files."""
    some = moves[:: max(1, len(moves) // _PROBES)]
    places = (span for move in some for span in spans(move))
    return all(
        source.is_cached(piece, at)
        for piece, offset, num_bytes in places
        for at in (offset, offset + num_bytes - 1)
    )
