"""The ``strategy`` commands: show, merge and make strategy files.

stages  tensors  name                                device matrix  tensor map  optimizer  parts
0             4  model.layers.#.attention.wq.weight  4×2            0,-1        2 ways     4×1
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..conversion.open import open_checkpoint, strategy_place
from ..conversion.targets import lay_out_for
from ..core.catalog import Catalog
from ..core.layout import Layout, Placement, Strategy
from ..core.patterns import template
from ..errors import LayoutError, NotFoundError, format_list
from ..formats import model_shapes, strategy_files, strategy_layouts
from ..formats.folder import WEIGHTS, kind_of
from ..formats.strategy_codec import ParamLayout
from ..formats.strategy_files import Strategies
from ..planning import pictures
from ..rules.match import weight_name
from ..storage.local import LocalFolder
from ..storage.overwrite import refuse_source
from ..storage.remote import place_at
from ..storage.staging import os_errors_as
from ..storage.transaction import Transaction
from . import write, write_json
from .commands import read_rules_file

_REQUEST = "strategy files"  # the journal's key; these runs are too short to be resumed

_STATES = ("adam_m.", "adam_v.")  # MindSpore's name prefixes of AdamW's states
_HEAD = ("device matrix", "tensor map", "optimizer", "parts")

Named = tuple[int, str, ParamLayout]
"""A pipeline stage, a tensor name, and the tensor's layout there."""


def strategy_show(a: Namespace) -> int:
    """Show how strategy files partition tensors."""
    if (own := _own_layout(a.path)) is not None:
        return _show_own(a, own)
    strategies = _read(a.path)
    chosen = _chosen(strategies, a.include)
    if a.json:
        write_json({**_facts(strategies, chosen), "notes": strategies.notes})
    elif not a.quiet:
        write(_text(a.path, strategies, chosen, one_by_one=a.all))
        _write_notes(strategies.notes)
    return 0


def strategy_merge(a: Namespace) -> int:
    """Merge the strategy files of all stages into one file."""
    strategies = _read(a.path)
    strategy_files.layout(strategies)  # raises if a stage is missing
    _refuse_source(Path(a.out), a.path)
    _write_file(Path(a.out), _one_file(strategies, a.out), a.overwrite)
    return _report(a, a.out, strategies, 1, strategies.notes)


def strategy_make(a: Namespace) -> int:
    """Write the strategy files of a model's tensors."""
    catalog, strategy, states = _tensors_of(a)
    refuse_source(catalog, Path(a.out))
    _refuse_own_strategy(catalog, a)
    layout = lay_out_for(catalog, strategy, read_rules_file(a.rules))
    shapes = {t.name: t.shape for t in catalog.tensors.values() if t.name not in catalog.scalars}
    if states:
        layout, shapes = _with_states(layout, shapes)
    strategies = strategy_files.from_layout(
        layout, shapes, optimizer_shard=strategy.optimizer_shard != 1
    )
    notes = tuple(dict.fromkeys((*catalog.notes, *layout.notes)))
    if a.merged:
        _write_file(Path(a.out), _one_file(strategies, a.out), a.overwrite)
        return _report(a, a.out, strategies, 1, notes)
    files = strategy_files.raw_files(strategies)
    _write_folder(Path(a.out), files, a.overwrite)
    return _report(a, a.out, strategies, len(files), notes)


def _with_states(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Layout, dict[str, tuple[int, ...]]]:
    """Add AdamW's states of each weight, which have the weight's layout."""
    weights = [name for name in shapes if weight_name(name) == name]
    states = {f"{state}{name}": name for name in weights for state in _STATES}
    placed = {state: layout.placements[name] for state, name in states.items()}
    shaped = {state: shapes[name] for state, name in states.items()}
    every = {**layout.placements, **placed}
    return replace(layout, placements=every), {**shapes, **shaped}


def _tensors_of(a: Namespace) -> tuple[Catalog, Strategy, bool]:
    """Return the tensors, their strategy, and True if optimizer states are included.

    Raises:
        LayoutError: ``--to`` is missing.
        JaxshardError: as ``open_checkpoint``.
    """
    given, states = Strategy.parse(a.to) if a.to else None, a.states
    if a.source.endswith((".yaml", ".yml")):
        from ..mindformers import job_of  # noqa: PLC0415 - needs PyYAML

        if a.src_strategy or a.suffix:
            raise LayoutError(
                f"--src-strategy and --suffix are for a checkpoint, and {a.source} is a "
                "configuration, which has its own. Omit them."
            )
        catalog, own, is_training = job_of(a.source)
        strategy, states = given or own, states or is_training
    elif given is None:
        raise LayoutError("--to is missing. Pass the strategy of the tensors: --to dp2mp2pp2.")
    else:
        catalog, strategy = _with_or_without_weights(a), given
    if a.names:
        from ..mapping import find_mapping  # noqa: PLC0415 - large, and only for --names

        catalog = find_mapping(a.names, catalog).apply(catalog)
    return catalog, strategy, states


def _with_or_without_weights(a: Namespace) -> Catalog:
    """Open the checkpoint, or derive the tensors from ``config.json`` if it has no weights."""
    try:
        return open_checkpoint(a.source, src_strategy=a.src_strategy, suffix=a.suffix)
    except NotFoundError:
        folder = LocalFolder(a.source)
        try:
            found = model_shapes.read(folder)
        finally:
            folder.close()
        if found is None:
            raise
        return found


# --- Showing strategy files


def _read(path: str) -> Strategies:
    if _own_layout(path) is not None:
        raise LayoutError(
            f"{path} is a layout file of jaxshard, written when MindSpore's format cannot express "
            "the layout. It covers all ranks: there is nothing to merge."
        )
    folder = LocalFolder(path)
    try:
        return strategy_files.read(folder)
    finally:
        folder.close()


def _own_layout(path: str) -> Layout | None:
    """Read jaxshard's own layout file at ``path``, if it is one."""
    folder = LocalFolder(path)
    try:
        own = strategy_layouts.find_layout_file(folder)
        return None if own is None else strategy_layouts.read_layout_file(folder, own)
    finally:
        folder.close()


def _show_own(a: Namespace, layout: Layout) -> int:
    """Show a layout file: ranks, axes and spec per kind of tensor, or per tensor."""
    names = _matching(sorted(layout.placements), a.include)
    placed = [(name, p) for name in names for p in layout.placements[name]]
    if a.json:
        tensors = [{"name": n, "placement": str(p), **asdict(p)} for n, p in placed]
        write_json({"num_ranks": layout.num_ranks, "tensors": tensors})
    elif not a.quiet:
        write(f"{a.path}: {layout.num_ranks} ranks\n")
        write(_placed_text(placed, one_by_one=a.all))
    return 0


def _chosen(strategies: Strategies, include: str | None) -> list[Named]:
    named = [
        (number, name, param)
        for number, stage in strategies.stages.items()
        for name, param in sorted(stage.params.items())
    ]
    wanted = set(_matching((name for _, name, _ in named), include))
    return [one for one in named if one[1] in wanted]


def _matching(names: Iterable[str], include: str | None) -> list[str]:
    """Return the names that match ``include``; raise if none does."""
    try:
        pattern = re.compile(include or "")
    except re.error as error:
        raise LayoutError(f"--include {include}: not a regular expression: {error}.") from None
    found = [name for name in names if pattern.search(name)]
    if not found:
        raise NotFoundError(f"--include {include} matches no tensor of these strategy files.")
    return found


# --- Writing strategy files


def _one_file(strategies: Strategies, out: str) -> bytes:
    """Encode all stages as one file, as JSON or protobuf by the suffix of ``out``."""
    if out.endswith(".json"):
        return strategy_files.json_file(strategies)
    return strategy_files.merged_file(strategies)


def _write_file(place: Path, data: bytes, overwrite: bool) -> None:
    """Write one file atomically."""
    if place.is_dir():
        raise LayoutError(f"{place} is a folder (expected a file). Name the file to write.")
    _refuse_weights(place)
    made = place.name
    _write(
        Transaction(
            place, _REQUEST, overwrite=overwrite, only=made, kind="strategy file", resumable=False
        ),
        {made: data},
    )


def _write_folder(place: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    """Write a directory of files atomically."""
    if place.is_file():
        raise LayoutError(
            f"{place} is a file (expected a folder). Name a folder, or pass --merged."
        )
    _refuse_weights(place)
    _write(
        Transaction(place, _REQUEST, overwrite=overwrite, kind="strategies", resumable=False), files
    )


def _write(staging: Transaction, files: Mapping[str, bytes]) -> None:
    """Write ``files`` and publish them."""
    try:
        for name, data in files.items():
            path = staging.files / name
            with os_errors_as(f"{path} cannot be written"):
                path.write_bytes(data)
            staging.finish(name, len(data))
        staging.publish()
    except BaseException:
        staging.abandon()
        raise


def _refuse_weights(place: Path) -> None:
    """Raise if ``place`` holds weights, because ``--overwrite`` is for strategy files only."""
    if not place.exists():
        return
    folder = LocalFolder(place)
    try:
        weights = [p for p in folder.files() if kind_of(folder, p) in WEIGHTS]
    finally:
        folder.close()
    if weights:
        raise LayoutError(
            f"{place} holds weights ({format_list(weights, 2)}), and strategy files never replace "
            "weights. Choose another name."
        )


def _refuse_own_strategy(catalog: Catalog, a: Namespace) -> None:
    """Raise if the output would replace the strategy files of the source."""
    own = strategy_place(place_at(catalog.root), a.src_strategy) if catalog.layout else None
    out = Path(os.path.realpath(a.out))
    if isinstance(own, Path) and out in (own := Path(os.path.realpath(own)), *own.parents):
        raise LayoutError(
            f"{a.out} is or contains the strategy of the source, which is never changed. Choose "
            "another destination."
        )


def _refuse_source(out: Path, source: str) -> None:
    """Raise if the merged file would replace one of its inputs."""
    same = Path(source) / out.name if Path(source).is_dir() else Path(source)
    if not (out.exists() and same.exists() and os.path.samefile(out, same)):
        return
    folder = LocalFolder(same)
    try:
        if not strategy_files.read_file(folder, same.name).merged:
            raise LayoutError(
                f"{out} is one of the input files, which are never changed. Choose another name."
            )
    finally:
        folder.close()


def _write_notes(notes: Iterable[str]) -> None:
    for note in notes:
        write(f"note: {note}")


def _report(
    a: Namespace, out: str, strategies: Strategies, num_files: int, notes: Sequence[str] = ()
) -> int:
    report = {
        "out": out,
        "num_files": num_files,
        "num_ranks": strategies.num_ranks,
        "num_stages": strategies.num_stages,
        "num_tensors": sum(len(s.params) for s in strategies.stages.values()),
        "notes": notes,
    }
    if a.json:
        write_json(report)
    elif not a.quiet:
        write(
            f"{out}: {num_files:,} files for {strategies.num_ranks:,} ranks in "
            f"{strategies.num_stages} stages, {report['num_tensors']:,} tensors"
        )
        _write_notes(notes)
    return 0


# --- Strategy files as text: tables, and drawings of which rank holds which shard


def _text(path: str, strategies: Strategies, chosen: list[Named], *, one_by_one: bool) -> str:
    """Render ``chosen`` as a table with a line per tensor or per kind of name, and drawings."""
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
        lines.append(f"note: the strategy of stage {', '.join(missing)} is missing.")
    return "\n".join(lines)


def _table(chosen: list[Named]) -> str:
    rows = [[number, name, *_columns(param)] for number, name, param in chosen]
    return pictures.table(["stage", "tensor", *_HEAD], rows)


def _table_of_kinds(chosen: list[Named]) -> str:
    """Render one line per kind of name and layout, where layer numbers are replaced by #."""
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
    chosen: list[Named], max_pictures: int = 3
) -> Iterator[tuple[str, Placement, tuple[int, ...]]]:
    """Yield the most common placements, each once: (title, placement, shape)."""
    ways: dict[Placement, list[str]] = {}
    for number, name, param in chosen:
        try:
            made = strategy_layouts.placement(param, number)
        except LayoutError:
            continue
        if any(made.ways(d) > 1 for d in range(_ndim(param))):
            ways.setdefault(made, []).append(name)
    for made, names in sorted(ways.items(), key=lambda item: -len(item[1]))[:max_pictures]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        shape = tuple(made.ways(d) for d in range(max(len(made.spec), 1)))
        yield f"{names[0]}{more}", made, shape


def _facts(strategies: Strategies, chosen: list[Named]) -> dict[str, Any]:
    """Return the contents of ``_text`` as JSON values."""
    return {
        "num_ranks": strategies.num_ranks,
        "num_stages": strategies.num_stages,
        "stage_ranks": strategies.stage_ranks,
        "tensors": [
            {"stage": number, "name": name, **asdict(param), "parts": _parts(param)}
            for number, name, param in chosen
        ],
    }


def _placed_text(placed: Iterable[tuple[str, Placement]], *, one_by_one: bool) -> str:
    """Render the placements of a layout file, one line per tensor or per kind of name."""
    kinds: dict[tuple[str, str], int] = {}
    for name, placement in placed:
        key = (name if one_by_one else template(name), str(placement))
        kinds[key] = kinds.get(key, 0) + 1
    rows = [[f"{count:,}", name, where] for (name, where), count in kinds.items()]
    return pictures.table(["placed", "name", "spec, axes and first rank"], rows)
