"""Mappings derived from the table of a family: from one form to another, as operations.

    hf        model.layers.{layer}.self_attn.q_proj.weight    (heads head_dim) embed
    maxtext   params.decoder.layers.self_attention.query.kernel    embed layer heads head_dim

    Unfuse, Rename      each weight alone, by a name that only the mapping uses: @{layer}.q
    Affine … Merge      its dims split where the two expressions differ, permuted, merged again
    Rename, Fuse        by the target's names

Of tensors that both forms store in the same way, nothing is taken apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from math import prod

from ..core.patterns import holes
from ..errors import LayoutError
from ..models.axes import Axes, Sum
from ..models.family import Family, Form, Row, Sizes, Value
from .group_ops import Stack, Tie, Unfuse, Unstack
from .mapping import Mapping
from .ops import Affine, Drop, Expect, Merge, Op, Pad, Rename, Repeat, Split, Transpose, _Each

_INDICES = ("layer", "expert")  # axes that may be numbers in a name
_Run = tuple[str, ...]  # axes that stay together in both forms


def derive(
    family: Family, source: str, target: str, sizes: Sizes, lengths: Dict[str, int] | None = None
) -> Mapping:
    """Return the mapping from form ``source`` to form ``target``.

    Args:
        family: the family.
        source: one of its forms.
        target: another one.
        sizes: the lengths of the model's axes.
        lengths: other lengths of the target (a padded ``vocab``).

    Raises:
        NotFoundError: a form that the family does not have, or a length that is unknown.
        LayoutError: the forms have different axes for a weight.
    """
    a, b = family.form(source), family.form(target)
    if _runs_of(a) != _runs_of(b):
        return _by_runs(family, source, target, sizes, lengths)
    a, b = _alike(a, b)
    weights = [w for w in a if w in b]
    there = sizes.having(lengths or {})
    moves = (_Move(family, w, a[w], b[w], sizes, there) for w in weights)
    ops = (
        Drop(family.buffers, rebuilt=True),
        Expect(_names(a, weights), f"{family.name}-{source}"),
        *_taken_apart(a, weights, sizes),
        *_together(moves),
        *_joined(b, weights, there),
        Expect(_names(b, weights), f"{family.name}-{target}"),
    )
    return Mapping(ops, f"{family.name}-{source}:{family.name}-{target}")


def _alike(a: Form, b: Form) -> tuple[Form, Form]:
    """Return the forms with one row for weights that both store in one tensor in the same way."""
    a, b = dict(a), dict(b)
    for row in dict.fromkeys(a.values()):
        shared = row.axes.weights
        other = b.get(shared[0]) if shared else None
        if other and next(d.sum for d in row.axes.dims if d.sum) in (
            d.sum for d in other.axes.dims
        ):
            for form, kept in ((a, row), (b, other)):
                form["+".join(shared)] = replace(kept, axes=kept.axes.whole())
                for w in shared:
                    del form[w]
    return a, b


def _by_runs(
    family: Family, source: str, target: str, sizes: Sizes, lengths: Dict[str, int] | None
) -> Mapping:
    """Return the mapping of forms with different runs: over hf, which numbers all layers."""
    if "hf" not in (source, target):
        over = derive(family, source, "hf", sizes)
        return over.then(derive(family, "hf", target, sizes, lengths))
    if target == "hf":
        return derive(family, "hf", source, sizes, lengths).inverse()
    form, rows = family.form(source), family.form(target)
    apart = {w: form[_plain(w)] for w in rows if _plain(w) in form}
    used = list(dict.fromkeys(_plain(w) for w in apart))
    numbers = [
        (f"@{n}.{{x*}}", f"@{run}.{i}.{{x*}}" if _counts(rows, run) else f"@{run}.{{x*}}")
        for run in _runs_of(rows)
        for i, n in enumerate(family.runs[run])
    ]
    there = sizes.having(lengths or {})
    moves = (_Move(family, w, apart[w], rows[w], sizes, there) for w in apart)
    ops = (
        Drop(family.buffers, rebuilt=True),
        *_copies(family, form, rows),
        Expect(_names(form, used), f"{family.name}-{source}"),
        *_taken_apart(form, used, sizes),
        Rename(tuple(numbers)),
        *_together(moves),
        *_joined(rows, list(apart), there),
        Expect(_names(rows, apart), f"{family.name}-{target}"),
    )
    return Mapping(ops, f"{family.name}-{source}:{family.name}-{target}")


def _copies(family: Family, form: Form, rows: Form) -> list[Op]:
    """Return the operations that drop repeated weights which the target does not have."""
    lost = {w: o for w, o in family.copies.items() if w not in rows and _plain(w) in form}
    found: list[Op] = []
    for n in {n: None for w in lost for n in family.runs[w.rpartition("/")[0]]}:
        said = {
            w: form[_plain(w)].name.replace("{layer}", str(n)) for w in (*lost, family.copied_with)
        }
        pairs = tuple((said[w], form[o].name) for w, o in lost.items())
        found.append(Tie(pairs, beside=said[family.copied_with]))
    return found


def _plain(weight: str) -> str:
    return weight.rpartition("/")[2]


def _runs_of(form: Form) -> list[str]:
    return list(dict.fromkeys(w.split("/")[0] for w in form if "/" in w))


def _counts(form: Form, run: str) -> bool:
    """Whether the form numbers the layers of ``run``; otherwise there is only one."""
    rows = (row for w, row in form.items() if w.startswith(run + "/"))
    return any("layer" in {*holes(row.name), *row.axes.names} for row in rows)


def _names(form: Form, weights: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(form[w].name for w in weights))


def _own(weight: str, stored: Collection[str]) -> str:
    """Return the name of a weight inside the mapping."""
    run, _, plain = weight.rpartition("/")
    parts = [run, "{layer}" * ("layer" in stored), plain, "{expert}" * ("expert" in stored)]
    return "@" + ".".join(p for p in parts if p)


def _taken_apart(form: Form, weights: list[str], sizes: Sizes) -> list[Op]:
    """Return the operations that give each weight a tensor and a name of its own."""
    ops: list[Op] = []
    rules: list[tuple[str, str]] = []
    for row in dict.fromkeys(form[w] for w in weights):
        weight = next(w for w in weights if form[w] == row)
        stored, run = holes(row.name), weight[: -len(_plain(weight))]
        shared = [run + w for w in row.axes.weights]
        if not shared:
            rules.append((row.name, _own(weight, stored)))
            continue
        _check_all(shared, weights, row)
        names = tuple(_own(w, stored) for w in shared)
        ops.append(Unfuse(row.name, names, *_sharing(row.axes, sizes)))
    return [*ops, Rename(tuple(rules))]


def _joined(form: Form, weights: list[str], sizes: Sizes) -> list[Op]:
    """Return the operations that join weights, and give them the target's names."""
    return [op.inverse() for op in reversed(_taken_apart(form, weights, sizes))]


def _check_all(shared: list[str], weights: list[str], row: Row) -> None:
    missing = [w for w in shared if w not in weights]
    if missing:
        raise LayoutError(f"{row.name} is also {', '.join(missing)}, which the other form lacks.")


def _sharing(axes: Axes, sizes: Sizes) -> tuple[tuple[int, ...], int, int]:
    """Return the parts, the groups and the dim in which weights share a tensor, as in ``Fuse``."""
    at = next(i for i, d in enumerate(axes.dims) if d.sum)
    factors = axes.dims[at].factors
    place = next(i for i, f in enumerate(factors) if isinstance(f, Sum))
    terms = factors[place].terms  # type: ignore[union-attr]
    for t in terms:
        _check_blocks(axes, at, (*t.axes, *(str(f) for f in factors[place + 1 :])), sizes)
    alike = len({t.axes for t in terms}) == 1
    parts = (1,) * len(terms) if alike else tuple(prod(sizes[a] for a in t.axes) for t in terms)
    before = [sizes.get(str(f)) for f in factors[:place]]
    if None in before:  # as many groups as rows: each term is one row
        if place + 1 < len(factors) or not alike or terms[0].axes:
            raise LayoutError(f'axes "{axes}": the length of {factors[0]} is not known.')
        return parts, -1, at
    return parts, prod(n for n in before if n), at


def _check_blocks(axes: Axes, dim: int, inner: tuple[str, ...], sizes: Sizes) -> None:
    """Refuse to split a dim inside a block that shares a scale."""
    block = axes.dims[dim].block
    if block > 1 and prod(sizes[a] for a in inner) % block:
        raise LayoutError(
            f"{axes}: {block} elements share a scale, and {' '.join(inner) or '1'} is "
            f"{prod(sizes[a] for a in inner)}: they cannot be stored apart. Dequantize first."
        )


@dataclass
class _Move:
    """The operations on one weight."""

    family: Family
    weight: str
    source: Row
    target: Row
    sizes: Sizes
    there: Sizes

    def stages(self) -> tuple[list[Op], ...]:
        """Return the operations in order, in stages."""
        stored, wanted = holes(self.source.name), holes(self.target.name)
        if "layer" not in {*wanted, *self.target.axes.names} and "/" in self.weight:
            stored -= {"layer"}  # the only layer of its run
        expanded, other = self._expanded(self.source), self._expanded(self.target)
        a, b = self._short(expanded, other), self._short(other, expanded)
        inside = set(a.names) | (stored & set(_INDICES))
        if inside != set(b.names) | (wanted & set(_INDICES)):
            raise LayoutError(
                f"{self.family.name} {self.weight}: {self.source.name} is {a}, {self.target.name} "
                f"is {b}; these are not the same axes."
            )
        own = _own(self.weight, stored)
        values = [*self._values(own), *self._longer(expanded, own)]
        a, without_ones = self._without_ones(a, own)
        ops: list[Op] = []
        ones = [i for i, d in enumerate(b.dims) if not d.factors]
        b = Axes(tuple(d for d in b.dims if d.factors))
        runs = _runs(a, b)
        for i in range(len(a.dims) - 1, -1, -1):
            if len(runs[i]) > 1:
                for n in range(1, len(runs[i])):
                    _check_blocks(a, i, tuple(x for run in runs[i][n:] for x in run), self.sizes)
                ops.append(Split((_own(self.weight, stored),), i, self._lengths(runs[i])))
        flat = [run for dim in runs for run in dim]
        now = set(stored)
        for axis in [x for x in _INDICES if x in wanted and x not in stored]:
            at = flat.index((axis,))
            new = now | {axis}
            ops.append(Unstack(_own(self.weight, now), _own(self.weight, new), axis, at))
            now, flat = new, flat[:at] + flat[at + 1 :]
        order = [run for dim in _runs(b, a) for run in dim]
        stay = [run for run in order if run in flat]
        if stay != flat:
            ops.append(Transpose((_own(self.weight, now),), tuple(flat.index(r) for r in stay)))
        for axis in [x for x in reversed(_INDICES) if (x,) in order and (x,) not in flat]:
            before = order[: order.index((axis,))]
            at, new = sum(run in stay for run in before), now - {axis}
            ops.append(Stack(_own(self.weight, now), _own(self.weight, new), axis, at))
            now, stay = new, [run for run in order if run in stay or run == (axis,)]
        merged = _runs(b, a)
        for i in range(len(merged) - 1, -1, -1):
            if len(merged[i]) > 1:
                ops.append(Merge((_own(self.weight, now),), i, self._lengths(merged[i])))
        with_ones: list[Op] = []
        for i in ones:
            at, sizes = (i, (1, -1)) if i < len(b.dims) else (i - 1, (-1, 1))
            with_ones.append(Split((_own(self.weight, now),), at, sizes))
        return values, without_ones, ops, with_ones

    def _without_ones(self, axes: Axes, name: str) -> tuple[Axes, list[Op]]:
        """Return the operations that remove dims whose only factor was the sum of weights."""
        ops: list[Op] = []
        dims = list(axes.dims)
        for i in range(len(dims) - 1, -1, -1):
            if not dims[i].factors:
                at, sizes = (i, (1, -1)) if i + 1 < len(dims) else (i - 1, (-1, 1))
                ops.append(Merge((name,), at, sizes))
                del dims[i]
        return Axes(tuple(dims)), ops

    def _expanded(self, row: Row) -> Axes:
        """Return the row's axes for this weight, without aliases."""
        return row.axes.part(_plain(self.weight)).expanded(self.family.aliases)

    def _short(self, axes: Axes, other: Axes) -> Axes:
        """Return ``axes`` without those of length 1 that ``other`` lacks (q heads per kv head)."""
        for axis in axes.names:
            if self.there.get(axis) == 1 and axis not in (*other.names, *_INDICES):
                axes = axes.without(axis)
        return axes

    def _lengths(self, runs: tuple[_Run, ...]) -> tuple[int, ...]:
        found = [self.there.product(run) for run in runs]
        if found.count(None) > 1:
            raise LayoutError(
                f"{self.weight}: the lengths of {runs} are not known; see config.json."
            )
        if found.count(None) == 0:
            found[-1] = None  # the rest, so that a tensor of another length is refused
        return tuple(-1 if n is None else n for n in found)

    def _values(self, name: str) -> list[Op]:
        a, b = self.sizes.value(self.source), self.sizes.value(self.target)
        times = b.times / a.times
        plus = b.plus - a.plus * times
        return [] if Value(times, plus) == Value() else [Affine((name,), times, plus)]

    def _longer(self, axes: Axes, name: str) -> list[Op]:
        """Return the operations that lengthen dims: heads are repeated, others padded."""
        ops: list[Op] = []
        for i, dim in enumerate(axes.dims):
            before, after = self.sizes.length(dim), self.there.length(dim)
            if before is None or after is None or before == after:
                continue
            first = dim.names[0]
            if first in self.family.repeated:
                ops.append(Repeat((name,), self.sizes[first], after // before, i))
            else:
                ops.append(Pad((name,), i, before, after))
        return ops


def _runs(axes: Axes, other: Axes) -> tuple[tuple[_Run, ...], ...]:
    """Return the axes of each dim; those adjacent in a dim of ``other`` too stay together."""
    near = {pair for d in other.dims for pair in zip(d.names, d.names[1:], strict=False)}
    found = []
    for dim in axes.dims:
        runs: list[_Run] = []
        for axis in dim.names:
            if runs and (runs[-1][-1], axis) in near:
                runs[-1] += (axis,)
            else:
                runs.append((axis,))
        found.append(tuple(runs))
    return tuple(found)


_ORDER = (Affine, Pad, Repeat, Split, Unstack, Transpose, Stack, Merge)


def _together(moves: Iterable[_Move]) -> list[Op]:
    """Return the operations of all weights, equal ones (but for the names) as one.

    The order matters within a weight only. Experts are stacked before layers, so that few names
    remain.
    """
    stages = zip(*(move.stages() for move in moves), strict=True)
    return [op for stage in stages for op in _merged(op for ops in stage for op in ops)]


def _merged(ops: Iterable[Op]) -> list[Op]:
    def place(op: Op) -> tuple[int, int]:
        kind = _ORDER.index(type(op))
        if isinstance(op, Stack):
            return kind, _INDICES[::-1].index(op.index)
        return kind, -op.dim if isinstance(op, Split | Merge) else 0

    made: list[Op] = []
    for op in sorted(ops, key=place):
        for i, same in enumerate(made):
            if isinstance(op, _Each) and isinstance(same, _Each) and _about(same, op) == op:
                made[i] = replace(same, names=same.names + op.names)
                break
        else:
            made.append(op)
    return made


def _about(last: Op, op: _Each) -> Op | None:
    """Return ``last`` with the names of ``op``, if it is an operation of the same kind."""
    if isinstance(last, _Each) and type(last) is type(op):
        return replace(last, names=op.names)
    return None
