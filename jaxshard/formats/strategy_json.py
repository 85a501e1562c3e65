"""MindSpore strategy files as JSON.

Only a tensor map of one axis per dim fits in it. This module knows the JSON; what the
numbers may be is checked where the binary ones are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import FormatError, LayoutError, quote_name
from .strategy_protobuf import (
    INT32,
    MAX_LISTS,
    MAX_NUMBERS,
    MAX_STAGE,
    Lists,
    Operator,
    ParamLayout,
    StrategyFile,
    by_stage,
    check_full,
    checked,
    named,
)
from .strict_json import parse_object


def to_json(file: StrategyFile) -> bytes:
    """``file`` in the JSON form.

    Raises:
        LayoutError: a dim is split over several axes, for which JSON has no place.
    """
    check_full(file)
    layouts = {}
    for name, one in named(file):
        if len(one.tensor_maps) != 1:
            raise LayoutError(
                f"{name}: a dim split over several axes ({one.tensor_maps}) does not fit in a JSON "
                "strategy. Write the binary form (.ckpt)."
            )
        layouts[name] = {
            "dev_matrix": list(one.dev_matrix),
            "tensor_map": list(one.tensor_maps[0]),
            "param_split_shape": [n for part in one.param_split_shape for n in part],
            "indices_offset": [n for part in one.indices_offset for n in part],
            "field": one.field,
            "opt_weight_shard_step": one.opt_weight_shard_step,
            "opt_weight_shard_size": one.opt_weight_shard_size,
        }
    tree = {
        "current_stage": file.current_stage,
        "parallel_strategy_item": {
            o.name: {"stage": o.stage, "parallel_strategy": [list(s) for s in o.strategies]}
            for o in file.operators
        },
        "parallel_layout_item": layouts,
    }
    return json.dumps(tree).encode()


def from_json(data: bytes, path: str) -> StrategyFile:
    """The strategy file in the JSON ``data``; ``path`` is named in errors.

    Raises:
        FormatError: it is no JSON, or no strategy.
    """
    tree = parse_object(data, path)
    try:
        operators = tuple(
            Operator(name, _number(one["stage"], 0, MAX_STAGE), _lists(one["parallel_strategy"]))
            for name, one in tree["parallel_strategy_item"].items()
        )
        layouts = {
            name: checked(f"{path}, parameter {quote_name(name)}", _json_layout(one))
            for name, one in tree["parallel_layout_item"].items()
        }
        current_stage = _number(tree["current_stage"], 0, 2 * INT32)
    except (TypeError, KeyError, AttributeError, RecursionError) as e:
        raise FormatError(
            f"{path} is not a JSON strategy file ({type(e).__name__}: {quote_name(str(e))}). It "
            "needs current_stage, parallel_strategy_item and parallel_layout_item."
        ) from None
    return by_stage(path, layouts, operators, current_stage)


def _json_layout(one: Mapping[str, Any]) -> ParamLayout:
    return ParamLayout(
        dev_matrix=_list(one["dev_matrix"]),
        tensor_maps=(_list(one["tensor_map"]),),
        opt_weight_shard_step=_number(one["opt_weight_shard_step"]),
        opt_weight_shard_size=_number(one["opt_weight_shard_size"]),
        param_split_shape=(_list(one.get("param_split_shape", [])),),
        indices_offset=(_list(one.get("indices_offset", [])),),
        field=_number(one.get("field", 0)),
    )


def _number(value: object, low: int = -INT32, high: int = INT32) -> int:
    if type(value) is not int or not low <= value <= high:  # bool is an int: not here
        raise TypeError(f"{quote_name(repr(value))} is not a sensible whole number")
    return value


def _list(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > MAX_NUMBERS:
        raise TypeError(f"{quote_name(repr(values))} is not a short list of numbers")
    return tuple(map(_number, values))


def _lists(values: object) -> Lists:
    if not isinstance(values, list) or len(values) > MAX_LISTS:
        raise TypeError(f"{quote_name(repr(values))} is not a short list of lists")
    return tuple(map(_list, values))
