"""Small models by their names and shapes, for the tests of rules."""

from __future__ import annotations

from jaxshard.core.catalog import Model
from jaxshard.core.layout import Layout, Strategy
from jaxshard.rules import Rules, rules_for

H, F, V = 16, 32, 64

LAYER = {
    "self_attn.q_proj.weight": (H, H),
    "self_attn.k_proj.weight": (H, H),
    "self_attn.v_proj.weight": (H, H),
    "self_attn.o_proj.weight": (H, H),
    "mlp.gate_proj.weight": (F, H),
    "mlp.up_proj.weight": (F, H),
    "mlp.down_proj.weight": (H, F),
    "input_layernorm.weight": (H,),
    "post_attention_layernorm.weight": (H,),
}


def llama(num_layers: int = 2, head: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H)}
    for i in range(num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in LAYER.items()}
    shapes["model.norm.weight"] = (H,)
    if head:
        shapes["lm_head.weight"] = (V, H)
    return shapes


def moe(num_layers: int = 2, num_experts: int = 4) -> dict[str, tuple[int, ...]]:
    shapes = {n: s for n, s in llama(num_layers).items() if ".mlp." not in n}
    for i in range(num_layers):
        shapes[f"model.layers.{i}.mlp.gate.weight"] = (num_experts, H)
        for e in range(num_experts):
            for name, shape in LAYER.items():
                if name.startswith("mlp."):
                    shapes[f"model.layers.{i}.mlp.experts.{e}.{name[4:]}"] = shape
    return shapes


def stages_of(made: Layout, name: str, strategy: Strategy) -> list[int]:
    return [p.first_rank // strategy.stage_ranks for p in made.placements[name]]


def mine(**specs: str) -> Rules:
    return Rules("mine", specs=tuple(specs.items()))


#: Rules of families, and those of names whose family is unknown.
FAMILIES = {
    **{kind: rules_for(Model(kind), ()) for kind in ("llama", "gpt2", "bert")},
    "decoder": rules_for(None, ["model.layers.0.self_attn.q_proj.weight"]),
    "mindformers": rules_for(None, ["model.layers.0.attention.wq.weight"]),
    "mcore": rules_for(None, ["decoder.layers.0.self_attention.linear_q.weight"]),
}
LLAMA = FAMILIES["llama"]
