"""The weights of known families under their Hugging Face names, by kind.

A *linear* weight is (out, in), or (in, out) in ``kernels`` (GPT-2); a *norm* and a *plain*
weight have no orientation; an *embedding* is (tokens, hidden).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import FormatError, NotFoundError
from ...models.facts import text_config, text_type
from ...rules import ModelFacts

LAYER = "model.layers.{layer}."

_MAX_PREDICTIONS = 100


@dataclass(frozen=True)
class HFFamily:
    """The modules of a family, without ``.weight`` and ``.bias``, and tensors by full name."""

    name: str
    linear: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    layers: str = LAYER

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a checkpoint may have."""
        modules = (*self.linear, *self.kernels, *self.norms)
        return (
            *(f"{m}.{x}" for m in modules for x in ("weight", "bias")),
            *(f"{m}.weight" for m in self.embeddings),
            *self.plain,
        )


@dataclass(frozen=True)
class Facts:
    """The numbers of one model that its tables need."""

    family: HFFamily
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def number(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """Return a number of ``config.json`` by the first of ``keys`` that exists.

        Raises:
            NotFoundError: no such key.
            FormatError: not a number of ``least`` or more.
        """
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise FormatError(
                    f"config.json: {key} is {str(value)[:40]}, not a number of {least} or more. "
                    "Fetch it again."
                )
            return value
        if default is not None:
            return default
        raise NotFoundError(
            f"config.json: {' or '.join(keys)} is missing, which the table needs. Put config.json "
            "into the folder of the weights; for a save pass config= or extras=."
        )

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.number("num_attention_heads", "n_head")

    @property
    def kv_heads(self) -> int:
        """Key and value heads.

        Raises:
            FormatError: they do not divide the query heads.
        """
        found = self.number("num_key_value_heads", default=self.heads)
        if self.heads % found:
            raise FormatError(
                f"config.json: num_attention_heads={self.heads} is not divisible by "
                f"num_key_value_heads={found}. Fetch it again."
            )
        return found

    @property
    def layers(self) -> int:
        """Layers."""
        return self.number("num_hidden_layers", "n_layer")

    @property
    def experts(self) -> int:
        """Experts of a layer with experts."""
        return self.number("n_routed_experts", "num_local_experts", "num_experts")

    @property
    def dense_layers(self) -> int:
        """Leading layers without experts in a model with experts."""
        dense = self.number("first_k_dense_replace", default=0, least=0)
        return min(dense, self.layers) if dense else 0

    @property
    def predictions(self) -> int:
        """Multi-token prediction layers, which follow the last layer.

        Raises:
            FormatError: implausibly many.
        """
        found = self.number("num_nextn_predict_layers", default=0, least=0)
        if found > _MAX_PREDICTIONS:
            raise FormatError(
                f"config.json: num_nextn_predict_layers is {found}, expected at most "
                f"{_MAX_PREDICTIONS}. Fetch it again."
            )
        return found


_ATTENTION = tuple(LAYER + f"self_attn.{x}_proj" for x in "qkvo")
_MLP = tuple(LAYER + f"mlp.{x}_proj" for x in ("gate", "up", "down"))
_NORMS = (
    "model.norm",
    *(LAYER + n for n in ("input_layernorm", "post_attention_layernorm")),
    *(LAYER + n for n in ("pre_feedforward_layernorm", "post_feedforward_layernorm")),
    *(LAYER + f"self_attn.{x}_norm" for x in "qk"),
)
_ROTARY = ("{x*}rotary_emb.inv_freq", "{x*}rotary_pos_emb.inv_freq")
_EXPERT = LAYER + "mlp.experts.{expert}."
_EXPERTS = tuple(_EXPERT + f"{x}_proj" for x in ("gate", "up", "down"))
_SHARED = tuple(LAYER + f"mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down"))
_SPARSE = LAYER + "block_sparse_moe."
_MLA = tuple(
    LAYER + f"self_attn.{x}" for x in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
)


def _decoder(
    name: str,
    linear: tuple[str, ...] = _MLP,
    norms: tuple[str, ...] = (),
    plain: tuple[str, ...] = (),
) -> HFFamily:
    return HFFamily(
        name,
        linear=("lm_head", *_ATTENTION, *linear),
        norms=(*_NORMS, *norms),
        embeddings=("model.embed_tokens",),
        plain=plain,
        buffers=_ROTARY,
    )


_MTP = ("enorm", "hnorm", "shared_head.norm")
_LLAMA = _decoder("llama")
_QWEN3_MOE = _decoder("qwen3_moe", (*_MLP, *_EXPERTS, LAYER + "mlp.gate"))
_MIXTRAL = _decoder(
    "mixtral",
    (*(_SPARSE + "experts.{expert}." + w for w in ("w1", "w2", "w3")), _SPARSE + "gate"),
)
_DEEPSEEK = _decoder(
    "deepseek_v3",
    (
        *_MLP,
        *_EXPERTS,
        *_SHARED,
        *_MLA,
        LAYER + "mlp.gate",
        LAYER + "eh_proj",
        LAYER + "shared_head.head",
    ),
    norms=(
        *(LAYER + f"self_attn.{x}_a_layernorm" for x in ("q", "kv")),
        *(LAYER + x for x in _MTP),
    ),
    plain=(LAYER + "mlp.gate.e_score_correction_bias", LAYER + "embed_tokens.weight"),
)


def _gpt2(prefix: str) -> HFFamily:
    block = prefix + "h.{layer}."
    return HFFamily(
        "gpt2",
        linear=("lm_head",),
        kernels=tuple(block + x for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        norms=(block + "ln_1", block + "ln_2", prefix + "ln_f"),
        embeddings=(prefix + "wte", prefix + "wpe"),
        buffers=("{x*}.attn.bias", "{x*}.attn.masked_bias"),
        layers=block,
    )


def _bert(prefix: str) -> HFFamily:
    block = prefix + "encoder.layer.{layer}."
    return HFFamily(
        "bert",
        linear=(
            *(block + f"attention.self.{x}" for x in ("query", "key", "value")),
            *(block + x for x in ("attention.output.dense", "intermediate.dense", "output.dense")),
            prefix + "pooler.dense",
            "cls.predictions.transform.dense",
            "cls.predictions.decoder",
            "cls.seq_relationship",
            "classifier",
        ),
        norms=(
            *(block + x for x in ("attention.output.LayerNorm", "output.LayerNorm")),
            prefix + "embeddings.LayerNorm",
            "cls.predictions.transform.LayerNorm",
        ),
        embeddings=tuple(
            prefix + f"embeddings.{x}_embeddings" for x in ("word", "position", "token_type")
        ),
        plain=("cls.predictions.bias",),
        buffers=("{x*}embeddings.position_ids", "{x*}embeddings.token_type_ids"),
        layers=block,
    )


#: By the model_type of config.json; the first of two has a prefix before its names.
FAMILIES: dict[str, tuple[HFFamily, ...]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), (_LLAMA,)
    ),
    "qwen3_moe": (_QWEN3_MOE,),
    "mixtral": (_MIXTRAL,),
    "deepseek_v3": (_DEEPSEEK,),
    "gpt2": (_gpt2("transformer."), _gpt2("")),
    "bert": (_bert("bert."), _bert("")),
}


def facts_of(model: ModelFacts | None, family: str | None, prefixed: bool = True) -> Facts:
    """Return the facts of ``model``, of ``family`` if that is given.

    Raises:
        NotFoundError: no such family, or the family is unknown.
    """
    config = model.config if model else {}
    inner = text_config(config)
    text = text_type(config)
    kind = family or (model.type if model else None) or text
    if kind is None:
        raise NotFoundError(
            "the model's family is unknown without a config.json with a model_type. Specify it, "
            f"as in llama-hf:llama-mindformers (families: {', '.join(FAMILIES)})."
        )
    if kind not in FAMILIES and family is None and text in FAMILIES:
        kind = text
    if kind not in FAMILIES:
        part = f" (its text model is {text!r})" if text and text != kind else ""
        raise NotFoundError(
            f"no tables for model_type {kind!r}{part} (known: {', '.join(FAMILIES)}). Pass a "
            "mapping in TOML."
        )
    forms = FAMILIES[kind]
    return Facts(forms[0] if prefixed else forms[-1], {**config, **inner})
