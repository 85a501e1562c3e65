"""Operations on single tensors, with their inverses.

An operation says which tensors it is about by names with placeholders (see ``names``) and
what becomes of them in the words of an ``Algebra``; it never knows what a tensor is. Those
that make one tensor of several, or several of one, are in ``joins``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from ..core.patterns import Patterns, fill, holes, match, placeholders, template
from ..errors import LayoutError, NotFoundError, did_you_mean, format_list
from .algebra import Algebra, T, check_cast, check_numbers, dtype_of, length_of

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
        patterns = Patterns((old for old, _ in self.rules), placeholders)
        return renamed(tensors, lambda name: self._new_name(name, patterns.find(name)))

    def _new_name(self, name: str, rule: int | None) -> str:
        if rule is None:
            return name
        old, new = self.rules[rule]
        found = match(old, name)
        assert found is not None
        return fill(new, found)

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
        patterns = Patterns(self.names, placeholders)
        return {n: t for n, t in tensors.items() if patterns.find(n) is None}

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
        patterns = Patterns(self.names, placeholders)
        strange = [name for name in tensors if patterns.find(name) is None]
        if strange:
            raise NotFoundError(
                f"{self.what} has no rule for {len(strange)} of {len(tensors)} names: "
                f"{format_list(strange)}.{did_you_mean(template(strange[0]), self.names)} Add a "
                "rule for each, "
                "or leave them out (exclude=, --exclude)."
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
        patterns = Patterns(self.names, placeholders)
        result = dict(tensors)
        for name, tensor in tensors.items():
            if patterns.find(name) is not None:
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

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise LayoutError(
                f"transpose: order {self.order} must name each of its {len(self.order)} dims once, "
                f"from 0 to {len(self.order) - 1}."
            )

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

    def __post_init__(self) -> None:
        check_numbers(self.word, dim=self.dim)
        _check_sizes(self.word, self.sizes)
        if self.sizes.count(-1) > 1:
            raise LayoutError(f"split: of sizes {self.sizes} only one may be -1, for what is left.")

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

    def __post_init__(self) -> None:
        check_numbers(self.word, dim=self.dim)
        _check_sizes(self.word, self.sizes)

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` with fewer dims."""
        shape = algebra.shape(x)
        end = self.dim + len(self.sizes)
        found = shape[self.dim : end]
        fit = end <= len(shape) and all(
            a in (-1, b) for a, b in zip(self.sizes, found, strict=True)
        )
        if not fit:
            raise LayoutError(f"dims {self.dim} to {end - 1} of {shape} are not {self.sizes}.")
        return algebra.reshape(x, (*shape[: self.dim], prod(found), *shape[end:]))

    def inverse(self) -> Split:
        """Split it again.

        Raises:
            LayoutError: ``sizes`` leave open how.
        """
        if self.sizes.count(-1) > 1:
            raise LayoutError(
                f"merge of {', '.join(self.names)} has no inverse, for sizes {self.sizes} do not "
                "say how to split again. Give all but one."
            )
        return Split(self.names, self.dim, self.sizes)


@dataclass(frozen=True, slots=True)
class Slice(_Each):
    """The elements ``start:stop`` along ``dim``; the rest is lost."""

    word: ClassVar[str] = "slice"
    dim: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        check_numbers(self.word, dim=self.dim, start=self.start)
        check_numbers(self.word, self.start + 1, stop=self.stop)

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

    def __post_init__(self) -> None:
        _check_padding(self.word, self.dim, self.length, self.to)

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` and zeros."""
        shape = algebra.shape(x)
        length = length_of(shape, self.dim)
        if length != self.length:
            raise LayoutError(
                f"dim {self.dim} of shape {shape} has {length} elements; it is to be padded from "
                f"{self.length} to {self.to}."
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

    def __post_init__(self) -> None:
        _check_padding(self.word, self.dim, self.length, self.to)

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` less its padding."""
        shape = algebra.shape(x)
        if length_of(shape, self.dim) != self.to:
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

    def __post_init__(self) -> None:
        check_numbers(self.word, dim=self.dim)
        check_numbers(self.word, 1, groups=self.groups, times=self.times)

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x``, longer."""
        shape = algebra.shape(x)
        (groups, inner) = _filled((self.groups, -1), shape, self.dim)
        before, after = shape[: self.dim], shape[self.dim + 1 :]
        x = algebra.reshape(x, (*before, groups, 1, inner, *after))
        x = algebra.repeat(x, self.dim + 1, self.times)
        return algebra.reshape(x, (*before, groups * self.times * inner, *after))

    def inverse(self) -> Unrepeat:
        """Keep the first of each."""
        return Unrepeat(self.names, self.groups, self.times, self.dim)


@dataclass(frozen=True, slots=True)
class Unrepeat(_Each):
    """Of each of ``groups`` groups that is there ``times`` times, the first.

    The others are not compared with it: nothing of them is read.
    """

    word: ClassVar[str] = "unrepeat"
    groups: int
    times: int
    dim: int = 0

    def __post_init__(self) -> None:
        check_numbers(self.word, dim=self.dim)
        check_numbers(self.word, 1, groups=self.groups, times=self.times)

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x``, shorter."""
        shape = algebra.shape(x)
        groups, times, inner = _filled((self.groups, self.times, -1), shape, self.dim)
        before, after = shape[: self.dim], shape[self.dim + 1 :]
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

    def __post_init__(self) -> None:
        dtype_of(self.word, self.dtype)
        dtype_of(self.word, self.was or self.dtype)

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` in another dtype."""
        return algebra.cast(x, dtype_of(self.word, self.dtype))

    def inverse(self) -> Cast:
        """Back to ``was``: the values stay rounded."""
        if self.was is None:
            raise LayoutError(
                f"cast of {', '.join(self.names)} to {self.dtype} has no inverse, for it does not "
                "say what the dtype was. Give it was=."
            )
        try:
            check_cast(dtype_of(self.word, self.dtype), dtype_of(self.word, self.was))
        except LayoutError as error:
            raise LayoutError(
                f"cast of {', '.join(self.names)} from {self.was} has no inverse: {error}"
            ) from None
        return Cast(self.names, self.was, self.dtype)


def renamed(tensors: Mapping[str, T], new_name: Callable[[str], str]) -> dict[str, T]:
    """The tensors by the names that ``new_name`` gives for theirs.

    Raises:
        LayoutError: two get the same.
    """
    result: dict[str, T] = {}
    came: dict[str, str] = {}
    for name, tensor in tensors.items():
        new = new_name(name)
        if new in result:
            raise LayoutError(
                f"two sources for one target: {came[new]} and {name} would both be {new}."
            )
        result[new], came[new] = tensor, name
    return result


def put(result: dict[str, T], name: str, tensor: T) -> None:
    """Add a tensor to a result.

    Raises:
        LayoutError: the name is there already.
    """
    if name in result:
        raise LayoutError(f"two sources for one target: {name} is there twice.")
    result[name] = tensor


def _filled(sizes: tuple[int, ...], shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """``sizes`` with the number that -1 stands for.

    Raises:
        LayoutError: they do not multiply to the length of the dim.
    """
    length, known = length_of(shape, dim), prod(n for n in sizes if n != -1)
    if length % known or (-1 not in sizes and known != length):
        raise LayoutError(
            f"dim {dim} of shape {shape} has {length} elements, which is not "
            f"{' x '.join('?' if n == -1 else str(n) for n in sizes)}."
        )
    return tuple(length // known if n == -1 else n for n in sizes)


def _check_sizes(word: str, sizes: tuple[int, ...]) -> None:
    if any(n < 1 and n != -1 for n in sizes):
        raise LayoutError(f"{word}: sizes {sizes} must be 1 or more, or -1 for what is left.")


def _check_padding(word: str, dim: int, length: int, to: int) -> None:
    check_numbers(word, dim=dim, length=length)
    check_numbers(word, length, to=to)


# --- Renaming by regular expressions

Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Substitute(Op):
    r"""Replace what regular expressions match in each name, one rule after another.

    Attributes:
        rules: (expression, replacement), as for ``re.sub``: ``\1`` is the first group.
        back: the rules of the inverse; an operation without them has no inverse.

    >>> there = Substitute(((r"\.w(\d)\.", r".linear_\1."),), back=((r"linear_(\d)", r"w\1"),))
    >>> there.apply({"h.w1.weight": 1}, None), there.inverse().rules
    ({'h.linear_1.weight': 1}, (('linear_(\\d)', 'w\\1'),))
    """

    word: ClassVar[str] = "substitute"
    rules: tuple[tuple[str, str], ...]
    back: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for expression, replacement in (*self.rules, *self.back):
            try:
                re.compile(expression).sub(replacement, "")
            except (re.error, IndexError) as error:
                raise LayoutError(
                    f"substitute: {expression!r} with {replacement!r} is no regular expression "
                    f"with its replacement ({error})."
                ) from None

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors by their new names.

        Raises:
            LayoutError: two get the same name, or one would not come back by ``back``.
        """
        return renamed(tensors, self._new_name)

    def _new_name(self, name: str) -> str:
        new = _substituted(self.rules, name)
        if self.back and (again := _substituted(self.back, new)) != name:
            raise LayoutError(
                f"substitute: {name} becomes {new}, and the way back makes {again} of it. Give "
                "back= rules that undo the rules, or expressions that find less."
            )
        return new

    def inverse(self) -> Substitute:
        """Return the operation with ``back`` as its rules; it checks each name with ``rules``.

        Raises:
            LayoutError: ``back`` is missing.
        """
        if not self.back:
            raise LayoutError(
                f"substitute has no inverse: back= is missing for {self.rules}. Set back= to rules "
                "that undo them."
            )
        return Substitute(self.back, self.rules)


def _substituted(rules: Rules, name: str) -> str:
    for expression, replacement in rules:
        name = re.sub(expression, replacement, name)
    return name


def check_same_holes(what: str, patterns: Iterable[str], but: Iterable[str] = ()) -> None:
    """Refuse names of one operation that have different placeholders, ``but`` some.

    Raises:
        LayoutError: with the placeholders of each.
    """
    every = {p: holes(p) - set(but) for p in patterns}
    if len(set(every.values())) > 1:
        said = "; ".join(f"{p} has {', '.join(sorted(h)) or 'none'}" for p, h in every.items())
        raise LayoutError(f"{what}: the placeholders differ ({said}). Use the same in each name.")
