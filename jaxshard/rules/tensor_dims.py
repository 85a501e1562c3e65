"""Attention heads and expert dims: which dim a rule may cut.

    k_proj  (16, 64), heads of 8 rows, mp=8      2 rows each: a quarter of a head

Such files are whole, and of use to programs that gather them; ranks that compute with what
they hold need whole heads. This module knows shapes and ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ..core.layout import Placement
from .match import Matcher, Patterns, template, weight_name
from .modalities import text_config
from .table import Rules, Spec

_LATENT = ("kv_lora_rank", "qk_nope_head_dim")  # heads of which are of several lengths


class Heads:
    """Examines the placements of projections that make heads, or sum them."""

    def __init__(self, rules: Rules, config: Mapping[str, Any]) -> None:
        self._length = _head_length(text_config(config))
        self._makers = Patterns(rules.heads)
        self._known: dict[tuple[Placement, tuple[int, ...]], str] = {}

    def cut(self, name: str, kind: str, shape: tuple[int, ...], placement: Placement) -> str:
        """The numbers of heads that the tensor parallel ranks cut, or nothing."""
        if not self._length or not shape or self._makers.find(name, kind) is None:
            return ""
        key = (placement, shape)
        if key not in self._known:
            self._known[key] = self._numbers(shape, placement)
        return self._known[key]

    def _numbers(self, shape: tuple[int, ...], placement: Placement) -> str:
        sizes, axes = dict(placement.axes), placement.spec[0] if placement.spec else ()
        ways = prod(sizes[a] for a in axes if a == "mp")
        heads, rest = divmod(shape[0], self._length)
        if rest or heads % ways == 0:
            return ""
        return f"{heads} heads of {self._length} over mp={ways}"


def _head_length(config: Mapping[str, Any]) -> int:
    given, hidden, heads = (
        n if type(n := config.get(key)) is int and n > 0 else 0
        for key in ("head_dim", "hidden_size", "num_attention_heads")
    )
    if any(config.get(key) for key in _LATENT):
        return 0
    return given or (hidden // heads if heads else 0)


# --- Orientation: whether stacked experts are (expert, out, in) or (expert, in, out)

Shape = tuple[int, ...]

EXPERT_COUNTS = ("num_local_experts", "n_routed_experts", "num_experts")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_INNER = ("moe_intermediate_size", "intermediate_size", "expert_ffn_hidden_size")
_ORDERS = ("(expert, out, in)", "(expert, in, out)")


class Orientations:
    """Decides between the two orders of a rule, for the tensors of ``shapes``."""

    def __init__(
        self,
        rules: Rules,
        matcher: Matcher,
        shapes: Mapping[str, Shape],
        config: Mapping[str, Any],
    ) -> None:
        self._matcher, self._shapes = matcher, shapes
        config = text_config(config)
        self._experts = _numbers(config, EXPERT_COUNTS)
        self._inner = _numbers(config, _INNER)
        self._embedding = Patterns(rules.embedding)
        self._hidden = _numbers(config, _HIDDEN)[:1]
        self._modules: dict[str, list[str]] = {}

    def choose(self, name: str, spec: Spec) -> Spec | str:
        """The spec in the order of ``name``, or what is wrong."""
        shape = tuple(self._shapes[name])
        if len(shape) != len(spec.dims):
            return spec.straight()  # which is then refused for its dims
        possible = self._possible(shape, spec)
        if len(possible) == 2:
            told = [self._possible(*other) for other in self._others(name)]
            sure = {next(iter(orders)) for orders in told if len(orders) == 1}
            possible = sure if len(sure) == 1 else possible
        if len(possible) == 1:
            return spec.turned() if possible.pop() else spec.straight()
        sizes = (
            f"{shape} with {' or '.join(map(str, self._experts)) or 'any number of'} experts, "
            f"hidden size {self._hidden[0] if self._hidden else 'unknown'}, inner size "
            f"{' or '.join(map(str, self._inner)) or 'unknown'}"
        )
        which = "neither" if not possible else "either"
        return f"{sizes} is {which} of {' and '.join(_ORDERS)}"

    def _possible(self, shape: Shape, spec: Spec) -> set[bool]:
        """The orders that the sizes allow: as the rule is written, and turned (True)."""
        if len(shape) != len(spec.dims) or (self._experts and shape[0] not in self._experts):
            return set()
        hidden = self._hidden_size()
        if hidden is None:
            return {False, True}
        at = 2 if spec.dims[1] else 1  # tensor parallel ranks share the inner size
        orders = {False: (shape[at], shape[3 - at]), True: (shape[3 - at], shape[at])}
        return {
            turned
            for turned, (outer, inner) in orders.items()
            if outer == hidden
            and (not self._inner or any(inner in (n, 2 * n) for n in self._inner))
        }

    def _hidden_size(self) -> int | None:
        """By ``config.json``, else by the embedding (tokens, hidden)."""
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
        """The other matrices of the module of ``name``, with their rules."""
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
