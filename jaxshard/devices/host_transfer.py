"""Copies of device arrays to host memory, whole or in chunks.

    CPU     NumPy aliases the array
    GPUs    the device writes to pinned memory, which NumPy aliases
    others  ``np.asarray``

A GPU writes to pageable memory at a fortieth of the speed (docs/decisions/033). A chunk is one run
of its shard's bytes: whole rows, or part of a row that is too long. So the memory per chunk follows
from the budget and not from the tensor.

    shard (2, 4, 8), at most 16 elements per chunk
    [0, 0:2, 0:8]  [0, 2:4, 0:8]  [1, 0:2, 0:8]  [1, 2:4, 0:8]
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding
from numpy.typing import NDArray

from ..core.box import Box
from ..core.dtypes import DType
from ..core.numpy_dtypes import Bytes
from ..core.ranges import block_dim
from ..core.runtime import cached
from ..errors import LayoutError
from ..storage.resources import LEAST_BYTES, LENT_BLOCK_BYTES, Budget, fit_budget

_PINNED = "pinned_host"


def is_on_host(shard: jax.Array) -> bool:
    """Return whether the memory of ``shard`` is host memory."""
    return _are_hosts(shard.sharding)


@cached(1024)
def _are_hosts(sharding: Sharding) -> bool:
    devices: set[jax.Device] = sharding.device_set
    return all(device.platform == "cpu" for device in devices)


def to_host(shards: Sequence[jax.Array]) -> list[NDArray[Any]]:
    """Copy single-device arrays to the host concurrently; block until all copies are complete.

    The results are read-only, and may alias arrays in host memory. The arrays do not cache them.
    """
    alone = [_apart(shard) for shard in shards]
    sent = [_sent(array) for array in alone]
    return [_seen(there, array) for there, array in zip(sent, alone, strict=True)]


def _apart(shard: jax.Array) -> jax.Array:
    """Return an alias of ``shard``, because JAX caches the host copy in the array."""
    return jax.make_array_from_single_device_arrays(shard.shape, shard.sharding, [shard])


def _sent(array: jax.Array) -> jax.Array:
    """Start the copy of ``array``, to pinned memory if the device is a GPU."""
    (device,) = array.devices()
    if device.platform != "gpu" or array.sharding.memory_kind == _PINNED:
        array.copy_to_host_async()
        return array
    try:
        sent: jax.Array = jax.device_put(array, SingleDeviceSharding(device, memory_kind=_PINNED))
    except jax.errors.JaxRuntimeError:  # unsupported or exhausted
        return array
    return sent


def _seen(sent: jax.Array, array: jax.Array) -> NDArray[Any]:
    try:
        return np.asarray(sent)
    except jax.errors.JaxRuntimeError:
        if sent is array:
            raise
        return np.asarray(array)  # pinned memory ran out


# --- Device-to-host copies in chunks, within a memory budget

_MAX_CHUNK_BYTES = 8 << 20  # longer transfers are not faster
_MIN_CHUNKS = 2  # per thread: the one it reads, and the next
_MAX_SHARDS = 8  # of a tensor that a thread reads in turns (columns), with one chunk each


@dataclass(frozen=True, slots=True)
class ChunkBudget:
    """Maximum number of cached chunks, and bytes per chunk."""

    parts: int = 16
    part_bytes: int = _MAX_CHUNK_BYTES


def share_out(host_bytes: int, workers: int, num_shards: int) -> tuple[Budget, ChunkBudget]:
    """Divide ``host_bytes`` into the engine's blocks and the chunks of shards.

    Args:
        host_bytes: the budget.
        workers: maximum number of threads.
        num_shards: maximum number of distinct shards of one array on devices; 0 without any.

    Raises:
        LayoutError: the budget is too small for one thread.
    """
    if not num_shards:
        return fit_budget(host_bytes, workers, LENT_BLOCK_BYTES), ChunkBudget()
    if host_bytes < 2 * LEAST_BYTES:
        raise LayoutError(
            f"host_bytes={host_bytes}: one thread needs {LEAST_BYTES} bytes for its blocks, "
            "and as many for transfers from devices. Pass "
            f"host_bytes={2 * LEAST_BYTES} or more."
        )
    budget = fit_budget(max(LEAST_BYTES, host_bytes // 4), workers, LENT_BLOCK_BYTES)
    parts = budget.workers * max(_MIN_CHUNKS, min(num_shards, _MAX_SHARDS))
    # an evicted chunk lives until its thread has read it: one more per thread
    each = (host_bytes - budget.host_bytes) // (parts + budget.workers)
    return budget, ChunkBudget(parts, min(_MAX_CHUNK_BYTES, each))


@dataclass(frozen=True, slots=True)
class Chunking:
    """Division of a shard into chunks.

    Attributes:
        shape: of the shard.
        dim: each chunk has a range of it, one index of the dims before, and all of those after.
        rows: indices of that dim per chunk; the last may have fewer.
        row_bits: stored bits of one such index.
    """

    shape: tuple[int, ...]
    dim: int
    rows: int
    row_bits: int

    def holding(self, offset: int) -> tuple[int, Box]:
        """Return the first byte and the box of the chunk that has stored byte ``offset``.

        >>> Chunking((2, 4, 8), dim=1, rows=2, row_bits=64).holding(50)
        (48, Box(start=(1, 2, 0), stop=(2, 4, 8)))
        """
        if not self.shape:
            return 0, Box((), ())
        length, after = self.shape[self.dim], self.shape[self.dim + 1 :]
        outer, inside = divmod(8 * offset, length * self.row_bits)
        first = inside // (self.rows * self.row_bits) * self.rows
        head = tuple(int(i) for i in np.unravel_index(outer, self.shape[: self.dim]))
        start = (outer * length + first) * self.row_bits // 8
        last = min(first + self.rows, length)
        return start, Box(
            (*head, first, *(0 for _ in after)), (*(i + 1 for i in head), last, *after)
        )


def chunking_of(shape: tuple[int, ...], kind: DType, part_bytes: int) -> Chunking:
    """Divide a shard of ``shape`` into chunks of at most ``part_bytes``.

    Two elements that share a stored byte are in the same chunk.

    >>> from ..core.dtypes import dtype
    >>> chunking_of((8, 1024), dtype("F32"), part_bytes=2048)
    Chunking(shape=(8, 1024), dim=1, rows=512, row_bits=32)
    """
    if not shape:
        return Chunking((), 0, 1, kind.bits)
    item_bytes, together = max(1, kind.bits // 8), kind.unit_elements
    dim = block_dim(Box.whole(shape), item_bytes, part_bytes)
    while dim and prod(shape[dim:]) % together:
        dim -= 1
    inner = prod(shape[dim + 1 :])
    rows = max(1, part_bytes // max(1, item_bytes * inner))
    if inner % together:
        rows = -(-rows // together) * together
    return Chunking(shape, dim, min(rows, max(1, shape[dim])), inner * kind.bits)


class ChunkCache:
    """LRU cache of chunks on the host, fetched from their device on a miss.

    Thread-safe: threads that need the same chunk wait for one fetch.
    """

    def __init__(
        self, room: ChunkBudget, as_stored: Callable[[NDArray[np.generic]], Bytes]
    ) -> None:
        self._room, self._as_stored = room, as_stored
        self._cuts: dict[int, Chunking] = {}
        self._parts: OrderedDict[tuple[int, int], Future[Bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def holding(self, number: int, shard: jax.Array, kind: DType, offset: int) -> tuple[int, Bytes]:
        """Return the chunk of shard ``number`` that has byte ``offset``, and its first byte."""
        cut = self._cuts.get(number)
        if cut is None:
            cut = self._cuts[number] = chunking_of(tuple(shard.shape), kind, self._room.part_bytes)
        start, box = cut.holding(offset)
        key = (number, start)
        with self._lock:
            part = self._parts.get(key)
            if mine := part is None:
                self._make_room()
                part = self._parts[key] = Future()
            else:
                self._parts.move_to_end(key)
        assert part is not None
        if mine:
            self._fill(part, key, shard, box, cut)
        return start, part.result()

    def clear(self) -> None:
        """Drop all chunks."""
        with self._lock:
            self._parts.clear()

    def _fill(
        self, part: Future[Bytes], key: tuple[int, int], shard: jax.Array, box: Box, cut: Chunking
    ) -> None:
        try:
            part.set_result(self._as_stored(fetch(shard, box, cut)))
        except BaseException as error:
            with self._lock:
                self._parts.pop(key, None)
            part.set_exception(error)  # for threads that wait for it
            raise

    def _make_room(self) -> None:
        """Evict the least recently used chunks, except those in flight."""
        over = len(self._parts) - self._room.parts + 1
        for key in [k for k, part in self._parts.items() if part.done()][: max(0, over)]:
            del self._parts[key]


def fetch(shard: jax.Array, box: Box, cut: Chunking) -> NDArray[np.generic]:
    """Return the elements of ``box``, a chunk of ``cut``, of a single-device array.

    One compiled program slices all chunks: a shorter last chunk starts earlier, and is trimmed.
    """
    wide = shard.dtype.itemsize == 8 or max(cut.shape, default=0) >= 1 << 31
    with jax.enable_x64(True) if wide else nullcontext():
        if box.shape == shard.shape:
            return to_host([shard])[0]
        dim, length = cut.dim, shard.shape[cut.dim]
        rows = min(cut.rows, length)
        skip = max(0, box.start[dim] + rows - length)
        start = np.array(box.start, np.int64 if wide else np.int32)
        start[dim] -= skip
        sizes = (*box.shape[:dim], rows, *box.shape[dim + 1 :])
        found = to_host([_sliced(shard, start, sizes)])[0]
        return found[(*(slice(None) for _ in range(dim)), slice(skip, None))]


@partial(jax.jit, static_argnums=2)
def _sliced(shard: jax.Array, start: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    return lax.dynamic_slice(shard, [start[d] for d in range(len(sizes))], sizes)
