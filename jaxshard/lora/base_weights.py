"""Base tensor names for adapters that use in-memory names.

transformers renames tensors when it reads a checkpoint, and PEFT names modules as they are then:

    in memory, and so in the adapter        in the files
    model.language_model.layers.0.…         language_model.model.layers.0.…    LLaVA, Gemma 3
                                            model.layers.0.…                   Qwen2.5-VL
    model.layers.0.mlp.gate.weight          model.layers.0.block_sparse_moe.gate.weight

These renamings are tried where a name is not there; a caller gives others. Names only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice, permutations, product, takewhile
from typing import NamedTuple, TypeAlias

from .. import mapping as mappings
from ..core.catalog import Catalog, Model, Tensor
from ..core.patterns import template
from ..errors import LayoutError, NotFoundError, format_list
from ..rules.match import text_type
from .adapters import Adapter

AdapterNames: TypeAlias = mappings.Mapping | Mapping[str, str] | str | os.PathLike[str]

_LONGEST, _MOST_COMPARED = 256, 20_000  # names that are compared letter by letter for a message
_PREFIXES = ("model.", "transformer.", "base_model.")
_PLACES = (  # (in memory, in files): transformers/conversion_mapping.py
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "language_model."),
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.vision_model.", "vision_model."),
    ("model.audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
_INSIDE = (
    (".mlp.", ".block_sparse_moe."),
    (".block_sparse_moe.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),
    (".block_sparse_moe.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
    (".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),
    (".mlp.experts.gate_up_proj", ".mlp.experts.fc1.weight"),
    (".mlp.experts.down_proj", ".mlp.experts.fc2.weight"),
)
_BOTH_WAYS = {
    "places": (*_PLACES, *((b, a) for a, b in _PLACES)),
    "inside": (*_INSIDE, *((b, a) for a, b in _INSIDE)),
}


@dataclass
class BaseNames:
    """What the base calls the tensors that an adapter names.

    Attributes:
        known: the base's tensors by name.
        root: the base's place, for errors.
        given: the caller's renaming.
        renamed: names that were found by a renaming of transformers: the adapter's, the base's.
        num_given: how many names the caller's renaming changed.
    """

    known: Mapping[str, Tensor]
    root: str
    given: Callable[[str], str] = str
    renamed: dict[str, str] = field(default_factory=dict)
    num_given: int = 0

    def find(self, name: str) -> str | None:
        """The base's name for ``name``; None if it has no such tensor.

        Raises:
            LayoutError: several renamings lead to a tensor.
        """
        given = self.given(name)
        self.num_given += given != name
        if given in self.known:
            return given
        plain = [n for n in _with_or_without_head(given) if n in self.known]
        others = [n for n in _renamings(given) if n in self.known]
        found = list(dict.fromkeys((*plain, *others)))
        if len(found) > 1:
            raise LayoutError(
                f"{name} of the adapter may be any of {format_list(found)} of {self.root}. Give "
                "the "
                f"right one with {argument(name, found[0])}."
            )
        if found and not plain:
            self.renamed[name] = found[0]
        return found[0] if found else None

    def missing(self, what: str, names: Sequence[str]) -> NotFoundError:
        """The error that what ``what`` adapts is in the base by none of ``names``."""
        text = (
            f"{what} adapts {names[0]}, and {self.root} has no such tensor among its "
            f"{len(self.known)}."
        )
        close = _closest([self.given(n) for n in names], self.known)
        if close is None:
            return NotFoundError(
                f"{text} Give the base model as the source and the adapters as adapter= "
                '(--adapter), or other names with adapter_names={"NAME HERE": "NAME IN THE BASE"} '
                "(--adapter-names)."
            )
        name, other = names[close[0]], close[1]
        if template(other) == template(self.given(name)):
            return NotFoundError(
                f"{text} It has {other}, so the adapter is of a model with more layers or experts. "
                "Give the base model that it was trained on."
            )
        return NotFoundError(
            f"{text} Did you mean {other}? Then give {argument(name, other)}; otherwise give the "
            "base model that the adapter was trained on."
        )

    def check_given(self) -> None:
        """Refuse a renaming of the caller's that was about no name of the adapter.

        Raises:
            LayoutError: with a name that it could have been about.
        """
        if self.given is not str and not self.num_given:
            raise LayoutError(
                "adapter_names= (--adapter-names) renames none of the adapter's names. Leave it "
                "out, or write the names as the adapter has them, without base_model.model. and "
                "lora_A: model.layers.0.self_attn.q_proj.weight."
            )

    def notes(self) -> list[str]:
        """What a person should know of names that were found by a renaming."""
        if not self.renamed:
            return []
        first, *_ = self.renamed.items()
        return [
            f"{len(self.renamed)} names of the adapter are those that transformers gives in "
            f"memory, and were found in the files under others ({first[0]} is {first[1]} …)."
        ]


def renaming(given: AdapterNames | None) -> Callable[[str], str]:
    """The function of ``adapter_names``: a mapping's renamings, or ``FROM=TO,FROM=TO``.

    Raises:
        LayoutError: it does more than rename, or says nothing.
    """
    if given is None:
        return str
    made = _as_mapping(given)
    other = [op for op in made.ops if not isinstance(op, mappings.Rename | mappings.Substitute)]
    if other:
        raise LayoutError(
            f"adapter_names= (--adapter-names) does {other[0]}, and adapters can only be renamed. "
            "Give a mapping of rename and substitute alone."
        )
    return lambda name: next(iter(_applied(made, name)))


def _applied(made: mappings.Mapping, name: str) -> Iterable[str]:
    result: Mapping[str, object] = {name: None}
    for op in made.ops:
        result = op.apply(dict(result), None)  # type: ignore[arg-type] # they look at names alone
    return result


def _as_mapping(given: AdapterNames) -> mappings.Mapping:
    if isinstance(given, mappings.Mapping):
        return given
    if isinstance(given, Mapping):
        return mappings.Mapping((mappings.Rename(tuple(given.items())),))
    text = os.fspath(given)
    if "=" in text and not os.path.exists(text):
        pairs = [part.partition("=") for part in text.split(",")]
        return mappings.Mapping((mappings.Rename(tuple((a, b) for a, _, b in pairs)),))
    if not os.path.isfile(text):
        raise LayoutError(
            f"adapter_names= (--adapter-names) {text!r} is neither FROM=TO nor a TOML file of a "
            'mapping. Give FROM=TO, as "model.language_model.{x*}=language_model.model.{x*}".'
        )
    return mappings.find_mapping(text, Catalog("", "", (), {}))


def argument(name: str, other: str) -> str:
    """The argument that has the adapter's ``name`` taken for the base's ``other``.

    >>> argument("model.language_model.norm.weight", "language_model.model.norm.weight")[:62]
    'adapter_names={"model.language_model.{x*}": "language_model.mo'
    """
    mine, theirs = name.split("."), other.split(".")
    same = 0
    while same < min(len(mine), len(theirs)) - 1 and mine[-1 - same] == theirs[-1 - same]:
        same += 1
    ends = [p[: len(p) - same] + (["{x*}"] if same else []) for p in (mine, theirs)]
    numbers = [[p for p in end if p.isdigit()] for end in ends]
    if numbers[0] == numbers[1] and len(numbers[0]) == 1:
        ends = [["{layer}" if p.isdigit() else p for p in end] for end in ends]
    a, b = (".".join(end) for end in ends)
    return f'adapter_names={{"{a}": "{b}"}} (--adapter-names "{a}={b}")'


def _with_or_without_head(name: str) -> Iterator[str]:
    """Names of a model that may have been saved with or without the head."""
    for prefix in _PREFIXES:
        yield prefix + name
        yield name.removeprefix(prefix)


def _renamings(name: str) -> Iterator[str]:
    """``name`` after one renaming of its place, one inside, or both."""
    places = [name]
    for a, b in _BOTH_WAYS["places"]:
        if name.startswith(a):
            places.append(b + name[len(a) :])
        elif "." + a in name:  # thinker.model.…
            places.append(name.replace("." + a, "." + b, 1))
    for place, (a, b) in product(places, (("", ""), *_BOTH_WAYS["inside"])):
        if a in place:
            yield place.replace(a, b, 1) if a else place


def _closest(names: Sequence[str], known: Iterable[str]) -> tuple[int, str] | None:
    """The known name that ends as one of ``names`` for longest, or is spelt most like the first.

    And the number of that one.
    """
    ends = [name.split(".")[::-1] for name in names]
    best, which, alike = 1, 0, list[str]()
    for other in known:
        parts = other.split(".")[::-1]
        for i, end in enumerate(ends):
            count = sum(1 for _ in takewhile(_are_equal, zip(end, parts, strict=False)))
            if count > best:
                best, which, alike = count, i, []
            if count == best > 1 and i == which:
                alike.append(other)
    offered = alike
    if len(alike) != 1:
        short = (n for n in alike or known if len(n) <= _LONGEST)
        offered = get_close_matches(names[which][:_LONGEST], islice(short, _MOST_COMPARED), n=1)
    return (which, offered[0]) if offered else None


def _are_equal(pair: tuple[str, str]) -> bool:
    return pair[0] == pair[1]


# --- Adapters of parameters and stacked experts: which part of which base tensor

_APART = {  # what a parameter of stacked experts is in files that have each expert apart
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}
_INPUTS_FIRST = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
_MOST_NESTED, _MOST_PARAMETERS = 6, 12


class ParameterPart(NamedTuple):
    """A tensor of the base, the expert whose factors it takes (None: all, one by one), and the
    row of the product that its first row is.
    """

    name: str
    expert: int | None
    row: int = 0


@dataclass(frozen=True, slots=True)
class Parameter:
    """What the model has in memory as one parameter.

    Attributes:
        name: as the model has it, which patterns of a config are about.
        shape: (rows, columns), of each expert.
        experts: how many matrices are stacked; 0 for a matrix that is not.
        parts: the tensors of the base that it is made of.
    """

    name: str
    shape: tuple[int, int]
    experts: int
    parts: tuple[ParameterPart, ...]

    def fits(self, pair: Adapter) -> bool:
        """Whether the product of ``pair`` has this shape, or the other way round."""
        made = (pair.b.shape[0], pair.a.shape[1])
        shapes = (self.shape, self.shape[::-1]) if self.experts > 1 else (self.shape,)
        return made in shapes and pair.rank % max(1, self.experts) == 0

    def is_swapped(self, pair: Adapter, given: bool | None, model: Model, notes: list[str]) -> bool:
        """Whether the product is added transposed, as PEFT decides it.

        Of a square matrix the shape does not tell: then the caller's word, or the family's.
        """
        made = (pair.b.shape[0], pair.a.shape[1])
        if self.experts <= 1 or made != made[::-1]:
            return made != self.shape
        if given is not None:
            return given
        kinds = {model.type, text_type(model.config)}
        if kinds == {None}:
            notes.append(
                f"{self.name}: its matrices are square, and are taken as (out, in); give "
                "fan_in_fan_out=True (--fan-in-fan-out) if they are stored as (in, out)."
            )
        return bool(kinds & _INPUTS_FIRST)


class Targets:
    """The ends of the names of parameters (target_parameters), to be asked for each module.

    >>> Targets(["experts.down_proj", "gate.weight"]).of("model.layers.0.mlp.experts")
    ['down_proj']
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self._of: dict[str, dict[str, None]] = {}
        for target in targets:
            module, _, parameter = target.rpartition(".")
            self._of.setdefault(module, {})[parameter] = None
        self._lengths = sorted(set(map(len, self._of)))

    def of(self, module: str) -> list[str]:
        """The parameters of ``module`` that are targeted, if it has them.

        Raises:
            LayoutError: more than any module has.
        """
        found: dict[str, None] = {}
        for length in self._lengths:
            start = len(module) - length
            if start < 0:
                break
            if start == 0 or not length or module[start - 1] == ".":
                found |= self._of.get(module[start:], {})
        if len(found) > _MOST_PARAMETERS:
            raise LayoutError(
                f"{module[:80]}: {len(found)} of its parameters are in target_parameters, and at "
                f"most {_MOST_PARAMETERS} of one module are merged. Merge the adapter with PEFT."
            )
        return list(found)


def assigned(
    pairs: Sequence[Adapter], known: Sequence[Parameter]
) -> list[tuple[Adapter, Parameter]]:
    """The parameter of ``known`` that each of ``pairs`` is about, which all adapt one module.

    PEFT tells the parameters of a module apart by their order in its source; shapes do here.

    Raises:
        LayoutError: shapes fit no parameter, or several.
    """
    module = pairs[0].module
    if len(pairs) > _MOST_NESTED:
        raise LayoutError(
            f"{module}: {len(pairs)} parameters are adapted, and at most {_MOST_NESTED} of one "
            "module are merged. Merge the adapter with PEFT."
        )
    ways = [
        way
        for way in permutations(known, len(pairs))
        if all(p.fits(pair) for p, pair in zip(way, pairs, strict=True))
    ]
    if len(ways) == 1:
        return list(zip(pairs, ways[0], strict=True))
    shapes = "; ".join(f"{p.a.name} {p.a.shape}, {p.b.name} {p.b.shape}" for p in pairs)
    stacks = "; ".join(f"{p.name} {(*(p.experts,) * bool(p.experts), *p.shape)}" for p in known)
    if ways:
        raise LayoutError(
            f"{module}: shapes do not tell which of its parameters ({stacks}) each pair adapts "
            f"({shapes}). Merge the adapter with PEFT."
        )
    raise LayoutError(
        f"{module}: no pair of the adapter ({shapes}) fits the parameters that its config names "
        f"({stacks}). Give the base model that it was trained on."
    )


def find_parameter(name: str, names: BaseNames) -> Parameter | None:
    """The parameter ``name`` of the model in memory, as the base has it; None if it has not.

    Raises:
        LayoutError: several renamings lead to it.
    """
    own = names.find(name)
    if own is not None:
        shape = names.known[own].shape
        if len(shape) == 2:
            return Parameter(name, (shape[0], shape[1]), 0, (ParameterPart(own, None),))
        if len(shape) == 3:
            return Parameter(name, (shape[1], shape[2]), shape[0], (ParameterPart(own, None),))
        return None
    for spelling, first in _first_experts(name):
        there = names.find(first)
        if there is not None:
            stem = there.removesuffix(f"0.{spelling[0]}.weight")
            return _of_experts(name, stem, spelling, names.known)
    return None


def spellings(name: str) -> list[str]:
    """The names by which the parameter ``name`` is looked for: its own, and of a first expert."""
    return [name, *(first for _, first in _first_experts(name))]


def _first_experts(name: str) -> list[tuple[tuple[str, ...], str]]:
    """How files with each expert apart may spell ``name``, and the first expert's first matrix."""
    module, _, last = name.rpartition(".")
    return [(s, f"{module}.0.{s[0]}.weight") for s in _APART.get(last, ((last,),))]


def _of_experts(
    name: str, stem: str, spelling: Sequence[str], known: Mapping[str, Tensor]
) -> Parameter | None:
    """A parameter whose experts lie apart, each in the matrices of ``spelling``, row after row."""
    parts: list[ParameterPart] = []
    experts, shape = 0, (0, 0)
    while all((n := f"{stem}{experts}.{s}.weight") in known for s in spelling):
        row = 0
        for s in spelling:
            n = f"{stem}{experts}.{s}.weight"
            tensor = known[n].shape
            if len(tensor) != 2:
                return None
            parts.append(ParameterPart(n, experts, row))
            row += tensor[0]
        if experts and shape != (row, tensor[1]):
            return None
        shape, experts = (row, tensor[1]), experts + 1
    return Parameter(name, shape, experts, tuple(parts))


def grouped(pairs: Sequence[Adapter]) -> list[list[Adapter]]:
    """``pairs`` by module, the outermost first."""
    found: dict[str, list[Adapter]] = {}
    for pair in pairs:
        found.setdefault(pair.module, []).append(pair)
    return [sorted(some, key=lambda p: p.depth) for some in found.values()]
