"""Gathering whole arrays onto one device, all devices, or the host."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ..core.box import Box
from ..devices.host_transfer import to_host
from ..devices.pytree import named_leaves
from ..errors import LayoutError
from .geometry import all_device_boxes, device_boxes
from .leaves import check_alive, sharding_of
from .programs import own_context
from .resharder import reshard
from .shards import data_of


def gather(
    tree: Any,
    device: jax.Device | None = None,
    *,
    host: bool = False,
    from_processes: bool = False,
) -> Any:
    """The arrays of ``tree`` whole: on one device, on each of their own, or on the host.

    Args:
        tree: a pytree of ``jax.Array``.
        device: put every array on this one; by default each becomes a replica on every device
            it is on.
        host: return NumPy arrays, put together shard by shard, so that no device ever
            holds more than it does now.
        from_processes: for ``host``, get what only other processes hold from them, one array at a
            time: each becomes whole on the devices first, and every process gets all of them.

    Raises:
        LayoutError: both are asked for, keys of a random generator are to go to the host, or
            another process holds what ``host`` needs.
    """
    if host and device is not None:
        raise LayoutError(f"gather: both {device} and the host were asked for. Choose one.")
    if host:
        named, structure = named_leaves(tree, unique=False)
        found = [_on_host(name, x, from_processes=from_processes) for name, x in named]
        return jax.tree_util.tree_unflatten(structure, found)
    if device is not None:
        if not isinstance(device, jax.Device):
            raise LayoutError(
                f"gather: {device!r} is a {type(device).__name__}, no device. Give one of "
                "jax.devices()."
            )
        return reshard(tree, SingleDeviceSharding(device))
    named, structure = named_leaves(tree, unique=False)
    whole = [_replicated(x, name or "(the array)") for name, x in named]
    return reshard(tree, jax.tree_util.tree_unflatten(structure, whole))


def _replicated(array: jax.Array, name: str = "") -> NamedSharding:
    source = sharding_of(name, array)
    if isinstance(source, NamedSharding):
        return NamedSharding(source.mesh, PartitionSpec())
    devices = np.array(sorted(source.device_set, key=attrgetter("id")), dtype=object)
    return NamedSharding(Mesh(devices, ("device",)), PartitionSpec())


def _on_host(name: str, array: jax.Array, *, from_processes: bool) -> np.ndarray[Any, Any]:
    sharding_of(name, array)  # refuses what is on no device
    check_alive(name, array)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise LayoutError(f"{name}: keys have no NumPy dtype. Gather jax.random.key_data(keys).")
    if from_processes:
        if not _is_all_everywhere(array):  # said alike in all processes, which then all move it
            array = reshard(array, _everywhere(array))
    elif not _is_all_here(array):
        raise LayoutError(
            f"{name or 'the array'}: other processes hold parts of it. Save it, or give "
            "from_processes=True in all of them to have each get the whole."
        )
    with own_context():
        return _put_together(array)


def _put_together(array: jax.Array) -> np.ndarray[Any, Any]:
    whole = np.empty(array.shape, array.dtype)
    filled = set()
    for box, shard in zip(
        device_boxes(array.sharding, array.shape).values(), data_of(array), strict=True
    ):
        if box not in filled:
            filled.add(box)
            whole[box.slices] = to_host([shard])[0]
    assert sum(box.size for box in filled) == whole.size, "every element is here"
    return whole


def _everywhere(array: jax.Array) -> NamedSharding:
    """``array`` whole in every process: on all its devices, if it has some in each; or on one."""
    by_process: dict[int, jax.Device] = {}
    for device in (*sorted(array.sharding.device_set, key=attrgetter("id")), *jax.devices()):
        by_process.setdefault(device.process_index, device)
    if set(by_process.values()) <= array.sharding.device_set:
        return _replicated(array)
    ones = np.array([by_process[p] for p in sorted(by_process)], dtype=object)
    return NamedSharding(Mesh(ones, ("process",)), PartitionSpec())


def _is_all_here(array: jax.Array) -> bool:
    """Whether this process's devices hold every element."""
    here = set(device_boxes(array.sharding, array.shape).values())
    return here >= set(all_device_boxes(array.sharding, array.shape).values())


def _is_all_everywhere(array: jax.Array) -> bool:
    """Whether the devices of each process hold every element."""
    boxes = all_device_boxes(array.sharding, array.shape)
    held: dict[int, set[Box]] = {process: set() for process in range(jax.process_count())}
    for device, box in boxes.items():
        held[device.process_index].add(box)
    return all(found == set(boxes.values()) for found in held.values())
