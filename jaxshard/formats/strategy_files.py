"""MindSpore strategy files: the box of each parameter that every rank holds.

    strategy/ckpt_strategy_rank_0.ckpt …     one per rank, equal within a pipeline stage
    merged_strategy.ckpt                     all stages in one file
    strategy.json                            the same as JSON

All forms are read into ``Strategies``, stage by stage, which convert to a ``Layout`` and back.
The stage of a file is part of its contents; file names are ignored. This module does not
depend on weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from ..core.layout import Layout, Placement, check_divides
from ..errors import CoverageError, FormatError, LayoutError, NotFoundError, format_list
from . import protobuf, strategy_codec
from .folder import Folder, describe_kind, kind_of
from .rank_names import strategy_file
from .strategy_codec import Operator, ParamLayout, StrategyFile
from .strategy_layouts import for_dims, param_layout, placement

_MAX_STAGE_RANKS = 1 << 17  # boxes are listed per rank; the largest jobs have tens of thousands
_MAX_RANKS = 1 << 20
_COMPARED_BYTES = 1 << 28  # ranks of a stage have equal files: beyond this, one per stage is read
_RAW_TIMES, _MERGED_TIMES = 2, 1  # current_stage as MindSpore writes it: a count of saves


@dataclass(frozen=True)
class Stage:
    """Parameters of one pipeline stage, with the file they were read from."""

    number: int
    path: str
    params: Mapping[str, ParamLayout] = field(repr=False)
    operators: tuple[Operator, ...] = field(repr=False, default=())


@dataclass(frozen=True)
class Strategies:
    """Parameter layouts of a job, by pipeline stage in order.

    Attributes:
        stages: the parameters of each pipeline stage.
        notes: remarks for the user.
    """

    stages: Mapping[int, Stage]
    notes: tuple[str, ...] = ()

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages; the highest stage in the files counts."""
        return max(self.stages) + 1

    @property
    def stage_ranks(self) -> int:
        """Number of ranks per stage."""
        first = next(iter(self.stages.values()))
        return prod(next(iter(first.params.values())).dev_matrix)

    @property
    def num_ranks(self) -> int:
        """Number of ranks in all stages up to the highest in the files."""
        return self.num_stages * self.stage_ranks


# --- files ----------------------------------------------------------------------------------------


def find(folder: Folder, under: str = "") -> tuple[str, ...]:
    r"""List the strategy files directly in ``under`` by rank; JSON files only without others.

    >>> from jaxshard.formats.folder import MemoryFolder
    >>> find(MemoryFolder({"s/rank_10.ckpt": b"\b\2", "s/rank_9.ckpt": b"\b\2"}), "s")
    ('s/rank_9.ckpt', 's/rank_10.ckpt')
    """
    prefix = under.rstrip("/") + "/" if under.rstrip("/") else ""
    here = [p for p in folder.files() if p.startswith(prefix) and "/" not in p[len(prefix) :]]
    here.sort(key=_natural)
    for suffix in (".ckpt", ".json"):
        found = tuple(
            p for p in here if p.endswith(suffix) and kind_of(folder, p) == f"strategy{suffix}"
        )
        if found:
            return found
    return ()


def read(folder: Folder, paths: Sequence[str] = ("",)) -> Strategies:
    """Read the strategy files at ``paths``; each is a file or a folder of files.

    Raw files of several ranks, merged files and JSON may be mixed. Files of one stage must
    agree. An exception is a merged file in a folder with raw files: every job rewrites the raw
    files, so the merged file may be stale, and is ignored if it contradicts them.

    Raises:
        NotFoundError: a file is missing, or a folder has no strategy file.
        FormatError: a file is damaged or not a strategy file, or files contradict each other.
    """
    stages, compared, seen = dict[int, Stage](), 0, set[frozenset[bytes]]()
    merged: list[StrategyFile] = []
    for path in _expand(folder, paths):
        compared += folder.files()[path].num_bytes
        if not path.endswith(".json"):
            if (
                stages
                and compared > _COMPARED_BYTES
                and strategy_codec.first_stage(folder, path) in stages
            ):
                continue
            items = strategy_codec.items(folder, path)
            if items in seen:
                continue
            seen.add(items)
        file = read_file(folder, path)
        if file.merged and path not in paths:
            merged.append(file)
            continue
        for stage in _stages_of(file):
            _agree(stages.setdefault(stage.number, stage), stage)
    notes = _add_merged(stages, merged)
    strategies = Strategies(dict(sorted(stages.items())), notes)
    _check_ranks(strategies)
    return strategies


def read_file(folder: Folder, path: str) -> StrategyFile:
    """Read one strategy file; JSON if its name ends in ``.json``.

    Raises:
        FormatError: it is damaged or not a strategy file.
    """
    if not path.endswith(".json"):
        return strategy_codec.parse(folder, path)
    reader = protobuf.Reader(folder, path)
    strategy_codec.check_size(path, reader.num_bytes)
    data = reader.take(0, reader.num_bytes, reader.num_bytes, "a strategy")
    return strategy_codec.from_json(data, path)


def _expand(folder: Folder, paths: Sequence[str]) -> list[str]:
    """List the strategy files at ``paths`` without duplicates."""
    out, files = dict[str, None](), folder.files()
    for path in paths:
        alone = tuple(files) if not path and len(files) == 1 else ()
        found = alone or ((path,) if path in files else find(folder, path))
        if not found:
            prefix = path.rstrip("/") + "/" if path.rstrip("/") else ""
            others = [p for p in files if p.startswith(prefix)]
            raise NotFoundError(
                f"no strategy file at {path or folder.root}"
                + (f" (found {format_list(others, 3)})" if others else "")
                + ". MindSpore writes strategy/ckpt_strategy_rank_0.ckpt …; pass that folder, or a "
                "merged file."
            )
        for one in found:
            kind = kind_of(folder, one)
            if not kind.startswith("strategy"):
                raise FormatError(
                    f"{one} is {describe_kind(kind)}, not a strategy file. MindSpore writes "
                    "strategy/ckpt_strategy_rank_0.ckpt … next to the rank folders."
                )
            out[one] = None
    return list(out)


def _stages_of(file: StrategyFile) -> list[Stage]:
    return [
        Stage(number, file.path, params, tuple(o for o in file.operators if o.stage == number))
        for number, params in file.stages.items()
    ]


def _add_merged(stages: dict[int, Stage], merged: Sequence[StrategyFile]) -> tuple[str, ...]:
    """Add stages that only merged files contain; return notes on ignored files.

    Raises:
        FormatError: merged files contradict each other in a stage without raw files.
    """
    raw, notes = dict(stages), list[str]()
    for file in merged:
        found = _stages_of(file)
        against = [s.number for s in found if s.number in raw and raw[s.number].params != s.params]
        if against:
            notes.append(
                f"{file.path} is ignored: in stage {format_list(map(str, against))} it contradicts "
                f"the ranks' own files ({raw[against[0]].path}), which every job rewrites. Delete "
                "it if it is stale."
            )
            continue
        for stage in found:
            _agree(stages.setdefault(stage.number, stage), stage)
    return tuple(notes)


def _agree(first: Stage, other: Stage) -> None:
    if first.params == other.params:
        return
    names = sorted(first.params.keys() ^ other.params.keys()) or sorted(
        n for n, p in first.params.items() if p != other.params[n]
    )
    raise FormatError(
        f"{first.path} and {other.path} contradict each other in stage {first.number}: "
        f"{format_list(names)}. They belong to different jobs; keep the files of one."
    )


def _check_ranks(strategies: Strategies) -> None:
    """Raise FormatError if parameters disagree on the number of ranks per stage."""
    ranks = strategies.stage_ranks
    for stage in strategies.stages.values():
        for name, param in stage.params.items():
            if prod(param.dev_matrix) != ranks:
                first = next(iter(strategies.stages.values()))
                raise FormatError(
                    f"{stage.path}: {name} is on {prod(param.dev_matrix)} ranks (device matrix "
                    f"{param.dev_matrix}), expected {ranks} like {next(iter(first.params))} in "
                    f"{first.path}. All stages of a job have equal size; use the files of one job."
                )
    for what, count, limit in (
        ("a stage", ranks, _MAX_STAGE_RANKS),
        ("a job", strategies.num_ranks, _MAX_RANKS),
    ):
        if count > limit:
            raise FormatError(
                f"{next(iter(strategies.stages.values())).path}: {what} of {count} ranks (expected "
                f"at most {limit}). The file is damaged; fetch it again."
            )


def _natural(path: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that orders rank_9 before rank_10."""
    return tuple(
        (0, int(part), "") if part.isdecimal() and len(part) < 20 else (1, 0, part)
        for part in re.split(r"([0-9]+)", path)
    )


# --- to layouts -----------------------------------------------------------------------------------


def layout(strategies: Strategies, *, partial: bool = False) -> Layout:
    """Convert strategies to a layout.

    Args:
        strategies: parsed strategy files.
        partial: allow missing stages; their ranks are ``unknown`` in the layout.

    Raises:
        CoverageError: the strategy of a stage is missing and ``partial`` is false.
        LayoutError: a parameter is split unevenly.
    """
    per_stage, given = strategies.stage_ranks, sorted(strategies.stages)
    if len(given) < strategies.num_stages and not partial:
        missing = [str(s) for s in range(strategies.num_stages) if s not in strategies.stages]
        raise CoverageError(
            f"{strategies.stages[given[0]].path}: got the strategy of stage "
            f"{format_list(map(str, given))} ({per_stage} ranks each), but the job has "
            f"{strategies.num_stages} stages; missing: {format_list(missing)}. Pass the folder "
            "with the strategy files of all ranks, or a merged file."
        )
    placements = dict[str, tuple[Placement, ...]]()
    for number, stage in strategies.stages.items():
        for name, param in stage.params.items():
            try:
                one = placement(param, number)
            except LayoutError as e:
                raise LayoutError(f"{stage.path}, parameter {name}: {e}") from None
            placements[name] = (*placements.get(name, ()), one)
    unknown = tuple(
        rank
        for stage in range(strategies.num_stages)
        if stage not in strategies.stages
        for rank in range(stage * per_stage, (stage + 1) * per_stage)
    )
    return Layout(strategies.num_ranks, placements, notes=strategies.notes, unknown=unknown)


def for_tensors(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Resolve one-dim tensors of a layout read from strategy files (see ``for_dims``)."""
    changed = {
        name: fitted
        for name, shape in shapes.items()
        if len(shape) == 1
        and (placed := layout.placements.get(name))
        and (fitted := tuple(for_dims(p, 1) for p in placed)) != placed
    }
    return replace(layout, placements={**layout.placements, **changed}) if changed else layout


# --- from layouts ---------------------------------------------------------------------------------


def from_layout(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], *, optimizer_shard: bool = False
) -> Strategies:
    """Convert the layout of the tensors in ``shapes`` to strategies.

    Args:
        layout: placements of the tensors.
        shapes: the full shape of every tensor to include.
        optimizer_shard: express splits of dim 0 as optimizer shards where possible, as
            MindSpore does in training with an optimizer shard.

    Raises:
        LayoutError: a placement does not fit the tensor's shape or cannot be expressed in a
            strategy file, or a stage holds no tensor.
    """
    placed = {n: layout.placements[n] for n in shapes if n in layout.placements}
    sizes = {p.num_ranks for all_of_it in placed.values() for p in all_of_it}
    if len(sizes) != 1 or layout.num_ranks % max(sizes):
        raise LayoutError(
            "strategy files need equal stages, each tensor on all ranks of a stage: got tensors on "
            f"{format_list(map(str, sorted(sizes))) or 'no'} of {layout.num_ranks} ranks. Place "
            "every tensor on whole stages."
        )
    ranks = sizes.pop()
    params: list[dict[str, ParamLayout]] = [{} for _ in range(layout.num_ranks // ranks)]
    for name, all_of_it in placed.items():
        for one in all_of_it:
            if one.first_rank % ranks:
                raise LayoutError(
                    f"{name}: the placement starts at rank {one.first_rank} (expected a multiple "
                    f"of {ranks}, the ranks per stage). Place it on a whole stage."
                )
            check_divides(one, shapes[name], name)
            params[one.first_rank // ranks][name] = param_layout(
                one, len(shapes[name]), optimizer_shard=optimizer_shard
            )
    empty = [str(number) for number, of_stage in enumerate(params) if not of_stage]
    if empty:
        raise LayoutError(
            f"stage {format_list(empty)} holds no tensor, and strategy files cannot express empty "
            "stages. Use fewer stages."
        )
    return Strategies(
        {
            number: Stage(number, f"stage {number}", of_stage, (_operator(number),))
            for number, of_stage in enumerate(params)
        }
    )


def _operator(stage: int) -> Operator:
    """Return a placeholder operator: MindSpore reads the stage number from the operators."""
    return Operator(f"jaxshard_stage_{stage}", stage, ((1,),))


# --- writing --------------------------------------------------------------------------------------


def raw_files(strategies: Strategies) -> dict[str, bytes]:
    """Return the file of every rank by name; ranks of a stage share their bytes.

    Raises:
        LayoutError: a stage has no parameter.
    """
    out = dict[str, bytes]()
    ranks = strategies.stage_ranks
    for number, stage in strategies.stages.items():
        file = StrategyFile(
            stage.path, {number: stage.params}, _operators(stage), False, _RAW_TIMES
        )
        data = strategy_codec.to_bytes(file)
        for rank in range(number * ranks, (number + 1) * ranks):
            out[strategy_file(rank)] = data
    return out


def merged_file(strategies: Strategies) -> bytes:
    """Return all stages as one strategy file, as ``merge_pipeline_strategys`` writes it.

    Raises:
        LayoutError: a stage has no parameter.
    """
    return strategy_codec.to_bytes(_merged(strategies))


def json_file(strategies: Strategies) -> bytes:
    """Return all stages as one JSON strategy file.

    Raises:
        LayoutError: a stage has no parameter, or JSON cannot express a tensor map.
    """
    return strategy_codec.to_json(_merged(strategies))


def _merged(strategies: Strategies) -> StrategyFile:
    stages = strategies.stages.values()
    operators = tuple(o for stage in stages for o in _operators(stage))
    params = {stage.number: stage.params for stage in stages}
    return StrategyFile("merged", params, operators, True, _MERGED_TIMES)


def _operators(stage: Stage) -> tuple[Operator, ...]:
    return stage.operators or (_operator(stage.number),)
