"""Reading a load's shards into their buffers through the engine, each byte by one process.

Reading and placing overlap: the thread that fills the last byte of a tensor places it,
while the others read on. Where placing copies to a device, tensors pass through memory that
is bounded and used again: a thread that needs more of it waits for one to be placed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from .. import resharding
from ..core.numpy_dtypes import Bytes
from ..core.ranges import byte_runs
from ..core.runtime import cached
from ..devices.host_memory import BufferPool, is_aligned
from ..devices.mesh import partition_spec, placement_of, sharding
from ..distributed.processes import cut_by_replicas
from ..planning.copies import TensorCopy
from ..resharding.geometry import all_device_boxes, bits_of
from ..storage.engine import run
from ..storage.io import Sink, Source
from ..storage.readers import MappedFiles, PrefetchThread
from ..storage.resources import Budget, Counts
from .make_arrays import place
from .memory_budget import (
    RequestBuffers,
    staged_bytes,
)
from .requests import ArrayRequest, TensorRequest, adopts, is_kept


def carry(
    requests: Sequence[TensorRequest],
    source: Source,
    *,
    budget: Budget,
    staging: BufferPool | None = None,
    adopted: bool = True,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[list[jax.Array]], Counts]:
    """Make the arrays of every request; also return the read statistics.

    Args:
        requests: in the order of the files.
        source: the files.
        budget: threads and the size of their blocks.
        staging: buffers for transfers to devices; closed with the load.
        adopted: CPU devices alias the buffers.
        progress: called with the bytes of each read.
    """
    carried = _LoadSink(requests, source, staging or BufferPool(0), adopted=adopted)
    try:
        counts = run(
            carried.moves(),
            source,
            carried,
            budget=budget,
            progress=progress,
            ahead=carried.all_moves if source.request_bytes else None,
        )
    finally:
        carried.close()
    return carried.arrays(), counts


class _LoadSink(Sink):
    """Buffers of the requests of one load: pending, in flight and complete.

    Raises:
        CoverageError: the source lacks part of a shard.
        LayoutError: a shard would cut through a byte of a packed dtype.
    """

    is_memory = True

    def __init__(
        self,
        requests: Sequence[TensorRequest],
        source: Source,
        staging: BufferPool,
        *,
        adopted: bool,
    ) -> None:
        self._requests, self._staging, self._adopted = requests, staging, adopted
        mapped = source if isinstance(source, MappedFiles) else None
        given = [in_place(request, mapped) if mapped else {} for request in requests]
        self._todo = [
            (request, have, request.move(have))
            for request, have in zip(requests, given, strict=True)
        ]
        self._memory: dict[str, RequestBuffers] = {}
        self._done: dict[str, list[jax.Array]] = {}
        self._lock = threading.Lock()
        self.all_moves = [move for *_, move in self._todo if move]
        self._ahead = PrefetchThread(self.all_moves, source)

    def stop(self) -> None:
        """Wake the threads that wait for memory."""
        self._staging.stop()

    def moves(self) -> Iterator[TensorCopy]:
        """Yield the copy of each request as soon as its buffers are allocated."""
        self._ahead.start()
        for request, given, move in self._todo:
            memory = self._memory_for(request, given)
            if memory is None:
                return
            if move is None:
                self._finish(memory)
                continue
            memory.left_bytes = sum(
                target.box.size * move.unit_bytes * len(target.ranks) for target in move.targets
            )
            self._memory[request.tensor.name] = memory
            self._ahead.reached(move)
            yield move

    def close(self) -> None:
        """Release temporary resources."""
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
        return [self._done[request.tensor.name] for request in self._requests]

    def _finish(self, memory: RequestBuffers) -> None:
        request = memory.request
        self._done[request.tensor.name] = place(request, memory.shards, adopted=self._adopted)
        memory.shards.clear()
        if memory.staged is not None:
            self._staging.give(memory.staged)

    def _memory_for(self, request: TensorRequest, given: dict[int, Bytes]) -> RequestBuffers | None:
        """Allocate the buffers of ``request``; wait if necessary. None if the load has stopped."""
        if is_kept(request, adopted=self._adopted):
            return RequestBuffers(request, given)
        staged = self._staging.take(staged_bytes(request))
        return None if staged is None else RequestBuffers(request, given, staged)


def in_place(request: TensorRequest, mapped: MappedFiles) -> dict[int, Bytes]:
    """Return the shards of ``request`` that the CPU backend can alias in a mapped file."""
    devices: dict[int, list[jax.Device]] = {number: [] for number in range(len(request.shards))}
    for use in request.uses:
        for device, number in use:
            devices[number].append(device)
    found = {}
    for number, shard in enumerate(request.shards):
        if shard.conversion.is_copy and shard.box.size and adopts(devices[number]):
            memory = _stored(request, number, mapped)
            if memory is not None and is_aligned(memory):
                found[number] = memory
    return found


def _stored(request: TensorRequest, number: int, mapped: MappedFiles) -> Bytes | None:
    """Return the shard's bytes in a file, if they are one run of one stored shard."""
    shard, tensor = request.shards[number], request.tensor
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


# --- Balanced loads: each byte is read by one process and sent to the others


def spread(wants: Sequence[ArrayRequest]) -> list[ArrayRequest]:
    """Return ``wants`` with shardings of which no two processes read the same byte."""
    found, turns = [], 0
    for want in wants:
        shape = want.tensor.shape
        if bits_of(want.dtype) < 8 or not is_shared(want.sharding, shape):
            found.append(want)
            continue
        finer = _finer(want.sharding, shape)
        if finer is None:  # too small to split: one replica reads it for all, in turns
            finer = _one_replica(want.sharding, turns)
            turns += 1
        found.append(want if finer is None else replace(want, sharding=finer))
    return found


def gathered(arrays: Sequence[jax.Array], wants: Sequence[ArrayRequest]) -> list[jax.Array]:
    """Reshard the arrays from the shardings of `spread` to those of ``wants``, on the devices."""
    moved = [n for n, w in enumerate(wants) if arrays[n].sharding != w.sharding]
    found = list(arrays)
    if moved:
        there = resharding.reshard(
            [arrays[n] for n in moved], [wants[n].sharding for n in moved], donate=True
        )
        for n, array in zip(moved, there, strict=True):
            found[n] = array
    return found


def kept_bytes(first: Sequence[ArrayRequest], wants: Sequence[ArrayRequest]) -> int:
    """Return the host memory of the gathered arrays on CPU devices."""
    total = 0
    for before, want in zip(first, wants, strict=True):
        if before.sharding != want.sharding:
            local = list(want.sharding.addressable_devices)
            shard = prod(want.sharding.shard_shape(want.tensor.shape)) * want.dtype.itemsize
            total += shard * len(local) if adopts(local) else 0
    return total


@cached(4096)
def is_shared(named: Sharding, shape: tuple[int, ...]) -> bool:
    """Return whether several processes hold the same shard."""
    holders: dict[object, set[int]] = {}
    for device, box in all_device_boxes(named, shape).items():
        holders.setdefault(box, set()).add(device.process_index)
    return any(len(processes) > 1 for processes in holders.values())


@cached(4096)
def _finer(named: Sharding, shape: tuple[int, ...]) -> NamedSharding | None:
    """Return ``named`` split further by all its replicas; None if it is not divisible."""
    if not isinstance(named, NamedSharding):
        return None
    finer = cut_by_replicas(placement_of(named), shape)
    return None if finer is None else sharding(finer, tuple(named.mesh.devices.flat))


def _one_replica(named: Sharding, turn: int) -> NamedSharding | None:
    """Return ``named`` on one replica of its devices, chosen by ``turn``."""
    if not isinstance(named, NamedSharding):
        return None
    placement = placement_of(named)
    used = {a for axes in placement.spec for a in axes}
    free = tuple(n for a, n in placement.axes if a not in used)
    index = iter(np.unravel_index(turn % prod(free), free) if free else ())
    at = tuple(slice(None) if a in used else int(next(index)) for a, _ in placement.axes)
    names = tuple(a for a, _ in placement.axes if a in used)
    grid = np.asarray(named.mesh.devices[at], dtype=object).reshape(
        tuple(n for a, n in placement.axes if a in used)
    )
    if not names:
        names, grid = ("one",), grid.reshape(1)
    return NamedSharding(Mesh(grid, names), partition_spec(placement))
