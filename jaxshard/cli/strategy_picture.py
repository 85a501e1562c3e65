"""Strategy files as text: tables of cuts and drawings of which rank holds what.

    stages  tensors  name                                device matrix  tensor map  optimizer  parts
    0             4  model.layers.#.attention.wq.weight  4×2            0,-1        2 ways     4×1

This module reads no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from ..core.layout import Placement
from ..core.patterns import template
from ..errors import LayoutError
from ..formats import strategy_layouts
from ..formats.strategy_codec import ParamLayout
from ..formats.strategy_files import Strategies
from ..planning import pictures

Named = tuple[int, str, ParamLayout]
"""A stage, a name, and how it is cut there."""


def text(path: str, strategies: Strategies, chosen: list[Named], *, one_by_one: bool) -> str:
    """How ``chosen`` are cut: a line for each tensor, or for each kind of name; and pictures."""
    stages = sorted(strategies.stages)
    lines = [
        f"{path}: {strategies.num_ranks} ranks, {strategies.stage_ranks} in each of "
        f"{strategies.num_stages} stages",
        "",
        _table(chosen) if one_by_one else _table_of_kinds(chosen),
    ]
    for title, placement, shape in _pictures(chosen):
        lines += ["", pictures.held_by(title, placement, shape)]
    missing = [str(n) for n in range(strategies.num_stages) if n not in stages]
    if missing:
        lines.append(f"note: the strategy of stage {', '.join(missing)} is not here.")
    return "\n".join(lines)


def _table(chosen: list[Named]) -> str:
    rows = [[number, name, *_columns(param)] for number, name, param in chosen]
    return pictures.table(["stage", "tensor", *_HEAD], rows)


_HEAD = ("device matrix", "tensor map", "optimizer", "parts")


def _table_of_kinds(chosen: list[Named]) -> str:
    """A line for each kind of name that is cut alike: layers differ in their number only."""
    kinds: dict[tuple[str, ParamLayout], tuple[set[int], int]] = {}
    for number, name, param in chosen:
        seen, count = kinds.get((template(name), param), (set(), 0))
        kinds[template(name), param] = (seen | {number}, count + 1)
    rows = [
        [", ".join(map(str, sorted(seen))), f"{count:,}", kind, *_columns(param)]
        for (kind, param), (seen, count) in kinds.items()
    ]
    return pictures.table(["stages", "tensors", "name", *_HEAD], rows)


def _columns(param: ParamLayout) -> tuple[str, str, str, str]:
    maps = param.tensor_maps
    drawn = ",".join(map(str, maps[0])) if len(maps) == 1 else str([list(m) for m in maps])
    size = param.opt_weight_shard_size
    shard = "" if not param.opt_weight_shard_step else "all" if size == -1 else f"{size} ways"
    return "×".join(map(str, param.dev_matrix)), drawn, shard, _parts(param)


def _parts(param: ParamLayout) -> str:
    try:
        made = strategy_layouts.placement(param)
    except LayoutError:
        return "uneven"
    return "×".join(str(made.ways(d)) for d in range(_ndim(param))) or "1"


def _ndim(param: ParamLayout) -> int:
    return len(param.tensor_maps) if len(param.tensor_maps) > 1 else len(param.tensor_maps[0])


def _pictures(
    chosen: list[Named], most: int = 3
) -> Iterator[tuple[str, Placement, tuple[int, ...]]]:
    """The commonest ways in which tensors are cut, each once: (title, placement, shape)."""
    ways: dict[Placement, list[str]] = {}
    for number, name, param in chosen:
        try:
            made = strategy_layouts.placement(param, number)
        except LayoutError:
            continue
        if any(made.ways(d) > 1 for d in range(_ndim(param))):
            ways.setdefault(made, []).append(name)
    for made, names in sorted(ways.items(), key=lambda item: -len(item[1]))[:most]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        shape = tuple(made.ways(d) for d in range(max(len(made.spec), 1)))
        yield f"{names[0]}{more}", made, shape


def facts(strategies: Strategies, chosen: list[Named]) -> dict[str, Any]:
    """The same for a program."""
    return {
        "num_ranks": strategies.num_ranks,
        "num_stages": strategies.num_stages,
        "stage_ranks": strategies.stage_ranks,
        "tensors": [
            {"stage": number, "name": name, **asdict(param), "parts": _parts(param)}
            for number, name, param in chosen
        ],
    }


def placed_text(placed: Iterable[tuple[str, Placement]], *, one_by_one: bool) -> str:
    """Where names are placed, by a layout file: a line for each, or for each kind of name."""
    kinds: dict[tuple[str, str], int] = {}
    for name, placement in placed:
        key = (name if one_by_one else template(name), str(placement))
        kinds[key] = kinds.get(key, 0) + 1
    rows = [[f"{count:,}", name, where] for (name, where), count in kinds.items()]
    return pictures.table(["placed", "name", "spec, axes and first rank"], rows)
