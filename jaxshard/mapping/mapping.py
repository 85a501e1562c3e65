"""Mappings: lists of operations that turn one model's tensors into another's, and their TOML.

    catalog of files ──→ catalog whose tensors are strided views of the same files
    arrays           ──→ arrays, computed where they are

Optimizer states (``adam_m.NAME``) are mapped like the weight NAME, but gradients are divided by
what multiplies the weight; training scalars (``global_step``) stay unchanged.

    name = "mine:theirs"

    [[op]]
    op = "rename"
    rules = [["h.{layer}.{rest*}", "layers.{layer}.{rest*}"]]

    [[op]]
    op = "transpose"
    names = ["layers.{layer}.mlp.kernel"]
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable
from collections.abc import Mapping as Dict
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from ..core.catalog import Catalog, Tensor
from ..core.decoders import parse_toml
from ..core.layout import Layout
from ..errors import JaxshardError, LayoutError, did_you_mean, format_list
from ..rules.match import STATE_ORDERS
from . import group_ops, ops
from .algebra import (
    Algebra,
    Placing,
    T,
    placed,
)
from .arrays import Expressions, evaluate, leaf
from .ops import Op
from .tensors import Geometry


@dataclass(frozen=True)
class Mapping:
    """A sequence of operations: plain data that can be printed, pickled and saved as TOML.

    >>> from .ops import Rename, Transpose
    >>> there = Mapping((Rename((("{x*}.weight", "{x*}.kernel"),)), Transpose(("{x*}.kernel",))))
    >>> print(there.inverse())
    Transpose(names=('{x*}.kernel',), order=(1, 0))
    Rename(rules=(('{x*}.kernel', '{x*}.weight'),))
    """

    ops: tuple[Op, ...] = ()
    name: str = ""

    def apply(self, catalog: Catalog) -> Catalog:
        """Return ``catalog`` with the target's names and shapes, without reading data.

        Raises:
            NotFoundError: a tensor is missing, or no rule matches it.
            LayoutError: shapes do not fit, or two sources have one target.
        """
        made = self.tensors(catalog.tensors, Geometry(), catalog.scalars)
        renamed = {n: t if t.name == n else replace(t, name=n) for n, t in made.items()}
        origin = MappedFrom(catalog, self)
        metadata = {k: v for k, v in catalog.metadata.items() if k not in catalog.tensors}
        metadata |= {
            n: catalog.metadata[t.name] for n, t in made.items() if t.name in catalog.metadata
        }
        return replace(catalog, tensors=renamed, layout=None, metadata=metadata, origin=origin)

    def inverse(self) -> Mapping:
        """Return the inverse mapping.

        Raises:
            LayoutError: an operation has no inverse.
        """
        parts = self.name.split(":")
        back = ":".join(reversed(parts))
        return Mapping(tuple(op.inverse() for op in reversed(self.ops)), back)

    def then(self, other: Mapping) -> Mapping:
        """Compose with ``other``, which is applied second."""
        names = (self.name.split(":")[0], other.name.split(":")[-1])
        return Mapping((*self.ops, *other.ops), ":".join(n for n in names if n))

    def place(
        self, layout: Layout, tensors: Dict[str, Tensor], scalars: frozenset[str] = frozenset()
    ) -> Layout:
        """Return the layout of the mapped ``tensors`` if theirs is ``layout``.

        Raises:
            LayoutError: a sharded dim cannot be divided in the target (fewer kv heads than mp).
        """
        made = self.tensors(placed(tensors, layout), Placing(), scalars)
        placements = {n: x.placements for n, x in made.items()}
        return replace(layout, placements=placements)

    def apply_arrays(self, arrays: Dict[str, Any], scalars: Iterable[str] = ()) -> dict[str, Any]:
        """Apply the mapping to arrays; JAX arrays stay on their devices.

        Sharded dims stay sharded.

        Raises:
            JaxshardError: as ``apply``.
            LayoutError: one result has sources on different devices (pipeline stages).
        """
        kept = frozenset(scalars)
        leaves = {n: leaf(n, tuple(x.shape), x.dtype.name) for n, x in arrays.items()}
        made = self.tensors(leaves, Expressions(), kept)
        return evaluate(made, arrays)

    def tensors(
        self, tensors: Dict[str, T], algebra: Algebra[T], scalars: frozenset[str] = frozenset()
    ) -> dict[str, T]:
        """Apply the operations to ``tensors`` with ``algebra``."""
        result = {n: t for n, t in tensors.items() if n in scalars}
        for (prefix, order), group in _by_state(tensors, scalars).items():
            made = group
            try:
                for op in self.ops if prefix else self._checked(group, algebra):
                    made = (op.of_state(order) if prefix else op).apply(made, algebra)
            except JaxshardError as error:
                if not prefix:
                    raise
                raise type(error)(f"names that begin with {prefix}: {error}") from None
            result |= {prefix + name: tensor for name, tensor in made.items()}
        return result

    def _checked(self, weights: Dict[str, T], algebra: Algebra[T]) -> tuple[Op, ...]:
        """Return the operations; refuse to scale states whose relation to gradients is unknown."""
        scaling = [op for op in self.ops if isinstance(op, ops.Affine)]
        strange = [n for n, x in weights.items() if n.startswith(_OPTAX) and algebra.shape(x)]
        if scaling and strange:
            raise LayoutError(
                f"{len(strange)} optimizer states have no known relation to gradients: "
                f"{format_list(strange)}. This mapping scales weights ({scaling[0]}), so their "
                f"states change too; known are {', '.join((*STATE_ORDERS, *_OPTAX_ORDERS))}, with "
                "their weights. Leave the others out (exclude=, --exclude)."
            )
        return self.ops

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops)) or "no operation"


@dataclass(frozen=True)
class MappedFrom:
    """The source and mapping of a mapped catalog; implements ``catalog.Origin``."""

    catalog: Catalog
    mapping: Mapping

    def place(self, layout: Layout) -> Layout:
        """Return the layout of the mapped tensors if the catalog's own is ``layout``."""
        return self.mapping.place(layout, self.catalog.tensors, self.catalog.scalars)


#: Training keeps the path in optax's tree of states other than the moments of one Adam.
_OPTAX = "opt_state."
_OPTAX_ORDERS = {"mu": 1, "nu": 2, "trace": 1}
_OPTAX_STATE = re.compile(rf"{re.escape(_OPTAX)}(?:[^.]+\.)*?({'|'.join(_OPTAX_ORDERS)})\.")


def _by_state(
    tensors: Dict[str, T], scalars: frozenset[str]
) -> dict[tuple[str, int], dict[str, T]]:
    """Group by (prefix, order) of optimizer states, without the prefix; weights are ("", 0)."""
    groups: dict[tuple[str, int], dict[str, T]] = {}
    for name, tensor in tensors.items():
        if name not in scalars:
            prefix, order = _state(name, tensors)
            groups.setdefault((prefix, order), {})[name[len(prefix) :]] = tensor
    return groups


def _state(name: str, known: Container[str]) -> tuple[str, int]:
    if not name.startswith((*STATE_ORDERS, _OPTAX)):
        return "", 0
    for prefix, order in STATE_ORDERS.items():
        if name.startswith(prefix):
            return prefix, order
    found = _OPTAX_STATE.match(name)
    if found and name[found.end() :] in known:
        return found[0], _OPTAX_ORDERS[found[1]]
    return "", 0


# --- Mappings as TOML

_KINDS: dict[str, type[Op]] = {
    kind.word: kind
    for kind in (
        *(ops.Rename, ops.Drop, ops.Expect, ops.Transpose, ops.Split, ops.Merge, ops.Slice),
        *(ops.Pad, ops.Unpad, ops.Repeat, ops.Unrepeat, ops.Cast, ops.Affine),
        *(group_ops.Fuse, group_ops.Unfuse, group_ops.Dequantize, ops.Substitute),
        *(group_ops.Stack, group_ops.Unstack, group_ops.Tie, group_ops.Untie),
    )
}


def read_mapping(text: str, where: str = "the mapping") -> Mapping:
    r"""Parse a mapping from TOML.

    Raises:
        LayoutError: not TOML, an unknown operation, or a field that is missing or invalid.

    >>> read_mapping('[[op]]\nop = "transpose"\nnames = ["w"]').ops
    (Transpose(names=('w',), order=(1, 0)),)
    """
    data = parse_toml(text, where)
    strange = data.keys() - {"name", "op"}
    if strange:
        raise LayoutError(f"{where}: unknown key {sorted(strange)[0]}; expected name and [[op]].")
    listed = data.get("op", [])
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise LayoutError(f"{where}: operations must be a list of tables. Write [[op]] above each.")
    made = [from_dict(entry, f"{where}, operation {i + 1}") for i, entry in enumerate(listed)]
    return Mapping(tuple(made), str(data.get("name", "")))


def write_mapping(mapping: Mapping) -> str:
    """Write ``mapping`` as TOML, which ``read_mapping`` parses."""
    lines = [f"name = {json.dumps(mapping.name)}"] if mapping.name else []
    for op in mapping.ops:
        lines += ["", "[[op]]"]
        for key, value in to_dict(op).items():
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{key} = {text}")
    return "\n".join(lines) + "\n"


def to_dict(op: Op) -> dict[str, Any]:
    """Convert ``op`` to plain data."""
    found: dict[str, Any] = {"op": op.word}
    for f in fields(op):
        value = getattr(op, f.name)
        if value is not None and value != f.default:
            found[f.name] = _plain(value)
    return found


def from_dict(data: dict[str, Any], where: str = "operation") -> Op:
    """Convert the result of ``to_dict`` back to an operation.

    Raises:
        LayoutError: unknown operation, or a field is missing or invalid.
    """
    word = data.get("op")
    kind = _KINDS.get(word) if isinstance(word, str) else None
    if kind is None:
        raise LayoutError(
            f"{where}: unknown op = {word!r} (known: {', '.join(_KINDS)})."
            f"{did_you_mean(str(word), _KINDS)}"
        )
    known = {f.name: f for f in fields(kind)}
    given = {k: v for k, v in data.items() if k != "op"}
    strange = sorted(given.keys() - known.keys())
    missing = [n for n, f in known.items() if f.default is MISSING and n not in given]
    if strange or missing:
        what = f"has no {strange[0]}" if strange else f"needs {', '.join(missing)}"
        raise LayoutError(f"{where}: {word} {what}. Its fields are {', '.join(known)}.")
    values = {n: _checked(v, str(known[n].type), f"{where}: {n}") for n, v in given.items()}
    try:
        return kind(**values)
    except LayoutError as error:
        raise LayoutError(f"{where}: {error}") from None


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "str": (str,), "bool": (bool,)}


def _checked(value: Any, kind: str, where: str) -> Any:
    """Return ``value`` with lists as tuples, checked against the field's type (a text)."""
    frozen = _frozen(value)
    base = kind.removesuffix(" | None")
    if base == "float":
        right = isinstance(frozen, int | float) and not isinstance(frozen, bool)
    elif base in _TYPES:
        right = isinstance(frozen, _TYPES[base]) and (base == "bool") == isinstance(frozen, bool)
    elif base == "tuple[tuple[str, str], ...]":
        right = isinstance(frozen, tuple) and all(
            isinstance(p, tuple) and len(p) == 2 and all(isinstance(x, str) for x in p)
            for p in frozen
        )
    else:
        inner = int if "int" in base else str
        right = isinstance(frozen, tuple) and all(type(x) is inner for x in frozen)
        right = right and (base != "tuple[int, int]" or len(frozen) == 2)
    if not right:
        raise LayoutError(f"{where} = {value!r} is not {base.replace('Names', 'a list of names')}.")
    return frozen


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
