"""Operations that join several tensors or split one: fuse, stack, tie, dequantize.

Fuse, 2 groups, parts (2, 1, 1)     q0 q1 k0 v0  q2 q3 k1 v1     each kv head with its q heads
Fuse, 1 group                       q0 q1 q2 q3  k0 k1  v0 v1    in blocks
Fuse, row by row                    g0 u0 g1 u1 g2 u2 …
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from ..core.dtypes import CODES, DType
from ..core.patterns import Holes, fill, holes, match
from ..errors import LayoutError, NotFoundError, format_list
from .algebra import Algebra, T, check_numbers, dtype_of, length_of
from .ops import Op, check_same_holes, put

WITHOUT_BLOCKS = (0, 0)  # one factor for the tensor, or one for each row
ROWS = -1  # as many groups as rows: the sources alternate row by row


@dataclass(frozen=True, slots=True)
class Fuse(Op):
    """Concatenate several tensors along ``dim`` in each of ``groups`` equal parts.

    Attributes:
        sources: their names, in order.
        target: the fused name.
        parts: rows of each source in a group, in any common unit (such as heads).
        groups: 1 for blocks, kv heads for grouped attention, -1 for row by row.
        dim: the dim that grows.
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
        """The tensors with each set joined."""
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
                    f"{self.word} {fill(self.target, found)}: {name} exists, but "
                    f"{format_list(missing)} "
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
                f"{self.word} {name}: the sources have {lengths} rows along dim {self.dim}, which "
                f"cannot be divided into {groups} groups with parts {self.parts}."
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
        """Return the operation that splits them again."""
        return Unfuse(self.target, self.sources, self.parts, self.groups, self.dim)


@dataclass(frozen=True, slots=True)
class Unfuse(Op):
    """Split a fused tensor into its sources: the inverse of ``Fuse``."""

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
        """The tensors with fused ones split."""
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
                f"{self.word} {name}: dim {d} of shape {shape} cannot be divided into {groups} "
                f"groups with parts {self.parts}."
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
        """Return the fusion."""
        return Fuse(self.targets, self.source, self.parts, self.groups, self.dim)


@dataclass(frozen=True, slots=True)
class Dequantize(Op):
    """Dequantize weights whose blocks share a factor each (FP8, MXFP4, NVFP4, int8, int4).

    Attributes:
        weight: pattern of the weights; one without factors stays unchanged.
        scale: pattern of the factors, which are dropped.
        block: rows and columns that share a factor; (0, 0) for one factor for the tensor, for
            each row, or for each group of columns, depending on the shape of the factors.
        dtype: of the values.
        code: how an integer of the weights packs several values (``e2m1``, ``int4``, ``int8``);
            a weight with one more dim than its factors is in groups.
        scale_dtype: a dtype as wide as that of the factors, whose bits they are.
        outer: pattern of one more factor of each weight, for all its factors. Weights without
            one stay unchanged.
        divides: ``outer`` divides the factors.
    """

    word: ClassVar[str] = "dequantize"
    weight: str = "{name*}.weight"
    scale: str = "{name*}.weight_scale_inv"
    block: tuple[int, int] = (128, 128)
    dtype: str = "BF16"
    code: str = ""
    scale_dtype: str = ""
    outer: str = ""
    divides: bool = False

    def __post_init__(self) -> None:
        if self.code and self.code not in CODES:
            raise LayoutError(
                f"dequantize: unknown code {self.code!r} (known: {', '.join(CODES)})."
            )
        dtype_of(self.word, self.scale_dtype or self.dtype)
        if len(self.block) != 2 or (min(self.block) < 1 and self.block != WITHOUT_BLOCKS):
            raise LayoutError(
                f"dequantize: block {self.block} must be two numbers of 1 or more (rows, columns), "
                "or [0, 0] for one factor for the tensor, for each row or for each group of "
                "columns."
            )
        dtype_of(self.word, self.dtype)

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The dequantized tensors without the factors."""
        kind = dtype_of(self.word, self.dtype)
        result: dict[str, T] = {}
        used: set[str] = set()
        for name, tensor in tensors.items():
            found = match(self.weight, name)
            patterns = (self.scale, self.outer) if self.outer else (self.scale,)
            names = [fill(p, found) for p in patterns] if found is not None else [""]
            if all(n in tensors for n in names):
                used.update(names)
                factors = [tensors[n] for n in names]
                result[name] = self._scaled(tensor, factors, algebra, kind)
            else:
                result[name] = tensor
        for name in tensors:
            found = match(self.scale, name)
            if found is not None and (weight := fill(self.weight, found)) not in tensors:
                raise NotFoundError(f"{self.word}: {name} scales {weight}, which is missing.")
        return {n: t for n, t in result.items() if n not in used}

    def _scaled(self, x: T, factors: Sequence[T], algebra: Algebra[T], kind: DType) -> T:
        scale, *outer = factors
        if self.scale_dtype:
            scale = algebra.bits_as(scale, dtype_of(self.word, self.scale_dtype))
        shape, own = algebra.shape(x), algebra.shape(scale)
        if self.code and len(shape) == len(own) + 1 > 1:
            x = algebra.reshape(x, (*shape[:-2], shape[-2] * shape[-1]))
        if self.code:
            x = algebra.decoded(x, self.code)
        block, shape = self.block, algebra.shape(x)
        if block == WITHOUT_BLOCKS:
            block = self._block_of(shape, own)
            if len(own) < 2:
                scale = algebra.reshape(scale, (prod(own), 1))
        whole = algebra.reshape(outer[0], ()) if outer else None
        return algebra.scaled(x, scale, block, kind, whole, divides=self.divides)

    def _block_of(self, shape: tuple[int, ...], own: tuple[int, ...]) -> tuple[int, int]:
        """Return the rows and columns of ``shape`` that share each of the factors ``own``."""
        lone = ((), (1,), (1, 1), shape[:1], (*shape[:1], 1))
        if len(shape) == 2 and own in lone:
            return max(1, shape[0] // prod(own)), max(1, shape[1])
        if len(shape) < 2 or own[:-1] != shape[:-1] or shape[-1] % max(1, own[-1]):
            raise LayoutError(
                f"{self.word}: factors of shape {own} for a weight of shape {shape}; expected one "
                "for the weight, one for each row, or one for each group of columns. Set block to "
                "the rows and columns that share a factor."
            )
        return 1, shape[-1] // max(1, own[-1])

    def inverse(self) -> Op:
        """Raise, because the factors cannot be recovered.

        Raises:
            LayoutError: always.
        """
        raise LayoutError(
            f"dequantize has no inverse: the factors are lost. Save the values as {self.dtype}."
        )


def _which(patterns: Sequence[str], name: str) -> tuple[int, Holes | None]:
    for i, pattern in enumerate(patterns):
        if (found := match(pattern, name)) is not None:
            return i, found
    return 0, None


def _check_parts(
    word: str, names: Sequence[str], parts: Sequence[int], groups: int, dim: int
) -> None:
    if not names or len(names) != len(parts) or min(parts) < 1:
        raise LayoutError(
            f"{word}: {len(names)} names need {len(names)} parts of 1 or more, got {parts}."
        )
    check_numbers(word, dim=dim)
    if groups != ROWS:
        check_numbers(word, 1, groups=groups)


# --- Stacks of layers and experts, and tied tensors

_MAX_STACKED = 1_000_000  # no model has more; an untrusted length must not loop for hours


@dataclass(frozen=True, slots=True)
class Stack(Op):
    """Stack the tensors that differ in ``index`` along a new ``dim``.

    Attributes:
        source: pattern of the sources; ``target`` has the same placeholders except ``index``.
        first: the first index (not 0 for a second kind of layers).
        count: how many to stack, by default all; tensors with other indices stay unchanged.
    """

    word: ClassVar[str] = "stack"
    source: str
    target: str
    index: str = "layer"
    dim: int = 0
    first: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        _check_index(self.word, self.source, self.target, self.index)
        _check_stack(self.word, self.dim, self.first, self.count)

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors with each set joined."""
        sets: dict[str, dict[int, str]] = {}
        targets: dict[str, str] = {}
        for name in tensors:
            found = match(self.source, name)
            if found is None or not self._is_counted(number := _number(name, found[self.index])):
                continue
            targets[name] = target = fill(self.target, found)
            other = sets.setdefault(target, {}).setdefault(number, name)
            if other != name:
                raise LayoutError(
                    f"two sources for one target: {other} and {name} both become {self.index} "
                    f"{number} of {target}."
                )
        result: dict[str, T] = {}
        for name, tensor in tensors.items():
            if name not in targets:
                put(result, name, tensor)
            elif (members := sets.pop(targets[name], None)) is not None:
                names = self._in_order(members, targets[name])
                xs = [tensors[n] for n in names]
                put(result, targets[name], self._stacked(xs, targets[name], algebra))
        return result

    def _is_counted(self, number: int) -> bool:
        return self.count is None or self.first <= number < self.first + self.count

    def _in_order(self, members: Mapping[int, str], target: str) -> list[str]:
        last = max(members) if self.count is None else self.first + self.count - 1
        if min(members) < self.first:
            raise NotFoundError(
                f"{self.word} {target}: {members[min(members)]} precedes the first, "
                f"{self.index} {self.first}."
            )
        num_missing = last + 1 - self.first - len(members)
        if num_missing:
            missing = (i for i in itertools.count(self.first) if i not in members)
            listed = ", ".join(str(i) for i in itertools.islice(missing, min(num_missing, 5)))
            more = f" and {num_missing - 5} more" if num_missing > 5 else ""
            raise NotFoundError(
                f"{self.word} {target}: {self.index} {listed}{more} of {self.first} to {last} "
                f"{'is' if num_missing == 1 else 'are'} missing."
            )
        return [members[i] for i in sorted(members)]

    def _stacked(self, xs: Sequence[T], target: str, algebra: Algebra[T]) -> T:
        d = self.dim
        if d > len(algebra.shape(xs[0])):
            raise LayoutError(
                f"{self.word} {target}: no dim {d} to stack along in shape {algebra.shape(xs[0])}."
            )
        thick = [algebra.reshape(x, (*(s := algebra.shape(x))[:d], 1, *s[d:])) for x in xs]
        return algebra.join(thick, d, target)

    def inverse(self) -> Unstack:
        """Return the operation that splits them again."""
        return Unstack(self.target, self.source, self.index, self.dim, self.first, self.count)


@dataclass(frozen=True, slots=True)
class Unstack(Op):
    """Split a tensor along ``dim`` into one for each index: the inverse of ``Stack``."""

    word: ClassVar[str] = "unstack"
    source: str
    target: str
    index: str = "layer"
    dim: int = 0
    first: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        _check_index(self.word, self.target, self.source, self.index)
        _check_stack(self.word, self.dim, self.first, self.count)

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors with stacked ones split."""
        result: dict[str, T] = {}
        for name, tensor in tensors.items():
            found = match(self.source, name)
            if found is None:
                put(result, name, tensor)
                continue
            shape, d = algebra.shape(tensor), self.dim
            length = length_of(shape, d, f"{self.word} {name}")
            if length > _MAX_STACKED or self.count not in (None, length):
                raise LayoutError(
                    f"{self.word} {name}: dim {d} of shape {shape} has {length} elements, "
                    f"expected {self.count or f'at most {_MAX_STACKED}'}."
                )
            for i in range(length):
                one = algebra.cut(tensor, d, i, i + 1)
                filled = {**found, self.index: str(i + self.first)}
                target = fill(self.target, filled)
                put(result, target, algebra.reshape(one, (*shape[:d], *shape[d + 1 :])))
        return result

    def inverse(self) -> Stack:
        """Return the stacking."""
        return Stack(self.target, self.source, self.index, self.dim, self.first, self.count)


@dataclass(frozen=True, slots=True)
class Tie(Op):
    """Drop tensors that are copies of others (such as a tied head).

    Attributes:
        copies: pairs (copy, original) of names.
    """

    word: ClassVar[str] = "tie"
    copies: tuple[tuple[str, str], ...]
    beside: str  # the inverse restores the copies only in models with this tensor

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors without the copies."""
        result = dict(tensors)
        for copy, original in self.copies:
            if copy in result and original not in result:
                raise NotFoundError(
                    f"{self.word}: {copy} is a copy of {original}, which is missing. Add it, or "
                    "exclude the copy (exclude=, --exclude)."
                )
            result.pop(copy, None)
        return result

    def inverse(self) -> Untie:
        """Return the operation that restores the copies."""
        return Untie(self.copies, self.beside)


@dataclass(frozen=True, slots=True)
class Untie(Op):
    """Duplicate tied tensors: the inverse of ``Tie``."""

    word: ClassVar[str] = "untie"
    copies: tuple[tuple[str, str], ...]
    beside: str

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors and a copy of each original that exists."""
        result = dict(tensors)
        if self.beside in tensors:
            for copy, original in self.copies:
                if original in tensors:
                    put(result, copy, tensors[original])
        return result

    def inverse(self) -> Tie:
        """Return the operation that drops the copies."""
        return Tie(self.copies, self.beside)


def _number(name: str, digits: str) -> int:
    """Parse the number of a layer or an expert.

    Raises:
        LayoutError: not a number.
    """
    if not digits.isdecimal() or len(digits) > 9:
        raise LayoutError(
            f"{name[:80]}: {digits[:20]!r} is not a number of a layer or an expert. Name the "
            "placeholder {layer}, {expert} or {index}: these match numbers only."
        )
    return int(digits)


def _check_stack(word: str, dim: int, first: int, count: int | None) -> None:
    check_numbers(word, dim=dim, first=first)
    if count is not None:
        check_numbers(word, 1, count=count)


def _check_index(word: str, many: str, one: str, index: str) -> None:
    if index not in holes(many) or index in holes(one):
        raise LayoutError(
            f"{word}: {{{index}}} must be in the name of the unstacked tensors ({many}) and not in "
            f"that of the stack ({one})."
        )
    check_same_holes(word, (many, one), but=(index,))
