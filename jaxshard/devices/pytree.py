"""Pytrees of arrays: leaf names, random keys, and shardings by rules.

The name of a leaf is its path, with dots between: ``layers.0.attn.kernel`` for nested
dicts, lists, Flax and Equinox modules alike. A Flax variable, and a box of Linen, is
called what it is in: the ``value`` inside adds nothing to its name. Elsewhere an
attribute called ``value`` is one like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.tree_util import DictKey, PyTreeDef, keystr, tree_flatten_with_path, tree_structure

from ..conversion.targets import lay_out_for
from ..core.catalog import Catalog, Model, log_notes
from ..core.layout import Layout, Placement, Strategy
from ..core.runtime import cached
from ..errors import LayoutError, format_list, html_table, quote_name, size_text
from ..rules import Rules, layout, rules_for
from ..rules.tensor_dims import Factors, Granule
from .mesh import rank_devices, sharding, shardings

#: Flax's classes that hold one value, by name: it need not be installed to be recognised.
_BOXES = {"Variable", "VariableState", "AxisMetadata"}
_VALUE = ".value"


def named_leaves(tree: Any, *, unique: bool = True) -> tuple[list[tuple[str, Any]], PyTreeDef]:
    """The leaves of ``tree`` with their names, and its structure. Specs count as leaves.

    The name of a tree that is a leaf itself is empty.

    Raises:
        LayoutError: two leaves have the same name, and names are to be ``unique``.

    >>> [name for name, _ in named_leaves({"a": [1, 2], "b.c": 3})[0]]
    ['a.0', 'a.1', 'b.c']
    """
    if _is_flat(tree):  # what ``load`` returns: nothing to find out leaf by leaf
        return sorted(tree.items()), tree_structure(tree)
    found = list(_named(tree))
    names = [name for name, _ in found]
    if unique and len(set(names)) < len(names):
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        raise LayoutError(
            f"{len(twice)} names stand for several leaves of the tree: {format_list(twice)}. A key "
            "with a dot in it can look like two keys; rename one."
        )
    return found, tree_structure(tree, is_leaf=_is_spec)


def whole_paths(tree: Any) -> list[str]:
    """The names of the leaves with all their keys: the ``value`` of Flax variables, too.

    Libraries that know no variables store leaves under these names.
    """
    return [_name(path) for path, _ in tree_flatten_with_path(tree, is_leaf=_is_spec)[0]]


def _is_flat(tree: Any) -> bool:
    """Whether ``tree`` is a dict of arrays by their names."""
    if type(tree) is not dict or set(map(type, tree)) != {str}:
        return False
    return all(map(_is_array_type, set(map(type, tree.values()))))


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, node in tree_flatten_with_path(tree, is_leaf=_is_spec_or_box)[0]:
        if not _is_box(node):
            yield _name(path), node
            continue
        for inside, leaf in tree_flatten_with_path(node, is_leaf=_is_spec)[0]:
            yield _name((*path, *inside[1:])), leaf


def _name(path: Sequence[Any]) -> str:
    if len(path) == 1 and isinstance(path[0], DictKey):  # as below, for the many of a flat dict
        return str(path[0].key)
    return keystr(tuple(path), simple=True, separator=".")


def spelled(name: str, whole: str, known: Container[str], taken: Container[str]) -> str | None:
    """The name by which ``known`` has the leaf called ``name``, whose whole path is ``whole``.

    The ``value`` of a Flax variable may be in the one and not in the other. A name that is
    ``taken``, because another leaf is called exactly so, is not this leaf's.

    >>> spelled("lin.kernel", "lin.kernel", {"lin.kernel.value"}, {"lin.kernel"})
    'lin.kernel.value'
    """
    if name in known:
        return name
    for other in (whole, name.removesuffix(_VALUE), name + _VALUE):
        if other in known and other not in taken:
            return other
    return None


def is_array_like(leaf: Any) -> bool:
    """Whether ``leaf`` is an array or describes one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_spec(node: Any) -> bool:
    kind: type = type(node)
    return _is_spec_type(kind)


def _is_spec_or_box(node: Any) -> bool:
    return _is_spec(node) or _is_box(node)


def _is_box(node: Any) -> bool:
    kind: type = type(node)
    return _is_box_type(kind)


@cached(1024)
def _is_array_type(kind: type) -> bool:
    return issubclass(kind, Array | np.ndarray)


@cached(1024)
def _is_spec_type(kind: type) -> bool:
    return issubclass(kind, Sharding | PartitionSpec)


@cached(1024)
def _is_box_type(kind: type) -> bool:
    return any(
        base.__name__ in _BOXES and base.__module__.split(".")[0] == "flax" for base in kind.__mro__
    )


# --- Random keys: typed PRNG keys of JAX, and the integers that a file holds for them


@dataclass(frozen=True, slots=True)
class Keys:
    """Describes random keys: their generator by JAX's name, and their data."""

    generator: Any
    data: jax.ShapeDtypeStruct


def is_key(value: Any) -> bool:
    """Whether ``value`` is a random key or describes one."""
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def keys_of(value: Any) -> Keys:
    """Return the generator and data type of random keys, or of their description.

    >>> keys_of(jax.random.key(0)).generator
    'threefry2x32'
    """
    generators = []

    def data_of(keys: jax.Array) -> jax.Array:  # ShapeDtypeStruct has no public attribute for it
        generators.append(jax.random.key_impl(keys))
        return jax.random.key_data(keys)

    described = jax.ShapeDtypeStruct(value.shape, value.dtype)
    data = jax.eval_shape(data_of, described)
    sharding = getattr(value, "sharding", None)
    return Keys(generators[0], jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding))


# --- Shardings by rules: strategies and user meshes for arrays that exist


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


# --- Tables of the shardings of a tree


@dataclass(frozen=True)
class ShardingRow:
    """The leaves of one sharding.

    Attributes:
        bytes_per_device: bytes of these leaves on each device; those of the host in NumPy arrays.
        example: the name of the first leaf.
    """

    spec: str
    mesh: str
    num_leaves: int
    num_bytes: int
    bytes_per_device: int
    example: str


@dataclass(frozen=True, repr=False)
class ShardingTable:
    """The shardings of a tree, largest first; prints itself as text, and as HTML in notebooks."""

    rows: tuple[ShardingRow, ...]

    def __str__(self) -> str:
        lines = [self._HEADER, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if number in self._NUMBERS else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    __repr__ = __str__

    _HEADER = ("sharding", "mesh", "leaves", "bytes", "per device", "for example")
    _NUMBERS = (2, 3, 4)

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.spec,
                row.mesh,
                f"{row.num_leaves:,}",
                size_text(row.num_bytes),
                size_text(row.bytes_per_device),
                quote_name(row.example),
            )
            for row in self.rows
        ]

    def _repr_html_(self) -> str:
        """Return the rows as a table for notebooks."""
        num_bytes = size_text(sum(row.num_bytes for row in self.rows))
        num_leaves = sum(row.num_leaves for row in self.rows)
        return html_table(f"{num_leaves:,} leaves, {num_bytes}", self._HEADER, self._cells())


def show(tree: object) -> ShardingTable:
    """Return the shardings of the arrays of ``tree`` as a table, one row per sharding.

    Leaves are arrays or ``jax.ShapeDtypeStruct``s; other leaves are left out. ``print`` shows
    the table as text, a notebook as HTML. No data is read.
    """
    found: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for name, leaf in named_leaves(tree, unique=False)[0]:
        if not is_array_like(leaf):
            continue
        sharding = getattr(leaf, "sharding", None)
        itemsize = leaf.dtype.itemsize
        num_bytes = held = prod(leaf.shape) * itemsize
        if sharding is not None:
            held = prod(sharding.shard_shape(tuple(leaf.shape))) * itemsize
        found.setdefault(_sharding_text(sharding), []).append((name, num_bytes, held))
    rows = [
        ShardingRow(
            *key,
            len(leaves),
            sum(n for _, n, _ in leaves),
            sum(h for *_, h in leaves),
            leaves[0][0],
        )
        for key, leaves in found.items()
    ]
    return ShardingTable(tuple(sorted(rows, key=lambda row: -row.num_bytes)))


def _sharding_text(sharding: Sharding | None) -> tuple[str, str]:
    """Return the spec and the mesh of ``sharding``, for a table."""
    if sharding is None:
        return "none", "host"
    kind = " pinned_host" * (sharding.memory_kind == "pinned_host")
    if not isinstance(sharding, NamedSharding):
        return type(sharding).__name__ + kind, f"{len(sharding.device_set)} devices"
    parts = list(sharding.spec)
    while parts and parts[-1] is None:  # P("x", None) is P("x")
        parts.pop()
    axes = ", ".join(f"{name}={size}" for name, size in sharding.mesh.shape.items())
    return f"P({', '.join(map(repr, parts))}){kind}", axes
