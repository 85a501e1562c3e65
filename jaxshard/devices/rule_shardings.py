"""Shardings by rules: strategies and user meshes for arrays that exist.

Turns "dp4mp2" and the arrays' own names into shardings, by the rules of their family. Moving
them is ``transfer``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..conversion.targets import lay_out_for
from ..core.catalog import Catalog, Model, log_notes
from ..core.layout import Layout, Placement
from ..core.strategy import Strategy
from ..errors import LayoutError, format_list
from ..rules import Rules, layout, rules_for
from ..rules.tensor_dims import Factors, Granule
from .mesh import rank_devices, sharding, shardings
from .pytree import named_leaves


def target_of(
    tree: Any,
    target: Any,
    *,
    devices: Sequence[jax.Device] | None = None,
    rules: Rules | None = None,
) -> Any:
    """``target`` as ``transfer`` takes it: a strategy becomes a sharding for each name.

    Raises:
        LayoutError: the strategy does not fit the arrays, or ``devices``.
    """
    if isinstance(target, str | Strategy):
        target = Strategy.of(target)
        return strategy_shardings(tree, target, devices=devices, rules=rules)
    if devices is not None or rules is not None:
        raise LayoutError(
            f"devices= and rules= are only valid with a strategy, not with {type(target).__name__}."
        )
    return target


def strategy_shardings(
    tree: Any,
    strategy: Strategy,
    *,
    devices: Sequence[jax.Device] | None = None,
    rules: Rules | None = None,
) -> Mapping[str, NamedSharding]:
    """Return the sharding of each leaf of ``tree`` under ``strategy``, by its name.

    A leaf's name is its path joined by dots (see ``pytree``). ``rules`` take precedence over those
    of the family that the names match; without such a family they are the only ones.

    Raises:
        LayoutError: names without a rule, dims that do not divide, too few devices.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(tree)[0]}
    placed = layout(shapes, strategy, _table(list(shapes), rules))
    log_notes(str(strategy), placed.notes)
    return shardings(placed, rank_devices(strategy, devices))


def _table(names: list[str], rules: Rules | None) -> Rules:
    try:
        family = rules_for(Model(), names)
    except LookupError:
        if rules is None:
            raise
        return rules
    return family.override(rules) if rules else family


# --- Rules on a mesh of the caller's own: its axes are found by what they are called

#: What an axis may be called, and what it is; ``dp`` and ``edp`` are both replicas.
AXIS_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("dp", "data", "replica", "edp"), "dp"),
    **dict.fromkeys(("mp", "tp", "model", "tensor"), "mp"),
    **dict.fromkeys(("ep", "expert"), "ep"),
    **dict.fromkeys(("cp", "context"), "cp"),
    **dict.fromkeys(("pp", "stage", "pipe"), "pp"),
    "fsdp": "fsdp",
}
_ORDER = ("pp", "ep", "dp", "fsdp", "cp", "mp")  # slowest first, as ranks are numbered
_MEANINGS = {
    "dp": "replicas",
    "fsdp": "weights split over replicas",
    "mp": "tensor parallel",
    "ep": "expert parallel",
    "cp": "context parallel",
    "pp": "pipeline stages",
}


def mesh_shardings(
    catalog: Catalog, mesh: Mesh, rules: Rules | None
) -> tuple[Layout, tuple[jax.Device, ...], dict[str, NamedSharding]]:
    """The layout of ``catalog`` by the rules, its ranks, and the sharding of every tensor.

    Raises:
        LayoutError: the rules do not know an axis, or a tensor does not fit.
    """
    called = _roles(mesh)
    size = {role: mesh.shape[axis] for role, axis in called.items()}
    ep, fsdp = size.get("ep", 1), size.get("fsdp", 1)
    strategy = Strategy(
        dp=size.get("dp", 1) * fsdp * ep,
        mp=size.get("mp", 1),
        pp=size.get("pp", 1),
        ep=ep,
        cp=size.get("cp", 1),
    )
    layout = lay_out_for(catalog, strategy, rules)
    if fsdp > 1:
        layout = _over_fsdp(catalog, layout, fsdp)
    ranks = _ranks(mesh, called)
    found: dict[tuple[Placement, ...], NamedSharding] = {}
    for placements in layout.placements.values():
        if placements not in found:
            found[placements] = _on(mesh, called, placements, ranks)
    return layout, ranks, {n: found[placed] for n, placed in layout.placements.items()}


def _roles(mesh: Mesh) -> dict[str, str]:
    """What each axis is, and what the mesh calls it; axes of one device are left out."""
    called: dict[str, str] = {}
    for axis in mesh.axis_names:
        if mesh.shape[axis] == 1:
            continue
        role = AXIS_NAMES.get(str(axis).lower())
        if role is None or role in called:
            what = f"is {role} like {called[role]!r}" if role else "is not known to the rules"
            known = (
                f"{meaning} ({', '.join(n for n, r in AXIS_NAMES.items() if r == kind)})"
                for kind, meaning in _MEANINGS.items()
            )
            raise LayoutError(
                f"axis {axis!r} of the mesh {dict(mesh.shape)} {what}. Call each axis by what it "
                f"splits: {', '.join(known)}; or give a sharding for each name."
            )
        called[role] = axis
    return called


def _ranks(mesh: Mesh, called: Mapping[str, str]) -> tuple[jax.Device, ...]:
    """The mesh's devices in the order of a strategy's ranks."""
    order = [mesh.axis_names.index(called[role]) for role in _ORDER if role in called]
    order = [i for i in range(mesh.devices.ndim) if i not in order] + order  # those of one device
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
    there = {a for a, n in first.axes if n > 1}
    split = (tuple(mesh_axis[a] for a in axes if a in there) for axes in first.spec)
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in split)))


def _over_fsdp(catalog: Catalog, layout: Layout, ways: int) -> Layout:
    """``layout`` with dim 0 split once more over ``ways`` of its replicas, where that divides."""
    shapes = {n: t.shape for n, t in catalog.tensors.items() if n in layout.placements}
    factors = Factors(shapes, catalog.model.config)
    placements = dict(layout.placements)
    whole: list[str] = []
    for name in sorted(shapes, key=lambda name: (name in factors.weights, len(name))):
        if name in factors.weights:
            placements[name] = factors.follow(name, placements[factors.weights[name]])
            continue
        granules = [g for g in factors.granules(name) if g.dim == 0]
        made = tuple(_split(p, shapes[name], ways, granules) for p in placements[name])
        placements[name] = made
        if not any("fsdp" in axes for p in made for axes in p.spec):
            whole.append(f"{name} {shapes[name]}")
    left = f"not split over fsdp={ways}, which does not divide dim 0: {format_list(whole)}."
    return replace(layout, placements=placements, notes=(*layout.notes, *([left] if whole else [])))


def _split(
    placement: Placement, shape: tuple[int, ...], ways: int, granules: Sequence[Granule]
) -> Placement:
    """``placement`` with its replicas as two axes, the inner of which splits dim 0 if it can."""
    parts = {a: ((a, n // ways), ("fsdp", ways)) for a, n in placement.axes if a in ("dp", "edp")}
    axes = tuple(part for a, n in placement.axes for part in parts.get(a, ((a, n),)))
    spec = [tuple(b for a in dim for b, _ in parts.get(a, ((a, 1),))) for dim in placement.spec]
    made = replace(placement, axes=axes, spec=tuple(spec))
    total = placement.ways(0) * ways
    fits = (
        bool(shape) and shape[0] % total == 0 and all(g.divides(shape[0], total) for g in granules)
    )
    if not fits or not parts or any("fsdp" in dim for dim in spec):
        return made
    first = (*(spec[0] if spec else ()), "fsdp")
    return replace(made, spec=(first, *spec[1:]))
