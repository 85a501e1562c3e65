"""Stages: which pipeline stage, and which expert ranks, a tensor lives on.

    layers  0 1 2 3 4 | 5 6 7 8      nine layers over two stages: the earlier gets the extra one
    first ↗           |         ↖ last, and layers past the last (multi-token prediction)

This module knows names and counts; it knows no boxes.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from ..errors import LayoutError
from ..strategy import Strategy
from .match import Patterns, template, weight_name
from .modalities import text_config
from .orientation import EXPERT_COUNTS
from .table import ModelFacts, Rules, numbered


class Home(NamedTuple):  # a tuple, because one is made for each of 90,000 names
    """Where a tensor lives: its stages (none: in all of them), and its expert parallel slot.

    ``apart`` is the pattern of the tower that it is of, if it is not the text model's.
    """

    stages: tuple[int, ...]
    slot: int | None = None
    apart: str = ""


def split_layers(num_layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each stage, as even as possible, the earlier stages getting the extra ones.

    >>> split_layers(9, 2)
    (5, 4)
    """
    each, extra = divmod(num_layers, pp)
    return tuple(each + (stage < extra) for stage in range(pp))


class Stages:
    """Finds the home of each name for one strategy.

    Raises:
        LayoutError: the layers do not fit the stages, or the experts the expert ranks.
    """

    def __init__(
        self, rules: Rules, strategy: Strategy, model: ModelFacts | None, names: Iterable[str]
    ) -> None:
        self._rules, self._strategy = rules, strategy
        self._layer = numbered(rules.layers, "layer")
        self._expert = numbered(rules.experts, "expert")
        self._first, self._last = Patterns(rules.first), Patterns(rules.last)
        self._embedding = Patterns(rules.embedding)
        self._apart = Patterns(rules.apart)
        weights = [weight_name(n) for n in names]
        if rules.apart:
            weights = [w for w in weights if not self._tower(w, template(w))]
        self._tied = bool(model and model.tied_embeddings) and not _any(rules.head, weights)
        self._layer_ends = self._cut_layers(model, weights) if strategy.pp > 1 else ()
        self._num_experts = self._count_experts(model, weights) if strategy.ep > 1 else 0

    def _tower(self, name: str, kind: str) -> str:
        """The pattern of the tower that ``name`` is of, or nothing."""
        at = self._apart.find(name, kind) if self._rules.apart else None
        return "" if at is None else self._rules.apart[at]

    def home(self, name: str, kind: str) -> Home:
        """Where the weight ``name`` lives, whose template is ``kind``."""
        if tower := self._tower(name, kind):
            return Home((0,), apart=tower)
        return Home(self._stages(name, kind), self._slot(name))

    def _stages(self, name: str, kind: str) -> tuple[int, ...]:
        last = self._strategy.pp - 1
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
        if self._strategy.ep == 1:
            return None
        expert = _number(self._expert, name)
        if expert is None:
            return None
        if expert >= self._num_experts:
            raise LayoutError(
                f"{name}: there are {self._num_experts} experts by the model's config, "
                "numbered from 0. Correct the config, or the name."
            )
        return expert // (self._num_experts // self._strategy.ep)

    def _cut_layers(self, model: ModelFacts | None, weights: list[str]) -> tuple[int, ...]:
        """One past the last layer of each stage."""
        pp, rules = self._strategy.pp, self._rules
        if not rules.layers:
            raise LayoutError(
                f"{self._strategy}: the rules {rules.name} do not say which names have a layer "
                f'number, so they give no stages. Add [stages] with layers = "…layers.{{layer}}.".'
            )
        seen = _count(self._layer, weights)
        num = ((model and model.num_layers) or seen) if seen else 0
        if pp > num:
            raise LayoutError(
                f"{self._strategy}: {pp} pipeline stages, but {num} layers by the names "
                f"({' or '.join(rules.layers)}). Take pp={max(num, 1)} or less, "
                "or correct [stages] layers in the rules."
            )
        each = rules.layers_per_stage or split_layers(num, pp)
        if len(each) != pp or sum(each) != num:
            raise LayoutError(
                f"rules {rules.name}: layers_per_stage = {list(each)} has {len(each)} stages with "
                f"{sum(each)} layers, but {self._strategy} has {pp} stages and the model {num} "
                f"layers. Give {pp} numbers that add up to {num}."
            )
        return tuple(accumulate(each))

    def _count_experts(self, model: ModelFacts | None, weights: list[str]) -> int:
        seen = _count(self._expert, weights)
        if not seen:
            return 0  # no expert has a name of its own; stacked ones are cut by their spec
        num = _experts_by_config(model.config if model else {}) or seen
        if num % self._strategy.ep:
            raise LayoutError(
                f"{self._strategy}: ep={self._strategy.ep} does not divide the {num} experts. "
                f"Take an ep that does, such as {_largest_divisor(num, self._strategy.ep)}."
            )
        return num


def _experts_by_config(config: Mapping[str, Any]) -> int:
    """The number of experts that ``config.json`` gives, or 0."""
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
    """How many numbers there are, by the largest seen."""
    return max((n + 1 for w in weights if (n := _number(pattern, w)) is not None), default=0)


def _any(patterns: tuple[str, ...], weights: list[str]) -> bool:
    asked = Patterns(patterns)
    return any(asked.find(w, template(w)) is not None for w in weights)
