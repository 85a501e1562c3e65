"""Rule tables: axes for each dim of a tensor, and its pipeline stage.

    "*.q_proj.weight" = "mp,-"      rows over the tensor-parallel ranks, columns whole
    "*.o_proj.weight" = "-,mp"      columns over them
    "*norm.weight"    = "-"         whole, however many dims

The first pattern that matches a name decides. Users write rules in TOML:

    name = "my model"

    [specs]                                  # the first pattern that matches a name decides
    "*.q_proj.weight" = "mp,-"               # per dim: axes joined by +, outer to inner; - is whole
    "lm_head.weight" = "-,-"

    [axes]                                   # or by the axes of the family's table
    embed = "fsdp"

    [stages]
    layers = "model.layers.{layer}."         # prefixes of names that belong to a layer
    first = ["model.embed_tokens.*"]
    last = ["model.norm.*", "lm_head.*"]
    layers_per_stage = [7, 9]

    [experts]
    names = "*.experts.{expert}."

This module opens no file and does not depend on models, sizes or ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from ..core.decoders import parse_toml
from ..core.runtime import cached
from ..errors import LayoutError, did_you_mean

Dims = tuple[tuple[str, ...], ...]  # per dim the axes of the rule; () for any ndim
AxisRule = tuple[str, tuple[str, ...]]  # a logical axis, and the mesh axes that split it

#: The axes of rules and their meaning.
AXES = {
    "mp": "tensor parallel ranks",
    "dp": "data parallel ranks (expert parallel and fully sharded ones included)",
    "fsdp": "fully sharded data parallel ranks; where it does not divide, another dim is split",
    "ep": "expert parallel ranks",
    "edp": "replicas of one expert",
    "cp": "context parallel ranks",
    "pp": "pipeline stages, where tensors have the layers as a dim; other tensors are in one stage",
    "vocab": "mp, or nothing when the strategy keeps the embedding whole (vocab_emb_dp)",
}
_ALSO = {"tp": "mp"}

#: The spec of a buffer: whole on every rank, for any optimizer shard.
BUFFER = "whole"
#: Separates the specs for both orders of inputs and outputs; the sizes select one.
EITHER = " or "


class ModelFacts(Protocol):
    """The facts of a model that rules need; ``jaxshard.core.catalog.Model`` implements it."""

    @property
    def type(self) -> str | None: ...
    @property
    def num_layers(self) -> int | None: ...
    @property
    def tied_embeddings(self) -> bool: ...
    @property
    def config(self) -> Mapping[str, Any]: ...


class Spec(NamedTuple):
    """A parsed spec text. ``dims`` is empty for ``-``, which fits any number of dims.

    ``other`` has the dims for the second order of a tensor whose inputs and outputs may be in
    either order; ``by_shape`` leaves the choice of a dim to the shape.
    """

    dims: Dims = ()
    buffer: bool = False
    other: Dims = ()
    by_shape: bool = False

    def straight(self) -> Spec:
        """Return the spec of the first order."""
        return self._replace(other=())

    def turned(self) -> Spec:
        """Return the spec of the second order."""
        return self._replace(dims=self.other, other=())

    def __str__(self) -> str:
        if self.buffer:
            return BUFFER
        return EITHER.join(
            ",".join("+".join(axes) or "-" for axes in dims) or "-"
            for dims in (self.dims, self.other)[: 2 if self.other else 1]
        )


class Unit(NamedTuple):
    """Elements along a dim that ranks need whole to compute: a head, a pair of gate and up.

    Attributes:
        pattern: the names of the tensors.
        dim: the dim.
        axis: what the units are (``kv_heads``).
        length: elements in one.
    """

    pattern: str
    dim: int
    axis: str
    length: int


@dataclass(frozen=True)
class Rules:
    """How the tensors of a model are sharded, by their names.

    In patterns ``*`` matches any characters including dots; nothing else is special.

    Attributes:
        name: the name of these rules in messages.
        specs: (pattern, spec text) in order; the first match decides.
        layers: patterns of name prefixes with a layer number at ``{layer}``.
        first: patterns of the names of the first pipeline stage.
        last: patterns of the names of the last one.
        layers_per_stage: the number of layers of each stage; as even as possible when None.
        experts: patterns of name prefixes with an expert number at ``{expert}``.
        embedding: patterns of tensors that are also on the last stage if embeddings are tied and
            no name matches ``head``.
        head: patterns of a head that is stored.
        apart: patterns of the towers of other modalities, which are on the first stage; layer
            and stage patterns are not applied to them.
        written: the patterns of the user; one that matches nothing is likely a mistake.
        axes: logical axis rules, from which the specs of a known family are made; None for its own.
        mesh_axes: axes that specs may have besides ``AXES``.
        notes: findings that are not errors.
        units: what ranks need whole along the dims that the specs split.
        is_ordered: where sizes do not decide between the orders of a spec, the first is right.
    """

    name: str
    specs: tuple[tuple[str, str], ...] = ()
    layers: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    layers_per_stage: tuple[int, ...] | None = None
    experts: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    axes: tuple[AxisRule, ...] | None = None
    mesh_axes: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    units: tuple[Unit, ...] = ()
    is_ordered: bool = False

    def __post_init__(self) -> None:
        for pattern, text in self.specs:
            parse_spec(text, f'rules {self.name}: "{pattern}"', self.mesh_axes)
        for field, patterns in (("layer", self.layers), ("expert", self.experts)):
            for pattern in patterns:
                if pattern.count(f"{{{field}}}") != 1:
                    raise LayoutError(
                        f'rules {self.name}: {field}s = "{pattern}" does not mark the number. '
                        f'Write {{{field}}} once in its place: "model.{field}s.{{{field}}}."'
                    )

    def override(self, user: Rules) -> Rules:
        """Return these rules preceded by those of ``user``.

        >>> base = Rules("base", specs=(("*", "-"),))
        >>> base.override(Rules("mine", specs=(("a", "mp,-"),))).specs
        (('a', 'mp,-'), ('*', '-'))
        """
        check_rules(user)
        return Rules(
            name=f"{user.name} + {self.name}",
            specs=user.specs + self.specs,
            layers=user.layers + self.layers,
            first=user.first + self.first,
            last=user.last + self.last,
            layers_per_stage=user.layers_per_stage or self.layers_per_stage,
            experts=user.experts + self.experts,
            embedding=user.embedding + self.embedding,
            head=user.head + self.head,
            written=user.written + self.written,
            apart=user.apart + self.apart,
            axes=self.axes if user.axes is None else user.axes,
            mesh_axes=user.mesh_axes | self.mesh_axes,
            notes=user.notes + self.notes,
            units=self.units,
            is_ordered=self.is_ordered,
        )

    @property
    def has_stacked_layers(self) -> bool:
        """Whether layers are a dim of tensors, and not in their names."""
        stacked = self.axes is not None or any(
            "pp" in split for s in self.parsed for split in s.dims
        )
        return stacked and not self.layers

    @cached_property
    def parsed(self) -> tuple[Spec, ...]:
        """The specs, parsed, in the order of ``specs``."""
        return tuple(parse_spec(text, self.name, self.mesh_axes) for _, text in self.specs)


@cached(1024)
def parse_spec(text: str, where: str, axes: frozenset[str] = frozenset()) -> Spec:
    """Parse a spec; ``where`` is the prefix of messages, ``axes`` are valid besides ``AXES``.

    Raises:
        LayoutError: an unknown or repeated axis.

    >>> parse_spec("ep+dp,-", "here").dims
    (('ep', 'dp'), ())
    """
    if text.strip() == BUFFER:
        return Spec(buffer=True)
    if EITHER in text:
        straight, turned = (parse_spec(t, where, axes).dims for t in text.split(EITHER, 1))
        if len(straight) != 3 or turned != (straight[0], straight[2], straight[1]):
            raise LayoutError(
                f'{where} = "{text}": the specs on both sides of "or" must have three dims, with '
                "the last two exchanged."
            )
        return Spec(straight, other=turned)
    dims = tuple(_axes(part.strip(), text, where, axes) for part in text.split(","))
    named = [axis for axes in dims for axis in axes]
    for axis in named:
        if named.count(axis) > 1:
            raise LayoutError(
                f'{where} = "{text}" names the axis {axis} twice. Use it for one dim only: a '
                "rank has "
                "one coordinate on each axis."
            )
    return Spec() if dims == ((),) else Spec(dims)


def _axes(part: str, text: str, where: str, more: frozenset[str]) -> tuple[str, ...]:
    if part == "-":
        return ()
    written = (axis.strip() for axis in part.split("+"))
    axes = tuple(a if a in more else _ALSO.get(a, a) for a in written)
    for axis in axes:
        if axis not in AXES and axis not in more:
            raise LayoutError(
                f'{where} = "{text}": unknown axis {axis!r}.{did_you_mean(axis, AXES)} Write for '
                "each "
                f"dim, with commas between, - for whole or axes joined by + ({', '.join(AXES)})."
            )
    return axes


def describe(rules: Rules) -> str:
    r"""Return the rules as a text table.

    >>> print(describe(Rules("mine", specs=(("*.q_proj.weight", "mp,-"), ("*", "-")))))
    rules mine, first match wins
      *.q_proj.weight  mp,-
      *                -
    """
    width = max((len(p) for p, _ in rules.specs), default=0)
    lines = [f"rules {rules.name}, first match wins"]
    lines += [f"  {pattern:<{width}}  {text}" for pattern, text in rules.specs]
    settings = {
        "layers": rules.layers,
        "first stage": rules.first,
        "last stage": rules.last,
        "layers per stage": tuple(map(str, rules.layers_per_stage or ())),
        "experts": rules.experts,
        "tied embedding": rules.embedding,
        "head": rules.head,
        "apart, on the first stage": rules.apart,
    }
    lines += [f"{name}: {', '.join(values)}" for name, values in settings.items() if values]
    return "\n".join(lines)


def check_rules(rules: object) -> None:
    """Refuse a value that is not ``Rules``, such as the path of a file.

    Raises:
        LayoutError: not ``Rules``.
    """
    if not isinstance(rules, Rules):
        raise LayoutError(
            f"rules: {rules!r} is a {type(rules).__name__}, expected Rules. Parse the text of a "
            "TOML "
            "file with jaxshard.read_rules(text)."
        )


# --- User rules as TOML

_TABLES = {
    "specs": None,
    "axes": None,
    "stages": ("layers", "first", "last", "layers_per_stage", "embedding", "head"),
    "experts": ("names",),
}


def read_rules(text: str, where: str = "rules") -> Rules:
    r"""Parse rules in TOML; ``where`` (a path) is the prefix of messages.

    Raises:
        LayoutError: not TOML, or an invalid rule; with its line.

    >>> read_rules('[specs]\n"*.weight" = "mp,-"').specs
    (('*.weight', 'mp,-'),)
    """
    data = parse_toml(text, where, "Put patterns and specs in quotes.")
    reader = _TomlReader(text, where)
    reader.check_keys("", data, ("name", *_TABLES))
    tables = {table: reader.table(data, table) for table in _TABLES}
    for table, keys in _TABLES.items():
        if keys:
            reader.check_keys(table, tables[table], keys)
    stages = tables["stages"]
    return Rules(
        name=reader.string("name", data.get("name", where)),
        specs=tuple(reader.spec(p, s) for p, s in tables["specs"].items()),
        layers=reader.numbered("layers", stages.get("layers", []), "layer"),
        first=reader.strings("first", stages.get("first", [])),
        last=reader.strings("last", stages.get("last", [])),
        layers_per_stage=reader.counts("layers_per_stage", stages.get("layers_per_stage")),
        experts=reader.numbered("names", tables["experts"].get("names", []), "expert"),
        embedding=reader.strings("embedding", stages.get("embedding", [])),
        head=reader.strings("head", stages.get("head", [])),
        written=tuple(tables["specs"]),
        axes=tuple(reader.axis_rule(axis, over) for axis, over in tables["axes"].items())
        if "axes" in data
        else None,
    )


class _TomlReader:
    """Validates values, with the line of a key in errors."""

    def __init__(self, text: str, where: str) -> None:
        self._lines, self._where = text.splitlines(), where

    def at(self, key: str) -> str:
        quoted = re.compile(rf"""^\s*\[?\s*["']?{re.escape(key)}["']?\s*[\]=.]""")
        for number, line in enumerate(self._lines, start=1):
            if quoted.match(line):
                return f"{self._where}, line {number}"
        return self._where

    def check_keys(self, table: str, data: dict[str, Any], known: tuple[str, ...]) -> None:
        for key in data:
            if key not in known:
                inside = f"[{table}]" if table else "rules"
                hint = did_you_mean(key, known) or f" Known keys: {', '.join(known)}."
                if not table:
                    hint += ' Put rules under [specs]: "PATTERN" = "mp,-".'
                raise LayoutError(f"{self.at(key)}: unknown key {key!r} in {inside}.{hint}")

    def table(self, data: dict[str, Any], name: str) -> dict[str, Any]:
        value = data.get(name, {})
        if not isinstance(value, dict):
            raise LayoutError(
                f"{self.at(name)}: {name} must be a table. Write [{name}] on its own line."
            )
        return value

    def string(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            raise LayoutError(f"{self.at(key)}: {key} = {value!r} must be a text in quotes.")
        return value

    def strings(self, key: str, value: object) -> tuple[str, ...]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise LayoutError(
                f'{self.at(key)}: {key} = {value!r} must be a pattern, or a list: ["model.norm.*"].'
            )
        return tuple(values)

    def numbered(self, key: str, value: object, field: str) -> tuple[str, ...]:
        patterns = self.strings(key, value)
        for pattern in patterns:
            if pattern.count(f"{{{field}}}") != 1:
                raise LayoutError(
                    f'{self.at(key)}: {key} = "{pattern}" does not mark the number. '
                    f'Write {{{field}}} once in its place: "model.{field}s.{{{field}}}.".'
                )
        return patterns

    def counts(self, key: str, value: object) -> tuple[int, ...] | None:
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
        ):
            raise LayoutError(
                f"{self.at(key)}: {key} = {value!r} must list the layers of each stage: [7, 9]."
            )
        return tuple(value)

    def axis_rule(self, axis: str, over: object) -> AxisRule:
        named = self.string(axis, over)
        return axis, () if named == "-" else tuple(a.strip() for a in named.split("+"))

    def spec(self, pattern: str, text: object) -> tuple[str, str]:
        if isinstance(text, dict):
            raise LayoutError(
                f"{self.at(pattern)}: {pattern} is parsed as a table. Put the pattern in quotes: "
                f'"{pattern}.…" = "mp,-".'
            )
        spec = self.string(pattern, text)
        parse_spec(spec, f'{self.at(pattern)}: "{pattern}"')
        return pattern, spec
