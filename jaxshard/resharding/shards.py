"""Single-device shards of arrays, without host copies."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from ..core.cache import cached
from .geometry import Move, device_boxes


def data_of(array: jax.Array) -> list[jax.Array]:
    """The shards of ``array``, one per device, in the order of its sharding's devices."""
    return [shard.data for shard in array.addressable_shards]


def relabelled(array: jax.Array, sharding: Sharding) -> jax.Array:
    """The same shards under another sharding that gives every device the same box.

    The result shares its memory with ``array``: deleting one deletes both.
    """
    if array.sharding == sharding:
        return array
    return jax.make_array_from_single_device_arrays(
        array.shape, sharding, data_of(array), dtype=array.dtype
    )


def gathered_from(
    data: Sequence[jax.Array], sharding: Sharding, shape: tuple[int, ...]
) -> jax.Array:
    """An array of ``shape`` whose shards are ``data``, each copied to its device if not there.

    One call for all devices, which is what makes it cheap; a shard already on its device is shared.
    """
    devices = list(device_boxes(sharding, shape))
    kind = sharding.memory_kind
    # the one call would copy to every replica the first one's shard, their own notwithstanding
    replicated = sharding.is_fully_replicated and len(devices) > 1
    if replicated or any(x.sharding.memory_kind != kind for x in data):
        places = [SingleDeviceSharding(d, memory_kind=kind) for d in devices]
        data = jax.device_put(list(data), places)
        return jax.make_array_from_single_device_arrays(shape, sharding, data)
    left = iter(data)
    return jax.make_array_from_callback(shape, sharding, lambda _: next(left))


@cached(8192)
def shared_shards(move: Move) -> tuple[bool, ...]:
    """For each source shard, whether the target wants it where it is: it may hold its memory."""
    if memory_kind_of(move.source) != memory_kind_of(move.target):
        return (False,) * len(move.source_boxes)
    wanted = device_boxes(move.target, move.shape)
    held = device_boxes(move.source, move.shape)
    return tuple(wanted.get(device) == box for device, box in held.items())


def apart(array: jax.Array, move: Move) -> jax.Array:
    """``array`` with copies in place of all shards that the target could share with it."""
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
    """The memory that ``sharding`` puts arrays in; where it says nothing, the devices' own."""
    device = next(iter(sharding.device_set))
    return sharding.memory_kind or default_memory_kind(device)


def default_memory_kind(device: jax.Device) -> str:
    """The memory in which programs on ``device`` find their arguments."""
    return str(device.default_memory().kind)
