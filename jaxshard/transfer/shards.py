"""The shards of an array as arrays of one device, and back; no bytes move through the host."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from .geometry import device_boxes


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


def default_memory_kind(device: jax.Device) -> str:
    """The memory in which programs on ``device`` find their arguments."""
    return str(device.default_memory().kind)
