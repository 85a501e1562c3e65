"""The names of MindFormers: the older ones, and those of its Megatron-like models.

hf                                mindformers             mcore
model.layers.0.self_attn.q_proj   model.layers.0.         decoder.layers.0.self_attention.
                                    attention.wq            linear_q
"""

from __future__ import annotations

from ...errors import LayoutError
from ..group_ops import ROWS, Fuse, Stack, Tie
from ..mapping import Mapping
from ..ops import Drop, Expect, Merge, Op, Rename, Transpose
from .families import Facts

_OLD = "model.layers.{layer}."
_NEW = "decoder.layers.{layer}."
_KINDS = ("weight", "bias")
_WITH_MCORE = ("llama", "qwen3_moe", "deepseek_v3")


def mindformers(facts: Facts, *, concat: bool = False) -> Mapping:
    """From Hugging Face to the older names; with ``concat`` q, k, v and gate, up are fused."""
    if facts.family.name != "llama":
        raise LayoutError(
            f"MindFormers' older names are those of llama; {facts.family.name} has none."
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
        *((f"{_OLD}{a}.{{x}}", f"{_OLD}{b}.{{x}}") for a, b in modules.items()),
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
        gate = tuple(f"{_OLD}feed_forward.{w}.weight" for w in ("w1", "w3"))
        ops.append(Fuse(gate, f"{_OLD}feed_forward.w_gate_hidden.weight", (1, 1), ROWS))
        made += [f"{_OLD}attention.w_qkv.{{x}}", f"{_OLD}feed_forward.w_gate_hidden.{{x}}"]
    ops.append(Expect(tuple(made), "llama-mindformers"))
    return Mapping(tuple(ops))


def mcore(facts: Facts, *, fused: bool = False, interleaved: bool = True) -> Mapping:
    """From Hugging Face to the Megatron-like names, of inference or (``fused``) of training."""
    if facts.family.name not in _WITH_MCORE:
        raise LayoutError(f"{facts.family.name} has no mcore names in MindFormers.")
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
        *((_OLD + a, _NEW + b) for a, b in inside.items()),
    )


def _copies(facts: Facts) -> list[Tie]:
    """What a prediction layer has copies of: the embedding and the head, kept once here."""
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
    """The multi-token prediction layers, which come after the last."""
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
    """All experts of a layer as two matrices: (E·in, gate|up) and (E·ffn, in)."""
    one, many = "{base*}.experts.{expert}.", "{base*}.experts."
    count = (facts.experts, -1)
    return [
        Transpose(tuple(one + x + ".weight" for x in ("gating", "hidden", "linear_fc2"))),
        Fuse((one + "gating.weight", one + "hidden.weight"), one + "fc1.weight", (1, 1), dim=1),
        Stack(one + "fc1.weight", many + "weight1", index="expert"),
        Stack(one + "linear_fc2.weight", many + "weight2", index="expert"),
        Merge((many + "weight1", many + "weight2"), 0, count),
    ]
