"""Strategy files as JSON: written ones are read back, and invalid fields are named."""

from __future__ import annotations

import json

import pytest

from jaxshard.errors import FormatError, LayoutError
from jaxshard.formats import strategy_files as sf
from jaxshard.formats.folder import MemoryFolder
from jaxshard.formats.strategy_codec import ParamLayout, from_json

W = ParamLayout((2,), ((0, -1),))
N = ParamLayout((2,), ((-1,),))


def test_a_strategy_written_as_json_is_read_back() -> None:
    strategies = sf.Strategies({s: sf.Stage(s, "x", {"w-1": W, "n": N}) for s in (0, 1)})
    back = sf.read(MemoryFolder({"s.json": sf.json_file(strategies)}))
    assert {s: v.params for s, v in back.stages.items()} == {
        0: {"w-1": W, "n": N},
        1: {"w-1": W, "n": N},
    }
    nested = ParamLayout((2, 2), ((1, 0), (-1,)))
    with pytest.raises(
        LayoutError, match="JSON strategies cannot express a dim split over several"
    ):
        sf.json_file(sf.Strategies({0: sf.Stage(0, "x", {"w": nested})}))


def test_a_json_file_of_one_stage_is_read() -> None:
    text = b"""{"current_stage": 2,
        "parallel_strategy_item": {"MatMul": {"stage": 1, "parallel_strategy": [[2, 1], [2, 1]]}},
        "parallel_layout_item": {"w": {"dev_matrix": [4, 2], "tensor_map": [0, -1],
            "param_split_shape": [], "indices_offset": [], "field": 0,
            "opt_weight_shard_step": 2, "opt_weight_shard_size": 2}}}"""
    (stage,) = sf.read(MemoryFolder({"s.json": text})).stages.values()
    assert stage.number == 1
    assert stage.params == {"w": ParamLayout((4, 2), ((0, -1),), 2, 2)}


PARAMETER = {
    "dev_matrix": [2],
    "tensor_map": [0],
    "opt_weight_shard_step": 0,
    "opt_weight_shard_size": 0,
}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"dev_matrix": 2}, r"dev_matrix is 2 \(expected a list of at most 64\)"),
        ({"dev_matrix": [True]}, r"dev_matrix is \[True\] \(expected integers"),
        ({"dev_matrix": [2] * 65}, "expected a list of at most 64"),
        ({"tensor_map": [1 << 40]}, r"tensor_map is .* \(expected integers"),
        ({"tensor_map": [1]}, "invalid layout"),
        ({"field": None}, r"field is None \(expected an integer"),
        ({"opt_weight_shard_step": 0.5}, r"opt_weight_shard_step is 0.5 \(expected an integer"),
    ],
)
def test_an_invalid_field_is_named(changed, why):
    root = {
        "current_stage": 1,
        "parallel_strategy_item": {"op": {"stage": 0, "parallel_strategy": [[1]]}},
        "parallel_layout_item": {"w": PARAMETER},
    }
    assert from_json(json.dumps(root).encode(), "s.json").stage == 0
    root["parallel_layout_item"] = {"w": PARAMETER | changed}
    with pytest.raises(FormatError, match=f"^s.json, parameter w: .*{why}"):
        from_json(json.dumps(root).encode(), "s.json")
