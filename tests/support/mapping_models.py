"""Tiny real models of each family, saved by transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

DECODER = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
}

#: family: (config class, model class, what the config says)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**DECODER, "head_dim": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**DECODER, **MOE}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**DECODER, "num_local_experts": 4}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**DECODER, "head_dim": 8}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**DECODER, **MLA}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {
            "vocab_size": 48,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
    ),
}


@cache
def build(family: str, dtype: str = "float32") -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    torch = pytest.importorskip("torch", reason="transformers needs torch")
    config_class, model_class, config = MODELS[family]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    return model.to(getattr(torch, dtype)).eval()


def save(family: str, where: Path, dtype: str = "float32") -> Path:
    """A folder with the model's config and weights."""
    build(family, dtype).save_pretrained(where)
    return where
