"""Families: forms, lengths, and forms made from others by rule."""

from __future__ import annotations

import pytest

from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.models import Sizes, family_of
from jaxshard.models.family import Value

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 1,
}


def test_lengths_are_stated_or_in_the_config_or_seen():
    family = family_of(LLAMA)
    sizes = Sizes(family, {**LLAMA, "intermediate_size": None})
    assert (sizes["heads"], sizes["q_per_kv"], sizes["head_dim"]) == (4, 2, 8)
    assert sizes.having({"vocab": 128})["vocab"] == 128
    with pytest.raises(NotFoundError, match="intermediate_size is missing"):
        sizes["mlp"]
    seen = sizes.seeing("hf", {"model.layers.0.mlp.up_proj.weight": (48, 32)})
    assert seen["mlp"] == 48
    with pytest.raises(LayoutError, match="expected 48 elements along dim 1"):
        seen.seeing("hf", {"model.layers.1.mlp.down_proj.weight": (32, 64)})


def test_stacked_layers_are_as_many_as_their_run_has():
    config = {**LLAMA, "model_type": "gemma2", "num_hidden_layers": 5}
    sizes, name = Sizes(family_of(config), config), "params.decoder.layers.mlp_{}.wi_0.kernel"
    seen = {name.format("local"): (32, 3, 48), name.format("global"): (32, 2, 48)}
    assert sizes.seeing("maxtext", seen)["layer"] == 5
    with pytest.raises(LayoutError, match="expected 2 elements along dim 1"):
        sizes.seeing("maxtext", {name.format("global"): (32, 5, 48)})


def test_a_form_that_is_not_listed_is_refused_by_name():
    with pytest.raises(NotFoundError, match="no form 'tunix'"):
        family_of({"model_type": "mixtral"}).form("tunix")


def test_values_are_scaled_where_the_form_says_so():
    config = {**LLAMA, "head_dim": 16}
    family = family_of(config)
    assert Sizes(family, config).value(family.form("maxtext")["q"]) == Value(0.25, 0.0)
    config = {**config, "model_type": "gemma2", "hidden_size": 64}
    family = family_of(config)
    form = family.form("maxtext")
    assert Sizes(family, config).value(form["embed"]) == Value(8.0, 0.0)
    assert Sizes(family, config).value(form["norm"]) == Value(1.0, 1.0)
    config = {**config, "model_type": "gemma3_text", "hidden_size": 3840}
    family = family_of(config)
    value = Sizes(family, config).value(family.form("maxtext")["embed"])
    assert value == Value(62.0, 0.0)  # the bfloat16 next to 61.97


def test_rotary_halves_are_interleaved_for_llama_3_1_only():
    scaled = {**LLAMA, "rope_scaling": {"rope_type": "llama3"}}
    assert str(family_of(scaled).form("maxtext")["k"].axes) == "embed layer kv_heads (half two)"
    assert str(family_of(LLAMA).form("maxtext")["k"].axes) == "embed layer kv_heads head_dim"


def test_layers_of_several_kinds_are_counted_apart():
    family = family_of(DEEPSEEK)
    assert family.runs == {
        "dense": range(2),
        "moe": range(2, 4),
        "mtp": range(4, 5),
        "main": range(4),
    }
    scan = family.form("nnx-scan")
    assert scan["dense/gate"].name == "model.dense_layers.mlp.gate_proj.kernel"
    assert str(scan["moe/e.up"].axes) == "layer expert embed moe_mlp"
    assert "{layer}" in scan["mtp/q_b"].name
    assert family.find("hf", "model.layers.3.mlp.experts.7.up_proj.weight") == "e.up"


def test_the_matrices_of_an_adapter_have_the_axes_of_their_weight():
    scaled = {**LLAMA, "head_dim": 8, "rope_scaling": {"rope_type": "llama3"}}
    family = family_of(scaled).with_adapters()
    hf, maxtext, tunix = (family.form(f) for f in ("hf", "maxtext", "tunix"))
    assert (
        hf["q.lora_A"].name
        == "base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"
    )
    assert [str(hf[f"q.lora_{x}"].axes) for x in "AB"] == ["rank embed", "(heads head_dim) rank"]
    assert maxtext["q.lora_A"].name == "params.decoder.layers.self_attention.query.kernel_lora_a"
    assert [str(maxtext[f"q.lora_{x}"].axes) for x in "AB"] == [
        "embed layer rank",
        "rank layer (heads half two)",
    ]
    assert (maxtext["q.lora_A"].steps, maxtext["q.lora_B"].steps) == ("", "/ sqrt(head_dim)")
    assert [str(tunix[f"o.lora_{x}"].axes) for x in "AB"] == ["heads head_dim rank", "rank embed"]
    assert "norm.lora_A" not in hf
    assert "mcore-fused" in family.listed
    assert "q.lora_A" not in family.form("mcore-fused")  # it shares a tensor with k and v
