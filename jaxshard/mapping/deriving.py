"""Deriving: the mapping between two forms of a family, from the axes of their rows.

    hf         {layer} in the name      (kv_heads q_per_kv two half) embed
    maxtext    embed layer (kv_heads q_per_kv) (half two)

A weight is split off the tensor that it shares with others, and stacked along the indices that
its new name does not have. Its dims are split as far as the two expressions differ, transposed
and merged, and it is unstacked along the indices of its new name. In between, its name is
``@q``, or ``@3.q`` in layer 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from math import prod
from operator import itemgetter

from ..core.patterns import holes
from ..errors import LayoutError
from ..models.axes import Axes, Dim, Sum
from ..models.family import Family, Form, Row, Sizes, Value
from .group_ops import ROWS, Stack, Tie, Unfuse, Unstack
from .mapping import Mapping
from .ops import (
    Affine,
    Drop,
    Each,
    Expect,
    Merge,
    Names,
    Op,
    Pad,
    Rename,
    Repeat,
    Split,
    Transpose,
)

_INDICES = ("layer", "expert")  # axes that a name may have as an index
_Part = tuple[str, ...]  # axes of one dim that stay together
_Step = tuple[int, Op]  # the phase and the operation

#: Each phase is done for all weights. Experts are stacked first, so that few names are left.
_EXPERTS, _NUMBERS, _LAYERS, _VALUES, _LENGTHS, _SPLIT, _TRANSPOSE, _MERGE, _UNSTACK = range(9)


def derive(
    family: Family,
    source: str,
    target: str,
    sizes: Sizes,
    lengths: Dict[str, int] | None = None,
) -> Mapping:
    """Return the mapping from the form ``source`` to the form ``target`` of ``family``.

    Args:
        family: the family.
        source: a form that it offers.
        target: another.
        sizes: the lengths of the axes in the source.
        lengths: those that differ in the target: a padded ``vocab``, repeated ``kv_heads``.

    Raises:
        NotFoundError: the family does not have a form, or ``config.json`` lacks a length.
        LayoutError: a weight has different axes in the two forms.
    """
    a, b = family.form(source), family.form(target)
    there = sizes.having(lengths or {})
    if _runs_of(a) and _runs_of(a) != _runs_of(b):  # over hf, where each layer has its number
        if _runs_of(b):
            over = derive(family, source, "hf", sizes)
            return over.then(derive(family, "hf", target, sizes, lengths))
        own = {axis: sizes[axis] for axis in lengths or ()}
        return derive(family, target, source, there, own).inverse()
    moves = _moves(family, a, b, sizes, there)
    firsts = {m.a.name: m.first if m.is_changed else m.b.name for m in moves if not m.splits}
    lasts = {m.last: m.b.name for m in moves if m.is_changed and not m.joins}
    joined = _apart([(m.b, m.run) for m in moves if m.joins], {m.last for m in moves}, there)
    ops = (
        Drop(family.buffers, rebuilt=True),
        *_copies(family, a, b),
        Expect(_names(m.a for m in moves), f"{family.name}-{source}"),
        *_apart([(m.a, m.run_before) for m in moves if m.splits], {m.first for m in moves}, sizes),
        _renamed(firsts),
        *_together(family, moves),
        _renamed(lasts),
        *(op.inverse() for op in joined),
        Expect(_names(m.b for m in moves), f"{family.name}-{target}{_ranges(family, b)}"),
    )
    kept = tuple(op for op in ops if op not in (Rename(()), Drop((), rebuilt=True)))
    return Mapping(kept, f"{family.name}-{source}:{family.name}-{target}")


@dataclass(frozen=True)
class _Move:
    """One weight, or several (``whole``) that both forms store in one tensor in the same way."""

    family: Family
    sizes: Sizes
    there: Sizes
    weight: str
    run_before: str
    run: str
    a: Row
    b: Row
    whole: bool

    @property
    def splits(self) -> bool:
        """Whether it is split off a tensor."""
        return bool(self.a.axes.weights) and not self.whole

    @property
    def joins(self) -> bool:
        """Whether it is joined to a tensor."""
        return bool(self.b.axes.weights) and not self.whole

    @property
    def first(self) -> str:
        """Its own name, with the indices of the source."""
        return _own(self.run_before, self.weight, holes(self.a.name))

    @property
    def last(self) -> str:
        """Its own name, with the indices of the target."""
        return _own(self.run, self.weight, holes(self.b.name))

    @property
    def is_only(self) -> bool:
        """Whether the target does not number its layer, the only one of the run."""
        has_layer = "layer" in {*holes(self.b.name), *self.b.axes.names}
        return not has_layer and self.run != self.run_before and len(self._layers) == 1

    @property
    def _layers(self) -> Sequence[int]:
        return self.family.runs[self.run]

    @property
    def is_changed(self) -> bool:
        """Whether more than its name changes."""
        return self.splits or self.joins or self.first != self.last or bool(self.steps)

    @cached_property
    def steps(self) -> tuple[_Step, ...]:
        """The operations, by phase."""
        return tuple(self._steps())

    def _steps(self) -> Iterator[_Step]:
        indices, named = holes(self.a.name), holes(self.b.name)
        a, b = self._spelled(self.a), self._spelled(self.b)
        for index in reversed(_INDICES):
            if index == "layer" and self.is_only:
                indices -= {index}
            run, phase = (self.run_before, _EXPERTS) if index == "expert" else (self.run, _LAYERS)
            if index in indices - named:
                a, name, indices = (
                    a.along(index),
                    _own(run, self.weight, indices),
                    indices - {index},
                )
                yield phase, Stack(name, _own(run, self.weight, indices), index)
            elif index in named - indices:
                b = b.along(index)
        names = (_own(self.run, self.weight, indices),)
        yield from self._values(names)
        yield from self._lengths(names, a)
        yield from self._reshaped(names, a, b)
        for index in _INDICES:
            if index in named - indices:
                name, indices = _own(self.run, self.weight, indices), indices | {index}
                yield _UNSTACK, Unstack(name, _own(self.run, self.weight, indices), index)

    def _spelled(self, row: Row) -> Axes:
        axes = row.axes.whole() if self.whole else row.axes.part(self.weight)
        return axes.expanded(self.family.aliases)

    def _values(self, names: Names) -> Iterator[_Step]:
        a, b = self.sizes.value(self.a), self.there.value(self.b)
        times = b.times / a.times
        plus = b.plus - a.plus * times
        if Value(times, plus) != Value():
            yield _VALUES, Affine(names, times, plus)

    def _lengths(self, names: Names, axes: Axes) -> Iterator[_Step]:
        for i, dim in enumerate(axes.dims):
            a, b = self.sizes.length(dim), self.there.length(dim)
            if a is None or b is None or a == b:
                continue
            low, high = sorted((a, b))
            op: Op = Pad(names, i, low, high)
            if (axis := dim.names[0]) in self.family.repeated:
                if high % low:
                    raise LayoutError(
                        f"{self.a.name}: dim {i} has {a} elements and cannot have {b} by "
                        f"repeating {axis}: one of the numbers must divide the other."
                    )
                op = Repeat(names, min(self.sizes[axis], self.there[axis]), high // low, i)
            yield _LENGTHS, op if a < b else op.inverse()

    def _reshaped(self, names: Names, a: Axes, b: Axes) -> Iterator[_Step]:
        """Split, transpose and merge the dims of ``a`` into those of ``b``."""
        a, b = self._without_ones(a, b), self._without_ones(b, a)
        if sorted(a.names) != sorted(b.names) or _blocks(a) != _blocks(b):
            raise LayoutError(
                f"{self.family.name}, {self.weight}: {self.a.name} has the axes {self.a.axes}, and "
                f"{self.b.name} has {self.b.axes}, which are not the same elements. No mapping "
                "exists between these forms."
            )
        near = _pairs(a) & _pairs(b)
        before, after = ([_parts(d, near) for d in x.dims] for x in (a, b))
        for i in reversed(range(len(before))):
            if not before[i]:
                yield _SPLIT, Merge(names, *_one(i, len(before) - 1))
                del before[i]
        for i in reversed(range(len(before))):
            if len(before[i]) > 1:
                yield _SPLIT, Split(names, i, self._lengths_of(before[i]))
        order = [part for dim in before for part in dim]
        wanted = [part for dim in after for part in dim]
        if order != wanted:
            yield _TRANSPOSE, Transpose(names, tuple(map(order.index, wanted)))
        filled = [dim for dim in after if dim]
        for i, dim in enumerate(filled):
            if len(dim) > 1:
                yield _MERGE, Merge(names, i, self._lengths_of(dim))
        for i, dim in enumerate(after):
            if not dim:
                yield _MERGE, Split(names, *_one(i, len(filled)))
                filled.insert(i, dim)

    def _without_ones(self, axes: Axes, other: Axes) -> Axes:
        """Return ``axes`` without those of length 1 that ``other`` does not have."""
        ones = {x for x in set(axes.names) - set(other.names) if self._length(x) == 1}
        kept = (tuple(f for f in d.factors if f not in ones) for d in axes.dims)
        return Axes(tuple(replace(d, factors=f) for d, f in zip(axes.dims, kept, strict=True)))

    def _length(self, axis: str) -> int | None:
        if axis == "layer" and self.run:
            return len(self._layers)
        return self.there.get(axis)

    def _lengths_of(self, parts: Sequence[_Part]) -> tuple[int, ...]:
        """Return the lengths of the parts of a dim, one of them -1 for the rest.

        Raises:
            NotFoundError: more than one is unknown.
        """
        found = [self.there.product(part) for part in parts]
        rest = found.index(None) if None in found else len(found) - 1
        known = [
            1 if i == rest else prod(map(self.there.__getitem__, p)) for i, p in enumerate(parts)
        ]
        return (*known[:rest], -1, *known[rest + 1 :])


def _moves(family: Family, a: Form, b: Form, sizes: Sizes, there: Sizes) -> list[_Move]:
    """Return what is done with each weight that both forms have."""
    if _runs_of(b):
        _ = sizes["layer"]  # raises: without the number of layers the runs are empty
    found: dict[tuple[str, str], _Move] = {}
    for key, row in b.items():
        run, _, weight = key.rpartition("/")
        other = a.get(key) or a.get(weight)
        if other is not None and not (run and not family.runs[run]):
            whole = bool(row.axes.weights) and _sum(row.axes) == _sum(other.axes)
            name = "+".join(row.axes.weights) if whole else weight
            before = run if key in a else ""
            found[run, name] = _Move(family, sizes, there, name, before, run, other, row, whole)
    return list(found.values())


def _own(run: str, weight: str, indices: Container[str]) -> str:
    """Return the name of a weight on its way."""
    parts = [run, "{layer}" * ("layer" in indices), weight, "{expert}" * ("expert" in indices)]
    return "@" + ".".join(part for part in parts if part)


def _names(rows: Iterable[Row]) -> Names:
    return tuple(dict.fromkeys(row.name for row in rows))


def _renamed(rules: Dict[str, str]) -> Rename:
    return Rename(tuple((old, new) for old, new in rules.items() if old != new))


def _together(family: Family, moves: Iterable[_Move]) -> list[Op]:
    """Return the operations of all weights by phase, with those that are alike as one."""
    steps: list[tuple[tuple[int, int], Op]] = [((_NUMBERS, 0), _numbered(family, moves))]
    for move in moves:
        places: Counter[int] = Counter()
        for phase, op in move.steps:
            steps.append(((phase, places[phase]), op))
            places[phase] += 1
    made: list[Op] = []
    for _, group in groupby(sorted(steps, key=itemgetter(0)), itemgetter(0)):
        alike: dict[Op, list[str]] = {}
        for _, op in group:
            if isinstance(op, Each):
                alike.setdefault(replace(op, names=()), []).extend(op.names)
            else:
                alike[op] = []
        for op, names in alike.items():
            made.append(replace(op, names=tuple(names)) if isinstance(op, Each) else op)
    return made


# --- Weights that share a tensor


def _sum(axes: Axes) -> Sum | None:
    return next((d.sum for d in axes.dims if d.sum), None)


def _apart(rows: Iterable[tuple[Row, str]], known: Container[str], sizes: Sizes) -> list[Unfuse]:
    """Return the operations that split tensors into weights with names of their own.

    Args:
        rows: the rows of the tensors, and the run of each.
        known: the names of the weights that both forms have.
        sizes: the lengths of the axes.
    """
    made = []
    for row, run in dict.fromkeys(rows):
        names = tuple(_own(run, w, holes(row.name)) for w in row.axes.weights)
        lost = [w for w, name in zip(row.axes.weights, names, strict=True) if name not in known]
        if lost:
            raise LayoutError(
                f"{row.name} contains {', '.join(lost)} too, for which the other form has no row."
            )
        made.append(Unfuse(row.name, names, *_sharing(row, sizes)))
    return made


def _sharing(row: Row, sizes: Sizes) -> tuple[tuple[int, ...], int, int]:
    """Return the parts of the weights in a group, the number of groups, and the dim."""
    at, dim = next((i, d) for i, d in enumerate(row.axes.dims) if d.sum)
    shared = _sum(row.axes)
    if shared is None or dim.block > 1:
        raise LayoutError(f"{row.name}: weights share blocks ({dim}). Dequantize them first.")
    place = dim.factors.index(shared)
    outer, inner = dim.names[:place], dim.names[place:]
    terms = [t.axes for t in shared.terms]
    if len(set(terms)) > 1:
        parts = tuple(prod(map(sizes.__getitem__, axes)) for axes in terms)
    else:
        parts = (1,) * len(terms)
        if outer and not inner and not terms[0]:
            return parts, ROWS, at
    return parts, prod(map(sizes.__getitem__, outer)), at


# --- Layers of several kinds


def _runs_of(form: Form) -> list[str]:
    return list(dict.fromkeys(w.split("/")[0] for w in form if "/" in w))


def _numbered(family: Family, moves: Iterable[_Move]) -> Rename:
    """Return the renaming that counts the layers of each run from 0."""
    runs = {m.run: m.is_only for m in moves if m.run != m.run_before}
    return Rename(
        tuple(
            (f"@{layer}.{{x*}}", f"@{run}.{{x*}}" if is_only else f"@{run}.{i}.{{x*}}")
            for run, is_only in runs.items()
            for i, layer in enumerate(family.runs[run])
        )
    )


def _copies(family: Family, a: Form, b: Form) -> list[Tie]:
    """Return what omits the weights that repeat others, where ``b`` does not have them."""
    lost: dict[str, list[tuple[Row, str]]] = {}
    for key, original in family.copies.items():
        run, _, weight = key.rpartition("/")
        if run in _runs_of(b) and key not in b and weight in a:
            lost.setdefault(run, []).append((a[weight], a[original].name))
    return [
        Tie(
            tuple((_in_layer(row, layer), original) for row, original in pairs),
            beside=_in_layer(a[family.copied_with.rpartition("/")[2]], layer),
        )
        for run, pairs in lost.items()
        for layer in family.runs[run]
    ]


def _in_layer(row: Row, layer: int) -> str:
    return row.name.replace("{layer}", str(layer))


def _ranges(family: Family, form: Form) -> str:
    """Return the layers of the runs of ``form``, for the error about other layers."""
    found = {run: family.runs[run] for run in _runs_of(form)}
    texts = [f"{run} {r[0]} to {r[-1]}" for run, r in found.items() if r]
    return f" (layers: {', '.join(texts)})" if texts else ""


# --- Axes


def _blocks(axes: Axes) -> dict[str, int]:
    """Return the axes of which several elements are one element of the tensor, and how many."""
    return {d.names[-1]: d.block for d in axes.dims if d.block > 1}


def _pairs(axes: Axes) -> set[tuple[str, str]]:
    """Return the axes that follow each other in a dim."""
    return {pair for d in axes.dims for pair in pairwise(d.names)}


def _parts(dim: Dim, near: set[tuple[str, str]]) -> list[_Part]:
    """Return the axes of a dim, pairs of ``near`` together."""
    parts: list[_Part] = []
    for axis in dim.names:
        if parts and (parts[-1][-1], axis) in near:
            parts[-1] += (axis,)
        else:
            parts.append((axis,))
    return parts


def _one(dim: int, count: int) -> tuple[int, tuple[int, int]]:
    """Return where and how a dim of 1 is merged with one of ``count`` others, or split off."""
    return (dim, (1, -1)) if dim < count else (dim - 1, (-1, 1))
