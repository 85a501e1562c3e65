"""Operations that make one tensor of several, or several of one.

Fuse, 2 groups, parts (2, 1, 1)     q0 q1 k0 v0  q2 q3 k1 v1     each kv head with its q heads
Fuse, 1 group                       q0 q1 q2 q3  k0 k1  v0 v1    in blocks
Fuse, row by row                    g0 u0 g1 u1 g2 u2 …
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from ..dtypes import DType
from ..errors import LayoutError, NotFoundError, some
from .algebra import Algebra, T
from .checks import check_numbers, dtype_of, length_of
from .names import Found, check_same_holes, fill, match
from .ops import Op, put

WITHOUT_BLOCKS = (0, 0)  # a factor is for all of a tensor, or for a row
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
        _check_parts(self.word, self.sources, self.parts, self.groups, self.dim)

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors, those of each set as one."""
        result: dict[str, T] = {}
        for name, tensor in tensors.items():
            which, found = _which(self.sources, name)
            if found is None:
                put(result, name, tensor)
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
                put(result, target, self._fused([tensors[n] for n in names], target, algebra))
        return result

    def _fused(self, xs: Sequence[T], name: str, algebra: Algebra[T]) -> T:
        shapes = [algebra.shape(x) for x in xs]
        lengths = [length_of(s, self.dim, f"{self.word} {name}") for s in shapes]
        groups = self.groups if self.groups != ROWS else max(1, lengths[0] // self.parts[0])
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
        _check_parts(self.word, self.targets, self.parts, self.groups, self.dim)

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors, the fused ones taken apart."""
        result: dict[str, T] = {}
        for name, tensor in tensors.items():
            found = match(self.source, name)
            if found is None:
                put(result, name, tensor)
                continue
            for target, part in zip(self.targets, self._apart(tensor, name, algebra), strict=True):
                put(result, fill(target, found), part)
        return result

    def _apart(self, x: T, name: str, algebra: Algebra[T]) -> list[T]:
        shape, d, total = algebra.shape(x), self.dim, sum(self.parts)
        length = length_of(shape, d, f"{self.word} {name}")
        groups = self.groups if self.groups != ROWS else max(1, length // total)
        unit, rest = divmod(length, groups * total)
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
class Dequantize(Op):
    """Matrices stored in blocks with a factor each (FP8), as their true values.

    Attributes:
        weight: their name; one without a scale stays as it is.
        scale: the name of the factors, which are then gone.
        block: rows and columns that share a factor; (0, 0) for one factor of the tensor, or
            one of each row, as the shape of the factors is.
        dtype: of the values.
    """

    word: ClassVar[str] = "dequantize"
    weight: str = "{name*}.weight"
    scale: str = "{name*}.weight_scale_inv"
    block: tuple[int, int] = (128, 128)
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        if len(self.block) != 2 or (min(self.block) < 1 and self.block != WITHOUT_BLOCKS):
            raise LayoutError(
                f"dequantize: block {self.block} must be two numbers of 1 or more (rows, columns), "
                "or [0, 0] for a factor of the tensor or of each row."
            )
        dtype_of(self.word, self.dtype)

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors with true values, less the factors."""
        kind = dtype_of(self.word, self.dtype)
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
                result[name] = self._scaled(tensor, factors, algebra, kind)
        return result

    def _scaled(self, tensor: T, factors: T, algebra: Algebra[T], kind: DType) -> T:
        if self.block != WITHOUT_BLOCKS:
            return algebra.scaled(tensor, factors, self.block, kind)
        shape, own = algebra.shape(tensor), algebra.shape(factors)
        if len(shape) != 2 or own not in ((), (1,), (1, 1), shape[:1], (*shape[:1], 1)):
            raise LayoutError(
                f"{self.word}: factors of shape {own} are neither one for a weight of shape "
                f"{shape} nor one for each of its rows. Give the rows and columns that share a "
                "factor as block."
            )
        rows = prod(own)
        factors = algebra.reshape(factors, (rows, 1))
        return algebra.scaled(tensor, factors, (max(1, shape[0] // rows), max(1, shape[1])), kind)

    def inverse(self) -> Op:
        """There is none.

        Raises:
            LayoutError: always.
        """
        raise LayoutError(
            "dequantize has no inverse: the factors would have to be chosen anew. Save the values "
            f"as {self.dtype}."
        )


def _which(patterns: Sequence[str], name: str) -> tuple[int, Found | None]:
    for i, pattern in enumerate(patterns):
        if (found := match(pattern, name)) is not None:
            return i, found
    return 0, None


def _check_parts(
    word: str, names: Sequence[str], parts: Sequence[int], groups: int, dim: int
) -> None:
    if not names or len(names) != len(parts) or min(parts) < 1:
        raise LayoutError(
            f"{word}: {len(names)} names need as many parts of 1 or more, not {parts}."
        )
    check_numbers(word, dim=dim)
    if groups != ROWS:
        check_numbers(word, 1, groups=groups)
