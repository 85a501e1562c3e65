"""Sharded arrays: where what a mapping makes of them lies, decided before it is computed.

A dim that devices share stays shared wherever the mapping takes it (see ``placing``), so no
array is whole on a device only because the compiler chose so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import JaxshardError, LayoutError
from ..layout import Placement, check_divides
from .placing import Placed

_APART = 1 << 20  # ranks between meshes, so that none looks like the next stage of another


def places_of(
    arrays: Mapping[str, Any], apply: Callable[[Mapping[str, Placed]], Mapping[str, Placed]]
) -> dict[str, Any]:
    """The sharding of each result of ``apply`` that follows from those of ``arrays``.

    Empty where they are not all on meshes, or what devices share is no whole part of a result.
    """
    meshes: list[Any] = []
    placed: dict[str, Placed] = {}
    for name, array in arrays.items():
        sharding = getattr(array, "sharding", None)
        spec = _spec(sharding)
        if spec is None:
            return {}
        assert sharding is not None
        if sharding.mesh not in meshes:
            meshes.append(sharding.mesh)
        first = meshes.index(sharding.mesh) * _APART
        placement = Placement(tuple(sharding.mesh.shape.items()), spec, first)
        placed[name] = Placed(name, tuple(array.shape), (placement,))
    try:
        made = apply(placed)
    except JaxshardError:
        return {}
    return {n: _sharding(meshes, x) for n, x in made.items() if _divides(x)}


def _spec(sharding: Any) -> tuple[tuple[str, ...], ...] | None:
    """The axes that split each dim; None where it does not say."""
    entries = getattr(sharding, "spec", None)
    if entries is None or not hasattr(sharding, "mesh"):
        return None
    spec = []
    for entry in entries:
        if entry is not None and not isinstance(entry, str | tuple):
            return None  # left for the compiler to decide
        spec.append(() if entry is None else (entry,) if isinstance(entry, str) else entry)
    return tuple(spec)


def _divides(x: Placed) -> bool:
    try:
        check_divides(x.placements[0], x.shape)
    except LayoutError:
        return False
    return True


def _sharding(meshes: list[Any], x: Placed) -> Any:
    from jax.sharding import NamedSharding, PartitionSpec  # noqa: PLC0415 - only arrays need it

    mesh = meshes[x.placements[0].first_rank // _APART]
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in x.spec)))
