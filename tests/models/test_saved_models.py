"""Names and shapes of models that transformers 5.24 saved, and names as models are published.

``tests/support/tiny_models.py`` writes the former, in ``saved_models.jsonl``. The latter are those
of the index files on the Hugging Face Hub.
"""

from __future__ import annotations

import json
import pathlib

import pytest

from jaxshard.core.patterns import Patterns, template
from jaxshard.models import Sizes, family_of
from jaxshard.rules.match import towers

SAVED = [
    json.loads(line)
    for line in pathlib.Path(__file__).with_name("saved_models.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("model", SAVED, ids=[m["kind"] for m in SAVED])
def test_saved_tensors_have_rows_whose_axes_are_their_shapes(model):
    config, shapes = model["config"], {n: tuple(s) for n, s in model["tensors"].items()}
    apart = Patterns(towers(shapes, config))
    text = {n: s for n, s in shapes.items() if apart.find(n, template(n)) is None}
    family = family_of(config, names=text)
    form, left = Sizes(family, config).form_of(text)
    assert left == ()
    sizes = Sizes(family, config).seeing(form, text)
    for name, shape in text.items():
        axes = family.form(form)[family.find(form, name)].axes
        assert tuple(map(sizes.length, axes.dims)) == shape, name


MOE_LAYER = """
    model.layers.3.input_layernorm.weight model.layers.3.mlp.gate.weight
    model.layers.3.mlp.experts.7.gate_proj.weight model.layers.3.mlp.experts.7.down_proj.weight
"""
#: by model: the form, the type, and names of its tensors
PUBLISHED = {
    "gpt2": (
        "hf",
        "gpt2",
        "wte.weight wpe.weight h.0.attn.bias h.0.attn.c_attn.weight h.0.ln_1.bias ln_f.weight",
    ),
    "bloom": (
        "hf",
        "bloom",
        "word_embeddings.weight h.0.self_attention.query_key_value.bias h.0.mlp.dense_4h_to_h.bias",
    ),
    "pythia": (
        "hf",
        "gpt_neox",
        "gpt_neox.embed_in.weight gpt_neox.layers.0.attention.bias embed_out.weight "
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq gpt_neox.layers.0.attention.dense.weight",
    ),
    "bert-base-uncased": (
        "hf-gamma",
        "bert",
        "bert.embeddings.LayerNorm.beta bert.encoder.layer.0.output.LayerNorm.gamma "
        "cls.predictions.bias cls.predictions.transform.LayerNorm.gamma bert.pooler.dense.weight "
        "cls.seq_relationship.weight",
    ),
    "xlm-roberta-base": (
        "hf",
        "xlm-roberta",
        "roberta.embeddings.position_ids roberta.encoder.layer.0.attention.self.query.weight "
        "lm_head.dense.weight lm_head.layer_norm.bias lm_head.bias lm_head.decoder.weight",
    ),
    "all-MiniLM-L6-v2": (
        "hf",
        "bert",
        "embeddings.LayerNorm.weight embeddings.position_ids encoder.layer.0.output.dense.weight "
        "pooler.dense.weight",
    ),
    "Mixtral-8x7B": (
        "hf",
        "mixtral",
        "model.layers.0.block_sparse_moe.experts.7.w2.weight "
        "model.layers.0.block_sparse_moe.gate.weight lm_head.weight",
    ),
    "gpt-oss-20b": (
        "hf-mxfp4",
        "gpt_oss",
        "model.layers.0.mlp.experts.gate_up_proj_blocks model.layers.0.mlp.experts.down_proj_bias "
        "model.layers.0.mlp.experts.down_proj_scales model.layers.0.self_attn.sinks",
    ),
    "DeepSeek-V3": (
        "hf",
        "deepseek_v3",
        MOE_LAYER
        + "model.layers.61.eh_proj.weight model.layers.61.embed_tokens.weight "
        + "model.layers.61.shared_head.head.weight model.layers.61.enorm.weight",
    ),
    "GLM-4.5": (
        "hf",
        "glm4_moe",
        MOE_LAYER
        + "model.layers.92.eh_proj.weight model.layers.92.shared_head.norm.weight "
        + "model.layers.92.mlp.experts.7.up_proj.weight model.layers.3.self_attn.k_proj.bias",
    ),
    "Qwen3-Next": (
        "hf",
        "qwen3_next",
        MOE_LAYER
        + "model.layers.0.linear_attn.in_proj_qkvz.weight model.layers.0.linear_attn.A_log "
        + "mtp.fc.weight mtp.pre_fc_norm_hidden.weight mtp.layers.0.mlp.experts.7.up_proj.weight "
        + "mtp.layers.0.self_attn.q_proj.weight mtp.norm.weight",
    ),
    "ERNIE-4.5-21B-A3B": (
        "hf",
        "ernie4_5_moe",
        MOE_LAYER
        + "model.layers.3.mlp.moe_statics.e_score_correction_bias model.mtp_linear_proj.0.weight "
        + "model.mtp_block.0.mlp.down_proj.weight model.mtp_emb_norm.0.weight",
    ),
    "Llama-4-Scout": (
        "hf",
        "llama4",
        "language_model.model.layers.0.feed_forward.experts.gate_up_proj "
        "language_model.model.embed_tokens.weight language_model.lm_head.weight",
    ),
    "gemma-3-4b": (
        "hf",
        "gemma3_text",
        "language_model.model.layers.0.self_attn.q_norm.weight language_model.model.norm.weight",
    ),
    "Qwen2.5-VL": (
        "hf",
        "qwen2_5_vl",
        "model.layers.0.self_attn.q_proj.bias model.embed_tokens.weight lm_head.weight",
    ),
    "MiniCPM-V": (
        "hf",
        "qwen2",
        "llm.model.layers.0.self_attn.q_proj.bias llm.model.embed_tokens.weight llm.lm_head.weight",
    ),
    "Qwen3-VL": (
        "hf",
        "qwen3_vl",
        "model.language_model.layers.0.self_attn.q_norm.weight model.language_model.norm.weight",
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_names_have_rows(model):
    form, kind, names = PUBLISHED[model]
    names = names.split()
    family = family_of({"model_type": kind}, names=names)
    assert family.form_of(names) == (form, ())


@pytest.mark.parametrize(
    ("form", "gate_up", "down"),
    [("hf", (4, 16, 12), (4, 6, 16)), ("hf-stacked", (4, 12, 16), (4, 16, 6))],
)
def test_forms_with_equal_names_are_told_apart_by_shapes(form, gate_up, down):
    """Published experts of Qwen3-VL are (in, out), those that transformers 5 saves (out, in)."""
    config = {"hidden_size": 16, "moe_intermediate_size": 6, "num_experts": 4}
    config = {"model_type": "qwen3_vl_moe", "text_config": config}
    layer = "model.language_model.layers.0.mlp.experts."
    shapes = {layer + "gate_up_proj": gate_up, layer + "down_proj": down}
    family = family_of(config, names=shapes)
    assert Sizes(family, config).form_of(shapes) == (form, ())
