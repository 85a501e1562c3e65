"""The weights of the training states in the tests: their shapes, and how they are cut."""

from __future__ import annotations

from jax.sharding import PartitionSpec as P

SPECS = {
    "model.embed_tokens.weight": P("mp", None),
    "model.layers.0.self_attn.q_proj.weight": P("mp", None),
    "model.layers.0.self_attn.o_proj.weight": P(None, "mp"),
    "model.layers.0.input_layernorm.weight": P(),
    "model.norm.weight": P(),
}
SHAPES = {
    "model.embed_tokens.weight": (64, 16),
    "model.layers.0.self_attn.q_proj.weight": (32, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 32),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.norm.weight": (16,),
}
