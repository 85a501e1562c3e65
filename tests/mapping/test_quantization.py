"""Quantized checkpoints become the values that the libraries that wrote them compute."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapping_models import save
from mapping_random import Sizes, config_of
from mapping_worlds import Memory, read_box
from quantized_oracles import LIBRARY, LINEAR, ORACLES, Oracle, bits_of, recorded
from safetensors.numpy import load_file, save_file

import jaxshard as js
from jaxshard.api import convert
from jaxshard.conversion.execute import execute
from jaxshard.conversion.prepare import prepare
from jaxshard.core.box import Box
from jaxshard.core.catalog import Model
from jaxshard.errors import FormatError, LayoutError
from jaxshard.mapping import (
    Dequantize,
    Mapping,
    dequantized,
    find_mapping,
    read_mapping,
    write_mapping,
)
from jaxshard.planning.copies import move_into
from jaxshard.planning.plan import _cost
from jaxshard.storage.engine import Budget, Counts

QUICK = {"workers": 1, "fsync": False}
STEM = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
NVFP4 = ("packed", "scale", "global_scale")
CASES = [pytest.param(name, id=name) for name in ORACLES]


def stem_of(name: str) -> str:
    return STEM if name in LINEAR else EXPERTS


def arrays_of(name: str, oracle: Oracle) -> dict[str, np.ndarray]:
    return {stem_of(name) + end: x for end, x in oracle.stored.items()}


def target_of(name: str) -> str:
    return f"{STEM}.weight" if name in LINEAR else EXPERTS


def folder_of(path, name: str, oracle: Oracle, **config: object):
    """A checkpoint of one layer, of a family without tables."""
    path.mkdir()
    norm = np.ones(oracle.true.shape[-1], ml_dtypes.bfloat16)
    arrays = {"model.layers.0.input_layernorm.weight": norm, **arrays_of(name, oracle)}
    save_file(arrays, path / "model.safetensors")
    settings = {"model_type": "unheard_of", "quantization_config": oracle.config, **config}
    (path / "config.json").write_text(json.dumps(settings))
    return path


def catalog_of(name: str, oracle: Oracle) -> Memory:
    memory = Memory(arrays_of(name, oracle))
    model = Model("unheard_of", config={"quantization_config": oracle.config})
    object.__setattr__(memory.catalog, "model", model)
    return memory


def assert_same(name: str, made: np.ndarray, true: np.ndarray) -> None:
    """The same bits, but for ModelOpt, which makes a zero of the E2M1 value -0."""
    if name == "modelopt-nvfp4":
        made = made + np.zeros((), made.dtype)
        true = true + np.zeros((), true.dtype)
    assert (made.dtype, made.shape) == (true.dtype, true.shape)
    assert made.tobytes() == true.tobytes()


def check(name: str, oracle: Oracle, path) -> None:
    """Converted, loaded whole and in parts, and computed in memory, the bits are the library's."""
    source = folder_of(path / "a", name, oracle)
    prepared = prepare(source, names="auto", workers=1)
    counts, totals = execute(prepared, path / "b", fsync=False).counts, prepared.plan.totals
    for number in ("bytes_needed", "bytes_read", "num_reads", "bytes_written", "num_copies"):
        assert getattr(counts, number) == getattr(totals, number)
    made = load_file(path / "b" / "model.safetensors")
    assert set(made) == {"model.layers.0.input_layernorm.weight", target_of(name)}
    assert_same(name, made[target_of(name)], oracle.true)
    config = json.loads((path / "b" / "config.json").read_text())
    assert config == {"model_type": "unheard_of"}
    wide = js.load(source, DEVICE, names="auto", dtype=np.float32)[target_of(name)]
    np.testing.assert_array_equal(
        np.asarray(wide).astype(ml_dtypes.bfloat16), oracle.true, strict=True
    )
    if name == "nvfp4":  # compressed-tensors' formula, before its rounding to BF16
        packed, scale, divisor = (oracle.stored[f".weight_{e}"] for e in NVFP4)
        numbers = np.stack([packed & 15, packed >> 4], -1).reshape(oracle.true.shape)
        factors = np.repeat(scale.astype(np.float32) / divisor, 16, axis=1)
        values = numbers.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(wide), values * factors, strict=True)
    kept = js.load(source, DEVICE)
    assert {n: str(x.dtype) for n, x in arrays_of(name, oracle).items() if x.size > 2} == {
        n: str(x.dtype) for n, x in kept.items() if x.size > 2 and "norm" not in n
    }
    memory = catalog_of(name, oracle)
    mapping = dequantized(memory.catalog)
    assert mapping is not None
    assert read_mapping(write_mapping(mapping)) == mapping
    in_memory = mapping.apply_arrays(arrays_of(name, oracle))
    assert_same(name, in_memory[target_of(name)], oracle.true)


@pytest.mark.parametrize("name", CASES)
def test_recorded_weights_become_the_values_of_their_library(tmp_path, name) -> None:
    check(name, recorded(name), tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_weights_become_the_values_that_their_library_computes(tmp_path, name) -> None:
    pytest.importorskip(LIBRARY[name])
    again, small = ORACLES[name](8, 64), recorded(name)
    assert again.true.tobytes() == small.true.tobytes()
    assert {n: x.tobytes() for n, x in again.stored.items()} == {
        n: x.tobytes() for n, x in small.stored.items()
    }
    check(name, ORACLES[name](96, 320, seed=1), tmp_path)


@pytest.mark.parametrize("name", CASES)
@given(st.randoms(use_true_random=False), st.sampled_from([100, 256, 3000, 1 << 20]))
def test_any_part_is_read_once_with_its_own_factors(name, random, block_bytes) -> None:
    oracle = recorded(name)
    memory = catalog_of(name, oracle)
    mapping = dequantized(memory.catalog)
    assert mapping is not None
    tensor = mapping.apply(memory.catalog)[target_of(name)]
    start = [random.randrange(n) for n in tensor.shape]
    stop = [random.randrange(a, n) + 1 for a, n in zip(start, tensor.shape, strict=True)]
    columns = -2 if name == "mxfp4" else -1
    unit = {"int4": 8, "int8": 4 if "groups" in name else 1, "fp8": 1}.get(name[:4].strip("-"), 2)
    start[columns] -= start[columns] % unit  # a cut between two values of an integer is refused
    stop[columns] = -(-stop[columns] // unit) * unit
    box = Box(tuple(start), tuple(stop))
    made, counts = read_box(memory, tensor, box, Budget(1, block_bytes, 2 * block_bytes))
    assert_same(name, made, oracle.true[box.slices])
    move = move_into(tensor, {box: (0,)})
    if not move.whole_operands:  # a plan counts them apart
        wanted = ((move.targets[0].box, 1),)
        limits = (block_bytes, 2 * block_bytes)
        planned, _ = _cost(move.sources, move.forms, wanted, move.unit_bytes, limits)
        assert planned[:3] == (counts.bytes_needed, counts.bytes_read, counts.num_reads)
    if block_bytes == 1 << 20:
        assert counts.bytes_needed == needed_bytes(name, oracle, box)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block_bytes", [512, 3000, 1 << 20])
def test_small_blocks_read_each_byte_once(name, block_bytes) -> None:
    oracle = recorded(name)
    memory = catalog_of(name, oracle)
    mapping = dequantized(memory.catalog)
    assert mapping is not None
    tensor = mapping.apply(memory.catalog)[target_of(name)]
    whole = Box.whole(tensor.shape)
    made, _ = read_box(memory, tensor, whole, Budget(1, block_bytes, 2 * block_bytes))
    assert_same(name, made, oracle.true)
    assert memory.read_bytes == needed_bytes(name, oracle, whole)


def needed_bytes(name: str, oracle: Oracle, box: Box) -> int:
    """The bytes of a part of the weight, of its groups' factors, and of all coarser factors."""
    columns = -2 if name == "mxfp4" else -1
    (_, weight), *factors = sorted(oracle.stored.items(), key=lambda item: -item[1].size)
    total = weight.nbytes * box.size // oracle.true.size
    for x in (x for e, x in factors if e not in (".input_scale", ".weight_shape")):
        group = oracle.true.shape[columns] // x.shape[-1] if x.ndim > 1 and x.shape[-1] > 1 else 0
        groups = (box.stop[columns] - 1) // group - box.start[columns] // group + 1 if group else 0
        rows = box.size // box.shape[columns]
        total += rows * groups * x.itemsize if group else x.nbytes
    return total


QUANTIZED = {
    "a.weight": np.ones((2, 2), ml_dtypes.float8_e4m3fn),
    "a.weight_scale_inv": np.ones((1, 1), np.float32),
}


def model_of(**config: object) -> Model:
    return Model("deepseek_v3", None, False, {**config_of("deepseek_v3", Sizes()), **config})


@pytest.mark.parametrize(
    ("quantization", "block"),
    [
        ("fp8", (128, 128)),
        (None, (128, 128)),
        ({}, (128, 128)),
        ({"weight_block_size": [4, 2]}, (4, 2)),
        ({"weight_block_size": 5}, None),
        ({"weight_block_size": [0, 0]}, None),
        ({"weight_block_size": [4]}, None),
        ({"weight_block_size": [4, "2"]}, None),
        ({"weight_block_size": [True, 2]}, None),
    ],
)
def test_blocks_of_factors_follow_the_config_or_are_refused(quantization, block) -> None:
    catalog = Memory(QUANTIZED).catalog
    object.__setattr__(catalog, "model", model_of(quantization_config=quantization))
    if block is None:
        with pytest.raises(FormatError, match=r"weight_block_size is .*, expected two numbers"):
            dequantized(catalog)
    else:
        found = dequantized(catalog)
        assert found is not None
        assert found.ops == (Dequantize(block=block),)


@pytest.mark.parametrize("word", ["int8", "float8_e4m3fn", 7, None, "nonsense"])
def test_a_dtype_that_is_no_float_is_not_what_weights_become(word) -> None:
    catalog = Memory(QUANTIZED).catalog
    object.__setattr__(catalog, "model", model_of(dtype=word, torch_dtype="float16"))
    found = dequantized(catalog)
    assert found is not None
    assert found.ops[0].dtype == "F16"


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> tuple[object, dict[str, np.ndarray]]:
    """A tiny gpt-oss in MXFP4, and the weights that transformers dequantizes it to."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gpt_oss")
    sizes = {"hidden_size": 96, "intermediate_size": 64, "vocab_size": 64, "head_dim": 16}
    sizes |= {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.GptOssConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention"],
        **sizes,
    )
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in transformers.GptOssForCausalLM(config).state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = shape
            groups = (experts, rows, columns // 32)
            arrays[f"{name}_blocks"] = random.integers(0, 256, (*groups, 16), np.uint8)
            arrays[f"{name}_scales"] = random.integers(110, 130, groups, np.uint8)
        else:
            arrays[name] = random.normal(size=shape).astype(ml_dtypes.bfloat16)
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(
            {
                **config.to_dict(),
                "dtype": "bfloat16",
                "quantization_config": {"quant_method": "mxfp4"},
            }
        )
    )
    true = transformers.GptOssForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
    ).state_dict()
    return folder, {n: bits_of(x) for n, x in true.items()}


@pytest.mark.parametrize("strategy", ["dp1", "mp2", "dp2mp2", "fsdp4mp2", "fsdp8"])
def test_a_gpt_oss_of_the_hub_is_what_transformers_dequantizes(gpt_oss, strategy) -> None:
    folder, true = gpt_oss
    counts: list[Counts] = []
    arrays = js.load(folder, strategy, names="auto", counted=counts.append)
    assert set(arrays) == set(true)
    for name, array in arrays.items():
        assert np.asarray(array).tobytes() == true[name].tobytes()
    stored = sum(x.num_bytes for x in js.open(folder).tensors.values())
    assert (counts[0].bytes_needed, counts[0].bytes_read) == (stored, stored)


def test_a_rank_reads_its_own_blocks_and_factors(gpt_oss, tmp_path) -> None:
    folder, _ = gpt_oss
    only = ["experts.gate_up_proj_(blocks|scales)$"]
    whole = prepare(folder, names="auto", include=only).plan.totals
    for rank in range(4):
        prepared = prepare(folder, "mp4", names="auto", include=only, rank=rank)
        counts = execute(prepared, tmp_path / f"{rank}", fsync=False).counts
        assert counts.bytes_needed == whole.bytes_needed // 4
        assert counts.bytes_needed == prepared.plan.totals.bytes_needed
        assert counts.num_reads == prepared.plan.totals.num_reads
    # 96 inputs in 8 parts of 12: each has part of a group, whose factor two ranks read
    mapped = find_mapping("auto", js.open(folder)).apply(js.open(folder))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    eighth = move_into(mapped[name], {Box((0, 12, 0), (4, 24, 128)): (0,)})
    factors = eighth.operands[0]
    assert [s.part_of((0, 6, 0, 0), (4, 6, 2, 128)) for s in eighth.forms[0].factors] == [
        Box((0, 0, 0), (4, 128, 1))
    ]
    assert factors.name == f"{name}_scales"
    with pytest.raises(LayoutError, match=r"begins or ends inside a group of 2\. Cut at multiples"):
        move_into(mapped[name], {Box((0, 0, 0), (4, 33, 128)): (0,)})


PACKED = {
    ".qweight": np.zeros((8, 8), np.int32),
    ".scales": np.ones((2, 8), np.float16),
    ".qzeros": np.zeros((2, 1), np.int32),
}
ASYMMETRIC = {
    ".weight_packed": np.zeros((8, 8), np.int32),
    ".weight_scale": np.ones((8, 2), np.float16),
    ".weight_zero_point": np.zeros((1, 2), np.int32),
}
NF4 = {
    ".weight": np.zeros((256, 1), np.uint8),
    ".weight.absmax": np.zeros(8, np.uint8),
    ".weight.quant_map": np.zeros(16, np.float32),
}
INT4 = {".weight_packed": ASYMMETRIC[".weight_packed"], ".weight_scale": np.ones((8, 1), "f2")}
INTS = {"weights": {"type": "int", "num_bits": 3, "strategy": "channel"}}


@pytest.mark.parametrize(
    ("stored", "settings", "said"),
    [
        (PACKED, {"quant_method": "gptq"}, "quant_method 'gptq'"),
        (PACKED, {"quant_method": "awq"}, "quant_method 'awq'"),
        (NF4, {"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        (ASYMMETRIC, {"quant_method": "x", "format": "pack-quantized"}, "format 'pack-quantized'"),
        (INT4, {"quant_method": "x"}, "quant_method 'x'"),  # of a width that is not stated
        (INT4, {"quant_method": "x", "config_groups": {"group_0": INTS}}, "quant_method 'x'"),
        ({".codes": np.zeros((8, 8), np.int16)}, {"quant_method": "aqlm"}, "quant_method 'aqlm'"),
    ],
)
def test_other_methods_are_refused_with_their_name(tmp_path, stored, settings, said) -> None:
    folder = folder_of(tmp_path / "a", "nvfp4", Oracle(stored, settings, np.zeros(1), ""))
    with pytest.raises(LayoutError, match="Dequantize the model with the library") as caught:
        js.load(folder, DEVICE, names="auto")
    assert said in str(caught.value)
    assert STEM in str(caught.value)
    kept = js.load(folder, DEVICE)
    assert len(kept) == len(stored) + 1


@pytest.mark.parametrize("size", [{"group_size": 32}, {}])
def test_groups_of_another_size_than_the_formats_are_refused(size) -> None:
    oracle = recorded("nvfp4")
    wide = {**oracle.stored, ".weight_scale": oracle.stored[".weight_scale"][:, ::4]}
    memory = catalog_of("nvfp4", Oracle(wide, {"quant_method": "x", **size}, oracle.true, ""))
    with pytest.raises(LayoutError, match=r"weight_scale of F8_E4M3 and shape \(8, 1\)"):
        assert dequantized(memory.catalog) is None


def test_what_has_no_code_or_is_no_integer_of_its_width_is_refused() -> None:
    with pytest.raises(LayoutError, match="unknown code 'int5'"):
        Dequantize(code="int5")
    arrays = {"a.weight": np.zeros((2, 2), np.int16), "a.weight_scale_inv": np.ones((1, 1), "f4")}
    for code, bits in (("e2m1", 8), ("int4", 32)):
        mapping = Mapping((Dequantize(code=code),))
        for apply in (mapping.apply_arrays, lambda x, m=mapping: m.apply(Memory(x).catalog)):
            with pytest.raises(LayoutError, match=f"{code} is packed in integers of {bits} bits"):
                apply(arrays)
    mapping = Mapping((Dequantize(scale_dtype="F8_E8M0"),))
    with pytest.raises(LayoutError, match="F32 is not as wide as F8_E8M0"):
        mapping.apply_arrays(arrays)


@pytest.fixture(scope="module")
def nvfp4_llama(tmp_path_factory):
    """A tiny llama whose projections are in NVFP4, and its true values as a checkpoint."""
    root = tmp_path_factory.mktemp("nvfp4")
    plain, folder = save("llama", root / "plain"), root / "quantized"
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, x in load_file(plain / "model.safetensors").items():
        stem, (rows, *columns) = name.removesuffix(".weight"), x.shape
        if name.endswith("proj.weight"):
            scale = random.uniform(1, 400, (rows, columns[0] // 16))
            arrays[f"{stem}.weight_packed"] = random.integers(0, 256, (rows, columns[0] // 2), "u1")
            arrays[f"{stem}.weight_scale"] = scale.astype(ml_dtypes.float8_e4m3fn)
            arrays[f"{stem}.weight_global_scale"] = random.uniform(100, 3000, 1).astype("f4")
        else:
            arrays[name] = x
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config |= {"dtype": "float32", "quantization_config": recorded("nvfp4").config}
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, root / "true", names="auto", **QUICK)
    return folder, root / "true"


@pytest.mark.parametrize("to", ["dp1", "fsdp2mp2"])
@pytest.mark.parametrize("form", ["nnx-scan", "maxtext", "mcore-fused"])
def test_packed_weights_are_stacked_and_fused_as_true_ones_are(nvfp4_llama, form, to) -> None:
    packed, true = (js.load(x, to, names=f"hf:{form}", dtype=np.float32) for x in nvfp4_llama)
    assert packed.keys() == true.keys()
    for name, array in true.items():
        np.testing.assert_array_equal(np.asarray(packed[name]), np.asarray(array), strict=True)
        assert packed[name].sharding.is_equivalent_to(array.sharding, array.ndim)
