"""Adapters of parameters and stacked experts: which part of which base tensor.

PEFT adapts a module's weight (X.lora_A is about X.weight), or any parameter that its config
names (target_parameters). Of a stack of experts it keeps the factors of all in one pair:

    A (E·rank, in)    expert e: rows e·rank : (e+1)·rank
    B (out, rank·E)   expert e: every E-th column, from column e

In memory transformers stacks experts, and joins their gate and up; files have them apart or
stacked. Names and shapes decide; nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from ..core.catalog import Model, Tensor
from ..errors import LayoutError
from ..rules.modalities import text_type
from .adapters import Adapter
from .base_names import BaseNames

_APART = {  # what a parameter of stacked experts is in files that have each expert apart
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}
_INPUTS_FIRST = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
_MOST_NESTED, _MOST_PARAMETERS = 6, 12


class Part(NamedTuple):
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
    parts: tuple[Part, ...]

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
            return Parameter(name, (shape[0], shape[1]), 0, (Part(own, None),))
        if len(shape) == 3:
            return Parameter(name, (shape[1], shape[2]), shape[0], (Part(own, None),))
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
    parts: list[Part] = []
    experts, shape = 0, (0, 0)
    while all((n := f"{stem}{experts}.{s}.weight") in known for s in spelling):
        row = 0
        for s in spelling:
            n = f"{stem}{experts}.{s}.weight"
            tensor = known[n].shape
            if len(tensor) != 2:
                return None
            parts.append(Part(n, experts, row))
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
