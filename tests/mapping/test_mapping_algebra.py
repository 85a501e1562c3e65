"""What cannot be is said when it is made; what does not fit, alike in files and in memory."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from mapping_random import Sizes, config_of, random_model, write_model
from mapping_worlds import Memory, read_all, same

from jaxshard.core.catalog import Model
from jaxshard.errors import FormatError, JaxshardError, LayoutError, NotFoundError
from jaxshard.mapping import (
    ROWS,
    Affine,
    Cast,
    Dequantize,
    Drop,
    Expect,
    Fuse,
    Mapping,
    Merge,
    Pad,
    Rename,
    Repeat,
    Slice,
    Split,
    Stack,
    Substitute,
    Tie,
    Transpose,
    Unfuse,
    Unpad,
    Unrepeat,
    Unstack,
    Untie,
    find_mapping,
    read_mapping,
    table,
    write_mapping,
)

W = ("w",)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Transpose(W, (0, 2)),
        lambda: Transpose(W, (-1, 0)),
        lambda: Split(W, -1, (2, 2)),
        lambda: Split(W, 0, (0, -1)),
        lambda: Split(W, 0, (-1, -1)),
        lambda: Split(W, 0, (-2, 2)),
        lambda: Merge(W, -1, (2, 2)),
        lambda: Merge(W, 0, (0, 2)),
        lambda: Slice(W, -1, 0, 1),
        lambda: Slice(W, 0, 2, 2),
        lambda: Slice(W, 0, -2, 2),
        lambda: Pad(W, -1, 2, 4),
        lambda: Pad(W, 0, 4, 2),
        lambda: Unpad(W, 0, -1, 2),
        lambda: Repeat(W, 0, 2),
        lambda: Repeat(W, 2, 0),
        lambda: Repeat(W, 2, 2, -1),
        lambda: Unrepeat(W, 2, 0),
        lambda: Cast(W, "bfloat17"),
        lambda: Affine(W, 0),
        lambda: Affine(W, float("nan")),
        lambda: Affine(W, 1e20),
        lambda: Affine(W, 2, float("inf")),
        lambda: Affine(W, 2, 1e-30),
        lambda: Cast(W, "F32", "F33"),
        lambda: Fuse(("a", "b"), "c", (1, 0)),
        lambda: Fuse((), "c", ()),
        lambda: Fuse(("a", "b"), "c", (1, 1), 0),
        lambda: Fuse(("a", "b"), "c", (1, 1), -2),
        lambda: Fuse(("a", "b"), "c", (1, 1), 1, -1),
        lambda: Unfuse("c", ("a", "b"), (1, 1), 1, -1),
        lambda: Stack("l.{layer}", "l", dim=-1),
        lambda: Stack("l.{layer}", "l", first=-1),
        lambda: Unstack("l", "l.{layer}", count=0),
        lambda: Dequantize(block=(0, 1)),
        lambda: Dequantize(block=(4,)),
        lambda: Dequantize(dtype="BF15"),
    ],
)
def test_an_operation_that_cannot_be_is_refused_when_it_is_made(make) -> None:
    with pytest.raises(LayoutError):
        make()


@pytest.mark.parametrize(
    ("op", "said"),
    [
        (Split(W, 7, (2, 2)), "has no dim 7"),
        (Split(W, 1, (5, -1)), "6 elements, expected 5"),
        (Merge(W, 1, (6, 1)), r"dims 1 to 2 of \(4, 6\) are not"),
        (Merge(W, 7, (-1,)), "dims 7 to 7"),
        (Cast(W, "I8"), "F32 to I8 would truncate fractions"),
        (Affine(("int",), 2), "affine int: I32 values cannot be multiplied and added to"),
        (Affine(("bool",), 2), "BOOL values cannot"),
        (Affine(("packed",), 2), "F4 values cannot"),
        (Affine(("complex",), 2), "C64 values cannot"),
        (Slice(W, 7, 0, 1), "has no dim 7"),
        (Slice(W, 0, 0, 5), "0:5 is not a slice"),
        (Pad(W, 7, 1, 2), "has no dim 7"),
        (Unpad(W, 7, 1, 2), "has no dim 7"),
        (Repeat(W, 2, 2, 7), "has no dim 7"),
        (Unrepeat(W, 2, 2, 7), "has no dim 7"),
        (Unrepeat(W, 3, 2), "4 elements, expected 3 x 2"),
        (Transpose(W, (0, 1, 2)), "is not a permutation"),
        (Fuse(("w", "v"), "x", (1, 1), dim=7), "has no dim 7"),
        (Fuse(("w", "v"), "x", (9, 1), ROWS), "cannot be divided into"),
        (Unfuse("w", ("a", "b"), (1, 1), dim=7), "has no dim 7"),
        (Unfuse("w", ("a", "b"), (9, 9), ROWS), "cannot be divided into 1 groups"),
        (Unfuse("w", ("a", "b"), (2, 1)), "cannot be divided into 1 groups with parts"),
        (Fuse(("w", "narrow"), "x", (1, 1)), "cannot be joined"),
        (Fuse(("w", "wide"), "x", (1, 1)), "cannot be joined"),
        (Unstack("w", "l.{layer}", dim=7), "has no dim 7"),
        (Stack("l.{layer}", "l", dim=7), "no dim 7 to stack along"),
        (Dequantize("{n*}.weight", "{n*}.scale", (2, 2)), r"scales of shape \(2, 2\), but q.scale"),
    ],
)
def test_errors_are_equal_in_files_and_in_memory(op, said) -> None:
    arrays = {
        "w": np.zeros((4, 6), np.float32),
        "v": np.zeros((4, 6), np.float32),
        "narrow": np.zeros((4, 5), np.float32),
        "wide": np.zeros((4, 6), np.float64),
        "l.0": np.zeros((2, 2), np.float32),
        "l.1": np.zeros((2, 2), np.float32),
        "int": np.zeros(2, np.int32),
        "bool": np.zeros(2, bool),
        "packed": np.zeros(2, ml_dtypes.float4_e2m1fn),
        "complex": np.zeros(2, np.complex64),
        "q.weight": np.zeros((4, 4), ml_dtypes.float8_e4m3fn),
        "q.scale": np.zeros((2, 3), np.float32),
    }
    for apply in (lambda m: m.apply(Memory(arrays).catalog), lambda m: m.apply_arrays(arrays)):
        with pytest.raises(LayoutError, match=said):
            apply(Mapping((op,)))


def test_a_tensor_without_dims_stays_one() -> None:
    arrays = {"w": np.array(3, np.int32)}
    mapping = Mapping((Rename((("w", "x"),)), Transpose(("x",), ())))
    made = mapping.apply_arrays(arrays)
    assert made["x"].shape == ()
    memory = Memory(arrays)
    assert same(read_all(memory, mapping.apply(memory.catalog)), made)
    stacked = Mapping((Stack("s.{layer}", "s"),))
    assert stacked.apply_arrays({"s.0": arrays["w"], "s.1": arrays["w"]})["s"].shape == (2,)
    back = stacked.inverse().apply_arrays({"s": np.arange(2)})
    assert [x.shape for x in back.values()] == [(), ()]


def test_dims_of_one_come_and_go() -> None:
    arrays = {"w": np.arange(6).reshape(2, 1, 3)}
    gone = Mapping((Split(W, 1, ()),))
    assert gone.apply_arrays(arrays)["w"].shape == (2, 3)
    assert same(gone.inverse().apply_arrays(gone.apply_arrays(arrays)), arrays)


def test_a_merge_that_leaves_open_how_to_split_has_no_inverse() -> None:
    with pytest.raises(LayoutError, match=r"merge of w has no inverse.*\(-1, -1\)"):
        Merge(W, 0, (-1, -1)).inverse()
    assert Merge(W, 0, (-1, 2)).inverse() == Split(W, 0, (-1, 2))


# --- oracles of single operations ----------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (3, 3), (8, 1)])
def test_blocks_of_q_k_and_v_that_are_not_equally_long(heads) -> None:
    q_heads, kv = heads
    random = np.random.default_rng(0)
    arrays = {
        x: random.integers(0, 99, (n * 4, 5)) for x, n in {"q": q_heads, "k": kv, "v": kv}.items()
    }
    parts = (q_heads, kv, kv)
    blocks = Mapping((Fuse(("q", "k", "v"), "qkv", parts),))
    expected = np.concatenate([arrays[x] for x in "qkv"])
    made = blocks.apply_arrays(arrays)
    np.testing.assert_array_equal(made["qkv"], expected)
    memory = Memory(arrays)
    assert same(read_all(memory, blocks.apply(memory.catalog)), made)
    assert same(blocks.inverse().apply_arrays(made), arrays)
    columns = Mapping((Fuse(("q", "k", "v"), "qkv", parts, dim=1),))
    turned = {n: x.T for n, x in arrays.items()}
    np.testing.assert_array_equal(columns.apply_arrays(turned)["qkv"], expected.T)


def test_padding_and_repeating_are_numpys_and_come_back() -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    pad, repeat = Mapping((Pad(W, 1, 6, 9),)), Mapping((Repeat(W, 2, 3),))
    padded = pad.apply_arrays({"w": array})["w"]
    np.testing.assert_array_equal(padded, np.pad(array, ((0, 0), (0, 3))))
    heads = array.reshape(2, 2, 6)
    repeated = np.repeat(heads, 3, axis=0).reshape(12, 6)
    np.testing.assert_array_equal(repeat.apply_arrays({"w": array})["w"], repeated)
    for mapping, made in ((pad, padded), (repeat, repeated)):
        assert same(mapping.inverse().apply_arrays({"w": made}), {"w": array})
        memory, there = Memory({"w": array}), Memory({"w": made})
        assert same(read_all(memory, mapping.apply(memory.catalog)), {"w": made})
        assert same(read_all(there, mapping.inverse().apply(there.catalog)), {"w": array})


EVERY = (
    Rename((("a.{layer}", "b.{layer}"),)),
    Substitute(((r"\d+", "n"),), ((r"n", "0"),)),
    Drop(("x",), rebuilt=True),
    Expect(("a", "b"), "mine"),
    Transpose(W, (2, 0, 1)),
    Split(W, 1, (2, -1)),
    Merge(W, 1, (2, -1)),
    Slice(W, 1, 2, 3),
    Pad(W, 1, 2, 3),
    Unpad(W, 1, 2, 3),
    Repeat(W, 2, 3, 1),
    Unrepeat(W, 2, 3, 1),
    Cast(W, "BF16", "F32"),
    Affine(W, 0.08838834764831845, -1e-05),
    Fuse(("q", "k"), "qk", (2, 1), ROWS, 1),
    Unfuse("qk", ("q", "k"), (2, 1), 2),
    Stack("l.{index}", "l", "index", 1, 2, 3),
    Unstack("l", "l.{expert}", "expert"),
    Tie((("a", "b"),), "c"),
    Untie((("a", "b"),), "c"),
    Dequantize("{x*}.w", "{x*}.s", (2, 3), "F32"),
)


@pytest.mark.parametrize("op", EVERY, ids=[op.word for op in EVERY])
def test_every_operation_is_written_as_toml_and_read_back(op) -> None:
    mapping = Mapping((op,), "mine:theirs")
    assert read_mapping(write_mapping(mapping)) == mapping


def test_every_operation_is_among_those() -> None:
    from jaxshard.mapping.mapping import _KINDS  # noqa: PLC0415

    assert {op.word for op in EVERY} == set(_KINDS)


# --- what a stranger's config.json says ------------------------------------------------------


def model_of(**config: object) -> Model:
    return Model("deepseek_v3", None, False, {**config_of("deepseek_v3", Sizes()), **config})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads .*is 0, not a number of 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "heads / kv_heads: 4 is not divisible by 3",
        ),
        ({"num_attention_heads": "4"}, "num_attention_heads is 4, not a number"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
    ],
)
def test_invalid_numbers_of_heads_are_refused(config, said) -> None:
    model = Model("llama", None, False, {**config_of("llama", Sizes()), **config})
    with pytest.raises(FormatError, match=said):
        table("hf", "mcore-fused", model)


@pytest.mark.parametrize("form", ["nnx-scan", "mcore", "mcore-fused"])
def test_absurd_numbers_of_layers_are_refused_and_take_no_time(form) -> None:
    for key in ("num_nextn_predict_layers", "num_hidden_layers"):
        with pytest.raises(FormatError, match=f"{key}.*, expected at most 10000"):
            table("hf", form, model_of(**{key: 10**9}))
        with pytest.raises(FormatError, match=f"{key} is -1"):
            table("hf", form, model_of(**{key: -1}))
    table("hf", form, model_of(first_k_dense_replace=10**9))


def test_a_file_without_a_mapping_is_refused(tmp_path) -> None:
    folder = write_model(tmp_path / "m", config_of("llama", Sizes()), random_model("llama"))
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff\xfe" + weights.read_bytes())
    catalog = Memory({}).catalog
    with pytest.raises(LayoutError, match="the file is not text"):
        find_mapping(str(weights), catalog)
    large = tmp_path / "large.toml"
    with large.open("wb") as file:
        file.truncate(17_000_000)
    with pytest.raises(LayoutError, match="exceeds 16000000 bytes"):
        find_mapping(str(large), catalog)
    with pytest.raises((LayoutError, NotFoundError)):
        find_mapping(str(folder / "config.json"), catalog)


def test_an_error_in_a_user_table_names_the_operation() -> None:
    text = '[[op]]\nop = "split"\nnames = ["w"]\ndim = -1\nsizes = [2, 2]'
    with pytest.raises(LayoutError, match=r"own\.toml, operation 1: split: dim = -1 must be 0"):
        read_mapping(text, "own.toml")


@pytest.mark.parametrize("text", ["[" * 100000, 'x = "' + "\\" * 3, "a = 1e999999"])
def test_text_that_is_no_toml_is_an_error_and_no_crash(text) -> None:
    with pytest.raises(JaxshardError):
        read_mapping(text)


def test_lossy_inverses_of_casts_are_refused() -> None:
    with pytest.raises(LayoutError, match="from I32 has no inverse: F32 to I32 would truncate"):
        Cast(W, "F32", "I32").inverse()
    assert Cast(W, "BF16", "F32").inverse() == Cast(W, "F32", "BF16")
    with pytest.raises(LayoutError, match="C64 to F32 would lose the imaginary parts"):
        Mapping((Cast(W, "F32"),)).apply(Memory({"w": np.zeros(2, np.complex64)}).catalog)
