"""A Llama in plain JAX on 8 devices, with weights loaded onto a mesh in two layouts.

    python examples/llama.py [FOLDER]      a Hugging Face Llama; by default transformers
                                           writes a small random one

The weights are loaded as ``{name: jax.Array}`` with the names in the file, sharded by the rules
of the family: as dp2mp4 one program runs on all devices, as pp2mp2dp2 each pipeline stage
runs on its own half of them. Then they are loaded in another form (q, k, v fused,
matrices transposed, layers stacked), which gives the same logits, bit for bit. If
transformers is installed, logits and greedy text are compared with its results.
"""

# ruff: noqa: PLC0415 - torch is only for comparison, and JAX reads its environment once

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxshard as js
from jaxshard.devices.mesh import stage_meshes
from jaxshard.mapping import Fuse, Stack, Transpose
from jaxshard.rules import split_layers

Params = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Config:
    """The values of ``config.json`` that the computation needs."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float
    tied: bool

    @classmethod
    def read(cls, folder: Path) -> Config:
        """Read the config in ``folder``."""
        values = json.loads((folder / "config.json").read_text())
        rope = values.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default" or values.get("rope_scaling"):
            raise SystemExit(f"{folder}: this example knows plain rotary embeddings only.")
        heads = values["num_attention_heads"]
        return cls(
            layers=values["num_hidden_layers"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads", heads),
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            eps=values["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", values.get("rope_theta", 10000.0)),
            tied=values.get("tie_word_embeddings", False),
        )


# --- the model ------------------------------------------------------------------------


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + eps)
    return (x * scale).astype(x.dtype) * weight


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Apply the rotary embedding to (batch, position, head, dim), in halves as in Hugging Face."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attention(x: jax.Array, weights: Params, prefix: str, config: Config) -> jax.Array:
    batch, length, _ = x.shape

    def heads(name: str, count: int) -> jax.Array:
        projected = x @ weights[f"{prefix}.{name}_proj.weight"].T
        return projected.reshape(batch, length, count, config.head_dim)

    q = rotate(heads("q", config.heads), config.rope_theta)
    k = rotate(heads("k", config.kv_heads), config.rope_theta)
    v = heads("v", config.kv_heads)
    q = q.reshape(batch, length, config.kv_heads, -1, config.head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k) / np.sqrt(config.head_dim)
    seen = jnp.tril(jnp.ones((length, length), bool))
    probabilities = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf).astype(jnp.float32), -1)
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", probabilities.astype(v.dtype), v)
    return mixed.reshape(batch, length, -1) @ weights[f"{prefix}.o_proj.weight"].T


def layer(x: jax.Array, weights: Params, number: int, config: Config) -> jax.Array:
    p = f"model.layers.{number}"
    inner = rms_norm(x, weights[f"{p}.input_layernorm.weight"], config.eps)
    x = x + attention(inner, weights, f"{p}.self_attn", config)
    inner = rms_norm(x, weights[f"{p}.post_attention_layernorm.weight"], config.eps)
    gate = jax.nn.silu(inner @ weights[f"{p}.mlp.gate_proj.weight"].T)
    up = inner @ weights[f"{p}.mlp.up_proj.weight"].T
    return x + (gate * up) @ weights[f"{p}.mlp.down_proj.weight"].T


def head(x: jax.Array, weights: Params, config: Config) -> jax.Array:
    name = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    return rms_norm(x, weights["model.norm.weight"], config.eps) @ weights[name].T


def fused(config: Config) -> js.Mapping:
    """Fuse q, k, v and gate, up; transpose matrices to (in, out); stack the layers."""
    at = "model.layers.{layer}."
    qkv = tuple(f"{at}self_attn.{x}_proj.weight" for x in "qkv")
    gate = (f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight")
    groups = config.kv_heads
    made = (f"{at}qkv", f"{at}gate_up", f"{at}self_attn.o_proj.weight", f"{at}mlp.down_proj.weight")
    return js.Mapping(
        (
            Fuse(qkv, made[0], (config.heads // groups, 1, 1), groups),
            Fuse(gate, made[1], (1, 1)),
            Transpose(made),
            Stack(f"{at}{{rest*}}", "layers.{rest*}"),
        )
    )


# --- running the model on a mesh, or on one mesh per stage --------------------------------


class Llama:
    """The model on the devices of its weights, in one stage or several."""

    def __init__(self, params: Params, config: Config, strategy: js.Strategy) -> None:
        self._config = config
        self._meshes = stage_meshes(strategy)
        ends = np.cumsum([0, *split_layers(config.layers, strategy.pp)])
        self._stages = [
            partial(self._stage, range(ends[i], ends[i + 1]), config) for i in range(strategy.pp)
        ]
        self._weights = [_held_by(params, mesh) for mesh in self._meshes]
        self._programs = [jax.jit(stage) for stage in self._stages]

    @staticmethod
    def _stage(layers: Sequence[int], config: Config, weights: Params, x: jax.Array) -> jax.Array:
        if layers[0] == 0:
            x = weights["model.embed_tokens.weight"][x]
        for number in layers:
            x = layer(x, weights, number, config)
        return head(x, weights, config) if layers[-1] == config.layers - 1 else x

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Compute logits of (batch, position) tokens, with the batch split over the replicas."""
        x: Any = tokens
        for mesh, weights, program in zip(self._meshes, self._weights, self._programs, strict=True):
            batch = NamedSharding(mesh, PartitionSpec("dp"))
            x = program(weights, jax.device_put(x, batch))  # from stage to stage
        return np.asarray(x)

    def generate(self, tokens: np.ndarray, count: int) -> np.ndarray:
        """Append ``count`` tokens, each the most likely one."""
        length = tokens.shape[1]
        padded = np.pad(tokens, ((0, 0), (0, count)))  # one shape, so one compilation
        for at in range(length, length + count):
            # a copy, because device_put may still read its argument after it returns
            padded[:, at] = self.logits(padded.copy())[:, at - 1].argmax(-1)
        return padded


def _held_by(params: Params, mesh: Mesh) -> dict[str, jax.Array]:
    """Return the weights of a stage; shared weights are taken from the devices of this stage."""
    devices = set(mesh.devices.flat)
    found = {}
    for name, array in params.items():
        if array.sharding.device_set == devices:
            found[name] = array
        elif devices < array.sharding.device_set:
            own = [s.data for s in array.addressable_shards if s.device in devices]
            spec = NamedSharding(mesh, array.sharding.spec)
            found[name] = jax.make_array_from_single_device_arrays(array.shape, spec, own)
    return found


# --- the program ------------------------------------------------------------------------


def make_checkpoint(folder: Path, *, tied: bool = False) -> None:
    """Write a small random Llama in float32 with transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # a sharper model than usual, so that text depends on every weight
    )
    transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)


def theirs(folder: Path, tokens: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute logits and greedy text with transformers, in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    given = torch.from_numpy(tokens)
    with torch.no_grad():
        logits = model(given).logits.numpy()
        model.generation_config.eos_token_id = None
        text = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return logits, text.numpy()


def run(folder: Path, *, compare: bool, count: int = 8) -> dict[str, float]:
    """Load ``folder`` in both layouts and generate; return the largest difference of the logits."""
    config = Config.read(folder)
    prompt = np.random.default_rng(0).integers(3, 250, (4, 12))
    expected = theirs(folder, prompt, count) if compare else None
    differences, plain = {}, {}
    for text in ("dp2mp4", "pp2mp2dp2"):
        strategy = js.Strategy.parse(text)
        params = js.load(folder, strategy, dtype="float32")
        model = Llama(params, config, strategy)
        plain[text] = model.logits(prompt)
        generated = model.generate(prompt, count)
        print(f"{text}: {len(params)} tensors on {strategy.num_ranks} devices; generated")
        for row in generated[:, prompt.shape[1] :]:
            print("   ", *row)
        if expected is not None:
            logits, tokens = expected
            differences[text] = float(np.abs(plain[text] - logits).max())
            print(f"    logits differ from transformers' by {differences[text]:.1e} at most")
            assert differences[text] <= 1e-4, "the logits are not those of transformers"
            assert np.array_equal(generated, tokens), "the text is not that of transformers"
    mapping, strategy = fused(config), js.Strategy.parse("dp2mp4")
    stacked = js.load(folder, strategy, dtype="float32", names=mapping)
    again = Llama(mapping.inverse().apply_arrays(stacked), config, strategy)
    assert np.array_equal(again.logits(prompt), plain["dp2mp4"]), "other logits when fused"
    print(f"dp2mp4, fused, transposed and stacked: {len(stacked)} tensors, the same logits")
    return differences


def main(arguments: Sequence[str]) -> None:
    try:
        import transformers  # noqa: F401

        compare = True
    except ImportError as error:
        compare = False
        print(f"no comparison: {error}")
    if arguments:
        run(Path(arguments[0]), compare=compare)
        return
    if not compare:
        raise SystemExit(
            "transformers and torch make the example's model: install them, or name a "
            "folder with a Llama."
        )
    with tempfile.TemporaryDirectory() as scratch:
        make_checkpoint(Path(scratch))
        run(Path(scratch), compare=True)


if __name__ == "__main__":
    main(sys.argv[1:])
