"""Names with placeholders, which say which tensors an operation is about.

model.layers.{layer}.mlp.{part}.weight      layer: digits; part: one dotted part
model.{rest*}                               rest: anything
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from ..errors import LayoutError

_HOLE = re.compile(r"\{(\w+)(\*?)\}")
_NUMBERS = frozenset({"layer", "expert", "index"})

Found = Mapping[str, str]


def match(pattern: str, name: str) -> Found | None:
    """What the placeholders of ``pattern`` stand for in ``name``, or None if it does not match.

    >>> match("h.{layer}.{part}.bias", "h.3.mlp.bias")
    {'layer': '3', 'part': 'mlp'}
    """
    found = _compiled(pattern).fullmatch(name)
    return found.groupdict() if found else None


def fill(pattern: str, found: Found) -> str:
    """``pattern`` with its placeholders filled in.

    >>> fill("layers_{layer}.{part}", {"layer": "3", "part": "mlp"})
    'layers_3.mlp'
    """
    return _HOLE.sub(lambda hole: found[hole[1]], pattern)


def holes(pattern: str) -> frozenset[str]:
    """The placeholders of ``pattern``."""
    return frozenset(hole[1] for hole in _HOLE.finditer(pattern))


def check_same_holes(what: str, patterns: Iterable[str], but: Iterable[str] = ()) -> None:
    """Refuse names of one operation that have different placeholders, ``but`` some.

    Raises:
        LayoutError: with the placeholders of each.
    """
    every = {p: holes(p) - set(but) for p in patterns}
    if len(set(every.values())) > 1:
        said = "; ".join(f"{p} has {', '.join(sorted(h)) or 'none'}" for p, h in every.items())
        raise LayoutError(f"{what}: the placeholders differ ({said}). Use the same in each name.")


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts, at, seen = [], 0, set[str]()
    for hole in _HOLE.finditer(pattern):
        parts.append(re.escape(pattern[at : hole.start()]))
        name = hole[1]
        if name in seen:
            parts.append(f"(?P={name})")
        else:
            kind = ".*" if hole[2] else r"\d+" if name in _NUMBERS else "[^./]+"
            parts.append(f"(?P<{name}>{kind})")
        seen.add(name)
        at = hole.end()
    return re.compile("".join(parts) + re.escape(pattern[at:]))
