"""Rule tables: axes for each dim of a tensor, and its pipeline stage.

    "*.q_proj.weight" = "mp,-"      rows over the tensor-parallel ranks, columns whole
    "*.o_proj.weight" = "-,mp"      columns over them
    "*norm.weight"    = "-"         whole, however many dims

The first pattern that matches a name decides. This module knows what rules are and
how they read; it knows no model, no sizes and no ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

from ..errors import LayoutError, did_you_mean

Dims = tuple[tuple[str, ...], ...]  # per dim the axes as the rule names them; () for any ndim

#: What a rule may call an axis, and what it stands for.
AXES = {
    "mp": "tensor parallel ranks",
    "dp": "data parallel ranks (expert parallel ones included)",
    "ep": "expert parallel ranks",
    "edp": "replicas of one expert",
    "cp": "context parallel ranks",
    "vocab": "mp, or nothing when the strategy keeps the embedding whole (vocab_emb_dp)",
}
_ALSO = {"tp": "mp"}

#: The spec of a table that is no weight: whole on every rank, whatever the optimizer shard.
BUFFER = "whole"
#: Between the specs of both orders of inputs and outputs, of which the sizes choose.
EITHER = " or "


class ModelFacts(Protocol):
    """What rules ask of a model; ``jaxshard.core.catalog.Model`` has it."""

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

    ``other`` has the dims of a tensor whose inputs and outputs may be in either order, when
    they are in the second.
    """

    dims: Dims = ()
    buffer: bool = False
    other: Dims = ()

    def straight(self) -> Spec:
        """The spec of the first order alone."""
        return self._replace(other=())

    def turned(self) -> Spec:
        """The spec of the second order alone."""
        return self._replace(dims=self.other, other=())

    def __str__(self) -> str:
        if self.buffer:
            return BUFFER
        return EITHER.join(
            ",".join("+".join(axes) or "-" for axes in dims) or "-"
            for dims in (self.dims, self.other)
            if dims or dims is self.dims
        )


@dataclass(frozen=True)
class Rules:
    """How the tensors of a model are cut, by their names.

    In patterns ``*`` stands for any characters, dots included, and nothing else is special.

    Attributes:
        name: what to call these rules in messages.
        specs: (pattern, spec text) in order; the first match decides.
        layers: patterns of names that have a layer number, which is at ``{layer}``.
        first: patterns of the names of the first pipeline stage.
        last: patterns of the names of the last one.
        layers_per_stage: how many layers each stage has; as even as possible when None.
        experts: patterns of names that have an expert number, which is at ``{expert}``.
        embedding: names that also live in the last stage when the embeddings are tied …
        head: … and none of these exists.
        heads: names whose dim 0 is heads, which ranks that compute need whole.
        apart: patterns of the names of another modality's tower, which no layer or stage
            pattern is asked for: it is on the first stage.
        written: the patterns a person wrote: one that decides nothing is likely a slip.
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
    heads: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern, text in self.specs:
            parse_spec(text, f'rules {self.name}: "{pattern}"')
        for field, patterns in (("layer", self.layers), ("expert", self.experts)):
            for pattern in patterns:
                if pattern.count(f"{{{field}}}") != 1:
                    raise LayoutError(
                        f'rules {self.name}: {field}s = "{pattern}" does not say where the number '
                        f'is. Write {{{field}}} once in its place: "model.{field}s.{{{field}}}."'
                    )

    def override(self, user: Rules) -> Rules:
        """These rules with those of ``user`` asked first.

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
            heads=user.heads + self.heads,
            apart=user.apart + self.apart,
        )

    @cached_property
    def parsed(self) -> tuple[Spec, ...]:
        """The specs, parsed, in the order of ``specs``."""
        return tuple(parse_spec(text, self.name) for _, text in self.specs)


@lru_cache(maxsize=1024)
def parse_spec(text: str, where: str) -> Spec:
    """What a spec text says.

    Raises:
        LayoutError: it names an axis that there is not, or one twice; ``where`` leads the message.

    >>> parse_spec("ep+dp,-", "here").dims
    (('ep', 'dp'), ())
    """
    if text.strip() == BUFFER:
        return Spec(buffer=True)
    if EITHER in text:
        straight, turned = (parse_spec(t, where).dims for t in text.split(EITHER, 1))
        if len(straight) != 3 or turned != (straight[0], straight[2], straight[1]):
            raise LayoutError(
                f'{where} = "{text}": the specs on both sides of "or" are for three dims, of '
                "which the last two are exchanged."
            )
        return Spec(straight, other=turned)
    dims = tuple(_axes(part.strip(), text, where) for part in text.split(","))
    named = [axis for axes in dims for axis in axes]
    for axis in named:
        if named.count(axis) > 1:
            raise LayoutError(
                f'{where} = "{text}" names the axis {axis} twice. '
                "A rank has one coordinate on each axis, so each splits one dim."
            )
    return Spec() if dims == ((),) else Spec(dims)


def _axes(part: str, text: str, where: str) -> tuple[str, ...]:
    if part == "-":
        return ()
    axes = tuple(_ALSO.get(a.strip(), a.strip()) for a in part.split("+"))
    for axis in axes:
        if axis not in AXES:
            raise LayoutError(
                f'{where} = "{text}": unknown axis {axis!r}.{did_you_mean(axis, AXES)} '
                "Write for each dim, with commas between, - for whole or axes joined by + "
                f"({', '.join(AXES)})."
            )
    return axes


class Glob:
    """A pattern where ``*`` is any characters; linear in the name, which a stranger chose.

    >>> Glob("*.experts.*.weight").matches("layers.0.experts.7.w1.weight")
    True
    """

    __slots__ = ("_parts",)

    def __init__(self, pattern: str) -> None:
        self._parts = pattern.split("*")

    def matches(self, name: str) -> bool:
        """Whether all of ``name`` fits."""
        head, *middle = self._parts
        if not middle:
            return name == head
        tail = middle.pop()
        at, end = len(head), len(name) - len(tail)
        if end < at or not (name.startswith(head) and name.endswith(tail)):
            return False
        for part in middle:  # the leftmost place is as good as any
            at = name.find(part, at, end)
            if at < 0:
                return False
            at += len(part)
        return True


def numbered(patterns: Iterable[str], field: str) -> re.Pattern[str] | None:
    """One expression for the beginning of a name, whose only matching group is the number.

    >>> numbered(["*layers.{layer}."], "layer").match("model.layers.12.mlp").groups()
    ('12',)
    """
    parts = []
    for pattern in patterns:
        before, after = pattern.split(f"{{{field}}}")
        parts.append(_lazy(before) + r"(\d{1,9})" + _lazy(after))
    return re.compile("|".join(parts)) if parts else None


def _lazy(pattern: str) -> str:
    return ".*?".join(map(re.escape, pattern.split("*")))


def describe(rules: Rules) -> str:
    r"""The rules as a table a person reads.

    >>> print(describe(Rules("mine", specs=(("*.q_proj.weight", "mp,-"), ("*", "-")))))
    rules mine, first match wins
      *.q_proj.weight  mp,-
      *                -
    """
    width = max((len(p) for p, _ in rules.specs), default=0)
    lines = [f"rules {rules.name}, first match wins"]
    lines += [f"  {pattern:<{width}}  {text}" for pattern, text in rules.specs]
    said = {
        "layers": rules.layers,
        "first stage": rules.first,
        "last stage": rules.last,
        "layers per stage": tuple(map(str, rules.layers_per_stage or ())),
        "experts": rules.experts,
        "tied embedding": rules.embedding,
        "head": rules.head,
        "apart, on the first stage": rules.apart,
    }
    lines += [f"{name}: {', '.join(values)}" for name, values in said.items() if values]
    return "\n".join(lines)


def check_rules(rules: object) -> None:
    """Refuse what is no ``Rules``: the path of a file of them, say.

    Raises:
        LayoutError: with what makes it some.
    """
    if not isinstance(rules, Rules):
        raise LayoutError(
            f"rules: {rules!r} is a {type(rules).__name__}, and no Rules. "
            "jaxshard.read_rules(text) makes them of what a TOML file says."
        )
