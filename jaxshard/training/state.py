"""Training states as named leaves.

    params.layers.0.wq           layers.0.wq             a weight is called what the model calls it
    opt_state.0.mu.layers.0.wq   adam_m.layers.0.wq      as MindSpore calls Adam's moments
    opt_state.0.nu.layers.0.wq   adam_v.layers.0.wq
    opt_state.0.count            opt_state.0.count       everything else keeps its path
    key                          key                     a PRNG key as the integers it is
    step                         step                    a number as a tensor without dims

A state without a ``params`` at its top is all weights. This module moves no bytes.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef
from numpy.typing import NDArray

from ..devices.pytree import named_leaves
from ..errors import LayoutError, did_you_mean, format_list

Role = Literal["weights", "optimizer", "rest"]
Array = jax.Array | NDArray[np.generic]

LARGE_ELEMENTS = 1024  # readers of rank files treat a larger tensor as a weight
_MOMENTS = {"mu": "adam_m", "nu": "adam_v"}
_OPTIMIZER = re.compile(r"adam_[mv]\.|opt_state\.")


@dataclass(frozen=True, slots=True)
class Roles:
    """Top-level keys of the weights and of the optimizer's state."""

    weights: str = "params"
    optimizer: str = "opt_state"


@dataclass(frozen=True, slots=True)
class StateLeaf:
    """One leaf of a state.

    Attributes:
        path: its path in the state.
        name: its name in files.
        role: weight, optimizer state or other.
        value: the leaf itself.
        like: name of the weight that it belongs to: a strategy gives both the same layout.
    """

    path: str
    name: str
    role: Role
    value: Any
    like: str | None = None


@dataclass(frozen=True, slots=True)
class StateTree:
    """A flattened state; ``build`` makes one of the same structure."""

    leaves: tuple[StateLeaf, ...]
    structure: PyTreeDef

    def build(self, values: Sequence[Any]) -> Any:
        """Return the state with ``values`` as leaves, in the order of ``leaves``."""
        return jax.tree_util.tree_unflatten(self.structure, values)


def take_apart(
    tree: Any,
    roles: Roles = Roles(),
    rename: Callable[[str], str] | None = None,
) -> StateTree:
    """Flatten ``tree`` into named leaves.

    ``rename`` is applied to the names of weights, and within the names of their moments.

    Raises:
        LayoutError: two leaves have the same name, or a file cannot store a leaf.

    >>> state = {"params": {"w": np.ones(2)}, "opt_state": [{"mu": {"w": np.ones(2)}}], "step": 3}
    >>> [(leaf.name, leaf.role) for leaf in take_apart(state).leaves]
    [('adam_m.w', 'optimizer'), ('w', 'weights'), ('step', 'rest')]
    """
    named, structure = named_leaves(tree)
    has_weights = any(path.split(".")[0] == roles.weights for path, _ in named)
    called = rename or (lambda name: name)
    inside = f"{roles.weights}."
    weights = {
        path.removeprefix(inside) if has_weights else path
        for path, _ in named
        if path.startswith(inside) or not has_weights
    }
    leaves = []
    for path, value in named:
        role = _role(path, roles, has_weights)
        name, like = path, None
        if role == "weights":
            name = called(path.removeprefix(inside) if has_weights else path)
        elif role == "optimizer" and (moment := _moment(path, weights)):
            like = called(moment[1])
            name = f"{moment[0]}.{like}"
        elif weight := ending(path, weights):
            like = called(weight)
        leaves.append(StateLeaf(path, name, role, value, like))
    leaves = _with_unique_names(leaves)
    for leaf in leaves:
        _check(leaf)
    return StateTree(tuple(leaves), structure)


def as_array(value: Any) -> Array:
    """Return the array that is stored for a leaf."""
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return jax.random.key_data(value)
        return value
    if isinstance(value, bool | int | float):
        return np.array(value)  # int64, float64 and bool: as wide as Python's own
    return np.asarray(value)


def is_number(array: Array) -> bool:
    """Return True if a tensor that is not a weight is small and whole, and needs no strategy."""
    cut = isinstance(array, jax.Array) and not array.sharding.is_fully_replicated
    return array.size <= LARGE_ELEMENTS and not cut


def is_optimizer_name(name: str) -> bool:
    """Return True if a name in a file is that of optimizer state."""
    return _OPTIMIZER.match(name) is not None


def _role(path: str, roles: Roles, has_weights: bool) -> Role:
    top = path.split(".", maxsplit=1)[0]
    if not has_weights or top == roles.weights:
        return "weights"
    return "optimizer" if top == roles.optimizer else "rest"


def ending(path: str, weights: Container[str]) -> str | None:
    """Return the weight whose name is a proper suffix of ``path``, or None.

    >>> ending("opt_state.0.trace.layers.0.wq", {"layers.0.wq", "wq"})
    'layers.0.wq'
    """
    tail = path
    while "." in tail:
        tail = tail.split(".", maxsplit=1)[1]
        if tail in weights:
            return tail
    return None


def _moment(path: str, weights: Container[str]) -> tuple[str, str] | None:
    """Return MindSpore's name of the moment at ``path``, and its weight; None for other leaves."""
    keys = path.split(".")
    for at, key in enumerate(keys):
        weight = ".".join(keys[at + 1 :])
        if key in _MOMENTS and weight in weights:
            return _MOMENTS[key], weight
    return None


def _with_unique_names(leaves: list[StateLeaf]) -> list[StateLeaf]:
    """Give moments of two optimizers their paths as names: otherwise the names would clash."""
    count: dict[str, int] = {}
    for leaf in leaves:
        count[leaf.name] = count.get(leaf.name, 0) + 1
    found = [
        replace(leaf, name=leaf.path) if count[leaf.name] > 1 and leaf.role == "optimizer" else leaf
        for leaf in leaves
    ]
    names = [leaf.name for leaf in found]
    if len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise LayoutError(
            f"{format_list(twice)}: several leaves of the state have this name in files. Rename "
            "one of them."
        )
    return found


def _check(leaf: StateLeaf) -> None:
    value = leaf.value
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return
    if isinstance(value, bool | int | float):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise LayoutError(f"{leaf.path} = {value} does not fit 64 bits. Pass it in extras.")
        return
    raise LayoutError(
        f"{leaf.path} is a {type(value).__name__}, which a tensor cannot hold. Pass arrays and "
        "numbers in the state, and text and other values in extras."
    )


# --- Validation of arguments; numbers of NumPy and JAX become Python's

_T = TypeVar("_T")


def whole(name: str, value: Any) -> int:
    """Return ``value`` as an integer.

    Raises:
        LayoutError: it is not a number.

    >>> whole("step", 7)
    7
    """
    try:
        return operator.index(value)
    except TypeError:
        raise LayoutError(
            f"{name} is {value!r:.80}, a {type(value).__name__}. Pass a whole number."
        ) from None


def real(name: str, value: Any) -> float:
    """Return ``value`` as a float.

    Raises:
        LayoutError: it is not a number.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise LayoutError(
            f"{name} is {value!r:.80}, a {type(value).__name__}. Pass a number."
        ) from None


def optional(check: Callable[[str, Any], _T], name: str, value: Any) -> _T | None:
    """Return ``check(name, value)``; None for None."""
    return None if value is None else check(name, value)


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse an unknown choice.

    Raises:
        LayoutError: ``value`` is unknown.
    """
    choices = tuple(known)
    if value not in choices:
        raise LayoutError(
            f"{name}={value!r} is not one of {choices}.{did_you_mean(str(value), choices)}"
        )
