"""Dims that a rule may split: between attention heads, expert orders, quantization blocks.

    k_proj  (16, 64), heads of 8 rows, mp=8      2 rows each: a quarter of a head

Files with parts of heads are complete for programs that gather them, but ranks that compute
with their shards need whole heads. Shapes and ``config.json`` decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from math import prod
from typing import Any, NamedTuple

from ..core.box import Box
from ..core.layout import MeshAxes, Placement
from ..core.patterns import Patterns, template
from ..core.runtime import cached
from ..errors import LayoutError, format_list
from ..models.facts import text_config
from .match import Matcher, weight_name
from .table import Rules, Spec, Unit


class Units:
    """Checks that splits are between units, which ranks need whole to compute.

    ``mesh`` has the axes whose ranks compute with their parts; others gather them before use.
    """

    def __init__(self, rules: Rules, mesh: MeshAxes) -> None:
        self._over = {a for a, _ in mesh.axes if mesh.roles.get(a, "mp") in ("mp", "ep")}
        self._of: dict[str, list[Unit]] = {}
        for unit in rules.units:
            self._of.setdefault(unit.pattern, []).append(unit)
        self._names = Patterns(self._of)
        self._every = tuple(self._of.values())
        self._known: dict[tuple[int, Placement, tuple[int, ...]], str] = {}

    def cut(self, name: str, kind: str, shape: tuple[int, ...], placement: Placement) -> str:
        """Describe the units that ranks split, with numbers that fit, or return ""."""
        at = self._names.find(name, kind) if self._of else None
        if at is None:
            return ""
        key = (at, placement, shape)
        if key not in self._known:
            found = (self._numbers(unit, shape, placement) for unit in self._every[at])
            self._known[key] = next(filter(None, found), "")
        return self._known[key]

    def _numbers(self, unit: Unit, shape: tuple[int, ...], placement: Placement) -> str:
        size = dict(placement.axes)
        split = placement.spec[unit.dim] if unit.dim < len(placement.spec) else ()
        over = [a for a in split if a in self._over]
        ways = prod(size[a] for a in over)
        count, rest = divmod(shape[unit.dim], unit.length) if unit.dim < len(shape) else (0, 1)
        if rest or count % ways == 0:
            return ""
        by = " ".join(f"{a}={size[a]}" for a in over)
        fits = [str(n) for n in range(1, min(count, ways) + 1) if count % n == 0]
        repeat = ", or repeat the kv heads" if unit.axis == "kv_heads" else ""
        return (
            f"{count} {unit.axis} of {unit.length} over {by}; use "
            f"{over[0] if len(over) == 1 else 'a product of'} {' or '.join(fits)}{repeat}"
        )


# --- Orientation: whether stacked experts are (expert, out, in) or (expert, in, out)


EXPERT_COUNTS = ("num_local_experts", "n_routed_experts", "num_experts")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_INNER = ("moe_intermediate_size", "intermediate_size", "expert_ffn_hidden_size")
_ORDERS = ("(expert, out, in)", "(expert, in, out)")


class Orientations:
    """Selects between the two orders of a rule for the tensors of ``shapes``."""

    def __init__(
        self,
        rules: Rules,
        matcher: Matcher,
        shapes: Mapping[str, Shape],
        config: Mapping[str, Any],
    ) -> None:
        self._matcher, self._shapes = matcher, shapes
        self._is_ordered = rules.is_ordered
        config = text_config(config)
        self._experts = _numbers(config, EXPERT_COUNTS)
        self._inner = _numbers(config, _INNER)
        self._embedding = Patterns(rules.embedding)
        self._hidden = _numbers(config, _HIDDEN)[:1]
        self._modules: dict[str, list[str]] = {}

    def choose(self, name: str, spec: Spec) -> Spec | str:
        """Return the spec in the order of ``name``, or a description of the ambiguity."""
        shape = tuple(self._shapes[name])
        if len(shape) != len(spec.dims):
            return spec.straight()  # refused later because of its dims
        possible = self._possible(shape, spec)
        if len(possible) == 2:
            others = [self._possible(*other) for other in self._others(name)]
            sure = {next(iter(orders)) for orders in others if len(orders) == 1}
            possible = sure if len(sure) == 1 else possible
        if len(possible) == 1:
            return spec.turned() if possible.pop() else spec.straight()
        if possible and self._is_ordered:
            return spec.straight()
        sizes = (
            f"{shape} with {' or '.join(map(str, self._experts)) or 'any number of'} experts, "
            f"hidden size {self._hidden[0] if self._hidden else 'unknown'}, inner size "
            f"{' or '.join(map(str, self._inner)) or 'unknown'}"
        )
        which = "neither" if not possible else "either"
        return f"{sizes} is {which} of {' and '.join(_ORDERS)}"

    def _possible(self, shape: Shape, spec: Spec) -> set[bool]:
        """Return the orders that the sizes allow: as written (False) or turned (True)."""
        if len(shape) != len(spec.dims) or (self._experts and shape[0] not in self._experts):
            return set()
        hidden = self._hidden_size()
        if hidden is None:
            return {False, True}
        at = 2 if spec.dims[1] else 1  # tensor parallel ranks split the inner size
        orders = {False: (shape[at], shape[3 - at]), True: (shape[3 - at], shape[at])}
        return {
            turned
            for turned, (outer, inner) in orders.items()
            if outer == hidden
            and (not self._inner or any(inner in (n, 2 * n) for n in self._inner))
        }

    def _hidden_size(self) -> int | None:
        """Return the hidden size from ``config.json``, or from the embedding (tokens, hidden)."""
        if not self._hidden:
            found = (
                shape[1]
                for name, shape in self._shapes.items()
                if len(shape) == 2
                and self._embedding.find(w := weight_name(name), template(w)) is not None
            )
            self._hidden = tuple(found)[:1]
        return self._hidden[0] if self._hidden else None

    def _others(self, name: str) -> list[tuple[Shape, Spec]]:
        """Return the other matrices of the module of ``name``, with their specs."""
        if not self._modules:
            for other in self._shapes:
                self._modules.setdefault(other.rpartition(".")[0], []).append(other)
        found = []
        for other in self._modules[name.rpartition(".")[0]]:
            weight = weight_name(other)
            spec = self._matcher.direct(weight, template(weight)) if other != name else None
            if spec is not None and spec.other:
                found.append((tuple(self._shapes[other]), spec))
        return found


def _numbers(config: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(config[key] for key in keys if type(config.get(key)) is int and config[key] > 0)


# --- Quantized weights and their factors: which blocks share a factor

Shape = tuple[int, ...]
Placements = tuple[Placement, ...]


class FactorKind(NamedTuple):
    """The properties of a factor, by the suffix of its name.

    Attributes:
        weights: the suffixes that its weight's name may have instead.
        first: the weight's dim of the factor's first dim.
        ratios: values per stored element of the weight, because ints pack several.
        alone: block lengths that ``config.json`` may omit.
        packs: an element of the factor packs several values, each for some rows or columns.
        order: it holds the group index of each input, over the whole weight.
        whole: the weight cannot be split.
    """

    weights: tuple[str, ...]
    first: int = 0
    ratios: tuple[Fraction, ...] = (Fraction(1),)
    alone: tuple[int, ...] = ()
    packs: bool = False
    order: bool = False
    whole: bool = False


_PACKS = (2, 4, 8, 16)
_PACKED = tuple(Fraction(2) ** n for n in range(-4, 5))
_SCALE = FactorKind(("", "_packed"), ratios=_PACKED)
_FACTOR_KINDS = {
    "_scale_inv": FactorKind(("",), alone=(128,)),
    **dict.fromkeys(("_scale", "_scale_2", "_global_scale"), _SCALE),
    "_zero_point": _SCALE._replace(alone=_PACKS, packs=True),
    "_scales": FactorKind(("_blocks",), ratios=_PACKED),
    ".scales": FactorKind((".qweight",), ratios=_PACKED),
    ".qzeros": FactorKind((".qweight",), ratios=_PACKED, alone=_PACKS, packs=True),
    ".g_idx": FactorKind((".qweight",), order=True),
    ".weight_g_idx": FactorKind((".weight_packed",), first=1, order=True),
    ".SCB": FactorKind((".weight",)),
    ".absmax": FactorKind(("",), whole=True),
}
_ENDS = tuple(sorted(_FACTOR_KINDS, key=len, reverse=True))
_ROWS_COLUMNS = ("weight_block_size", "block_structure")
_GROUPS = ("group_size", "q_group_size")
_MOST_SETTINGS = 10_000


class _Stated(NamedTuple):
    """Block lengths in ``config.json``: of rows, of columns, of either."""

    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)  # one for each kind: compared by identity
class Granule:
    """The number of elements along a dim of a weight that share a factor.

    ``exact`` is False if the last block is shorter, or the length is unknown.
    """

    dim: int
    length: Fraction
    factors: str
    exact: bool = True

    def divides(self, elements: int, ways: int) -> bool:
        """Return whether ``ways`` equal parts of ``elements`` all end at block boundaries."""
        return ways == 1 or (self.exact and elements / (ways * self.length) % 1 == 0)

    def misfit(self, shape: Shape, ways: int) -> str:
        """Describe a split inside a block, and splits that fit."""
        elements, unit = shape[self.dim], ways * self.length
        pad = -(-elements // unit) * unit
        fits = [f"a divisor of {elements / self.length} fits"] if self.exact else []
        fits += [f"pad to {pad}"] if pad % 1 == 0 and pad != elements else []
        return (
            f"dim {self.dim} of {shape} in {ways} parts has "
            f"{float(elements / unit):g} blocks of {float(self.length):g} in each, "
            f"which share a factor of {self.factors} ({', or '.join(fits) or 'leave it whole'})"
        )


class Factors:
    """The factors among the tensors of ``shapes``, and their weights."""

    def __init__(self, shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> None:
        self._shapes = shapes
        self._stated = _stated_by(config)
        self._kinds: dict[str, FactorKind] = {}
        #: The weight of each factor.
        self.weights: dict[str, str] = {}
        self._of: dict[str, list[str]] = {}
        for name in shapes:
            end = _kind_end(name)
            kind, stem = _FACTOR_KINDS.get(end), name.removesuffix(end)
            weight = (
                next((w for e in kind.weights if (w := stem + e) in shapes), "") if kind else ""
            )
            if kind and weight:
                self._kinds[name], self.weights[name] = kind, weight
                self._of.setdefault(weight, []).append(name)
        self._ordered = {
            self.weights[n]: frozenset((k.first,)) for n, k in self._kinds.items() if k.order
        }
        self._followed: dict[tuple[Any, ...], tuple[Placements, Placements]] = {}

    def granules(self, weight: str) -> tuple[Granule, ...]:
        """Return the granules at which ``weight`` may be split."""
        shape = tuple(self._shapes[weight])
        return tuple(
            granule
            for name in self._of.get(weight, ())
            for granule in _granules(shape, tuple(self._shapes[name]), _end(name), self._stated)
        )

    def follow(self, name: str, placements: Placements) -> Placements:
        """Return the placements of the factors ``name`` if their weight's are ``placements``."""
        kind, shape = self._kinds[name], tuple(self._shapes[name])
        ordered = self._order_of(name)
        key = (id(placements), shape, kind.first, ordered)  # identity is cheaper than a comparison
        if key not in self._followed:
            made = _followed(placements, shape, kind.first, ordered)
            self._followed[key] = (made, placements)  # keeps its id in use
        return self._followed[key][0]

    def _order_of(self, name: str) -> frozenset[int]:
        """Return the dims of the weight whose groups another tensor indexes."""
        whole = frozenset[int]()
        return whole if self._kinds[name].order else self._ordered.get(self.weights[name], whole)

    def check(
        self, placements: Mapping[str, Placements], only: Iterable[str] | None = None
    ) -> None:
        """Refuse placements that separate a weight from its factors.

        Raises:
            LayoutError: the weights, with splits that fit.
        """
        wrong: dict[str, str] = {}
        seen: set[tuple[Any, ...]] = set()
        for name in self.weights if only is None else only:
            weight = self.weights[name]
            pair = (placements.get(weight), placements.get(name))
            sizes = (self._shapes[weight], self._shapes[name])
            key = (*map(id, pair), *sizes, _end(name), self._order_of(name))
            if not all(pair) or key in seen:
                continue
            seen.add(key)
            found = self._misfit(name, weight, placements)
            if found:
                wrong[name] = found
        if wrong:
            raise LayoutError(
                f"{format_list((f'{n}: {what}' for n, what in wrong.items()), 3)}. Cut a weight "
                "and its "
                "factors alike and between blocks, leave both whole, or dequantize the weights "
                "first."
            )

    def _misfit(self, name: str, weight: str, placements: Mapping[str, Placements]) -> str | None:
        shape = tuple(self._shapes[weight])
        for granule in self.granules(weight):
            for placement in placements[weight]:
                ways = placement.ways(granule.dim)
                if not granule.divides(shape[granule.dim], ways):
                    return f"{weight} {granule.misfit(shape, ways)}"
        expected = self.follow(name, placements[weight])
        own = tuple(self._shapes[name])
        if placements[name] == expected:
            return None
        held, wanted = _held(placements[name], own), _held(expected, own)
        rank = next((r for r, box in wanted.items() if held.get(r) != box), None)
        if rank is None:
            return None
        return (
            f"rank {rank} holds {held.get(rank, 'nothing')} of it, expected {wanted[rank]} for "
            f"its part of {weight}"
        )


def _kind_end(name: str) -> str:
    """Return the suffix of a factor's name that determines its kind, or ""."""
    return next(filter(name.endswith, _ENDS)) if name.endswith(_ENDS) else ""


def _end(name: str) -> str:
    return name.rsplit(".", 1)[-1]


@cached(4096)
def _granules(shape: Shape, own: Shape, end: str, stated: _Stated) -> tuple[Granule, ...]:
    """Return the granules of a weight of ``shape`` with factors of shape ``own``."""
    kind = _FACTOR_KINDS[_kind_end(f".{end}")]
    first = kind.first
    strange = any(n > 1 for n in own[len(shape) - first :])  # dims that the weight lacks
    if kind.whole or strange:
        return tuple(Granule(d, Fraction(n), end, exact=False) for d, n in enumerate(shape))
    found = []
    for at, (elements, count) in enumerate(zip(shape[first:], own, strict=False)):
        lengths = (*(stated.columns if at == len(own) - 1 else stated.rows), *stated.groups)
        made = _block(elements, count, kind, lengths)
        if made is not None:
            found.append(Granule(first + at, made[0], end, made[1]))
    return tuple(found)


def _block(
    elements: int, count: int, kind: FactorKind, stated: tuple[int, ...]
) -> tuple[Fraction, bool] | None:
    """Return the block length of a dim and whether it is exact, or None if any split fits."""
    if count in (0, 1, elements):
        inside = kind.packs and count == 1 and elements in _PACKS
        return (Fraction(elements), True) if inside else None
    if count > elements:  # a stored element packs several values
        return None if count % elements == 0 else (Fraction(elements), False)
    lengths = {g * r for g in stated for r in kind.ratios} | set(map(Fraction, kind.alone))
    found = {u for u in lengths if u > 1 and -(-elements // u) == count}
    even = Fraction(elements, count)
    if not found and not stated and even % 1 == 0 and int(even) & (int(even) - 1) == 0:
        found = {even}  # the only power of two that results in so many factors
    if not found:
        return even, False
    return min(found), all(u == even for u in found)


def _followed(
    placements: Placements, shape: Shape, first: int, ordered: frozenset[int]
) -> Placements:
    made = []
    for placement in placements:
        cut = [
            ()
            if count == 1 or dim in ordered or dim >= len(placement.spec)
            else placement.spec[dim]
            for dim, count in enumerate(shape, start=first)
        ]
        while cut and not cut[-1]:
            cut.pop()
        made.append(replace(placement, spec=tuple(cut)))
    return tuple(made)


def _held(placements: Placements, shape: Shape) -> dict[int, Box]:
    return {
        rank: box
        for placement in placements
        for rank, box in zip(placement.ranks, placement.boxes(shape), strict=True)
    }


def _stated_by(config: Mapping[str, Any]) -> _Stated:
    rows, columns, groups = dict[int, None](), dict[int, None](), dict[int, None]()
    for key, value in islice(settings(config), _MOST_SETTINGS):
        if key in _ROWS_COLUMNS and isinstance(value, list | tuple) and len(value) == 2:
            rows |= dict.fromkeys(_lengths(value[0]))
            columns |= dict.fromkeys(_lengths(value[1]))
        elif key in _GROUPS:
            groups |= dict.fromkeys(_lengths(value))
    return _Stated(tuple(rows), tuple(columns), tuple(groups))


def _lengths(value: object) -> tuple[int, ...]:
    return (value,) if type(value) is int and value > 1 else ()


def settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all keys and values in quantization settings at any depth."""
    left: list[tuple[Any, bool]] = [(config, False)]
    while left:
        node, inside = left.pop()
        if isinstance(node, Mapping):
            for key, value in node.items():
                if inside:
                    yield str(key), value
                left.append((value, inside or key in ("quantization_config", "compression_config")))
        elif isinstance(node, list | tuple):
            left += [(value, inside) for value in node]
