"""Pytrees of arrays: leaf names, random keys, and shardings by rules.

The name of a leaf is its path, with dots between: ``layers.0.attn.kernel`` for nested
dicts, lists, Flax and Equinox modules alike. A Flax variable, and a box of Linen, is
called what it is in: the ``value`` inside adds nothing to its name. Elsewhere an
attribute called ``value`` is one like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.tree_util import DictKey, PyTreeDef, keystr, tree_flatten_with_path, tree_structure

from ..conversion.open import Config, read_config
from ..conversion.targets import lay_out_for
from ..core.catalog import Catalog, Model, log_notes
from ..core.layout import Layout, MeshAxes, Placement, Strategy
from ..core.runtime import cached
from ..errors import LayoutError, format_list, html_table, quote_name, size_text
from ..formats.huggingface import model_of
from ..rules import Rules, Unmatched, layout, table_for
from ..rules.logical_axes import LogicalAxisRules, axes_of, with_axis_rules
from ..rules.table import check_rules
from .mesh import partition_spec, rank_devices, sharding, shardings

#: Flax's classes that hold one value, by name: it need not be installed to be recognised.
_BOXES = {"Variable", "VariableState", "AxisMetadata"}
_VALUE = ".value"
_PARAMS = "params."


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

    The ``value`` of a Flax variable may be in the one and not in the other, and so may ``params``
    around all leaves: once for Linen's collection, once more for the parameters in a train state.
    A name that is ``taken``, because another leaf is called exactly so, is not this leaf's.

    >>> spelled("lin.kernel", "lin.kernel", {"lin.kernel.value"}, {"lin.kernel"})
    'lin.kernel.value'
    >>> spelled("params.params.lin.kernel", "", {"params.lin.kernel"}, ())
    'params.lin.kernel'
    """
    if name in known:
        return name
    inner = name
    while inner.startswith(_PARAMS):
        inner = inner.removeprefix(_PARAMS)
    values = (whole, name.removesuffix(_VALUE), name + _VALUE)
    for other in (*values, inner, _PARAMS + inner, 2 * _PARAMS + inner):
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
    unmatched: Unmatched = "error",
    logical_axis_rules: LogicalAxisRules | None = None,
    config: Config | None = None,
) -> Any:
    """``target`` as ``transfer`` takes it: a strategy or a mesh becomes a sharding for each name.

    Raises:
        LayoutError: the target does not fit the arrays, or ``devices``.
    """
    rules = with_axis_rules(rules, logical_axis_rules)
    if isinstance(target, str | Strategy | Mesh):
        target = target if isinstance(target, Mesh) else Strategy.of(target)
        model = Model() if config is None else model_of(read_config(config)[0])
        return shardings_by_rules(
            tree, target, devices=devices, rules=rules, unmatched=unmatched, model=model
        )
    if unmatched != "error" or any(option is not None for option in (devices, rules, config)):
        raise LayoutError(
            "devices=, rules=, logical_axis_rules=, unmatched= and config= are only valid with a "
            f"strategy or a mesh, not with {type(target).__name__}."
        )
    return target


def shardings_by_rules(
    tree: Any,
    target: Strategy | Mesh,
    *,
    devices: Sequence[jax.Device] | None = None,
    rules: Rules | None = None,
    unmatched: Unmatched = "error",
    model: Model | None = None,
) -> Mapping[str, NamedSharding]:
    """Return the sharding of each leaf of ``tree`` on ``target``, by its name.

    A leaf's name is its path joined by dots (see ``pytree``). ``rules`` take precedence over those
    of the family that the names match; without such a family they are the only ones.

    Raises:
        LayoutError: names without a rule, dims that do not divide, too few devices.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(tree)[0]}
    axes = mesh_axes(target, rules) if isinstance(target, Mesh) else target
    table = table_for(model, shapes, axes, rules, unmatched)
    placed = layout(shapes, axes, table, model, unmatched=unmatched, computes=True)
    log_notes(str(axes), placed.notes)
    if isinstance(axes, MeshAxes):
        assert isinstance(target, Mesh)
        if devices is not None:
            raise LayoutError("devices= is only valid with a strategy: a mesh has its own devices.")
        return on_mesh(target, axes, placed)[1]
    return shardings(placed, rank_devices(axes, devices))


# --- Rules on a mesh of the caller's own: the role of each axis follows from its name

_CONTEXT = ("context_autoregressive", "context_usp_ulysses")  # of MaxText

#: The names of mesh axes by their role in rules, which is that of an axis of a strategy.
AXIS_NAMES: Mapping[str, tuple[str, ...]] = {
    "dp": ("dp", "data", "replica", "edp", "diloco"),
    "fsdp": ("fsdp", "fsdp_transpose"),
    "mp": ("mp", "tp", "model", "tensor", "tensor_transpose", "tensor_sequence"),
    "ep": ("ep", "expert"),
    "cp": ("cp", "context", "sp", "sequence", "autoregressive", *_CONTEXT),
    "pp": ("pp", "stage", "pipe"),
}
_ROLES = {name: role for role, names in AXIS_NAMES.items() for name in names}
_MEANINGS = {
    "dp": "replicas",
    "fsdp": "weights split over replicas",
    "mp": "tensor parallel",
    "ep": "expert parallel",
    "cp": "context or sequence parallel, replicas of the weights",
    "pp": "pipeline stages",
}


def mesh_shardings(
    catalog: Catalog, mesh: Mesh, rules: Rules | None, unmatched: Unmatched = "error"
) -> tuple[Layout, tuple[jax.Device, ...], dict[str, NamedSharding]]:
    """The layout of ``catalog`` by the rules, its ranks, and the sharding of every tensor.

    Raises:
        LayoutError: the rules do not know an axis, or a tensor does not fit.
    """
    axes = mesh_axes(mesh, rules)
    layout = lay_out_for(catalog, axes, rules, unmatched=unmatched, computes=True)
    ranks, found = on_mesh(mesh, axes, layout)
    return layout, ranks, found


def mesh_axes(mesh: Mesh, rules: Rules | None) -> MeshAxes:
    """The axes of ``mesh`` with their roles; those of one device may have any name.

    With logical axis rules all axes may. Then those that split layers and experts have their
    roles, for layers and experts that are tensors of their own.

    Raises:
        LayoutError: no role for an axis.
    """
    roles = {}
    if rules is not None:
        check_rules(rules)
    logical = None if rules is None else rules.axes
    for axis in mesh.axis_names:
        role = _ROLES.get(str(axis).lower())
        if role is not None:
            roles[axis] = role
        elif mesh.shape[axis] > 1 and logical is None:
            known = (f"{_MEANINGS[r]} ({', '.join(names)})" for r, names in AXIS_NAMES.items())
            raise LayoutError(
                f"axis {axis!r} of the mesh {dict(mesh.shape)} is not known to the rules. Call "
                f"each axis by what it splits: {', '.join(known)}; or pass logical_axis_rules=, "
                "or give a sharding for each name."
            )
    if logical is not None:
        roles = {axis: role for axis, role in roles.items() if role not in ("pp", "ep")}
        roles |= dict.fromkeys(axes_of(logical, "expert", mesh.axis_names), "ep")
        roles |= dict.fromkeys(axes_of(logical, "layer", mesh.axis_names), "pp")
    slowest = {"pp": 0, "ep": 1}
    order = sorted(mesh.axis_names, key=lambda axis: slowest.get(roles.get(axis, ""), 2))
    text = f"the mesh {' '.join(f'{a}={n}' for a, n in mesh.shape.items() if n > 1)}"
    return MeshAxes(tuple((axis, mesh.shape[axis]) for axis in order), roles, text)


def on_mesh(
    mesh: Mesh, axes: MeshAxes, layout: Layout
) -> tuple[tuple[jax.Device, ...], dict[str, NamedSharding]]:
    """The device of each rank of ``layout``, and the sharding of each tensor.

    A tensor on all ranks has ``mesh`` itself; one of a stage or of an expert has the sub-mesh.
    """
    order = [mesh.axis_names.index(axis) for axis, _ in axes.axes]
    ranks = tuple(np.transpose(mesh.devices, order).flat)
    found: dict[tuple[Placement, ...], NamedSharding] = {}
    for placements in layout.placements.values():
        if placements not in found:
            is_whole = len(placements) == 1 and placements[0].num_ranks == mesh.size
            found[placements] = (
                NamedSharding(mesh, partition_spec(placements[0]))
                if is_whole
                else sharding(placements, ranks)
            )
    return ranks, {name: found[placed] for name, placed in layout.placements.items()}


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
