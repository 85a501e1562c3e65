"""The commands about strategy files: show, merge and make them. Parsing is ``cli``'s."""

from __future__ import annotations

import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import picture
from .commands import read_rules_file
from .errors import LayoutError, NotFoundError, StorageError
from .formats import strategy_files
from .formats.strategy_files import ParamLayout, Strategies
from .layout import Placement
from .opening import open_checkpoint
from .rules.match import template
from .storage.local import LocalFolder
from .strategy import Strategy
from .targets import lay_out_for


def strategy_show(a: Namespace) -> int:
    """Show how strategy files cut tensors."""
    strategies = _read(a.path)
    chosen = _chosen(strategies, a.include)
    if a.json:
        print(json.dumps(_facts(strategies, chosen), indent=1))
    elif not a.quiet:
        print(_text(a.path, strategies, chosen, one_by_one=a.all))
    return 0


def strategy_merge(a: Namespace) -> int:
    """Make one file of the strategy files of all stages."""
    strategies = _read(a.path)
    strategy_files.layout(strategies)  # refuses stages that are missing
    as_json = a.out.endswith(".json")
    data = (
        strategy_files.json_file(strategies) if as_json else strategy_files.merged_file(strategies)
    )
    _write_file(Path(a.out), data, a.overwrite)
    return _report(a, a.out, strategies, 1)


def strategy_make(a: Namespace) -> int:
    """Make the strategy files of a checkpoint's tensors."""
    catalog = open_checkpoint(a.source, strategy=a.src_strategy, suffix=a.suffix)
    strategy = Strategy.parse(a.to)
    layout = lay_out_for(catalog, strategy, read_rules_file(a.rules))
    shapes = {t.name: t.shape for t in catalog.tensors.values() if t.name not in catalog.hyper}
    strategies = strategy_files.from_layout(
        layout, shapes, optimizer_shard=strategy.optimizer_shard != 1
    )
    if a.merged:
        _write_file(Path(a.out), strategy_files.merged_file(strategies), a.overwrite)
        return _report(a, a.out, strategies, 1)
    files = strategy_files.raw_files(strategies)
    _write_folder(Path(a.out), files, a.overwrite)
    return _report(a, a.out, strategies, len(files))


# ---------------------------------------------------------------------------- showing


_Named = tuple[int, str, ParamLayout]  # stage, name, and how it is cut


def _read(path: str) -> Strategies:
    folder = LocalFolder(path)
    try:
        return strategy_files.read(folder)
    finally:
        folder.close()


def _chosen(strategies: Strategies, include: str | None) -> list[_Named]:
    try:
        pattern = re.compile(include or "")
    except re.error as error:
        raise LayoutError(f"--include {include}: not a regular expression: {error}.") from None
    found = [
        (number, name, param)
        for number, stage in strategies.stages.items()
        for name, param in sorted(stage.params.items())
        if pattern.search(name)
    ]
    if not found:
        raise NotFoundError(f"--include {include} matches no tensor of these strategy files.")
    return found


def _text(path: str, strategies: Strategies, chosen: list[_Named], *, one_by_one: bool) -> str:
    stages = sorted(strategies.stages)
    lines = [
        f"{path}: {strategies.num_ranks} ranks, {strategies.stage_ranks} in each of "
        f"{strategies.num_stages} stages",
        "",
        _table(chosen) if one_by_one else _table_of_kinds(chosen),
    ]
    for title, placement, shape in _pictures(chosen):
        lines += ["", picture.held_by(title, placement, shape)]
    missing = [str(n) for n in range(strategies.num_stages) if n not in stages]
    if missing:
        lines.append(f"note: the strategy of stage {', '.join(missing)} is not here.")
    return "\n".join(lines)


def _table(chosen: list[_Named]) -> str:
    rows = [[number, name, *_columns(param)] for number, name, param in chosen]
    return picture.table(["stage", "tensor", *_HEAD], rows)


_HEAD = ("device matrix", "tensor map", "optimizer", "parts")


def _table_of_kinds(chosen: list[_Named]) -> str:
    """A line for each kind of name that is cut alike: layers differ in their number only."""
    kinds: dict[tuple[str, ParamLayout], tuple[set[int], int]] = {}
    for number, name, param in chosen:
        seen, count = kinds.get((template(name), param), (set(), 0))
        kinds[template(name), param] = (seen | {number}, count + 1)
    rows = [
        [", ".join(map(str, sorted(seen))), f"{count:,}", kind, *_columns(param)]
        for (kind, param), (seen, count) in kinds.items()
    ]
    return picture.table(["stages", "tensors", "name", *_HEAD], rows)


def _columns(param: ParamLayout) -> tuple[str, str, str, str]:
    maps = param.tensor_maps
    drawn = ",".join(map(str, maps[0])) if len(maps) == 1 else str([list(m) for m in maps])
    size = param.opt_weight_shard_size
    shard = "" if not param.opt_weight_shard_step else "all" if size == -1 else f"{size} ways"
    return "×".join(map(str, param.dev_matrix)), drawn, shard, _parts(param)


def _parts(param: ParamLayout) -> str:
    try:
        made = strategy_files.placement(param)
    except LayoutError:
        return "uneven"
    return "×".join(str(made.ways(d)) for d in range(_ndim(param))) or "1"


def _ndim(param: ParamLayout) -> int:
    return len(param.tensor_maps) if len(param.tensor_maps) > 1 else len(param.tensor_maps[0])


def _pictures(
    chosen: list[_Named], most: int = 3
) -> Iterator[tuple[str, Placement, tuple[int, ...]]]:
    """The commonest ways in which tensors are cut, each once: (title, placement, shape)."""
    ways: dict[Placement, list[str]] = {}
    for number, name, param in chosen:
        try:
            made = strategy_files.placement(param, number)
        except LayoutError:
            continue
        if any(made.ways(d) > 1 for d in range(_ndim(param))):
            ways.setdefault(made, []).append(name)
    for made, names in sorted(ways.items(), key=lambda item: -len(item[1]))[:most]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        shape = tuple(made.ways(d) for d in range(max(len(made.spec), 1)))
        yield f"{names[0]}{more}", made, shape


def _facts(strategies: Strategies, chosen: list[_Named]) -> dict[str, Any]:
    return {
        "num_ranks": strategies.num_ranks,
        "num_stages": strategies.num_stages,
        "stage_ranks": strategies.stage_ranks,
        "tensors": [
            {"stage": number, "name": name, **asdict(param), "parts": _parts(param)}
            for number, name, param in chosen
        ],
    }


# ---------------------------------------------------------------------------- writing


def _write_file(place: Path, data: bytes, overwrite: bool) -> None:
    """Write one file, which appears whole or not at all."""
    _refuse_existing(place, overwrite)
    scratch = place.with_name(f".{place.name}.new")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(data)
        os.replace(scratch, place)
    except OSError as error:
        raise StorageError(f"{place} cannot be written: {error.strerror}.") from error


def _write_folder(place: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    """Write a folder of files, which appears whole or not at all."""
    _refuse_existing(place, overwrite)
    scratch = place.with_name(f".{place.name}.new")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for name, data in files.items():
            (scratch / name).write_bytes(data)
        if place.exists():
            shutil.rmtree(place)
        os.replace(scratch, place)
    except OSError as error:
        raise StorageError(f"{place} cannot be written: {error.strerror}.") from error


def _refuse_existing(place: Path, overwrite: bool) -> None:
    if place.exists() and not overwrite:
        raise LayoutError(f"{place} exists. Choose another name, or replace it with --overwrite.")


def _report(a: Namespace, out: str, strategies: Strategies, num_files: int) -> int:
    told = {
        "out": out,
        "num_files": num_files,
        "num_ranks": strategies.num_ranks,
        "num_stages": strategies.num_stages,
        "num_tensors": sum(len(s.params) for s in strategies.stages.values()),
    }
    if a.json:
        print(json.dumps(told, indent=1))
    elif not a.quiet:
        print(
            f"{out}: {num_files:,} files for {told['num_ranks']:,} ranks in {told['num_stages']} "
            f"stages, {told['num_tensors']:,} tensors"
        )
    return 0
