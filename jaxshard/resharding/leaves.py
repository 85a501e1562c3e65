"""Leaves to move: a tree of arrays and a target, checked.

Whatever can be said before a byte moves is said here, about all leaves at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from ..core.cache import cached
from ..core.layout import Layout, check_divides
from ..devices.mesh import named_sharding, placement_of, shardings
from ..devices.pytree import is_key, keys_of, named_leaves
from ..errors import LayoutError, NotFoundError, did_you_mean, format_list
from .geometry import Move

#: What a tree can be taken to; see `reshard`.
Target = Sharding | PartitionSpec | Layout | Mapping[str, Any] | Callable[[str], Any] | Any


@dataclass(frozen=True)
class Leaf:
    """One array of the tree: its name, what the caller sees of it, and what is to be done.

    Of keys of a random generator (``key_impl`` tells the kind) the caller sees one element each;
    what moves is their data, which has one dim more.
    """

    name: str
    move: Move
    shape: tuple[int, ...]
    dtype: Any
    key_impl: Any = None


def leaves_of(tree: Any, target: Target) -> tuple[list[Leaf], Any]:
    """Every leaf of ``tree`` with its move, and the tree's structure.

    Raises:
        LayoutError: a leaf is no array with a sharding, or its target cannot hold it.
        NotFoundError: the target says nothing of some leaves.
    """
    named, structure = named_leaves(tree, unique=False)
    names = [name or "(the array)" for name, _ in named]
    arrays = [leaf for _, leaf in named]
    wanted = _per_leaf(names, structure, target)
    return [_leaf(*each) for each in zip(names, arrays, wanted, strict=True)], structure


def sharding_of(name: str, array: Any) -> Sharding:
    """Where an array (or a description of one) is."""
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
    seen = tuple(array.shape), array.dtype
    shape, dtype, impl = *seen, None
    if is_key(array):
        _check_shape(name, target, shape)
        keys = keys_of(array)
        impl, shape, dtype = keys.generator, keys.data.shape, keys.data.dtype
    _check_shape(name, target, shape)
    return Leaf(name, Move(shape, np.dtype(dtype), source, target), *seen, impl)


def _per_leaf(names: list[str], structure: Any, target: Target) -> list[Any]:
    """The target of each leaf, as given."""
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
            f"the target is a mesh, {dict(target.shape)}, and nothing says what lies where on it. "
            "Give a strategy, such as dp2mp4, or a NamedSharding of it for each array."
        )
    if callable(target):
        return [target(n) for n in names]
    raise LayoutError(
        f"the target is a tree of {len(given)} leaves, the arrays are one of "
        f"{len(names)}: {given_structure} against {structure}. Give one sharding, a tree of them "
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
    """The devices of this process on a platform."""
    try:
        return frozenset(jax.devices(platform))
    except RuntimeError:  # a platform described, as by jax.experimental.topologies, and not here
        return frozenset()


def _check_shape(name: str, sharding: Sharding, shape: tuple[int, ...]) -> None:
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        check_divides(placement_of(sharding), shape, name)
        return
    try:
        sharding.shard_shape(shape)
    except ValueError as e:
        raise LayoutError(f"{name}: shape {shape} does not fit {sharding}: {e}") from e


def check_alive(name: str, array: Any) -> None:
    """Refuse an array that holds nothing any more.

    Raises:
        LayoutError: it was donated or deleted.
    """
    if isinstance(array, jax.Array) and array.is_deleted():
        raise LayoutError(
            f"{name or 'the array'}: it was donated or deleted, and holds nothing any more. Use "
            "what the earlier call returned, or call it with donate=False."
        )
