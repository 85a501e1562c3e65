"""Completeness of a model by the names of its tensors.

    embedding   layers 0 … 15   norm, head
                └─ stage 0 ─┘└─ stage 1 ─┘

A pipeline stage alone lacks layers at one end, with what lies beyond them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from ..errors import LayoutError, NotFoundError
from .families import knows, rules_for
from .match import Patterns, template
from .table import ModelFacts, Rules, numbered

_MOST_LISTED = 4


def missing_layers(model: ModelFacts | None, names: Iterable[str]) -> str:
    """Which layers of a model of a known family are not among ``names``; empty where none is."""
    rules, names = _rules(model, list(names))
    if rules is None:
        return ""
    seen, count = _layers(rules, names), _count(rules, model, names)
    num_gone = count - sum(number < count for number in seen)
    if not num_gone:
        return ""
    # an untrusted config.json may state any number of layers: only the first few are listed
    first = islice((str(n) for n in range(count) if n not in seen), _MOST_LISTED)
    more = f" and {num_gone - _MOST_LISTED} more" if num_gone > _MOST_LISTED else ""
    return f"layers {', '.join(first)}{more} of {count} are missing"


def _rules(model: ModelFacts | None, names: list[str]) -> tuple[Rules | None, list[str]]:
    """The table that knows the names, if one does, and those that are the text model's."""
    try:
        rules = rules_for(model, names)
    except (LayoutError, NotFoundError):
        return None, names
    apart = Patterns(rules.apart)
    text = [name for name in names if apart.find(name, template(name)) is None]
    return (rules if knows(rules, text) else None), text


def _layers(rules: Rules, names: list[str]) -> set[int]:
    layer = numbered(rules.layers, "layer")
    found = [layer.match(name) for name in names] if layer else []
    return {int(match[match.lastindex or 0]) for match in found if match}


def _count(rules: Rules, model: ModelFacts | None, names: list[str]) -> int:
    """How many layers there should be; none where no name has a number."""
    seen = _layers(rules, names)
    return max(max(seen) + 1, (model and model.num_layers) or 0) if seen else 0


def missing_parts(model: ModelFacts | None, names: Iterable[str]) -> str:
    """What of a model of a known family is not among ``names``; empty where nothing is missed.

    >>> missing_parts(None, [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2)])
    'layers 1 of 3 are missing'
    """
    rules, names = _rules(model, list(names))
    count = _count(rules, model, names) if rules else 0
    if rules is None or not count:
        return ""
    if gone := missing_layers(model, names):
        return gone
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
