"""Array layouts: which rank holds which box, read off the arrays as they lie on the devices.

Rank ``r`` is the ``r``-th device of the mesh; pipeline stages on meshes of their own are
put one behind the other. What has no mesh (a step counter on one device) every rank has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from .devices import STAGE_AXIS, placement_of
from .errors import LayoutError
from .layout import Layout, Placement

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
    """What lies whole on several stages, stage by stage, as strategy files say it."""
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
            f"an array of shape {array.shape} has a {type(named).__name__}, which does not say how "
            "it lies on a mesh. Give arrays NamedShardings."
        )
    return ()


def _ranks(meshes: Iterable[_Devices]) -> _Devices:
    """The device of each rank; stages, which are equally large, come by their devices' numbers."""
    found = sorted((m for m in meshes if m), key=lambda m: (-len(m), [d.id for d in m]))
    if not found:
        return (jax.devices()[0],)
    ranks: _Devices = ()
    for mesh in found:
        if set(mesh) & set(ranks):
            if not set(mesh) <= set(ranks):
                raise LayoutError(
                    f"arrays lie on meshes that overlap: {len(mesh)} devices of which "
                    f"{len(set(mesh) - set(ranks))} are outside the others' {len(ranks)}. Give "
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
            f"{name} lies on {len(mesh)} devices that are no run of the {len(ranks)} ranks. Give "
            "strategy=, or put it on the mesh of the others."
        )
    return (replace(whole, first_rank=first),)


def _found_at(mesh: _Devices, ranks: _Devices) -> int | None:
    """The rank from which on ``mesh`` lies."""
    for first in range(len(ranks) - len(mesh) + 1):
        if ranks[first : first + len(mesh)] == mesh:
            return first
    return None
