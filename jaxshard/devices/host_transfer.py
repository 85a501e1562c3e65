"""Copying device arrays to host memory.

    CPU     NumPy looks at the memory where it is
    GPUs    into pinned memory, which the device writes by itself, and NumPy looks at that
    others  as NumPy asks JAX for it

A GPU writes to memory that is not pinned at a fortieth of the speed (docs/decisions/033).
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
from ..core.cache import cached
from ..core.dtypes import DType
from ..core.numpy_dtypes import Bytes
from ..core.ranges import block_dim
from ..errors import LayoutError
from ..storage.resources import (
    LEAST_BYTES,
    LENT_BLOCK_BYTES,
    Budget,
    fit_budget,
)

_PINNED = "pinned_host"


def is_on_host(shard: jax.Array) -> bool:
    """Whether the host sees the memory of ``shard`` as it sees its own."""
    return _are_hosts(shard.sharding)


@cached(1024)
def _are_hosts(sharding: Sharding) -> bool:
    devices: set[jax.Device] = sharding.device_set
    return all(device.platform == "cpu" for device in devices)


def to_host(shards: Sequence[jax.Array]) -> list[NDArray[Any]]:
    """What single-device arrays hold, all on their way at once; complete when this returns.

    What is returned may be the arrays' own memory where they lie on the host, and is read-only.
    The arrays do not keep it.
    """
    alone = [_apart(shard) for shard in shards]
    sent = [_sent(array) for array in alone]
    return [_seen(there, array) for there, array in zip(sent, alone, strict=True)]


def _apart(shard: jax.Array) -> jax.Array:
    """The same memory as another array: JAX keeps what was read back with what it was read of."""
    return jax.make_array_from_single_device_arrays(shard.shape, shard.sharding, [shard])


def _sent(array: jax.Array) -> jax.Array:
    """``array`` on its way to where the host sees it, if that is quicker than reading it."""
    (device,) = array.devices()
    if device.platform != "gpu" or array.sharding.memory_kind == _PINNED:
        array.copy_to_host_async()
        return array
    try:
        sent: jax.Array = jax.device_put(array, SingleDeviceSharding(device, memory_kind=_PINNED))
    except jax.errors.JaxRuntimeError:  # no such memory, or no more of it
        return array
    return sent


def _seen(sent: jax.Array, array: jax.Array) -> NDArray[Any]:
    try:
        return np.asarray(sent)
    except jax.errors.JaxRuntimeError:
        if sent is array:
            raise
        return np.asarray(array)  # there was too little pinned memory after all


# --- Device-to-host copies in chunks, within a memory budget

_MOST_BYTES = 8 << 20  # of one part: longer transfers are no faster
_LEAST_PARTS = 2  # a thread: the one it reads, and the next
_MOST_SHARDS = 8  # of one tensor that a thread reads from in turns (columns), each a part


@dataclass(frozen=True, slots=True)
class ChunkBudget:
    """How many parts are kept on the host, and the bytes of the largest."""

    parts: int = 16
    part_bytes: int = _MOST_BYTES


def share_out(host_bytes: int, workers: int, num_shards: int) -> tuple[Budget, ChunkBudget]:
    """Memory for the engine's blocks, and for parts of shards: together ``host_bytes`` at most.

    Args:
        host_bytes: what there is.
        workers: the most threads.
        num_shards: the most distinct shards of an array that must be fetched; 0 if none must.

    Raises:
        LayoutError: it is not enough for one thread.
    """
    if not num_shards:
        return fit_budget(host_bytes, workers, LENT_BLOCK_BYTES), ChunkBudget()
    if host_bytes < 2 * LEAST_BYTES:
        raise LayoutError(
            f"host_bytes={host_bytes}: one thread needs {LEAST_BYTES} bytes for its blocks, "
            "and as many for what comes from the devices. Give "
            f"host_bytes={2 * LEAST_BYTES} or more."
        )
    budget = fit_budget(max(LEAST_BYTES, host_bytes // 4), workers, LENT_BLOCK_BYTES)
    parts = budget.workers * max(_LEAST_PARTS, min(num_shards, _MOST_SHARDS))
    # a part that had to go lives on while a thread still reads it: one more for each
    each = (host_bytes - budget.host_bytes) // (parts + budget.workers)
    return budget, ChunkBudget(parts, min(_MOST_BYTES, each))


@dataclass(frozen=True, slots=True)
class Chunking:
    """How a shard is cut into parts.

    Attributes:
        shape: of the shard.
        dim: each part has a range of it; it is whole in the dims after, one thick before.
        rows: how many indices of that dim a part has; the last of a row may have fewer.
        row_bits: stored bits of one such index.
    """

    shape: tuple[int, ...]
    dim: int
    rows: int
    row_bits: int

    def holding(self, offset: int) -> tuple[int, Box]:
        """The part that holds stored byte ``offset``: its first byte, and its box.

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
    """How a shard of ``shape`` is cut so that no part takes more than ``part_bytes``.

    Two elements that share a byte where they are stored stay together.

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
    """Parts of shards that have come from their device, the last used kept.

    Safe to use from several threads; a part is fetched once, unless it had to go meanwhile.
    """

    def __init__(
        self, room: ChunkBudget, as_stored: Callable[[NDArray[np.generic]], Bytes]
    ) -> None:
        self._room, self._as_stored = room, as_stored
        self._cuts: dict[int, Chunking] = {}
        self._parts: OrderedDict[tuple[int, int], Future[Bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def holding(self, number: int, shard: jax.Array, kind: DType, offset: int) -> tuple[int, Bytes]:
        """The part of shard ``number`` that holds its byte ``offset``, and where it starts."""
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
        """Let go of all parts."""
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
            part.set_exception(error)  # others may wait for it
            raise

    def _make_room(self) -> None:
        """Let parts go that were not used for longest; those on their way stay."""
        over = len(self._parts) - self._room.parts + 1
        for key in [k for k, part in self._parts.items() if part.done()][: max(0, over)]:
            del self._parts[key]


def fetch(shard: jax.Array, box: Box, cut: Chunking) -> NDArray[np.generic]:
    """The elements of ``box``, one of the parts of ``cut``, of a single-device array.

    All parts are sliced by one compiled program: the last of a row begins early, and is trimmed.
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
