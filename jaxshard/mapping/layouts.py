"""Layouts of mapped models, derived from the layouts of their sources.

A sharded dim stays sharded through every operation: ``Transpose`` turns rows into columns,
fused heads stay on their ranks, and stacked layers of several pipeline stages become one dim
that is sharded over the stages.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from ..core.catalog import Tensor
from ..core.dtypes import DType
from ..core.layout import Layout, Placement, Spec
from ..errors import LayoutError

STAGES = "pp"


@dataclass(frozen=True, slots=True)
class Placed:
    """A shape and its placements, one for each set of ranks that holds it."""

    name: str
    shape: tuple[int, ...]
    placements: tuple[Placement, ...]

    @property
    def spec(self) -> Spec:
        """The axes that split each dim, equal in all placements."""
        spec = self.placements[0].spec
        return spec + ((),) * (len(self.shape) - len(spec))

    def ways(self, dim: int) -> int:
        """Return the number of parts of ``dim``."""
        return self.placements[0].ways(dim)


class Placing:
    """The algebra of placements."""

    @staticmethod
    def shape(x: Placed) -> tuple[int, ...]:
        """Elements along each dim."""
        return x.shape

    @staticmethod
    def transpose(x: Placed, order: Sequence[int]) -> Placed:
        """Dim ``i`` of the result is dim ``order[i]`` of ``x``."""
        return _with(x, tuple(x.shape[d] for d in order), tuple(x.spec[d] for d in order))

    @staticmethod
    def reshape(x: Placed, shape: tuple[int, ...]) -> Placed:
        """A sharded dim keeps its axes if it becomes the outermost of its new dims."""
        spec: list[tuple[str, ...]] = []
        for old, new in _groups(x.shape, shape):
            outer = next((d for d in old if x.shape[d] != 1), None)
            split = [d for d in old if x.spec[d]]
            target = next((d for d in new if shape[d] != 1), None)
            if split and (split != [outer] or shape[target or 0] % x.ways(split[0])):
                raise LayoutError(_indivisible(x, split[0], shape, target))
            spec += [
                x.spec[outer] if split and outer is not None and d == target else () for d in new
            ]
        return _with(x, shape, tuple(spec))

    @staticmethod
    def cut(x: Placed, dim: int, start: int, stop: int) -> Placed:
        """The same axes on fewer elements."""
        shape = (*x.shape[:dim], stop - start, *x.shape[dim + 1 :])
        return _with(x, shape, x.spec)

    @staticmethod
    def join(xs: Sequence[Placed], dim: int, name: str) -> Placed:
        """Equal placements are kept; those of several stages become a dim split by stages."""
        first = xs[0]
        shape = (*first.shape[:dim], sum(x.shape[dim] for x in xs), *first.shape[dim + 1 :])
        if all(x.placements == first.placements for x in xs):
            return _with(replace(first, name=name), shape, first.spec)
        return Placed(name, shape, (_over_stages(xs, dim, name),))

    @staticmethod
    def repeat(x: Placed, dim: int, times: int) -> Placed:
        """The same axes."""
        return _with(x, (*x.shape[:dim], times, *x.shape[dim + 1 :]), x.spec)

    @staticmethod
    def pad(x: Placed, dim: int, length: int) -> Placed:
        """The same axes."""
        return _with(x, (*x.shape[:dim], length, *x.shape[dim + 1 :]), x.spec)

    @staticmethod
    def cast(x: Placed, dtype: DType) -> Placed:
        """The same placements."""
        return x

    @staticmethod
    def scaled(x: Placed, scale: Placed, block: tuple[int, int], dtype: DType) -> Placed:
        """The same placements."""
        return x


def placed(tensors: Dict[str, Tensor], layout: Layout) -> dict[str, Placed]:
    """Return the tensors that ``layout`` places."""
    return {
        n: Placed(n, t.shape, layout.placements[n])
        for n, t in tensors.items()
        if layout.placements.get(n)
    }


def _with(x: Placed, shape: tuple[int, ...], spec: Spec) -> Placed:
    return Placed(x.name, shape, tuple(replace(p, spec=spec) for p in x.placements))


def _groups(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Group the dims of two shapes so that the products of each group are equal."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = [i] if i < len(old) else [], [j] if j < len(new) else []
        while prod(old[d] for d in a) != prod(new[d] for d in b):
            if prod(old[d] for d in a) < prod(new[d] for d in b):
                a.append((a[-1] if a else i - 1) + 1)
            else:
                b.append((b[-1] if b else j - 1) + 1)
        groups.append((tuple(a), tuple(b)))
        i, j = i + len(a), j + len(b)
    return groups


def _indivisible(x: Placed, dim: int, shape: tuple[int, ...], target: int | None) -> str:
    axes = ", ".join(f"{a}={dict(x.placements[0].axes)[a]}" for a in x.spec[dim])
    groups = shape[target or 0]
    return (
        f"{x.name}: {axes} splits dim {dim} of shape {x.shape} in {x.ways(dim)}, which does not "
        f"divide the {groups} groups (such as kv heads) of its new shape {shape}. Use a divisor of "
        f"{groups}, repeat the kv heads, or pass rules for the new names."
    )


def _over_stages(xs: Sequence[Placed], dim: int, name: str) -> Placement:
    plain = {(p.axes, x.spec) for x in xs for p in x.placements}
    first = [x.placements[0].first_rank for x in xs]
    stages = list(dict.fromkeys(first))
    ranks = xs[0].placements[0].num_ranks
    even = len({first.count(s) for s in stages}) == 1 and first == sorted(first)
    near = all(s == stages[0] + i * ranks for i, s in enumerate(stages))
    alone = all(len(x.placements) == 1 for x in xs) and not xs[0].spec[dim]
    if len(plain) > 1 or not (even and near and alone):
        raise LayoutError(
            f"{name}: {xs[0].name} is {xs[0].placements[0]}, but "
            + next(f"{x.name} is {x.placements[0]}" for x in xs if x.placements != xs[0].placements)
            + ". Joined tensors must have equal placements, or equally many must be in each stage."
        )
    axes = xs[0].placements[0].axes
    axis = STAGES
    while axis in dict(axes):  # such as experts that are split already
        axis += "_outer"
    spec = tuple((axis,) if d == dim else before for d, before in enumerate(xs[0].spec))
    return Placement(((axis, len(stages)), *axes), spec, stages[0])
