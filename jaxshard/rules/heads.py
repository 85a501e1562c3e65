"""Heads: where tensor parallel ranks would hold a part of a head.

    k_proj  (16, 64), heads of 8 rows, mp=8      2 rows each: a quarter of a head

Such files are whole, and of use to programs that gather them; ranks that compute with what
they hold need whole heads. This module knows shapes and ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ..layout import Placement
from .match import Patterns
from .modalities import text_config
from .table import Rules

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
