"""Arrays from filled buffers: ``make_array_from_single_device_arrays``.

    CPU     the memory becomes the array's own; replicas share it
    others  one transfer for each distinct shard, replicas copied from device to device;
            the CPU as well, where arrays are to own their memory

Both ways make an array from what each device of this process gets: ``device_put`` of a
whole NumPy array would, on several processes, gather it from all of them to compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import jax
import numpy as np
from numpy.typing import NDArray

from ..core.catalog import Catalog
from ..core.numpy_dtypes import Bytes
from ..errors import LayoutError
from ..formats.registry import (
    Orbax,
    format_of,
)
from ..storage.local import FolderVersions
from ..storage.resources import (
    Counts,
    default_budget,
)
from .requests import (
    ArrayRequest,
    TensorRequest,
    adopts,
    jobs,
)
from .shard_memory import (
    as_array,
    check_memory,
    need_of,
)

Shaped = NDArray[np.generic]
Use = Sequence[tuple[jax.Device, int]]


def place(job: TensorRequest, memory: Sequence[Bytes], *, adopted: bool = True) -> list[jax.Array]:
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


def _adopted(
    job: TensorRequest, want: ArrayRequest, use: Use, shards: Sequence[Shaped]
) -> jax.Array:
    """An array whose memory is that of ``shards``."""
    shape = job.tensor.shape
    if not use:  # all its devices are other processes'; JAX would still ask for a shard
        return jax.make_array_from_single_device_arrays(shape, want.sharding, [], dtype=want.dtype)
    indices = want.sharding.addressable_devices_indices_map(shape)
    at = {_key(indices[device]): shards[number] for device, number in use}
    return jax.make_array_from_callback(
        shape, want.sharding, lambda index: at[_key(index)], dtype=want.dtype
    )


def _transferred(
    job: TensorRequest, want: ArrayRequest, use: Use, shards: Sequence[Shaped]
) -> jax.Array:
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


def check_dtypes(
    jobs: Sequence[TensorRequest],
    others: Iterable[tuple[str, np.dtype[np.generic], jax.Device]] = (),
) -> None:
    """Refuse dtypes that a device cannot hold, by putting one element there.

    Args:
        jobs: what is loaded.
        others: names, dtypes and devices of what is loaded besides.

    Raises:
        LayoutError: with the names of some tensors, and what JAX says.
    """
    tried: set[tuple[str, np.dtype[np.generic]]] = set()
    used = (
        (job.tensor.name, want.dtype, device)
        for job in jobs
        for want, use in zip(job.wants, job.uses, strict=True)
        for device, _ in use[:1]
    )
    for name, dtype, device in chain(used, others):
        if (device.platform, dtype) in tried:
            continue
        tried.add((device.platform, dtype))
        try:
            with keeping_64_bits(dtype.itemsize):
                made = jax.device_put(np.zeros(1, dtype), device)
        except Exception as error:  # whatever the backend raises, it means no
            raise _lacks(name, dtype, device, str(error)) from error
        if made.dtype != dtype:
            raise _lacks(name, dtype, device, f"it made {made.dtype} of it")


def _lacks(name: str, dtype: np.dtype[np.generic], device: jax.Device, said: str) -> LayoutError:
    return LayoutError(
        f"{name}: {device} does not take {dtype.name} ({said.splitlines()[0]}). Load it "
        "with dtype=, or leave such tensors out with exclude=."
    )


# --- Loading through Orbax's library, which makes the arrays itself


def restored_by_orbax(catalog: Catalog, wants: Sequence[ArrayRequest]) -> bool:
    """Whether Orbax can make every array: each is a tensor as stored, and wanted once."""
    names = [want.tensor.name for want in wants]
    return (
        isinstance(format_of(catalog.format), Orbax)
        and len(set(names)) == len(names)
        and all(catalog.tensors.get(want.tensor.name) is want.tensor for want in wants)
    )


def restore(
    catalog: Catalog, wants: Sequence[ArrayRequest], host_bytes: int | None
) -> tuple[list[jax.Array], Counts]:
    """The arrays of ``wants``, in their order, and what was read.

    Orbax does not tell how many bytes of its files that took; they are counted as those of
    the distinct shards, and a request for each tensor.

    Raises:
        LayoutError: there is not the memory, or a device lacks a dtype.
        FormatError: Orbax cannot read them.
    """
    from ..formats import orbax  # noqa: PLC0415 - a second to import, and rarely needed

    todo = [job for job, _ in jobs(wants)]
    group_bytes = default_budget() if host_bytes is None else host_bytes
    largest = max((job.tensor.num_bytes for job in todo), default=0)
    check_memory(need_of(todo), max(group_bytes, largest))
    check_dtypes(todo)
    versions = FolderVersions(catalog.root)
    found = orbax.load(catalog, {w.tensor.name: (w.dtype, w.sharding) for w in wants}, group_bytes)
    versions.check()
    num_bytes = sum(
        job.tensor.dtype.bits * shard.box.size // 8 for job in todo for shard in job.shards
    )
    counts = Counts(bytes_needed=num_bytes, bytes_read=num_bytes, num_reads=len(todo))
    return [found[want.tensor.name] for want in wants], counts
