"""Placing: from names, shapes, rules and a strategy to a layout.

Everything that does not fit is collected first and said in one report, before a byte
moves. What is asked to be replicated instead is said in the layout's notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

from ..errors import LayoutError, some
from ..layout import Layout, Placement, shard_dim_over_replicas
from ..layout import Spec as AxisSpec
from ..strategy import Axes, Strategy
from .match import Matcher, template, weight_name
from .stages import Home, Stages
from .table import Dims, ModelFacts, Rules, Spec

Policy = Literal["error", "replicate"]
_WHOLE = Spec()


def layout(
    shapes: Mapping[str, tuple[int, ...]],
    strategy: Strategy,
    rules: Rules,
    model: ModelFacts | None = None,
    hyper: frozenset[str] = frozenset(),
    unmatched: Policy = "error",
    uneven: Policy = "error",
) -> Layout:
    """Who holds which box of each tensor of ``shapes``.

    Tensors of ``hyper``, and those of no stage (rotary tables), are whole on every rank.

    Args:
        shapes: the shape of each tensor.
        strategy: the ways the job is parallel.
        rules: how names are cut; see ``rules_for`` and ``read_rules``.
        model: number of layers and experts, tied embeddings; else counted from the names.
        hyper: names that are no weights (``global_step``).
        unmatched: what to do with names that no rule matches.
        uneven: what to do with dims that do not divide.

    Raises:
        LayoutError: names without a rule, dims that do not divide, stages without layers;
            all of a kind in one report.

    >>> from .table import Rules
    >>> made = layout({"w": (4, 8)}, Strategy(mp=2), Rules("mine", specs=(("w", "-,mp"),)))
    >>> str(made.placements["w"][0])
    '[-,mp] over dp1 mp2 from rank 0'
    """
    _check_policy("unmatched", unmatched)
    _check_policy("uneven", uneven)
    stages = Stages(rules, strategy, model, (n for n in shapes if n not in hyper))
    matcher, placer = Matcher(rules), _Placer(strategy)
    everywhere = (Placement((("all", strategy.num_ranks),)),)
    placements: dict[str, tuple[Placement, ...]] = {}
    for name, shape in shapes.items():
        if name in hyper:
            placements[name] = everywhere
            continue
        weight = weight_name(name)
        kind = template(weight)
        spec = matcher.find(weight, kind)
        if spec is None:
            placer.found.add("unmatched", kind, name, shape)
            spec = _WHOLE
        placements[name] = placer.place(name, tuple(shape), spec, stages.home(weight, kind))
    placer.found.refuse(rules, strategy, unmatched, uneven)
    return Layout(
        num_ranks=strategy.num_ranks,
        placements=placements,
        stage_axes=strategy.stage_axes,
        notes=placer.found.notes(strategy),
    )


def _check_policy(name: str, value: str) -> None:
    if value not in ("error", "replicate"):
        raise LayoutError(f'{name}={value!r}: write "error" or "replicate".')


@dataclass
class _Found:
    """What did not go as the rules say, by kind of name so that 61 layers are one line."""

    kinds: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    said: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, what: str, key: str, name: str, detail: object = "") -> None:
        self.kinds.setdefault(what, {}).setdefault(key, []).append(name)
        self.said.setdefault((what, key), str(detail))

    def lines(self, what: str) -> list[str]:
        """One phrase for each kind: the first name, its numbers, how many more."""
        out = []
        for key, names in self.kinds.get(what, {}).items():
            detail = self.said[what, key]
            more = f" (and {len(names) - 1} like it)" if len(names) > 1 else ""
            out.append(f"{names[0]} {detail}{more}".replace("  ", " "))
        return out

    def count(self, what: str) -> int:
        return sum(map(len, self.kinds.get(what, {}).values()))

    def refuse(self, rules: Rules, strategy: Strategy, unmatched: Policy, uneven: Policy) -> None:
        """Raise one LayoutError for all that the policies forbid."""
        if unmatched == "error" and (kinds := self.kinds.get("unmatched")):
            kind = next(iter(kinds))
            shape = self.said["unmatched", kind]
            dims = ",".join("-" * max(shape.count(",") + (not shape.endswith(",)")), 1))
            raise LayoutError(
                f"{self.count('unmatched')} tensors match none of the rules {rules.name}: "
                f"{some(self.lines('unmatched'))}. Give a rule for each, such as "
                f'"{kind.replace("#", "*")}" = "{dims}" (whole), '
                'or ask for whole copies on every rank with unmatched="replicate".'
            )
        if self.kinds.get("misfit"):
            raise LayoutError(
                f"{self.count('misfit')} tensors do not have the dims of their rule: "
                f'{_sentence(self.lines("misfit"))}. Write one part for each dim, or "-" alone.'
            )
        if uneven == "error" and self.kinds.get("uneven"):
            raise LayoutError(
                f"{self.count('uneven')} dims do not divide for {strategy}: "
                f"{_sentence(self.lines('uneven'))}. Take another strategy, leave the dim whole "
                'with a rule such as "NAME" = "-", or every such dim with uneven="replicate".'
            )
        if self.kinds.get("no shard") and not self.kinds.get("sharded"):
            raise LayoutError(
                f"{strategy}: no tensor can be cut {strategy.optimizer_shard} ways more over its "
                f"replicas: {_sentence(self.lines('no shard'), 2)}. "
                "Take a number of ways that the replicas are a multiple of, or -1 for all."
            )

    def notes(self, strategy: Strategy) -> tuple[str, ...]:
        """What a person should know although it is no error."""
        templates = {
            "unmatched": "{} tensors match no rule and are whole on every rank of their stage: {}.",
            "uneven": "{} dims do not divide and are left whole: {}.",
            "no stage": "{} tensors belong to no stage and are held by every stage: {}.",
            "no shard": "{} tensors keep their replicas, the optimizer shard does not fit: {}.",
        }
        return tuple(
            text.format(self.count(what), _sentence(self.lines(what)))
            for what, text in templates.items()
            if what in self.kinds
        )


def _sentence(lines: list[str], limit: int = 5) -> str:
    return some(lines, limit)


class _Placer:
    """Makes each distinct placement once; a big model has a few hundred."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._made: dict[tuple[object, ...], tuple[Placement, ...]] = {}
        self._shared: dict[tuple[Placement, ...], tuple[Placement, ...]] = {}
        self._events: dict[tuple[object, ...], list[tuple[str, str, str]]] = {}
        self.found = _Found()

    def place(
        self, name: str, shape: tuple[int, ...], spec: Spec, home: Home
    ) -> tuple[Placement, ...]:
        """The placements of a tensor: one for each stage that holds it."""
        key = (shape, spec, home)
        if key not in self._made:
            self._events[key] = []
            made = self._make(shape, spec, home, self._events[key])
            self._made[key] = self._shared.setdefault(made, made)
        for what, detail, extra in self._events[key]:
            self.found.add(what, f"{template(name)} {detail}", name, detail or extra)
        return self._made[key]

    def _make(
        self, shape: tuple[int, ...], spec: Spec, home: Home, events: list[tuple[str, str, str]]
    ) -> tuple[Placement, ...]:
        s = self._strategy
        axes = s.stage_axes if home.slot is None else s.stage_axes[1:]  # ep is the slowest
        cut = _resolve(spec.dims, s, axes)
        if spec.dims and len(spec.dims) != len(shape):
            events.append(("misfit", f'has shape {shape}, its rule is "{spec}"', ""))
            cut = ()
        cut = _evened(cut, shape, axes, events)
        placement = Placement(axes, cut)
        if not home.stages and not spec.buffer:
            events.append(("no stage", "", ""))
        if home.stages and not spec.buffer and shape and s.optimizer_shard != 1:
            placement = _optimizer_sharded(placement, shape, s.optimizer_shard, events)
        if not home.stages and not cut and home.slot is None:
            return (Placement((("all", s.num_ranks),)),)
        offset = (home.slot or 0) * (s.stage_ranks // s.ep)
        return tuple(
            replace(placement, first_rank=stage * s.stage_ranks + offset)
            for stage in home.stages or range(s.pp)
        )


def _resolve(dims: Dims, strategy: Strategy, axes: Axes) -> AxisSpec:
    """The rule's dims in the axes of this strategy; an axis it does not have is dropped."""
    stands_for = {
        "vocab": () if strategy.vocab_emb_dp else ("mp",),
        "dp": ("dp",) if strategy.ep == 1 else ("ep", "edp"),
        "edp": ("dp",) if strategy.ep == 1 else ("edp",),
    }
    there = {a for a, n in axes if n > 1}
    cut = [
        tuple(a for named in split for a in stands_for.get(named, (named,)) if a in there)
        for split in dims
    ]
    used = [a for split in cut for a in split]
    if len(used) != len(set(used)):
        raise LayoutError(
            f'the rule "{Spec(dims)}" uses an axis twice for {strategy}: {", ".join(used)}. '
            "(vocab is mp; with experts dp is ep and edp.)"
        )
    while cut and not cut[-1]:
        cut.pop()
    return tuple(cut)


def _evened(
    cut: AxisSpec, shape: tuple[int, ...], axes: Axes, events: list[tuple[str, str, str]]
) -> AxisSpec:
    """``cut`` without the dims that do not divide."""
    size = dict(axes)
    out = []
    for dim, split in enumerate(cut):
        ways = prod(size[a] for a in split)
        if shape[dim] % ways:
            by = " ".join(f"{a}={size[a]}" for a in split)
            padded = -(-shape[dim] // ways) * ways
            events.append(
                ("uneven", f"dim {dim} has {shape[dim]}, not divided by {by}, pad to {padded}", "")
            )
        out.append(() if shape[dim] % ways else split)
    while out and not out[-1]:
        out.pop()
    return tuple(out)


def _optimizer_sharded(
    placement: Placement, shape: tuple[int, ...], ways: int, events: list[tuple[str, str, str]]
) -> Placement:
    """``placement`` with dim 0 cut further over its replicas, or as it is where that is uneven."""
    try:
        sharded = shard_dim_over_replicas(placement, ways)
    except LayoutError:
        replicas = placement.num_ranks // prod(placement.ways(d) for d in range(len(shape)))
        events.append(("no shard", f"has {replicas} replicas", ""))
        return placement
    if shape[0] % sharded.ways(0):
        events.append(("no shard", f"dim 0 has {shape[0]}, {sharded.ways(0)} ways", ""))
        return placement
    events.append(("sharded", "", ""))
    return sharded
