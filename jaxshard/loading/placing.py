"""Placing: from filled memory to ``jax.Array``.

    CPU     the memory becomes the array's own; replicas share it
    others  one transfer for each distinct shard, replicas copied from device to device

``device_put`` of a NumPy array to a sharding over several processes would gather it from
all of them to compare; arrays are made from single-device ones instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import jax

from .memory import Bytes, as_array
from .wanted import Job


def adopts(devices: Sequence[jax.Device]) -> bool:
    """Whether arrays on ``devices`` can be made of host memory without a copy."""
    return all(device.platform == "cpu" for device in devices)


def place(job: Job, memory: Sequence[Bytes]) -> list[jax.Array]:
    """The arrays of a job whose shards are in ``memory``, one for each want.

    Where host memory is copied to the device, the copy is complete.
    """
    shards = [as_array(m, shard) for m, shard in zip(memory, job.shards, strict=True)]
    arrays: list[jax.Array] = []
    for want, use in zip(job.wants, job.uses, strict=True):
        with keeping_64_bits(want.dtype.itemsize):
            devices = [device for device, _ in use]
            if adopts(devices):
                parts = jax.device_put([shards[number] for _, number in use], devices)
            else:
                parts = _transferred(shards, use)
            arrays.append(
                jax.make_array_from_single_device_arrays(
                    job.tensor.shape, want.sharding, parts, dtype=want.dtype
                )
            )
    if not all(adopts([device for device, _ in use]) for use in job.uses):
        jax.block_until_ready(arrays)
    return arrays


def _transferred(
    shards: Sequence[object], use: Sequence[tuple[jax.Device, int]]
) -> list[jax.Array]:
    """The single-device arrays of one want: host to device once a shard, then between devices."""
    first: dict[int, jax.Array] = {}
    parts = []
    for device, number in use:
        if number in first:
            parts.append(jax.device_put(first[number], device))
        else:
            parts.append(first.setdefault(number, jax.device_put(shards[number], device)))
    return parts


def keeping_64_bits(itemsize: int) -> AbstractContextManager[object]:
    """Where JAX leaves 64-bit elements as they are; outside, it cuts them to 32 silently."""
    return jax.enable_x64(True) if itemsize == 8 else nullcontext()
