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
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from .. import resharding
from ..core.box import Box
from ..core.catalog import Tensor
from ..core.numpy_dtypes import Bytes
from ..core.ranges import byte_runs
from ..core.runtime import cached
from ..devices.host_memory import BufferPool, is_aligned
from ..devices.mesh import partition_spec, placement_of, sharding
from ..distributed.processes import cut_by_replicas
from ..errors import LayoutError
from ..planning.copies import TensorCopy, firsts, form_of, move_into
from ..resharding.geometry import all_device_boxes, bits_of
from ..storage.engine import fetched_bytes, run
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


def spread(wants: Sequence[ArrayRequest], *, fetched: bool = False) -> list[ArrayRequest]:
    """Return ``wants`` with shardings of which no two processes read the same byte.

    If the files are ``fetched`` by ranges, no two processes fetch the same byte either: column
    shards, between whose rows a request fetches those of other shards, become rows.
    """
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
    if not fetched:
        return found
    known: dict[object, Sharding] = {}
    return [_by_rows(want, first, known) for want, first in zip(wants, found, strict=True)]


_MOST_EXTRA = 1.02  # of the bytes of a tensor: what is between the shards of one process
_ON_ONE_BYTES = 256 << 20  # the largest tensor that one device reads for all


def _by_rows(
    want: ArrayRequest, first: ArrayRequest, known: dict[object, Sharding]
) -> ArrayRequest:
    """Return ``first``, or the request with another sharding for which fewer bytes are fetched.

    ``known`` has the shardings of tensors with the same geometry.
    """
    tensor = want.tensor
    unordered: set[jax.Device] = want.sharding.device_set
    devices = sorted(unordered, key=lambda d: (d.process_index, d.id))
    if len({d.process_index for d in devices}) < 2 or bits_of(want.dtype) < 8:
        return first
    forms = tuple((piece.box, form_of(piece)) for piece in firsts(tensor.shards))
    key = (tensor.shape, tensor.dtype, forms, want.sharding, first.sharding)
    if key not in known:
        known[key] = _least_fetched(tensor, first.sharding, devices)
    return replace(want, sharding=known[key])


def _least_fetched(tensor: Tensor, first: Sharding, devices: Sequence[jax.Device]) -> Sharding:
    """Return the first sharding over ``devices`` that fetches each byte once; else the best."""
    best, least = first, _fetched(tensor, first)
    for named in _shardings_by_dim(tensor, devices):
        if least <= _MOST_EXTRA * tensor.num_bytes:
            break
        num_bytes = _fetched(tensor, named)
        if num_bytes < least:
            best, least = named, num_bytes
    return best


def _shardings_by_dim(tensor: Tensor, devices: Sequence[jax.Device]) -> Iterator[Sharding]:
    """Yield shardings of one dim over all ``devices``, or over one of each process, or on one."""
    one_each = list({d.process_index: d for d in devices}.values())
    for some in (devices, one_each):
        mesh = Mesh(np.asarray(some, dtype=object), ("part",))
        for dim, size in enumerate(tensor.shape):
            if size and not size % len(some):
                yield NamedSharding(mesh, PartitionSpec(*[None] * dim, "part"))
    if tensor.num_bytes <= _ON_ONE_BYTES:
        turn = sum(tensor.name.encode()) % len(devices)
        yield NamedSharding(Mesh(np.asarray(devices[turn : turn + 1]), ("one",)), PartitionSpec())


def _fetched(tensor: Tensor, named: Sharding) -> int:
    """Return how many bytes all processes fetch for ``tensor`` with the sharding ``named``."""
    boxes: dict[int, dict[Box, tuple[int, ...]]] = {}
    for device, box in all_device_boxes(named, tensor.shape).items():
        if box.size:
            boxes.setdefault(device.process_index, {})[box] = (0,)
    try:
        return sum(fetched_bytes(move_into(tensor, wanted)) for wanted in boxes.values())
    except LayoutError:  # it would cut a group of elements that belong together
        return 1 << 62


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
