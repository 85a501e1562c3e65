"""Copying device arrays to host memory.

    CPU     NumPy looks at the memory where it is
    GPUs    into pinned memory, which the device writes by itself, and NumPy looks at that
    others  as NumPy asks JAX for it

A GPU writes to memory that is not pinned at a fortieth of the speed (docs/decisions/033).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from numpy.typing import NDArray

_PINNED = "pinned_host"


def is_on_host(shard: jax.Array) -> bool:
    """Whether the host sees the memory of ``shard`` as it sees its own."""
    return _are_hosts(shard.sharding)


@lru_cache(maxsize=1024)
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
