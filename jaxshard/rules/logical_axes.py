"""Logical axis rules, as in Flax and MaxText: which mesh axes split each axis of a weight.

    rules   (("embed", "fsdp"), ("heads", ("tensor",)))     in order, each mesh axis once a tensor
    q       (heads head_dim) embed                          the axes, from the family's table
            tensor,fsdp                                     a dim is split along its first axis

The table of a family gives each dim a name, and the rules of the user give each name mesh axes.
``by_axes`` makes `Rules` of them. This module does not depend on shapes or sizes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..core.patterns import holes
from ..errors import LayoutError, format_list
from ..models import Row
from ..models.axes import Dim
from ..models.family import SHARED_AXES
from .table import AxisRule, Dims, Rules

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


@dataclass(frozen=True)
class LogicalAxes:
    """Splits the dims of each weight by logical axis rules.

    Attributes:
        rules: the rules.
        mesh_axes: the axes of the mesh; others in ``rules`` have no effect, like axes of size 1.

    Raises:
        LayoutError: a name of a mesh axis is not a word.
    """

    rules: tuple[AxisRule, ...]
    mesh_axes: tuple[str, ...]

    def __post_init__(self) -> None:
        strange = [a for a in self.mesh_axes if not _MESH_AXIS.fullmatch(a)]
        if strange:
            raise LayoutError(
                f"logical_axis_rules: mesh axis {strange[0]!r} (expected letters, digits, "
                "_ . : /). Rename it."
            )

    def split(self, weight: str, row: Row) -> Dims:
        """Return the mesh axes that split each dim of a row.

        The layer and the expert in its name have mesh axes too, which its dims then lack.
        """
        inside = [axis for axis in ("layer", "expert") if axis in holes(row.name)]
        ruled = {axis for axis, _ in self.rules}
        names = [
            axis and next((n for n in _names_of(weight, axis) if n in ruled), axis)
            for axis in (*inside, *map(first_axis, row.axes.dims))
        ]
        found = assign(names, self.rules)[len(inside) :]
        return tuple(tuple(a for a in axes if a in self.mesh_axes) for axes in found)

    def notes(self, rows: Iterable[tuple[str, Row]]) -> tuple[str, ...]:
        """Return notes on logical axes that no row has, and on mesh axes that do not exist."""
        own = {axis for _, row in rows for axis in (*holes(row.name), *row.axes.names)}
        known = {*own, _NORM, *_SYNONYMS, *_SYNONYMS.values(), *_NAMES.values()}
        known |= {axis for axis, _ in _NAMES}
        unknown = [a for a, _ in self.rules if a not in known and not a.startswith("activation_")]
        absent = [a for _, over in self.rules for a in over if a not in self.mesh_axes]
        notes = []
        if unknown:
            axes = format_list(sorted(a for a in own if not a.isdigit()), 20)
            notes.append(
                "logical_axis_rules: no weight has the axes "
                f"{format_list(dict.fromkeys(unknown))} (axes: {axes})."
            )
        if absent:
            notes.append(
                f"logical_axis_rules: the mesh has no axes {format_list(dict.fromkeys(absent))}, "
                f"so they split nothing (axes: {', '.join(self.mesh_axes)})."
            )
        return tuple(notes)


def first_axis(dim: Dim) -> str | None:
    """Return the axis that a dim is split along; of weights one after the other, the first's."""
    first = dim.factors[0]
    return first if isinstance(first, str) else next(iter(first.terms[0].axes), None)


def _names_of(weight: str, axis: str) -> Iterator[str]:
    weight = weight.rpartition("/")[2].removesuffix(".bias")
    if weight.endswith(_NORM) and axis not in SHARED_AXES:
        yield _NORM
    if (axis, weight) in _NAMES:
        yield _NAMES[axis, weight]
    yield axis
    if axis in _SYNONYMS:
        yield _SYNONYMS[axis]
