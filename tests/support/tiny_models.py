"""Tiny models of transformers with random weights, whose axes have pairwise different lengths.

Some families have one length for two axes: the hidden units of GPT-2 are 12 heads of 10.

As a program it writes ``tests/models/saved_models.jsonl``: for each model, what the tables read of
its config.json, and the name and shape of one tensor of each kind.
"""

from __future__ import annotations

import json
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

import jaxshard.models
from jaxshard.core.patterns import template

transformers.logging.set_verbosity_error()

ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
PLAIN = dict(vocab_size=104, num_hidden_layers=3, tie_word_embeddings=False, **ENDS)
#: hidden units are the heads' values together
SQUARE = dict(
    **PLAIN,
    hidden_size=120,
    intermediate_size=72,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=32,
)
DECODER = {**SQUARE, "hidden_size": 84, "head_dim": 10}
TIED = {**DECODER, "tie_word_embeddings": True}
MOE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}
#: of one group, because a group of experts is chosen before the experts in it
GROUPED = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
}
LATENT = dict(
    **GROUPED,
    kv_lora_rank=14,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=9,
)
MLA = {**SQUARE, **LATENT, "hidden_size": 84, "num_key_value_heads": 12}
BERT = {**SQUARE, "type_vocab_size": 2, "tie_word_embeddings": True}
FALCON = {**SQUARE, "bias": True, "ffn_hidden_size": 72}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_conv_kernel_dim": 5,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 14,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "partial_rotary_factor": 1.0,
}
ERNIE_MOE = {
    "moe_intermediate_size": 24,
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "use_bias": True,
}

#: by kind: the model's class, its configuration's, and the settings
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    kind: (f"{stem}ForCausalLM", f"{stem}Config", settings)
    for kind, stem, settings in (
        ("llama", "Llama", DECODER),
        ("llama_bias", "Llama", {**DECODER, "attention_bias": True, "mlp_bias": True}),
        ("mistral", "Mistral", DECODER),
        ("qwen2", "Qwen2", SQUARE),
        ("qwen3", "Qwen3", DECODER),
        ("gemma", "Gemma", TIED),
        ("gemma2", "Gemma2", TIED),
        ("mixtral", "Mixtral", {**DECODER, "num_local_experts": 8, "num_experts_per_tok": 3}),
        ("qwen2_moe", "Qwen2Moe", {**SQUARE, **MOE, "shared_expert_intermediate_size": 64}),
        ("qwen3_moe", "Qwen3Moe", {**DECODER, **MOE}),
        ("qwen3_moe_mixed", "Qwen3Moe", {**DECODER, **MOE, "mlp_only_layers": [1]}),
        ("deepseek_v2", "DeepseekV2", {**MLA, "q_lora_rank": 16}),
        ("deepseek_v2_lite", "DeepseekV2", {**MLA, "q_lora_rank": None}),
        ("deepseek_v3", "DeepseekV3", {**MLA, "q_lora_rank": 16}),
        ("opt", "OPT", {**SQUARE, "ffn_dim": 72, "word_embed_proj_dim": 120}),
        (
            "opt_350m",
            "OPT",
            {**SQUARE, "ffn_dim": 72, "word_embed_proj_dim": 56, "do_layer_norm_before": False},
        ),
        ("gpt_neox", "GPTNeoX", {**SQUARE, "rotary_pct": 1.0}),
        ("falcon", "Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 4}),
        ("falcon_7b", "Falcon", {**FALCON, "new_decoder_architecture": False, "multi_query": True}),
        (
            "falcon_rw",
            "Falcon",
            {
                **FALCON,
                "new_decoder_architecture": False,
                "multi_query": False,
                "parallel_attn": False,
                "alibi": True,
            },
        ),
        ("bloom", "Bloom", {**PLAIN, "hidden_size": 120, "n_head": 12, "n_layer": 3}),
        ("phi3", "Phi3", SQUARE),
        ("olmo2", "Olmo2", SQUARE),
        ("olmo3", "Olmo3", SQUARE),
        ("smollm3", "SmolLM3", SQUARE),
        ("granite", "Granite", SQUARE),
        (
            "glm4_moe",
            "Glm4Moe",
            {**DECODER, **GROUPED, "use_qk_norm": True, "partial_rotary_factor": 1.0},
        ),
        ("ministral", "Ministral", DECODER),
        ("ministral3", "Ministral3", DECODER),
        ("seed_oss", "SeedOss", DECODER),
        ("ernie4_5", "Ernie4_5", {**DECODER, "use_bias": True}),
        ("ernie4_5_moe", "Ernie4_5_Moe", {**SQUARE, **ERNIE_MOE}),
        ("gpt_oss", "GptOss", {**DECODER, "num_local_experts": 8, "num_experts_per_tok": 3}),
        (
            "qwen3_next",
            "Qwen3Next",
            {**DECODER, **MOE, **LINEAR, "shared_expert_intermediate_size": 64},
        ),
    )
}
MODELS |= {
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", TIED),
    "llama4_text": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **DECODER,
            "intermediate_size_mlp": 88,
            "num_local_experts": 8,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 1, 1],
            "use_qk_norm": True,
        },
    ),
    "llama_labels": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**DECODER, "num_labels": 7, "pad_token_id": 0},
    ),
    "bert_labels": (
        "BertForSequenceClassification",
        "BertConfig",
        {**BERT, "pad_token_id": 0, "num_labels": 7},
    ),
    "roberta_labels": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**BERT, "pad_token_id": 1, "num_labels": 7},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(**PLAIN, n_embd=120, n_head=12, n_layer=3, n_positions=32, n_inner=72),
    ),
    "bert": ("BertForMaskedLM", "BertConfig", {**BERT, "pad_token_id": 0}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**BERT, "pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", {**BERT, "pad_token_id": 1}),
    "camembert": ("CamembertForMaskedLM", "CamembertConfig", {**BERT, "pad_token_id": 1}),
}

#: the sizes of encoders of images
VISION = {"hidden_size": 32, "intermediate_size": 44, "image_size": 28, "patch_size": 14}
TOWER = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_TOWER = {**VISION, "depth": 2, "num_heads": 4, "fullatt_block_indexes": [1]}
QWEN3_TOWER = {**QWEN_TOWER, "deepstack_visual_indexes": [1], "num_position_embeddings": 16}
LLAMA4_TOWER = {
    **TOWER,
    "intermediate_size": 88,
    "vision_output_dim": 20,
    "projector_input_dim": 20,
    "projector_output_dim": 20,
}
PIXTRAL_TOWER = {**TOWER, "model_type": "pixtral", "head_dim": 8}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 2]}


def _text(kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **MODELS.get(kind, ("", "", {}))[2], **more}


MULTIMODAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    kind: (f"{stem}ForConditionalGeneration", f"{stem}Config", {**settings, **ids})
    for ids in ({"image_token_index": 100, "image_token_id": 100},)
    for kind, stem, settings in (
        (
            "mistral3",
            "Mistral3",
            {
                "text_config": _text("mistral"),
                "vision_config": PIXTRAL_TOWER,
                "tie_word_embeddings": False,
            },
        ),
        (
            "llava",
            "Llava",
            {
                "text_config": _text("llama"),
                "vision_config": {**TOWER, "model_type": "clip_vision_model"},
            },
        ),
        (
            "gemma3",
            "Gemma3",
            {
                "text_config": _text("gemma3_text"),
                "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
                "mm_tokens_per_image": 4,
            },
        ),
        (
            "qwen2_vl",
            "Qwen2VL",
            {
                "text_config": {**SQUARE, "rope_parameters": ROPE},
                "vision_config": {**QWEN_TOWER, "embed_dim": 32, "hidden_size": 120},
                "tie_word_embeddings": False,
            },
        ),
        (
            "qwen2_5_vl",
            "Qwen2_5_VL",
            {
                "text_config": {**SQUARE, "rope_parameters": ROPE},
                "vision_config": {**QWEN_TOWER, "out_hidden_size": 120},
                "tie_word_embeddings": False,
            },
        ),
        (
            "qwen3_vl",
            "Qwen3VL",
            {
                "text_config": {**DECODER, "rope_parameters": ROPE},
                "vision_config": {**QWEN3_TOWER, "out_hidden_size": 84},
                "tie_word_embeddings": False,
            },
        ),
        (
            "qwen3_vl_moe",
            "Qwen3VLMoe",
            {
                "text_config": {**DECODER, **MOE, "rope_parameters": ROPE},
                "vision_config": {**QWEN3_TOWER, "out_hidden_size": 84},
                "tie_word_embeddings": False,
            },
        ),
        (
            "llama4",
            "Llama4",
            {"text_config": _text("llama4_text"), "vision_config": LLAMA4_TOWER},
        ),
    )
}
MODELS |= MULTIMODAL


def tiny(kind: str) -> torch.nn.Module:
    """Make the model, every parameter of it random: none is 0 or 1, so none can be left out."""
    torch.set_num_threads(1)
    model_class, config_class, settings = MODELS[kind]
    config = getattr(transformers, config_class)(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for values in model.state_dict().values():
            if values.is_floating_point():
                scale = 0.5 if values.ndim == 1 else 1.5 / values.shape[-1] ** 0.5
                values.normal_(0.5 if values.ndim == 1 else 0.0, scale)
    return model.eval()


def saved(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return config.json and the tensors of a saved model."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return json.loads((folder / "config.json").read_text()), tensors


def recorded(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return what is kept of a saved model: facts that tables read, and a tensor of each kind."""
    tables = pathlib.Path(jaxshard.models.__file__).parent / "tables"
    words = {w for f in tables.iterdir() for w in re.findall(r"\w+", f.read_text())}

    def facts(of: Mapping[str, Any]) -> dict[str, Any]:
        found = {k: facts(v) if isinstance(v, dict) else v for k, v in of.items() if k in words}
        return {k: v for k, v in found.items() if v is not None and v != {}}

    text = {"text_config": facts(config["text_config"])} if "text_config" in config else {}
    kinds = {(template(n), x.shape): n for n, x in reversed(tensors.items())}
    shapes = {n: list(tensors[n].shape) for n in sorted(kinds.values())}
    return {"config": {**facts(config), **text}, "tensors": shapes}


if __name__ == "__main__":
    for kind in MODELS:
        with tempfile.TemporaryDirectory() as name:
            tiny(kind).save_pretrained(name)
            found = recorded(*saved(pathlib.Path(name)))
        print(json.dumps({"kind": kind, "version": transformers.__version__, **found}))
