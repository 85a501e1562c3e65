"""From a load's target (strategy, mesh, shardings, pytree) to requested arrays.

"dp2mp4", a Strategy, a Layout,      every tensor, by the rules of its family
strategy files, a Mesh
a Sharding, a Device                 the same for every tensor
a function of the name               every tensor by its result
a tree of shardings, of specs, or    the tree itself, with arrays for leaves; the name of
of jax.ShapeDtypeStruct              a leaf is its path
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ..conversion.select import (
    refuse_absent,
    refuse_half,
    refuse_lost,
    without_merged,
    without_unplaced_states,
)
from ..conversion.targets import SAME, check_factors, lay_out_for, parse_target, same_layout
from ..core.catalog import Catalog, Tensor
from ..core.layout import Layout, Placement, Strategy, check_divides
from ..core.numpy_dtypes import NumpyDType, can_become, is_plain_float, numpy_dtype
from ..devices.mesh import layout_devices, named_sharding, placement_of, rank_devices, shardings
from ..devices.pytree import (
    Keys,
    is_array_like,
    is_key,
    keys_of,
    mesh_shardings,
    named_leaves,
    spelled,
    whole_paths,
)
from ..errors import JaxshardError, LayoutError, NotFoundError, Problems, format_list
from ..formats.strategy_files import for_tensors
from ..rules.table import check_rules
from .requests import ArrayRequest, Devices, LoadArguments, LoadRequest

# --- Targets

_HALVES = ("bfloat16", "float16")


def resolve(
    catalog: Catalog, target: Any, options: LoadArguments, *, is_whole: bool = False
) -> LoadRequest:
    """Return the arrays that ``target`` requests of the tensors of ``catalog``.

    ``is_whole``: all tensors of the source are selected.

    Raises:
        NotFoundError: names are missing on either side.
        CoverageError: the catalog lacks weights of the strategy files, or they are on ranks
            without files and this process's devices need them.
        LayoutError: the target does not fit the tensors.
    """
    devices = options.devices
    cast = None if options.dtype is None else np.dtype(options.dtype)
    target = _read_target(catalog, target)
    if options.rules is not None:
        check_rules(options.rules)
    has_axes = options.rules is not None and options.rules.axes is not None
    if has_axes and not isinstance(target, Mesh | Strategy):
        raise LayoutError(
            "logical_axis_rules= are for a mesh or a strategy as target, not for "
            f"{type(target).__name__}. Leave them out."
        )
    if isinstance(target, Layout):
        target = without_merged(catalog, target)
        if options.strict:
            refuse_absent(catalog, target, options.misses)
        refuse_lost(catalog, options.takes, target, _own_ranks(_listed(devices) or jax.devices()))
        kept = without_unplaced_states(catalog, target)
        left_out = kept.notes[len(catalog.notes) :]
        made = _all_tensors(kept, _of_layout(kept, target, devices), devices, cast)
        return replace(made, notes=(*left_out, *target.notes, *made.notes))
    if is_whole and not _is_tree(target):
        refuse_half(catalog)
    if isinstance(target, Mesh | Strategy):
        layout, ranks, found = _by_rules(catalog, target, options)
        refuse_lost(catalog, options.takes, layout, _own_ranks(ranks))
        made = _all_tensors(catalog, found, devices, cast)
        return replace(made, notes=(*layout.notes, *made.notes))
    place_of = _by_name(target)
    if place_of is not None:
        refuse_lost(catalog, options.takes)
        return _all_tensors(catalog, place_of, devices, cast)
    return _tree(catalog, target, options, cast)


def _is_tree(target: Any) -> bool:
    return not isinstance(target, Mesh | Strategy) and _by_name(target) is None


def _own_ranks(ranks: Sequence[jax.Device]) -> frozenset[int]:
    """Return the ranks whose devices belong to this process."""
    here = jax.process_index()
    return frozenset(r for r, device in enumerate(ranks) if device.process_index == here)


def _read_target(catalog: Catalog, target: Any) -> Any:
    """Parse ``target`` if it is a path or a text.

    Raises:
        LayoutError: ``"same"`` for a complete source, or an invalid strategy.
    """
    if not isinstance(target, str | os.PathLike):
        return target
    if target == SAME:
        layout = same_layout(catalog)
        if layout is None:
            raise LayoutError(
                f"{SAME!r} is the layout of a source of rank files, and {catalog.root} is "
                "complete. Pass a strategy, a device or shardings."
            )
        return layout
    return parse_target(target, ())


def _of_layout(catalog: Catalog, target: Layout, devices: Devices) -> Callable[[str], Any]:
    """Return the sharding of each name by strategy files."""
    shapes = {t.name: t.shape for t in catalog.tensors.values()}
    layout = _with_scalars(for_tensors(target, shapes), catalog)
    unplaced = sorted(n for n in catalog.tensors if not layout.placements.get(n))
    if unplaced:
        raise NotFoundError(
            f"{len(unplaced)} tensors of {catalog.root} are not in the target's strategy: "
            f"{format_list(unplaced)}. Leave them out with exclude= (optimizer states: "
            'exclude="^adam_"), or give a strategy that has them.'
        )
    check_factors(catalog, layout)
    return shardings(layout, _listed(devices), catalog.tensors).__getitem__


def asked_shapes(target: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of a tree, by the names of its leaves."""
    leaves = named_leaves(target, unique=False)[0]
    return {name: tuple(leaf.shape) for name, leaf in leaves if is_array_like(leaf)}


def asked_dtype(target: Any, dtype: Any) -> str | None:
    """Return NumPy's name of the dtype for computed values; None if the target has none.

    If the leaves of a tree have several, it is one that represents the values of each, so that
    every leaf is rounded once.
    """
    if dtype is not None:
        return str(np.dtype(dtype).name)
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(target) if is_array_like(leaf)]
    asked = {str(leaf.dtype) for leaf in leaves} & {*_HALVES, "float32", "float64"}
    if len(asked) < 2:
        return next(iter(asked), None)
    return "float64" if "float64" in asked else "float32"


def _by_rules(
    catalog: Catalog, target: Mesh | Strategy, options: LoadArguments
) -> tuple[Layout, Sequence[jax.Device], Callable[[str], Any]]:
    """Return the layout by rules, the device of each rank, and the sharding of each name."""
    if isinstance(target, Mesh):
        layout, ranks, found = mesh_shardings(catalog, target, options.rules, options.unmatched)
        return layout, ranks, found.__getitem__
    ranks = rank_devices(target, _listed(options.devices))
    layout = lay_out_for(catalog, target, options.rules, unmatched=options.unmatched, computes=True)
    return layout, ranks, shardings(layout, ranks).__getitem__


def _by_name(target: Any) -> Callable[[str], Any] | None:
    """Return the sharding of each name, unless the target is a tree."""
    if isinstance(target, jax.Device):
        target = SingleDeviceSharding(target)
    if isinstance(target, Sharding | PartitionSpec):
        return lambda name: target
    if callable(target) and jax.tree_util.all_leaves([target]):
        return target  # type: ignore[no-any-return]  # a module that can be called is a tree
    return None


def _with_scalars(layout: Layout, catalog: Catalog) -> Layout:
    """Return ``layout`` with all non-weights replicated on every rank."""
    everywhere = (Placement((("all", layout.num_ranks),)),)
    added = {n: everywhere for n in catalog.scalars if n not in layout.placements}
    return replace(layout, placements={**layout.placements, **added})


def _all_tensors(
    catalog: Catalog, place_of: Callable[[str], Any], devices: Devices, cast: NumpyDType | None
) -> LoadRequest:
    problems = Problems(catalog.root)
    wants = []
    for name, tensor in catalog.tensors.items():
        try:
            wants.append(_want(name, tensor, place_of(name), devices, None, cast))
        except JaxshardError as error:
            problems.misfits.append(str(error))
    _check(problems, catalog, catalog.tensors)
    names = [want.tensor.name for want in wants]
    notes = _of_keys(catalog, names)
    return LoadRequest(tuple(wants), lambda arrays: dict(zip(names, arrays, strict=True)), notes)


def _check(problems: Problems, catalog: Catalog, names: Iterable[str]) -> None:
    """Raise all ``problems`` of a load; ``names`` are those of the target."""
    tied = catalog.model.tied_embeddings and any("head" in name for name in problems.missing)
    hint = (
        "The config ties the head to the embedding, which is stored once: map both names to it "
        "with name_of=. "
    )
    problems.check(
        catalog.tensors,
        names,
        if_missing=(hint if tied else "")
        + "Map names with name_of=, or leave them as they are with strict=False.",
        if_unexpected="Leave them out with exclude= or strict=False.",
    )


def _tree(
    catalog: Catalog, target: Any, options: LoadArguments, cast: NumpyDType | None
) -> LoadRequest:
    leaves, structure = named_leaves(target)
    problems = Problems(catalog.root)
    wants: dict[int, ArrayRequest] = {}
    generators: dict[int, Any] = {}
    wanted = _names(target, leaves, options.name_of)
    exact = {name for name, _ in wanted.values()}
    names = []
    for number, (name, whole) in wanted.items():
        path, leaf = leaves[number]
        stored = spelled(name, whole, catalog.tensors, exact)
        names.append(stored or name)
        if stored is None:
            problems.missing.append(name if name == path else f"{name} (for {path})")
            continue
        try:
            shape_dtype = leaf if is_array_like(leaf) else None
            if is_key(leaf):
                keys = _keys(stored, leaf, catalog)
                shape_dtype, generators[number] = keys.data, keys.generator
            place = leaf if shape_dtype is None else getattr(shape_dtype, "sharding", None)
            wants[number] = _want(
                stored, catalog.tensors[stored], place, options.devices, shape_dtype, cast
            )
        except JaxshardError as error:
            problems.misfits.append(str(error))
    known = set(names)
    problems.unexpected += [name for name in catalog.tensors if name not in known]
    if not names:
        raise LayoutError(
            f"a target of type {type(target).__name__} must contain shardings. Pass a strategy "
            "such as dp2mp4, a Mesh, a Sharding, a function of the name, or a tree of "
            "jax.ShapeDtypeStruct or shardings."
        )
    if not options.strict:
        problems.missing, problems.unexpected = [], []
    gone = {name.partition(" (for ")[0] for name in problems.missing} & catalog.lost.keys()
    refuse_lost(catalog, gone.__contains__)
    _check(problems, catalog, names)

    def build(arrays: Sequence[jax.Array]) -> Any:
        made = dict(zip(wants, arrays, strict=True))
        for number, generator in generators.items():
            if number in made:
                made[number] = jax.random.wrap_key_data(made[number], impl=generator)
        return structure.unflatten([made.get(i, leaf) for i, (_, leaf) in enumerate(leaves)])

    data = [w.tensor.name for number, w in wants.items() if number not in generators]
    return LoadRequest(tuple(wants.values()), build, _of_keys(catalog, data))


def _names(
    target: Any, leaves: Sequence[tuple[str, Any]], name_of: Callable[[str], str] | None
) -> dict[int, tuple[str, str]]:
    """Return the name of each tensor leaf, and its name with all keys of its path."""
    found = {}
    for number, ((path, leaf), whole) in enumerate(zip(leaves, whole_paths(target), strict=True)):
        # functions and numbers are parts of the model, but not weights
        if isinstance(leaf, Sharding | PartitionSpec | jax.Device) or is_array_like(leaf):
            name = name_of(path) if name_of else path
            found[number] = name, name if name_of else whole
    return found


def _keys(name: str, leaf: Any, catalog: Catalog) -> Keys:
    """Return the random keys of a leaf.

    Raises:
        LayoutError: those of the checkpoint are of another generator.
    """
    keys = keys_of(leaf)
    stored = catalog.keys.get(name)
    if stored is not None and str(keys.generator) != stored:
        raise LayoutError(
            f"{name}: the target has keys of {keys.generator}, the checkpoint of {stored}."
        )
    return keys


def _of_keys(catalog: Catalog, names: Iterable[str]) -> tuple[str, ...]:
    """Return a note on the random keys among ``names``, which are loaded as their data."""
    found = [f"{name} ({catalog.keys[name]})" for name in names if name in catalog.keys]
    if not found:
        return ()
    return (
        f"{len(found)} random keys are loaded as their data, integers: {format_list(found)}. A "
        "target whose leaves are keys, or jax.random.wrap_key_data, makes keys of them.",
    )


def _want(
    name: str,
    tensor: Tensor,
    place: Any,
    devices: Devices,
    like: Any,
    cast: NumpyDType | None,
) -> ArrayRequest:
    """Return the checked request of one tensor.

    Raises:
        LayoutError: it does not fit the tensor, with the name and the numbers.
    """
    if like is not None and tuple(like.shape) != tensor.shape:
        raise LayoutError(
            f"{name}: the target has shape {tuple(like.shape)}, the checkpoint {tensor.shape}."
        )
    named = _sharding(name, place, devices)
    _check_fits(name, named, tensor.shape)
    return ArrayRequest(tensor, _dtype(name, tensor, like, cast), named)


def _dtype(name: str, tensor: Tensor, like: Any, cast: NumpyDType | None) -> NumpyDType:
    """Return the dtype of the array: the requested or the stored one."""
    try:
        wanted = numpy_dtype(tensor.dtype)
    except LayoutError as error:
        raise LayoutError(f"{name}: {error}") from None
    if cast is not None:
        wanted = cast if is_plain_float(tensor.dtype) else wanted
    elif like is not None:
        wanted = np.dtype(like.dtype)
    if not can_become(tensor.dtype, wanted):
        raise LayoutError(
            f"{name}: stored as {tensor.dtype}, requested as {wanted.name}. Only floats of 16 to "
            "64 bits are converted during a load. Load the stored dtype, and cast on the device."
        )
    return wanted


def _sharding(name: str, place: Any, devices: Devices) -> Sharding:
    if isinstance(place, jax.Device):
        return SingleDeviceSharding(place)
    if isinstance(place, PartitionSpec):
        return named_sharding(name, _mesh(name, devices), place)
    if isinstance(place, NamedSharding) and not isinstance(place.mesh, Mesh):
        return named_sharding(name, _mesh(name, devices), place.spec)  # its mesh is abstract
    if isinstance(place, Sharding):
        return place
    only = _listed(devices) or jax.devices()
    if place is None and len(only) == 1:
        return SingleDeviceSharding(only[0])
    raise LayoutError(
        f"{name}: the target has no sharding ({type(place).__name__}), and there are {len(only)} "
        "devices. Pass jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
    )


def _mesh(name: str, devices: Devices) -> Mesh:
    """Return the mesh of the specs: the argument, or the current one."""
    if isinstance(devices, Mesh):
        return devices
    current = jax.sharding.get_mesh()
    if isinstance(current, Mesh) and current.size > 1:
        return current
    raise LayoutError(
        f"{name}: a PartitionSpec needs a mesh with devices. Pass devices=mesh, load inside "
        "jax.set_mesh(mesh), or pass a NamedSharding."
    )


def _check_fits(name: str, named: Sharding, shape: tuple[int, ...]) -> None:
    if isinstance(named, NamedSharding):
        check_divides(placement_of(named), shape, name)
        return
    try:
        named.shard_shape(shape)
    except ValueError as error:
        raise LayoutError(f"{name}: shape {shape} does not fit {named}: {error}") from None


def _listed(devices: Devices) -> Sequence[jax.Device] | None:
    return tuple(devices.devices.flat) if isinstance(devices, Mesh) else devices


# --- Participants: the processes whose devices take part in one load
#
# They build the arrays together, so they compare the checkpoints that they opened, and an error
# in one process is raised in all. The participants must be known before a checkpoint is opened,
# because opening may fail; so they follow from the target. A load onto devices of one process
# involves no other process.


def sharers(target: Any, devices: Devices) -> frozenset[int]:
    """Return the processes with devices of ``target``; see ``load`` for the arguments.

    Of a function of the name nothing is known before it is called: then there are none.
    """
    try:
        return _processes(_devices(target, devices))
    except JaxshardError:  # which all processes find again, and raise
        return _processes(jax.devices())


def of_shardings(shardings: Iterable[Sharding]) -> frozenset[int]:
    """Return the processes with devices of ``shardings``."""
    return _processes(device for named in set(shardings) for device in named.device_set)


def _processes(devices: Iterable[Any]) -> frozenset[int]:
    return frozenset(device.process_index for device in devices)


def _devices(target: Any, devices: Devices) -> Iterable[Any]:
    listed = list(devices.devices.flat) if isinstance(devices, Mesh) else devices
    if isinstance(target, str):
        with suppress(LayoutError):  # "same", or the path of strategy files
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
    """Return the sharding or device of a leaf; None if it has none."""
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
