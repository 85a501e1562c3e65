"""Mappings as TOML.

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
from dataclasses import MISSING, fields
from typing import Any

from ..core.decoders import parse_toml
from ..errors import LayoutError, did_you_mean
from . import group_ops, ops, substitute
from .mapping import Mapping
from .ops import Op

_KINDS: dict[str, type[Op]] = {
    kind.word: kind
    for kind in (
        *(ops.Rename, ops.Drop, ops.Expect, ops.Transpose, ops.Split, ops.Merge, ops.Slice),
        *(ops.Pad, ops.Unpad, ops.Repeat, ops.Unrepeat, ops.Cast),
        *(group_ops.Fuse, group_ops.Unfuse, group_ops.Dequantize, substitute.Substitute),
        *(group_ops.Stack, group_ops.Unstack, group_ops.Tie, group_ops.Untie),
    )
}


def read_mapping(text: str, where: str = "the mapping") -> Mapping:
    r"""The mapping that ``text`` says, in TOML.

    Raises:
        LayoutError: not TOML, an unknown operation, or a field that is missing or wrong.

    >>> read_mapping('[[op]]\nop = "transpose"\nnames = ["w"]').ops
    (Transpose(names=('w',), order=(1, 0)),)
    """
    data = parse_toml(text, where)
    strange = data.keys() - {"name", "op"}
    if strange:
        raise LayoutError(f"{where}: {sorted(strange)[0]} is not known; there are name and [[op]].")
    listed = data.get("op", [])
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise LayoutError(f"{where}: operations are tables in a list; write [[op]] above each.")
    made = [from_dict(entry, f"{where}, operation {i + 1}") for i, entry in enumerate(listed)]
    return Mapping(tuple(made), str(data.get("name", "")))


def write_mapping(mapping: Mapping) -> str:
    """``mapping`` as TOML, which ``read_mapping`` reads back."""
    lines = [f"name = {json.dumps(mapping.name)}"] if mapping.name else []
    for op in mapping.ops:
        lines += ["", "[[op]]"]
        for key, value in to_dict(op).items():
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{key} = {text}")
    return "\n".join(lines) + "\n"


def to_dict(op: Op) -> dict[str, Any]:
    """``op`` as plain data."""
    found: dict[str, Any] = {"op": op.word}
    for f in fields(op):
        value = getattr(op, f.name)
        if value is not None and value != f.default:
            found[f.name] = _plain(value)
    return found


def from_dict(data: dict[str, Any], where: str = "operation") -> Op:
    """The operation that ``to_dict`` gave as ``data``.

    Raises:
        LayoutError: unknown, or a field is missing or wrong.
    """
    word = data.get("op")
    kind = _KINDS.get(word) if isinstance(word, str) else None
    if kind is None:
        raise LayoutError(
            f"{where}: op = {word!r} is not known; there are {', '.join(_KINDS)}."
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
    """``value``, lists as tuples, if it is what the field's type (as text) says."""
    frozen = _frozen(value)
    base = kind.removesuffix(" | None")
    if base in _TYPES:
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
