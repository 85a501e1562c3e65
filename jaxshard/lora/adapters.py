"""Adapter pairs among a checkpoint's names, and the weights they belong to.

    base_model.model.X.lora_A.weight    X.lora_A.weight         PEFT; MindFormers' parallel core
    X.mindpet_delta_lora_a              X.lora_a                MindFormers' older and newer ones
    X.lora_embedding_A                                          PEFT, on an embedding

A pair is A (rank, in) and B (out, rank); the weight is X.weight. Names only: nothing is
read, and what the pairs are multiplied with is ``settings``'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.catalog import Tensor
from ..core.numpy_dtypes import is_plain_float
from ..errors import LayoutError, NotFoundError, format_list
from ..rules import weight_name

_HALF = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"lora_(?P<linear>[AB])(?:\.(?P<name>[^.]+))?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.(?P<embedding_name>[^.]+))?"
    r"|(?:mindpet_delta_)?lora_(?P<older>[ab]))"
)
_WRAPPED = re.compile(r"\.(?:modules_to_save(?:\.[^.]+)?|base_layer)\.")
_PEFT, _BASE = "base_model.model.", ".base_layer"
_UNKNOWN = {
    "lora_magnitude_vector": "DoRA, which also rescales columns",
    "lora_B.bias": "a bias of the adapter (lora_bias)",
    "lora_E": "AdaLoRA, which has a third matrix",
    "trainable_tokens_delta": "rows of an embedding that were trained (trainable_token_indices)",
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """One pair.

    Attributes:
        module: the name of what it adapts, without ``.weight``.
        a: (rank, in).
        b: (out, rank).
        is_embedding: its weight is (in, out).
        depth: how many ``.base_layer`` its names have: PEFT wraps a module once for each
            parameter of it that is adapted.
    """

    module: str
    a: Tensor
    b: Tensor
    is_embedding: bool = False
    depth: int = 0

    @property
    def weight(self) -> str:
        """The name of the weight it is added to."""
        return self.module + ".weight"

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Found:
    """What the tensors of a checkpoint are to an adapter.

    Attributes:
        adapters: the pairs.
        others: all that is no part of a pair, by the name it has in the model.
        dropped: how many optimizer states of adapters there are.
    """

    adapters: tuple[Adapter, ...]
    others: Mapping[str, Tensor] = field(repr=False)
    dropped: int = 0


def is_adapter(name: str) -> bool:
    """Whether ``name`` is half a pair, or an optimizer state of one.

    >>> is_adapter("adam_m.layers.0.wq.lora_a"), is_adapter("layers.0.wq.weight")
    (True, False)
    """
    return _HALF.fullmatch(weight_name(name)) is not None


def find_adapters(tensors: Mapping[str, Tensor], where: str) -> Found:
    """The adapters among ``tensors``, which are of the checkpoint ``where``.

    Raises:
        NotFoundError: a pair lacks one half.
        LayoutError: two adapters for one weight, shapes that are no pair, or a kind of adapter
            that is more than a pair.
    """
    halves: dict[tuple[str, int], dict[str, Tensor]] = {}
    embeddings, labels, twice = set[str](), set[str](), list[str]()
    others: dict[str, Tensor] = {}
    dropped = 0
    for name, tensor in tensors.items():
        _refuse_unknown(name)
        plain = weight_name(name)
        match = _HALF.fullmatch(plain)
        if match is None:
            others[own_name(name)] = tensor
        elif plain != name:
            dropped += 1
        else:
            outer, depth = _unwrapped(match["module"])
            module, half = own_name(outer), _half(match)
            pair = halves.setdefault((module, depth), {})
            if half in pair:
                twice.append(module)
            pair[half] = tensor
            labels.add(match["name"] or match["embedding_name"] or "")
            if match["embedding"]:
                embeddings.add(module)
    if len(labels - {""}) > 1:
        raise LayoutError(
            f"{where} holds several adapters ({format_list(sorted(labels - {''}))}). Save the one "
            "to merge alone: save_pretrained(DIR, selected_adapters=[NAME])."
        )
    if twice:
        raise LayoutError(
            f"two sources for one target: {where} has two adapters of {twice[0]}.weight, in two "
            "spellings. Leave one out of it first (jaxshard convert --exclude REGEX)."
        )
    found = [_pair(*key, pair, key[0] in embeddings, where) for key, pair in halves.items()]
    return Found(tuple(found), others, dropped)


def own_name(name: str) -> str:
    """The name that a tensor saved by PEFT has in the model.

    >>> own_name("base_model.model.lm_head.modules_to_save.default.weight")
    'lm_head.weight'
    """
    return _WRAPPED.sub(".", name.removeprefix(_PEFT))


def _unwrapped(module: str) -> tuple[str, int]:
    """``module`` without the ``.base_layer`` at its end, and how many there were."""
    end, depth = len(module), 0
    while module.endswith(_BASE, 0, end):
        end, depth = end - len(_BASE), depth + 1
    return module[:end], depth


def _half(match: re.Match[str]) -> str:
    return str(match["linear"] or match["embedding"] or match["older"].upper())


def _pair(
    module: str, depth: int, pair: Mapping[str, Tensor], is_embedding: bool, where: str
) -> Adapter:
    missing = [half for half in "AB" if half not in pair]
    if missing:
        there = next(iter(pair.values()))
        raise NotFoundError(
            f"{where}: {there.name} is there, but the {missing[0]} that it goes with is not. The "
            "adapter is incomplete: fetch or save it again."
        )
    a, b = pair["A"], pair["B"]
    for half in (a, b):
        if not is_plain_float(half.dtype):
            raise LayoutError(
                f"{half.name} is {half.dtype}; the matrices of an adapter are F16, BF16, F32 or "
                "F64. Save the adapter in one of them."
            )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise LayoutError(
            f"{a.name} {a.shape} and {b.name} {b.shape} are no pair: A is (rank, in), B is (out, "
            "rank), of rank 1 or more. Adapters of convolutions cannot be merged here: merge "
            "them with the program that made them."
        )
    return Adapter(module, a, b, is_embedding, depth)


def _refuse_unknown(name: str) -> None:
    for part, what in _UNKNOWN.items():
        if name.endswith(part) or f".{part}." in name:
            raise LayoutError(
                f"{name} is part of {what}; that is more than adding a product, and cannot be "
                "merged here. Merge it with the program that made it."
            )
