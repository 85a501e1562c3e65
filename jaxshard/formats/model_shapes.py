"""Names and shapes of models from ``config.json`` alone.

    {"model_type": "llama", "hidden_size": 4096, …}   →   model.layers.0.self_attn.q_proj.weight …

For operations without weights, such as planning the strategy files of a job that has not
started. Supports decoders whose modules follow from the numbers in the config. This module opens
no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.box import Box
from ..core.catalog import Catalog, File, Model, StoredShard, Tensor
from ..core.dtypes import dtype
from ..errors import FormatError, NotFoundError, did_you_mean, quote_name
from .folder import Folder
from .huggingface import CONFIG, read_model

Shapes = dict[str, tuple[int, ...]]

_MAX_TENSORS = 2_000_000
_MAX_NUMBER = 1 << 40


@dataclass(frozen=True, slots=True)
class _Decoder:
    """Differences of one model type from llama.

    Attributes:
        bias: the attention projections with a bias.
        bias_key: the config key that enables these biases; qkv_bias (true by default) if "".
        mlp_bias_key: the config key that enables biases of the MLP.
        head_norms: q and k are normalised per head.
        norms: further norms of a layer.
        experts: the names of a layer's sparse part and of each expert's three matrices.
        shared: the name of the expert that processes every token.
    """

    bias: tuple[str, ...] = ()
    bias_key: str = ""
    mlp_bias_key: str = ""
    head_norms: bool = False
    norms: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    shared: str = ""


_QKV, _QKVO = ("q", "k", "v"), ("q", "k", "v", "o")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_QWEN = ("mlp", *_PROJECTIONS)
_DECODERS: Mapping[str, _Decoder] = {
    "llama": _Decoder(_QKVO, "attention_bias", "mlp_bias"),
    "mistral": _Decoder(),
    "qwen2": _Decoder(_QKV),
    "qwen3": _Decoder(_QKVO, "attention_bias", head_norms=True),
    "gemma": _Decoder(_QKVO, "attention_bias"),
    "gemma2": _Decoder(
        _QKVO, "attention_bias", norms=("pre_feedforward_layernorm", "post_feedforward_layernorm")
    ),
    "mixtral": _Decoder(experts=("block_sparse_moe", "w1", "w3", "w2")),
    "qwen2_moe": _Decoder(_QKV, experts=_QWEN, shared="shared_expert"),
    "qwen3_moe": _Decoder(_QKVO, "attention_bias", head_norms=True, experts=_QWEN),
}


def read(folder: Folder) -> Catalog | None:
    """Return the tensors of the model with ``config.json`` in ``folder``; None without it.

    Raises:
        NotFoundError: the model type is unsupported, or a number is missing.
        FormatError: the config is invalid, or a number in it.
    """
    listed = folder.files().get(CONFIG)
    if listed is None:
        return None
    model, unread = read_model(folder, folder.files())
    if unread:
        raise FormatError(f"{folder.root}: {unread[0]} Fetch it again.")
    return catalog_of(model, folder.root, listed)


def catalog_of(model: Model, root: str, file: File) -> Catalog:
    """Return the tensors of ``model``, whose config is ``file`` in ``root``.

    Raises:
        NotFoundError, FormatError: as ``read``.
    """
    kind = dtype("BF16")
    tensors = {
        name: Tensor(name, kind, shape, (StoredShard(0, 0, Box.whole(shape)),))
        for name, shape in shapes_of(model).items()
    }
    note = f"no weights found: names and shapes are derived from {file.path} ({model.type})."
    return Catalog(root, "config", (file,), tensors, model=model, notes=(note,))


def shapes_of(model: Model) -> Shapes:
    """Derive the name and shape of every tensor from the config of ``model``.

    Raises:
        NotFoundError, FormatError: as ``read``.
    """
    kind = _DECODERS.get(model.type or "")
    if kind is None:
        raise NotFoundError(
            f"{CONFIG}: unsupported model_type {quote_name(repr(model.type))} (expected one of "
            f"{', '.join(_DECODERS)}).{did_you_mean(model.type or '', _DECODERS)} For other types, "
            "pass a checkpoint, whose names and shapes are used."
        )
    numbers = _Numbers(model.config)
    vocab, hidden, layers = (
        numbers.of(key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")
    )
    if layers * (1 + numbers.experts) > _MAX_TENSORS:
        raise FormatError(
            f"{CONFIG}: {layers} layers with {numbers.experts} experts (expected at most "
            f"{_MAX_TENSORS})."
        )
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        for name, shape in _layer(kind, numbers, layer):
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not model.tied_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


class _Numbers:
    """Validated integers of a config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def of(self, *keys: str, default: int | None = None) -> int:
        """Return the number under the first of ``keys`` in the config.

        Raises:
            NotFoundError: the config lacks all of them.
            FormatError: the value is not a number of 1 or more.
        """
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if type(value) is not int or not 0 < value < _MAX_NUMBER:
                raise FormatError(
                    f"{CONFIG}: {key} is {quote_name(repr(value))} (expected a number of 1 or "
                    "more). Fetch it again."
                )
            return value
        if default is None:
            raise NotFoundError(f"{CONFIG} has no {' or '.join(keys)}. Add it.")
        return default

    @property
    def experts(self) -> int:
        """Number of experts of a sparse layer; 0 for a dense model."""
        keys = ("num_experts", "num_local_experts")
        return self.of(*keys) if any(self.config.get(key) for key in keys) else 0

    def is_sparse(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        dense = self.config.get("mlp_only_layers") or ()
        step = self.of("decoder_sparse_step", default=1)
        return self.experts > 0 and layer not in dense and (layer + 1) % step == 0


def _layer(kind: _Decoder, numbers: _Numbers, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = numbers.of("hidden_size"), numbers.of("num_attention_heads")
    groups = numbers.of("num_key_value_heads", default=heads)
    head = numbers.of("head_dim", default=max(1, hidden // heads))
    rows = {"q": heads * head, "k": groups * head, "v": groups * head}
    has_bias = bool(numbers.config.get(kind.bias_key or "qkv_bias", not kind.bias_key))
    for x in _QKVO:
        shape = (rows[x], hidden) if x in rows else (hidden, rows["q"])
        yield f"self_attn.{x}_proj.weight", shape
        if x in kind.bias and has_bias:
            yield f"self_attn.{x}_proj.bias", shape[:1]
    for x in ("q", "k") if kind.head_norms else ():
        yield f"self_attn.{x}_norm.weight", (head,)
    for norm in ("input_layernorm", "post_attention_layernorm", *kind.norms):
        yield f"{norm}.weight", (hidden,)
    if not (kind.experts and numbers.is_sparse(layer)):
        mlp_bias = bool(numbers.config.get(kind.mlp_bias_key))
        yield from _mlp("mlp", _PROJECTIONS, hidden, numbers.of("intermediate_size"), mlp_bias)
        return
    where, *names = kind.experts
    width = numbers.of("moe_intermediate_size", "intermediate_size")
    yield f"{where}.gate.weight", (numbers.experts, hidden)
    for expert in range(numbers.experts):
        yield from _mlp(f"{where}.experts.{expert}", names, hidden, width)
    if kind.shared:
        width = numbers.of("shared_expert_intermediate_size")
        yield from _mlp(f"{where}.{kind.shared}", _PROJECTIONS, hidden, width)
        yield f"{where}.{kind.shared}_gate.weight", (1, hidden)


def _mlp(
    where: str, names: Sequence[str], hidden: int, width: int, bias: bool = False
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in zip(names, ((width, hidden), (width, hidden), (hidden, width)), strict=True):
        yield f"{where}.{name}.weight", shape
        if bias:
            yield f"{where}.{name}.bias", shape[:1]
