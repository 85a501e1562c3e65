"""Recognition of model families, their rules, and missing layers.

The rules are derived from the tables of ``jaxshard.models`` (see ``by_axes``). The family is that
of ``model_type`` if the names agree, otherwise the names alone decide.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

from ..core.layout import MeshAxes, Strategy
from ..core.patterns import Patterns, numbered, template
from ..core.runtime import cached
from ..errors import LayoutError, NotFoundError, format_list
from ..models import Family, Sizes, family_of
from ..models.facts import text_type
from ..models.reading import build, find_roots, tables
from .by_axes import rules_of
from .logical_axes import LogicalAxes
from .match import Matcher, Unmatched, base_name, towers, weight_name
from .table import BUFFER, ModelFacts, Rules, check_rules

_ENOUGH = 0.5  # of the kinds of names; the remaining names are reported one by one
#: Programs whose names need no ``model_type``.
_NAMED = ("hf", "mindformers", "mcore")
#: In models of unknown families, vectors with these names.
_NORMS = tuple((f"*norm.{end}", "-") for end in ("weight", "bias"))


def rules_for(
    model: ModelFacts | None, names: Iterable[str], logical: LogicalAxes | None = None
) -> Rules:
    """Return the rules of a model, by its type if its names agree, otherwise by its names.

    The names may be another framework's in spite of ``config.json``. Tensors outside the text
    model (a vision tower) are ``apart``: whole, on the first stage.

    Raises:
        NotFoundError: neither the type nor the names are known.

    >>> rules_for(None, ["h.0.attn.c_attn.weight", "wte.weight"]).name
    'gpt2'
    """
    kinds = {template(w): w for w in map(weight_name, names)}
    apart = towers(kinds.values(), model.config if model else {})
    if not apart:
        return _table(model, kinds, logical)
    known = Patterns(apart)
    text = {kind: name for kind, name in kinds.items() if known.find(name, kind) is None}
    rules = _table(model, text, logical) if text else Rules("towers")
    return replace(rules, specs=(*((p, BUFFER) for p in apart), *rules.specs), apart=apart)


def table_for(
    model: ModelFacts | None,
    names: Iterable[str],
    mesh: Strategy | MeshAxes,
    rules: Rules | None,
    unmatched: Unmatched,
) -> Rules:
    """Return the rules of a model preceded by ``rules``, or ``rules`` if the family is unknown.

    If ``rules`` are logical axis rules, those of the model are made from them, for ``mesh``.

    Names without a rule may be split by their shapes (``unmatched="largest"``); then neither is
    necessary.

    Raises:
        LayoutError: ``rules`` are not ``Rules``.
        NotFoundError: the family is unknown, and ``rules`` is missing.
    """
    logical = None
    if rules is not None:
        check_rules(rules)
    if rules is not None and rules.axes is not None:
        axes, given = mesh, rules.axes
        if isinstance(axes, Strategy):  # whose mp may be written tp
            given = tuple(
                (axis, tuple("mp" if a == "tp" else a for a in over)) for axis, over in given
            )
            axes = axes.mesh_axes
        logical = LogicalAxes(given, tuple(a for a, _ in axes.axes))
    try:
        table = rules_for(model, names, logical)
    except (LayoutError, NotFoundError):
        if unmatched != "largest" and (rules is None or (logical and not rules.specs)):
            raise
        return rules or Rules("by shape")
    return table.override(rules) if rules else table


def _table(model: ModelFacts | None, kinds: dict[str, str], logical: LogicalAxes | None) -> Rules:
    """Return the rules for the names of a text model."""
    by_type = _by_type(model, kinds, logical)
    if by_type and (not kinds or _fit(by_type, kinds) == (True, 1.0)):
        return by_type
    found = _by_names(kinds, logical)
    best = max(found, key=lambda rules: _fit(rules, kinds))  # the first of equals
    fits, known = _fit(best, kinds)
    if by_type and _fit(by_type, kinds)[0]:  # what it lacks may be as in other families
        is_same = best.layers == by_type.layers and known > _known(by_type, kinds)
        return _with_specs(by_type, best) if is_same else by_type
    if by_type and not fits and _known(by_type, kinds) >= _ENOUGH:
        return by_type
    if kinds and known >= _ENOUGH:
        return best
    if by_type:
        return by_type
    types = _types(model)
    unknown = f"unknown model_type {types[0]!r} and" if types else "no model_type, and unknown"
    raise NotFoundError(
        f"{unknown} tensor names ({format_list(kinds.values(), 3)}). Pass rules for the names in "
        'TOML: [specs] "*.q_proj.weight" = "mp,-" and [stages] '
        f"(known names: those of {', '.join(rules.name for rules in found)}), or a table of the "
        'family (--models), or unmatched="largest" (--unmatched largest) to split them by their '
        "shapes."
    )


def _with_specs(rules: Rules, others: Rules) -> Rules:
    return replace(rules, specs=rules.specs + others.specs, experts=rules.experts + others.experts)


def _by_type(
    model: ModelFacts | None, kinds: dict[str, str], logical: LogicalAxes | None
) -> Rules | None:
    """Return the rules of the family of ``model_type``, in the form that most names have."""
    names = [base_name(name) for name in kinds.values()]
    for kind in _types(model):
        try:
            family = family_of(model.config if model else {}, kind, names=names)
        except NotFoundError:
            continue
        form = family.form_of(names)[0]
        parts = [(family, f) for f in (form, *family.listed) if _alike(family, f, form)]
        return rules_of(parts, Sizes(family, model.config if model else {}), logical)
    return None


def _alike(family: Family, form: str, other: str) -> bool:
    """Return whether two forms are one program's, which may mix them: fused and not."""
    return _ends_of(family, form) == _ends_of(family, other)


def _ends_of(family: Family, form: str) -> str:
    """Return the names of the embedding and the last norm, by which a program is recognized."""
    rows = family.forms[form]
    return " ".join(rows[w].name if w in rows else form for w in ("embed", "norm"))


def _by_names(kinds: dict[str, str], logical: LogicalAxes | None) -> list[Rules]:
    """Return the rules of each program's names, of all families together."""
    names = [base_name(name) for name in kinds.values()]
    every = tables()
    groups: dict[str, list[tuple[str, str]]] = {}
    for ends, part in _named_forms():
        groups.setdefault(ends, []).append(part)
    found = []
    for parts in groups.values():
        parts.sort(key=lambda part: part[0] != "llama")  # the best known names the others
        words = find_roots(every[parts[0][0]], {}, names)
        found.append(_of_group(tuple(parts), tuple(words.items()), logical))
    return found


def _named_forms() -> list[tuple[str, tuple[str, str]]]:
    """Return table and form of all names that need no type, with those of their ends."""
    no_roots = {"root": "", "head": ""}
    families = {name: build(table, {}, no_roots) for name, table in tables().items()}
    return [
        (_ends_of(family, form), (name, form))
        for name, family in families.items()
        for form in family.listed
        if form.split("-")[0] in _NAMED
    ]


@cached(64)
def _of_group(
    parts: tuple[tuple[str, str], ...],
    words: tuple[tuple[str, str], ...],
    logical: LogicalAxes | None,
) -> Rules:
    every = tables()
    built = {name: build(every[name], {}, dict(words)) for name, _ in parts}
    rules = rules_of(
        [(built[name], form) for name, form in parts], logical=logical, is_ordered=False
    )
    name, form = parts[0]
    return replace(rules, name=name if form == "hf" else form, specs=(*rules.specs, *_NORMS))


def _types(model: ModelFacts | None) -> list[str]:
    """Return the types in ``config.json``: the model's, and that of its text part."""
    if model is None:
        return []
    return [kind for kind in dict.fromkeys((model.type, text_type(model.config))) if kind]


def knows(rules: Rules, names: Iterable[str]) -> bool:
    """Return whether ``rules`` match enough of ``names``, which may be another framework's."""
    kinds = {template(w): w for w in map(weight_name, names)}
    return _known(rules, kinds) >= _ENOUGH


def _fit(rules: Rules, kinds: dict[str, str]) -> tuple[bool, float]:
    """Return whether the rules match enough kinds of names including layers, and the fraction."""
    known, layer = _known(rules, kinds), numbered(rules.layers, "layer")
    numbers = [name for kind, name in kinds.items() if kind != name]
    has_layers = not numbers or (layer is not None and any(map(layer.match, numbers)))
    return known >= _ENOUGH and has_layers, known


def _known(rules: Rules, kinds: dict[str, str]) -> float:
    """Return the fraction of the kinds of names that the rules match."""
    matcher = Matcher(rules)
    return sum(matcher.find(name, kind) is not None for kind, name in kinds.items()) / max(
        len(kinds), 1
    )


# --- Completeness of a model by the names of its tensors

_MAX_LISTED = 4


def missing_layers(model: ModelFacts | None, names: Iterable[str]) -> str:
    """Describe the layers of a known family that ``names`` lack, or return ""."""
    rules, names = _rules(model, list(names))
    if rules is None:
        return ""
    seen, count = _layers(rules, names), _count(rules, model, names)
    num_gone = count - sum(number < count for number in seen)
    if not num_gone:
        return ""
    # an untrusted config.json may state any number of layers: only the first few are listed
    first = islice((str(n) for n in range(count) if n not in seen), _MAX_LISTED)
    more = f" and {num_gone - _MAX_LISTED} more" if num_gone > _MAX_LISTED else ""
    return f"layers {', '.join(first)}{more} of {count} are missing"


def _rules(model: ModelFacts | None, names: list[str]) -> tuple[Rules | None, list[str]]:
    """Return the table that matches the names, or None, and the names of the text model."""
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
    """Return the expected number of layers, 0 if no name has a number."""
    seen = _layers(rules, names)
    return max(max(seen) + 1, (model and model.num_layers) or 0) if seen else 0


def missing_parts(model: ModelFacts | None, names: Iterable[str]) -> str:
    """Describe the parts of a known family that ``names`` lack, or return "".

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
