"""Rules on a mesh of the caller's own: its axes are found by what they are called.

    Mesh("data" 2, "model" 4)  with the rule  "mp,-"   →   PartitionSpec("model", None)

What lies on all of the mesh is sharded over that very mesh; what lies on a part of it (a
pipeline stage, the ranks of an expert) over a sub-mesh with the axes of a strategy.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..catalog import Catalog
from ..devices import sharding
from ..errors import LayoutError, nearest
from ..layout import Layout, Placement
from ..rules import Rules
from ..strategy import Strategy
from ..targets import lay_out_for

#: What an axis may be called, and what it is; ``dp`` and ``edp`` are both replicas.
AXIS_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("dp", "data", "replica", "edp"), "dp"),
    **dict.fromkeys(("mp", "tp", "model", "tensor"), "mp"),
    **dict.fromkeys(("ep", "expert"), "ep"),
    **dict.fromkeys(("cp", "context"), "cp"),
    **dict.fromkeys(("pp", "stage", "pipe"), "pp"),
}
_ORDER = ("pp", "ep", "dp", "cp", "mp")  # slowest first, as ranks are numbered


def mesh_shardings(
    catalog: Catalog, mesh: Mesh, rules: Rules | None
) -> tuple[Layout, tuple[jax.Device, ...], dict[str, NamedSharding]]:
    """The layout of ``catalog`` by the rules, its ranks, and the sharding of every tensor.

    Raises:
        LayoutError: the rules do not know an axis, or a tensor does not fit.
    """
    called = _roles(mesh)
    size = {role: mesh.shape[axis] for role, axis in called.items()}
    ep = size.get("ep", 1)
    strategy = Strategy(
        dp=size.get("dp", 1) * ep,
        mp=size.get("mp", 1),
        pp=size.get("pp", 1),
        ep=ep,
        cp=size.get("cp", 1),
    )
    layout = lay_out_for(catalog, strategy, rules)
    ranks = _ranks(mesh, called)
    found: dict[tuple[Placement, ...], NamedSharding] = {}
    for placements in layout.placements.values():
        if placements not in found:
            found[placements] = _on(mesh, called, placements, ranks)
    return layout, ranks, {n: found[placed] for n, placed in layout.placements.items()}


def _roles(mesh: Mesh) -> dict[str, str]:
    """What each axis is, and what the mesh calls it."""
    called: dict[str, str] = {}
    for axis in mesh.axis_names:
        role = AXIS_NAMES.get(str(axis).lower())
        if role is None or role in called:
            raise LayoutError(
                f"axis {axis!r} of the mesh {dict(mesh.shape)} "
                + (f"is {role} like {called[role]!r}" if role else "is not known to the rules")
                + f".{'' if role else nearest(str(axis), AXIS_NAMES)} Call it one of "
                f"{', '.join(AXIS_NAMES)}, or give a sharding for each name."
            )
        called[role] = axis
    return called


def _ranks(mesh: Mesh, called: Mapping[str, str]) -> tuple[jax.Device, ...]:
    """The mesh's devices in the order of a strategy's ranks."""
    order = [mesh.axis_names.index(called[role]) for role in _ORDER if role in called]
    return tuple(np.transpose(mesh.devices, order).flat)


def _on(
    mesh: Mesh,
    called: Mapping[str, str],
    placements: tuple[Placement, ...],
    ranks: tuple[jax.Device, ...],
) -> NamedSharding:
    first = placements[0]
    if len(placements) > 1 or first.num_ranks < mesh.size:
        return sharding(placements, ranks)
    mesh_axis = {**called, "edp": called.get("dp", "dp")}
    return NamedSharding(
        mesh, PartitionSpec(*(tuple(mesh_axis[a] for a in axes) or None for axes in first.spec))
    )
