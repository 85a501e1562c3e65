"""Restore a target state from a checkpoint's tensors.

Arrays on devices, and descriptions of them, are loaded onto their target shardings; NumPy arrays
and Python numbers are read into host memory. All mismatches of names, shapes and dtypes are
reported in one error before a byte is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from numpy.typing import NDArray

from .. import rules as family_rules
from ..conversion.open import Config, opened
from ..conversion.targets import lay_out_for
from ..core.box import Box
from ..core.catalog import Catalog, Tensor, group_by_bytes
from ..core.layout import Layout, Strategy
from ..core.numpy_dtypes import Bytes, numpy_dtype
from ..devices.host_memory import aligned_empty
from ..devices.mesh import rank_devices, shardings
from ..devices.pytree import is_key, keys_of
from ..errors import LayoutError, Problems, format_list
from ..formats.huggingface import TRAINING_SCALARS
from ..loader import load_opened
from ..loader.make_arrays import keeping_64_bits
from ..loader.requests import LoadArguments
from ..mapping import Mapping as NamesAndShapes
from ..mapping import find_mapping
from ..planning.copies import move_into
from ..storage.engine import HostArrays, run
from ..storage.readers import open_source
from ..storage.resources import budget_for, default_budget
from .state import (
    LARGE_ELEMENTS,
    Role,
    Roles,
    StateLeaf,
    StateTree,
    as_array,
    ending,
    is_optimizer_name,
    one_of,
    take_apart,
)


def is_on_devices(leaf: StateLeaf) -> bool:
    """Return True if a leaf is a JAX array, or describes one."""
    return isinstance(leaf.value, jax.Array | jax.ShapeDtypeStruct)


def struct_of(leaf: StateLeaf) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype stored for a leaf, and its sharding, if it has one."""
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
    leaves: Sequence[StateLeaf],
    strategy: str | Strategy | None,
    rules: family_rules.Rules | None,
    devices: Sequence[jax.Device] | None,
) -> tuple[dict[str, jax.ShapeDtypeStruct], tuple[str, ...]]:
    """Return the target sharding of each leaf, and notes; leaves not listed stay uncommitted.

    Raises:
        LayoutError: a leaf has no sharding, or the strategy does not fit.
    """
    structs = {leaf.name: struct_of(leaf) for leaf in leaves if not _is_uncommitted(leaf, strategy)}
    if not structs:
        return {}, ()  # a state of NumPy arrays initialises no device
    if strategy is None:
        return _own_shardings(structs, devices), ()
    like = {leaf.name: leaf.like for leaf in leaves if leaf.like}
    names = structs.keys() | {w for n, w in like.items() if n in structs and w in catalog.tensors}
    chosen = replace(catalog, tensors={n: catalog.tensors[n] for n in names})
    found, notes = by_strategy(chosen, like, strategy, rules, devices)
    placed = {
        name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=found[name])
        for name, s in structs.items()
    }
    return placed, notes


def by_strategy(
    catalog: Catalog,
    like: Mapping[str, str],
    strategy: str | Strategy,
    rules: family_rules.Rules | None,
    devices: Sequence[jax.Device] | None,
) -> tuple[dict[str, NamedSharding], tuple[str, ...]]:
    """Return the sharding of every tensor, and notes; see ``lay_out``.

    Raises:
        LayoutError: the strategy does not fit.
    """
    strategy = Strategy.of(strategy)
    rest = _non_weights(catalog) - _shares_layout(catalog, like).keys()
    large = sorted(n for n in rest if prod(catalog.tensors[n].shape) > LARGE_ELEMENTS)
    notes = []
    if large:
        notes.append(
            f"{len(large)} tensors match no rule and no weight, so each device holds all of them: "
            f"{format_list(large)}. Give the target's leaves shardings to split them."
        )
    described = replace(catalog, scalars=catalog.scalars | rest)
    layout = lay_out(described, like, strategy, rules)
    found = shardings(layout, rank_devices(strategy, devices), catalog.tensors)
    return dict(found), (*layout.notes, *notes)


def lay_out(
    catalog: Catalog,
    like: Mapping[str, str],
    strategy: Strategy,
    rules: family_rules.Rules | None,
) -> Layout:
    """Return the layout of a state; a tensor that is ``like`` a weight has the weight's layout.

    Raises:
        LayoutError: names without a rule, or dims that do not divide.
    """
    alike = _shares_layout(catalog, like)
    ruled = {n: t for n, t in catalog.tensors.items() if n not in alike}
    layout = lay_out_for(
        replace(catalog, tensors=ruled, scalars=catalog.scalars & ruled.keys()), strategy, rules
    )
    more = {name: layout.placements[weight] for name, weight in alike.items()}
    return replace(layout, placements={**layout.placements, **more})


def roles_by_name(catalog: Catalog) -> dict[str, Role]:
    """Return the role of each tensor, by names and shapes."""

    def role(tensor: Tensor) -> Role:
        if is_optimizer_name(tensor.name):
            return "optimizer"
        is_small = prod(tensor.shape) <= LARGE_ELEMENTS and tensor.dtype.name[0] not in "FB"
        is_rest = tensor.name in catalog.scalars or tensor.name in TRAINING_SCALARS or is_small
        return "rest" if is_rest or tensor.shape == () else "weights"

    return {name: role(tensor) for name, tensor in catalog.tensors.items()}


def likes_by_name(catalog: Catalog) -> dict[str, str]:
    """Return the weight of each optimizer tensor, by names."""
    roles = roles_by_name(catalog)
    weights = {name for name, role in roles.items() if role == "weights"}
    found = {name: ending(name, weights) for name, role in roles.items() if role != "weights"}
    return {name: weight for name, weight in found.items() if weight}


def _shares_layout(catalog: Catalog, like: Mapping[str, str]) -> dict[str, str]:
    """Return those of ``like`` with the shape of their weight: Adafactor's factors differ."""
    tensors = catalog.tensors
    return {
        name: weight
        for name, weight in like.items()
        if name in tensors and weight in tensors and tensors[name].shape == tensors[weight].shape
    }


def _non_weights(catalog: Catalog) -> frozenset[str]:
    """Return the tensors that are not weights, and so need no rule."""
    return (catalog.scalars & catalog.tensors.keys()) | {
        t.name
        for t in catalog.tensors.values()
        if t.shape == () or t.name.startswith("opt_state.") or t.dtype.name[0] not in "FB"
    }


def _is_uncommitted(leaf: StateLeaf, strategy: object) -> bool:
    value = leaf.value
    if isinstance(value, jax.Array):
        if value.committed or len(value.sharding.device_set) > 1:
            return False
    elif getattr(value, "sharding", None) is not None:
        return False
    return _is_number(leaf) or (strategy is None and isinstance(value, jax.Array))


def _is_number(leaf: StateLeaf) -> bool:
    size = prod(struct_of(leaf).shape)
    return size == 1 or (leaf.role != "weights" and not leaf.like and size <= LARGE_ELEMENTS)


def _own_shardings(
    structs: Mapping[str, jax.ShapeDtypeStruct], devices: Sequence[jax.Device] | None
) -> dict[str, jax.ShapeDtypeStruct]:
    unsaid = [name for name, s in structs.items() if s.sharding is None]
    there = devices or jax.devices()
    if unsaid and len(there) > 1:
        raise LayoutError(
            f"{len(unsaid)} leaves of the target have no sharding, and there "
            f"are {len(there)} devices: {format_list(unsaid)}. Give strategy=, or arrays or "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
        )
    lone = SingleDeviceSharding(there[0])
    return {
        name: s if s.sharding is not None else jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=lone)
        for name, s in structs.items()
    }


# --- The restore of a target from a catalog

Parts = Literal["all", "weights", "optimizer", "no_optimizer"]

_ROLES: Mapping[str, tuple[Role, ...]] = {
    "all": ("weights", "optimizer", "rest"),
    "weights": ("weights",),
    "optimizer": ("optimizer",),
    "no_optimizer": ("weights", "rest"),
}
_LARGE_BYTES = 1 << 20  # below it, starting threads costs more than reading


@dataclass(frozen=True)
class RestoreOptions:
    """Layout and names of a restored state.

    Attributes:
        strategy: layout of the leaves.
        rules: layout rules that precede the family's.
        devices: the device of each rank.
        roles: keys of a state's weights and its optimizer's state are.
        rename: the names of weights in files.
        strict: refuse leaves missing in the step, and tensors missing in the target.
        names: the mapping of the step's names and shapes to the target's.
        config: the model's ``config.json``, which tables of ``names`` need.
    """

    strategy: str | Strategy | None = None
    rules: family_rules.Rules | None = None
    devices: Sequence[jax.Device] | None = None
    roles: Roles = Roles()  # noqa: RUF009 - frozen
    rename: Callable[[str], str] | None = None
    strict: bool = True
    workers: int | None = None
    host_bytes: int | None = None
    names: NamesAndShapes | str | None = None
    config: Config | None = None


@dataclass(frozen=True)
class RestorePlan:
    """A valid target, and the tensors to read into it.

    Attributes:
        structs: descriptions of the arrays on devices, with shardings.
        state: the flattened target; None for arrays by name.
        found: the leaves that exist in the step.
        notes: findings on the layout that are not errors.
    """

    catalog: Catalog
    options: RestoreOptions
    structs: Mapping[str, jax.ShapeDtypeStruct]
    notes: tuple[str, ...] = ()
    state: StateTree | None = None
    found: Sequence[StateLeaf] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors to read, each counted once."""
        names = self.structs if self.state is None else {leaf.name for leaf in self.found}
        tensors = self.catalog.tensors
        return sum(tensors[name].num_bytes for name in names if name in tensors)

    def read(self) -> Any:
        """Return the target with the leaves of the catalog, or arrays by name.

        Raises:
            LayoutError: the target does not fit the devices.
            NotFoundError: a file is missing.
            FormatError, CoverageError, StorageError: as ``load``.
        """
        catalog, options = self.catalog, self.options
        if self.state is None:
            return dict(_on_devices(catalog, self.structs, options))
        ours = [leaf.name for leaf in self.found if is_on_devices(leaf)]
        arrays = {
            **_on_devices(catalog, self.structs, options),
            **_load_uncommitted(
                catalog, [name for name in ours if name not in self.structs], options
            ),
        }
        others = [leaf.name for leaf in self.found if not is_on_devices(leaf)]
        values = _on_host(catalog, others, options)
        names = {leaf.name for leaf in self.found}
        return self.state.build(
            [
                _as_was(leaf, arrays.get(leaf.name), values.get(leaf.name))
                if leaf.name in names
                else leaf.value
                for leaf in self.state.leaves
            ]
        )


def plan_restore(
    catalog: Catalog, target: Any, options: RestoreOptions, parts: Parts = "all"
) -> RestorePlan:
    """Match the leaves of ``target`` with the tensors of ``catalog``, from headers only.

    Raises:
        NotFoundError: names are missing on either side.
        LayoutError: shapes or dtypes differ, or the target does not fit the devices.
    """
    one_of("parts", parts, get_args(Parts))
    if options.names is not None:
        catalog = _mapped(opened(catalog, config=options.config), options.names)
    if isinstance(target, str | Strategy):
        return RestorePlan(catalog, options, *_by_name(catalog, target, options, parts))
    state = take_apart(target, options.roles, options.rename)
    wanted = [leaf for leaf in state.leaves if leaf.role in _ROLES[parts]]
    found = _check(catalog, wanted, options.strict, parts)
    ours = [leaf for leaf in found if is_on_devices(leaf)]
    structs, notes = placed(catalog, ours, options.strategy, options.rules, options.devices)
    return RestorePlan(catalog, options, structs, notes, state, found)


def _mapped(catalog: Catalog, names: NamesAndShapes | str) -> Catalog:
    """Return the step with its weights and their moments mapped; other leaves stay unchanged."""
    fixed = replace(catalog, scalars=catalog.scalars | _non_weights(catalog))
    return replace(find_mapping(names, fixed).apply(fixed), scalars=catalog.scalars)


def _by_name(
    catalog: Catalog, strategy: str | Strategy, options: RestoreOptions, parts: Parts
) -> tuple[dict[str, jax.ShapeDtypeStruct], tuple[str, ...]]:
    """Return the tensors of ``parts`` by name with their shardings, and notes."""
    roles = roles_by_name(catalog)
    like = likes_by_name(catalog)
    found, notes = by_strategy(catalog, like, strategy, options.rules, options.devices)
    structs = {
        name: jax.ShapeDtypeStruct(t.shape, numpy_dtype(t.dtype), sharding=found[name])
        for name, t in catalog.tensors.items()
        if roles[name] in _ROLES[parts]
    }
    return structs, notes


def _check(catalog: Catalog, wanted: list[StateLeaf], strict: bool, parts: str) -> list[StateLeaf]:
    """Return the leaves that the step has, if all of them fit it."""
    problems = Problems("the step")
    names = [leaf.name for leaf in wanted]
    missing = [leaf for leaf in wanted if leaf.name not in catalog.tensors]
    if strict or any(isinstance(leaf.value, jax.ShapeDtypeStruct) for leaf in missing):
        problems.missing += [leaf.name for leaf in missing]
    if strict:
        problems.unexpected += _left_over(catalog, set(names), parts)
    found = [leaf for leaf in wanted if leaf.name in catalog.tensors]
    misfits = (_misfit(leaf, catalog.tensors[leaf.name]) for leaf in found)
    problems.misfits += filter(None, misfits)
    problems.check(
        catalog.tensors,
        names,
        if_missing="Restore weights only with parts='weights', or what is there with strict=False.",
        if_unexpected="They would be lost; give a target that has them, or strict=False.",
    )
    return found


def _left_over(catalog: Catalog, wanted: set[str], parts: str) -> list[str]:
    """Return tensors of ``parts`` that the target lacks."""
    over = [n for n in catalog.tensors if n not in wanted and n not in TRAINING_SCALARS]
    if parts == "all":
        return over
    if parts == "optimizer":
        return [n for n in over if is_optimizer_name(n)]
    lost = [n for n in over if not is_optimizer_name(n)]
    return [n for n in lost if n not in catalog.scalars and catalog.tensors[n].shape]


def _misfit(leaf: StateLeaf, tensor: Tensor) -> str:
    struct = struct_of(leaf)
    stored = numpy_dtype(tensor.dtype)
    if tuple(struct.shape) != tensor.shape:
        return f"{leaf.path} has shape {tuple(struct.shape)} (saved: {tensor.shape})"
    plain = isinstance(leaf.value, bool | int | float)
    if not plain and struct.dtype != stored:
        return f"{leaf.path} has dtype {struct.dtype} (saved: {stored})"
    return ""


def _on_devices(
    catalog: Catalog, structs: Mapping[str, jax.ShapeDtypeStruct], options: RestoreOptions
) -> Mapping[str, jax.Array]:
    if not structs:
        return {}
    tensors = {n: catalog.tensors[n] for n in structs}
    chosen = replace(catalog, tensors=tensors, notes=())  # the manager logs them, with the step
    load_options = LoadArguments(host_bytes=options.host_bytes)
    if options.workers is not None:
        load_options = replace(load_options, workers=options.workers)
    found: Mapping[str, jax.Array] = load_opened(chosen, dict(structs), load_options)[0]
    return found


def _load_uncommitted(
    catalog: Catalog, names: Sequence[str], options: RestoreOptions
) -> dict[str, jax.Array]:
    """Return uncommitted arrays on the default device: JAX moves them to any other.

    ``load`` makes committed arrays; only ``device_put`` without a device does not.
    """
    found = {}
    sized = [(name, catalog.tensors[name].num_bytes) for name in names]
    in_flight = default_budget() if options.host_bytes is None else options.host_bytes
    for batch in group_by_bytes(sized, in_flight):
        values = _on_host(catalog, batch, options, allocate=aligned_empty)
        for name, value in values.items():
            with keeping_64_bits(value.itemsize):
                found[name] = jax.device_put(value)
        jax.block_until_ready([found[name] for name in batch])  # their host memory is free now
    return found


def _on_host(
    catalog: Catalog,
    names: Sequence[str],
    options: RestoreOptions,
    allocate: Callable[[int], Bytes] | None = None,
) -> dict[str, NDArray[np.generic]]:
    """Read whole tensors into new host memory."""
    if not names:
        return {}
    tensors = [catalog.tensors[name] for name in names]
    out = HostArrays(((t.name, t.dtype, t.shape) for t in tensors), allocate)
    moves = [move_into(t, {Box.whole(t.shape): (0,)}) for t in tensors if t.num_bytes]
    large = sum(t.num_bytes for t in tensors) > _LARGE_BYTES
    budget = budget_for(options.host_bytes, options.workers if large else 1)
    files = open_source(catalog)
    try:
        files.check_checksums(piece.file for tensor in tensors for piece in tensor.shards)
        run(moves, files, out, budget=budget)
        files.check_unchanged()
    finally:
        files.close()
    return out.arrays()


def _as_was(leaf: StateLeaf, array: jax.Array | None, value: NDArray[np.generic] | None) -> Any:
    """Return the stored value as the kind of leaf that was saved."""
    if array is not None:
        if not is_key(leaf.value):
            return array
        return jax.random.wrap_key_data(array, impl=keys_of(leaf.value).generator)
    assert value is not None
    if isinstance(leaf.value, bool | int | float):
        return type(leaf.value)(value[()])
    if isinstance(leaf.value, np.generic):
        return value[()]
    return value
