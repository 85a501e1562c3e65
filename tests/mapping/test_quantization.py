"""Quantized checkpoints become the values that the libraries that wrote them compute."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapping_random import Sizes, config_of
from mapping_worlds import Memory, read_box
from quantized_oracles import LIBRARY, LINEAR, ORACLES, Oracle, recorded
from safetensors.numpy import load_file, save_file

import jaxshard as js
from jaxshard.conversion.execute import execute
from jaxshard.conversion.prepare import prepare
from jaxshard.core.box import Box
from jaxshard.core.catalog import Model
from jaxshard.errors import FormatError
from jaxshard.mapping import Dequantize, dequantized, read_mapping, write_mapping
from jaxshard.storage.engine import Budget

QUICK = {"workers": 1, "fsync": False}
STEM = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
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
@given(st.randoms(use_true_random=False), st.sampled_from([256, 3000, 1 << 20]))
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
    if block_bytes == 1 << 20:
        assert counts.bytes_needed == needed_bytes(name, oracle, box)


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
