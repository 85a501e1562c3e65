"""Operations on tensors by name: plain data, each with its inverse where it has one.

An operation says which tensors it is about by names with placeholders (see ``names``) and
what becomes of them in the words of an ``Algebra``; it never knows what a tensor is. Those
that make one tensor of several, or several of one, are in ``joins``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from .. import dtypes
from ..errors import LayoutError, NotFoundError, nearest, some
from ..rules.match import template
from .algebra import Algebra, T
from .names import check_same_holes, fill, match

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Op:
    """One operation."""

    word: ClassVar[str] = ""

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors after the operation, by their new names."""
        raise NotImplementedError

    def inverse(self) -> Op:
        """The operation that undoes this one.

        Raises:
            LayoutError: there is none; what was lost is said.
        """
        raise LayoutError(f"{self.word} has no inverse: {self}.")


@dataclass(frozen=True, slots=True)
class Rename(Op):
    """Each name by the first rule that matches; a name without a rule stays.

    >>> Rename((("h.{layer}.{x*}", "layers.{layer}.{x*}"),)).apply({"h.0.w": 1}, None)
    {'layers.0.w': 1}
    """

    word: ClassVar[str] = "rename"
    rules: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        for rule in self.rules:
            check_same_holes(self.word, rule)

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors by their new names."""
        known: dict[str, int | None] = {}
        result: dict[str, T] = {}
        came: dict[str, str] = {}
        for name, tensor in tensors.items():
            new = self._new_name(name, known)
            if new in result:
                raise LayoutError(
                    f"two sources for one target: {came[new]} and {name} would both be {new}."
                )
            result[new], came[new] = tensor, name
        return result

    def _new_name(self, name: str, known: dict[str, int | None]) -> str:
        kind = template(name)
        at = known.get(kind, -1)
        if at is None:
            return name
        if at >= 0 and (found := match(self.rules[at][0], name)) is not None:
            return fill(self.rules[at][1], found)
        for i, (old, new) in enumerate(self.rules):
            if (found := match(old, name)) is not None:
                known[kind] = i
                return fill(new, found)
        known[kind] = None
        return name

    def inverse(self) -> Rename:
        """The rules the other way round."""
        return Rename(tuple((new, old) for old, new in self.rules))


@dataclass(frozen=True, slots=True)
class Drop(Op):
    """Leave tensors out.

    With ``rebuilt`` the model that lacks them makes them itself (rotary frequencies …), so
    that going back does not need them either.
    """

    word: ClassVar[str] = "drop"
    names: Names
    rebuilt: bool = False

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors but those."""
        return {n: t for n, t in tensors.items() if not is_about(self.names, n)}

    def inverse(self) -> Drop:
        """Itself, where nothing was lost."""
        if not self.rebuilt:
            raise LayoutError(f"drop has no inverse: {', '.join(self.names)} would be missing.")
        return self


@dataclass(frozen=True, slots=True)
class Expect(Op):
    """Refuse a name that is none of these: what no rule is about is said, not carried along."""

    word: ClassVar[str] = "expect"
    names: Names
    what: str = "the table"

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors as they are."""
        known: dict[str, bool] = {}
        strange = []
        for name in tensors:
            kind = template(name)
            if kind not in known:
                known[kind] = is_about(self.names, name)
            if not known[kind]:
                strange.append(name)
        if strange:
            raise NotFoundError(
                f"{self.what} has no rule for {len(strange)} of {len(tensors)} names: "
                f"{some(strange)}.{nearest(template(strange[0]), self.names)} Add a rule for each, "
                "or leave them out with --exclude."
            )
        return dict(tensors)

    def inverse(self) -> Expect:
        """Itself."""
        return self


@dataclass(frozen=True, slots=True)
class _Each(Op):
    """An operation on each tensor that ``names`` are about."""

    names: Names

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """All tensors, those changed."""
        known: dict[str, bool] = {}
        result = dict(tensors)
        for name, tensor in tensors.items():
            kind = template(name)
            if kind not in known:
                known[kind] = is_about(self.names, name)
            if known[kind]:
                try:
                    result[name] = self.change(tensor, algebra)
                except LayoutError as error:
                    raise LayoutError(f"{self.word} {name}: {error}") from None
        return result

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` after the operation."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Transpose(_Each):
    """Dim ``i`` becomes what dim ``order[i]`` was."""

    word: ClassVar[str] = "transpose"
    order: tuple[int, ...] = (1, 0)

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` transposed."""
        return algebra.transpose(x, self.order)

    def inverse(self) -> Transpose:
        """The order that undoes this one."""
        back = tuple(self.order.index(i) for i in range(len(self.order)))
        return replace(self, order=back)


@dataclass(frozen=True, slots=True)
class Split(_Each):
    """One dim becomes several, of ``sizes``; one of them may be -1, for what is left."""

    word: ClassVar[str] = "split"
    dim: int
    sizes: tuple[int, ...]

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` with more dims."""
        shape = algebra.shape(x)
        sizes = _filled(self.sizes, shape, self.dim)
        return algebra.reshape(x, (*shape[: self.dim], *sizes, *shape[self.dim + 1 :]))

    def inverse(self) -> Merge:
        """Merge them again."""
        return Merge(self.names, self.dim, self.sizes)


@dataclass(frozen=True, slots=True)
class Merge(_Each):
    """Several dims, the first of which is ``dim``, become one; ``sizes`` are theirs."""

    word: ClassVar[str] = "merge"
    dim: int
    sizes: tuple[int, ...]

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` with fewer dims."""
        shape = algebra.shape(x)
        end = self.dim + len(self.sizes)
        found = shape[self.dim : end]
        if any(a not in (-1, b) for a, b in zip(self.sizes, found, strict=False)):
            raise LayoutError(f"dims {self.dim} to {end - 1} of {shape} are not {self.sizes}.")
        return algebra.reshape(x, (*shape[: self.dim], prod(found), *shape[end:]))

    def inverse(self) -> Split:
        """Split it again."""
        return Split(self.names, self.dim, self.sizes)


@dataclass(frozen=True, slots=True)
class Slice(_Each):
    """The elements ``start:stop`` along ``dim``; the rest is lost."""

    word: ClassVar[str] = "slice"
    dim: int
    start: int
    stop: int

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """A part of ``x``."""
        return algebra.cut(x, self.dim, self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Pad(_Each):
    """Zeros after the ``length`` elements of ``dim``, up to ``to``."""

    word: ClassVar[str] = "pad"
    dim: int
    length: int
    to: int

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` and zeros."""
        shape = algebra.shape(x)
        if shape[self.dim] != self.length or self.to < self.length:
            raise LayoutError(
                f"dim {self.dim} of shape {shape} has {shape[self.dim]} elements; it is to be "
                f"padded from {self.length} to {self.to}."
            )
        return x if self.to == self.length else algebra.pad(x, self.dim, self.to)

    def inverse(self) -> Unpad:
        """Cut the zeros off."""
        return Unpad(self.names, self.dim, self.length, self.to)


@dataclass(frozen=True, slots=True)
class Unpad(_Each):
    """The first ``length`` of the ``to`` elements of ``dim``; the rest is padding."""

    word: ClassVar[str] = "unpad"
    dim: int
    length: int
    to: int

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` less its padding."""
        shape = algebra.shape(x)
        if shape[self.dim] != self.to:
            raise LayoutError(f"dim {self.dim} of shape {shape} was to have {self.to} elements.")
        return algebra.cut(x, self.dim, 0, self.length)

    def inverse(self) -> Pad:
        """Pad again."""
        return Pad(self.names, self.dim, self.length, self.to)


@dataclass(frozen=True, slots=True)
class Repeat(_Each):
    """``dim`` in ``groups`` (kv heads), each ``times`` times in a row."""

    word: ClassVar[str] = "repeat"
    groups: int
    times: int
    dim: int = 0

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x``, longer."""
        shape = algebra.shape(x)
        before, after = shape[: self.dim], shape[self.dim + 1 :]
        (groups, inner) = _filled((self.groups, -1), shape, self.dim)
        x = algebra.reshape(x, (*before, groups, 1, inner, *after))
        x = algebra.repeat(x, self.dim + 1, self.times)
        return algebra.reshape(x, (*before, groups * self.times * inner, *after))

    def inverse(self) -> Unrepeat:
        """Keep the first of each."""
        return Unrepeat(self.names, self.groups, self.times, self.dim)


@dataclass(frozen=True, slots=True)
class Unrepeat(_Each):
    """Of each of ``groups`` groups that is there ``times`` times, the first."""

    word: ClassVar[str] = "unrepeat"
    groups: int
    times: int
    dim: int = 0

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x``, shorter."""
        shape = algebra.shape(x)
        before, after = shape[: self.dim], shape[self.dim + 1 :]
        groups, times, inner = _filled((self.groups, self.times, -1), shape, self.dim)
        x = algebra.reshape(x, (*before, groups, times, inner, *after))
        x = algebra.cut(x, self.dim + 1, 0, 1)
        return algebra.reshape(x, (*before, groups * inner, *after))

    def inverse(self) -> Repeat:
        """Repeat again."""
        return Repeat(self.names, self.groups, self.times, self.dim)


@dataclass(frozen=True, slots=True)
class Cast(_Each):
    """Other elements of the same values, rounded; ``was`` says what to go back to."""

    word: ClassVar[str] = "cast"
    dtype: str
    was: str | None = None

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` in another dtype."""
        return algebra.cast(x, dtypes.dtype(self.dtype))

    def inverse(self) -> Cast:
        """Back to ``was``: the values stay rounded."""
        if self.was is None:
            raise LayoutError(
                f"cast of {', '.join(self.names)} to {self.dtype} has no inverse, for it does not "
                "say what the dtype was. Give it was=."
            )
        return Cast(self.names, self.was, self.dtype)


def is_about(patterns: Names, name: str) -> bool:
    """Whether one of ``patterns`` matches ``name``."""
    return any(match(p, name) is not None for p in patterns)


def _filled(sizes: tuple[int, ...], shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """``sizes`` with the number that -1 stands for.

    Raises:
        LayoutError: they do not multiply to the length of the dim.
    """
    length, known = shape[dim], prod(n for n in sizes if n != -1)
    if length % known or (-1 not in sizes and known != length):
        raise LayoutError(
            f"dim {dim} of shape {shape} has {length} elements, which is not "
            f"{' x '.join('?' if n == -1 else str(n) for n in sizes)}."
        )
    return tuple(length // known if n == -1 else n for n in sizes)
