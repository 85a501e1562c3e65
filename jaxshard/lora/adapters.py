"""Adapters in a checkpoint: the pairs by their names, and the config of the training.

    base_model.model.X.lora_A.weight    X.lora_A.weight         PEFT; MindFormers' parallel core
    X.mindpet_delta_lora_a              X.lora_a                MindFormers' older and newer ones
    X.lora_embedding_A                                          PEFT, on an embedding

A pair is A (rank, in) and B (out, rank); the weight is X.weight. Its scaling is alpha / rank, or
alpha / √rank with rslora. Alpha is never guessed: without it an adapter is refused, and the error
lists the places that were searched.
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
from ..storage.remote import (
    folder_at,
    is_remote,
)
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
        module: the name of the adapted module, without ``.weight``.
        a: (rank, in).
        b: (out, rank).
        is_embedding: its weight is (in, out).
        depth: the number of ``.base_layer`` in its names: PEFT wraps a module once for each
            adapted parameter.
    """

    module: str
    a: Tensor
    b: Tensor
    is_embedding: bool = False
    depth: int = 0

    @property
    def weight(self) -> str:
        """The name of the adapted weight."""
        return self.module + ".weight"

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterSet:
    """The adapters and the other tensors of a checkpoint.

    Attributes:
        adapters: the pairs.
        others: tensors that are not part of a pair, by their names in the model.
        dropped: the number of optimizer states of adapters.
    """

    adapters: tuple[Adapter, ...]
    others: Mapping[str, Tensor] = field(repr=False)
    dropped: int = 0


def is_adapter(name: str) -> bool:
    """Return whether ``name`` is half a pair, or an optimizer state of one.

    >>> is_adapter("adam_m.layers.0.wq.lora_a"), is_adapter("layers.0.wq.weight")
    (True, False)
    """
    return _HALF.fullmatch(weight_name(name)) is not None


def find_adapters(tensors: Mapping[str, Tensor], where: str) -> AdapterSet:
    """Find the adapters among ``tensors`` of the checkpoint ``where``.

    Raises:
        NotFoundError: a pair lacks one half.
        LayoutError: two adapters for one weight, shapes that do not match, or a kind of adapter
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
            "merge: save_pretrained(DIR, selected_adapters=[NAME])."
        )
    if twice:
        raise LayoutError(
            f"two sources for one target: {where} has two adapters of {twice[0]}.weight, in two "
            "spellings. Remove one first (jaxshard convert --exclude REGEX)."
        )
    found = [_pair(*key, pair, key[0] in embeddings, where) for key, pair in halves.items()]
    return AdapterSet(tuple(found), others, dropped)


def own_name(name: str) -> str:
    """Return the name in the model of a tensor saved by PEFT.

    >>> own_name("base_model.model.lm_head.modules_to_save.default.weight")
    'lm_head.weight'
    """
    return _WRAPPED.sub(".", name.removeprefix(_PEFT))


def _unwrapped(module: str) -> tuple[str, int]:
    """Strip ``.base_layer`` from the end of ``module``, and count them."""
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
            f"{where}: {there.name} exists, but its {missing[0]} matrix is missing. Fetch or save "
            "the adapter again."
        )
    a, b = pair["A"], pair["B"]
    for half in (a, b):
        if not is_plain_float(half.dtype):
            raise LayoutError(
                f"{half.name} is {half.dtype}, expected F16, BF16, F32 or F64 for the matrices of "
                "an adapter. Save the adapter in one of them."
            )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise LayoutError(
            f"{a.name} {a.shape} and {b.name} {b.shape} are not a pair: expected A (rank, in) and "
            "B (out, rank), of rank 1 or more. Merge adapters of convolutions with the program "
            "that "
            "made them."
        )
    return Adapter(module, a, b, is_embedding, depth)


def _refuse_unknown(name: str) -> None:
    for part, what in _UNKNOWN.items():
        if name.endswith(part) or f".{part}." in name:
            raise LayoutError(
                f"{name} is part of {what}, which is not supported: only a product "
                "B @ A can be added. "
                "Merge it with the program that made it."
            )


# --- Configs: rank, alpha and scaling

PEFT_CONFIG = "adapter_config.json"
OWN_CONFIG = "mindformers_adapter_config.json"
_PARENTS = 3  # MindFormers stores one file for several checkpoints, in a parent folder
_MAX_BYTES = 1 << 22
_MAX_NAMES, _MAX_NAME_LENGTH = 4096, 1024  # in a list of modules or parameters
_UNSUPPORTED_SETTINGS = (  # settings of adapters that are more than a product of two matrices
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
_HEADS = {  # by task; PEFT trains them whole, and older configs do not list them
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# initializations that subtract the adapter from the base
_TAKEN_OUT = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Settings:
    """The scaling of adapters and the settings of their training.

    Attributes:
        where: the config file of all values that the caller did not pass.
        rank_from: the argument that set the rank, if the caller did.
        given: alpha or scaling come from the caller.
        looked_in: the paths searched for a config.
        saved_modules: modules trained whole (modules_to_save); None if unknown.
        keeps_ties: a head that is tied to an adapted embedding was trained with it.
        target_parameters: suffixes of the names of adapted parameters, if PEFT adapted
            parameters instead of modules.
        fan_is_given: fan_in_fan_out comes from the caller.
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
        """Return these settings overridden by the caller's.

        Raises:
            LayoutError: contradictory arguments, or a number that is not finite.
        """
        for name, number in (("alpha", alpha), ("scaling", scaling)):
            if number is not None and not isfinite(number):
                raise LayoutError(
                    f"{name}= (--{name}) is {number}, expected a finite number. Pass the {name} "
                    "of the "
                    "training."
                )
        if alpha is not None and scaling is not None:
            raise LayoutError(
                f"alpha= (--alpha) {alpha} and scaling= (--scaling) {scaling} exclude each "
                "other. Pass "
                "one of them."
            )
        if alpha is not None and self.alpha_pattern and self.alpha not in (None, alpha):
            raise LayoutError(
                f"alpha={alpha} was passed, but {self.where} has {self.alpha}, and other alphas "
                "for "
                f"some modules (alpha_pattern has {len(self.alpha_pattern)}). Remove alpha=, or "
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
        """Return the factor of the product of ``adapter``.

        Args:
            adapter: the pair.
            name: the name that patterns match, by default the module's.
            experts: the number of experts that share the pair.

        Raises:
            NotFoundError: alpha is unknown; the searched places are listed.
            FormatError: the config has another rank than the adapter.
            LayoutError: the caller passed another rank.
        """
        name = name or adapter.module
        own = adapter.rank // experts
        rank = self._ranks.find(name, self.rank)
        if rank is not None and rank != own:
            of = f" for each of {experts} experts" if experts > 1 else ""
            if self.rank_from:
                raise LayoutError(
                    f"{adapter.a.name}: shape {adapter.a.shape} has rank {own}{of}, but "
                    f"{self.rank_from} is {rank}. Remove it, or fetch that adapter."
                )
            raise FormatError(
                f"{adapter.a.name}: shape {adapter.a.shape} has rank {own}{of}, but "
                f"{self.where} has {rank}: the adapter and its config do not match. Fetch both "
                "again."
            )
        if self.scaling is not None:
            return self.scaling
        alpha = self._alphas.find(name, self.alpha)
        if alpha is None:
            raise NotFoundError(
                f"{adapter.a.name}: alpha is unknown. Searched for lora_alpha in "
                f"{', '.join(self.looked_in) or 'no file'}. Pass alpha= of the training "
                "(--alpha), or "
                "scaling= (--scaling), which is alpha / rank."
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
    """Read the config in the adapter's folder ``root`` or a parent.

    Raises:
        FormatError: an invalid config.
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
        raise FormatError(f"{path} has {size} bytes, expected a few thousand. Fetch it again.")
    config = parse_object(folder.read(name, 0, size), path)
    inner = config.get("lora_config")
    stated = {**config, **inner} if isinstance(inner, dict) else config
    kind = stated.get("peft_type")
    if kind not in (None, "LORA"):
        raise LayoutError(
            f"{path}: peft_type is {kind!r}, expected LORA. Merge the adapter with PEFT."
        )
    for flag in _UNSUPPORTED_SETTINGS:
        if stated.get(flag):
            raise LayoutError(
                f"{path}: {flag} is {stated[flag]!r}, which is not supported: only a product "
                "B @ A can be added. Merge the adapter with PEFT."
            )
    _check_start(stated.get("init_lora_weights"), path)
    rank_key = "r" if stated.get("r") is not None else "lora_rank"
    ranks = {
        p: _rank(stated["rank_pattern"], p, path) for p in _patterns(stated, "rank_pattern", path)
    }
    alphas = {
        p: _number(stated["alpha_pattern"], p, path)
        for p in _patterns(stated, "alpha_pattern", path)
    }
    return Settings(
        alpha=_number(stated, "lora_alpha", path) if stated.get("lora_alpha") is not None else None,
        rank=_rank(stated, rank_key, path) if stated.get(rank_key) is not None else None,
        rslora=bool(stated.get("use_rslora")),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        fan_in_fan_out=bool(stated["fan_in_fan_out"]) if "fan_in_fan_out" in stated else None,
        where=str(path),
        saved_modules=_saved_modules(stated, kind, path),
        keeps_ties=stated.get("ensure_weight_tying") is True,
        target_parameters=_texts(stated, "target_parameters", path),
    )


def _check_start(start: object, path: str) -> None:
    """Refuse an adapter whose initial values were subtracted from the base's weights.

    https://huggingface.co/docs/peft/developer_guides/lora#initialization
    """
    if isinstance(start, str) and start.partition("_niter_")[0].lower() in _TAKEN_OUT:
        raise LayoutError(
            f"{path}: init_lora_weights is {start!r}, so the adapter belongs to a base whose "
            "weights were changed at the start of its training, not to the original model. Merge "
            "it "
            "with PEFT, or save it as plain LoRA with PEFT "
            "(path_initial_model_for_weight_conversion)."
        )


def _saved_modules(stated: Mapping[str, Any], kind: object, path: str) -> tuple[str, ...] | None:
    if kind is None:
        return None  # MindFormers' config, which lacks the key
    names = _texts(stated, "modules_to_save", path)
    return (*names, *_HEADS.get(str(stated.get("task_type")), ()))


def _texts(stated: Mapping[str, Any], key: str, path: str) -> tuple[str, ...]:
    names = stated.get(key) or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise FormatError(f"{path}: {key} is not a list of names. Fetch the adapter again.")
    if len(names) > _MAX_NAMES or any(len(n) > _MAX_NAME_LENGTH for n in names):
        raise FormatError(
            f"{path}: {key} has {len(names)} names, expected at most {_MAX_NAMES} of "
            f"{_MAX_NAME_LENGTH} characters. Fetch the adapter again."
        )
    return tuple(names)


def _number(stated: Mapping[str, Any], key: str, path: str) -> float:
    value = stated[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(
            f"{path}: {key} is {str(value)[:40]!r}, not a number. Fetch the adapter again, or pass "
            "alpha= (--alpha)."
        )
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if not isfinite(number):
        raise FormatError(
            f"{path}: {key} is {str(value)[:40]}, expected a finite number. Fetch the adapter "
            "again."
        )
    return number


def _rank(stated: Mapping[str, Any], key: str, path: str) -> int:
    number = _number(stated, key, path)
    if number < 1 or number != int(number):
        raise FormatError(
            f"{path}: {key} is {str(stated[key])[:40]}, not a rank of 1 or more. "
            "Fetch the adapter again."
        )
    return int(number)


def _patterns(stated: Mapping[str, Any], key: str, path: str) -> list[str]:
    """Return the patterns of a table of modules, checked with ``check_patterns``."""
    value = stated.get(key) or {}
    if not isinstance(value, dict):
        raise FormatError(
            f"{path}: {key} is not a table of names and numbers. Fetch the adapter again."
        )
    check_patterns(value, f"{path}: {key}")
    return list(value)
