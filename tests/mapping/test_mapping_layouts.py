"""Mappings and adapters inside a sharded load: each device gets its shard, computed on its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mapping_models import DECODER, save
from mapping_random import forms_of
from safetensors.numpy import load_file, save_file

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from jaxshard.conversion.open import open_checkpoint  # noqa: E402
from jaxshard.errors import LayoutError  # noqa: E402
from jaxshard.loader import load  # noqa: E402
from jaxshard.lora import merge_lora, with_adapter  # noqa: E402
from jaxshard.mapping import Fuse, Mapping, Rename, Stack, Transpose, find_mapping  # noqa: E402

HEADS, KV = DECODER["num_attention_heads"], DECODER["num_key_value_heads"]
HIDDEN = DECODER["hidden_size"]
L = "model.layers.{layer}."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


def weights(where: Path) -> dict[str, np.ndarray]:
    return load_file(where / "model.safetensors")


@pytest.mark.parametrize("form", [f for f in forms_of("llama") if f not in ("linen", "nnx")])
@pytest.mark.parametrize("strategy", ["dp2mp2", "dp1mp2pp3"])
def test_a_form_is_loaded_onto_a_mesh_by_the_layout_carried_over(folder, form, strategy) -> None:
    mapping = find_mapping(f"hf:{form}", open_checkpoint(folder))
    expected = mapping.apply_arrays(weights(folder))
    made = load(folder, strategy, names=mapping)
    assert made.keys() == expected.keys()
    shared = 0
    for name, array in made.items():
        np.testing.assert_array_equal(np.asarray(array), expected[name])
        shared += array.addressable_shards[0].data.size < array.size
    assert shared >= len(made) // 2


def test_a_fused_stacked_transposed_model_on_every_device_is_read_once(folder) -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("mp",))
    counts: list[Any] = []
    whole = open_checkpoint(folder).num_bytes
    load(folder, NamedSharding(mesh, PartitionSpec()), names=FUSED, counted=counts.append)
    assert counts[0].bytes_needed == whole


FUSED = Mapping(
    (
        Fuse(
            tuple(f"{L}self_attn.{x}_proj.weight" for x in "qkv"),
            L + "qkv",
            (HEADS // KV, 1, 1),
            KV,
        ),
        Fuse(tuple(f"{L}mlp.{x}_proj.weight" for x in ("gate", "up")), L + "fc1", (1, 1)),
        Rename(
            (
                (L + "self_attn.o_proj.weight", L + "out"),
                (L + "mlp.down_proj.weight", L + "fc2"),
                (L + "input_layernorm.weight", L + "norm1"),
                (L + "post_attention_layernorm.weight", L + "norm2"),
                ("lm_head.weight", "head"),
            )
        ),
        Transpose((L + "qkv", L + "fc1", L + "out", L + "fc2", "head")),
        Stack(L + "{x}", "layers.{x}"),
    )
)


def norm(x: Any, scale: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def rotate(x: Any) -> Any:
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[0])[:, None] / 10000.0 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def layer(x: Any, p: dict[str, Any]) -> Any:
    """One layer of Llama, on fused and transposed weights."""
    fused = (norm(x, p["norm1"]) @ p["qkv"]).reshape(len(x), KV, HEADS // KV + 2, -1)
    q, k, v = fused[:, :, :-2], fused[:, :, -2], fused[:, :, -1]
    q = rotate(q.reshape(len(x), HEADS, -1)).reshape(q.shape)
    scores = jnp.einsum("tkgd,skd->kgts", q, rotate(k)) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.tri(len(x), dtype=bool), scores, -jnp.inf)
    mixed = jnp.einsum("kgts,skd->tkgd", jax.nn.softmax(scores), v).reshape(len(x), -1)
    x = x + mixed @ p["out"]
    gate, up = jnp.split(norm(x, p["norm2"]) @ p["fc1"], 2, -1)
    return x + (jax.nn.silu(gate) * up) @ p["fc2"]


@jax.jit
def logits(params: dict[str, Any], ids: Any) -> Any:
    stacked = {n[7:]: p for n, p in params.items() if n.startswith("layers.")}
    x = params["model.embed_tokens.weight"][ids]
    x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), x, stacked)
    return norm(x, params["model.norm.weight"]) @ params["head"]


def test_a_scanned_model_on_fused_weights_computes_what_transformers_does(folder) -> None:
    torch = pytest.importorskip("torch")
    from mapping_models import build  # noqa: PLC0415

    ids = np.arange(12) % DECODER["vocab_size"]
    with torch.no_grad():
        expected = build("llama")(torch.tensor(ids)[None]).logits[0].numpy()
    for strategy in ("dp1mp1", "dp2mp2"):
        params = load(folder, strategy, names=FUSED)
        np.testing.assert_allclose(logits(params, jnp.asarray(ids)), expected, atol=2e-5)


def test_fewer_kv_heads_than_ranks_are_reported_by_the_mapping(folder) -> None:
    with pytest.raises(LayoutError, match=r"mp=4 splits .* the 2 groups \(such as kv heads\)"):
        load(folder, "mp4", names=FUSED)


def test_adapters_are_merged_inside_a_sharded_load(folder, tmp_path) -> None:
    random = np.random.default_rng(0)
    pairs = {}
    for i in range(DECODER["num_hidden_layers"]):
        for x, n in {"q": HIDDEN, "v": KV * HIDDEN // HEADS}.items():
            at = f"model.layers.{i}.self_attn.{x}_proj."
            pairs[at + "lora_A.weight"] = random.normal(size=(2, HIDDEN)).astype(np.float32)
            pairs[at + "lora_B.weight"] = random.normal(size=(n, 2)).astype(np.float32)
    (tmp_path / "pair").mkdir()
    save_file(pairs, tmp_path / "pair" / "adapter_model.safetensors")
    catalog = with_adapter(folder, tmp_path / "pair", alpha=4)
    merge_lora(folder, tmp_path / "merged", adapter=tmp_path / "pair", alpha=4)
    expected = weights(tmp_path / "merged")
    assert not np.array_equal(expected[at + "weight"], weights(folder)[at + "weight"])
    for strategy in ("dp2mp2", "dp1mp2pp3"):
        made = load(catalog, strategy)
        for name, x in expected.items():
            np.testing.assert_allclose(np.asarray(made[name]), x, rtol=1e-6, atol=1e-6)
    fused = FUSED.apply_arrays(expected)
    for name, array in load(catalog, "mp2", names=FUSED).items():
        np.testing.assert_allclose(np.asarray(array), fused[name], rtol=1e-6, atol=1e-6)
