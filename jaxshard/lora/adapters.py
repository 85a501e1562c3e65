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
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from ..core.catalog import Tensor
from ..core.decoders import parse_object
from ..core.numpy_dtypes import is_plain_float
from ..errors import FormatError, LayoutError, NotFoundError, format_list
from ..formats.folder import Folder
from ..rules import weight_name
from ..storage.places import folder_at, is_remote
from .peft_patterns import ByPattern, check_patterns

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
            f"{where} holds several adapters ({format_list(sorted(labels - {''}))}). Save the "
            "one to "
            "merge alone: save_pretrained(DIR, selected_adapters=[NAME])."
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


# --- Adapter configurations: rank, alpha, scaling and where each comes from

PEFT_CONFIG = "adapter_config.json"
OWN_CONFIG = "mindformers_adapter_config.json"
_PARENTS = 3  # MindFormers keeps one file for several checkpoints, above them
_MAX_BYTES = 1 << 22
_MOST_NAMES, _LONGEST_NAME = 4096, 1024  # in a list of modules or parameters
_MORE = (  # what a config may ask for that no product of two matrices is
    "use_dora",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "arrow_config",
)
_HEADS = {  # of a task, which PEFT trains whole without a word in older configs
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TAKEN_OUT = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of the base, by the adapter's start


@dataclass(frozen=True)
class Settings:
    """How strongly adapters act.

    Attributes:
        where: the config that says all that the caller did not.
        rank_from: who says the rank.
        given: alpha or scaling are the caller's.
        looked_in: the places that a config was looked for in.
        saved_modules: those that were trained whole (modules_to_save); None if nobody says.
        keeps_ties: a head that is tied to an adapted embedding was trained with it.
        target_parameters: the ends of the names of parameters that are adapted, where PEFT was
            asked for parameters and not for modules.
        fan_is_given: fan_in_fan_out is the caller's.
    """

    alpha: float | None = None
    rank: int | None = None
    scaling: float | None = None
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool | None = None
    where: str = ""
    rank_from: str = ""
    given: bool = False
    looked_in: tuple[str, ...] = ()
    saved_modules: tuple[str, ...] | None = None
    keeps_ties: bool = False
    target_parameters: tuple[str, ...] = ()
    fan_is_given: bool = False

    def with_given(
        self,
        alpha: float | None = None,
        rank: int | None = None,
        scaling: float | None = None,
        fan_in_fan_out: bool | None = None,
    ) -> Settings:
        """These settings with what the caller says in their place.

        Raises:
            LayoutError: it is contradictory, or no number that anything can be multiplied with.
        """
        for name, number in (("alpha", alpha), ("scaling", scaling)):
            if number is not None and not isfinite(number):
                raise LayoutError(
                    f"{name}= (--{name}) is {number}, not a number to multiply with. Give the "
                    f"{name} of the training."
                )
        if alpha is not None and scaling is not None:
            raise LayoutError(
                f"alpha= (--alpha) {alpha} and scaling= (--scaling) {scaling} are both given, and "
                "each decides alone. Leave one out."
            )
        if alpha is not None and self.alpha_pattern and self.alpha not in (None, alpha):
            raise LayoutError(
                f"alpha={alpha} is given, but {self.where} says {self.alpha}, and other alphas for "
                f"some modules (alpha_pattern has {len(self.alpha_pattern)}). Leave alpha out, or "
                "change that file; scaling= sets one scaling for all."
            )
        made = self
        if alpha is not None or scaling is not None:
            made = replace(made, alpha=alpha, scaling=scaling, given=True)
        if rank is not None:
            given = "adapter_rank= (--adapter-rank)"
            made = replace(made, rank=rank, rank_pattern={}, rank_from=given)
        if fan_in_fan_out is not None:
            made = replace(made, fan_in_fan_out=fan_in_fan_out, fan_is_given=True)
        return made

    def scaling_of(self, adapter: Adapter, name: str | None = None, experts: int = 1) -> float:
        """What the product of ``adapter`` is multiplied with.

        Args:
            adapter: the pair.
            name: what patterns are about, if that is not the module: a parameter.
            experts: how many experts share the pair.

        Raises:
            NotFoundError: nobody says alpha; the places that were looked in are listed.
            FormatError: the config says another rank than the adapter has.
            LayoutError: the caller does.
        """
        name = name or adapter.module
        own = adapter.rank // experts
        rank = self._ranks.find(name, self.rank)
        if rank is not None and rank != own:
            of = f" for each of {experts} experts" if experts > 1 else ""
            if self.rank_from:
                raise LayoutError(
                    f"{adapter.a.name}: shape {adapter.a.shape} has rank {own}{of}, and "
                    f"{self.rank_from} asks for {rank}. Leave it out, or fetch that adapter."
                )
            raise FormatError(
                f"{adapter.a.name}: shape {adapter.a.shape} has rank {own}{of}, but "
                f"{self.where} says {rank}: the adapter and its config do not belong together. "
                "Fetch both again."
            )
        if self.scaling is not None:
            return self.scaling
        alpha = self._alphas.find(name, self.alpha)
        if alpha is None:
            raise NotFoundError(
                f"{adapter.a.name}: its alpha is not known, and is not guessed. Looked for "
                f"lora_alpha in {', '.join(self.looked_in) or 'no file'}. Give alpha= (what it was "
                "trained with), or scaling= (alpha / rank); on the command line --alpha or "
                "--scaling."
            )
        return alpha / (sqrt(own) if self.rslora else own)

    @cached_property
    def saved_ends(self) -> frozenset[str]:
        """The last parts of the names of ``saved_modules``."""
        return frozenset(m.rpartition(".")[2] for m in self.saved_modules or ())

    @cached_property
    def _ranks(self) -> ByPattern[int | None]:
        return ByPattern(self.rank_pattern, f"{self.where}: rank_pattern")

    @cached_property
    def _alphas(self) -> ByPattern[float | None]:
        return ByPattern(self.alpha_pattern, f"{self.where}: alpha_pattern")


def find_settings(root: str) -> Settings:
    """What the config beside the adapter in the folder ``root``, or above it, says.

    Raises:
        FormatError: a config is not what it claims to be.
        LayoutError: it describes another kind of adapter.
    """
    at = Path(root).absolute()
    places = [root] if is_remote(root) else [at, *list(at.parents)[:_PARENTS]]
    looked = []
    for place in places:
        for name in (PEFT_CONFIG, OWN_CONFIG):
            looked.append(f"{place}/{name}")
            if isinstance(place, Path) and not (place / name).is_file():
                continue
            folder = folder_at(place)
            try:
                if name in folder.files():
                    return replace(_read(folder, name, looked[-1]), looked_in=tuple(looked))
            finally:
                folder.close()
    return Settings(looked_in=tuple(looked))


def _read(folder: Folder, name: str, path: str) -> Settings:
    size = folder.files()[name].num_bytes
    if size > _MAX_BYTES:
        raise FormatError(f"{path} has {size} bytes; an adapter's config has a few thousand.")
    config = parse_object(folder.read(name, 0, size), path)
    inner = config.get("lora_config")
    said = {**config, **inner} if isinstance(inner, dict) else config
    kind = said.get("peft_type")
    if kind not in (None, "LORA"):
        raise LayoutError(
            f"{path}: peft_type is {kind!r}; only LORA can be merged here. Merge it with PEFT."
        )
    for flag in _MORE:
        if said.get(flag):
            raise LayoutError(
                f"{path}: {flag} is {said[flag]!r}; that is more than adding a product to a "
                "matrix, and cannot be merged here. Merge it with PEFT."
            )
    _check_start(said.get("init_lora_weights"), path)
    rank_key = "r" if said.get("r") is not None else "lora_rank"
    ranks = {p: _rank(said["rank_pattern"], p, path) for p in _patterns(said, "rank_pattern", path)}
    alphas = {
        p: _number(said["alpha_pattern"], p, path) for p in _patterns(said, "alpha_pattern", path)
    }
    return Settings(
        alpha=_number(said, "lora_alpha", path) if said.get("lora_alpha") is not None else None,
        rank=_rank(said, rank_key, path) if said.get(rank_key) is not None else None,
        rslora=bool(said.get("use_rslora")),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        fan_in_fan_out=bool(said["fan_in_fan_out"]) if "fan_in_fan_out" in said else None,
        where=str(path),
        saved_modules=_saved_modules(said, kind, path),
        keeps_ties=said.get("ensure_weight_tying") is True,
        target_parameters=_texts(said, "target_parameters", path),
    )


def _check_start(start: object, path: str) -> None:
    """Refuse an adapter whose first values were taken out of the base's weights.

    https://huggingface.co/docs/peft/developer_guides/lora#initialization
    """
    if isinstance(start, str) and start.partition("_niter_")[0].lower() in _TAKEN_OUT:
        raise LayoutError(
            f"{path}: init_lora_weights is {start!r}, so the adapter belongs to a base whose "
            "weights were changed when its training began, and not to the model they came from. "
            "Merge it with PEFT, or save it as plain LoRA there "
            "(path_initial_model_for_weight_conversion)."
        )


def _saved_modules(said: Mapping[str, Any], kind: object, path: str) -> tuple[str, ...] | None:
    if kind is None:
        return None  # MindFormers' config, which does not say
    names = _texts(said, "modules_to_save", path)
    return (*names, *_HEADS.get(str(said.get("task_type")), ()))


def _texts(said: Mapping[str, Any], key: str, path: str) -> tuple[str, ...]:
    names = said.get(key) or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise FormatError(f"{path}: {key} is not a list of names. Fetch the adapter again.")
    if len(names) > _MOST_NAMES or any(len(n) > _LONGEST_NAME for n in names):
        raise FormatError(
            f"{path}: {key} has {len(names)} names; at most {_MOST_NAMES} of {_LONGEST_NAME} "
            "characters are read. Fetch the adapter again."
        )
    return tuple(names)


def _number(said: Mapping[str, Any], key: str, path: str) -> float:
    value = said[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(
            f"{path}: {key} is {str(value)[:40]!r}, not a number. Fetch the adapter again, or give "
            "alpha= (--alpha)."
        )
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if not isfinite(number):
        raise FormatError(
            f"{path}: {key} is {str(value)[:40]}, no number to multiply with. Fetch the adapter "
            "again."
        )
    return number


def _rank(said: Mapping[str, Any], key: str, path: str) -> int:
    number = _number(said, key, path)
    if number < 1 or number != int(number):
        raise FormatError(
            f"{path}: {key} is {str(said[key])[:40]}, not a rank of 1 or more. "
            "Fetch the adapter again."
        )
    return int(number)


def _patterns(said: Mapping[str, Any], key: str, path: str) -> list[str]:
    """The patterns of a table of modules, each an expression that can be tried."""
    value = said.get(key) or {}
    if not isinstance(value, dict):
        raise FormatError(
            f"{path}: {key} is no table of names and numbers. Fetch the adapter again."
        )
    check_patterns(value, f"{path}: {key}")
    return list(value)
