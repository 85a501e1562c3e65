"""Wholeness: whether the names of a model's weights are those of all of it.

    embedding   layers 0 … 15   norm, head
                └─ stage 0 ─┘└─ stage 1 ─┘

A pipeline stage alone lacks layers at one end, with what lies beyond them.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import LayoutError, NotFoundError, some
from .match import Patterns, template
from .recognise import rules_for
from .table import ModelFacts, numbered


def missing_parts(model: ModelFacts | None, names: Iterable[str]) -> str:
    """What of a model of a known family is not among ``names``; empty where nothing is missed.

    >>> missing_parts(None, [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2)])
    'layers 1 of 3 are missing'
    """
    names = list(names)
    try:
        rules = rules_for(model, names)
    except (LayoutError, NotFoundError):
        return ""
    layer = numbered(rules.layers, "layer")
    found = [layer.match(name) for name in names] if layer else []
    seen = {int(match[match.lastindex or 0]) for match in found if match}
    if not seen:
        return ""
    count = max(seen) + 1
    if model and model.num_layers:
        count = max(count, model.num_layers)
    gone = [str(number) for number in range(count) if number not in seen]
    if gone:
        return f"layers {some(gone, 4)} of {count} are missing"
    kinds = {template(name): name for name in names}
    has_first, has_last = (
        any(Patterns(patterns).find(name, kind) is not None for kind, name in kinds.items())
        for patterns in (rules.first, rules.last)
    )
    if rules.first and rules.last and has_first != has_last:
        side = "after the last layer" if has_first else "before the first layer"
        looked = rules.last if has_first else rules.first
        return f"it has layers 0 to {count - 1} and nothing {side} ({', '.join(looked)})"
    return ""
