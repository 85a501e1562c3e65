"""Tunix's own model classes, from its installed distribution.

Importing the package itself would import its trainers and samplers. So its packages are replaced
by empty ones with the same folders, and only modules of models are imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import jax.numpy as jnp
from flax import nnx

_MODULES = {
    "llama": "llama3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3_text": "gemma3",
}


def is_installed() -> bool:
    """Whether Tunix's models can be imported."""
    try:
        distribution("google-tunix")
    except PackageNotFoundError:
        return False
    return all(map(importlib.util.find_spec, ("einops", "jaxtyping")))


def _module(name: str) -> Any:
    root = distribution("google-tunix").locate_file("tunix")
    for package in ("", ".generate", ".utils", ".models"):
        empty = types.ModuleType("tunix" + package)
        empty.__path__ = [str(root) + package.replace(".", "/")]
        sys.modules.setdefault("tunix" + package, empty)
    return importlib.import_module(f"tunix.models.{name}.model")


def model(kind: str, config: Any) -> nnx.Module:
    """Make Tunix's model for the configuration of transformers' model of the same ``kind``."""
    module = _module(_MODULES[kind])
    sizes = {
        "num_layers": config.num_hidden_layers,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
    }
    rngs = nnx.Rngs(0)
    if not kind.startswith("gemma"):
        sizes |= {
            "vocab_size": config.vocab_size,
            "rope_theta": config.rope_parameters["rope_theta"],
            "norm_eps": config.rms_norm_eps,
        }
        if kind == "qwen3_moe":
            sizes |= {
                "num_experts": config.num_experts,
                "num_experts_per_tok": config.num_experts_per_tok,
                "hidden_dim": config.moe_intermediate_size,
            }
        tied = "weight_tying" if kind == "llama" else "use_tied_embedding"
        sizes[tied] = config.tie_word_embeddings
        made = {"llama": "Llama3", "qwen2": "Qwen2"}.get(kind, "Qwen3")
        return getattr(module, made)(module.ModelConfig(**sizes), rngs=rngs)
    sizes |= {"num_embed": config.vocab_size, "sliding_window_size": 16}
    if kind == "gemma3_text":
        sizes |= {"global_base_frequency": 1_000_000, "param_dtype": "float32"}
        return module.Gemma3(module.ModelConfig(**sizes), rngs=rngs)
    local, whole = module.AttentionType.LOCAL_SLIDING, module.AttentionType.GLOBAL
    two = kind == "gemma2"
    sizes |= {
        "final_logit_softcap": 30.0 if two else None,
        "attn_logits_soft_cap": 50.0 if two else None,
        "use_post_attn_norm": two,
        "use_post_ffw_norm": two,
        "attention_types": tuple(
            local if two and i % 2 == 0 else whole for i in range(config.num_hidden_layers)
        ),
    }
    return module.Gemma(module.ModelConfig(**sizes), rngs=rngs)


def logits(model: nnx.Module, ids: Any) -> Any:
    """Run a model on token ids of shape (batch, length)."""
    batch, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
    made = model(jnp.asarray(ids), positions, None, causal)
    return made[0] if isinstance(made, tuple) else made
