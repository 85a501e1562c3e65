"""Quantized weights: each rank's part finds its own factors, or the layout is refused.

NumPy on the source is the oracle: every factor has a value of its own, so a rank that takes
a neighbour's shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from rules_models import FAMILIES
from safetensors import deserialize
from safetensors.numpy import save_file

import jaxshard as js
from jaxshard.api import convert
from jaxshard.core.catalog import Model
from jaxshard.core.layout import Layout, Strategy
from jaxshard.errors import LayoutError
from jaxshard.rules import Rules, layout
from jaxshard.rules.tensor_dims import Factors

QUICK = {"workers": 1, "fsync": False}
FP8 = ml_dtypes.float8_e4m3fn
Shape = tuple[int, ...]
Arrays = Mapping[str, np.ndarray]


class Quantized(NamedTuple):
    """A weight with its factors, and how a program finds the factor of each value."""

    weight: str
    shapes: Mapping[str, Shape]
    config: Mapping[str, Any]
    find: Mapping[str, Callable[[Arrays], np.ndarray]]


def spread(factors: np.ndarray, lengths: Shape, blocks: Shape) -> np.ndarray:
    """``factors`` for each value; a program broadcasts one, and repeats several block by block."""
    for dim, (length, block) in enumerate(zip(lengths, blocks, strict=True)):
        if factors.shape[dim] == 1:
            factors = np.repeat(factors, length, dim)
        else:
            assert factors.shape[dim] == -(-length // block), "the numbers of blocks differ"
            factors = np.take(np.repeat(factors, block, dim), np.arange(length), dim)
    return factors


def ceil(length: int, block: int) -> int:
    return -(-length // block)


def fp8(rows: int, columns: int, a: int, b: int) -> Quantized:
    shapes = {"a.weight": (rows, columns), "a.weight_scale_inv": (ceil(rows, a), ceil(columns, b))}
    return Quantized(
        "a.weight",
        shapes,
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [a, b]}},
        {"scale": lambda x: spread(x["a.weight_scale_inv"], x["a.weight"].shape, (a, b))},
    )


def channel(rows: int, columns: int, a: int, b: int) -> Quantized:
    shapes = {"a.weight": (rows, columns), "a.weight_scale": (rows, 1), "a.input_scale": ()}
    find = {"scale": lambda x: spread(x["a.weight_scale"], x["a.weight"].shape, (1, 1))}
    return Quantized("a.weight", shapes, {}, find)


def one(rows: int, columns: int, a: int, b: int) -> Quantized:
    shapes: dict[str, Shape] = {"a.weight": (rows, columns), "a.weight_scale_inv": ()}
    find = {"scale": lambda x: np.broadcast_to(x["a.weight_scale_inv"], x["a.weight"].shape)}
    return Quantized("a.weight", shapes, {}, find)


def packed(rows: int, columns: int, a: int, b: int) -> Quantized:
    """compressed-tensors, four bits: eight inputs in an int, eight rows in one of zero points."""
    shapes = {
        "a.weight_packed": (8 * rows, columns),
        "a.weight_scale": (8 * rows, ceil(8 * columns, 8 * b)),
        "a.weight_zero_point": (rows, ceil(8 * columns, 8 * b)),
        "a.weight_shape": (2,),
    }
    group = {"config_groups": {"group_0": {"weights": {"group_size": 8 * b, "num_bits": 4}}}}

    def zeros(x: Arrays) -> np.ndarray:
        r, c = x["a.weight_packed"].shape
        return spread(x["a.weight_zero_point"], (r, c), (8, b))

    find = {
        "scale": lambda x: spread(x["a.weight_scale"], x["a.weight_packed"].shape, (1, b)),
        "zero": zeros,
    }
    return Quantized("a.weight_packed", shapes, {"quantization_config": group}, find)


def gptq(rows: int, columns: int, a: int, b: int, ordered: bool = False) -> Quantized:
    groups = ceil(8 * rows, 8 * a)
    shapes = {
        "a.qweight": (rows, 8 * columns),
        "a.scales": (groups, 8 * columns),
        "a.qzeros": (groups, columns),
    }
    if ordered:
        shapes["a.g_idx"] = (8 * rows,)

    def of(x: Arrays, name: str, pack: int) -> np.ndarray:
        found = np.repeat(x[name], pack, 1)
        inputs, outputs = 8 * x["a.qweight"].shape[0], x["a.qweight"].shape[1]
        assert found.shape[1] == outputs
        if ordered:
            return found[x["a.g_idx"].astype(int) % groups]
        return spread(found, (inputs, outputs), (8 * a, 1))

    find = {"scale": lambda x: of(x, "a.scales", 1), "zero": lambda x: of(x, "a.qzeros", 8)}
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8 * a}}
    return Quantized("a.qweight", shapes, config, find)


def gptq_in_order(rows: int, columns: int, a: int, b: int) -> Quantized:
    return gptq(rows, columns, a, b, ordered=True)


def awq(rows: int, columns: int, a: int, b: int) -> Quantized:
    groups = ceil(rows, 4 * a)
    shapes = {
        "a.qweight": (rows, columns),
        "a.scales": (groups, 8 * columns),
        "a.qzeros": (groups, columns),
    }

    def scale(x: Arrays) -> np.ndarray:
        r, c = x["a.qweight"].shape
        return spread(x["a.scales"], (r, 8 * c), (4 * a, 1))

    find = {
        "scale": scale,
        "zero": lambda x: spread(x["a.qzeros"], x["a.qweight"].shape, (4 * a, 1)),
    }
    return Quantized("a.qweight", shapes, {"quantization_config": {"group_size": 4 * a}}, find)


def mxfp4(rows: int, columns: int, a: int, b: int) -> Quantized:
    shapes = {"a_blocks": (4, rows, columns, 16), "a_scales": (4, rows, columns)}
    find = {"scale": lambda x: spread(x["a_scales"], x["a_blocks"].shape[:3], (1, 1, 1))}
    return Quantized("a_blocks", shapes, {"quantization_config": {"quant_method": "mxfp4"}}, find)


def nvfp4(rows: int, columns: int, a: int, b: int) -> Quantized:
    shapes: dict[str, Shape] = {
        "a.weight": (rows, 8 * columns),
        "a.weight_scale": (rows, columns),
        "a.weight_scale_2": (),
        "a.input_scale": (),
    }
    find = {"scale": lambda x: spread(x["a.weight_scale"], x["a.weight"].shape, (1, 8))}
    return Quantized("a.weight", shapes, {"quantization_config": {"group_size": 16}}, find)


FORMATS = (fp8, channel, one, packed, gptq, gptq_in_order, awq, mxfp4, nvfp4)
STRATEGIES = ("mp2", "mp3", "mp4", "dp2mp2opt2", "dp4optall", "dp4mp2ep2", "dp6opt3")
_sizes = st.sampled_from([1, 2, 3, 5, 6, 8, 11, 12, 16, 24, 36, 48, 64])
_axes = st.permutations(["mp", "dp", "-", "-"])


def numbered(shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """Arrays with a value of its own in every place."""
    return {n: np.arange(np.prod(s, dtype=int)).reshape(s) for n, s in shapes.items()}


def check_every_rank(case: Quantized, made: Layout) -> None:
    source = numbered(case.shapes)
    for name, find in case.find.items():
        true = find(source)
        for rank in range(made.num_ranks):
            boxes = {n: made.box_of(n, s, rank) for n, s in case.shapes.items()}
            if boxes[case.weight] is None:
                continue
            held = {n: source[n][b.slices] for n, b in boxes.items() if b is not None}
            own = find(held)
            stored = case.shapes[case.weight]
            box = boxes[case.weight]
            assert box is not None
            part = tuple(
                slice(a * n // s, b * n // s)
                for a, b, n, s in zip(box.start, box.stop, true.shape, stored, strict=False)
            )
            np.testing.assert_array_equal(own, true[part], err_msg=f"{name}, rank {rank}")


@given(
    st.sampled_from(FORMATS),
    st.tuples(_sizes, _sizes),
    st.tuples(st.sampled_from([2, 3, 4, 8]), st.sampled_from([2, 3, 4, 8])),
    st.sampled_from(STRATEGIES),
    _axes,
    st.booleans(),
    st.none() | _axes,
)
def test_every_rank_finds_the_factors_of_its_part_or_the_layout_is_refused(
    make, size, blocks, strategy, axes, replicate, other
) -> None:
    case = make(*size, *blocks)

    def spec(name: str, axes) -> tuple[str, str]:
        return name, ",".join(axes[: len(case.shapes[name])]) or "-"

    specs = [spec(case.weight, axes)]
    if other is not None:  # rules of the factors' own
        specs += [spec(n, other) for n in case.shapes if n != case.weight]
    rules = Rules("mine", specs=tuple(specs), first=("a*",))
    model = Model(config=case.config)
    try:
        made = layout(
            case.shapes,
            Strategy(strategy),
            rules,
            model,
            uneven="replicate" if replicate else "error",
        )
    except LayoutError:
        event("refused")
        return
    cut = made.placements[case.weight][0].spec
    event(f"{make.__name__}: {'cut' if any(cut) else 'whole'}")
    check_every_rank(case, made)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("mp2", r"42\.75 blocks of 128 in each.*pad to 11008"),
        ("mp4", r"21\.375 blocks of 128 in each.*pad to 11264"),
    ],
)
def test_a_cut_inside_a_block_is_refused_with_the_number_that_fits(strategy, said) -> None:
    shapes = {"m.up_proj.weight": (10944, 256), "m.up_proj.weight_scale_inv": (86, 2)}
    with pytest.raises(LayoutError, match=said):
        layout(shapes, Strategy(strategy), FAMILIES["llama"])


def test_a_divisor_of_the_number_of_blocks_is_named_where_there_is_one() -> None:
    shapes = {"m.up_proj.weight": (1536, 256), "m.up_proj.weight_scale_inv": (12, 2)}
    with pytest.raises(LayoutError, match=r"has 1\.5 blocks .*a divisor of 12 fits, or pad to"):
        layout(shapes, Strategy("mp8"), FAMILIES["llama"])
    made = layout(shapes, Strategy("mp4"), FAMILIES["llama"])
    assert made.placements["m.up_proj.weight_scale_inv"][0].spec == (("mp",),)


def test_an_optimizer_shard_leaves_a_weight_whole_that_it_would_cut_inside_a_block() -> None:
    shapes = {
        "m.up_proj.weight": (384, 256),
        "m.up_proj.weight_scale_inv": (3, 2),
        "m.norm.weight": (256,),
    }
    rules = FAMILIES["llama"].override(Rules("stage", first=("*",)))
    made = layout(shapes, Strategy("dp2opt2"), rules)
    assert [p.spec for (p,) in made.placements.values()] == [(), (), (("dp",),)]
    (note,) = made.notes
    assert "m.up_proj.weight dim 0 of (384, 256) in 2 parts has 1.5 blocks of 128" in note


def test_a_rule_that_parts_factors_from_their_weight_is_refused() -> None:
    shapes = {"m.up_proj.weight": (256, 256), "m.up_proj.weight_scale_inv": (2, 2)}
    rules = FAMILIES["llama"].override(Rules("mine", specs=(("*_scale_inv", "-,mp"),)))
    with pytest.raises(LayoutError, match=r"rank 0 holds \[0:2, 0:1\] of it, expected \[0:1, 0:2"):
        layout(shapes, Strategy("mp2"), rules)


def test_groups_that_are_numbered_are_whole_and_those_of_others_are_not() -> None:
    shapes: dict[str, Shape] = {}
    for name in "ab":
        shapes |= {f"{name}.qweight": (16, 8), f"{name}.scales": (2, 8)}
    shapes["b.g_idx"] = (128,)
    model = Model(config={"quantization_config": {"group_size": 64}})
    rules = Rules("mine", specs=(("*.qweight", "mp,-"),))
    made = layout(shapes, Strategy("mp2"), rules, model)
    assert [n for n, (p,) in made.placements.items() if p.spec] == [
        *("a.qweight", "a.scales", "b.qweight", "b.g_idx"),
    ]
    cut = rules.override(Rules("cut", specs=(("*.scales", "mp,-"),)))
    with pytest.raises(LayoutError, match=r"b\.scales: rank 0 holds") as caught:
        layout(shapes, Strategy("mp2"), cut, model)
    assert "a.scales" not in str(caught.value)


def test_factors_without_dims_and_settings_of_a_layer_are_whole() -> None:
    shapes: dict[str, Shape] = {
        "m.q_proj.weight": (8, 8),
        "m.q_proj.weight_scale_inv": (),
        "m.k_proj.weight_packed": (8, 1),
        "m.k_proj.weight_scale": (8, 1),
        "m.k_proj.weight_shape": (2,),
        "m.q_proj.input_scale": (1,),
        "m.o_proj.weight": (8, 8),
        "m.o_proj.weight_scale": (8, 1),
    }
    made = layout(shapes, Strategy("mp2"), FAMILIES["llama"])
    cut = {n: p.spec for n, (p,) in made.placements.items() if p.spec}
    assert cut == {
        "m.q_proj.weight": (("mp",),),
        "m.k_proj.weight_packed": (("mp",),),
        "m.k_proj.weight_scale": (("mp",),),
        "m.o_proj.weight": ((), ("mp",)),
    }


@pytest.mark.parametrize(
    ("config", "shape", "scales", "is_cut"),
    [
        ({}, (256, 8), (2, 1), True),  # 128 unless config.json gives a size
        ({}, (32, 8), (4, 1), True),  # of powers of two, only 8 gives four factors
        ({}, (36, 8), (4, 1), False),
        ([9, 9], (36, 8), (4, 1), True),
        ([10, 9], (36, 8), (4, 1), False),  # the last block is cut short
        ([100, 9], (36, 8), (4, 1), False),  # config.json contradicts the shapes
        (["9", None], (36, 8), (4, 1), False),
    ],
)
def test_the_length_of_blocks_is_that_of_the_config_where_shapes_agree(
    config, shape, scales, is_cut
) -> None:
    shapes = {"m.up_proj.weight": shape, "m.up_proj.weight_scale_inv": scales}
    model = Model(config={"quantization_config": {"weight_block_size": config}})
    made = layout(shapes, Strategy("mp2"), FAMILIES["llama"], model, uneven="replicate")
    assert bool(made.placements["m.up_proj.weight"][0].spec) == is_cut
    assert bool(made.placements["m.up_proj.weight_scale_inv"][0].spec) == is_cut


def load_file(path: Path) -> dict[str, np.ndarray]:
    """As the safetensors package reads it; its arrays of NumPy have no FP8."""
    kinds = {"F8_E4M3": FP8, "F32": np.float32, "BF16": ml_dtypes.bfloat16}
    return {
        name: np.frombuffer(bytes(t["data"]), kinds[t["dtype"]]).reshape(t["shape"])
        for name, t in deserialize(path.read_bytes())
    }


def folder(path: Path, rows: int) -> Path:
    """A model of one FP8 layer."""
    random = np.random.default_rng(0)
    path.mkdir()
    weight = random.standard_normal((rows, 128)).astype(FP8)
    scale = random.uniform(0.5, 2, (-(-rows // 128), 1)).astype(np.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: weight, f"{name}_scale_inv": scale}, path / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"model_type": "llama", "num_hidden_layers": 1, "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    return path


def true_values(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    (name,) = (n for n in arrays if n.endswith(".weight"))
    weight, scale = arrays[name], arrays[f"{name}_scale_inv"]
    return weight.astype(np.float32) * np.repeat(scale, 128, 0)[: len(weight)]


def test_every_door_holds_blocks_together(tmp_path: Path) -> None:
    good, bad = folder(tmp_path / "good", 512), folder(tmp_path / "bad", 640 - 128 + 64)
    source = load_file(good / "model.safetensors")
    convert(good, tmp_path / "cut", "mp2", **QUICK)
    for rank in (0, 1):
        (path,) = (tmp_path / "cut" / f"rank_{rank}").glob("*.safetensors")
        half = slice(256 * rank, 256 * (rank + 1))
        np.testing.assert_array_equal(true_values(load_file(path)), true_values(source)[half])
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    for place in ("mp2", mesh):
        made = js.load(good, place)
        assert all(not x.sharding.is_fully_replicated for x in made.values())
        with pytest.raises(LayoutError, match="share a factor of weight_scale_inv"):
            js.load(bad, place)
    own = layout(
        {n: x.shape for n, x in load_file(bad / "model.safetensors").items() if "scale" not in n},
        Strategy("mp2"),
        FAMILIES["llama"],
    )
    name = next(iter(own.placements))
    parted = Layout(2, {name: own.placements[name], f"{name}_scale_inv": own.placements[name]})
    with pytest.raises(LayoutError, match="share a factor of weight_scale_inv"):
        convert(bad, tmp_path / "no", parted, **QUICK)
    with pytest.raises(LayoutError, match="share a factor of weight_scale_inv"):
        js.load(bad, parted)


def test_dequantized_weights_are_cut_anywhere(tmp_path: Path) -> None:
    bad = folder(tmp_path / "bad", 192)
    convert(bad, tmp_path / "cut", "mp2", names="auto", **QUICK)
    true = true_values(load_file(bad / "model.safetensors")).astype(ml_dtypes.bfloat16)
    for rank in (0, 1):
        (path,) = (tmp_path / "cut" / f"rank_{rank}").glob("*.safetensors")
        (made,) = load_file(path).values()
        np.testing.assert_array_equal(made, true[96 * rank : 96 * (rank + 1)])


def test_many_layers_of_factors_are_examined_once_for_each_kind() -> None:
    shapes: dict[str, Shape] = {}
    for i in range(2000):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        shapes |= {name: (512, 256), f"{name}_scale_inv": (4, 2)}
    factors = Factors(shapes, {})
    made = layout(shapes, Strategy("mp4"), FAMILIES["llama"])
    assert len({id(p) for p in made.placements.values()}) <= 2
    assert len({id(factors.granules(n)[0]) for n in factors.weights.values()}) == 1
