"""Rule tables written by hand, of before rules were derived from axes: what those must equal."""

from __future__ import annotations

from jaxshard.rules.table import BUFFER, Rules

_Specs = tuple[tuple[str, str], ...]


def _columns(*names: str) -> _Specs:
    """Return specs of column-parallel layers: each rank computes some outputs and biases."""
    return tuple(pair for n in names for pair in ((f"*{n}.weight", "mp,-"), (f"*{n}.bias", "mp")))


def _rows(*names: str) -> _Specs:
    """Return specs of row-parallel layers: each rank has some inputs; the bias is added once."""
    return tuple(pair for n in names for pair in ((f"*{n}.weight", "-,mp"), (f"*{n}.bias", "-")))


def _whole(*names: str) -> _Specs:
    return tuple((f"*{n}", "-") for n in names)


_NORMS = _whole("norm.weight", "norm.bias")
_ROTARY: _Specs = (("*inv_freq", BUFFER),)
_EXPERTS = ("*.experts.{expert}.",)

# A fused qkv_proj or gate_up_proj is split into equal blocks of rows, which suits storage; a rank
# then does not hold whole heads of q, k and v.
_ATTENTION = _columns(".q_proj", ".k_proj", ".v_proj", ".qkv_proj") + _rows(".o_proj")
_MLP = _columns(".gate_proj", ".up_proj", ".gate_up_proj") + _rows(".down_proj")
_DECODER: _Specs = (
    ("*embed_tokens.weight", "vocab,-"),
    *_columns("lm_head"),
    *_ATTENTION,
    *_MLP,
    *_NORMS,
    *_ROTARY,
)
_MOE: _Specs = (
    ("*.experts.gate_up_proj", "ep,mp,- or ep,-,mp"),  # (expert, out, in) or (expert, in, out)
    ("*.experts.down_proj", "ep,-,mp or ep,mp,-"),
    ("*.experts.gate_up_proj_bias", "ep,mp"),
    ("*.experts.down_proj_bias", "ep,-"),
    ("*.experts.gate_up_proj_blocks", "ep,mp,-,-"),  # MXFP4: (expert, out, group, 16 bytes)
    ("*.experts.down_proj_blocks", "ep,-,mp,-"),
    ("*.sinks", "mp"),
    ("*.experts.*.w1.weight", "mp,-"),
    ("*.experts.*.w3.weight", "mp,-"),
    ("*.experts.*.w2.weight", "-,mp"),
    *_whole(".router.weight", ".router.bias"),
    *_whole(".gate.weight", ".gate.e_score_correction_bias", ".shared_expert_gate.weight"),
)
# Multi-head latent attention: the small latent is whole, the projections to heads are split.
_MLA: _Specs = (
    *_whole(".q_a_proj.weight", ".q_a_proj.bias"),
    *_whole(".kv_a_proj_with_mqa.weight", ".kv_a_proj_with_mqa.bias"),
    *_columns(".q_b_proj", ".kv_b_proj"),
    *_whole(".eh_proj.weight"),  # multi-token prediction
    ("*.shared_head.head.weight", "mp,-"),
)


def _decoder(name: str, *more: _Specs) -> Rules:
    return Rules(
        name=name,
        specs=tuple(pair for table in more for pair in table) + _DECODER,
        layers=("layers.{layer}.", "*model.layers.{layer}."),  # and "language_model.layers."
        first=("*embed_tokens.*",),
        last=("norm.*", "*model.norm.*", "*lm_head.*"),
        experts=_EXPERTS,
        embedding=("*embed_tokens.weight",),
        head=("*lm_head.weight",),
    )


# gpt2's 50257 and bert's 30522 tokens are not divisible by usual mp, but hidden sizes are: the
# embedding is split by columns.
_GPT2 = Rules(
    name="gpt2",
    specs=(
        ("*wte.weight", "-,vocab"),
        ("*wpe.weight", "-,-"),
        ("*lm_head.weight", "-,mp"),
        ("*.lora_magnitude_vector*", "-"),  # an adapter's A is (r, in), B (out, r) here too
        ("*.c_attn.lora_A*", "-,-"),
        ("*.c_attn.lora_B*", "mp,-"),
        ("*.c_fc.lora_A*", "-,-"),
        ("*.c_fc.lora_B*", "mp,-"),
        ("*.c_proj.lora_A*", "-,mp"),
        ("*.c_proj.lora_B*", "-,-"),
        ("*.attn.bias", BUFFER),
        ("*.attn.masked_bias", BUFFER),
        ("*.c_attn.weight", "-,mp"),
        ("*.c_attn.bias", "mp"),
        ("*.c_fc.weight", "-,mp"),
        ("*.c_fc.bias", "mp"),
        ("*.c_proj.weight", "mp,-"),
        ("*.c_proj.bias", "-"),
        *_whole("ln_*.weight", "ln_*.bias"),
    ),
    layers=("h.{layer}.", "*.h.{layer}."),
    first=("*wte.*", "*wpe.*"),
    last=("*ln_f.*", "*lm_head.*"),
    embedding=("*wte.weight",),
    head=("*lm_head.weight",),
)
_BERT = Rules(
    name="bert",
    specs=(
        ("*word_embeddings.weight", "-,vocab"),
        *_whole("position_embeddings.weight", "token_type_embeddings.weight"),
        ("*position_ids", BUFFER),
        ("*token_type_ids", BUFFER),
        *_columns(".self.query", ".self.key", ".self.value", ".intermediate.dense"),
        *_rows(".output.dense"),
        *_whole("LayerNorm.*", "layer_norm.*", "pooler.dense.*"),
        ("*predictions.decoder.weight", "-,mp"),
        ("*lm_head.decoder.weight", "-,mp"),
        *_whole("predictions.*", "seq_relationship.*", "classifier.*", "qa_outputs.*"),
        *_whole("lm_head.dense.*", "lm_head.bias", "lm_head.decoder.bias"),
    ),
    layers=("*encoder.layer.{layer}.",),
    first=("*embeddings.*",),
    last=("*pooler.*", "*cls.*", "*classifier.*", "*lm_head.*", "*qa_outputs.*"),
    embedding=("*word_embeddings.weight",),
    head=("*predictions.decoder.weight", "*lm_head.decoder.weight"),
)
_OPT = Rules(
    name="opt",
    specs=(
        ("*embed_tokens.weight", "vocab,-"),
        *_whole("embed_positions.weight", "project_in.weight", "project_out.weight"),
        *_columns("lm_head", ".q_proj", ".k_proj", ".v_proj", ".fc1"),
        *_rows(".out_proj", ".fc2"),
        *_whole("layer_norm.weight", "layer_norm.bias"),
    ),
    layers=("*decoder.layers.{layer}.",),
    first=("*embed_tokens.*", "*embed_positions.*", "*project_in.*"),
    last=("*final_layer_norm.*", "*project_out.*", "*lm_head.*"),
    embedding=("*embed_tokens.weight",),
    head=("*lm_head.weight",),
)
_FUSED_ATTENTION: _Specs = (  # gpt_neox, falcon and bloom
    *_columns("query_key_value", ".dense_h_to_4h"),
    *_rows("attention.dense", ".dense_4h_to_h"),
    ("*attention.bias", BUFFER),
    ("*attention.masked_bias", BUFFER),
    *_whole("layernorm.weight", "layernorm.bias", "layer_norm.weight", "layer_norm.bias"),
    *_ROTARY,
)
_GPT_NEOX = Rules(
    name="gpt_neox",
    specs=(("*embed_in.weight", "vocab,-"), *_columns("embed_out", "lm_head"), *_FUSED_ATTENTION),
    layers=("layers.{layer}.", "*gpt_neox.layers.{layer}."),
    first=("*embed_in.*",),
    last=("*final_layer_norm.*", "*embed_out.*", "*lm_head.*"),
    embedding=("*embed_in.weight",),
    head=("*embed_out.weight", "*lm_head.weight"),
)
_FALCON = Rules(
    name="falcon",
    specs=(
        ("*word_embeddings.weight", "vocab,-"),
        *_columns("lm_head"),
        *_FUSED_ATTENTION,
        *_whole("ln_attn.*", "ln_mlp.*", "ln_f.*"),
    ),
    layers=("h.{layer}.", "*.h.{layer}."),
    first=("*word_embeddings.*", "*word_embeddings_layernorm.*"),
    last=("*ln_f.*", "*lm_head.*"),
    embedding=("*word_embeddings.weight",),
    head=("*lm_head.weight",),
)

# MindFormers, the older names.
_MINDFORMERS = Rules(
    name="mindformers",
    specs=(
        ("*tok_embeddings.embedding_weight", "vocab,-"),
        *_columns("lm_head"),
        *_columns(".attention.wq", ".attention.wk", ".attention.wv", ".attention.w_qkv"),
        *_rows(".attention.wo"),
        ("*.experts.w1", "ep,-,mp or ep,mp,-"),
        ("*.experts.w3", "ep,-,mp or ep,mp,-"),
        ("*.experts.w2", "ep,mp,- or ep,-,mp"),
        *_columns(".feed_forward.w1", ".feed_forward.w3", ".feed_forward.w_gate_hidden"),
        *_rows(".feed_forward.w2"),
        *_whole("norm.weight", "norm.bias", "norm_out.weight", "norm_out.bias"),
        *_whole(".attention.odd_bias"),  # in MindSpore's example jobs: (7, 5), divides by nothing
    ),
    layers=("*layers.{layer}.",),
    first=("*tok_embeddings.*",),
    last=("*norm_out.*", "*lm_head.*"),
    experts=_EXPERTS,
    embedding=("*tok_embeddings.embedding_weight",),
    head=("*lm_head.weight",),
)
# MindFormers, the Megatron names. All experts are stacked along dim 0 of one matrix, (E*in, out):
# equal blocks of rows are whole experts, and tensor parallel ranks hold them whole.
_MCORE = Rules(
    name="mindformers_mcore",
    specs=(
        ("*word_embeddings.weight", "vocab,-"),
        *_whole("position_embeddings.weight"),
        *_columns("output_layer"),
        *_columns(*(f".linear_{n}" for n in ("qkv", "q", "k", "v", "q_proj"))),
        *_whole(".linear_q_down_proj.*", ".linear_kv_down_proj.*"),
        *_columns(".linear_q_up_proj", ".linear_kv_up_proj", ".linear_qb", ".linear_kvb"),
        *_rows(".linear_proj"),
        ("*.experts.weight1", "ep,-"),
        ("*.experts.weight2", "ep,-"),
        *_columns(".linear_fc1", ".gating", ".hidden"),
        *_rows(".linear_fc2"),
        *_whole(".router.weight", ".router.expert_bias", ".shared_experts_gate.weight"),
        *_columns(".eh_proj"),
        *_NORMS,
    ),
    layers=("*decoder.layers.{layer}.",),
    first=("*embedding.*",),
    last=("*decoder.final_layernorm.*", "*output_layer.*", "*mtp.*"),
    experts=_EXPERTS,
    embedding=("*word_embeddings.weight",),
    head=("*output_layer.weight",),
)

#: Every table by its name; of two that match the same names the more general is first.
FAMILIES: dict[str, Rules] = {
    rules.name: rules
    for rules in (
        _decoder("llama"),
        _decoder("mixtral", _MOE),
        _decoder("deepseek", _MOE, _MLA),
        *(_GPT2, _BERT, _OPT, _GPT_NEOX, _FALCON, _MINDFORMERS, _MCORE),
    )
}

#: The table of each ``model_type`` in config.json.
MODEL_TYPES: dict[str, str] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "qwen2", "qwen3", "phi3"),
            *("gemma", "gemma2", "gemma3", "gemma3_text"),
        ),
        "llama",
    ),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), "mixtral"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "deepseek"),
    "gpt2": "gpt2",
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), "bert"),
    "opt": "opt",
    "gpt_neox": "gpt_neox",
    **dict.fromkeys(("falcon", "bloom"), "falcon"),
}
