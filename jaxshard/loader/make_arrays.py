"""Arrays from filled buffers: ``make_array_from_single_device_arrays``.

    CPU     the array aliases the buffer; replicas share it
    others  one transfer per distinct shard, then copies from device to device for replicas;
            also on CPU devices with ``copy=True``

An array is always made from the shards of this process's devices: ``device_put`` of a whole
NumPy array compares it with those of all processes.
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
    requests_of,
)
from .shard_memory import (
    as_array,
    check_memory,
    need_of,
)

Shaped = NDArray[np.generic]
Use = Sequence[tuple[jax.Device, int]]


def place(
    request: TensorRequest, memory: Sequence[Bytes], *, adopted: bool = True
) -> list[jax.Array]:
    """Make the arrays of ``request``, whose shards are in ``memory``.

    Transfers are complete at the return. CPU devices alias the memory if ``adopted``; otherwise
    it is unaligned, so they copy it.
    """
    shards = [as_array(m, shard) for m, shard in zip(memory, request.shards, strict=True)]
    arrays = []
    for want, use in zip(request.wants, request.uses, strict=True):
        with keeping_64_bits(want.dtype.itemsize):
            if adopted and adopts([device for device, _ in use]):
                arrays.append(_adopted(request, want, use, shards))
            else:
                arrays.append(_transferred(request, want, use, shards))
    return arrays


def _adopted(
    request: TensorRequest, want: ArrayRequest, use: Use, shards: Sequence[Shaped]
) -> jax.Array:
    """Make an array that aliases ``shards``."""
    shape = request.tensor.shape
    if not use:  # no device is of this process, but the callback would be called
        return jax.make_array_from_single_device_arrays(shape, want.sharding, [], dtype=want.dtype)
    indices = want.sharding.addressable_devices_indices_map(shape)
    at = {_key(indices[device]): shards[number] for device, number in use}
    return jax.make_array_from_callback(
        shape, want.sharding, lambda index: at[_key(index)], dtype=want.dtype
    )


def _transferred(
    request: TensorRequest, want: ArrayRequest, use: Use, shards: Sequence[Shaped]
) -> jax.Array:
    """Transfer each shard to one device, and from there to its replicas."""
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
        request.tensor.shape, want.sharding, parts, dtype=want.dtype
    )
    array.block_until_ready()
    return array


def _key(index: tuple[slice, ...] | None) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((s.start, s.stop) for s in index or ())


def keeping_64_bits(itemsize: int) -> AbstractContextManager[object]:
    """Enable 64-bit dtypes for elements of 8 bytes, which JAX otherwise truncates silently."""
    return jax.enable_x64(True) if itemsize >= 8 else nullcontext()


def check_dtypes(
    requests: Sequence[TensorRequest],
    others: Iterable[tuple[str, np.dtype[np.generic], jax.Device]] = (),
) -> None:
    """Check that the devices support the dtypes, by transferring one element of each.

    Args:
        requests: tensors to load.
        others: names, dtypes and devices of further tensors.

    Raises:
        LayoutError: with the name of a tensor and the error of JAX.
    """
    tried: set[tuple[str, np.dtype[np.generic]]] = set()
    used = (
        (request.tensor.name, want.dtype, device)
        for request in requests
        for want, use in zip(request.wants, request.uses, strict=True)
        for device, _ in use[:1]
    )
    for name, dtype, device in chain(used, others):
        if (device.platform, dtype) in tried:
            continue
        tried.add((device.platform, dtype))
        try:
            with keeping_64_bits(dtype.itemsize):
                made = jax.device_put(np.zeros(1, dtype), device)
        except Exception as error:  # backends raise different types
            raise _lacks(name, dtype, device, str(error)) from error
        if made.dtype != dtype:
            raise _lacks(name, dtype, device, f"it returned {made.dtype}")


def _lacks(name: str, dtype: np.dtype[np.generic], device: jax.Device, why: str) -> LayoutError:
    return LayoutError(
        f"{name}: {device} does not support {dtype.name} ({why.splitlines()[0]}). Load it "
        "with another dtype=, or leave such tensors out with exclude=."
    )


# --- Loading through Orbax's library, which makes the arrays itself


def restored_by_orbax(catalog: Catalog, wants: Sequence[ArrayRequest]) -> bool:
    """Return whether Orbax can make every array: as stored, and requested once."""
    names = [want.tensor.name for want in wants]
    return (
        isinstance(format_of(catalog.format), Orbax)
        and len(set(names)) == len(names)
        and all(catalog.tensors.get(want.tensor.name) is want.tensor for want in wants)
    )


def restore(
    catalog: Catalog, wants: Sequence[ArrayRequest], host_bytes: int | None
) -> tuple[list[jax.Array], Counts]:
    """Load the arrays of ``wants`` with Orbax; also return the read statistics.

    Orbax does not report the bytes that it reads; they are counted as those of the distinct
    shards, with one read per tensor.

    Raises:
        LayoutError: there is not the memory, or a device lacks a dtype.
        FormatError: Orbax cannot read them.
    """
    from ..formats import orbax  # noqa: PLC0415 - a second to import, and rarely needed

    todo = [request for request, _ in requests_of(wants)]
    group_bytes = default_budget() if host_bytes is None else host_bytes
    largest = max((request.tensor.num_bytes for request in todo), default=0)
    check_memory(need_of(todo), max(group_bytes, largest))
    check_dtypes(todo)
    versions = FolderVersions(catalog.root)
    found = orbax.load(catalog, {w.tensor.name: (w.dtype, w.sharding) for w in wants}, group_bytes)
    versions.check()
    num_bytes = sum(
        request.tensor.dtype.bits * shard.box.size // 8
        for request in todo
        for shard in request.shards
    )
    counts = Counts(bytes_needed=num_bytes, bytes_read=num_bytes, num_reads=len(todo))
    return [found[want.tensor.name] for want in wants], counts
