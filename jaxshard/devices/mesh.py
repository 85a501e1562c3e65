"""Meshes from strategies, ``NamedSharding`` from placements, and layouts from arrays.

Rank ``r`` of a layout is ``devices[r]``; a pipeline stage is the sub-mesh of its ranks.

    dp1mp2pp2 on 4 devices      stage 0   Mesh([0 1])      stage 1   Mesh([2 3])

This module knows no files and moves no bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from ..core.layout import Axes, Layout, Placement, Strategy
from ..core.runtime import cached
from ..errors import LayoutError, NotFoundError, did_you_mean, format_list

#: The axis that is added for a tensor held by several stages; its copies are replicas over it.
STAGE_AXIS = "stage"

_SPLIT = ("TPU v5 lite", "TPU v5e")  # whose tori jax.make_mesh splits to fit an axis


def rank_devices(
    strategy: Strategy, devices: Sequence[jax.Device] | None = None
) -> tuple[jax.Device, ...]:
    """The device of each rank of ``strategy``.

    Devices given are taken in the order given. Without them, the fastest mesh axes are
    put on the best connected devices, as ``jax.make_mesh`` does.

    Raises:
        LayoutError: there are fewer devices than ranks, or one is there twice.
    """
    if devices is not None:
        _check_enough(str(strategy), strategy.num_ranks, devices)
        return _distinct(devices[: strategy.num_ranks])
    found = jax.devices()
    _check_enough(str(strategy), strategy.num_ranks, found)
    return _well_connected(found, strategy.pp, strategy.stage_axes)


def named_sharding(name: str, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> NamedSharding:
    """The sharding of the array ``name``.

    Raises:
        LayoutError: the spec does not fit the mesh.
    """
    try:
        return NamedSharding(mesh, spec)
    except ValueError as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise LayoutError(
            f"{name}: {spec} does not fit a mesh of {dict(mesh.shape)}: {why}."
        ) from None


def _distinct(devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
    twice = [d for d, n in Counter(devices).items() if n > 1]
    if twice:
        raise LayoutError(f"{twice[0]} is given for several ranks; each needs a device of its own.")
    return tuple(devices)


def layout_devices(layout: Layout) -> tuple[jax.Device, ...]:
    """The device of each rank of ``layout``: those that `rank_devices` gives its strategy.

    A layout that was put together by hand tells no strategy; its ranks count along
    ``jax.devices()``.
    """
    found = jax.devices()
    if not layout.stage_axes or layout.num_ranks > len(found):
        return tuple(found)
    num_stages = layout.num_ranks // prod(n for _, n in layout.stage_axes)
    return _well_connected(found, num_stages, layout.stage_axes)


def _well_connected(
    devices: Sequence[jax.Device], num_stages: int, axes: Axes
) -> tuple[jax.Device, ...]:
    """As many devices as there are ranks, the fastest axis along the best connections."""
    sizes = (num_stages, *(n for _, n in axes))
    chosen = devices[: prod(sizes)]
    if chosen[0].platform == "cpu":  # nothing to choose: they share one memory
        return tuple(chosen)
    split = chosen[0].device_kind in _SPLIT
    grid = mesh_utils.create_device_mesh(sizes, chosen, allow_split_physical_axes=split)
    return tuple(grid.flat)


def mesh(strategy: str | Strategy, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a strategy without pipeline stages.

    Raises:
        LayoutError: there are fewer devices than ranks, or several stages.
    """
    strategy = Strategy.of(strategy)
    if strategy.pp > 1:
        raise LayoutError(
            f"{strategy}: {strategy.pp} pipeline stages are {strategy.pp} meshes, not one. "
            "Use stage_meshes."
        )
    return stage_meshes(strategy, devices)[0]


def stage_meshes(
    strategy: str | Strategy, devices: Sequence[jax.Device] | None = None
) -> tuple[Mesh, ...]:
    """The mesh of each pipeline stage; they share no device.

    Raises:
        LayoutError: there are fewer devices than ranks.
    """
    strategy = Strategy.of(strategy)
    ranks = rank_devices(strategy, devices)
    per = strategy.stage_ranks
    return tuple(
        _mesh(strategy.stage_axes, ranks[stage * per : (stage + 1) * per])
        for stage in range(strategy.pp)
    )


def sharding(
    placement: Placement | Sequence[Placement], devices: Sequence[jax.Device] | None = None
) -> NamedSharding:
    """A placement on ``devices``, where ``devices[r]`` is rank ``r``.

    A tensor placed alike in several stages (a tied embedding) becomes one array over all
    their devices, with one more mesh axis, ``stage``, over which it is replicated.

    Raises:
        LayoutError: a rank has no device, or the stages hold the tensor in different ways.
    """
    found = jax.devices() if devices is None else devices
    several = (placement,) if isinstance(placement, Placement) else tuple(placement)
    _check_enough("the layout", max(p.ranks.stop for p in several), found)
    first = several[0]
    if any((p.axes, p.spec) != (first.axes, first.spec) for p in several):
        raise LayoutError(
            "a tensor is held in different ways by several stages: "
            f"{format_list(map(str, several))}. One array has one spec; give it the same in each "
            "stage."
        )
    stages = () if len(several) == 1 else ((STAGE_AXIS, len(several)),)
    ranks = tuple(found[r] for p in several for r in p.ranks)
    return NamedSharding(_mesh((*stages, *first.axes), ranks), partition_spec(first))


def shardings(
    layout: Layout,
    devices: Sequence[jax.Device] | None = None,
    names: Iterable[str] | None = None,
) -> Mapping[str, NamedSharding]:
    """The sharding of each tensor of ``layout``, or of ``names`` alone.

    Raises:
        LayoutError: as ``sharding``.
        NotFoundError: the layout has no such name.
    """
    chosen = list(layout.placements) if names is None else list(names)
    missing = [name for name in chosen if not layout.placements.get(name)]
    if missing:
        raise NotFoundError(
            f"the layout places no tensor {format_list(missing)}."
            f"{did_you_mean(missing[0], layout.placements)} Add a rule for each."
        )
    ranks = layout_devices(layout) if devices is None else devices
    return {name: sharding(layout.placements[name], ranks) for name in chosen}


def partition_spec(placement: Placement) -> PartitionSpec:
    """The spec of ``placement`` in JAX's words."""
    return PartitionSpec(*(axes or None for axes in placement.spec))


def placement_of(named: NamedSharding) -> Placement:
    """A sharding in plain integers; ranks count along its own mesh.

    Raises:
        LayoutError: a dim is left for the compiler to decide.
    """
    spec = []
    for entry in named.spec:
        if entry is PartitionSpec.UNCONSTRAINED:
            raise LayoutError(f"{named.spec}: every dim must be decided, or be None.")
        spec.append(() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry))
    return Placement(tuple(named.mesh.shape.items()), tuple(spec))


@cached(1024)
def _mesh(axes: Axes, devices: tuple[jax.Device, ...]) -> Mesh:
    sizes = tuple(n for _, n in axes)
    names = tuple(a for a, _ in axes)
    grid = np.array(devices[: prod(sizes)], dtype=object).reshape(sizes)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def _check_enough(subject: str, num_ranks: int, devices: Sequence[jax.Device]) -> None:
    if num_ranks > len(devices):
        raise LayoutError(
            f"{subject} needs {num_ranks} devices; there are {len(devices)}. Ask for fewer ranks"
            + (
                f", or start with JAX_NUM_CPU_DEVICES={num_ranks}."
                if devices and devices[0].platform == "cpu"
                else "."
            )
        )


# --- Array layouts: which rank holds which box, read off the arrays as they lie on the devices

_Devices = tuple[jax.Device, ...]
_Array = jax.Array | NDArray[np.generic]


def layout_of(arrays: Mapping[str, _Array]) -> Layout:
    """The layout in which ``arrays`` lie.

    Raises:
        LayoutError: their meshes overlap without one holding the others.
    """
    meshes = {name: _devices(array) for name, array in arrays.items()}
    ranks = _ranks(set(meshes.values()))
    cut = {
        name: _placements(name, array, meshes[name], ranks)
        for name, array in arrays.items()
        if meshes[name]
    }
    stage = _stage_ranks(len(ranks), [p for placed in cut.values() for p in placed])
    placements = {}
    for name in arrays:
        placed = cut.get(name, (Placement((("all", len(ranks)),)),))
        placements[name] = tuple(one for p in placed for one in _by_stages(p, stage))
    return Layout(len(ranks), placements)


def _stage_ranks(num_ranks: int, placements: Collection[Placement]) -> int:
    """The ranks of a stage: as few as an array lies on, if what lies on more is whole there."""
    stage = min((p.num_ranks for p in placements), default=num_ranks)
    fits = all(
        p.first_rank % stage == 0
        and p.num_ranks % stage == 0
        and (p.num_ranks == stage or not any(p.spec))
        for p in placements
    )
    return stage if fits and num_ranks % stage == 0 else num_ranks


def _by_stages(placement: Placement, stage: int) -> tuple[Placement, ...]:
    """Return one placement per stage for a tensor replicated on several, as in strategy files."""
    if placement.num_ranks <= stage:
        return (placement,)
    firsts = range(placement.first_rank, placement.ranks.stop, stage)
    return tuple(Placement((("all", stage),), (), first) for first in firsts)


def rank_devices_of(arrays: Mapping[str, _Array]) -> _Devices:
    """The device that is each rank of ``layout_of(arrays)``.

    Raises:
        LayoutError: as ``layout_of``.
    """
    return _ranks({_devices(array) for array in arrays.values()})


def _devices(array: _Array) -> _Devices:
    """The devices of an array's mesh in order; none where it has no mesh of several."""
    if not isinstance(array, jax.Array):
        return ()
    named = array.sharding
    if isinstance(named, NamedSharding):
        found = tuple(named.mesh.devices.flat)
        return found if len(found) > 1 else ()
    if len(named.device_set) > 1 and not named.is_fully_replicated:
        raise LayoutError(
            f"an array of shape {array.shape} has a {type(named).__name__} (expected a "
            "NamedSharding). Reshard it to a mesh."
        )
    return ()


def _ranks(meshes: Iterable[_Devices]) -> _Devices:
    """Return the device of each rank; stages of equal size are ordered by device id."""
    found = sorted((m for m in meshes if m), key=lambda m: (-len(m), [d.id for d in m]))
    if not found:
        return (jax.devices()[0],)
    ranks: _Devices = ()
    for mesh in found:
        if set(mesh) & set(ranks):
            if not set(mesh) <= set(ranks):
                raise LayoutError(
                    f"the meshes of the arrays overlap: {len(mesh)} devices, of which "
                    f"{len(set(mesh) - set(ranks))} are not among the other {len(ranks)}. Pass "
                    "strategy=, or put all arrays on one mesh or on stages of it."
                )
        else:
            ranks += mesh
    return ranks


def _placements(name: str, array: _Array, mesh: _Devices, ranks: _Devices) -> tuple[Placement, ...]:
    assert isinstance(array, jax.Array)
    placement = placement_of(array.sharding)  # type: ignore[arg-type]
    whole = Placement(placement.axes, placement.spec)
    axis, count = placement.axes[0]
    used = {a for axes in placement.spec for a in axes}
    first = _found_at(mesh, ranks)
    if axis == STAGE_AXIS and axis not in used:
        per = len(mesh) // count
        firsts = [_found_at(mesh[i * per : (i + 1) * per], ranks) for i in range(count)]
        if all(f is not None for f in firsts):
            stage = replace(whole, axes=placement.axes[1:])
            return tuple(replace(stage, first_rank=f) for f in firsts if f is not None)
    if first is None:
        raise LayoutError(
            f"{name}: its {len(mesh)} devices are not consecutive among the {len(ranks)} ranks. "
            "Pass strategy=, or put it on the mesh of the other arrays."
        )
    return (replace(whole, first_rank=first),)


def _found_at(mesh: _Devices, ranks: _Devices) -> int | None:
    """Return the rank of the first device of ``mesh``; None if they are not consecutive."""
    for first in range(len(ranks) - len(mesh) + 1):
        if ranks[first : first + len(mesh)] == mesh:
            return first
    return None
