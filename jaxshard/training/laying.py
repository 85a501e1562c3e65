"""Laying: where each leaf of a target is to lie.

    it has a sharding of its own             there
    it is an array that no device owns       nowhere in particular, as it was ("loose")
    it is a number, and nothing is said      likewise
    there is a strategy                      by its rules; what is kept for a weight, as the weight
    it is large, and nothing is said         on the only device; of several, none is guessed

JAX moves a loose (it says: uncommitted) array to wherever the computation is. Were a step counter
that was loose restored onto a device, the next step of training would refuse to mix it with
weights on a mesh. This module moves no bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding

from .. import rules as family_rules
from ..catalog import Catalog, Tensor
from ..devices import rank_devices, shardings
from ..errors import LayoutError, some
from ..formats.job_numbers import NAMES
from ..layout import Layout
from ..notes import log_notes
from ..random_keys import is_key, keys_of
from ..strategy import Strategy
from ..targets import lay_out_for
from .states import LARGE_ELEMENTS, Leaf, Role, as_array, ending, is_optimizer_name

_log = logging.getLogger("jaxshard.training")


def is_on_devices(leaf: Leaf) -> bool:
    """Whether a leaf is an array of JAX's, or describes one."""
    return isinstance(leaf.value, jax.Array | jax.ShapeDtypeStruct)


def struct_of(leaf: Leaf) -> jax.ShapeDtypeStruct:
    """What is stored for a leaf, and where it is to lie if the leaf says."""
    value = leaf.value
    if not is_on_devices(leaf):
        array = as_array(value)
        return jax.ShapeDtypeStruct(array.shape, array.dtype)
    sharding = getattr(value, "sharding", None)
    if is_key(value):
        return keys_of(value).data
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


def placed(
    catalog: Catalog,
    leaves: Sequence[Leaf],
    strategy: str | Strategy | None,
    rules: family_rules.Rules | None,
    devices: Sequence[jax.Device] | None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """What is to lie where, by name; leaves that are not in it are loose.

    Raises:
        LayoutError: a leaf does not say where, or the strategy does not fit.
    """
    structs = {leaf.name: struct_of(leaf) for leaf in leaves if not _is_loose(leaf, strategy)}
    if not structs:
        return {}  # and a state of NumPy's arrays wakes no device
    if strategy is None:
        return _as_they_say(structs, devices)
    like = {leaf.name: leaf.like for leaf in leaves if leaf.like}
    names = structs.keys() | {w for n, w in like.items() if n in structs and w in catalog.tensors}
    chosen = replace(catalog, tensors={n: catalog.tensors[n] for n in names})
    found = by_strategy(chosen, like, strategy, rules, devices)
    return {
        name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=found[name])
        for name, s in structs.items()
    }


def by_strategy(
    catalog: Catalog,
    like: Mapping[str, str],
    strategy: str | Strategy,
    rules: family_rules.Rules | None,
    devices: Sequence[jax.Device] | None,
) -> dict[str, NamedSharding]:
    """The sharding of every tensor of ``catalog``; see ``lay_out``.

    Raises:
        LayoutError: the strategy does not fit.
    """
    strategy = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    rest = _untold(catalog) - _alike(catalog, like).keys()
    large = sorted(n for n in rest if prod(catalog.tensors[n].shape) > LARGE_ELEMENTS)
    if large:
        _log.warning(
            "%d tensors follow no rule and no weight, and are whole on every device: %s. Give the "
            "target's leaves shardings to have them cut.",
            len(large),
            some(large),
        )
    told = replace(catalog, hyper=catalog.hyper | rest)
    layout = lay_out(told, like, strategy, rules)
    log_notes(str(strategy), layout.notes)
    return dict(shardings(layout, rank_devices(strategy, devices), catalog.tensors))


def lay_out(
    catalog: Catalog,
    like: Mapping[str, str],
    strategy: Strategy,
    rules: family_rules.Rules | None,
) -> Layout:
    """The layout of a state under ``strategy``; a tensor that is ``like`` a weight lies as it.

    Raises:
        LayoutError: names without a rule, or dims that do not divide.
    """
    alike = _alike(catalog, like)
    told = {n: t for n, t in catalog.tensors.items() if n not in alike}
    layout = lay_out_for(
        replace(catalog, tensors=told, hyper=catalog.hyper & told.keys()), strategy, rules
    )
    more = {name: layout.placements[weight] for name, weight in alike.items()}
    return replace(layout, placements={**layout.placements, **more})


def roles_by_name(catalog: Catalog) -> dict[str, Role]:
    """What each tensor is for, as far as names and shapes tell."""

    def role(tensor: Tensor) -> Role:
        if is_optimizer_name(tensor.name):
            return "optimizer"
        is_small = prod(tensor.shape) <= LARGE_ELEMENTS and tensor.dtype.name[0] not in "FB"
        is_rest = tensor.name in catalog.hyper or tensor.name in NAMES or is_small
        return "rest" if is_rest or tensor.shape == () else "weights"

    return {name: role(tensor) for name, tensor in catalog.tensors.items()}


def likes_by_name(catalog: Catalog) -> dict[str, str]:
    """For what is kept for a weight, the weight, as far as names tell."""
    roles = roles_by_name(catalog)
    weights = {name for name, role in roles.items() if role == "weights"}
    found = {name: ending(name, weights) for name, role in roles.items() if role != "weights"}
    return {name: weight for name, weight in found.items() if weight}


def _alike(catalog: Catalog, like: Mapping[str, str]) -> dict[str, str]:
    """Those of ``like`` whose weight is there and has their shape: Adafactor's factors have not."""
    tensors = catalog.tensors
    return {
        name: weight
        for name, weight in like.items()
        if name in tensors and weight in tensors and tensors[name].shape == tensors[weight].shape
    }


def _untold(catalog: Catalog) -> frozenset[str]:
    """The rest of a state, which no rule speaks of, told from weights."""
    return (catalog.hyper & catalog.tensors.keys()) | {
        t.name
        for t in catalog.tensors.values()
        if t.shape == () or t.name.startswith("opt_state.") or t.dtype.name[0] not in "FB"
    }


def _is_loose(leaf: Leaf, strategy: object) -> bool:
    value = leaf.value
    if isinstance(value, jax.Array):
        if value.committed or len(value.sharding.device_set) > 1:
            return False
    elif getattr(value, "sharding", None) is not None:
        return False
    return _is_number(leaf) or (strategy is None and isinstance(value, jax.Array))


def _is_number(leaf: Leaf) -> bool:
    size = prod(struct_of(leaf).shape)
    return size == 1 or (leaf.role != "weights" and not leaf.like and size <= LARGE_ELEMENTS)


def _as_they_say(
    structs: Mapping[str, jax.ShapeDtypeStruct], devices: Sequence[jax.Device] | None
) -> dict[str, jax.ShapeDtypeStruct]:
    unsaid = [name for name, s in structs.items() if s.sharding is None]
    there = devices or jax.devices()
    if unsaid and len(there) > 1:
        raise LayoutError(
            f"{len(unsaid)} leaves of the target say nothing of where they are to lie, and there "
            f"are {len(there)} devices: {some(unsaid)}. Give strategy=, or arrays or "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
        )
    lone = SingleDeviceSharding(there[0])
    return {
        name: s if s.sharding is not None else jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=lone)
        for name, s in structs.items()
    }
