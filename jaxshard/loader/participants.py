"""The processes whose devices take part in one load.

They build these arrays together, so they compare what they opened, and an error of one is raised
in all. Who they are must be known before a checkpoint is opened, which may fail; so it follows
from the target. A load onto devices of one process is that process's own affair.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from ..conversion.targets import SAME
from ..core.layout import Layout
from ..core.strategy import Strategy
from ..devices.mesh import layout_devices, rank_devices
from ..devices.pytree import named_leaves
from ..errors import JaxshardError

Devices = Sequence[jax.Device] | Mesh | None


def sharers(target: Any, devices: Devices) -> frozenset[int]:
    """The processes that ``target`` has devices of; see ``load`` for the arguments.

    Of a function of the name nothing is known before it is called: then there are none.
    """
    try:
        return _processes(_devices(target, devices))
    except JaxshardError:  # which all processes find again, and raise
        return _processes(jax.devices())


def of_shardings(shardings: Iterable[Sharding]) -> frozenset[int]:
    """The processes that have devices of ``shardings``."""
    return _processes(device for named in set(shardings) for device in named.device_set)


def _processes(devices: Iterable[Any]) -> frozenset[int]:
    return frozenset(device.process_index for device in devices)


def _devices(target: Any, devices: Devices) -> Iterable[Any]:
    listed = list(devices.devices.flat) if isinstance(devices, Mesh) else devices
    if isinstance(target, str) and not os.path.exists(target) and target != SAME:
        target = Strategy.parse(target)
    if isinstance(target, Strategy):
        return rank_devices(target, listed)
    if isinstance(target, Layout):
        return (layout_devices(target) if listed is None else listed)[: target.num_ranks]
    if isinstance(target, str | os.PathLike):
        return jax.devices() if listed is None else listed
    if callable(target) and jax.tree_util.all_leaves([target]):
        return ()
    if isinstance(target, Mesh | Sharding | PartitionSpec | jax.Device):
        return _of_place(target, devices)
    leaves = (leaf for _, leaf in named_leaves(target, unique=False)[0])
    places = {place for leaf in leaves if (place := _place(leaf)) is not None}
    return {device for place in places for device in _of_place(place, devices)}


def _place(leaf: Any) -> Any:
    """Where a leaf says that its array is to be; None if it does not."""
    if isinstance(leaf, Sharding | PartitionSpec | jax.Device):
        return leaf
    return getattr(leaf, "sharding", None)


def _of_place(place: Any, devices: Devices) -> Iterable[Any]:
    if isinstance(place, jax.Device):
        return (place,)
    if isinstance(place, Mesh):
        return list(place.devices.flat)
    if isinstance(place, NamedSharding) and not isinstance(place.mesh, Mesh):
        place = place.spec  # its mesh is abstract
    if isinstance(place, PartitionSpec):
        mesh = devices if isinstance(devices, Mesh) else jax.sharding.get_mesh()
        return list(mesh.devices.flat) if isinstance(mesh, Mesh) else ()
    return place.device_set if isinstance(place, Sharding) else ()
