"""Random small models of each family, as Hugging Face names and shapes them, by NumPy alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxshard.core.catalog import Model
from jaxshard.mapping import Mapping as MappingOfNames
from jaxshard.mapping import table
from jaxshard.models import family_of

Arrays = dict[str, np.ndarray[Any, Any]]
DECODERS = ("llama", "qwen2", "qwen3", "gemma", "qwen3_moe", "mixtral", "deepseek_v3")
FAMILIES = (*DECODERS, "gpt2", "bert")


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model."""

    layers: int = 3
    heads: int = 4
    kv: int = 2
    head: int = 4
    hidden: int = 8
    ffn: int = 12
    vocab: int = 24
    experts: int = 4
    dense: int = 1
    mtp: int = 0
    biases: bool = False
    dtype: str = "float32"


def config_of(family: str, s: Sizes) -> dict[str, Any]:
    if family == "gpt2":
        return {"model_type": family, "n_layer": s.layers, "n_head": s.heads}
    config: dict[str, Any] = {
        "model_type": family,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
    }
    if family != "bert":
        config["num_key_value_heads"] = s.kv if family != "deepseek_v3" else s.heads
    if family in ("qwen3_moe", "mixtral", "deepseek_v3"):
        key = {"qwen3_moe": "num_experts", "mixtral": "num_local_experts"}
        config[key.get(family, "n_routed_experts")] = s.experts
    if family == "deepseek_v3":
        config |= {"first_k_dense_replace": s.dense, "num_nextn_predict_layers": s.mtp}
    return config


def random_model(family: str, s: Sizes = Sizes(), seed: int = 0) -> Arrays:
    """The tensors; copies of the embedding and the head are copies."""
    random = np.random.default_rng(seed)
    kind = np.dtype(getattr(ml_dtypes, s.dtype, s.dtype))
    found = {n: _values(random, shape, kind) for n, shape in shapes_of(family, s).items()}
    for name in found:  # what further predictions have copies of
        if name.startswith("model.layers.") and name.endswith("embed_tokens.weight"):
            found[name] = found["model.embed_tokens.weight"]
        if name.endswith("shared_head.head.weight"):
            found[name] = found["lm_head.weight"]
    return found


def _values(random: np.random.Generator, shape: tuple[int, ...], kind: np.dtype[Any]) -> Any:
    """Any bits but those of floats that are not equal to themselves."""
    if kind.kind in "iu":
        return random.integers(0, 120, shape).astype(kind)
    return random.normal(size=shape).astype(kind)


def shapes_of(family: str, s: Sizes) -> dict[str, tuple[int, ...]]:
    if family == "gpt2":
        return _gpt2(s)
    if family == "bert":
        return _bert(s)
    h = s.hidden
    found = {"model.embed_tokens.weight": (s.vocab, h), "model.norm.weight": (h,)}
    if family != "gemma":
        found["lm_head.weight"] = (s.vocab, h)
    for i in range(s.layers + (s.mtp if family == "deepseek_v3" else 0)):
        at = f"model.layers.{i}."
        inside = {
            "input_layernorm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
            **(_mla(s) if family == "deepseek_v3" else _attention(family, s)),
            **_mlp(family, s, i),
            **(_prediction(s) if i >= s.layers else {}),
        }
        found |= {at + n: shape for n, shape in inside.items()}
    return found


def _attention(family: str, s: Sizes) -> dict[str, tuple[int, ...]]:
    q, kv, h = s.heads * s.head, s.kv * s.head, s.hidden
    found: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (q, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, q),
    }
    if family == "qwen2" or s.biases:
        found |= {f"self_attn.{x}_proj.bias": (n,) for x, n in {"q": q, "k": kv, "v": kv}.items()}
    if family in ("qwen3", "qwen3_moe"):
        found |= {f"self_attn.{x}_norm.weight": (s.head,) for x in "qk"}
    return found


def _mla(s: Sizes) -> dict[str, tuple[int, ...]]:
    h, rank = s.hidden, 6
    return {
        "self_attn.q_a_proj.weight": (rank, h),
        "self_attn.q_a_layernorm.weight": (rank,),
        "self_attn.q_b_proj.weight": (s.heads * 6, rank),
        "self_attn.kv_a_proj_with_mqa.weight": (rank + 2, h),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (s.heads * 8, rank),
        "self_attn.o_proj.weight": (h, s.heads * 4),
    }


def _mlp(family: str, s: Sizes, layer: int) -> dict[str, tuple[int, ...]]:
    h, f, inner = s.hidden, s.ffn, 6
    if family == "mixtral":
        one = {"w1.weight": (inner, h), "w2.weight": (h, inner), "w3.weight": (inner, h)}
        at = "block_sparse_moe."
        experts = {f"{at}experts.{e}.{n}": x for e in range(s.experts) for n, x in one.items()}
        return {f"{at}gate.weight": (s.experts, h), **experts}
    if family == "qwen3_moe" or (family == "deepseek_v3" and layer >= s.dense):
        found = {"mlp.gate.weight": (s.experts, h)}
        for e in range(s.experts):
            found |= _gated(f"mlp.experts.{e}.", h, inner)
        if family == "deepseek_v3":
            found["mlp.gate.e_score_correction_bias"] = (s.experts,)  # type: ignore[assignment]
            found |= _gated("mlp.shared_experts.", h, inner)
        return dict(found)
    return dict(_gated("mlp.", h, f))


def _gated(at: str, h: int, f: int) -> dict[str, tuple[int, int]]:
    return {
        f"{at}gate_proj.weight": (f, h),
        f"{at}up_proj.weight": (f, h),
        f"{at}down_proj.weight": (h, f),
    }


def _prediction(s: Sizes) -> dict[str, tuple[int, ...]]:
    h = s.hidden
    return {
        "enorm.weight": (h,),
        "hnorm.weight": (h,),
        "eh_proj.weight": (h, 2 * h),
        "shared_head.norm.weight": (h,),
        "embed_tokens.weight": (s.vocab, h),
        "shared_head.head.weight": (s.vocab, h),
    }


def _gpt2(s: Sizes) -> dict[str, tuple[int, ...]]:
    h = s.hidden
    found: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (s.vocab, h),
        "transformer.wpe.weight": (16, h),
        "transformer.ln_f.weight": (h,),
        "transformer.ln_f.bias": (h,),
        "lm_head.weight": (s.vocab, h),
    }
    linear = {
        "attn.c_attn": (h, 3 * h),
        "attn.c_proj": (h, h),
        "mlp.c_fc": (h, 4 * h),
        "mlp.c_proj": (4 * h, h),
    }
    for i in range(s.layers):
        at = f"transformer.h.{i}."
        found |= {f"{at}{n}.weight": x for n, x in linear.items()}
        found |= {f"{at}{n}.bias": x[1:] for n, x in linear.items()}
        found |= {f"{at}{n}.{x}": (h,) for n in ("ln_1", "ln_2") for x in ("weight", "bias")}
    return found


def _bert(s: Sizes) -> dict[str, tuple[int, ...]]:
    h = s.hidden
    found: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (s.vocab, h),
        "bert.embeddings.position_embeddings.weight": (16, h),
        "bert.embeddings.token_type_embeddings.weight": (2, h),
        "bert.embeddings.LayerNorm.weight": (h,),
        "bert.embeddings.LayerNorm.bias": (h,),
        "cls.predictions.bias": (s.vocab,),
    }
    linear = {
        **{f"attention.self.{x}": (h, h) for x in ("query", "key", "value")},
        "attention.output.dense": (h, h),
        "intermediate.dense": (4 * h, h),
        "output.dense": (h, 4 * h),
    }
    for i in range(s.layers):
        at = f"bert.encoder.layer.{i}."
        found |= {f"{at}{n}.weight": x for n, x in linear.items()}
        found |= {f"{at}{n}.bias": x[:1] for n, x in linear.items()}
        norms = ("attention.output.LayerNorm", "output.LayerNorm")
        found |= {f"{at}{n}.{x}": (h,) for n in norms for x in ("weight", "bias")}
    return found


def write_model(where: Path, config: Mapping[str, Any], tensors: Arrays) -> Path:
    """A folder with the config and the weights, in an order that is not that of the layers."""
    where.mkdir(parents=True)
    save_file(dict(sorted(tensors.items())), where / "model.safetensors", {"format": "pt"})
    (where / "config.json").write_text(json.dumps(config))
    return where


def mapping_of(family: str, form: str, s: Sizes = Sizes()) -> MappingOfNames:
    """The table from Hugging Face's form to another."""
    return table("hf", form, Model(family, s.layers, False, config_of(family, s)))


@cache
def forms_of(family: str) -> tuple[str, ...]:
    """The other forms that a family has, for all layers and with the same values."""
    known = family_of({}, family)
    others = [f for f in known.listed if f not in ("hf", "hf-stacked", "hf-packed")]
    if family == "deepseek_v3":
        others = [f for f in others if "maxtext" not in f]  # which has no prediction layers
    return tuple(f for f in others if not any(row.steps for row in known.form(f).values()))
