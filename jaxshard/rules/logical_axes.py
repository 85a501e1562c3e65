"""Logical axis rules, as in Flax and MaxText: which mesh axes split each axis of a weight.

    rules   (("embed", "fsdp"), ("heads", ("tensor",)))     in order, each mesh axis once a tensor
    q       (heads head_dim) embed                          the axes, from the family's table
            tensor,fsdp                                     a dim is split along its first axis

The table of a family gives each dim a name, and the rules of the user give each name mesh axes. The
result is `Rules` for the mesh's own axes. Shapes and sizes are checked later, by ``placement``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from ..core.patterns import holes, template
from ..errors import LayoutError, NotFoundError, format_list
from ..models import Family, Row, family_of, model_types
from ..models.axes import Dim
from ..models.family import SHARED_AXES
from .match import weight_name
from .table import BUFFER, AxisRule, ModelFacts, Rules

#: As Flax types them: (logical axis, mesh axis, or several from the outside in, or None).
LogicalAxisRules = Sequence[tuple[str, str | Sequence[str] | None]]

#: MaxText's names of an axis in some weights; each precedes the axis' own name.
_IN_WEIGHTS = """
embed             embed head mtp.embed mtp.head  embed_vocab
embed             q k v o q_a kv_a               embed_attn
embed             e.gate e.up e.down             embed_moe
embed             router                         embed_router
heads             q q_b                          q_heads
head_dim          q o                            kv
head_dim          k v                            kv_head_dim
qk_dim            q q_b                          kv
q_rank            q_a                            q_lora_up_proj
q_rank            q_b                            q_lora
kv_rank_and_rope  kv_a                           kv_lora_up_proj
kv_rank           kv_b                           kv_lora
moe_mlp           e.gate e.up e.down             mlp_moe
"""
#: Other names of an axis, after its own.
_SYNONYMS = {
    "token": "vocab",
    "expert": "exp",
    "layer": "layers",
    "moe_mlp": "mlp",
    "shared_mlp": "mlp",
}
_NORM = "norm"  # MaxText's name of all axes of a norm
_NAMES = {
    (axis, weight): name
    for axis, *weights, name in map(str.split, _IN_WEIGHTS.strip().splitlines())
    for weight in weights
}
_MESH_AXIS = re.compile(r"[\w.:/]+")


def read_axis_rules(given: LogicalAxisRules, where: str) -> tuple[AxisRule, ...]:
    """Check logical axis rules; ``where`` is the prefix of messages.

    Raises:
        LayoutError: not pairs of names.

    >>> read_axis_rules([("embed", "fsdp"), ("heads", ["tp", "x"]), ("mlp", None)], "rules")
    (('embed', ('fsdp',)), ('heads', ('tp', 'x')), ('mlp', ()))
    """
    made = []
    for pair in given:
        axis, over = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, None)
        axes = tuple(over) if isinstance(over, tuple | list) else () if over is None else (over,)
        if not isinstance(axis, str) or not all(isinstance(a, str) for a in axes):
            raise LayoutError(
                f"{where}: {pair!r} is not a rule. Write (logical axis, mesh axis, several or "
                'None): ("embed", "fsdp"), ("heads", ("tensor", "sequence")), ("norm", None).'
            )
        made.append((axis, axes))
    return tuple(made)


def with_axis_rules(rules: Rules | None, given: LogicalAxisRules | None) -> Rules | None:
    """Return ``rules`` with the logical axis rules that the caller gave.

    Raises:
        LayoutError: not pairs of names, or ``rules`` are not ``Rules``.
    """
    if given is None:
        return rules
    made = Rules("logical_axis_rules", axes=read_axis_rules(given, "logical_axis_rules"))
    return rules.override(made) if rules else made


def axes_of(rules: Iterable[AxisRule], axis: str, mesh_axes: Collection[str]) -> tuple[str, ...]:
    """Return the mesh axes of the first rule for ``axis``, less those that the mesh lacks."""
    found = (over for name, over in rules if name in _names_of("", axis))
    return tuple(a for a in next(found, ()) if a in mesh_axes)


def assign(names: Sequence[str | None], rules: Iterable[AxisRule]) -> tuple[tuple[str, ...], ...]:
    """Return the mesh axes of each dim with the logical axes ``names``, as Flax assigns them.

    The first rule for a name whose mesh axes are all free decides; a rule for None leaves
    the dim whole.

    >>> assign(("heads", "embed"), [("embed", ("x",)), ("heads", ("x", "y")), ("heads", ("y",))])
    (('y',), ('x',))
    """
    found: list[tuple[str, ...] | None] = [None] * len(names)
    for name, over in rules:
        if name not in names:
            continue
        at = names.index(name)
        used = {axis for axes in found for axis in axes or ()}
        if found[at] is None and used.isdisjoint(over):
            found[at] = over
    return tuple(axes or () for axes in found)


def by_logical_axes(
    model: ModelFacts | None,
    names: Iterable[str],
    rules: tuple[AxisRule, ...],
    mesh_axes: Collection[str],
    base: Rules | None,
) -> Rules:
    """Return rules for a mesh: the specs of each weight of the family by ``rules``.

    Args:
        model: the model, which gives the family; else the names do.
        names: the names of the tensors.
        rules: the logical axis rules.
        mesh_axes: the axes of the mesh; others in ``rules`` have no effect, like axes of size 1.
        base: rules of the same names by family, for stages, experts and buffers.

    Raises:
        LayoutError: a name of a mesh axis is not a word.
        NotFoundError: no table has the names.
    """
    strange = [a for a in mesh_axes if not _MESH_AXIS.fullmatch(a)]
    if strange:
        raise LayoutError(
            f"logical_axis_rules: mesh axis {strange[0]!r} (expected letters, digits, _ . : /). "
            "Rename it."
        )
    family, form = _family(model, names)
    rows = family.form(form)
    ruled = {axis for axis, _ in rules}
    specs = dict.fromkeys(
        (_glob(row.name), _text(weight, row, rules, ruled, mesh_axes))
        for weight, row in rows.items()
    )
    base = base or Rules("")
    whole = tuple((p, text) for p, text in base.specs if text == BUFFER)
    buffers = tuple((_glob(p), BUFFER) for p in family.buffers)
    has_layers = any("layer" in holes(row.name) for row in rows.values())
    return replace(
        base,
        name=f"{family.name} ({form}) by logical axes",
        specs=(*whole, *specs, *buffers),
        layers=base.layers if has_layers else (),
        axes=rules,
        mesh_axes=frozenset(mesh_axes),
        notes=tuple(_notes(rows, rules, mesh_axes)),
    )


def _family(model: ModelFacts | None, names: Iterable[str]) -> tuple[Family, str]:
    """Return the family and form of ``names``: by the model's type, or whose names fit best."""
    kinds = list({template(w): w for w in map(weight_name, names)}.values())
    config = model.config if model else {}
    found: list[Family] = []
    with suppress(NotFoundError):
        found.append(family_of(config, names=kinds))
    if not found or found[0].form_of(kinds)[1]:
        found += [family_of(config, kind, names=kinds) for kind in model_types()]
    family = min(found, key=lambda f: len(f.form_of(kinds)[1]))  # the first of equals
    form, left = family.form_of(kinds)
    if kinds and len(left) > len(kinds) // 2:
        raise NotFoundError(
            f"logical_axis_rules: no table has the axes of {format_list(left, 3)}. Pass the table "
            "of the family to jaxshard.register_models, or rules= with a spec for each name."
        )
    return family, form


def _text(
    weight: str,
    row: Row,
    rules: tuple[AxisRule, ...],
    ruled: Collection[str],
    mesh_axes: Collection[str],
) -> str:
    """Return the spec of a row. Its layer and expert have mesh axes too if its name has them."""
    inside = [axis for axis in ("layer", "expert") if axis in holes(row.name)]
    firsts = [*inside, *map(first_axis, row.axes.dims)]
    names = [axis and _named(weight, axis, ruled) for axis in firsts]
    split = assign(names, rules)[len(inside) :]
    parts = ["+".join(a for a in axes if a in mesh_axes) or "-" for axes in split]
    return ",".join(parts) if set(parts) != {"-"} else "-"


def first_axis(dim: Dim) -> str | None:
    """Return the axis that a dim is split along; of weights one after the other, the first's."""
    first = dim.factors[0]
    return first if isinstance(first, str) else next(iter(first.terms[0].axes), None)


def _named(weight: str, axis: str, ruled: Collection[str]) -> str:
    """Return the name of ``axis`` of ``weight`` that the rules have; its own if they have none."""
    return next((name for name in _names_of(weight, axis) if name in ruled), axis)


def _names_of(weight: str, axis: str) -> Iterator[str]:
    weight = weight.rpartition("/")[2].removesuffix(".bias")
    if weight.endswith(_NORM) and axis not in SHARED_AXES:
        yield _NORM
    if (axis, weight) in _NAMES:
        yield _NAMES[axis, weight]
    yield axis
    if axis in _SYNONYMS:
        yield _SYNONYMS[axis]


def _notes(
    rows: Mapping[str, Row], rules: tuple[AxisRule, ...], mesh_axes: Collection[str]
) -> Iterator[str]:
    """Yield notes on logical axes and mesh axes that do not exist."""
    own = {axis for row in rows.values() for axis in (*holes(row.name), *row.axes.names)}
    known = {*own, *_SYNONYMS, *_SYNONYMS.values(), *_NAMES.values(), *(a for a, _ in _NAMES)}
    unknown = [a for a, _ in rules if a not in known | {_NORM} and not a.startswith("activation_")]
    if unknown:
        yield (
            f"logical_axis_rules: no weight has the axes {format_list(dict.fromkeys(unknown))} "
            f"(axes: {', '.join(sorted(a for a in own if not a.isdigit()))})."
        )
    absent = dict.fromkeys(a for _, over in rules for a in over if a not in mesh_axes)
    if absent:
        yield (
            f"logical_axis_rules: the mesh has no axes {format_list(absent)}, so they split "
            f"nothing (axes: {', '.join(mesh_axes)})."
        )


def _glob(pattern: str) -> str:
    return re.sub(r"\{\w+\*?\}", "*", pattern)
