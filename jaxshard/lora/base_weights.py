"""Base tensors of an adapter: by renamed names, and as parameters of stacked experts.

transformers renames tensors when it reads a checkpoint, and PEFT uses the names in memory:

    in memory, and so in the adapter        in the files
    model.language_model.layers.0.…         language_model.model.layers.0.…    LLaVA, Gemma 3
                                            model.layers.0.…                   Qwen2.5-VL
    model.layers.0.mlp.gate.weight          model.layers.0.block_sparse_moe.gate.weight

These renamings are tried if a name does not exist; a caller may pass others.

PEFT adapts a module's weight (X.lora_A adapts X.weight), or any parameter that its config lists
(target_parameters). For a stack of experts it stores the factors of all experts in one pair:

    A (E·rank, in)    expert e: rows e·rank : (e+1)·rank
    B (out, rank·E)   expert e: every E-th column, from column e

In memory transformers stacks experts and joins gate and up; files have them separate or stacked.
Names and shapes decide; nothing is read.
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
from ..models.facts import text_type
from .adapters import Adapter

AdapterNames: TypeAlias = mappings.Mapping | Mapping[str, str] | str | os.PathLike[str]

_MAX_LENGTH, _MAX_COMPARED = 256, 20_000  # bounds the time of the search for a similar name
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
    """Finds the base's names of the tensors in an adapter.

    Attributes:
        known: the base's tensors by name.
        root: the base's path, for errors.
        given: the caller's renaming.
        renamed: the base's name by the adapter's, where a renaming of transformers applied.
        num_given: the number of names that the caller's renaming changed.
    """

    known: Mapping[str, Tensor]
    root: str
    given: Callable[[str], str] = str
    renamed: dict[str, str] = field(default_factory=dict)
    num_given: int = 0

    def find(self, name: str) -> str | None:
        """Return the base's name of ``name``, or None if the tensor does not exist.

        Raises:
            LayoutError: several renamings match a tensor.
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
                f"{name} of the adapter may be any of {format_list(found)} of {self.root}. Pass "
                f"the right one with {argument(name, found[0])}."
            )
        if found and not plain:
            self.renamed[name] = found[0]
        return found[0] if found else None

    def missing(self, what: str, names: Sequence[str]) -> NotFoundError:
        """Return the error for an adapter ``what`` whose ``names`` do not exist in the base."""
        text = (
            f"{what} adapts {names[0]}, but {self.root} has no such tensor among its "
            f"{len(self.known)}."
        )
        close = _closest([self.given(n) for n in names], self.known)
        if close is None:
            return NotFoundError(
                f"{text} Pass the base model as the source and the adapters as adapter= "
                '(--adapter), or other names with adapter_names={"NAME HERE": "NAME IN THE BASE"} '
                "(--adapter-names)."
            )
        name, other = names[close[0]], close[1]
        if template(other) == template(self.given(name)):
            return NotFoundError(
                f"{text} It has {other}, so the adapter belongs to a model with more layers or "
                "experts. Use the base model of its training."
            )
        return NotFoundError(
            f"{text} Did you mean {other}? Then pass {argument(name, other)}; otherwise use the "
            "base model of the adapter's training."
        )

    def check_given(self) -> None:
        """Refuse a renaming of the caller's that matched no name of the adapter.

        Raises:
            LayoutError: no name matched.
        """
        if self.given is not str and not self.num_given:
            raise LayoutError(
                "adapter_names= (--adapter-names) matches none of the adapter's names. Remove "
                "it, or "
                "write the adapter's names without base_model.model. and lora_A: "
                "model.layers.0.self_attn.q_proj.weight."
            )

    def notes(self) -> list[str]:
        """Return a note on names that were found by a renaming."""
        if not self.renamed:
            return []
        first, *_ = self.renamed.items()
        return [
            f"{len(self.renamed)} names of the adapter are those of transformers in memory; the "
            "files "
            f"have other names ({first[0]} is {first[1]} …)."
        ]


def renaming(given: AdapterNames | None) -> Callable[[str], str]:
    """Return the renaming of ``adapter_names``: a mapping, or ``FROM=TO,FROM=TO``.

    Raises:
        LayoutError: it does more than rename, or is invalid.
    """
    if given is None:
        return str
    made = _as_mapping(given)
    other = [op for op in made.ops if not isinstance(op, mappings.Rename | mappings.Substitute)]
    if other:
        raise LayoutError(
            f"adapter_names= (--adapter-names) contains {other[0]}, but adapters can only be "
            "renamed. "
            "Pass a mapping of only rename and substitute."
        )
    return lambda name: next(iter(_applied(made, name)))


def _applied(made: mappings.Mapping, name: str) -> Iterable[str]:
    result: Mapping[str, object] = {name: None}
    for op in made.ops:
        result = op.apply(dict(result), None)  # type: ignore[arg-type] # renamings use no algebra
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
            'mapping. Pass FROM=TO, as "model.language_model.{x*}=language_model.model.{x*}".'
        )
    return mappings.find_mapping(text, Catalog("", "", (), {}))


def argument(name: str, other: str) -> str:
    """Return the argument that maps the adapter's ``name`` to the base's ``other``.

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
    """Yield the names of a model saved with or without the prefix of a head."""
    for prefix in _PREFIXES:
        yield prefix + name
        yield name.removeprefix(prefix)


def _renamings(name: str) -> Iterator[str]:
    """Yield ``name`` with its prefix renamed, its inner part, or both."""
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
    """Return the known name with the longest common suffix with one of ``names``, and its index.

    Without a unique one, return the name of the most similar spelling.
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
        short = (n for n in alike or known if len(n) <= _MAX_LENGTH)
        offered = get_close_matches(names[which][:_MAX_LENGTH], islice(short, _MAX_COMPARED), n=1)
    return (which, offered[0]) if offered else None


def _are_equal(pair: tuple[str, str]) -> bool:
    return pair[0] == pair[1]


# --- Adapters of parameters and stacked experts: which part of which base tensor

_SEPARATE = {  # the names of a parameter of stacked experts in files with separate experts
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}
_INPUTS_FIRST = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
_MAX_NESTED, _MAX_PARAMETERS = 6, 12


class ParameterPart(NamedTuple):
    """A base tensor, its expert (None: all), and the row of the product of its first row."""

    name: str
    expert: int | None
    row: int = 0


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model in memory.

    Attributes:
        name: its name in memory, which the patterns of a config match.
        shape: (rows, columns) of each expert.
        experts: the number of stacked matrices, 0 for a single matrix.
        parts: its tensors in the base.
    """

    name: str
    shape: tuple[int, int]
    experts: int
    parts: tuple[ParameterPart, ...]

    def fits(self, pair: Adapter) -> bool:
        """Return whether the product of ``pair`` has this shape, or its transpose."""
        made = (pair.b.shape[0], pair.a.shape[1])
        shapes = (self.shape, self.shape[::-1]) if self.experts > 1 else (self.shape,)
        return made in shapes and pair.rank % max(1, self.experts) == 0

    def is_swapped(self, pair: Adapter, given: bool | None, model: Model, notes: list[str]) -> bool:
        """Return whether the product is added transposed, as PEFT decides it.

        The caller or the family decides for square matrices.
        """
        made = (pair.b.shape[0], pair.a.shape[1])
        if self.experts <= 1 or made != made[::-1]:
            return made != self.shape
        if given is not None:
            return given
        kinds = {model.type, text_type(model.config)}
        if kinds == {None}:
            notes.append(
                f"{self.name}: its matrices are square and read as (out, in); pass "
                "fan_in_fan_out=True (--fan-in-fan-out) if they are stored as (in, out)."
            )
        return bool(kinds & _INPUTS_FIRST)


class Targets:
    """Suffixes of parameter names (target_parameters), by module.

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
        """Return the targeted parameters of ``module``, which may not exist.

        Raises:
            LayoutError: implausibly many.
        """
        found: dict[str, None] = {}
        for length in self._lengths:
            start = len(module) - length
            if start < 0:
                break
            if start == 0 or not length or module[start - 1] == ".":
                found |= self._of.get(module[start:], {})
        if len(found) > _MAX_PARAMETERS:
            raise LayoutError(
                f"{module[:80]}: {len(found)} of its parameters are in target_parameters, expected "
                f"at most {_MAX_PARAMETERS}. Merge the adapter with PEFT."
            )
        return list(found)


def assigned(
    pairs: Sequence[Adapter], known: Sequence[Parameter]
) -> list[tuple[Adapter, Parameter]]:
    """Assign each of ``pairs``, which adapt one module, to a parameter of ``known``.

    PEFT assigns them by the order of parameters in the module's source; here shapes decide.

    Raises:
        LayoutError: shapes fit no parameter, or several.
    """
    module = pairs[0].module
    if len(pairs) > _MAX_NESTED:
        raise LayoutError(
            f"{module}: {len(pairs)} parameters are adapted, expected at most {_MAX_NESTED}. "
            "Merge the "
            "adapter with PEFT."
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
            f"{module}: shapes do not determine which of its parameters ({stacks}) each pair "
            "adapts "
            f"({shapes}). Merge the adapter with PEFT."
        )
    raise LayoutError(
        f"{module}: no pair of the adapter ({shapes}) fits the parameters in its config "
        f"({stacks}). Use the base model of its training."
    )


def find_parameter(name: str, names: BaseNames) -> Parameter | None:
    """Find the parameter ``name`` of the model in memory in the base, or return None.

    Raises:
        LayoutError: several renamings match.
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
    """Return the searched names of the parameter ``name``: its own, and of a first expert."""
    return [name, *(first for _, first in _first_experts(name))]


def _first_experts(name: str) -> list[tuple[tuple[str, ...], str]]:
    """Return the spellings of ``name`` with separate experts, and the first expert's matrix."""
    module, _, last = name.rpartition(".")
    return [(s, f"{module}.0.{s[0]}.weight") for s in _SEPARATE.get(last, ((last,),))]


def _of_experts(
    name: str, stem: str, spelling: Sequence[str], known: Mapping[str, Tensor]
) -> Parameter | None:
    """Return a parameter of separate experts, each of the matrices of ``spelling`` in rows."""
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
    """Group ``pairs`` by module, the outermost first."""
    found: dict[str, list[Adapter]] = {}
    for pair in pairs:
        found.setdefault(pair.module, []).append(pair)
    return [sorted(some, key=lambda p: p.depth) for some in found.values()]
