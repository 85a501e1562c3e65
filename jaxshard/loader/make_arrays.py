"""Arrays from filled buffers: ``make_array_from_single_device_arrays``.

    CPU     the memory becomes the array's own; replicas share it
    others  one transfer for each distinct shard, replicas copied from device to device;
            the CPU as well, where arrays are to own their memory

Both ways make an array from what each device of this process gets: ``device_put`` of a
whole NumPy array would, on several processes, gather it from all of them to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import jax
import numpy as np
from numpy.typing import NDArray

from ..core.numpy_dtypes import Bytes
from .requests import Job, Want
from .shard_memory import as_array

Shaped = NDArray[np.generic]
Use = Sequence[tuple[jax.Device, int]]


def adopts(devices: Sequence[jax.Device]) -> bool:
    """Whether arrays on ``devices`` can be made of host memory without a copy."""
    return all(device.platform == "cpu" for device in devices)


def is_kept(job: Job, *, adopted: bool = True) -> bool:
    """Whether arrays of ``job`` are made of the memory it is read into."""
    return adopted and any(adopts([device for device, _ in use]) for use in job.uses)


def place(job: Job, memory: Sequence[Bytes], *, adopted: bool = True) -> list[jax.Array]:
    """The arrays of a job whose shards are in ``memory``, one for each want.

    Where host memory is copied to the device, the copy is complete. CPU devices copy it too if
    it is not to be ``adopted``, and lies so that they cannot.
    """
    shards = [as_array(m, shard) for m, shard in zip(memory, job.shards, strict=True)]
    arrays = []
    for want, use in zip(job.wants, job.uses, strict=True):
        with keeping_64_bits(want.dtype.itemsize):
            if adopted and adopts([device for device, _ in use]):
                arrays.append(_adopted(job, want, use, shards))
            else:
                arrays.append(_transferred(job, want, use, shards))
    return arrays


def _adopted(job: Job, want: Want, use: Use, shards: Sequence[Shaped]) -> jax.Array:
    """An array whose memory is that of ``shards``."""
    shape = job.tensor.shape
    if not use:  # all its devices are other processes'; JAX would still ask for a shard
        return jax.make_array_from_single_device_arrays(shape, want.sharding, [], dtype=want.dtype)
    indices = want.sharding.addressable_devices_indices_map(shape)
    at = {_key(indices[device]): shards[number] for device, number in use}
    return jax.make_array_from_callback(
        shape, want.sharding, lambda index: at[_key(index)], dtype=want.dtype
    )


def _transferred(job: Job, want: Want, use: Use, shards: Sequence[Shaped]) -> jax.Array:
    """An array on other devices: host to device once a shard, then between devices."""
    at: dict[int, jax.Device] = {}
    for device, number in use:
        at.setdefault(number, device)
    sent = jax.device_put([shards[number] for number in at], list(at.values()))
    first = dict(zip(at, sent, strict=True))
    parts = [
        first[number] if device == at[number] else jax.device_put(first[number], device)
        for device, number in use
    ]
    array = jax.make_array_from_single_device_arrays(
        job.tensor.shape, want.sharding, parts, dtype=want.dtype
    )
    array.block_until_ready()
    return array


def _key(index: tuple[slice, ...] | None) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((s.start, s.stop) for s in index or ())


def keeping_64_bits(itemsize: int) -> AbstractContextManager[object]:
    """Where JAX leaves 64-bit elements as they are; outside, it cuts them to 32 silently."""
    return jax.enable_x64(True) if itemsize >= 8 else nullcontext()
