"""Changes of sharding: boxes, transfers between devices, and the shards themselves.

    source     |--0--|--1--|--2--|--3--|     four devices
    target     |----a----|----b---|          two
    transfers  |--0a-|-1a|-2b-|--3b-|        each inside one source shard and one target shard

Results depend on a `ShardingChange` alone, not on names, and are cached per change. Only
`from_shards`, `as_unshared` and `DonatedShards` affect device memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from ..core.box import Box
from ..core.runtime import cached
from ..errors import LayoutError


@dataclass(frozen=True, slots=True)
class ShardingChange:
    """An array of ``shape`` and ``dtype`` that moves from ``source`` to ``target``."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    source: Sharding
    target: Sharding

    @property
    def source_boxes(self) -> tuple[Box, ...]:
        """The box that each source device holds, in the order of the array's shards."""
        return tuple(device_boxes(self.source, self.shape).values())

    @property
    def target_boxes(self) -> tuple[Box, ...]:
        """The box of each target device, in the order of the result's shards."""
        return tuple(device_boxes(self.target, self.shape).values())

    @property
    def source_devices(self) -> tuple[jax.Device, ...]:
        """The source devices, in the order of ``source_boxes``."""
        return tuple(device_boxes(self.source, self.shape))

    @property
    def target_devices(self) -> tuple[jax.Device, ...]:
        """The target devices, in the order of ``target_boxes``."""
        return tuple(device_boxes(self.target, self.shape))

    @property
    def source_shard_bytes(self) -> int:
        """Bytes of one source shard."""
        return prod(self.source.shard_shape(self.shape)) * self.dtype.itemsize

    @property
    def target_shard_bytes(self) -> int:
        """Bytes of one target shard."""
        return prod(self.target.shard_shape(self.shape)) * self.dtype.itemsize

    @property
    def shard_bytes(self) -> int:
        """Bytes of the larger of the two: memory bounds are multiples of it."""
        return max(self.source_shard_bytes, self.target_shard_bytes)

    @property
    def processes(self) -> frozenset[int]:
        """The processes whose devices are in the source or the target."""
        devices: set[jax.Device] = {*self.source.device_set, *self.target.device_set}
        return frozenset(device.process_index for device in devices)

    @property
    def is_empty(self) -> bool:
        """Whether the array has no elements."""
        return 0 in self.shape


@dataclass(frozen=True)
class Leaf:
    """One array of a tree: its name, its change, and its shape and dtype for the caller.

    Keys of a random generator (of kind ``key_impl``) have one element each for the caller; their
    data, which is moved, has one more dim.
    """

    name: str
    move: ShardingChange
    shape: tuple[int, ...]
    dtype: Any
    key_impl: Any = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """Copy of the elements ``box`` (global) from source device ``source`` to ``targets``."""

    source: int
    targets: tuple[int, ...]
    box: Box


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes delivered by a move, per kind of link."""

    same_device_bytes: int = 0
    cross_device_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.same_device_bytes + other.same_device_bytes,
            self.cross_device_bytes + other.cross_device_bytes,
        )


@cached(8192)
def device_boxes(sharding: Sharding, shape: tuple[int, ...]) -> dict[jax.Device, Box]:
    """Return the box of every device of this process, in the order of an array's shards."""
    return _boxes(sharding.addressable_devices_indices_map(shape), shape)


@cached(8192)
def all_device_boxes(sharding: Sharding, shape: tuple[int, ...]) -> dict[jax.Device, Box]:
    """Return the box of every device, those of other processes too."""
    return _boxes(sharding.devices_indices_map(shape), shape)


def _boxes(
    indices: Mapping[jax.Device, tuple[slice, ...] | None], shape: tuple[int, ...]
) -> dict[jax.Device, Box]:
    boxes = {}
    for device, index in indices.items():
        ranges = [s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True)]
        boxes[device] = Box(tuple(a for a, _ in ranges), tuple(b for _, b in ranges))
    return boxes


@cached(8192)
def transfers(move: ShardingChange) -> tuple[Transfer, ...]:
    """Return all transfers, ordered by target device and position.

    A device that already holds an element sends it to itself; the other targets receive from the
    replica with the fewest elements sent so far.
    """
    holders: dict[Box, list[int]] = defaultdict(list)
    for ordinal, box in enumerate(move.source_boxes):
        holders[box].append(ordinal)
    at = {device: ordinal for ordinal, device in enumerate(move.source_devices)}
    sent = [0] * len(move.source_boxes)
    found: dict[tuple[Box, int], list[int]] = defaultdict(list)
    for target, (device, wanted) in enumerate(
        zip(move.target_devices, move.target_boxes, strict=True)
    ):
        for held, ordinals in holders.items():
            shared = held.intersect(wanted)
            if shared is None:
                continue
            local = at.get(device)
            if local in ordinals:
                source = local
            else:
                source = min(ordinals, key=lambda o: (sent[o], o))
                sent[source] += shared.size
            found[shared, source].append(target)
    return tuple(
        Transfer(source, tuple(targets), box)
        for (box, source), targets in sorted(
            found.items(), key=lambda item: (item[1][0], item[0][0].start)
        )
    )


@cached(8192)
def senders(move: ShardingChange) -> tuple[int, ...]:
    """For each target device of a relabelling, the number of a source device with its shard."""
    return tuple(
        next(p.source for p in transfers(move) if target in p.targets)
        for target in range(len(move.target_boxes))
    )


@cached(8192)
def traffic(move: ShardingChange) -> Traffic:
    """Return the bytes that ``move`` sends over each kind of link."""
    same = cross = 0
    if move.is_empty:
        return Traffic()
    for piece in transfers(move):
        source = move.source_devices[piece.source]
        num_bytes = piece.box.size * move.dtype.itemsize
        for target in piece.targets:
            if move.target_devices[target] == source:
                same += num_bytes
            else:
                cross += num_bytes
    return Traffic(same, cross)


def stays(move: ShardingChange) -> bool:
    """Whether every target device, of any process, already holds its box."""
    held = all_device_boxes(move.source, move.shape)
    return all(held.get(d) == b for d, b in all_device_boxes(move.target, move.shape).items())


def is_relabelling(move: ShardingChange) -> bool:
    """Whether every target shard equals some source shard, so that nothing is cut."""
    return set(move.target_boxes) <= set(move.source_boxes)


def is_contiguous(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether ``box`` is one run of a row-major array of ``shape``.

    >>> is_contiguous(Box((2, 0), (4, 8)), (4, 8)), is_contiguous(Box((0, 4), (4, 8)), (4, 8))
    (True, False)
    """
    inner = True  # every dim inside this one is whole
    for start, stop, n in reversed(list(zip(box.start, box.stop, shape, strict=True))):
        if not inner and stop - start != 1:
            return False
        inner = inner and (start, stop) == (0, n)
    return True


def num_bytes(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> int:
    """Bytes of an array in memory; sub-byte elements occupy a byte each."""
    return prod(shape) * dtype.itemsize


# --- Bitcasts: programs move narrow floats as integers, because XLA may widen floats

_NUMBER = re.compile(r"\d+")


def bits_of(dtype: np.dtype[np.generic]) -> int:
    """Bits of one element, from the name of its dtype.

    >>> bits_of(np.dtype("bfloat16")), bits_of(np.dtype("int4"))  # NumPy gives int4 a byte
    (16, 4)
    """
    digits = _NUMBER.search(dtype.name)
    return int(digits[0]) if digits else 8 * dtype.itemsize


def is_narrow_float(dtype: np.dtype[np.generic]) -> bool:
    """Whether elements are floats of 8 or 16 bits.

    >>> is_narrow_float(np.dtype("float16")), is_narrow_float(np.dtype("int8"))
    (True, False)
    """
    return bool(jnp.issubdtype(dtype, jnp.floating)) and bits_of(dtype) in (8, 16)


def is_carried(dtype: np.dtype[np.generic]) -> bool:
    """Whether programs use another dtype: narrow floats, and integers below four bits.

    >>> is_carried(np.dtype("bfloat16")), is_carried(np.dtype("int2")), is_carried(np.dtype("int4"))
    (True, True, False)
    """
    return is_narrow_float(dtype) or bits_of(dtype) < 4


def as_bits(array: jax.Array) -> jax.Array:
    """Return ``array`` in the dtype that programs move; itself if that is its own."""
    if not is_carried(array.dtype):
        return array
    if not is_narrow_float(array.dtype):
        return array.astype("int8" if jnp.issubdtype(array.dtype, jnp.signedinteger) else "uint8")
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def from_bits(array: jax.Array, dtype: np.dtype[np.generic]) -> jax.Array:
    """Invert `as_bits`."""
    if array.dtype == dtype:
        return array
    if not is_narrow_float(dtype):
        return array.astype(dtype)
    return jax.lax.bitcast_convert_type(array, dtype)


# --- Single-device shards of arrays, without host copies


def data_of(array: jax.Array) -> list[jax.Array]:
    """Return the shards of ``array``, one per device, in the order of its sharding's devices."""
    return [shard.data for shard in array.addressable_shards]


def relabelled(array: jax.Array, sharding: Sharding) -> jax.Array:
    """Return the same shards under another sharding with the same box on every device.

    The result aliases ``array``: deleting one deletes both.
    """
    if array.sharding == sharding:
        return array
    return jax.make_array_from_single_device_arrays(
        array.shape, sharding, data_of(array), dtype=array.dtype
    )


def from_shards(data: Sequence[jax.Array], sharding: Sharding, shape: tuple[int, ...]) -> jax.Array:
    """Return an array of ``shape`` with the shards ``data``, copied to their devices.

    A shard that is already on its device is aliased. One call for all devices: a call for each
    shard would cost more than the copies of small arrays.
    """
    devices = list(device_boxes(sharding, shape))
    kind = sharding.memory_kind
    # make_array_from_callback would copy the first replica's shard to all, ignoring their own
    replicated = sharding.is_fully_replicated and len(devices) > 1
    if replicated or any(x.sharding.memory_kind != kind for x in data):
        places = [SingleDeviceSharding(d, memory_kind=kind) for d in devices]
        data = jax.device_put(list(data), places)
        return jax.make_array_from_single_device_arrays(shape, sharding, data)
    left = iter(data)
    return jax.make_array_from_callback(shape, sharding, lambda _: next(left))


@cached(8192)
def shared_shards(move: ShardingChange) -> tuple[bool, ...]:
    """For each source shard, whether the target may alias it: same device and box."""
    if memory_kind_of(move.source) != memory_kind_of(move.target):
        return (False,) * len(move.source_boxes)
    wanted = device_boxes(move.target, move.shape)
    held = device_boxes(move.source, move.shape)
    return tuple(wanted.get(device) == box for device, box in held.items())


def as_unshared(array: jax.Array, move: ShardingChange) -> jax.Array:
    """Return ``array`` with copies of all shards that the target could alias."""
    data = data_of(array)
    shared = [n for n, is_shared in enumerate(shared_shards(move)) if is_shared]
    if not shared:
        return array
    places = [data[n].sharding for n in shared]
    copies = jax.device_put([data[n] for n in shared], places, may_alias=False)
    for n, copy in zip(shared, copies, strict=True):
        data[n] = copy
    return jax.make_array_from_single_device_arrays(
        array.shape, array.sharding, data, dtype=array.dtype
    )


def memory_kind_of(sharding: Sharding) -> str:
    """Return the memory kind of ``sharding``, by default that of its devices."""
    device = next(iter(sharding.device_set))
    return sharding.memory_kind or default_memory_kind(device)


def default_memory_kind(device: jax.Device) -> str:
    """Return the memory kind of the arguments of programs on ``device``."""
    return str(device.default_memory().kind)


def check_alive(name: str, array: Any) -> None:
    """Raise if an array was deleted.

    Raises:
        LayoutError: it was donated or deleted.
    """
    if isinstance(array, jax.Array) and array.is_deleted():
        raise LayoutError(
            f"{name or 'the array'}: it was donated or deleted. Use the result of the earlier "
            "call, or call it with donate=False."
        )


_Memory = tuple[jax.Device, int]


class DonatedShards:
    """Donated shards that are not yet freed."""

    def __init__(self, arrays: Sequence[jax.Array]) -> None:
        self._shards = [[(_memory(shard), shard) for shard in data_of(x)] for x in arrays]
        self._needed: dict[_Memory, list[jax.Array]] = defaultdict(list)
        for shards in self._shards:
            for memory, shard in shards:
                self._needed[memory].append(shard)
        self._num_moved: dict[_Memory, int] = defaultdict(int)
        self._kept: set[_Memory] = set()

    def moved(self, n: int, move: ShardingChange) -> None:
        """Free the shards of array ``n``, unless another array or its target may alias them."""
        for (memory, _), is_shared in zip(self._shards[n], shared_shards(move), strict=True):
            self._num_moved[memory] += 1
            if is_shared:
                self._kept.add(memory)
            holders = self._needed[memory]
            if self._num_moved[memory] == len(holders) and memory not in self._kept:
                for holder in holders:
                    holder.delete()
        self._shards[n] = []


def _memory(shard: jax.Array) -> _Memory:
    (device,) = shard.devices()
    return device, shard.unsafe_buffer_pointer()
