"""Operations on single tensors, with their inverses.

An operation selects tensors by names with placeholders (``core.patterns``) and transforms them
with an ``Algebra``; it does not depend on the type of a tensor. Operations that join several
tensors or split one are in ``group_ops``.
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
        """Return the operation that undoes this one.

        Raises:
            LayoutError: no inverse exists; the message states what was lost.
        """
        raise LayoutError(f"{self.word} has no inverse: {self}.")

    def of_state(self, order: int) -> Op:
        """Return the operation on averages of gradients to the power of ``order``."""
        return self


@dataclass(frozen=True, slots=True)
class Rename(Op):
    """Rename by the first rule that matches; a name without a rule stays.

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
        """Return the rules with old and new names swapped."""
        return Rename(tuple((new, old) for old, new in self.rules))


@dataclass(frozen=True, slots=True)
class Drop(Op):
    """Drop tensors.

    With ``rebuilt`` the target model computes them itself (rotary frequencies), so the inverse
    does not need them either.
    """

    word: ClassVar[str] = "drop"
    names: Names
    rebuilt: bool = False

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The remaining tensors."""
        patterns = Patterns(self.names, placeholders)
        return {n: t for n, t in tensors.items() if patterns.find(n) is None}

    def inverse(self) -> Drop:
        """Return this operation, if ``rebuilt``."""
        if not self.rebuilt:
            raise LayoutError(f"drop has no inverse: {', '.join(self.names)} is lost.")
        return self


@dataclass(frozen=True, slots=True)
class Expect(Op):
    """Refuse names that match no pattern, so that no tensor is passed through unnoticed."""

    word: ClassVar[str] = "expect"
    names: Names
    what: str = "the table"

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The unchanged tensors."""
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
        """Return this operation."""
        return self


@dataclass(frozen=True, slots=True)
class Each(Op):
    """An operation on each tensor whose name matches ``names``."""

    names: Names

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """All tensors; those that match are changed."""
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
        """Return ``x`` after the operation."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Transpose(Each):
    """Transpose: dim ``i`` of the result is dim ``order[i]`` of the source."""

    word: ClassVar[str] = "transpose"
    order: tuple[int, ...] = (1, 0)

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise LayoutError(
                f"transpose: order must list each dim from 0 to {len(self.order) - 1} once, got "
                f"{self.order}."
            )

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` transposed."""
        return algebra.transpose(x, self.order)

    def inverse(self) -> Transpose:
        """Return the transpose with the inverse order."""
        back = tuple(self.order.index(i) for i in range(len(self.order)))
        return replace(self, order=back)


@dataclass(frozen=True, slots=True)
class Split(Each):
    """Split one dim into several of ``sizes``, of which one may be -1 for the rest."""

    word: ClassVar[str] = "split"
    dim: int
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        check_numbers(self.word, dim=self.dim)
        _check_sizes(self.word, self.sizes)
        if self.sizes.count(-1) > 1:
            raise LayoutError(f"split: at most one of sizes may be -1, got {self.sizes}.")

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` with more dims."""
        shape = algebra.shape(x)
        sizes = _filled(self.sizes, shape, self.dim)
        return algebra.reshape(x, (*shape[: self.dim], *sizes, *shape[self.dim + 1 :]))

    def inverse(self) -> Merge:
        """Return the merge of the dims."""
        return Merge(self.names, self.dim, self.sizes)


@dataclass(frozen=True, slots=True)
class Merge(Each):
    """Merge the dims of ``sizes`` that begin at ``dim`` into one."""

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
        """Return the split into ``sizes``.

        Raises:
            LayoutError: more than one size is -1.
        """
        if self.sizes.count(-1) > 1:
            raise LayoutError(
                f"merge of {', '.join(self.names)} has no inverse: sizes {self.sizes} leave more "
                "than one length open. Set all but one."
            )
        return Split(self.names, self.dim, self.sizes)


@dataclass(frozen=True, slots=True)
class Slice(Each):
    """Keep the elements ``start:stop`` along ``dim``; the rest is lost."""

    word: ClassVar[str] = "slice"
    dim: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        check_numbers(self.word, dim=self.dim, start=self.start)
        check_numbers(self.word, self.start + 1, stop=self.stop)

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """Return a slice of ``x``."""
        return algebra.cut(x, self.dim, self.start, self.stop)


@dataclass(frozen=True, slots=True)
class _Padding(Each):
    dim: int
    length: int
    to: int

    def __post_init__(self) -> None:
        check_numbers(self.word, dim=self.dim, length=self.length)
        check_numbers(self.word, self.length, to=self.to)


@dataclass(frozen=True, slots=True)
class Pad(_Padding):
    """Pad ``dim`` with zeros from ``length`` to ``to`` elements."""

    word: ClassVar[str] = "pad"

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """Return ``x``, padded."""
        shape = algebra.shape(x)
        length = length_of(shape, self.dim)
        if length != self.length:
            raise LayoutError(
                f"dim {self.dim} of shape {shape} has {length} elements, expected {self.length} to "
                f"pad to {self.to}."
            )
        return x if self.to == self.length else algebra.pad(x, self.dim, self.to)

    def inverse(self) -> Unpad:
        """Return the removal of the padding."""
        return Unpad(self.names, self.dim, self.length, self.to)


@dataclass(frozen=True, slots=True)
class Unpad(_Padding):
    """Remove padding: keep the first ``length`` of the ``to`` elements of ``dim``."""

    word: ClassVar[str] = "unpad"

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """Return ``x`` without its padding."""
        shape = algebra.shape(x)
        if length_of(shape, self.dim) != self.to:
            raise LayoutError(f"dim {self.dim} of shape {shape} must have {self.to} elements.")
        return algebra.cut(x, self.dim, 0, self.length)

    def inverse(self) -> Pad:
        """Return the padding."""
        return Pad(self.names, self.dim, self.length, self.to)


@dataclass(frozen=True, slots=True)
class _Repetition(Each):
    groups: int
    times: int
    dim: int = 0

    def __post_init__(self) -> None:
        check_numbers(self.word, dim=self.dim)
        check_numbers(self.word, 1, groups=self.groups, times=self.times)


@dataclass(frozen=True, slots=True)
class Repeat(_Repetition):
    """Repeat each of ``groups`` groups of ``dim`` (kv heads) ``times`` times."""

    word: ClassVar[str] = "repeat"

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """Return ``x`` with repeated groups."""
        shape = algebra.shape(x)
        (groups, inner) = _filled((self.groups, -1), shape, self.dim)
        before, after = shape[: self.dim], shape[self.dim + 1 :]
        x = algebra.reshape(x, (*before, groups, 1, inner, *after))
        x = algebra.repeat(x, self.dim + 1, self.times)
        return algebra.reshape(x, (*before, groups * self.times * inner, *after))

    def inverse(self) -> Unrepeat:
        """Return the operation that keeps the first copy of each group."""
        return Unrepeat(self.names, self.groups, self.times, self.dim)


@dataclass(frozen=True, slots=True)
class Unrepeat(_Repetition):
    """Keep the first of ``times`` copies of each of ``groups`` groups.

    The other copies are not read, and so not compared with the first.
    """

    word: ClassVar[str] = "unrepeat"

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """Return ``x`` without repeated groups."""
        shape = algebra.shape(x)
        groups, times, inner = _filled((self.groups, self.times, -1), shape, self.dim)
        before, after = shape[: self.dim], shape[self.dim + 1 :]
        x = algebra.reshape(x, (*before, groups, times, inner, *after))
        x = algebra.cut(x, self.dim + 1, 0, 1)
        return algebra.reshape(x, (*before, groups * inner, *after))

    def inverse(self) -> Repeat:
        """Return the repetition."""
        return Repeat(self.names, self.groups, self.times, self.dim)


@dataclass(frozen=True, slots=True)
class Cast(Each):
    """Cast to ``dtype``, rounding values; the inverse casts to ``was``."""

    word: ClassVar[str] = "cast"
    dtype: str
    was: str | None = None

    def __post_init__(self) -> None:
        dtype_of(self.word, self.dtype)
        dtype_of(self.word, self.was or self.dtype)

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """Return ``x`` in ``dtype``."""
        return algebra.cast(x, dtype_of(self.word, self.dtype))

    def inverse(self) -> Cast:
        """Return the cast to ``was``; values stay rounded."""
        if self.was is None:
            raise LayoutError(
                f"cast of {', '.join(self.names)} to {self.dtype} has no inverse: was= is "
                "missing. Set "
                "it to the original dtype."
            )
        try:
            check_cast(dtype_of(self.word, self.dtype), dtype_of(self.word, self.was))
        except LayoutError as error:
            raise LayoutError(
                f"cast of {', '.join(self.names)} from {self.was} has no inverse: {error}"
            ) from None
        return Cast(self.names, self.was, self.dtype)


_LEAST, _MOST = 2.0**-60, 2.0**60  # powers and inverses of the factors stay normal numbers


@dataclass(frozen=True, slots=True)
class Affine(Each):
    """Multiply each value by ``times``, then add ``plus``.

    Both are computed in float32 (float64 for F64), and the result is rounded once to the dtype.
    """

    word: ClassVar[str] = "affine"
    times: float = 1.0
    plus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("times", "plus"):
            number = float(getattr(self, name))
            object.__setattr__(self, name, number)
            if not (_LEAST <= abs(number) <= _MOST or (number == 0 and name == "plus")):
                raise LayoutError(
                    f"affine: {name} = {number} must be {'0, or ' if name == 'plus' else ''}"
                    "of a magnitude between 2**-60 and 2**60."
                )

    def change(self, x: T, algebra: Algebra[T]) -> T:
        """``x`` with its values multiplied and shifted."""
        return algebra.affine(x, self.times, self.plus)

    def of_state(self, order: int) -> Affine:
        """Return the operation on averages of gradients to the power of ``order``.

        The gradient of a weight that is multiplied is divided, and a shift does not change it.
        """
        return Affine(self.names, self.times**-order)

    def inverse(self) -> Affine:
        """Return the division by ``times`` after the subtraction of ``plus``; both round."""
        return Affine(self.names, 1 / self.times, -self.plus / self.times or 0.0)


def renamed(tensors: Mapping[str, T], new_name: Callable[[str], str]) -> dict[str, T]:
    """Rename tensors with ``new_name``.

    Raises:
        LayoutError: two tensors get the same name.
    """
    result: dict[str, T] = {}
    sources: dict[str, str] = {}
    for name, tensor in tensors.items():
        new = new_name(name)
        if new in result:
            raise LayoutError(
                f"two sources for one target: {sources[new]} and {name} both become {new}."
            )
        result[new], sources[new] = tensor, name
    return result


def put(result: dict[str, T], name: str, tensor: T) -> None:
    """Add a tensor to a result.

    Raises:
        LayoutError: the name exists already.
    """
    if name in result:
        raise LayoutError(f"two sources for one target: {name} is written twice.")
    result[name] = tensor


def _filled(sizes: tuple[int, ...], shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Return ``sizes`` with -1 replaced by its value.

    Raises:
        LayoutError: their product is not the length of the dim.
    """
    length, known = length_of(shape, dim), prod(n for n in sizes if n != -1)
    if length % known or (-1 not in sizes and known != length):
        raise LayoutError(
            f"dim {dim} of shape {shape} has {length} elements, expected "
            f"{' x '.join('?' if n == -1 else str(n) for n in sizes)}."
        )
    return tuple(length // known if n == -1 else n for n in sizes)


def _check_sizes(word: str, sizes: tuple[int, ...]) -> None:
    if any(n < 1 and n != -1 for n in sizes):
        raise LayoutError(f"{word}: sizes {sizes} must be 1 or more, or -1 for the rest.")


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
                    f"substitute: invalid regular expression {expression!r} with replacement "
                    f"{replacement!r} ({error})."
                ) from None

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors by their new names.

        Raises:
            LayoutError: two tensors get the same name, or ``back`` does not restore a name.
        """
        return renamed(tensors, self._new_name)

    def _new_name(self, name: str) -> str:
        new = _substituted(self.rules, name)
        if self.back and (again := _substituted(self.back, new)) != name:
            raise LayoutError(
                f"substitute: {name} becomes {new}, but back= turns that into {again}. Set back= "
                "to "
                "rules that undo rules=, or use expressions that match less."
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
    """Refuse names of one operation with different placeholders; those of ``but`` may differ.

    Raises:
        LayoutError: the placeholders differ.
    """
    every = {p: holes(p) - set(but) for p in patterns}
    if len(set(every.values())) > 1:
        each = "; ".join(f"{p} has {', '.join(sorted(h)) or 'none'}" for p, h in every.items())
        raise LayoutError(f"{what}: placeholders differ ({each}). Use the same in each name.")
