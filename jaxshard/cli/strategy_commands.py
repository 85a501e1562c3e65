"""The ``strategy`` commands: show, merge and make strategy files."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ..conversion.execute import refuse_inside
from ..conversion.open import open_checkpoint, strategy_place
from ..conversion.targets import lay_out_for
from ..core.catalog import Catalog
from ..core.layout import Layout
from ..core.strategy import Strategy
from ..errors import LayoutError, NotFoundError, format_list
from ..formats import model_shapes, strategy_files, strategy_layouts
from ..formats.folder import WEIGHTS, kind_of
from ..formats.strategy_files import Strategies
from ..rules.match import weight_name
from ..storage.local import LocalFolder
from ..storage.transaction import Staging, told
from . import strategy_picture
from .commands import read_rules_file
from .output import write, write_json

_REQUEST = "strategy files"  # for the journal; an interrupted run is never gone on with

_STATES = ("adam_m.", "adam_v.")  # as MindSpore calls AdamW's


def strategy_show(a: Namespace) -> int:
    """Show how strategy files cut tensors."""
    if (own := _own_layout(a.path)) is not None:
        return _show_own(a, own)
    strategies = _read(a.path)
    chosen = _chosen(strategies, a.include)
    if a.json:
        write_json({**strategy_picture.facts(strategies, chosen), "notes": strategies.notes})
    elif not a.quiet:
        write(strategy_picture.text(a.path, strategies, chosen, one_by_one=a.all))
        _write_notes(strategies.notes)
    return 0


def strategy_merge(a: Namespace) -> int:
    """Make one file of the strategy files of all stages."""
    strategies = _read(a.path)
    strategy_files.layout(strategies)  # refuses stages that are missing
    _refuse_source(Path(a.out), a.path)
    _write_file(Path(a.out), _one_file(strategies, a.out), a.overwrite)
    return _report(a, a.out, strategies, 1, strategies.notes)


def strategy_make(a: Namespace) -> int:
    """Make the strategy files of a model's tensors."""
    catalog, strategy, states = _tensors_of(a)
    refuse_inside(catalog, Path(a.out))
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
    """The same with AdamW's states of each weight, which lie as it does."""
    weights = [name for name in shapes if weight_name(name) == name]
    states = {f"{state}{name}": name for name in weights for state in _STATES}
    placed = {state: layout.placements[name] for state, name in states.items()}
    shaped = {state: shapes[name] for state, name in states.items()}
    every = {**layout.placements, **placed}
    return replace(layout, placements=every), {**shapes, **shaped}


def _tensors_of(a: Namespace) -> tuple[Catalog, Strategy, bool]:
    """The tensors that strategy files are made for, the strategy, and whether with states.

    Raises:
        LayoutError: no strategy is given.
        JaxshardError: as ``open_checkpoint``.
    """
    given, states = Strategy.parse(a.to) if a.to else None, a.states
    if a.source.endswith((".yaml", ".yml")):
        from ..mindformers import job_of  # noqa: PLC0415 - PyYAML, seldom needed

        if a.src_strategy or a.suffix:
            raise LayoutError(
                f"--src-strategy and --suffix say how a checkpoint is opened; {a.source} says that "
                "itself. Leave them out."
            )
        catalog, own, is_training = job_of(a.source)
        strategy, states = given or own, states or is_training
    elif given is None:
        raise LayoutError("--to is missing, which says how tensors are cut: --to dp2mp2pp2.")
    else:
        catalog, strategy = _with_or_without_weights(a), given
    if a.names:
        from ..mapping import find_mapping  # noqa: PLC0415 - seldom needed, not small

        catalog = find_mapping(a.names, catalog).apply(catalog)
    return catalog, strategy, states


def _with_or_without_weights(a: Namespace) -> Catalog:
    """The checkpoint, or what its ``config.json`` says where there are no weights."""
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


# ---------------------------------------------------------------------------- showing


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
        own = strategy_layouts.find_layout_file(folder)
        return None if own is None else strategy_layouts.read_layout_file(folder, own)
    finally:
        folder.close()


def _show_own(a: Namespace, layout: Layout) -> int:
    """Show a layout file: the ranks, axes and spec of each kind of tensor, or of each tensor."""
    names = _matching(sorted(layout.placements), a.include)
    placed = [(name, p) for name in names for p in layout.placements[name]]
    if a.json:
        tensors = [{"name": n, "placement": str(p), **asdict(p)} for n, p in placed]
        write_json({"num_ranks": layout.num_ranks, "tensors": tensors})
    elif not a.quiet:
        write(f"{a.path}: {layout.num_ranks} ranks\n")
        write(strategy_picture.placed_text(placed, one_by_one=a.all))
    return 0


def _chosen(strategies: Strategies, include: str | None) -> list[strategy_picture.Named]:
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
    _refuse_weights(place)
    made = place.name
    _write(
        Staging(
            place, _REQUEST, overwrite=overwrite, only=made, kind="strategy file", resumable=False
        ),
        {made: data},
    )


def _write_folder(place: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    """Write a folder of files, which appears whole or not at all."""
    if place.is_file():
        raise LayoutError(f"{place} is a file. Name a folder, or make one file with --merged.")
    _refuse_weights(place)
    _write(Staging(place, _REQUEST, overwrite=overwrite, kind="strategies", resumable=False), files)


def _write(staging: Staging, files: Mapping[str, bytes]) -> None:
    """Write ``files`` and publish them."""
    try:
        for name, data in files.items():
            path = staging.files / name
            with told(f"{path} cannot be written"):
                path.write_bytes(data)
            staging.finish(name, len(data))
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
            f"{place} holds weights ({format_list(weights, 2)}), which no strategy file replaces. "
            "Choose another name."
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


def _write_notes(notes: Iterable[str]) -> None:
    for note in notes:
        write(f"note: {note}")


def _report(
    a: Namespace, out: str, strategies: Strategies, num_files: int, notes: Sequence[str] = ()
) -> int:
    told = {
        "out": out,
        "num_files": num_files,
        "num_ranks": strategies.num_ranks,
        "num_stages": strategies.num_stages,
        "num_tensors": sum(len(s.params) for s in strategies.stages.values()),
        "notes": notes,
    }
    if a.json:
        write_json(told)
    elif not a.quiet:
        write(
            f"{out}: {num_files:,} files for {told['num_ranks']:,} ranks in {told['num_stages']} "
            f"stages, {told['num_tensors']:,} tensors"
        )
        _write_notes(notes)
    return 0
