"""Operations that make one tensor of several, or several of one.

Fuse, 2 groups, parts (2, 1, 1)     q0 q1 k0 v0  q2 q3 k1 v1     each kv head with its q heads
Fuse, 1 group                       q0 q1 q2 q3  k0 k1  v0 v1    in blocks
Fuse, row by row                    g0 u0 g1 u1 g2 u2 …
Stack                               layer 0, layer 1, …          along a new dim
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .. import dtypes
from ..errors import LayoutError, NotFoundError, some
from .algebra import Algebra, T
from .names import Found, check_same_holes, fill, holes, match
from .ops import Op

ROWS = -1  # as many groups as rows: what is fused alternates row by row


@dataclass(frozen=True, slots=True)
class Fuse(Op):
    """Several tensors as one: in each of ``groups`` equal parts of ``dim``, one after the other.

    Attributes:
        sources: their names, in order.
        target: the fused name.
        parts: how many rows of each go together, in any common measure (heads, say).
        groups: 1 for blocks, kv heads for grouped attention, -1 for row by row.
        dim: the dim that becomes longer.
    """

    word: ClassVar[str] = "fuse"
    sources: tuple[str, ...]
    target: str
    parts: tuple[int, ...]
    groups: int = 1
    dim: int = 0

    def __post_init__(self) -> None:
        check_same_holes(self.word, (*self.sources, self.target))
        _check_parts(self.sources, self.parts)

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors, those of each set as one."""
        result: dict[str, T] = {}
        for name, tensor in tensors.items():
            which, found = _which(self.sources, name)
            if found is None:
                _put(result, name, tensor)
                continue
            names = [fill(s, found) for s in self.sources]
            missing = [n for n in names if n not in tensors]
            if missing:
                raise NotFoundError(
                    f"{self.word} {fill(self.target, found)}: {name} is there, but {some(missing)} "
                    f"{'is' if len(missing) == 1 else 'are'} missing."
                )
            if which == 0:
                target = fill(self.target, found)
                _put(result, target, self._fused([tensors[n] for n in names], target, algebra))
        return result

    def _fused(self, xs: Sequence[T], name: str, algebra: Algebra[T]) -> T:
        shapes = [algebra.shape(x) for x in xs]
        lengths = [s[self.dim] for s in shapes]
        groups = lengths[0] // self.parts[0] if self.groups == ROWS else self.groups
        unit, rest = divmod(sum(lengths), groups * sum(self.parts))
        if rest or lengths != [groups * p * unit for p in self.parts]:
            raise LayoutError(
                f"{self.word} {name}: the sources have {lengths} rows along dim {self.dim}; in "
                f"{groups} groups of parts {self.parts} that does not go."
            )
        if groups == 1:
            return algebra.join(xs, self.dim, name)
        d = self.dim
        grouped = [
            algebra.reshape(x, (*s[:d], groups, n // groups, *s[d + 1 :]))
            for x, s, n in zip(xs, shapes, lengths, strict=True)
        ]
        joined = algebra.join(grouped, d + 1, name)
        return algebra.reshape(joined, (*shapes[0][:d], sum(lengths), *shapes[0][d + 1 :]))

    def inverse(self) -> Unfuse:
        """Take them apart."""
        return Unfuse(self.target, self.sources, self.parts, self.groups, self.dim)


@dataclass(frozen=True, slots=True)
class Unfuse(Op):
    """One tensor as the several that ``Fuse`` made it of."""

    word: ClassVar[str] = "unfuse"
    source: str
    targets: tuple[str, ...]
    parts: tuple[int, ...]
    groups: int = 1
    dim: int = 0

    def __post_init__(self) -> None:
        check_same_holes(self.word, (self.source, *self.targets))
        _check_parts(self.targets, self.parts)

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors, the fused ones taken apart."""
        result: dict[str, T] = {}
        for name, tensor in tensors.items():
            found = match(self.source, name)
            if found is None:
                _put(result, name, tensor)
                continue
            for target, part in zip(self.targets, self._apart(tensor, name, algebra), strict=True):
                _put(result, fill(target, found), part)
        return result

    def _apart(self, x: T, name: str, algebra: Algebra[T]) -> list[T]:
        shape, d, total = algebra.shape(x), self.dim, sum(self.parts)
        groups = shape[d] // total if self.groups == ROWS else self.groups
        unit, rest = divmod(shape[d], groups * total)
        if rest:
            raise LayoutError(
                f"{self.word} {name}: dim {d} of shape {shape} is not {groups} groups of parts "
                f"{self.parts}."
            )
        grouped = algebra.reshape(x, (*shape[:d], groups, total * unit, *shape[d + 1 :]))
        parts, at = [], 0
        for part in self.parts:
            piece = algebra.cut(grouped, d + 1, at, at + part * unit)
            rows = groups * part * unit
            parts.append(algebra.reshape(piece, (*shape[:d], rows, *shape[d + 1 :])))
            at += part * unit
        return parts

    def inverse(self) -> Fuse:
        """Fuse them again."""
        return Fuse(self.targets, self.source, self.parts, self.groups, self.dim)


@dataclass(frozen=True, slots=True)
class Stack(Op):
    """The tensors that differ in ``index`` as one, along a new ``dim``.

    Attributes:
        source: their name; ``target`` has the same placeholders but ``index``.
        first: the number of the first (of layers of a second kind, say).
    """

    word: ClassVar[str] = "stack"
    source: str
    target: str
    index: str = "layer"
    dim: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        _check_index(self.word, self.source, self.target, self.index)

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors, those of each set as one."""
        sets: dict[str, dict[int, str]] = {}
        for name in tensors:
            if (found := match(self.source, name)) is not None:
                sets.setdefault(fill(self.target, found), {})[int(found[self.index])] = name
        result: dict[str, T] = {}
        for name, tensor in tensors.items():
            found = match(self.source, name)
            if found is None:
                _put(result, name, tensor)
                continue
            target = fill(self.target, found)
            members = sets.pop(target, None)
            if members is not None:
                names = self._in_order(members, target)
                _put(result, target, self._stacked([tensors[n] for n in names], target, algebra))
        return result

    def _in_order(self, members: Mapping[int, str], target: str) -> list[str]:
        last = max(members)
        missing = [i for i in range(self.first, last + 1) if i not in members]
        if missing or min(members) < self.first:
            raise NotFoundError(
                f"{self.word} {target}: {self.index} {some(map(str, missing))} of "
                f"{self.first} to {last} is missing."
                if missing
                else f"{self.word} {target}: {members[min(members)]} comes before the first, "
                f"{self.index} {self.first}."
            )
        return [members[i] for i in sorted(members)]

    def _stacked(self, xs: Sequence[T], target: str, algebra: Algebra[T]) -> T:
        d = self.dim
        if d > len(algebra.shape(xs[0])):
            raise LayoutError(f"{self.word} {target}: there is no dim {d} to stack along.")
        thick = [algebra.reshape(x, (*(s := algebra.shape(x))[:d], 1, *s[d:])) for x in xs]
        return algebra.join(thick, d, target)

    def inverse(self) -> Unstack:
        """Take them apart."""
        return Unstack(self.target, self.source, self.index, self.dim, self.first)


@dataclass(frozen=True, slots=True)
class Unstack(Op):
    """One tensor as many, one for each element of ``dim``."""

    word: ClassVar[str] = "unstack"
    source: str
    target: str
    index: str = "layer"
    dim: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        _check_index(self.word, self.target, self.source, self.index)

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors, the stacked ones taken apart."""
        result: dict[str, T] = {}
        for name, tensor in tensors.items():
            found = match(self.source, name)
            if found is None:
                _put(result, name, tensor)
                continue
            shape, d = algebra.shape(tensor), self.dim
            if d >= len(shape):
                raise LayoutError(f"{self.word} {name}: shape {shape} has no dim {d}.")
            for i in range(shape[d]):
                one = algebra.cut(tensor, d, i, i + 1)
                filled = {**found, self.index: str(i + self.first)}
                target = fill(self.target, filled)
                _put(result, target, algebra.reshape(one, (*shape[:d], *shape[d + 1 :])))
        return result

    def inverse(self) -> Stack:
        """Stack them again."""
        return Stack(self.target, self.source, self.index, self.dim, self.first)


@dataclass(frozen=True, slots=True)
class Dequantize(Op):
    """Matrices stored in blocks with a factor each (FP8), as their true values.

    Attributes:
        weight: their name; one without a scale stays as it is.
        scale: the name of the factors, which are then gone.
        block: rows and columns that share a factor.
        dtype: of the values.
    """

    word: ClassVar[str] = "dequantize"
    weight: str = "{name*}.weight"
    scale: str = "{name*}.weight_scale_inv"
    block: tuple[int, int] = (128, 128)
    dtype: str = "BF16"

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors with true values, less the factors."""
        kind = dtypes.dtype(self.dtype)
        result: dict[str, T] = {}
        for name, tensor in tensors.items():
            if (found := match(self.scale, name)) is not None:
                weight = fill(self.weight, found)
                if weight not in tensors:
                    raise NotFoundError(f"{self.word}: {name} scales {weight}, which is missing.")
                continue
            found = match(self.weight, name)
            factors = tensors.get(fill(self.scale, found)) if found is not None else None
            if factors is None:
                result[name] = tensor
            else:
                result[name] = algebra.scaled(tensor, factors, self.block, kind)
        return result

    def inverse(self) -> Op:
        """There is none.

        Raises:
            LayoutError: always.
        """
        raise LayoutError(
            "dequantize has no inverse: the factors would have to be chosen anew. Save the values "
            f"as {self.dtype}."
        )


def _put(result: dict[str, T], name: str, tensor: T) -> None:
    if name in result:
        raise LayoutError(f"two sources for one target: {name} is there twice.")
    result[name] = tensor


def _which(patterns: Sequence[str], name: str) -> tuple[int, Found | None]:
    for i, pattern in enumerate(patterns):
        if (found := match(pattern, name)) is not None:
            return i, found
    return 0, None


def _check_parts(names: Sequence[str], parts: Sequence[int]) -> None:
    if len(names) != len(parts) or min(parts) < 1:
        raise LayoutError(f"{len(names)} names need as many parts of 1 or more, not {parts}.")


def _check_index(word: str, many: str, one: str, index: str) -> None:
    if index not in holes(many) or index in holes(one):
        raise LayoutError(
            f"{word}: {{{index}}} must be in the name of the many ({many}) and not in that of "
            f"the one ({one})."
        )
    check_same_holes(word, (many, one), but=(index,))
