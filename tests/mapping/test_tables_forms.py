"""Every table gives the names, shapes and values that its form is defined by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import mapping_oracle as oracle
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mapping_random import Sizes, config_of, random_model, write_model

from jaxshard.core.catalog import Model
from jaxshard.loader import load
from jaxshard.mapping import Mapping, Rename, table

SIZES = Sizes(layers=11)
KV, HEADS = SIZES.kv, SIZES.heads


def made(family: str, form: str, sizes: Sizes = SIZES) -> tuple[Any, Any]:
    """Hugging Face's weights, and what the table makes of them."""
    source = random_model(family, sizes)
    config = config_of(family, sizes)
    model = Model(family, sizes.layers, False, config)
    return source, table("hf", form, model).apply_arrays(source)


def check(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape, name
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_the_older_names_of_mindformers() -> None:
    source, found = made("llama", "mindformers")
    check(found, oracle.legacy(source))
    assert "model.layers.10.feed_forward.w3.weight" in found
    assert "model.tok_embeddings.embedding_weight" in found


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_older_names_with_q_k_v_and_gate_hidden_in_one(family) -> None:
    source, found = made(family, "mindformers-concat")
    check(found, oracle.legacy_concat(source, KV))
    assert "model.layers.3.attention.w_qkv.weight" in found
    assert ("model.layers.3.attention.w_qkv.bias" in found) == (family == "qwen2")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_the_names_of_megatron_like_models(family) -> None:
    source, found = made(family, "mcore")
    check(found, oracle.mcore(source))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("form", ["mcore-fused", "mcore-fused-blocks"])
def test_the_fused_forms_of_training(family, form) -> None:
    source, found = made(family, form)
    check(found, oracle.mcore_fused(source, KV, interleaved=form == "mcore-fused"))


@pytest.mark.parametrize("mtp", [0, 1])
@pytest.mark.parametrize("form", ["mcore", "mcore-fused", "mcore-fused-blocks"])
def test_the_forms_of_deepseek_with_its_prediction_layer(form, mtp) -> None:
    source, found = made("deepseek_v3", form, Sizes(layers=4, dense=2, mtp=mtp))
    if form == "mcore":
        check(found, oracle.mcore(source, 4))
    else:
        check(found, oracle.mcore_fused(source, None, 4, interleaved=form == "mcore-fused"))
    assert mtp == any("eh_proj" in n for n in found)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("form", ["nnx", "linen", "nnx-scan", "linen-scan"])
def test_the_trees_of_flax(family, form) -> None:
    source, found = made(family, form)
    check(found, getattr(oracle, form.replace("-", "_"))(source))


@pytest.mark.parametrize(  # MaxText scales the queries of llama
    ("family", "form"),
    [("llama", "tunix"), *((f, form) for f in ("qwen2", "qwen3") for form in ("maxtext", "tunix"))],
)
def test_the_trees_of_maxtext_and_tunix(family, form) -> None:
    source, found = made(family, form)
    check(found, getattr(oracle, form)(source, HEADS, KV))


def test_shapes_of_one_layer_written_out() -> None:
    _, tree = made("qwen3", "maxtext")
    at = "params.decoder.layers."
    assert tree[at + "self_attention.query.kernel"].shape == (8, 11, 4, 4)
    assert tree[at + "self_attention.key.kernel"].shape == (8, 11, 2, 4)
    assert tree[at + "self_attention.out.kernel"].shape == (4, 11, 4, 8)
    assert tree[at + "mlp.wi_0.kernel"].shape == (8, 11, 12)
    assert tree[at + "pre_self_attention_layer_norm.scale"].shape == (8, 11)
    _, tree = made("qwen2", "maxtext")
    assert tree[at + "self_attention.query.bias"].shape == (4, 11, 4)
    _, tree = made("llama", "tunix")
    assert tree["layers.10.attn.q_proj.w"].shape == (8, 4, 4)
    assert tree["layers.10.attn.o_proj.w"].shape == (4, 4, 8)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("mindformers", oracle.legacy),
        ("mcore", oracle.mcore),
        ("nnx", oracle.nnx),
    ],
)
def test_two_names_swapped_are_noticed(form, expected) -> None:
    source, found = made("llama", form)
    values = [n for n in found if ".0." in n and any(x in n for x in ("wv", "linear_v", "v_proj"))]
    keys = [n for n in found if ".0." in n and any(x in n for x in ("wk", "linear_k", "k_proj"))]
    swap = Mapping((Rename(((values[0], keys[0]), (keys[0], values[0]))),))
    with pytest.raises(AssertionError):
        check(swap.apply_arrays(found), expected(source))


def nested(names: Any) -> Any:
    """Names with dots as a tree of dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in names.items():
        *path, last = name.split(".")
        at = tree
        for key in path:
            at = at.setdefault(key, {})
        at[last] = leaf
    return tree


@pytest.mark.parametrize("form", ["linen-scan", "nnx-scan", "maxtext", "tunix"])
def test_an_abstract_tree_of_the_form_is_filled_shard_by_shard(tmp_path: Path, form) -> None:
    sizes = Sizes(layers=2)
    source = random_model("qwen3", sizes)
    folder = write_model(tmp_path / "hf", config_of("qwen3", sizes), source)
    function = getattr(oracle, form.replace("-", "_"))
    numbers = (HEADS, KV) if form in ("maxtext", "tunix") else ()
    expected = function(source, *numbers)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))

    def abstract(x: Any) -> Any:
        spec = PartitionSpec(*(None,) * (x.ndim - 1), "model")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    tree = nested({n: abstract(x) for n, x in expected.items()})
    loaded = load(folder, tree, names=f"hf:{form}")
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    leaves = {".".join(k.key for k in p): x for p, x in jax.tree.leaves_with_path(loaded)}
    check({n: np.asarray(x) for n, x in leaves.items()}, expected)
    for x in leaves.values():
        assert x.addressable_shards[0].data.size == x.size // 2
