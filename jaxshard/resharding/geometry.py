"""Geometry of one move between two shardings, in boxes.

    source  |--0--|--1--|--2--|--3--|     four devices
    target  |----a----|----b---|          two
    pieces  |--0a-|-1a|-2b-|--3b-|        each inside one source shard and one target shard

Names do not matter here: every question is asked of a `Move` and answered once.
Nothing here touches a device's memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from ..core.box import Box
from ..core.cache import cached


@dataclass(frozen=True, slots=True)
class Move:
    """An array of ``shape`` and ``dtype``, to be taken from ``source`` to ``target``."""

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
        """The box that each target device shall hold."""
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
        """Bytes of the larger of the two: what every bound on memory is measured against."""
        return max(self.source_shard_bytes, self.target_shard_bytes)

    @property
    def processes(self) -> frozenset[int]:
        """The processes whose devices are in the source or the target."""
        devices: set[jax.Device] = {*self.source.device_set, *self.target.device_set}
        return frozenset(device.process_index for device in devices)

    @property
    def is_empty(self) -> bool:
        """Whether there is no element to move."""
        return 0 in self.shape


@dataclass(frozen=True, slots=True)
class Piece:
    """The elements ``box`` (global) go from source device number ``source`` to ``targets``."""

    source: int
    targets: tuple[int, ...]
    box: Box


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a move delivers, by the link they take."""

    same_device_bytes: int = 0
    cross_device_bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.same_device_bytes + other.same_device_bytes,
            self.cross_device_bytes + other.cross_device_bytes,
        )


@cached(8192)
def device_boxes(sharding: Sharding, shape: tuple[int, ...]) -> dict[jax.Device, Box]:
    """The box of every device of this process, in the order of such an array's shards."""
    return _boxes(sharding.addressable_devices_indices_map(shape), shape)


@cached(8192)
def all_device_boxes(sharding: Sharding, shape: tuple[int, ...]) -> dict[jax.Device, Box]:
    """The box of every device, those of other processes too."""
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
def pieces(move: Move) -> tuple[Piece, ...]:
    """Every piece once, ordered by where it lies in the target shard.

    A device that already holds the elements it wants sends to itself; the others are
    served by the replica that has sent least so far.
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
        Piece(source, tuple(targets), box)
        for (box, source), targets in sorted(
            found.items(), key=lambda item: (item[1][0], item[0][0].start)
        )
    )


@cached(8192)
def senders(move: Move) -> tuple[int, ...]:
    """For each target device of a relabelling the source device (by number) that has its shard."""
    return tuple(
        next(p.source for p in pieces(move) if target in p.targets)
        for target in range(len(move.target_boxes))
    )


@cached(8192)
def traffic(move: Move) -> Traffic:
    """What the pieces of ``move`` weigh on each kind of link."""
    same = cross = 0
    if move.is_empty:
        return Traffic()
    for piece in pieces(move):
        source = move.source_devices[piece.source]
        num_bytes = piece.box.size * move.dtype.itemsize
        for target in piece.targets:
            if move.target_devices[target] == source:
                same += num_bytes
            else:
                cross += num_bytes
    return Traffic(same, cross)


def stays(move: Move) -> bool:
    """Whether every target device, here or elsewhere, already holds exactly what it shall hold."""
    held = all_device_boxes(move.source, move.shape)
    return all(held.get(d) == b for d, b in all_device_boxes(move.target, move.shape).items())


def is_relabelling(move: Move) -> bool:
    """Whether every target shard is some whole source shard, so that nothing need be cut."""
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
    """Bytes of an array in memory; XLA keeps sub-byte elements one to a byte here."""
    return prod(shape) * dtype.itemsize


# --- Elements as bits: how a program moves values without looking at them

_NUMBER = re.compile(r"\d+")


def bits_of(dtype: np.dtype[np.generic]) -> int:
    """Bits of one element, as its name says.

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
    """Whether elements travel as others: narrow floats, and integers of less than four bits.

    >>> is_carried(np.dtype("bfloat16")), is_carried(np.dtype("int2")), is_carried(np.dtype("int4"))
    (True, True, False)
    """
    return is_narrow_float(dtype) or bits_of(dtype) < 4


def as_bits(array: jax.Array) -> jax.Array:
    """``array`` as what its elements travel as; itself where they travel as they are."""
    if not is_carried(array.dtype):
        return array
    if not is_narrow_float(array.dtype):
        return array.astype("int8" if jnp.issubdtype(array.dtype, jnp.signedinteger) else "uint8")
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def from_bits(array: jax.Array, dtype: np.dtype[np.generic]) -> jax.Array:
    """What `as_bits` was given."""
    if array.dtype == dtype:
        return array
    if not is_narrow_float(dtype):
        return array.astype(dtype)
    return jax.lax.bitcast_convert_type(array, dtype)
