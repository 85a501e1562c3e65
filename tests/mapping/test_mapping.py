"""Mappings in files: every target box is read right, and back again, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapping_worlds import Memory, grid, read_all, read_box, same, worlds

from jaxshard.core.box import Box
from jaxshard.core.catalog import Tensor
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.mapping import (
    ROWS,
    Cast,
    Fuse,
    Mapping,
    Rename,
    Slice,
    Split,
    Stack,
    Transpose,
)
from jaxshard.storage.engine import Budget

HEADS, KV, HEAD, HIDDEN, FFN = 4, 2, 4, 8, 12

ATTENTION = "layers.{layer}.attn."
FUSED = Mapping(
    (
        Fuse(
            (ATTENTION + "q", ATTENTION + "k", ATTENTION + "v"),
            ATTENTION + "qkv",
            parts=(HEADS // KV, 1, 1),
            groups=KV,
        ),
        Fuse(("layers.{layer}.gate", "layers.{layer}.up"), "layers.{layer}.fc1", (1, 1), ROWS),
        Transpose(("layers.{layer}.attn.qkv", "layers.{layer}.fc1", "layers.{layer}.down")),
        Stack("layers.{layer}.{rest*}", "layers.{rest*}"),
        Rename((("layers.{rest*}", "decoder.{rest*}"), ("embed", "embedding.table"))),
    )
)


def model(layers: int = 3, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    shapes = {"embed": (16, HIDDEN)}
    for i in range(layers):
        shapes |= {
            f"layers.{i}.attn.q": (HEADS * HEAD, HIDDEN),
            f"layers.{i}.attn.k": (KV * HEAD, HIDDEN),
            f"layers.{i}.attn.v": (KV * HEAD, HIDDEN),
            f"layers.{i}.gate": (FFN, HIDDEN),
            f"layers.{i}.up": (FFN, HIDDEN),
            f"layers.{i}.down": (HIDDEN, FFN),
            f"layers.{i}.norm": (HIDDEN,),
        }
    random = np.random.default_rng(seed)
    return {
        n: random.integers(0, 255, (*s, np.dtype(dtype).itemsize), np.uint8).view(dtype).reshape(s)
        for n, s in shapes.items()
    }


def test_a_fused_transposed_stacked_model_is_what_numpy_makes_of_it() -> None:
    arrays = model(dtype="int32")
    memory = Memory(arrays)
    made = read_all(memory, FUSED.apply(memory.catalog))
    q, k, v = (arrays[f"layers.1.attn.{x}"] for x in "qkv")
    grouped = [x.reshape(KV, -1, HIDDEN) for x in (q, k, v)]
    qkv = np.concatenate(grouped, axis=1).reshape(-1, HIDDEN).T
    fc1 = np.stack([arrays["layers.2.gate"], arrays["layers.2.up"]], axis=1).reshape(-1, HIDDEN).T
    np.testing.assert_array_equal(made["decoder.attn.qkv"][1], qkv)
    np.testing.assert_array_equal(made["decoder.fc1"][2], fc1)
    np.testing.assert_array_equal(made["decoder.down"][0], arrays["layers.0.down"].T)
    np.testing.assert_array_equal(made["decoder.norm"][2], arrays["layers.2.norm"])
    np.testing.assert_array_equal(made["embedding.table"], arrays["embed"])


def test_files_and_memory_agree_and_the_way_back_is_the_identity() -> None:
    arrays = model(dtype="int16")
    memory = Memory(arrays)
    made = read_all(memory, FUSED.apply(memory.catalog))
    assert same(made, FUSED.apply_arrays(arrays))
    there = Memory(made)
    assert same(read_all(there, FUSED.inverse().apply(there.catalog)), arrays)
    assert same(FUSED.inverse().apply_arrays(made), arrays)
    assert same(read_all(memory, FUSED.inverse().apply(FUSED.apply(memory.catalog))), arrays)


@settings(max_examples=600)
@given(worlds(), st.randoms(use_true_random=False))
def test_any_chain_of_operations_reads_any_box_as_numpy_would(world, random) -> None:
    shape, mapping, ways, tile = world
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape) + 1
    memory = Memory({"w": array}, {"w": ways})
    expected = mapping.apply_arrays({"w": array})["w"]
    tensor = mapping.apply(memory.catalog)["w"]
    assert tensor.shape == expected.shape
    budget = Budget(1, 64, tile)
    assert np.array_equal(read_box(memory, tensor, Box.whole(tensor.shape), budget)[0], expected)
    start = tuple(random.randrange(n) for n in tensor.shape)
    stop = tuple(random.randrange(a, n) + 1 for a, n in zip(start, tensor.shape, strict=True))
    box = Box(start, stop)
    if not fits(tensor, box):
        with pytest.raises(LayoutError, match="begins or ends inside a group"):
            read_box(memory, tensor, box, budget)
        return
    part, counts = read_box(memory, tensor, box, budget)
    assert np.array_equal(part, expected[box.slices])
    assert counts.bytes_needed <= part.nbytes


def fits(tensor: Tensor, box: Box) -> bool:
    """Whether ``box`` is a box of the factors too, asked element by element."""
    for dim, factors in enumerate(tensor.factors or ()):
        places = np.stack(np.unravel_index(np.arange(box.start[dim], box.stop[dim]), factors))
        extents = places.max(axis=1) - places.min(axis=1) + 1
        if np.prod(extents) != places.shape[1]:
            return False
    return True


def test_one_rank_of_a_fused_stacked_model_reads_its_eighth_and_nothing_else() -> None:
    layers, heads, kv, head, hidden, tp = 32, 16, 8, 4, 16, 8
    rows = {"q": heads * head, "k": kv * head, "v": kv * head}
    arrays = {
        f"l.{i}.{x}": np.zeros((n, hidden), np.float32)
        for i in range(layers)
        for x, n in rows.items()
    }
    memory = Memory(arrays)
    fuse = Fuse(("l.{layer}.q", "l.{layer}.k", "l.{layer}.v"), "l.{layer}.qkv", (2, 1, 1), kv)
    mapped = Mapping((fuse, Stack("l.{layer}.qkv", "qkv"))).apply(memory.catalog)
    tensor = mapped["qkv"]
    assert tensor.shape == (32, 128, 16)
    rank = 3
    box = Box((0, rank * 16, 0), (32, (rank + 1) * 16, 16))
    _, counts = read_box(memory, tensor, box, Budget(1, 1 << 20, 1 << 20))
    assert counts.bytes_needed == counts.bytes_read == tensor.num_bytes // tp
    assert only_touched(memory, rank, tp)
    read_box(memory, tensor, Box((0, 0, 0), (1, 16, 16)))  # what rank 0 would read
    assert not only_touched(memory, rank, tp)


def only_touched(memory: Memory, rank: int, tp: int) -> bool:
    """Whether of every tensor just the rows of ``rank`` were read."""
    touched = np.zeros(len(memory.data), bool)
    for a, b in memory.touched:
        touched[a:b] = True
    mine = np.zeros(len(memory.data), bool)
    for stored in memory.catalog.tensors.values():
        share = stored.num_bytes // tp
        first = stored.shards[0].offset + rank * share
        mine[first : first + share] = True
    return np.array_equal(touched, mine)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("to", ["F32", "BF16", "F16"])
def test_a_cast_rounds_as_numpy_does(dtype: str, to: str) -> None:
    import ml_dtypes  # noqa: F401, PLC0415 - registers bfloat16

    array = np.random.default_rng(1).normal(size=(6, 8)).astype(dtype)
    memory = Memory({"w": array}, {"w": (2, 1)})
    mapping = Mapping((Cast(("w",), to), Transpose(("w",))))
    expected = mapping.apply_arrays({"w": array})
    assert same(read_all(memory, mapping.apply(memory.catalog)), expected)


def test_a_cast_there_and_back_keeps_the_rounding() -> None:
    array = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
    memory = Memory({"w": array})
    there = Mapping((Cast(("w",), "BF16", "F32"),))
    both = there.then(there.inverse())
    made = read_all(memory, both.apply(memory.catalog))["w"]
    assert same({"w": made}, both.apply_arrays({"w": array}))
    assert not np.array_equal(made, array)


@pytest.mark.parametrize(
    ("mapping", "kind", "said"),
    [
        (Mapping((Fuse(("a", "c"), "d", (1, 1)),)), NotFoundError, "fuse d: a exists, but c is"),
        (Mapping((Fuse(("a", "b"), "d", (1, 2)),)), LayoutError, r"\[4, 4\] rows along dim 0"),
        (Mapping((Rename((("a", "b"),)),)), LayoutError, "two sources for one target"),
        (Mapping((Split(("a",), 0, (3, -1)),)), LayoutError, "has 4 elements, expected 3 x ?"),
        (Mapping((Transpose(("a",), (0, 1, 2)),)), LayoutError, "is not a permutation"),
    ],
)
def test_errors_have_names_and_numbers(mapping, kind, said) -> None:
    arrays = {"a": np.zeros((4, 6), np.int8), "b": np.zeros((4, 6), np.int8)}
    with pytest.raises(kind, match=said):
        mapping.apply(Memory(arrays).catalog)
    with pytest.raises(kind, match=said):
        mapping.apply_arrays(arrays)


def test_a_missing_layer_is_named() -> None:
    arrays = {f"l.{i}.w": np.zeros(2, np.int8) for i in (0, 1, 3)}
    with pytest.raises(NotFoundError, match=r"stack w: layer 2 of 0 to 3 is missing"):
        Mapping((Stack("l.{layer}.w", "w"),)).apply(Memory(arrays).catalog)


@pytest.mark.parametrize("op", [Slice(("a",), 0, 0, 1), Cast(("a",), "F32")])
def test_an_operation_without_an_inverse_raises(op) -> None:
    with pytest.raises(LayoutError, match="has no inverse"):
        Mapping((op,)).inverse()


def test_a_shard_that_begins_inside_interleaved_rows_is_refused() -> None:
    arrays = {"g": np.zeros((3, 2), np.int8), "u": np.zeros((3, 2), np.int8)}
    memory = Memory(arrays)
    fused = Mapping((Fuse(("g", "u"), "w", (1, 1), ROWS),)).apply(memory.catalog)["w"]
    first, second = grid((6, 2), (2, 1))
    assert second.start == (3, 0)
    with pytest.raises(LayoutError, match="begins or ends inside a group of 2"):
        read_box(memory, fused, first)
