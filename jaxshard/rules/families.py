"""Rule tables of known model families, recognition of families, and missing layers.

Weights of Hugging Face models are (out, in), so column-parallel layers split dim 0 and
row-parallel ones dim 1; gpt2's are (in, out). The bias of a row-parallel layer and the norm
after it are applied to the sum, and so are whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

from ..core.layout import MeshAxes, Strategy
from ..core.patterns import Patterns, numbered, template
from ..errors import LayoutError, NotFoundError, format_list
from ..models.facts import text_type
from .logical_axes import by_logical_axes
from .match import Matcher, Unmatched, towers, weight_name
from .table import BUFFER, ModelFacts, Rules

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
        heads=tuple(f"*.{x}_proj.{y}" for x in "qkv" for y in ("weight", "bias")),
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
    heads=tuple(f"*.attention.w{x}.{y}" for x in "qkv" for y in ("weight", "bias")),
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


# --- Recognition of a model's family

_ENOUGH = 0.5  # of the kinds of names; the remaining names are reported one by one


def rules_for(model: ModelFacts | None, names: Iterable[str]) -> Rules:
    """Return the rules of a model, by its type if its names agree, otherwise by its names.

    The names may be another framework's in spite of ``config.json``. Tensors outside the text
    model (a vision tower) are ``apart``: whole, on the first stage.

    Raises:
        NotFoundError: neither the type nor the names are known.

    >>> rules_for(None, ["h.0.attn.c_attn.weight", "wte.weight"]).name
    'gpt2'
    """
    kinds = {template(w): w for w in map(weight_name, names)}
    apart = towers(kinds.values(), model.config if model else {})
    if not apart:
        return _table(model, kinds)
    known = Patterns(apart)
    text = {kind: name for kind, name in kinds.items() if known.find(name, kind) is None}
    rules = _table(model, text) if text else FAMILIES["llama"]
    return replace(rules, specs=(*((p, BUFFER) for p in apart), *rules.specs), apart=apart)


def table_for(
    model: ModelFacts | None,
    names: Iterable[str],
    mesh: Strategy | MeshAxes,
    rules: Rules | None,
    unmatched: Unmatched,
) -> Rules:
    """Return the rules of a model preceded by ``rules``, or ``rules`` if the family is unknown.

    If ``rules`` are logical axis rules, those of the model are made from them, for ``mesh``.

    Names without a rule may be split by their shapes (``unmatched="largest"``); then neither is
    necessary.

    Raises:
        LayoutError: ``rules`` are not ``Rules``.
        NotFoundError: the family is unknown, and ``rules`` is missing.
    """
    names = list(names)
    table = None
    try:
        table = rules_for(model, names)
    except (LayoutError, NotFoundError):
        if rules is None and unmatched != "largest":
            raise
    if rules is not None and rules.axes is not None:
        axes = mesh.mesh_axes.axes if isinstance(mesh, Strategy) else mesh.axes
        try:
            table = by_logical_axes(model, names, rules.axes, [a for a, _ in axes], table)
        except NotFoundError:
            if unmatched != "largest":
                raise
    if table is None:
        return rules or Rules("by shape")
    return table.override(rules) if rules else table


def _table(model: ModelFacts | None, kinds: dict[str, str]) -> Rules:
    """Return the table for the names of a text model."""
    types = _types(model)
    by_type = next((FAMILIES[MODEL_TYPES[t]] for t in types if t in MODEL_TYPES), None)
    if by_type and (not kinds or _fit(by_type, kinds)[0]):
        return by_type
    best = max(FAMILIES.values(), key=lambda rules: _fit(rules, kinds))  # the first of equals
    fits, known = _fit(best, kinds)
    if by_type and not fits and _known(by_type, kinds) >= _ENOUGH:
        return by_type
    if kinds and known >= _ENOUGH:
        return best
    if by_type:
        return by_type
    kind = types[0] if types else None
    unknown = f"unknown model_type {kind!r} and" if kind else "no model_type, and unknown"
    raise NotFoundError(
        f"{unknown} tensor names ({format_list(kinds.values(), 3)}). Pass rules for the names in "
        'TOML: [specs] "*.q_proj.weight" = "mp,-" and [stages] '
        f'(known families: {", ".join(FAMILIES)}), or unmatched="largest" (--unmatched largest) '
        "to split them by their shapes."
    )


def _types(model: ModelFacts | None) -> list[str]:
    """Return the types in ``config.json``: the model's, and that of its text part."""
    if model is None:
        return []
    return [kind for kind in dict.fromkeys((model.type, text_type(model.config))) if kind]


def knows(rules: Rules, names: Iterable[str]) -> bool:
    """Return whether ``rules`` match enough of ``names``, which may be another framework's."""
    kinds = {template(w): w for w in map(weight_name, names)}
    return _known(rules, kinds) >= _ENOUGH


def _fit(rules: Rules, kinds: dict[str, str]) -> tuple[bool, float]:
    """Return whether the rules match enough kinds of names including layers, and the fraction."""
    known, layer = _known(rules, kinds), numbered(rules.layers, "layer")
    numbers = [name for kind, name in kinds.items() if kind != name]
    has_layers = not numbers or (layer is not None and any(map(layer.match, numbers)))
    return known >= _ENOUGH and has_layers, known


def _known(rules: Rules, kinds: dict[str, str]) -> float:
    """Return the fraction of the kinds of names that the rules match."""
    matcher = Matcher(rules)
    return sum(matcher.find(name, kind) is not None for kind, name in kinds.items()) / max(
        len(kinds), 1
    )


# --- Completeness of a model by the names of its tensors

_MAX_LISTED = 4


def missing_layers(model: ModelFacts | None, names: Iterable[str]) -> str:
    """Describe the layers of a known family that ``names`` lack, or return ""."""
    rules, names = _rules(model, list(names))
    if rules is None:
        return ""
    seen, count = _layers(rules, names), _count(rules, model, names)
    num_gone = count - sum(number < count for number in seen)
    if not num_gone:
        return ""
    # an untrusted config.json may state any number of layers: only the first few are listed
    first = islice((str(n) for n in range(count) if n not in seen), _MAX_LISTED)
    more = f" and {num_gone - _MAX_LISTED} more" if num_gone > _MAX_LISTED else ""
    return f"layers {', '.join(first)}{more} of {count} are missing"


def _rules(model: ModelFacts | None, names: list[str]) -> tuple[Rules | None, list[str]]:
    """Return the table that matches the names, or None, and the names of the text model."""
    try:
        rules = rules_for(model, names)
    except (LayoutError, NotFoundError):
        return None, names
    apart = Patterns(rules.apart)
    text = [name for name in names if apart.find(name, template(name)) is None]
    return (rules if knows(rules, text) else None), text


def _layers(rules: Rules, names: list[str]) -> set[int]:
    layer = numbered(rules.layers, "layer")
    found = [layer.match(name) for name in names] if layer else []
    return {int(match[match.lastindex or 0]) for match in found if match}


def _count(rules: Rules, model: ModelFacts | None, names: list[str]) -> int:
    """Return the expected number of layers, 0 if no name has a number."""
    seen = _layers(rules, names)
    return max(max(seen) + 1, (model and model.num_layers) or 0) if seen else 0


def missing_parts(model: ModelFacts | None, names: Iterable[str]) -> str:
    """Describe the parts of a known family that ``names`` lack, or return "".

    >>> missing_parts(None, [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2)])
    'layers 1 of 3 are missing'
    """
    rules, names = _rules(model, list(names))
    count = _count(rules, model, names) if rules else 0
    if rules is None or not count:
        return ""
    if gone := missing_layers(model, names):
        return gone
    kinds = {template(name): name for name in names}
    has_first, has_last = (
        any(Patterns(patterns).find(name, kind) is not None for kind, name in kinds.items())
        for patterns in (rules.first, rules.last)
    )
    if rules.first and rules.last and has_first != has_last:
        side = "after the last layer" if has_first else "before the first layer"
        looked = rules.last if has_first else rules.first
        return f"it has layers 0 to {count - 1} and nothing {side} ({', '.join(looked)})"
    return ""
