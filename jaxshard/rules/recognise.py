"""Recognising: which known table of rules a model takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..errors import NotFoundError, some
from .families import FAMILIES, MODEL_TYPES
from .match import Matcher, Patterns, template, weight_name
from .modalities import text_type, towers
from .table import BUFFER, ModelFacts, Rules, numbered

_ENOUGH = 0.5  # of the kinds of names; what is left over is then reported name by name


def rules_for(model: ModelFacts | None, names: Iterable[str]) -> Rules:
    """The rules of a model: by its type where its names agree with that, else by its names.

    A ``config.json`` may lie beside weights that were renamed by another framework. What is
    not the text model's (a vision tower) is ``apart``: whole, on the first stage.

    Raises:
        NotFoundError: neither the type nor the names are known.

    >>> rules_for(None, ["h.0.attn.c_attn.weight", "wte.weight"]).name
    'gpt2'
    """
    kinds = {template(w): w for w in map(weight_name, names)}
    apart = towers(kinds.values(), model.config if model else {})
    if not apart:
        return _table(model, kinds)
    known = Patterns(apart)
    text = {kind: name for kind, name in kinds.items() if known.find(name, kind) is None}
    rules = _table(model, text) if text else FAMILIES["llama"]
    return replace(rules, specs=(*((p, BUFFER) for p in apart), *rules.specs), apart=apart)


def _table(model: ModelFacts | None, kinds: dict[str, str]) -> Rules:
    """The table for the names of a text model."""
    types = _types(model)
    by_type = next((FAMILIES[MODEL_TYPES[t]] for t in types if t in MODEL_TYPES), None)
    if by_type and (not kinds or _fit(by_type, kinds)[0]):
        return by_type
    best = max(FAMILIES.values(), key=lambda rules: _fit(rules, kinds))  # the first of equals
    fits, known = _fit(best, kinds)
    if by_type and not fits and _known(by_type, kinds) >= _ENOUGH:
        return by_type
    if kinds and known >= _ENOUGH:
        return best
    if by_type:
        return by_type
    kind = types[0] if types else None
    said = f"model_type {kind!r} is" if kind else "no model_type is given, and the names are"
    raise NotFoundError(
        f"{said} not known{', nor are the names' if kind else ''} ({some(kinds.values(), 3)}). "
        'Give rules for the names, as TOML: [specs] "*.q_proj.weight" = "mp,-" … and [stages]; '
        f"known are {', '.join(FAMILIES)}."
    )


def _types(model: ModelFacts | None) -> list[str]:
    """The types that ``config.json`` gives: the model's, and that of its text part."""
    if model is None:
        return []
    return [kind for kind in dict.fromkeys((model.type, text_type(model.config))) if kind]


def knows(rules: Rules, names: Iterable[str]) -> bool:
    """Whether ``names`` are those that ``rules`` are about, rather than another framework's."""
    kinds = {template(w): w for w in map(weight_name, names)}
    return _known(rules, kinds) >= _ENOUGH


def _fit(rules: Rules, kinds: dict[str, str]) -> tuple[bool, float]:
    """Whether the rules match enough kinds of names, layers among them; and how large a part."""
    known, layer = _known(rules, kinds), numbered(rules.layers, "layer")
    numbers = [name for kind, name in kinds.items() if kind != name]
    has_layers = not numbers or (layer is not None and any(map(layer.match, numbers)))
    return known >= _ENOUGH and has_layers, known


def _known(rules: Rules, kinds: dict[str, str]) -> float:
    """How large a part of the kinds of names the rules match."""
    matcher = Matcher(rules)
    return sum(matcher.find(name, kind) is not None for kind, name in kinds.items()) / max(
        len(kinds), 1
    )
