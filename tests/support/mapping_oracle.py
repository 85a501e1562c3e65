"""What each form of a model's weights is, computed from Hugging Face's by NumPy, rule by rule.

The names are as MindFormers makes them (strings replaced in a fixed order), or written out
one by one; nothing here knows jaxshard.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]
Source = Mapping[str, np.ndarray[Any, Any]]

#: In this order: MindFormers' convert_weight of its older llama.
LEGACY = (
    ("embed_tokens.", "tok_embeddings."),
    (".self_attn.q_proj.", ".attention.wq."),
    (".self_attn.k_proj.", ".attention.wk."),
    (".self_attn.v_proj.", ".attention.wv."),
    (".self_attn.o_proj.", ".attention.wo."),
    (".mlp.gate_proj.", ".feed_forward.w1."),
    (".mlp.down_proj.", ".feed_forward.w2."),
    (".mlp.up_proj.", ".feed_forward.w3."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".norm.", ".norm_out."),
    ("output.", "lm_head."),
    (".tok_embeddings.weight", ".tok_embeddings.embedding_weight"),
)
#: In this order: the weight_mapping of its Megatron-like models.
MCORE = (
    ("model.embed_tokens.", "embedding.word_embeddings."),
    (".self_attn.q_proj.", ".self_attention.linear_q."),
    (".self_attn.k_proj.", ".self_attention.linear_k."),
    (".self_attn.v_proj.", ".self_attention.linear_v."),
    (".self_attn.o_proj.", ".self_attention.linear_proj."),
    (".self_attn.q_norm.", ".self_attention.q_layernorm."),
    (".self_attn.k_norm.", ".self_attention.k_layernorm."),
    (".self_attn.q_a_proj.", ".self_attention.linear_q_down_proj."),
    (".self_attn.q_a_layernorm.", ".self_attention.q_layernorm."),
    (".self_attn.q_b_proj.", ".self_attention.linear_q_up_proj."),
    (".self_attn.kv_a_proj_with_mqa.", ".self_attention.linear_kv_down_proj."),
    (".self_attn.kv_a_layernorm.", ".self_attention.kv_layernorm."),
    (".self_attn.kv_b_proj.", ".self_attention.linear_kv_up_proj."),
    (".mlp.gate.e_score_correction_bias", ".mlp.router.expert_bias"),
    (".mlp.gate.weight", ".mlp.router.weight"),
    (".gate_proj.", ".gating."),
    (".up_proj.", ".hidden."),
    (".down_proj.", ".linear_fc2."),
    (".post_attention_layernorm.", ".pre_mlp_layernorm."),
    ("model.norm.", "decoder.final_layernorm."),
    ("lm_head.", "output_layer."),
    ("model.layers.", "decoder.layers."),
)
_COPIES = ("embed_tokens.weight", "shared_head.head.weight")


def replaced(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        name = name.replace(old, new)
    return name


def legacy(source: Source) -> Arrays:
    return {replaced(n, LEGACY): x for n, x in source.items()}


def legacy_concat(source: Source, kv: int) -> Arrays:
    found = legacy(source)
    for name in [n for n in found if ".attention.wq." in n]:
        names = [name.replace(".wq.", f".w{x}.") for x in "qkv"]
        q, k, v = (found.pop(n) for n in names)
        found[name.replace(".wq.", ".w_qkv.")] = by_kv_head(q, k, v, kv)
    for name in [n for n in found if ".feed_forward.w1." in n]:
        gate, hidden = found.pop(name), found.pop(name.replace(".w1.", ".w3."))
        found[name.replace(".w1.", ".w_gate_hidden.")] = row_by_row(gate, hidden)
    return found


def mcore(source: Source, layers: int | None = None) -> Arrays:
    """For inference; ``layers`` of a model with a further prediction, which has the one after."""
    found = {}
    at = f"model.layers.{layers}."
    further = (
        *((at + part, "decoder." + part) for part in ("enorm.", "hnorm.", "eh_proj.")),
        (at, "decoder.transformer."),
    )
    for name, x in source.items():
        if name.removeprefix(at) not in _COPIES:
            found[replaced(replaced(name, further), MCORE)] = x
    return found


def mcore_fused(
    source: Source, kv: int | None, layers: int | None = None, *, interleaved: bool = True
) -> Arrays:
    """For training; ``kv`` is None where q, k and v are not fused (MLA)."""
    found = {}
    further = (
        ("decoder.transformer.shared_head.norm.", "mtp.layers.0.final_layernorm."),
        ("decoder.transformer.", "mtp.layers.0.transformer_layer."),
        *((f"decoder.{x}.", f"mtp.layers.0.{x}.") for x in ("enorm", "hnorm", "eh_proj")),
    )
    for name, x in mcore(source, layers).items():
        found[replaced(name, further)] = x
    for name in [n for n in found if kv and ".linear_q." in n]:
        q, k, v = (found.pop(name.replace(".linear_q.", f".linear_{x}.")) for x in "qkv")
        found[name.replace(".linear_q.", ".linear_qkv.")] = by_kv_head(q, k, v, kv or 1)
    for name in [n for n in found if n.endswith(".experts.0.gating.weight")]:
        at = name.removesuffix("0.gating.weight")
        ones, twos = [], []
        number = 0
        while f"{at}{number}.gating.weight" in found:
            gate, up, down = (
                found.pop(f"{at}{number}.{x}.weight") for x in ("gating", "hidden", "linear_fc2")
            )
            ones.append(np.concatenate([gate.T, up.T], axis=1))
            twos.append(down.T)
            number += 1
        found[at + "weight1"] = np.concatenate(ones)
        found[at + "weight2"] = np.concatenate(twos)
    for name in [n for n in found if n.endswith(".gating.weight")]:
        gate, up = found.pop(name), found.pop(name.replace(".gating.", ".hidden."))
        fused = row_by_row(gate, up) if interleaved else np.concatenate([gate, up])
        found[name.replace(".gating.", ".linear_fc1.")] = fused
    return found


def by_kv_head(q: Any, k: Any, v: Any, kv: int) -> Any:
    """Each kv head's q rows, then its k rows, then its v rows."""
    rest = q.shape[1:]
    parts = [x.reshape(kv, x.shape[0] // kv, *rest) for x in (q, k, v)]
    return np.concatenate(parts, axis=1).reshape(-1, *rest)


def row_by_row(a: Any, b: Any) -> Any:
    return np.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


# --- forms of JAX programs, of Llama's relatives ------------------------------------------


def nnx(source: Source) -> Arrays:
    return {_nnx_name(n): _kernel(n, x) for n, x in source.items()}


def _nnx_name(name: str) -> str:
    if name.endswith("norm.weight"):
        return name.removesuffix("weight") + "scale"
    if name.endswith("embed_tokens.weight"):
        return name.removesuffix("weight") + "embedding"
    return name.removesuffix("weight") + "kernel" if name.endswith("weight") else name


def _kernel(name: str, x: Any) -> Any:
    return x.T if _nnx_name(name).endswith("kernel") else x


def linen(source: Source) -> Arrays:
    return {
        "params." + re.sub(r"\.layers\.(\d+)\.", r".layers_\1.", n): x
        for n, x in nnx(source).items()
    }


def nnx_scan(source: Source) -> Arrays:
    return _stacked(nnx(source), r"\.layers\.(\d+)\.", ".layers.", 0)


def linen_scan(source: Source) -> Arrays:
    return {"params." + n: x for n, x in nnx_scan(source).items()}


def _stacked(arrays: Source, expression: str, instead: str, axis: int) -> Arrays:
    found: Arrays = {}
    sets: dict[str, dict[int, Any]] = {}
    for name, x in arrays.items():
        layer = re.search(expression, name)
        if layer:
            sets.setdefault(re.sub(expression, instead, name), {})[int(layer[1])] = x
        else:
            found[name] = x
    return found | {n: np.stack([s[i] for i in sorted(s)], axis) for n, s in sets.items()}


MAXTEXT = {
    "self_attn.q_proj.weight": "self_attention.query.kernel",
    "self_attn.k_proj.weight": "self_attention.key.kernel",
    "self_attn.v_proj.weight": "self_attention.value.kernel",
    "self_attn.o_proj.weight": "self_attention.out.kernel",
    "self_attn.q_proj.bias": "self_attention.query.bias",
    "self_attn.k_proj.bias": "self_attention.key.bias",
    "self_attn.v_proj.bias": "self_attention.value.bias",
    "self_attn.q_norm.weight": "self_attention.query_norm.scale",
    "self_attn.k_norm.weight": "self_attention.key_norm.scale",
    "mlp.gate_proj.weight": "mlp.wi_0.kernel",
    "mlp.up_proj.weight": "mlp.wi_1.kernel",
    "mlp.down_proj.weight": "mlp.wo.kernel",
    "input_layernorm.weight": "pre_self_attention_layer_norm.scale",
    "post_attention_layernorm.weight": "post_self_attention_layer_norm.scale",
}
TUNIX = {
    "self_attn.q_proj.weight": "attn.q_proj.w",
    "self_attn.k_proj.weight": "attn.k_proj.w",
    "self_attn.v_proj.weight": "attn.v_proj.w",
    "self_attn.o_proj.weight": "attn.o_proj.w",
    "self_attn.q_proj.bias": "attn.q_bias",
    "self_attn.k_proj.bias": "attn.k_bias",
    "self_attn.v_proj.bias": "attn.v_bias",
    "self_attn.q_norm.weight": "attn.q_norm.w",
    "self_attn.k_norm.weight": "attn.k_norm.w",
    "mlp.gate_proj.weight": "mlp.gate_proj.kernel",
    "mlp.up_proj.weight": "mlp.up_proj.kernel",
    "mlp.down_proj.weight": "mlp.down_proj.kernel",
    "input_layernorm.weight": "input_layernorm.w",
    "post_attention_layernorm.weight": "post_attention_layernorm.w",
}


def _inner(name: str, x: Any, heads: int, kv: int, *, split_biases: bool) -> Any:
    """One layer's tensor, (in, out) with the heads apart."""
    part = name.split(".")[-2]
    count = {"q_proj": heads, "k_proj": kv, "v_proj": kv}.get(part)
    if name.endswith("bias"):
        return x.reshape(count, -1) if split_biases else x
    if count:
        return x.T.reshape(x.shape[1], count, -1)  # (hidden, heads, d)
    if part == "o_proj":
        return x.T.reshape(heads, -1, x.shape[0])  # (heads, d, hidden)
    return x.T if name.startswith("mlp.") else x


def maxtext(source: Source, heads: int, kv: int) -> Arrays:
    outer = {
        "model.embed_tokens.weight": "params.token_embedder.embedding",
        "model.norm.weight": "params.decoder.decoder_norm.scale",
        "lm_head.weight": "params.decoder.logits_dense.kernel",
    }
    one: Arrays = {}
    for name, x in source.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if layer:
            inside = _inner(layer[2], x, heads, kv, split_biases=True)
            one[f"params.decoder.layers.{layer[1]}.{MAXTEXT[layer[2]]}"] = inside
        else:
            one[outer[name]] = x.T if name == "lm_head.weight" else x
    return _stacked(one, r"\.layers\.(\d+)\.", ".layers.", 1)


def tunix(source: Source, heads: int, kv: int) -> Arrays:
    outer = {
        "model.embed_tokens.weight": "embedder.input_embedding",
        "model.norm.weight": "final_norm.w",
        "lm_head.weight": "lm_head.w",
    }
    found: Arrays = {}
    for name, x in source.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if layer:
            inside = _inner(layer[2], x, heads, kv, split_biases=False)
            found[f"layers.{layer[1]}.{TUNIX[layer[2]]}"] = inside
        else:
            found[outer[name]] = x.T if name == "lm_head.weight" else x
    return found
