"""Recognising: which known table of rules a model takes."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import NotFoundError, nearest, some
from .families import FAMILIES, MODEL_TYPES
from .match import Matcher, template, weight_name
from .table import ModelFacts, Rules

_ENOUGH = 0.5  # of the kinds of names; what is left over is then reported name by name


def rules_for(model: ModelFacts | None, names: Iterable[str]) -> Rules:
    """The rules of a model: by its type where its names agree with that, else by its names.

    A ``config.json`` may lie beside weights that were renamed by another framework.

    Raises:
        NotFoundError: neither the type nor the names are known.

    >>> rules_for(None, ["h.0.attn.c_attn.weight", "wte.weight"]).name
    'gpt2'
    """
    kinds = {template(w): w for w in map(weight_name, names)}
    by_type = FAMILIES.get(MODEL_TYPES.get((model and model.type) or "", ""))
    if by_type and (not kinds or _known(by_type, kinds) >= _ENOUGH):
        return by_type
    best = max(FAMILIES.values(), key=lambda rules: _known(rules, kinds))  # the first of equals
    if kinds and _known(best, kinds) >= _ENOUGH:
        return best
    if by_type:
        return by_type
    kind = model.type if model and model.type else None
    said = f"model_type {kind!r} is" if kind else "no model_type is given, and the names are"
    raise NotFoundError(
        f"{said} not known{', nor are the names' if kind else ''} ({some(kinds.values(), 3)})."
        f"{nearest(kind or '', MODEL_TYPES)} Give rules for the names, as TOML: "
        '[specs] "*.q_proj.weight" = "mp,-" … and [stages]; known are '
        f"{', '.join(FAMILIES)}."
    )


def _known(rules: Rules, kinds: dict[str, str]) -> float:
    """How large a part of the kinds of names the rules match."""
    matcher = Matcher(rules)
    return sum(matcher.find(name, kind) is not None for kind, name in kinds.items()) / max(
        len(kinds), 1
    )
