"""FP8 weights in blocks with a factor each come out as their true values, shard by shard."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapping_models import save
from mapping_worlds import Memory, read_all, read_box, same
from safetensors.numpy import load_file, save_file

import jaxshard as js
from jaxshard.api import convert
from jaxshard.conversion.execute import execute
from jaxshard.conversion.prepare import prepare
from jaxshard.core.box import Box
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.mapping import (
    Cast,
    Dequantize,
    Mapping,
    Rename,
    Stack,
    Transpose,
    read_mapping,
    write_mapping,
)
from jaxshard.storage.engine import Budget

QUICK = {"workers": 1, "fsync": False}
FP8 = ml_dtypes.float8_e4m3fn


def quantized(shape: tuple[int, int], block: tuple[int, int], seed: int = 0):
    """A weight, its factors, and its true values in float32, block by block."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=shape).astype(FP8)
    scale = random.uniform(0.5, 2, [-(-n // b) for n, b in zip(shape, block, strict=True)])
    scale = scale.astype(np.float32)
    true = weight.astype(np.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = np.s_[
                i * block[0] : (i + 1) * block[0],
                j * block[1] : (j + 1) * block[1],
            ]
            true[part] *= scale[i, j]
    return weight, scale, true


@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.sampled_from([1, 3, 4, 8]), st.sampled_from([2, 4, 5])),
    st.sampled_from(["BF16", "F32", "F16"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_shard_is_dequantized_as_the_whole_would_be(shape, block, dtype, turn, random) -> None:
    weight, scale, true = quantized(shape, block)
    memory = Memory({"a.weight": weight, "a.weight_scale_inv": scale})
    ops = (Dequantize(block=block, dtype=dtype),)
    mapping = Mapping((*ops, Transpose(("a.weight",))) if turn else ops)
    kinds = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}
    expected = true.astype(kinds[dtype])
    expected = expected.T if turn else expected
    tensor = mapping.apply(memory.catalog)["a.weight"]
    start = tuple(random.randrange(n) for n in tensor.shape)
    box = Box(
        start, tuple(random.randrange(a, n) + 1 for a, n in zip(start, tensor.shape, strict=True))
    )
    made, _ = read_box(memory, tensor, box, Budget(1, 64, 128))
    assert made.dtype == expected.dtype
    np.testing.assert_array_equal(made, expected[box.slices])
    in_memory = mapping.apply_arrays({"a.weight": weight, "a.weight_scale_inv": scale})
    np.testing.assert_array_equal(in_memory["a.weight"], expected)


def test_dequantized_experts_are_stacked_and_each_rank_reads_its_own() -> None:
    arrays, true = {}, []
    for i in range(4):
        weight, scale, values = quantized((16, 12), (8, 4), seed=i)
        arrays |= {f"e.{i}.weight": weight, f"e.{i}.weight_scale_inv": scale}
        true.append(values.astype(ml_dtypes.bfloat16))
    memory = Memory(arrays)
    mapping = Mapping((Dequantize(block=(8, 4)), Stack("e.{expert}.weight", "e", "expert")))
    tensor = mapping.apply(memory.catalog)["e"]
    made, counts = read_box(memory, tensor, Box((0, 8, 0), (4, 16, 12)), Budget(1, 1 << 20))
    np.testing.assert_array_equal(made, np.stack(true)[:, 8:])
    scales = sum(x.nbytes for n, x in arrays.items() if n.endswith("scale_inv"))
    assert counts.bytes_needed == 4 * 8 * 12 + scales


def test_true_values_are_rounded_again_on_a_further_cast() -> None:
    weight, scale, true = quantized((8, 8), (4, 4))
    arrays = {"a.weight": weight, "a.weight_scale_inv": scale}
    memory = Memory(arrays)
    mapping = Mapping((Dequantize(block=(4, 4)), Cast(("a.weight",), "F32")))
    made = read_all(memory, mapping.apply(memory.catalog))
    expected = true.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(made["a.weight"], expected)
    assert same(made, mapping.apply_arrays(arrays))


def test_a_quantized_folder_becomes_a_plain_one(tmp_path) -> None:
    source = save("deepseek_v3", tmp_path / "plain")
    plain = load_file(source / "model.safetensors")
    stored, expected = {}, {}
    for i, (name, x) in enumerate(plain.items()):
        stored[name] = expected[name] = x
        if "_proj.weight" in name:
            weight, scale, true = quantized(x.shape, (16, 16), seed=i)
            stored |= {name: weight, f"{name}_scale_inv": scale}
            expected[name] = true
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", names="auto", **QUICK)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert same(made, expected)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    prepared = prepare(source, "mp2", names="hf:mcore-fused")
    counts = execute(prepared, tmp_path / "ranks", fsync=False).counts
    totals = prepared.plan.totals
    assert (counts.bytes_needed, counts.bytes_read) == (totals.bytes_needed, totals.bytes_read)
    assert counts.num_reads == totals.num_reads


@pytest.mark.parametrize(
    ("arrays", "kind", "said"),
    [
        (
            {"a.weight": np.zeros((8, 8), FP8), "a.weight_scale_inv": np.ones((3, 2), np.float32)},
            LayoutError,
            r"needs scales of shape \(2, 2\), but a.weight_scale_inv has \(3, 2\)",
        ),
        (
            {"a.weight_scale_inv": np.ones((3, 2), np.float32)},
            NotFoundError,
            "scales a.weight, which is missing",
        ),
    ],
)
def test_factors_that_do_not_fit_are_refused(arrays, kind, said) -> None:
    with pytest.raises(kind, match=said):
        Mapping((Dequantize(block=(4, 4)),)).apply(Memory(arrays).catalog)


def test_dequantizing_has_no_inverse() -> None:
    with pytest.raises(LayoutError, match="the factors are lost"):
        Mapping((Dequantize(),)).inverse()


@pytest.mark.parametrize(
    ("form", "to"),
    [("nnx", "dp2mp2"), ("nnx-scan", "dp2mp2"), ("nnx", "dp2mp2opt2"), ("nnx", "pp2dp2opt2")],
)
def test_factors_need_not_divide_as_what_they_scale_does(tmp_path, form, to) -> None:
    source = save("deepseek_v3", tmp_path / "plain")
    arrays = {}
    for name, x in load_file(source / "model.safetensors").items():
        if name.endswith("proj.weight"):
            weight, scale, _ = quantized(x.shape, (32, 32))
            arrays |= {name: weight, f"{name}_scale_inv": scale}
        else:
            arrays[name] = x
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"weight_block_size": [32, 32]}
    (source / "config.json").write_text(json.dumps(config))
    save_file(arrays, source / "model.safetensors")
    whole = js.load(source, jax.devices()[0], names=f"hf:{form}")
    cut = js.load(source, to, names=f"hf:{form}")
    assert cut.keys() == whole.keys()
    for name, x in whole.items():
        np.testing.assert_array_equal(np.asarray(cut[name]), np.asarray(x))
    assert any(not x.sharding.is_fully_replicated for x in cut.values())


def settings_of(**stated: object) -> dict[str, object]:
    return {
        "model_type": "mistral",
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "torch_dtype": "float32",
        "quantization_config": {"quant_method": "x", **stated},
    }


def quantized_folder(path, weight: np.ndarray, factors: dict[str, np.ndarray], config) -> None:
    """A layer whose q_proj is ``weight``, with ``factors`` by the ends of their names."""
    path.mkdir()
    name = "model.layers.0.self_attn.q_proj.weight"
    norm = np.ones(weight.shape[1], np.float32)
    arrays = {"model.layers.0.input_layernorm.weight": norm, name: weight}
    arrays |= {f"{name.removesuffix('.weight')}.{end}": x for end, x in factors.items()}
    save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (8,), (8, 1)])
@pytest.mark.parametrize("end", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("kind", [FP8, ml_dtypes.float8_e5m2, np.int8])
def test_a_factor_of_a_tensor_or_of_each_row_is_multiplied(tmp_path, shape, end, kind) -> None:
    random = np.random.default_rng(0)
    weight = random.integers(-7, 8, (8, 4)).astype(kind)
    scale = random.uniform(0.5, 2, shape).astype(np.float32)
    true = weight.astype(np.float32) * scale.reshape(-1, 1)
    quantized_folder(tmp_path / "a", weight, {end: scale}, settings_of(weight_block_size=None))
    convert(tmp_path / "a", tmp_path / "b", names="auto", **QUICK)
    made = load_file(tmp_path / "b" / "model.safetensors")
    np.testing.assert_array_equal(made["model.layers.0.self_attn.q_proj.weight"], true)
    assert len(made) == 2
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    cut = js.load(tmp_path / "a", "mp2", names="hf:linen", dtype=np.float32)
    (kernel,) = (x for n, x in cut.items() if "q_proj" in n)
    np.testing.assert_array_equal(np.asarray(kernel), true.T)
    mapping = Mapping((Dequantize(scale="{name*}.weight_scale", block=(0, 0), dtype="F32"),))
    arrays = {"a.weight": weight, "a.weight_scale": scale}
    np.testing.assert_array_equal(mapping.apply_arrays(arrays)["a.weight"], true)
    assert read_mapping(write_mapping(mapping)) == mapping


@pytest.mark.parametrize(
    ("weight", "factors", "stated"),
    [
        # blocks, though config.json says that there are none
        (np.zeros((256, 256), FP8), {"weight_scale_inv": (2, 2)}, {"weight_block_size": None}),
        # packed without a code, groups of eight, zero points
        (np.zeros((8, 8), np.uint8), {"weight_scale": (8, 2)}, {}),
        (np.zeros((8, 8), np.uint8), {"weight_scale": (8, 2), "weight_scale_2": ()}, {}),
        (np.zeros((8, 8), np.int8), {"weight_scale": (8, 1), "weight_zero_point": (8, 1)}, {}),
        # one for each column
        (np.zeros((8, 4), FP8), {"weight_scale": (1, 4)}, {}),
    ],
)
@pytest.mark.parametrize("names", ["auto", "hf:linen"])
def test_factors_of_another_kind_are_refused_by_name(
    tmp_path, weight, factors, stated, names
) -> None:
    arrays = {end: np.ones(shape, np.float32) for end, shape in factors.items()}
    quantized_folder(tmp_path / "a", weight, arrays, settings_of(**stated))
    with pytest.raises(LayoutError, match="unsupported factors") as caught:
        convert(tmp_path / "a", tmp_path / "b", names=names, **QUICK)
    assert str(caught.value).startswith("model.layers.0.self_attn.q_proj.weight_")


def test_packed_weights_of_other_libraries_are_refused_by_name(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    name = "model.layers.0.self_attn.q_proj"
    arrays = {"qweight": np.zeros((8, 8), np.int32), "scales": np.ones((2, 8), np.float16)}
    save_file({f"{name}.{n}": x for n, x in arrays.items()}, tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text(json.dumps(settings_of()))
    with pytest.raises(LayoutError, match=r"q_proj.scales: unsupported factors of F16"):
        convert(tmp_path / "a", tmp_path / "b", names="auto", **QUICK)


def test_names_that_no_form_has_are_listed_and_no_others(tmp_path) -> None:
    weight, scale = np.zeros((8, 4), FP8), np.ones((), np.float32)
    factors = {"weight_scale": scale, "activation_scale": scale}
    quantized_folder(tmp_path / "a", weight, factors, settings_of())
    with pytest.raises(NotFoundError, match="mistral-hf has no rule") as caught:
        convert(tmp_path / "a", tmp_path / "b", names="auto", **QUICK)
    said = str(caught.value)
    assert "has no rule for 1 of 3 names: model.layers.0.self_attn.q_proj.activation_scale." in said
    convert(tmp_path / "a", tmp_path / "b", names="auto", exclude="activation_scale", **QUICK)


def test_a_mapping_of_ones_own_that_keeps_factors_keeps_their_settings(tmp_path) -> None:
    factors = {"weight_scale": np.ones((8, 1), np.float32)}
    quantized_folder(tmp_path / "a", np.zeros((8, 4), FP8), factors, settings_of())
    mapping = Mapping((Rename((("model.{x*}", "other.{x*}"),)),))
    convert(tmp_path / "a", tmp_path / "b", names=mapping, **QUICK)
    assert "quantization_config" in json.loads((tmp_path / "b" / "config.json").read_text())
