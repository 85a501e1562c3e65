"""Name patterns with placeholders, and checks of a mapping's names.

model.layers.{layer}.mlp.{part}.weight      layer: digits; part: one dotted part
model.{rest*}                               rest: anything
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import prod

from ..core import dtypes
from ..core.dtypes import BY_NAME, DType, is_float
from ..errors import FormatError, LayoutError, did_you_mean

_HOLE = re.compile(r"\{([^\W\d]\w*)(\*?)\}")
_NUMBERS = frozenset({"layer", "expert", "index"})
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name

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


class Patterns:
    """An ordered list of patterns, each asked once per kind of name.

    Names of one kind differ only in numbers that no pattern has: ``layers.61.*`` tells layer
    61 from the others, and ``layers.{layer}.*`` none from another. A pattern whose answer
    depends on more than that (a placeholder that is there twice, digits beside one) is asked
    every time.

    Attributes:
        num_asked: how many times a pattern was compared with a name.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = tuple(patterns)
        self._said = frozenset(n for p in self._patterns for n in _NUMBER.findall(p))
        numbered = list(enumerate(self._patterns))
        self._special = [(i, p) for i, p in numbered if _tells_more(p)]
        self._plain = [(i, p) for i, p in numbered if not _tells_more(p)]
        self._known: dict[str, int | None] = {}
        self.num_asked = 0

    def find(self, name: str) -> int | None:
        """The number of the first pattern that matches ``name``.

        >>> Patterns(["h.1.{x}", "h.{layer}.{x}"]).find("h.0.w")
        1
        """
        kind = _NUMBER.sub(self._as_kind, name)
        if kind not in self._known:
            self._known[kind] = self._ask(self._plain, name)
        plain = self._known[kind]
        special = self._ask(self._special, name)
        return min((i for i in (plain, special) if i is not None), default=None)

    def _as_kind(self, number: re.Match[str]) -> str:
        return number[0] if number[0] in self._said else "#"

    def _ask(self, patterns: Iterable[tuple[int, str]], name: str) -> int | None:
        for i, pattern in patterns:
            self.num_asked += 1
            if match(pattern, name) is not None:
                return i
        return None


def _tells_more(pattern: str) -> bool:
    """Whether names of one kind may differ in matching ``pattern``."""
    names = [hole[1] for hole in _HOLE.finditer(pattern)]
    parts = _HOLE.sub("\0", pattern).split(".")
    return len(set(names)) < len(names) or any(
        "\0" in part and any(map(str.isdigit, part)) for part in parts
    )


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


# --- Checks: what every algebra refuses, said alike of tensors in files and of arrays in memory

Shape = tuple[int, ...]


def check_numbers(word: str, least: int = 0, **numbers: int) -> None:
    """Refuse fields of an operation that are less than ``least``."""
    for name, n in numbers.items():
        if n < least:
            why = " Dims are counted from 0." if name == "dim" else ""
            raise LayoutError(f"{word}: {name} = {n}; it must be {least} or more.{why}")


def length_of(shape: Shape, dim: int, what: str = "") -> int:
    """The elements along ``dim``; ``what`` goes before a message.

    Raises:
        LayoutError: there is no such dim.
    """
    if not 0 <= dim < len(shape):
        raise LayoutError(
            f"{what}{': ' if what else ''}shape {shape} has no dim {dim}; dims are counted from 0."
        )
    return shape[dim]


def check_order(name: str, order: Sequence[int], shape: Shape) -> None:
    """Refuse what is no order of the dims of ``shape``."""
    if sorted(order) != list(range(len(shape))):
        raise LayoutError(
            f"{name}: {tuple(order)} is not an order of the {len(shape)} dims of shape {shape}."
        )


def check_reshape(name: str, old: Shape, new: Shape) -> None:
    """Refuse another number of elements."""
    if prod(new) != prod(old):
        raise LayoutError(
            f"{name}: shape {old} has {prod(old)} elements and cannot become {new}, which has "
            f"{prod(new)}."
        )


def check_cut(name: str, shape: Shape, dim: int, start: int, stop: int) -> None:
    """Refuse a part that is empty or outside."""
    if not 0 <= start < stop <= length_of(shape, dim, name):
        raise LayoutError(f"{name}: {start}:{stop} is no part of dim {dim} of shape {shape}.")


def check_join(
    target: str, dim: int, parts: Sequence[tuple[str, Shape, DType | str | None]]
) -> None:
    """Refuse tensors (name, shape, dtype) whose dtypes, or whose other dims, differ."""
    first, shape, dtype = parts[0]
    length_of(shape, dim, target)
    for name, other, kind in parts[1:]:
        same = len(other) == len(shape) and all(
            a == b or d == dim for d, (a, b) in enumerate(zip(shape, other, strict=True))
        )
        if not same or kind != dtype:
            raise LayoutError(
                f"{target}: {first} ({dtype}, {shape}) and {name} ({kind}, {other}) do not join "
                f"along dim {dim}. Cast or reshape one of them first."
            )


def check_repeat(name: str, shape: Shape, dim: int) -> None:
    """Refuse a dim of several elements."""
    if length_of(shape, dim, name) != 1:
        raise LayoutError(
            f"{name}: dim {dim} of shape {shape} has {shape[dim]} elements; only 1 can be repeated."
        )


def check_cast(old: DType, new: DType) -> None:
    """Refuse to cut off what is behind the point."""
    if old.name.startswith("C") and not new.name.startswith("C"):
        raise LayoutError(f"{old} to {new} would lose the imaginary parts.")
    if is_float(old) and not is_float(new):
        raise LayoutError(
            f"{old} to {new} would cut off fractions, and what is too large. Cast to a float."
        )


def check_scales(
    name: str, shape: Shape, scale: str, scale_shape: Shape, block: tuple[int, int]
) -> None:
    """Refuse factors that are not one for each block of a matrix."""
    expected = tuple(-(-n // b) for n, b in zip(shape, block, strict=False))
    if len(shape) != 2 or scale_shape != expected:
        raise LayoutError(
            f"{name}: shape {shape} in blocks of {block[0]} x {block[1]} needs scales of shape "
            f"{expected}, and {scale} has {scale_shape}."
        )


def dtype_of(word: str, name: str) -> DType:
    """The dtype that an operation says.

    Raises:
        LayoutError: there is none of that name.
    """
    try:
        return dtypes.dtype(name)
    except FormatError as error:
        raise LayoutError(f"{word}: {error}{did_you_mean(name.upper(), BY_NAME)}") from None
