"""Placement of tensors by rules: specs, stages and ranks.

All problems are collected and raised as one error before any I/O. Tensors that the policies
replicate instead are listed in the layout's notes.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

from ..core.layout import (
    Axes,
    Layout,
    MeshAxes,
    Placement,
    Strategy,
    shard_dim_over_replicas,
)
from ..core.layout import Spec as AxisSpec
from ..core.patterns import Patterns, numbered, template
from ..errors import LayoutError, format_list
from ..models.facts import text_config
from .match import Matcher, PlacementProblems, Policy, Unmatched, check_policy, weight_name
from .table import Dims, ModelFacts, Rules, Spec, check_rules
from .tensor_dims import EXPERT_COUNTS, Factors, Granule, Orientations, Units


class Home(NamedTuple):  # a tuple, because one is made for each of 90,000 names
    """The stages of a tensor (empty: all of them), and its expert parallel slot.

    ``apart`` is the pattern of its tower, if it is not part of the text model.
    """

    stages: tuple[int, ...]
    slot: int | None = None
    apart: str = ""


def split_layers(num_layers: int, pp: int) -> tuple[int, ...]:
    """Return the layers of each stage, as even as possible; earlier stages get the remainder.

    >>> split_layers(9, 2)
    (5, 4)
    """
    each, extra = divmod(num_layers, pp)
    return tuple(each + (stage < extra) for stage in range(pp))


class Stages:
    """Finds the stages and expert slot of each name on one mesh.

    Raises:
        LayoutError: the layers do not fit the stages, or the experts the expert ranks.
    """

    def __init__(
        self, rules: Rules, mesh: MeshAxes, model: ModelFacts | None, names: Iterable[str]
    ) -> None:
        self._rules, self._mesh = rules, mesh
        self._pp, self._ep = mesh.num_stages, mesh.ways("ep")
        self._layer = numbered(rules.layers, "layer")
        self._expert = numbered(rules.experts, "expert")
        self._first, self._last = Patterns(rules.first), Patterns(rules.last)
        self._embedding = Patterns(rules.embedding)
        self._apart = Patterns(rules.apart)
        weights = [weight_name(n) for n in names]
        if rules.apart:
            weights = [w for w in weights if not self._tower(w, template(w))]
        self._tied = bool(model and model.tied_embeddings) and not _any(rules.head, weights)
        self._layer_ends = self._cut_layers(model, weights) if self._pp > 1 else ()
        self._num_experts = self._count_experts(model, weights) if self._ep > 1 else 0

    def _tower(self, name: str, kind: str) -> str:
        """Return the pattern of the tower of ``name``, or ""."""
        at = self._apart.find(name, kind) if self._rules.apart else None
        return "" if at is None else self._rules.apart[at]

    def home(self, name: str, kind: str) -> Home:
        """Return the home of the weight ``name``, whose template is ``kind``."""
        if tower := self._tower(name, kind):
            return Home((0,), apart=tower)
        return Home(self._stages(name, kind), self._slot(name))

    def _stages(self, name: str, kind: str) -> tuple[int, ...]:
        last = self._pp - 1
        if last == 0:
            return (0,)
        layer = _number(self._layer, name)
        if layer is not None:
            return (min(bisect_right(self._layer_ends, layer), last),)
        if self._tied and self._embedding.find(name, kind) is not None:
            return (0, last)
        if self._first.find(name, kind) is not None:
            return (0,)
        return (last,) if self._last.find(name, kind) is not None else ()

    def _slot(self, name: str) -> int | None:
        if self._ep == 1:
            return None
        expert = _number(self._expert, name)
        if expert is None:
            return None
        if expert >= self._num_experts:
            raise LayoutError(
                f"{name}: config.json has {self._num_experts} experts, numbered from 0. Correct "
                "config.json, or the name."
            )
        return expert // (self._num_experts // self._ep)

    def _cut_layers(self, model: ModelFacts | None, weights: list[str]) -> tuple[int, ...]:
        """Return the end of the layers of each stage."""
        pp, rules = self._pp, self._rules
        if not rules.layers:
            raise LayoutError(
                f"{self._mesh}: the rules {rules.name} have no layer patterns, so they define "
                f'no stages. Add [stages] with layers = "…layers.{{layer}}.".'
            )
        seen = _count(self._layer, weights)
        num = ((model and model.num_layers) or seen) if seen else 0
        if pp > num:
            raise LayoutError(
                f"{self._mesh}: {pp} pipeline stages, but the names have {num} layers "
                f"({' or '.join(rules.layers)}). Use pp={max(num, 1)} or less, "
                "or correct [stages] layers in the rules."
            )
        each = rules.layers_per_stage or split_layers(num, pp)
        if len(each) != pp or sum(each) != num:
            raise LayoutError(
                f"rules {rules.name}: layers_per_stage = {list(each)} has {len(each)} stages with "
                f"{sum(each)} layers, but {self._mesh} has {pp} stages and the model {num} "
                f"layers. Write {pp} numbers that add up to {num}."
            )
        return tuple(accumulate(each))

    def _count_experts(self, model: ModelFacts | None, weights: list[str]) -> int:
        seen = _count(self._expert, weights)
        if not seen:
            return 0  # experts are stacked: their spec splits them
        num = _experts_by_config(model.config if model else {}) or seen
        if num % self._ep:
            raise LayoutError(
                f"{self._mesh}: ep={self._ep} does not divide the {num} experts. "
                f"Use an ep that does, such as {_largest_divisor(num, self._ep)}."
            )
        return num


def _experts_by_config(config: Mapping[str, Any]) -> int:
    """Return the number of experts in ``config.json``, or 0."""
    for source in (config, text_config(config)):
        for key in EXPERT_COUNTS:
            if isinstance(source.get(key), int):
                return int(source[key])
    return 0


def _largest_divisor(number: int, below: int) -> int:
    return next(d for d in range(below, 0, -1) if number % d == 0)


def _number(pattern: re.Pattern[str] | None, name: str) -> int | None:
    match = pattern.match(name) if pattern else None
    return int(match[match.lastindex or 0]) if match else None


def _count(pattern: re.Pattern[str] | None, weights: list[str]) -> int:
    """Return how many numbers the names imply: the largest plus 1."""
    return max((n + 1 for w in weights if (n := _number(pattern, w)) is not None), default=0)


def _any(patterns: tuple[str, ...], weights: list[str]) -> bool:
    asked = Patterns(patterns)
    return any(asked.find(w, template(w)) is not None for w in weights)


# --- Layouts

_WHOLE = Spec()


def layout(
    shapes: Mapping[str, tuple[int, ...]],
    strategy: Strategy | MeshAxes,
    rules: Rules,
    model: ModelFacts | None = None,
    scalars: frozenset[str] = frozenset(),
    unmatched: Unmatched = "error",
    uneven: Policy = "error",
    unseen: Iterable[str] = (),
    *,
    computes: bool = False,
) -> Layout:
    """Return the layout of the tensors of ``shapes``: which rank holds which box.

    Tensors of ``scalars``, and those of no stage (rotary tables), are whole on every rank.

    Args:
        shapes: the shape of each tensor.
        strategy: the strategy of the job, or the axes of a mesh.
        rules: how names are sharded; see ``rules_for`` and ``read_rules``.
        model: numbers of layers and experts, tied embeddings; by default counted from the names.
        scalars: names of training scalars (``global_step``).
        unmatched: the policy for names that no rule matches. With ``"largest"`` the largest dim
            that the tensor parallel ranks divide is split, and then one over the fully sharded
            ranks; tensors of fewer than 65,536 elements are whole.
        uneven: the policy for dims that do not divide.
        unseen: names of the model with unknown shapes: their layers are counted, and the layout
            lists them as ``absent``.
        computes: whether the ranks compute with their parts: then splits inside heads and other
            units are errors, otherwise notes.

    Raises:
        LayoutError: names without a rule, dims that do not divide, stages without layers;
            all problems of a kind in one error.

    >>> from .table import Rules
    >>> made = layout({"w": (4, 8)}, Strategy(mp=2), Rules("mine", specs=(("w", "-,mp"),)))
    >>> str(made.placements["w"][0])
    '[-,mp] over dp1 mp2 from rank 0'
    """
    check_rules(rules)
    check_policy("unmatched", unmatched, Unmatched)
    check_policy("uneven", uneven)
    others = tuple(unseen)
    weights = {name: shape for name, shape in shapes.items() if name not in scalars}
    mesh = strategy.mesh_axes if isinstance(strategy, Strategy) else strategy
    if rules.axes is not None:
        mesh = replace(mesh, by_name=True)
    if mesh.num_stages > 1 and rules.has_stacked_layers:
        mesh = mesh.without_stages()
    stages = Stages(rules, mesh, model, (*weights, *others))
    decided = _Decisions(rules, mesh, weights, model, by_shape=unmatched == "largest")
    factors = decided.factors
    following = {n for n in factors.weights if not decided.is_direct(n)}
    everywhere = (Placement((("all", mesh.num_ranks),)),)
    placements: dict[str, tuple[Placement, ...]] = dict.fromkeys(
        scalars & shapes.keys(), everywhere
    )
    for name in weights:
        if name not in following:
            placements[name] = decided.place(name, stages)
    for name in sorted(following, key=len):  # after its weight, which may have factors itself
        placements[name] = factors.follow(name, placements[factors.weights[name]])
    absent = {name: decided.place_unseen(name, stages) for name in others}
    decided.problems.refuse(rules, mesh, unmatched, uneven, computes=computes)
    factors.check(placements, [n for n in factors.weights if n not in following])
    return Layout(
        num_ranks=mesh.num_ranks,
        placements={name: placements[name] for name in shapes},
        stage_axes=mesh.stage_axes,
        notes=(*rules.notes, *decided.problems.notes(), *_idle(rules, decided.matcher)),
        absent=absent,
    )


class _Decisions:
    """Decides spec and placement of each name, and collects problems."""

    def __init__(
        self,
        rules: Rules,
        mesh: MeshAxes,
        shapes: Mapping[str, tuple[int, ...]],
        model: ModelFacts | None,
        *,
        by_shape: bool,
    ) -> None:
        self._mesh, self._shapes, self._by_shape = mesh, shapes, by_shape
        config = _config(model)
        self.matcher = Matcher(rules)
        self.factors = Factors(shapes, config)
        self._placer = _Placer(mesh)
        self.problems = self._placer.problems
        self._orientations = Orientations(rules, self.matcher, shapes, config)
        self._units = Units(rules, mesh)
        self._own = Patterns(rules.written)
        self._alike: dict[str, tuple[int, ...]] | None = None

    def is_direct(self, name: str) -> bool:
        """Return whether a rule matches ``name`` itself, not the weight that it follows."""
        weight = weight_name(name)
        return self.matcher.direct(weight, template(weight)) is not None

    def place(self, name: str, stages: Stages) -> tuple[Placement, ...]:
        """Return the placements of ``name``."""
        shape, weight = tuple(self._shapes[name]), weight_name(name)
        kind = template(weight)
        spec, home = self._spec(name, weight, kind), stages.home(weight, kind)
        if home.apart and spec.buffer:
            self.problems.add("apart", home.apart, "")
        placed = self._placer.place(name, shape, spec, home, self.factors.granules(name))
        if name != weight or self._own.find(weight, kind) is not None:
            return placed
        if parts := self._units.cut(weight, kind, shape, placed[0]):
            self.problems.add("units", name, parts)
        return placed

    def place_unseen(self, name: str, stages: Stages) -> tuple[Placement, ...]:
        """Return the placements of a name of unknown shape, from a similar name if there is one."""
        if self._alike is None:
            self._alike = {template(weight_name(n)): tuple(s) for n, s in self._shapes.items()}
        kind = template(name)
        spec = (self.matcher.find(name, kind) or _WHOLE).straight()
        any_divides = (self._mesh.num_ranks,) * len(spec.dims)
        home = stages.home(name, kind)
        return self._placer.place(name, self._alike.get(kind, any_divides), spec, home)

    def _spec(self, name: str, weight: str, kind: str) -> Spec:
        spec = self.matcher.find(weight, kind)
        if spec is None and self._by_shape:
            return Spec(by_shape=True)
        if spec is None:
            self.problems.add("unmatched", name, str(tuple(self._shapes[name])))
            return _WHOLE
        if not spec.other:
            return spec
        if self._mesh.ways("mp") == 1:  # no rank shares inputs or outputs
            return spec.straight()
        chosen = self._orientations.choose(name, spec)
        if isinstance(chosen, str):
            self.problems.add("order", name, f"{chosen}, {spec}")
            return _WHOLE
        return chosen


def _config(model: ModelFacts | None) -> Mapping[str, Any]:
    return model.config if model else {}


def _idle(rules: Rules, matcher: Matcher) -> tuple[str, ...]:
    """Return a note on user rules that match nothing, which are likely mistakes."""
    used = {rules.specs[i][0] for i in matcher.used}
    idle = [f'"{p}"' for p in rules.written if p not in used]
    return (f"the rules for {format_list(idle)} match no tensor.",) if idle else ()


_Event = tuple[str, str]  # what was found, and its numbers


class _Placer:
    """Creates each distinct placement once; a large model has a few hundred."""

    def __init__(self, mesh: MeshAxes) -> None:
        self._mesh = mesh
        self._made: dict[tuple[object, ...], tuple[tuple[Placement, ...], list[_Event]]] = {}
        self._shared: dict[tuple[Placement, ...], tuple[Placement, ...]] = {}
        self.problems = PlacementProblems()

    def place(
        self,
        name: str,
        shape: tuple[int, ...],
        spec: Spec,
        home: Home,
        granules: tuple[Granule, ...] = (),
    ) -> tuple[Placement, ...]:
        """Return the placements of a tensor, one for each stage that holds it."""
        key = (shape, spec, home, granules)
        known = self._made.get(key)
        if known is None:
            events: list[_Event] = []
            placed = self._make(shape, spec, home, granules, events)
            known = self._made[key] = (self._shared.setdefault(placed, placed), events)
        placed, events = known
        for what, numbers in events:
            self.problems.add(what, name, numbers)
        return placed

    def _make(
        self,
        shape: tuple[int, ...],
        spec: Spec,
        home: Home,
        granules: tuple[Granule, ...],
        events: list[_Event],
    ) -> tuple[Placement, ...]:
        mesh = self._mesh
        axes = mesh.stage_axes if home.slot is None else mesh.expert_axes
        cut = _resolve(spec.dims, mesh, axes)
        if spec.dims and len(spec.dims) != len(shape):
            events.append(("misfit", f'has shape {shape}, its rule is "{spec}"'))
            cut = ()
        cut = _evened(cut, shape, axes, granules, events)
        placement = Placement(axes, cut)
        if spec.by_shape:
            placement = _by_shape(placement, shape, mesh, granules)
            events.append(("largest", f"{shape} as {Spec(placement.spec)}"))
        elif home.stages and shape and (home.apart or not spec.buffer):
            placement = _fully_sharded(placement, shape, spec.dims, mesh, granules, events)
        if not home.stages and not spec.buffer:
            events.append(("no stage", ""))
        if home.stages and not spec.buffer and shape and mesh.optimizer_shard != 1:
            sharded = _optimizer_sharded(placement, shape, mesh.optimizer_shard, granules, events)
            self.problems.sharded |= sharded is not placement
            placement = sharded
        if not home.stages and not any(placement.spec) and home.slot is None:
            return (Placement((("all", mesh.num_ranks),)),)
        offset = (home.slot or 0) * prod(n for _, n in mesh.expert_axes)
        return tuple(
            replace(placement, first_rank=stage * mesh.stage_ranks + offset)
            for stage in home.stages or range(mesh.num_stages)
        )


def _resolve(dims: Dims, mesh: MeshAxes, axes: Axes) -> AxisSpec:
    """Translate a rule's dims to the axes of this mesh, dropping axes that it lacks.

    The axes of fsdp are assigned later, unless the rules name the mesh's own axes.
    """
    there = {a for a, n in axes if n > 1}
    cut = [
        tuple(
            a
            for named in split
            if named != "fsdp" or mesh.by_name
            for a in mesh.named(named)
            if a in there
        )
        for split in dims
    ]
    used = [a for split in cut for a in split]
    if len(used) != len(set(used)):
        raise LayoutError(
            f'the rule "{Spec(dims)}" uses an axis twice for {mesh}: {", ".join(used)}. '
            "(vocab is mp; with experts dp is ep and edp; dp contains fsdp.)"
        )
    while cut and not cut[-1]:
        cut.pop()
    return tuple(cut)


# --- Dims that the shape decides: of fully sharded data parallelism, and of names without a rule

_WHOLE_BELOW = 1 << 16  # elements; a smaller tensor costs more in messages than it takes in memory


def _by_shape(
    placement: Placement, shape: tuple[int, ...], mesh: MeshAxes, granules: tuple[Granule, ...]
) -> Placement:
    """Split the largest dims of a tensor without a rule over all axes that split weights."""
    if prod(shape) < _WHOLE_BELOW:
        return placement
    others = tuple(a for a, _ in placement.axes if mesh.roles.get(a, "mp") == "mp")
    for over in (others, mesh.named("fsdp")):
        placement = _split_one(placement, shape, over, (), granules) or placement
    return placement


def _fully_sharded(
    placement: Placement,
    shape: tuple[int, ...],
    dims: Dims,
    mesh: MeshAxes,
    granules: tuple[Granule, ...],
    events: list[_Event],
) -> Placement:
    """Split a dim over the axes of fsdp that are left: that of the rule, or the largest."""
    used = {a for split in placement.spec for a in split}
    size = dict(placement.axes)
    over = tuple(a for a in mesh.named("fsdp") if size[a] > 1 and a not in used)
    if not over or mesh.by_name:
        return placement
    made = _split_one(placement, shape, over, dims, granules)
    if made is None:
        by = " ".join(f"{a}={size[a]}" for a in over)
        events.append(("unsplit", f"{shape} over {by}"))
    return made or placement


def _split_one(
    placement: Placement,
    shape: tuple[int, ...],
    over: tuple[str, ...],
    dims: Dims,
    granules: tuple[Granule, ...],
) -> Placement | None:
    """Split one dim over the axes ``over``, or return None if they divide none.

    The dim that the rule ``dims`` names is preferred, then those that it never splits (so the
    choice is the same for every number of tensor parallel ranks), then larger ones.
    """
    size = dict(placement.axes)
    ways = prod(size[a] for a in over)
    if ways == 1:
        return placement
    named = [*dims, *[()] * (len(shape) - len(dims))]

    def preference(dim: int) -> tuple[bool, bool, int]:
        is_split = bool(named[dim]) or placement.ways(dim) > 1
        return "fsdp" not in named[dim], is_split, -shape[dim]

    for dim in sorted(range(len(shape)), key=preference):
        total = placement.ways(dim) * ways
        if shape[dim] % total == 0 and _misfit(granules, shape, dim, total) is None:
            spec = [*placement.spec, *[()] * (dim + 1 - len(placement.spec))]
            spec[dim] = (*spec[dim], *(a for a in over if size[a] > 1))
            return replace(placement, spec=tuple(spec))
    return None


def _evened(
    cut: AxisSpec,
    shape: tuple[int, ...],
    axes: Axes,
    granules: tuple[Granule, ...],
    events: list[_Event],
) -> AxisSpec:
    """Return ``cut`` without dims that do not divide, or would be split inside a block."""
    size = dict(axes)
    out = []
    for dim, split in enumerate(cut):
        ways = prod(size[a] for a in split)
        if shape[dim] % ways:
            by = " ".join(f"{a}={size[a]}" for a in split)
            padded = -(-shape[dim] // ways) * ways
            text = f"dim {dim} of {shape} has {shape[dim]}, not divided by {by} (pad to {padded})"
            events.append(("uneven", text))
        elif (misfit := _misfit(granules, shape, dim, ways)) is not None:
            events.append(("uneven", misfit))
        else:
            out.append(split)
            continue
        out.append(())
    while out and not out[-1]:
        out.pop()
    return tuple(out)


def _misfit(
    granules: tuple[Granule, ...], shape: tuple[int, ...], dim: int, ways: int
) -> str | None:
    """Describe the blocks that ``ways`` parts of ``dim`` would split, or return None."""
    for granule in granules:
        if granule.dim == dim and not granule.divides(shape[dim], ways):
            return granule.misfit(shape, ways)
    return None


def _optimizer_sharded(
    placement: Placement,
    shape: tuple[int, ...],
    ways: int,
    granules: tuple[Granule, ...],
    events: list[_Event],
) -> Placement:
    """Split dim 0 of ``placement`` over its replicas, unless that is uneven."""
    try:
        sharded = shard_dim_over_replicas(placement, ways)
    except LayoutError:
        replicas = placement.num_ranks // prod(placement.ways(d) for d in range(len(shape)))
        events.append(("no shard", f"has {replicas} replicas"))
        return placement
    if shape[0] % sharded.ways(0):
        events.append(("no shard", f"dim 0 has {shape[0]}, not divided by {sharded.ways(0)}"))
        return placement
    if (misfit := _misfit(granules, shape, 0, sharded.ways(0))) is not None:
        events.append(("no shard", misfit))
        return placement
    return sharded
