"""Values multiplied and shifted: equal bits from files, in NumPy and in JAX, through every door."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapping_worlds import FACTORS, SHIFTS, Arrays, Memory, read_all, same, worlds
from safetensors.numpy import load_file, save_file

from jaxshard import native
from jaxshard.api import convert, load_rank, plan, verify
from jaxshard.conversion.open import open_checkpoint
from jaxshard.errors import LayoutError
from jaxshard.loader import load
from jaxshard.lora import with_adapter
from jaxshard.mapping import (
    Affine,
    Cast,
    Dequantize,
    Mapping,
    Pad,
    Rename,
    Stack,
    Transpose,
    read_mapping,
)
from jaxshard.rules import Rules
from jaxshard.saver import save
from jaxshard.storage.engine import Budget

DTYPES = ("F32", "BF16", "F16", "F64", "F8_E4M3", "F8_E5M2")
KINDS = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
#: XLA's own casts between F32 and F64 flush subnormal values to zero on CPUs.
NARROW = tuple(n for n in DTYPES if n != "F64")
W = ("w",)
QUICK = {"workers": 1, "fsync": False}


def any_values(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray[Any, Any]:
    """Random bits: a third of any value, a third near the smallest numbers, a third of moderate."""
    random = np.random.default_rng(seed)
    kind = np.dtype(KINDS[dtype])
    bits = np.dtype(f"u{kind.itemsize}")
    size = int(np.prod(shape))
    found = random.integers(0, np.iinfo(bits).max, size, bits, endpoint=True)
    smallest = np.asarray(ml_dtypes.finfo(kind).smallest_normal, kind).view(bits)
    found[::3] %= np.maximum(bits.type(2), bits.type(4) * smallest)
    found = found.view(kind)
    with np.errstate(over="ignore"):
        found[1::3] = random.normal(size=len(found[1::3])).astype(kind)
    return found.reshape(shape)


def same_values(a: Arrays, b: Arrays) -> bool:
    """The same names, dtypes, shapes and bits; a NaN is any NaN."""
    return same(*({n: _plain(np.asarray(x)) for n, x in arrays.items()} for arrays in (a, b)))


def _plain(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(x), np.array(np.nan, x.dtype), x)


def in_jax(mapping: Mapping, arrays: Arrays) -> dict[str, Any]:
    with jax.enable_x64(True):
        made = mapping.apply_arrays({n: jax.device_put(x) for n, x in arrays.items()})
        return {n: np.asarray(x) for n, x in made.items()}


def from_files(mapping: Mapping, arrays: Arrays) -> dict[str, Any]:
    memory = Memory(arrays)
    return read_all(memory, mapping.apply(memory.catalog))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", [None, "F32", "BF16", "F16"])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_many_values_are_looked_up_with_the_same_bits(dtype, to, is_compiled, monkeypatch) -> None:
    """If there are more of them than a table of all values has rows."""
    if not is_compiled:
        monkeypatch.setattr(native, "_library", lambda: None)
    arrays = {"w": any_values((4, 150, 120), dtype, 2)}
    ops = (Affine(W, 0.3, 0.7), *([Cast(W, to)] if to else []), Affine(W, 1.5))
    memory = Memory(arrays)
    for mapping in (Mapping(ops), Mapping((Transpose(W, (1, 2, 0)), *ops))):
        made = read_all(memory, mapping.apply(memory.catalog), Budget(1, 1 << 22, 1 << 22))
        assert same_values(made, mapping.apply_arrays(arrays))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("times", "plus"), [(0.3, 0), (-1, 1), (1, 0.7), (1 / 3, -0.1), (8, 1e9)])
def test_a_value_is_multiplied_and_shifted_in_float32_and_rounded_once(dtype, times, plus) -> None:
    x = any_values((64, 48), dtype, 1)
    number = np.float64 if dtype == "F64" else np.float32
    with np.errstate(all="ignore"):
        product = x.astype(number) * number(times)  # + 0 would turn -0 into 0
        want = {"w": (product + number(plus) if plus else product).astype(x.dtype)}
    mapping = Mapping((Affine(("w",), times, plus),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a value too large becomes infinite, and that is all
        assert same_values(mapping.apply_arrays({"w": x}), want)
        assert same_values(from_files(mapping, {"w": x}), want)
        assert same_values(in_jax(mapping, {"w": x}), want)


@settings(max_examples=300)
@given(worlds(("affine", "affine", "cast"), DTYPES), st.sampled_from(DTYPES), st.integers(0, 99))
def test_any_chain_has_the_same_bits_in_files_and_in_memory(world, dtype, seed) -> None:
    shape, mapping, ways, tile = world
    arrays = {"w": any_values(shape, dtype, seed)}
    memory = Memory(arrays, {"w": ways})
    made = read_all(memory, mapping.apply(memory.catalog), Budget(1, 64, tile))
    assert same_values(made, mapping.apply_arrays(arrays))


@settings(max_examples=40)
@given(worlds(("affine", "affine", "cast"), NARROW), st.sampled_from(NARROW), st.integers(0, 99))
def test_any_chain_has_the_same_bits_in_jax(world, dtype, seed) -> None:
    shape, mapping, _, _ = world
    arrays = {"w": any_values(shape, dtype, seed)}
    assert same_values(in_jax(mapping, arrays), mapping.apply_arrays(arrays))


@settings(max_examples=25)
@given(FACTORS, SHIFTS, st.integers(0, 99), st.sampled_from(["F32", "F64", "BF16"]))
def test_products_near_the_smallest_numbers_are_rounded_alike(times, plus, seed, dtype) -> None:
    """XLA flushes them to zero on CPUs, and fuses the sum with the product."""
    factors = ((times, plus), (0.7, 0), (1, 1.5), (1, -plus), (0.3, 0))
    mapping = Mapping(tuple(Affine(("w",), *pair) for pair in factors))
    arrays = {"w": any_values((30_000,), dtype, seed)}
    assert same_values(in_jax(mapping, arrays), mapping.apply_arrays(arrays))


def test_every_value_of_16_bits_and_of_8_has_the_same_bits_in_jax() -> None:
    mapping = Mapping((Affine(("{x}",), 0.3, 0.7), Affine(("{x}",), 1e-9)))
    arrays = {
        n: np.arange(1 << 8 * np.dtype(k).itemsize, dtype=f"u{np.dtype(k).itemsize}").view(k)
        for n, k in KINDS.items()
        if np.dtype(k).itemsize < 4
    }
    assert same_values(in_jax(mapping, arrays), mapping.apply_arrays(arrays))
    assert same_values(from_files(mapping, arrays), mapping.apply_arrays(arrays))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("first", [True, False])
def test_a_dequantized_weight_is_rounded_before_it_is_multiplied(dtype, first) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "q.weight": any_values((8, 12), "F8_E4M3", 3),
        "q.weight_scale_inv": random.normal(size=(2, 3)).astype(np.float32),
    }
    scale = Affine(("q.weight",), 0.3, 1)
    ops = (Dequantize(block=(4, 4), dtype=dtype), scale, Transpose(("q.weight",)))
    mapping = Mapping((scale, *ops[::2]) if first else ops)
    want = mapping.apply_arrays(arrays)
    assert same_values(from_files(mapping, arrays), want)
    assert same_values(in_jax(mapping, arrays), want)
    only = Mapping((Dequantize(block=(4, 4), dtype=dtype), Affine(("q.weight",), 1, 1)))
    assert same_values(in_jax(only, arrays), only.apply_arrays(arrays))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_values_that_integers_pack_are_multiplied_after_they_are_scaled(dtype) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "q.weight": random.integers(0, 256, (8, 6), np.uint8),
        "q.weight_scale_inv": random.normal(size=(2, 3)).astype(np.float32),
    }
    unpack = Dequantize(block=(4, 4), dtype=dtype, code="e2m1")
    mapping = Mapping((unpack, Affine(("q.weight",), 0.3, 1), Transpose(("q.weight",))))
    want = mapping.apply_arrays(arrays)
    assert want["q.weight"].shape == (12, 8)
    assert same_values(from_files(mapping, arrays), want)
    assert same_values(in_jax(mapping, arrays), want)


def test_zeros_padded_before_are_shifted_and_those_padded_after_stay() -> None:
    arrays = {"w": np.ones((2, 3), np.float32)}
    before = Mapping((Pad(("w",), 0, 2, 4), Affine(("w",), 2, 1)))
    after = Mapping((Affine(("w",), 2, 1), Pad(("w",), 0, 2, 4)))
    for mapping, row in ((before, 1), (after, 0)):
        want = {"w": np.float32([[3] * 3, [3] * 3, [row] * 3, [row] * 3])}
        for made in (mapping.apply_arrays(arrays), from_files(mapping, arrays)):
            assert same(made, want)
        assert same(in_jax(mapping, arrays), want)
    assert same(from_files(before.then(before.inverse()), arrays), arrays)
    assert same(from_files(after.then(after.inverse()), arrays), arrays)


def test_a_number_without_dims_is_multiplied() -> None:
    for kind in (np.float32, ml_dtypes.bfloat16):
        arrays = {"w": np.array(3, kind)}
        mapping = Mapping((Affine(("w",), 2, 1),))
        assert same(from_files(mapping, arrays), {"w": np.array(7, kind)})
        assert same(mapping.apply_arrays(arrays), {"w": np.array(7, kind)})


def test_the_inverse_restores_values_and_powers_of_two_to_the_bit() -> None:
    x = any_values((20, 20), "F32", 5)
    x = x[np.isfinite(x) & (np.abs(x) < 1e30)]
    there = Mapping((Affine(("w",), 0.125),))
    assert there.inverse().ops == (Affine(("w",), 8.0),)
    big = x[(np.abs(x) > 1e-30) | (x == 0)]
    assert same(from_files(there.then(there.inverse()), {"w": big}), {"w": big})
    some = Mapping((Affine(("w",), 0.3, 1.5),))
    made = from_files(some.then(some.inverse()), {"w": np.float32([1, -2, 3.5])})["w"]
    np.testing.assert_allclose(made, [1, -2, 3.5], rtol=1e-6)
    assert some.inverse().inverse().ops[0].times == pytest.approx(0.3)


def test_a_step_is_computed_in_the_width_that_its_dtype_has_then() -> None:
    x = np.float64([1 / 3, 1e-40, 3e38])
    for mapping in (
        Mapping((Cast(("w",), "F32"), Affine(("w",), 0.3, 0.7))),
        Mapping((Cast(("w",), "F32"), Affine(("w",), 0.3, 0.7), Cast(("w",), "F64"))),
    ):
        assert same(from_files(mapping, {"w": x}), mapping.apply_arrays({"w": x}))
    wide = Mapping((Cast(("w",), "F64"), Affine(("w",), 0.3, 0.7)))
    for y in (x.astype(np.float32), np.array([1, 2**53 - 1])):
        assert same(from_files(wide, {"w": y}), wide.apply_arrays({"w": y}))


def test_a_mapping_written_by_hand_may_have_whole_numbers() -> None:
    text = '[[op]]\nop = "affine"\nnames = ["w"]\ntimes = 2\nplus = '
    assert read_mapping(text + "1").ops == (Affine(("w",), 2.0, 1.0),)
    for wrong in ("true", '"1"', "[1.0]"):
        with pytest.raises(LayoutError, match=r"plus = .* is not float"):
            read_mapping(text + wrong)


# --- Through the doors


LAYER = "layers.{layer}."
THERE = Mapping(
    (
        Affine((LAYER + "q",), 64**-0.5),
        Affine((LAYER + "norm",), 1, 1),
        Transpose((LAYER + "q",)),
        Stack(LAYER + "{rest*}", "decoder.{rest*}"),
        Rename((("embed", "table"),)),
    )
)
RULES = Rules(
    "decoder",
    (("decoder.q", "-,-,mp"), ("decoder.norm", "-,-"), ("decoder.up", "-,mp,-"), ("table", "mp,-")),
)


def model(dtype: str, layers: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    random, kind = np.random.default_rng(0), KINDS[dtype]
    shapes: dict[str, tuple[int, ...]] = {"embed": (16, 24)}
    for i in range(layers):
        shapes |= {f"layers.{i}.q": (32, 24), f"layers.{i}.up": (40, 24), f"layers.{i}.norm": (24,)}
    return {n: random.normal(size=s).astype(kind) for n, s in shapes.items()}


def written(where: Path, arrays: Arrays) -> Path:
    where.mkdir()
    save_file(dict(arrays), where / "model.safetensors", {"format": "pt"})
    (where / "config.json").write_text("{}")
    return where


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_it_is_loaded_converted_saved_and_verified(tmp_path, dtype) -> None:
    arrays = model(dtype)
    folder = written(tmp_path / "hf", arrays)
    want = THERE.apply_arrays(arrays)
    options: dict[str, Any] = {"names": THERE, "rules": RULES}
    on_devices = load(folder, "dp2mp2", **options)
    assert same({n: np.asarray(x) for n, x in on_devices.items()}, want)
    planned = plan(folder, "dp1mp2", workers=1, **options)
    report = convert(folder, tmp_path / "ranks", "dp1mp2", **options, **QUICK)
    ran, totals = asdict(report.counts), asdict(planned.totals)
    assert {n: totals[n] for n in ran if n in totals} == {n: ran[n] for n in ran if n in totals}
    assert ran["bytes_read"] == totals["bytes_read"] > 0
    half = load_rank(folder, "dp1mp2", 1, **options)
    assert half["decoder.q"].tobytes() == want["decoder.q"][:, :, 16:].tobytes()
    mapped = THERE.apply(open_checkpoint(folder))
    verdict = verify(tmp_path / "ranks", against=mapped)
    assert not verdict.problems
    assert verdict.bytes_compared >= sum(x.nbytes for x in want.values())
    other = THERE.then(Mapping((Affine(("decoder.norm",), -1),))).apply(open_checkpoint(folder))
    (problem,) = verify(tmp_path / "ranks", against=other).problems
    assert "decoder.norm" in str(problem)

    save(on_devices, tmp_path / "back", names=THERE.inverse(), extras=folder, **QUICK)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert same(back, THERE.inverse().apply_arrays(want))
    for name in arrays:
        if name.endswith(("q", "up", "embed")):  # 1/8 is a power of two
            assert back[name].tobytes() == arrays[name].tobytes()


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_merged_adapter_is_added_before(tmp_path, dtype) -> None:
    """As if the merged model had been written, and mapped then."""
    arrays = model(dtype)
    base = written(tmp_path / "base", {f"{n}.weight": x for n, x in arrays.items()})
    random = np.random.default_rng(1)
    halves = {}
    for i in range(3):
        at = f"base_model.model.layers.{i}.q"
        halves[f"{at}.lora_A.weight"] = random.normal(size=(2, 24)).astype(np.float32)
        halves[f"{at}.lora_B.weight"] = random.normal(size=(32, 2)).astype(np.float32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(halves, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    names = Mapping((Rename((("{x*}.weight", "{x*}"),)), *THERE.ops))
    merged = with_adapter(base, adapter, reproducible=True)
    convert(merged, tmp_path / "merged", **QUICK)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert not same(stored, load_file(base / "model.safetensors"))
    convert(merged, tmp_path / "mapped", names=names, **QUICK)
    assert same(load_file(tmp_path / "mapped" / "model.safetensors"), names.apply_arrays(stored))
