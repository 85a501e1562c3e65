"""Operations on layers and experts: many tensors of one kind as one, and tensors that are copies.

Stack      layer 0, layer 1, …     along a new dim
Tie        the second of two tensors with the same values is left out
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import LayoutError, NotFoundError
from .algebra import Algebra, T
from .checks import check_numbers, length_of
from .names import check_same_holes, fill, holes, match
from .ops import Op, put

_MOST = 1_000_000  # of what is stacked: no model has more, and a loop over more would not end


@dataclass(frozen=True, slots=True)
class Stack(Op):
    """The tensors that differ in ``index`` as one, along a new ``dim``.

    Attributes:
        source: their name; ``target`` has the same placeholders but ``index``.
        first: the number of the first (of layers of a second kind, say).
        count: how many there are; others stay as they are. By default all that there are.
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
        """The tensors, those of each set as one."""
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
                    f"two sources for one target: {other} and {name} would both be {self.index} "
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
                f"{self.word} {target}: {members[min(members)]} comes before the first, "
                f"{self.index} {self.first}."
            )
        num_missing = last + 1 - self.first - len(members)
        if num_missing:
            missing = (i for i in itertools.count(self.first) if i not in members)
            said = ", ".join(str(i) for i in itertools.islice(missing, min(num_missing, 5)))
            more = f" and {num_missing - 5} more" if num_missing > 5 else ""
            raise NotFoundError(
                f"{self.word} {target}: {self.index} {said}{more} of {self.first} to {last} "
                f"{'is' if num_missing == 1 else 'are'} missing."
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
        return Unstack(self.target, self.source, self.index, self.dim, self.first, self.count)


@dataclass(frozen=True, slots=True)
class Unstack(Op):
    """One tensor as many, one for each element of ``dim``: what ``Stack`` made one of."""

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
        """The tensors, the stacked ones taken apart."""
        result: dict[str, T] = {}
        for name, tensor in tensors.items():
            found = match(self.source, name)
            if found is None:
                put(result, name, tensor)
                continue
            shape, d = algebra.shape(tensor), self.dim
            length = length_of(shape, d, f"{self.word} {name}")
            if length > _MOST or self.count not in (None, length):
                raise LayoutError(
                    f"{self.word} {name}: dim {d} of shape {shape} has {length} elements; there "
                    f"can be {self.count or f'{_MOST} at most'}."
                )
            for i in range(length):
                one = algebra.cut(tensor, d, i, i + 1)
                filled = {**found, self.index: str(i + self.first)}
                target = fill(self.target, filled)
                put(result, target, algebra.reshape(one, (*shape[:d], *shape[d + 1 :])))
        return result

    def inverse(self) -> Stack:
        """Stack them again."""
        return Stack(self.target, self.source, self.index, self.dim, self.first, self.count)


@dataclass(frozen=True, slots=True)
class Tie(Op):
    """Leave out tensors that are copies of others (of the embedding, say).

    Attributes:
        copies: (copy, original), by name.
        beside: a name; a model that has it gets its copies again on the way back.
    """

    word: ClassVar[str] = "tie"
    copies: tuple[tuple[str, str], ...]
    beside: str

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors less the copies."""
        result = dict(tensors)
        for copy, original in self.copies:
            if copy in result and original not in result:
                raise NotFoundError(
                    f"{self.word}: {copy} is a copy of {original}, which is missing. Add that, or "
                    "leave the copy out (exclude=, --exclude)."
                )
            result.pop(copy, None)
        return result

    def inverse(self) -> Untie:
        """Copy again."""
        return Untie(self.copies, self.beside)


@dataclass(frozen=True, slots=True)
class Untie(Op):
    """Tensors twice, where a model that has ``beside`` wants copies of them."""

    word: ClassVar[str] = "untie"
    copies: tuple[tuple[str, str], ...]
    beside: str

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors and their copies, as far as the originals are there."""
        result = dict(tensors)
        if self.beside in tensors:
            for copy, original in self.copies:
                if original in tensors:
                    put(result, copy, tensors[original])
        return result

    def inverse(self) -> Tie:
        """Leave the copies out."""
        return Tie(self.copies, self.beside)


def _number(name: str, digits: str) -> int:
    """The number of a layer or an expert.

    Raises:
        LayoutError: it is none.
    """
    if not digits.isdecimal() or len(digits) > 9:
        raise LayoutError(
            f"{name[:80]}: {digits[:20]!r} is no number of a layer or an expert. Placeholders "
            "called {layer}, {expert} or {index} stand for numbers only."
        )
    return int(digits)


def _check_stack(word: str, dim: int, first: int, count: int | None) -> None:
    check_numbers(word, dim=dim, first=first)
    if count is not None:
        check_numbers(word, 1, count=count)


def _check_index(word: str, many: str, one: str, index: str) -> None:
    if index not in holes(many) or index in holes(one):
        raise LayoutError(
            f"{word}: {{{index}}} must be in the name of the many ({many}) and not in that of "
            f"the one ({one})."
        )
    check_same_holes(word, (many, one), but=(index,))
