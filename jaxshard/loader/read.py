"""Reading a load's shards into their buffers through the engine.

Reading and placing overlap: the thread that fills the last byte of a tensor places it,
while the others read on. Where placing copies to a device, tensors pass through memory that
is bounded and used again: a thread that needs more of it waits for one to be placed.
"""

from __future__ import annotations

import threading
from collections.abc import (
    Callable,
    Iterator,
    Sequence,
)

import jax
import numpy as np

from ..core.numpy_dtypes import Bytes
from ..core.ranges import byte_runs
from ..devices.host_memory import BufferPool, is_aligned
from ..planning.copies import TensorCopy
from ..storage.engine import run
from ..storage.io import Sink, Source
from ..storage.prefetch import PrefetchThread
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
