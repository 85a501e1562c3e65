"""Forms of weights in JAX programs and in MindFormers.

    nnx       model.layers.0.self_attn.q_proj.kernel (in, out), norms .scale, .embedding
    linen     the same under params, layers_0
    …-scan    layers stacked along a new first dim
    maxtext   a tree like MaxText's: heads apart, layers stacked along dim 1
    tunix     a tree like Tunix's: heads apart, layers apart

    hf                                mindformers             mcore
    model.layers.0.self_attn.q_proj   model.layers.0.         decoder.layers.0.self_attention.
                                        attention.wq            linear_q

Only names and shapes are mapped. Programs that also store other values (a query scaled by
1/√d, rotary halves in another order) must convert those themselves.
"""

from __future__ import annotations

from ...errors import LayoutError
from ..group_ops import ROWS, Fuse, Stack, Tie
from ..mapping import Mapping
from ..ops import Drop, Expect, Merge, Op, Rename, Split, Transpose
from .hf_weights import LAYER, Facts


def nnx(facts: Facts) -> Mapping:
    """Return the mapping to NNX names, with kernels instead of weights."""
    return Mapping((*_before(facts), *_kernels(facts), Expect(_kernel_names(facts), "nnx")))


def linen(facts: Facts) -> Mapping:
    """Return the mapping to Linen names: as ``nnx``, with ``layers_0`` under params."""
    layers = facts.family.layers
    inside = layers.replace(".{layer}.", "_{layer}.")
    rules = (
        (layers + "{x*}", "params." + inside + "{x*}"),
        ("{x*}", "params.{x*}"),
    )
    names = tuple("params." + n.replace(layers, inside) for n in _kernel_names(facts))
    return Mapping((*_before(facts), *_kernels(facts), Rename(rules), Expect(names, "linen")))


def nnx_scan(facts: Facts) -> Mapping:
    """Return the mapping to NNX names with stacked layers.

    Leading layers without experts are a stack of their own. Multi-token prediction layers, which
    follow the last and have more weights, are not stacked.
    """
    names = Expect(_stacked_names(facts), "nnx-scan")
    return Mapping((*_before(facts), *_kernels(facts), *_stacked(facts), names))


def linen_scan(facts: Facts) -> Mapping:
    """Return the mapping to Linen names with stacked layers."""
    names = tuple("params." + n for n in _stacked_names(facts))
    rename = Rename((("{x*}", "params.{x*}"),))
    ops = nnx_scan(facts).ops[:-1]
    return Mapping((*ops, rename, Expect(names, "linen-scan")))


def maxtext(facts: Facts) -> Mapping:
    """Return the mapping to a tree like MaxText's, with layers stacked along dim 1."""
    _check_llama(facts, "maxtext")
    layer = "params.decoder.layers."
    attention = {"q": "query", "k": "key", "v": "value"}
    apart = {
        **{
            f"self_attn.{a}_proj.kernel": f"self_attention.{b}.kernel" for a, b in attention.items()
        },
        "self_attn.o_proj.kernel": "self_attention.out.kernel",
        "self_attn.q_norm.scale": "self_attention.query_norm.scale",
        "self_attn.k_norm.scale": "self_attention.key_norm.scale",
        "mlp.gate_proj.kernel": "mlp.wi_0.kernel",
        "mlp.up_proj.kernel": "mlp.wi_1.kernel",
        "mlp.down_proj.kernel": "mlp.wo.kernel",
        "input_layernorm.scale": "pre_self_attention_layer_norm.scale",
        "post_attention_layernorm.scale": "post_self_attention_layer_norm.scale",
        **{f"self_attn.{a}_proj.bias": f"self_attention.{b}.bias" for a, b in attention.items()},
    }
    rules = (
        ("model.embed_tokens.embedding", "params.token_embedder.embedding"),
        ("model.norm.scale", "params.decoder.decoder_norm.scale"),
        ("lm_head.kernel", "params.decoder.logits_dense.kernel"),
    )
    biases = tuple(LAYER + f"self_attn.{x}_proj.bias" for x in "qkv")
    stacks = [Stack(LAYER + a, layer + b, dim=1) for a, b in apart.items()]
    return Mapping(
        (
            *_before(facts),
            *_kernels(facts),
            *_heads_apart(facts),
            Split(biases[:1], 0, (facts.heads, -1)),
            Split(biases[1:], 0, (facts.kv_heads, -1)),
            *stacks,
            Rename(rules),
            Expect((*(layer + b for b in apart.values()), *(b for _, b in rules)), "llama-maxtext"),
        )
    )


def tunix(facts: Facts) -> Mapping:
    """Return the mapping to a tree like Tunix's."""
    _check_llama(facts, "tunix")
    attn = "layers.{layer}.attn."
    rules = (
        ("model.embed_tokens.embedding", "embedder.input_embedding"),
        ("model.norm.scale", "final_norm.w"),
        ("lm_head.kernel", "lm_head.w"),
        *((f"{LAYER}self_attn.{x}_proj.kernel", f"{attn}{x}_proj.w") for x in "qkvo"),
        *((f"{LAYER}self_attn.{x}_norm.scale", f"{attn}{x}_norm.w") for x in "qk"),
        *((f"{LAYER}self_attn.{x}_proj.bias", f"{attn}{x}_bias") for x in "qkv"),
        (LAYER + "mlp.{x}.kernel", "layers.{layer}.mlp.{x}.kernel"),
        (LAYER + "{x}.scale", "layers.{layer}.{x}.w"),
    )
    made = tuple(b for _, b in rules)
    return Mapping(
        (
            *_before(facts),
            *_kernels(facts),
            *_heads_apart(facts),
            Rename(rules),
            Expect(made, "llama-tunix"),
        )
    )


def _before(facts: Facts) -> tuple[Op, ...]:
    family = facts.family
    return (Drop(family.buffers, rebuilt=True), Expect(family.names, f"{family.name}-hf"))


def _kernels(facts: Facts) -> tuple[Op, ...]:
    family = facts.family
    linear = tuple(m + ".weight" for m in family.linear)
    rules = (
        *((m + ".weight", m + ".kernel") for m in (*family.linear, *family.kernels)),
        *((m + ".weight", m + ".scale") for m in family.norms),
        *((m + ".weight", m + ".embedding") for m in family.embeddings),
    )
    return (Transpose(linear), Rename(rules))


def _kernel_names(facts: Facts) -> tuple[str, ...]:
    family = facts.family
    kernels = (*family.linear, *family.kernels)
    return (
        *(m + ".kernel" for m in kernels),
        *(m + ".scale" for m in family.norms),
        *(m + ".embedding" for m in family.embeddings),
        *(m + ".bias" for m in (*kernels, *family.norms)),
        *family.plain,
    )


def _stacked_names(facts: Facts) -> tuple[str, ...]:
    layers = facts.family.layers
    one = layers.replace("{layer}.", "")
    plain = [n.replace("{expert}.", "") for n in _kernel_names(facts)]
    names = [n.replace(layers, one) for n in plain]
    if facts.dense_layers:
        names += [n.replace(layers, _kind(one, "dense")) for n in plain]
    if facts.predictions:
        names += [n.replace(layers, _kind(layers, "mtp")) for n in plain]
    return tuple(dict.fromkeys(names))


def _kind(layers: str, kind: str) -> str:
    """Return the name of layers of another kind."""
    return layers.replace("layers.", f"{kind}_layers.")


def _heads_apart(facts: Facts) -> tuple[Op, ...]:
    """Split (hidden, heads·d) to (hidden, heads, d), and (heads·d, hidden) to (heads, d, "
    "hidden).
    """
    names = {x: LAYER + f"self_attn.{x}_proj.kernel" for x in "qkvo"}
    return (
        Split((names["q"],), 1, (facts.heads, -1)),
        Split((names["k"], names["v"]), 1, (facts.kv_heads, -1)),
        Split((names["o"],), 0, (facts.heads, -1)),
    )


def _stacked(facts: Facts) -> tuple[Op, ...]:
    layers = facts.family.layers
    one = layers.replace("{layer}.", "")
    experts: tuple[Op, ...] = tuple(
        Stack(
            layers + f"{x}.experts.{{expert}}.{{rest*}}",
            layers + f"{x}.experts.{{rest*}}",
            "expert",
        )
        for x in ("mlp", "block_sparse_moe")
        if facts.family.name in ("qwen3_moe", "mixtral", "deepseek_v3")
    )
    stacks = [*experts]
    if facts.predictions:
        stacks.append(_predictions_apart(facts))
    dense = facts.dense_layers
    if dense:
        stacks.append(Stack(layers + "{rest*}", _kind(one, "dense") + "{rest*}", count=dense))
    return (*stacks, Stack(layers + "{rest*}", one + "{rest*}", first=dense))


def _predictions_apart(facts: Facts) -> Rename:
    """Renumber the prediction layers, which follow the last layer, from 0."""
    layers = facts.family.layers
    first, apart = facts.layers, _kind(layers, "mtp")
    return Rename(
        tuple(
            (
                layers.replace("{layer}", str(first + i)) + "{rest*}",
                apart.replace("{layer}", str(i)) + "{rest*}",
            )
            for i in range(facts.predictions)
        )
    )


def _check_llama(facts: Facts, form: str) -> None:
    if facts.family.name != "llama":
        raise LayoutError(
            f"no {form} table for {facts.family.name} (only for llama, mistral, qwen2, qwen3, "
            "gemma). Pass a mapping in TOML, or use nnx or nnx-scan."
        )


# --- The names of MindFormers: the older ones, and those of its Megatron-like models

_MCORE_LAYER = "decoder.layers.{layer}."
_KINDS = ("weight", "bias")
_WITH_MCORE = ("llama", "qwen3_moe", "deepseek_v3")


def mindformers(facts: Facts, *, concat: bool = False) -> Mapping:
    """Return the mapping to the older names; ``concat`` fuses q, k, v and gate, up."""
    if facts.family.name != "llama":
        raise LayoutError(
            f"MindFormers' older names exist only for llama, not for {facts.family.name}."
            + (" Use mcore." if facts.family.name in _WITH_MCORE else "")
        )
    modules = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    rules = (
        ("model.embed_tokens.weight", "model.tok_embeddings.embedding_weight"),
        *((f"{LAYER}{a}.{{x}}", f"{LAYER}{b}.{{x}}") for a, b in modules.items()),
        ("model.norm.weight", "model.norm_out.weight"),
        ("lm_head.weight", "lm_head.weight"),
    )
    ops: list[Op] = [
        Drop(facts.family.buffers, rebuilt=True),
        Expect(tuple(a for a, _ in rules), "llama-hf"),
        Rename(rules),
    ]
    made = [b for _, b in rules]
    if concat:
        for x in _KINDS:
            ops.append(_qkv(facts, "{base*}attention.w", "_qkv", x))
        gate = tuple(f"{LAYER}feed_forward.{w}.weight" for w in ("w1", "w3"))
        ops.append(Fuse(gate, f"{LAYER}feed_forward.w_gate_hidden.weight", (1, 1), ROWS))
        made += [f"{LAYER}attention.w_qkv.{{x}}", f"{LAYER}feed_forward.w_gate_hidden.{{x}}"]
    ops.append(Expect(tuple(made), "llama-mindformers"))
    return Mapping(tuple(ops))


def mcore(facts: Facts, *, fused: bool = False, interleaved: bool = True) -> Mapping:
    """Return the mapping to the Megatron-like names of inference, or (``fused``) of training."""
    if facts.family.name not in _WITH_MCORE:
        raise LayoutError(f"{facts.family.name}: no mcore names exist in MindFormers.")
    rules = _mcore_rules(facts, fused)
    ops: list[Op] = [
        Drop(facts.family.buffers, rebuilt=True),
        *_copies(facts),
        Expect(tuple(a for a, _ in rules), f"{facts.family.name}-hf"),
        Rename(rules),
    ]
    made = [b for _, b in rules]
    if fused:
        ops += _fused(facts, interleaved)
        made += [
            *("{base*}.self_attention.linear_qkv." + x for x in _KINDS),
            "{base*}.linear_fc1.weight",
            *("{base*}.experts." + w for w in ("weight1", "weight2")),
        ]
    ops.append(Expect(tuple(made), f"{facts.family.name}-mcore"))
    return Mapping(tuple(ops))


def _mcore_rules(facts: Facts, training: bool) -> tuple[tuple[str, str], ...]:
    modules = {
        **{f"self_attn.{x}_proj": f"self_attention.linear_{x}" for x in "qkv"},
        "self_attn.o_proj": "self_attention.linear_proj",
        "mlp.gate_proj": "mlp.gating",
        "mlp.up_proj": "mlp.hidden",
        "mlp.down_proj": "mlp.linear_fc2",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "pre_mlp_layernorm",
    }
    if facts.family.name != "llama":
        modules |= {
            "mlp.gate": "mlp.router",
            "mlp.experts.{expert}.gate_proj": "mlp.experts.{expert}.gating",
            "mlp.experts.{expert}.up_proj": "mlp.experts.{expert}.hidden",
            "mlp.experts.{expert}.down_proj": "mlp.experts.{expert}.linear_fc2",
        }
    if facts.family.name != "deepseek_v3":
        modules |= {f"self_attn.{x}_norm": f"self_attention.{x}_layernorm" for x in "qk"}
    else:
        modules |= {
            "self_attn.q_a_proj": "self_attention.linear_q_down_proj",
            "self_attn.q_a_layernorm": "self_attention.q_layernorm",
            "self_attn.q_b_proj": "self_attention.linear_q_up_proj",
            "self_attn.kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
            "self_attn.kv_a_layernorm": "self_attention.kv_layernorm",
            "self_attn.kv_b_proj": "self_attention.linear_kv_up_proj",
            "mlp.shared_experts.gate_proj": "mlp.shared_experts.gating",
            "mlp.shared_experts.up_proj": "mlp.shared_experts.hidden",
            "mlp.shared_experts.down_proj": "mlp.shared_experts.linear_fc2",
        }
    inside = {f"{a}.{{x}}": f"{b}.{{x}}" for a, b in modules.items()}
    inside = {"mlp.gate.e_score_correction_bias": "mlp.router.expert_bias", **inside}
    return (
        ("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
        ("model.norm.weight", "decoder.final_layernorm.weight"),
        ("lm_head.weight", "output_layer.weight"),
        *(_prediction_rules(facts, inside, training) if facts.family.name == "deepseek_v3" else ()),
        *((LAYER + a, _MCORE_LAYER + b) for a, b in inside.items()),
    )


def _copies(facts: Facts) -> list[Tie]:
    """Tie the copies of the embedding and the head in prediction layers."""
    if facts.family.name != "deepseek_v3":
        return []
    found = []
    for i in range(facts.predictions):
        layer = f"model.layers.{facts.layers + i}."
        copies = (
            (layer + "embed_tokens.weight", "model.embed_tokens.weight"),
            (layer + "shared_head.head.weight", "lm_head.weight"),
        )
        found.append(Tie(copies, beside=layer + "eh_proj.weight"))
    return found


def _prediction_rules(
    facts: Facts, inside: dict[str, str], training: bool
) -> list[tuple[str, str]]:
    """Return the rules for the multi-token prediction layers, which follow the last."""
    found: list[tuple[str, str]] = []
    for i in range(facts.predictions):
        layer = f"model.layers.{facts.layers + i}."
        outer = f"mtp.layers.{i}." if training else "decoder."
        inner = outer + ("transformer_layer." if training else "transformer.")
        last = outer + "final_layernorm" if training else inner + "shared_head.norm"
        found += [
            (f"{layer}{x}.weight", f"{outer}{x}.weight") for x in ("enorm", "hnorm", "eh_proj")
        ]
        found.append((layer + "shared_head.norm.weight", last + ".weight"))
        found += [(layer + a, inner + b) for a, b in inside.items()]
    return found


def _fused(facts: Facts, interleaved: bool) -> list[Op]:
    ops: list[Op] = []
    if facts.family.name != "deepseek_v3":
        ops += [_qkv(facts, "{base*}.linear_", "qkv", x) for x in _KINDS]
    if facts.family.name != "llama":
        ops += _experts(facts)
    gate = ("{base*}.gating.weight", "{base*}.hidden.weight")
    groups = ROWS if interleaved else 1
    ops.append(Fuse(gate, "{base*}.linear_fc1.weight", (1, 1), groups))
    return ops


def _qkv(facts: Facts, before: str, name: str, kind: str) -> Fuse:
    return Fuse(
        tuple(f"{before}{x}.{kind}" for x in "qkv"),
        f"{before}{name}.{kind}",
        (facts.heads // facts.kv_heads, 1, 1),
        facts.kv_heads,
    )


def _experts(facts: Facts) -> list[Op]:
    """Join all experts of a layer to two matrices: (E·in, gate|up) and (E·ffn, in)."""
    one, many = "{base*}.experts.{expert}.", "{base*}.experts."
    count = (facts.experts, -1)
    return [
        Transpose(tuple(one + x + ".weight" for x in ("gating", "hidden", "linear_fc2"))),
        Fuse((one + "gating.weight", one + "hidden.weight"), one + "fc1.weight", (1, 1), dim=1),
        Stack(one + "fc1.weight", many + "weight1", index="expert"),
        Stack(one + "linear_fc2.weight", many + "weight2", index="expert"),
        Merge((many + "weight1", many + "weight2"), 0, count),
    ]
