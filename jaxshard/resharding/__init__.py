"""Resharding: arrays from one sharding to another, on the devices.

``reshard`` and ``gather`` check the whole request, about all leaves together, before any byte
moves. A `Resharder` does the work; only `gather` to the host passes arrays through host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from ..core.box import Box
from ..core.layout import Layout, check_divides
from ..core.runtime import cached
from ..devices.host_transfer import to_host
from ..devices.mesh import named_sharding, placement_of, shardings
from ..devices.pytree import is_key, keys_of, named_leaves
from ..errors import LayoutError, NotFoundError, did_you_mean, format_list
from .compiled import own_context
from .geometry import Leaf, ShardingChange, all_device_boxes, check_alive, data_of, device_boxes
from .resharder import Resharder, batches_of
from .routes import LeafPlan, ReshardPlan, RoutePolicy

__all__ = ["LeafPlan", "ReshardPlan", "Resharder", "gather", "prepare_reshard", "reshard"]

#: The targets that `reshard` accepts.
Target = Sharding | PartitionSpec | Layout | Mapping[str, Any] | Callable[[str], Any] | Any

_Named = Iterable[tuple[str, Any]]  # leaves with their names


def prepare_reshard(
    tree: Any,
    target: Target,
    *,
    donate: bool = False,
    copy: bool = False,
    device_bytes: int | None = None,
    route: RoutePolicy = "auto",
) -> Resharder:
    """Return a `Resharder` for trees like ``tree``: routes chosen, programs compiled.

    Args:
        tree: arrays, or ``jax.ShapeDtypeStruct``s that have a sharding.
        target: see `reshard`, as for the arguments below.
        donate: see `reshard`.
        copy: see `reshard`. Set it if a training step donates its arrays, because the results of
            the resharder must outlive them.
        device_bytes: see `reshard`.
        route: see `reshard`.

    Raises:
        LayoutError: as `reshard`.
        NotFoundError: as `reshard`.
    """
    named, structure = named_leaves(tree, unique=False)
    return _prepare(named, structure, target, donate, copy, device_bytes, route)


def reshard(
    tree: Any,
    target: Target,
    *,
    donate: bool = False,
    copy: bool = False,
    device_bytes: int | None = None,
    route: RoutePolicy = "auto",
) -> Any:
    """Return the arrays of ``tree`` under other shardings, moved from device to device.

    A shard that is already in place is not copied: as with ``jax.device_put``, source and result
    share its memory, and deleting or donating one deletes the other.

    Args:
        tree: a pytree of ``jax.Array``.
        target: one sharding for all; a tree of them of the same structure; ``{name: sharding}``,
            the name of a nested leaf being its keys joined by dots; a function of that name; or
            a `Layout`, whose ranks are the devices that `devices.mesh.shardings` assigns. In place
            of a sharding, a ``PartitionSpec`` means the array's own mesh, and an array or
            ``ShapeDtypeStruct`` its sharding.
        donate: free each source array as soon as it has been moved.
        copy: share no memory with the sources, so that sources and results are independent.
        device_bytes: maximum bytes in flight on each device beyond sources and targets.
        route: ``"auto"``; ``"device"`` to use an accelerator's routes on the CPU backend too;
            ``"views"`` to require the CPU backend's own.

    Raises:
        LayoutError: a target cannot hold its array, is not on this process's devices, cannot be
            reached within ``device_bytes``, or an array was deleted or donated.
        NotFoundError: the target lacks some arrays.
    """
    named, structure = named_leaves(tree, unique=False)
    for name, x in named:
        check_alive(name, x)
    planned = _prepare(named, structure, target, donate, copy, device_bytes, route)
    return planned.move([x for _, x in named])


def _prepare(
    named: _Named,
    structure: Any,
    target: Target,
    donate: bool,
    copy: bool,
    device_bytes: int | None,
    route: RoutePolicy,
) -> Resharder:
    if donate and copy:
        raise LayoutError(
            "donate=True frees the sources, copy=True keeps them independent. Set one of them."
        )
    leaves = leaves_of(named, structure, target)
    with own_context():
        batches = batches_of(leaves, route, device_bytes)
    return Resharder(
        leaves, structure, batches, donate=donate, copy=copy, device_bytes=device_bytes
    )


# --- Leaves: arrays of a tree and their targets, checked


def leaves_of(named: _Named, structure: Any, target: Target) -> list[Leaf]:
    """Return each of the ``named`` arrays, the leaves of a tree of ``structure``, with its change.

    Raises:
        LayoutError: a leaf is not an array with a sharding, or its target cannot hold it.
        NotFoundError: the target lacks some leaves.
    """
    arrays = [(name or "(the array)", leaf) for name, leaf in named]
    wanted = _per_leaf([name for name, _ in arrays], structure, target)
    return [_leaf(*each, target) for each, target in zip(arrays, wanted, strict=True)]


def sharding_of(name: str, array: Any) -> Sharding:
    """Return the sharding of an array or of its description."""
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, Sharding):
        kind = type(array).__name__
        raise LayoutError(
            f"{name}: a {kind} is on no device. Give jax.Arrays, or jax.ShapeDtypeStructs with a "
            "sharding; jax.device_put puts a NumPy array on a mesh."
        )
    return sharding


def _leaf(name: str, array: Any, wanted: Any) -> Leaf:
    source = sharding_of(name, array)
    target = _as_sharding(name, wanted, source)
    for sharding in (source, target):
        _check_devices(name, sharding)
    shape, dtype = tuple(array.shape), array.dtype
    if not is_key(array):
        _check_shape(name, target, shape)
        move = ShardingChange(shape, np.dtype(dtype), source, target)
        return Leaf(name, move, shape, dtype)
    _check_shape(name, target, shape)
    keys = keys_of(array)
    _check_shape(name, target, keys.data.shape)
    move = ShardingChange(keys.data.shape, np.dtype(keys.data.dtype), source, target)
    return Leaf(name, move, shape, dtype, keys.generator)


def _per_leaf(names: list[str], structure: Any, target: Target) -> list[Any]:
    """Return the target of each leaf, in the form that the caller gave."""
    if isinstance(target, Layout):
        target = shardings(target, names=names)
    if _is_target(target):
        return [target] * len(names)
    given, given_structure = jax.tree_util.tree_flatten(target, is_leaf=_is_target)
    if given_structure == structure:
        return given
    if isinstance(target, Mapping):
        missing = [n for n in names if n not in target]
        if missing:
            raise NotFoundError(
                f"the target has no sharding for {format_list(missing)}."
                f"{did_you_mean(missing[0], map(str, target))}"
            )
        return [target[n] for n in names]
    if isinstance(target, Mesh):
        raise LayoutError(
            f"the target is a mesh, {dict(target.shape)}, without the shardings of the arrays on "
            "it. Give a strategy, such as dp2mp4, or a NamedSharding of it for each array."
        )
    if callable(target):
        return [target(n) for n in names]
    raise LayoutError(
        f"the target is a tree of {len(given)} leaves (expected {len(names)}, as the arrays): "
        f"{given_structure} against {structure}. Give one sharding, a tree of them "
        "of the same structure, {name: sharding}, or a function of the name."
    )


def _is_target(target: Any) -> bool:
    return isinstance(target, Sharding | PartitionSpec | jax.Array | jax.ShapeDtypeStruct)


def _as_sharding(name: str, wanted: Any, source: Sharding) -> Sharding:
    if isinstance(wanted, jax.Array | jax.ShapeDtypeStruct):
        return sharding_of(name, wanted)
    if isinstance(wanted, PartitionSpec):
        if not isinstance(source, NamedSharding):
            raise LayoutError(
                f"{name}: the target {wanted} needs a mesh, and the array has none. "
                "Give NamedSharding(mesh, spec)."
            )
        return named_sharding(name, source.mesh, wanted)
    if isinstance(wanted, Sharding):
        return wanted
    raise LayoutError(
        f"{name}: the target is a {type(wanted).__name__}; give a Sharding or a PartitionSpec."
    )


def _check_devices(name: str, sharding: Sharding) -> None:
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        raise LayoutError(f"{name}: {sharding.mesh} has no devices. Give a Mesh.")
    devices: set[Any] = sharding.device_set
    absent = [device for device in devices if device not in present(device.platform)]
    if absent:
        raise LayoutError(
            f"{name}: {len(absent)} of {len(sharding.device_set)} devices are not here: "
            f"{format_list(sorted(map(str, absent)))}. jax.devices() lists those that are."
        )


@cached(128)
def present(platform: str) -> frozenset[jax.Device]:
    """Return the devices of a platform that JAX has in this job."""
    try:
        return frozenset(jax.devices(platform))
    except RuntimeError:  # described by jax.experimental.topologies, without devices
        return frozenset()


def _check_shape(name: str, sharding: Sharding, shape: tuple[int, ...]) -> None:
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        check_divides(placement_of(sharding), shape, name)
        return
    try:
        sharding.shard_shape(shape)
    except ValueError as e:
        raise LayoutError(f"{name}: shape {shape} does not fit {sharding}: {e}") from e


# --- Gathering whole arrays onto one device, all devices, or the host


def gather(
    tree: Any,
    device: jax.Device | None = None,
    *,
    host: bool = False,
    from_processes: bool = False,
) -> Any:
    """Return the arrays of ``tree`` whole: on one device, on each of their own, or on the host.

    Args:
        tree: a pytree of ``jax.Array``.
        device: device for all arrays; by default each array is replicated on its own devices.
        host: return NumPy arrays, assembled shard by shard, so that no device needs more memory.
        from_processes: with ``host``, fetch shards of other processes too, one array at a time:
            each is first replicated on the devices, and every process returns all arrays.

    Raises:
        LayoutError: both ``device`` and ``host`` are given, ``host`` is given for keys of a random
            generator, or another process has shards that ``host`` needs.
    """
    if host and device is not None:
        raise LayoutError(f"gather: both device={device} and host=True are given. Choose one.")
    named, structure = named_leaves(tree, unique=False)
    if host:
        found = [_on_host(name, x, from_processes=from_processes) for name, x in named]
        return jax.tree_util.tree_unflatten(structure, found)
    if device is not None:
        if not isinstance(device, jax.Device):
            raise LayoutError(
                f"gather: {device!r} is a {type(device).__name__} (expected a device). Give one of "
                "jax.devices()."
            )
        return reshard(tree, SingleDeviceSharding(device))
    whole = [_replicated(x, name or "(the array)") for name, x in named]
    return reshard(tree, jax.tree_util.tree_unflatten(structure, whole))


def _replicated(array: jax.Array, name: str = "") -> NamedSharding:
    source = sharding_of(name, array)
    if isinstance(source, NamedSharding):
        return NamedSharding(source.mesh, PartitionSpec())
    devices = np.array(sorted(source.device_set, key=attrgetter("id")), dtype=object)
    return NamedSharding(Mesh(devices, ("device",)), PartitionSpec())


def _on_host(name: str, array: jax.Array, *, from_processes: bool) -> np.ndarray[Any, Any]:
    sharding_of(name, array)  # refuses values that are on no device
    check_alive(name, array)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise LayoutError(f"{name}: keys have no NumPy dtype. Gather jax.random.key_data(keys).")
    if from_processes:
        # a collective: all processes come to the same decision here
        if not _each_process_holds_all(array):
            array = reshard(array, _in_each_process(array))
    elif not _this_process_holds_all(array):
        raise LayoutError(
            f"{name or 'the array'}: other processes hold parts of it. Save it, or give "
            "from_processes=True in all of them to have each get the whole."
        )
    with own_context():
        return _assembled(array)


def _assembled(array: jax.Array) -> np.ndarray[Any, Any]:
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


def _in_each_process(array: jax.Array) -> NamedSharding:
    """Return a replicated sharding with devices in every process, the array's own if possible."""
    by_process: dict[int, jax.Device] = {}
    for device in (*sorted(array.sharding.device_set, key=attrgetter("id")), *jax.devices()):
        by_process.setdefault(device.process_index, device)
    if set(by_process.values()) <= array.sharding.device_set:
        return _replicated(array)
    ones = np.array([by_process[p] for p in sorted(by_process)], dtype=object)
    return NamedSharding(Mesh(ones, ("process",)), PartitionSpec())


def _this_process_holds_all(array: jax.Array) -> bool:
    here = set(device_boxes(array.sharding, array.shape).values())
    return here >= set(all_device_boxes(array.sharding, array.shape).values())


def _each_process_holds_all(array: jax.Array) -> bool:
    boxes = all_device_boxes(array.sharding, array.shape)
    held: dict[int, set[Box]] = {process: set() for process in range(jax.process_count())}
    for device, box in boxes.items():
        held[device.process_index].add(box)
    return all(found == set(boxes.values()) for found in held.values())
