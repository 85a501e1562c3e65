"""The commands about strategy files: show, merge and make them. Parsing is ``cli``'s."""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import picture
from .catalog import Catalog
from .commands import read_rules_file
from .conversion import refuse_inside
from .errors import LayoutError, NotFoundError, StorageError, some
from .formats import layout_file, strategy_files
from .formats.mindspore_kinds import WEIGHTS, kind_of
from .formats.strategy_files import ParamLayout, Strategies
from .layout import Layout, Placement
from .opening import open_checkpoint, strategy_place
from .rules.match import template
from .storage.local import LocalFolder
from .storage.staging import Staging, told
from .strategy import Strategy
from .targets import lay_out_for


def strategy_show(a: Namespace) -> int:
    """Show how strategy files cut tensors."""
    if (own := _own_layout(a.path)) is not None:
        return _show_own(a, own)
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
    _refuse_source(Path(a.out), a.path)
    _write_file(Path(a.out), _one_file(strategies, a.out), a.overwrite)
    return _report(a, a.out, strategies, 1)


def strategy_make(a: Namespace) -> int:
    """Make the strategy files of a checkpoint's tensors."""
    catalog = open_checkpoint(a.source, strategy=a.src_strategy, suffix=a.suffix)
    refuse_inside(catalog, Path(a.out))
    _refuse_own_strategy(catalog, a)
    strategy = Strategy.parse(a.to)
    layout = lay_out_for(catalog, strategy, read_rules_file(a.rules))
    shapes = {t.name: t.shape for t in catalog.tensors.values() if t.name not in catalog.hyper}
    strategies = strategy_files.from_layout(
        layout, shapes, optimizer_shard=strategy.optimizer_shard != 1
    )
    if a.merged:
        _write_file(Path(a.out), _one_file(strategies, a.out), a.overwrite)
        return _report(a, a.out, strategies, 1)
    files = strategy_files.raw_files(strategies)
    _write_folder(Path(a.out), files, a.overwrite)
    return _report(a, a.out, strategies, len(files))


# ---------------------------------------------------------------------------- showing


_Named = tuple[int, str, ParamLayout]  # stage, name, and how it is cut


def _read(path: str) -> Strategies:
    if _own_layout(path) is not None:
        raise LayoutError(
            f"{path} is a layout file of jaxshard's, made where MindSpore's format cannot say who "
            "holds what. It is of all ranks: there is nothing to merge."
        )
    folder = LocalFolder(path)
    try:
        return strategy_files.read(folder)
    finally:
        folder.close()


def _own_layout(path: str) -> Layout | None:
    """What our own layout file at ``path`` says, if there is one."""
    folder = LocalFolder(path)
    try:
        own = layout_file.find(folder)
        return None if own is None else layout_file.read(folder, own)
    finally:
        folder.close()


def _show_own(a: Namespace, layout: Layout) -> int:
    """Show a layout file: the ranks, axes and spec of each kind of tensor, or of each tensor."""
    names = _matching(sorted(layout.placements), a.include)
    placed = [(name, p) for name in names for p in layout.placements[name]]
    if a.json:
        tensors = [{"name": n, "placement": str(p), **asdict(p)} for n, p in placed]
        print(json.dumps({"num_ranks": layout.num_ranks, "tensors": tensors}, indent=1))
    elif not a.quiet:
        kinds: dict[tuple[str, str], int] = {}
        for name, p in placed:
            key = (name if a.all else template(name), str(p))
            kinds[key] = kinds.get(key, 0) + 1
        rows = [[f"{count:,}", name, where] for (name, where), count in kinds.items()]
        print(f"{a.path}: {layout.num_ranks} ranks\n")
        print(picture.table(["placed", "name", "spec, axes and first rank"], rows))
    return 0


def _chosen(strategies: Strategies, include: str | None) -> list[_Named]:
    named = [
        (number, name, param)
        for number, stage in strategies.stages.items()
        for name, param in sorted(stage.params.items())
    ]
    wanted = set(_matching((name for _, name, _ in named), include))
    return [one for one in named if one[1] in wanted]


def _matching(names: Iterable[str], include: str | None) -> list[str]:
    """The names that the expression is found in; there is one, or it is refused."""
    try:
        pattern = re.compile(include or "")
    except re.error as error:
        raise LayoutError(f"--include {include}: not a regular expression: {error}.") from None
    found = [name for name in names if pattern.search(name)]
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


def _one_file(strategies: Strategies, out: str) -> bytes:
    """All stages in one file, of the kind that its name says."""
    if out.endswith(".json"):
        return strategy_files.json_file(strategies)
    return strategy_files.merged_file(strategies)


def _write_file(place: Path, data: bytes, overwrite: bool) -> None:
    """Write one file, which appears whole or not at all."""
    if place.is_dir():
        raise LayoutError(f"{place} is a folder. Name the file to make.")
    if place.exists() and not overwrite:
        raise LayoutError(f"{place} exists. Choose another name, or replace it with --overwrite.")
    _refuse_weights(place)
    scratch = place.with_name(f".{place.name}.new")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(data)
        os.replace(scratch, place)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise StorageError(f"{place} cannot be written: {error.strerror}.") from error


def _write_folder(place: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    """Write a folder of files, which appears whole or not at all."""
    if place.is_file():
        raise LayoutError(f"{place} is a file. Name a folder, or make one file with --merged.")
    _refuse_weights(place)
    staging = Staging(place, "strategy files", overwrite=overwrite)
    try:
        with told(f"{place} cannot be written"):
            for name, data in files.items():
                (staging.files / name).write_bytes(data)
                staging.sync(staging.files / name)
        staging.publish()
    except BaseException:
        staging.abandon()
        raise


def _refuse_weights(place: Path) -> None:
    """Refuse to replace what holds weights: that would be no newer strategy, but a loss."""
    if not place.exists():
        return
    folder = LocalFolder(place)
    try:
        weights = [p for p in folder.files() if kind_of(folder, p) in WEIGHTS]
    finally:
        folder.close()
    if weights:
        raise LayoutError(
            f"{place} holds weights ({some(weights, 2)}), which no strategy file replaces. Choose "
            "another name."
        )


def _refuse_own_strategy(catalog: Catalog, a: Namespace) -> None:
    """Refuse to replace the strategy files without which the source cannot be read again."""
    own = strategy_place(Path(catalog.root), a.src_strategy) if catalog.layout else None
    out = Path(os.path.realpath(a.out))
    if own is not None and out in (own := Path(os.path.realpath(own)), *own.parents):
        raise LayoutError(
            f"{a.out} is the strategy of the source, or holds it. Choose another place; the source "
            "is never changed."
        )


def _refuse_source(out: Path, source: str) -> None:
    """Refuse to put what was merged in the place of what it was merged from."""
    same = Path(source) / out.name if Path(source).is_dir() else Path(source)
    if not (out.exists() and same.exists() and os.path.samefile(out, same)):
        return
    folder = LocalFolder(same)
    try:
        if not strategy_files.read_file(folder, same.name).merged:
            raise LayoutError(
                f"{out} is one of the files that are merged. Choose another name; the source is "
                "never changed."
            )
    finally:
        folder.close()


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
