"""The compiled loops: the same bits as NumPy, nothing touched beside, and refused where unfit."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxshard import native

BF16 = np.dtype(ml_dtypes.bfloat16)
compiled = pytest.mark.skipif(not native.is_there(), reason="the loops were not compiled here")


def test_where_they_can_be_compiled_the_loops_are_there(tmp_path):
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None or os.environ.get("JAXSHARD_NATIVE"):
        pytest.skip("no C compiler, or asked to go without")
    source = Path(native.__file__).with_name("kernels.c")
    command = [compiler, "-std=gnu11", "-fPIC", "-shared", source, "-o", tmp_path / "kernels.so"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{compiler} cannot compile them: {done.stderr[-200:]}")
    assert native.is_there(), "they were not compiled when jaxshard was installed: do it again"


def random_bytes(shape: tuple[int, ...], dtype: object, seed: int = 0) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return data.view(dtype).reshape(shape)


def on_a_line(shape: tuple[int, int], dtype: object) -> np.ndarray:
    """Random bytes that begin with a cache line."""
    made = random_bytes(shape, dtype, seed=1)
    room = np.zeros(made.nbytes + 64, np.uint8)
    out = room[-room.ctypes.data % 64 :][: made.nbytes].view(dtype).reshape(shape)
    out[...] = made
    return out


# --- turning ----------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 1200),
    apart=st.one_of(st.integers(0, 70), st.just("a line")),
    is_final=st.booleans(),
)
def test_turned_is_transposed_and_nothing_else_is_touched(dtype, rows, columns, apart, is_final):
    if apart == "a line":  # each row of the result begins with a cache line
        apart = -rows % 64
    values = random_bytes((rows, columns + apart), dtype)[:, :columns]
    memory = on_a_line((columns, rows + apart), dtype)
    before, out = memory.copy(), memory[:, :rows]
    assert native.turn(out.T, values, is_final=is_final)
    assert out.tobytes() == values.T.tobytes()
    assert memory[:, rows:].tobytes() == before[:, rows:].tobytes()


@compiled
def test_rows_may_lie_backwards_or_be_one_again():
    values, out = random_bytes((70, 90), "u2"), np.zeros((90, 70), "u2")
    assert native.turn(out.T, values[::-1])
    assert np.array_equal(out.T, values[::-1])
    assert native.turn(out[::-1].T, np.broadcast_to(values[0], (70, 90)))
    assert np.array_equal(out[::-1], np.broadcast_to(values[0], (70, 90)).T)


@compiled
def test_what_is_not_dense_as_it_should_be_is_left_to_numpy():
    values, out = random_bytes((8, 8), "u2"), np.zeros((8, 8), "u2")
    assert not native.turn(out, values)
    assert not native.turn(out.T, values.T)
    assert not native.turn(out.T, random_bytes((8, 8), "u4"))
    assert not native.turn(np.zeros((8, 8), "u8").T, random_bytes((8, 8), "u8"))
    assert not native.turn(np.zeros((2, 8, 8), "u2"), random_bytes((2, 8, 8), "u2"))
    assert not out.any()


# --- casts ------------------------------------------------------------------------------


@compiled
def test_every_bfloat16_is_widened_as_ml_dtypes_does():
    values = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    out = np.zeros(values.shape, np.float32)
    assert native.cast(out, values)
    assert out.tobytes() == values.astype(np.float32).tobytes()


@compiled
def test_float32_is_rounded_as_ml_dtypes_does_nans_and_ties_too():
    some = np.arange(0, 1 << 32, 4099, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([some, ties, ties - 1, ties + 1]).view(np.float32)
    out = np.zeros(values.shape, BF16)
    assert native.cast(out, values)
    with np.errstate(all="ignore"):
        assert out.tobytes() == values.astype(BF16).tobytes()


@compiled
def test_casts_take_any_order_of_dims_that_both_have():
    values = np.arange(6 * 5 * 7, dtype=np.float32).reshape(6, 5, 7).transpose(2, 0, 1)
    out = np.empty_like(values, BF16)
    assert native.cast(out, values)
    assert np.array_equal(out, values.astype(BF16))
    assert not native.cast(np.zeros(values.shape, BF16), values)  # another order
    assert not native.cast(out[:, :, ::2], values[:, :, ::2])  # gaps
    assert not native.cast(np.zeros((5, 6), np.float16), np.zeros((5, 6), np.float32))
    assert not native.cast(np.zeros(30, BF16), np.zeros((5, 6), np.float32))


# --- adapters ---------------------------------------------------------------------------


def whole_numbers(shape: tuple[int, int], seed: int) -> np.ndarray:
    """So small that every sum of products is exact in float32, in any order."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


@compiled
@given(
    rows=st.integers(1, 41),
    columns=st.one_of(st.integers(1, 70), st.integers(240, 600)),
    rank=st.one_of(st.integers(1, 20), st.just(256)),
    scaling=st.sampled_from([1.0, 2.0, 0.3, -1 / 3]),
    in_place=st.booleans(),
    turned=st.booleans(),
)
def test_an_adapter_is_added_with_the_bits_of_numpy(rows, columns, rank, scaling, in_place, turned):
    weight = random_bytes((rows, columns + 9), BF16)  # NaNs, infinities and all
    out = weight if in_place else random_bytes((rows, columns + 9), BF16, seed=1)
    before = out.copy()
    b, a = whole_numbers((rows, rank), 2), whole_numbers((rank, columns), 3)
    with np.errstate(all="ignore"):
        product = b @ a * np.float32(scaling)
        expected = (weight[:, :columns].astype(np.float32) + product).astype(BF16)
    there, here = out[:, :columns], weight[:, :columns]
    if turned:
        assert native.add_product(there.T, here.T, a.T, b.T, scaling)
    else:
        assert native.add_product(there, here, b, a, scaling)
    assert there.tobytes() == expected.tobytes()
    assert out[:, columns:].tobytes() == before[:, columns:].tobytes()


@compiled
def test_sums_are_as_near_as_float32_is():
    random = np.random.default_rng(0)
    b, a = (random.standard_normal(s, np.float32) for s in ((64, 16), (16, 300)))
    weight = random.standard_normal((64, 300)).astype(BF16)
    out = np.zeros_like(weight)
    assert native.add_product(out, weight, b, a, 0.7)
    exact = weight.astype(np.float64) + 0.7 * (b.astype(np.float64) @ a.astype(np.float64))
    assert np.abs(out.astype(np.float64) - exact).max() <= 2.0**-8 * np.abs(exact).max()
    assert (out != exact.astype(BF16)).mean() < 0.001


@compiled
def test_other_dtypes_ranks_and_orders_are_left_to_numpy():
    b, a = whole_numbers((4, 2), 0), whole_numbers((2, 6), 1)
    weight = np.zeros((4, 6), BF16)
    assert not native.add_product(weight.astype(np.float16), weight.astype(np.float16), b, a, 1.0)
    assert not native.add_product(np.zeros((6, 4), BF16).T, weight, b, a, 1.0)
    assert not native.add_product(weight[:, ::2], weight[:, ::2], b, a[:, ::2], 1.0)
    tall = whole_numbers((4, 257), 0), whole_numbers((257, 6), 1)
    assert not native.add_product(weight, weight, *tall, 1.0)
    assert not weight.any()


@compiled
def test_what_c_may_not_write_or_read_is_left_to_numpy():
    values = np.ones((4, 6), np.float32)
    fixed = np.zeros((4, 6), BF16)
    fixed.flags.writeable = False
    assert not native.cast(fixed, values)
    assert not native.cast(np.zeros((4, 6), BF16), values.astype(">f4"))
    odd = np.zeros(4 * 6 * 2 + 1, np.uint8)[1:].view(BF16).reshape(4, 6)
    assert not native.cast(odd, values)
    words = np.zeros((6, 4), np.uint16)
    words.flags.writeable = False
    assert not native.turn(words.T, random_bytes((4, 6), np.uint16))
    assert not native.turn(np.zeros((6, 4), np.uint16).T, random_bytes((5, 6), np.uint16))
    b, a = whole_numbers((4, 2), 0), whole_numbers((2, 6), 1)
    weight = np.zeros((4, 6), BF16)
    assert not native.add_product(fixed, weight, b, a, 1.0)
    assert not native.add_product(weight, weight, b[:3], a, 1.0)
    assert not native.add_product(weight, weight, b, a[:, :5], 1.0)
    assert not native.add_product(weight, weight, b[:, :1], a, 1.0)
    assert not native.add_product(weight, weight, b.astype(np.float64), a, 1.0)
    assert not weight.any()


def test_without_a_library_nothing_is_done(monkeypatch):
    monkeypatch.setattr(native, "_library", lambda: None)
    out = np.zeros((6, 4), np.uint16)
    assert not native.is_there()
    assert not native.turn(out.T, random_bytes((4, 6), np.uint16))
    assert not native.cast(np.zeros(4, BF16), np.ones(4, np.float32))
    weight = np.zeros((4, 6), BF16)
    assert not native.add_product(weight, weight, np.ones((4, 1), "f4"), np.ones((1, 6), "f4"), 1.0)
    assert not out.any()
    assert not weight.any()


def test_a_library_of_another_version_is_not_used(monkeypatch):
    native._library.cache_clear()
    monkeypatch.setattr(native, "_VERSION", -1)
    assert not native.is_there()
    monkeypatch.undo()
    native._library.cache_clear()


def test_the_environment_may_ask_to_go_without(monkeypatch):
    native._library.cache_clear()
    monkeypatch.setenv("JAXSHARD_NATIVE", "0")
    assert not native.is_there()
    monkeypatch.undo()
    native._library.cache_clear()
