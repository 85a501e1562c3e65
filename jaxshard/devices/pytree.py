"""Pytrees of arrays: leaf names and random keys.

The name of a leaf is its path, with dots between: ``layers.0.attn.kernel`` for nested
dicts, lists, Flax and Equinox modules alike. A Flax variable, and a box of Linen, is
called what it is in: the ``value`` inside adds nothing to its name. Elsewhere an
attribute called ``value`` is one like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec, Sharding
from jax.tree_util import DictKey, PyTreeDef, keystr, tree_flatten_with_path, tree_structure

from ..core.cache import cached
from ..errors import LayoutError, format_list

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
