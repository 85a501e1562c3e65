"""A Flax NNX model on 8 devices, filled from a Hugging Face checkpoint with other names and shapes.

The model below has the tree of Tunix's Llama3: heads are a dim of their own, and matrices are
(in, out). It is made without arrays, and ``load`` fills its state with the shards of each device.
If transformers is installed, the logits are compared with its own.
"""

# ruff: noqa: PLC0415 - JAX reads its environment once; torch is only for comparison

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxshard as js

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


class Weight(nnx.Module):
    """An array, and the mesh axes of its dims."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> None:
        self.w = nnx.Param(jnp.zeros(shape), out_sharding=axes)


class Kernel(nnx.Module):
    """A matrix (in, out), and the mesh axes of its dims."""

    def __init__(self, shape: tuple[int, int], axes: tuple[str, str]) -> None:
        self.kernel = nnx.Param(jnp.zeros(shape), out_sharding=axes)


class Embedder(nnx.Module):
    """The embedding of tokens."""

    def __init__(self, c: dict[str, Any]) -> None:
        shape = (c["vocab_size"], c["hidden_size"])
        self.input_embedding = nnx.Param(jnp.zeros(shape), out_sharding=("tp", "fsdp"))


class Attention(nnx.Module):
    """Attention of groups of heads."""

    def __init__(self, c: dict[str, Any]) -> None:
        embed, heads = c["hidden_size"], c["num_attention_heads"]
        kv_heads, head_dim = c["num_key_value_heads"], c["head_dim"]
        self.q_proj = Weight((embed, heads, head_dim), ("fsdp", "tp", None))
        self.k_proj = Weight((embed, kv_heads, head_dim), ("fsdp", "tp", None))
        self.v_proj = Weight((embed, kv_heads, head_dim), ("fsdp", "tp", None))
        self.o_proj = Weight((heads, head_dim, embed), ("tp", None, "fsdp"))

    def __call__(self, x: jax.Array, theta: float) -> jax.Array:
        q = jnp.einsum("te,ehd->thd", x, self.q_proj.w[...])
        k = jnp.einsum("te,ehd->thd", x, self.k_proj.w[...])
        v = jnp.einsum("te,ehd->thd", x, self.v_proj.w[...])
        q, k = rotated(q, theta), rotated(k, theta)
        k, v = (jnp.repeat(y, q.shape[1] // k.shape[1], axis=1) for y in (k, v))
        scores = jnp.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
        scores = jnp.where(jnp.tri(len(x), dtype=bool), scores, -jnp.inf)
        return jnp.einsum("hts,shd,hde->te", jax.nn.softmax(scores), v, self.o_proj.w[...])


class Mlp(nnx.Module):
    """A gated feed-forward network."""

    def __init__(self, c: dict[str, Any]) -> None:
        embed, mlp = c["hidden_size"], c["intermediate_size"]
        self.gate_proj = Kernel((embed, mlp), ("fsdp", "tp"))
        self.up_proj = Kernel((embed, mlp), ("fsdp", "tp"))
        self.down_proj = Kernel((mlp, embed), ("tp", "fsdp"))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = x @ self.gate_proj.kernel[...], x @ self.up_proj.kernel[...]
        return jax.nn.silu(gate) * up @ self.down_proj.kernel[...]


class Layer(nnx.Module):
    """Attention and feed-forward network."""

    def __init__(self, c: dict[str, Any]) -> None:
        self.input_layernorm = Weight((c["hidden_size"],), ("fsdp",))
        self.post_attention_layernorm = Weight((c["hidden_size"],), ("fsdp",))
        self.attn, self.mlp = Attention(c), Mlp(c)

    def __call__(self, x: jax.Array, eps: float, theta: float) -> jax.Array:
        x += self.attn(normed(x, self.input_layernorm, eps), theta)
        return x + self.mlp(normed(x, self.post_attention_layernorm, eps))


class Llama(nnx.Module):
    """The model, with the names of Tunix's Llama3."""

    def __init__(self, c: dict[str, Any]) -> None:
        self.eps, self.theta = c["rms_norm_eps"], c["rope_theta"]
        self.embedder = Embedder(c)
        self.layers = nnx.List([Layer(c) for _ in range(c["num_hidden_layers"])])
        self.final_norm = Weight((c["hidden_size"],), ("fsdp",))
        self.lm_head = Weight((c["hidden_size"], c["vocab_size"]), ("fsdp", "tp"))

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embedder.input_embedding[...][ids]
        for layer in self.layers:
            x = layer(x, self.eps, self.theta)
        return normed(x, self.final_norm, self.eps) @ self.lm_head.w[...]


def normed(x: jax.Array, scale: Weight, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps) * scale.w[...]


def rotated(x: jax.Array, theta: float) -> jax.Array:
    length, _, width = x.shape
    angles = jnp.outer(jnp.arange(length), theta ** (-jnp.arange(0, width, 2) / width))[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def make_mesh() -> jax.sharding.Mesh:
    """Return 8 devices as Tunix names them."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=auto)


def make_checkpoint(folder: Path) -> None:
    """Write a random Llama with Hugging Face's names."""
    _, state = nnx.get_abstract_model(lambda: Llama(CONFIG), make_mesh())
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: rng.normal(0.1, 0.2, x.shape).astype(np.float32), state)
    js.save(tree, folder, names="tunix:hf", config=CONFIG)


def run(folder: Path) -> jax.Array:
    """Load the model in ``folder`` onto a mesh, check its shards, and return its logits."""
    mesh = make_mesh()
    graph, state = nnx.get_abstract_model(lambda: Llama(CONFIG), mesh)
    state = js.load(folder, state, names="hf:tunix")
    model = nnx.merge(graph, state)

    print(js.show(state))
    query = model.layers[0].attn.q_proj.w[...]
    assert query.addressable_shards[0].data.size == query.size / 8
    with jax.set_mesh(mesh):
        return nnx.jit(lambda model, ids: model(ids))(model, jnp.arange(7))


def compare(folder: Path, logits: jax.Array) -> None:
    """Compare the logits with those of transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.arange(7)[None]).logits[0].numpy()
    difference = float(np.abs(logits - theirs).max() / theirs.std())
    print(f"largest difference from transformers' logits: {difference:.1e}")
    assert difference < 1e-4


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "llama")
        make_checkpoint(folder)
        logits = run(folder)
        if find_spec("torch") and find_spec("transformers"):
            compare(folder, logits)


if __name__ == "__main__":
    main()
