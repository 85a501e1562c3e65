"""Axis expressions: what each dim of a stored tensor means.

    (heads head_dim) embed                    two dims, the first a product, heads outermost
    (kv_heads (q:q_per_kv + k + v) head_dim)  one dim in which three weights alternate
    (gate:mlp + up:mlp) embed                 two weights, one after the other
    (heads head_dim)/128 embed/128            one element for each block of 128 (scales)
    expert embed/32 16                        a number stands for itself

A sum is where several weights share a tensor: its terms name the weights. This module knows
words and their order; it knows no sizes, no names of tensors and no devices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from ..core.runtime import cached
from ..errors import LayoutError

_TOKEN = re.compile(r"\s*(?:([A-Za-z_][\w.]*|\d+)|([()+:])|/(\d+))")


@dataclass(frozen=True, slots=True)
class Term:
    """One weight's part of a sum: its name, and the axes that this part is made of."""

    weight: str
    axes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sum:
    """Several weights, one after the other."""

    terms: tuple[Term, ...]


Factor = str | Sum


@dataclass(frozen=True, slots=True)
class Dim:
    """One dim: a product of factors, outermost first; one element for each ``block`` of it."""

    factors: tuple[Factor, ...]
    block: int = 1

    @property
    def sum(self) -> Sum | None:
        """Its sum, if weights share it."""
        return next((f for f in self.factors if isinstance(f, Sum)), None)

    @property
    def names(self) -> tuple[str, ...]:
        """Its axes, where no weights share it."""
        return tuple(f for f in self.factors if isinstance(f, str))


@dataclass(frozen=True, slots=True)
class Axes:
    """The dims of a tensor."""

    dims: tuple[Dim, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights that share the tensor; none if it is one weight's own."""
        return tuple(t.weight for d in self.dims if d.sum for t in d.sum.terms)

    @property
    def names(self) -> tuple[str, ...]:
        """Every axis, in order."""
        return tuple(chain.from_iterable(d.names for d in self.dims))

    def part(self, weight: str) -> Axes:
        """What ``weight`` is in a shared tensor; all of it if it is not shared."""
        return self._with(lambda f: f if isinstance(f, str) else _term(f, weight).axes)

    def whole(self) -> Axes:
        """The same with the sum as one axis: for forms that share a tensor in the same way."""
        return self._with(lambda f: f if isinstance(f, str) else _sum_text(f))

    def expanded(self, aliases: Mapping[str, tuple[str, ...]]) -> Axes:
        """The same with aliases written out: ``heads`` as ``kv_heads q_per_kv``."""
        made = self._with(
            lambda f: aliases.get(f, f) if isinstance(f, str) else _spelled(f, aliases)
        )
        return made if made == self else made.expanded(aliases)

    def without(self, axis: str) -> Axes:
        """The same less one axis, where it is not all of its dim."""
        kept = (
            d.factors if d.factors == (axis,) else tuple(f for f in d.factors if f != axis)
            for d in self.dims
        )
        return Axes(tuple(replace(d, factors=f) for d, f in zip(self.dims, kept, strict=True)))

    def along(self, axis: str, dim: int = 0) -> Axes:
        """The same with another dim: tensors stacked along ``axis``."""
        return Axes((*self.dims[:dim], Dim((axis,)), *self.dims[dim:]))

    def reversed(self) -> Axes:
        """(out, in) as (in, out)."""
        return Axes(self.dims[::-1])

    def blocked(self, block: tuple[int, ...]) -> Axes:
        """One element for each block of these sizes: what scales of a quantised tensor are."""
        sizes = (1,) * (len(self.dims) - len(block)) + block
        return Axes(tuple(replace(d, block=n) for d, n in zip(self.dims, sizes, strict=True)))

    def called(self, suffix: str) -> Axes:
        """The same for other weights that share a tensor in the same way: ``q.scale`` as ``q``."""

        def one(f: Factor) -> Factor:
            return (
                f
                if isinstance(f, str)
                else Sum(tuple(replace(t, weight=t.weight + suffix) for t in f.terms))
            )

        return self._with(one)

    def _with(self, made: Callable[[Factor], Factor | tuple[Factor, ...]]) -> Axes:
        def spread(factors: tuple[Factor, ...]) -> Iterator[Factor]:
            for f in map(made, factors):
                yield from f if isinstance(f, tuple) else (f,)

        return Axes(tuple(replace(d, factors=tuple(spread(d.factors))) for d in self.dims))

    def __str__(self) -> str:
        return " ".join(map(_dim_text, self.dims))


def _term(found: Sum, weight: str) -> Term:
    return next(t for t in found.terms if t.weight == weight)


def _spelled(found: Sum, aliases: Mapping[str, tuple[str, ...]]) -> Sum:
    spelled = (tuple(chain(*(aliases.get(a, (a,)) for a in t.axes))) for t in found.terms)
    return Sum(tuple(Term(t.weight, a) for t, a in zip(found.terms, spelled, strict=True)))


def _dim_text(dim: Dim) -> str:
    inside = " ".join(f if isinstance(f, str) else _sum_text(f) for f in dim.factors)
    alone = len(dim.factors) == 1
    text = inside if alone or not dim.factors else f"({inside})"
    return text + (f"/{dim.block}" if dim.block > 1 else "")


def _sum_text(found: Sum) -> str:
    def term(t: Term) -> str:
        many = len(t.axes) > 1
        return t.weight + (":" if t.axes else "") + ("(" * many + " ".join(t.axes) + ")" * many)

    return "(" + " + ".join(map(term, found.terms)) + ")"


@cached(8192)
def parse(text: str) -> Axes:
    """The expression that ``text`` is.

    Raises:
        LayoutError: with the place where it goes wrong.

    >>> str(parse("(mlp (gate + up)) embed"))
    '(mlp (gate + up)) embed'
    """
    return _Parser(text).axes()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._tokens: list[tuple[str, int]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            found = _TOKEN.match(text, at)
            if found is None:
                raise LayoutError(f'axes "{text}": {text[at:].strip()[0]!r} has no meaning here.')
            token = found[1] or found[2] or "/" + found[3]
            self._tokens.append((token, found.start()))
            at = found.end()

    def axes(self) -> Axes:
        dims = []
        while self._at < len(self._tokens):
            factors = self._factor()
            block = int(self._next()[1:]) if (self._peek() or "").startswith("/") else 1
            dims.append(Dim(factors, block))
        found = Axes(tuple(dims))
        if sum(d.sum is not None for d in dims) > 1:
            raise LayoutError(f'axes "{self._text}": weights share one dim, not two.')
        return found

    def _peek(self) -> str | None:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else None

    def _next(self) -> str:
        token = self._peek()
        if token is None:
            raise LayoutError(f'axes "{self._text}" ends too early: a ) is missing.')
        self._at += 1
        return token

    def _factor(self) -> tuple[Factor, ...]:
        token = self._next()
        if token != "(":
            if not re.match(r"\w", token):
                raise LayoutError(f'axes "{self._text}": {token!r} is not a name of an axis.')
            return (token,)
        if self._is_sum():
            terms = [self._term()]
            while self._next() == "+":
                terms.append(self._term())
            return (Sum(tuple(terms)),)
        factors: tuple[Factor, ...] = ()
        while self._peek() != ")":
            factors += self._factor()
        self._next()
        return factors

    def _is_sum(self) -> bool:
        depth = 0
        for token, _ in self._tokens[self._at :]:
            depth += (token == "(") - (token == ")")
            if depth < 0:
                return False
            if token == "+" and depth == 0:
                return True
        return False

    def _term(self) -> Term:
        weight = self._next()
        axes: tuple[str, ...] = ()
        if not re.match(r"[A-Za-z_]", weight):
            raise LayoutError(f'axes "{self._text}": {weight!r} is not a name of a weight.')
        if self._peek() == ":":
            self._next()
            axes = tuple(f for f in self._factor() if isinstance(f, str))
        return Term(weight, axes)
