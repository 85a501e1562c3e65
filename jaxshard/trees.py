"""Trees of arrays: what each leaf is called.

The name of a leaf is its path, with dots between: ``layers.0.attn.kernel`` for nested
dicts, lists, Flax and Equinox modules alike. A Flax variable, and a box of Linen, is
called what it is in: the ``value`` inside adds nothing to its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec, Sharding
from jax.tree_util import GetAttrKey, PyTreeDef, keystr

from .errors import LayoutError, some


def named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], PyTreeDef]:
    """The leaves of ``tree`` with their names, and its structure. Specs count as leaves.

    Raises:
        LayoutError: two leaves have the same name.

    >>> [name for name, _ in named_leaves({"a": [1, 2], "b.c": 3})[0]]
    ['a.0', 'a.1', 'b.c']
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_spec)
    names = [leaf_name(path) for path, _ in paths]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise LayoutError(
            f"{len(twice)} names stand for several leaves of the tree: {some(twice)}. A key with a "
            "dot in it can look like two keys; rename one."
        )
    return [(name, leaf) for name, (_, leaf) in zip(names, paths, strict=True)], structure


def leaf_name(path: Sequence[Any]) -> str:
    """The name of the leaf at ``path``."""
    keys = tuple(path)
    if len(keys) > 1 and keys[-1] == GetAttrKey("value"):
        keys = keys[:-1]
    return keystr(keys, simple=True, separator=".")


def is_array_like(leaf: Any) -> bool:
    """Whether ``leaf`` is an array or describes one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_spec(node: Any) -> bool:
    return isinstance(node, Sharding | PartitionSpec)
