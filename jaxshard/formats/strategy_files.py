"""MindSpore strategy files: which box of each parameter every rank holds.

    strategy/ckpt_strategy_rank_0.ckpt …     one a rank, equal within a pipeline stage
    merged_strategy.ckpt                     all stages in one
    strategy.json                            the same as JSON

However they come, they are read into ``Strategies``, stage by stage, and that becomes a
``Layout``; a layout becomes files again. Which stage a file tells of is read from what
is in it, never from its name. This module knows no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from ..core.layout import Layout, Placement, check_divides
from ..errors import CoverageError, FormatError, LayoutError, NotFoundError, format_list
from . import protobuf, strategy_codec
from . import strategy_codec as messages
from .folder import Folder, describe_kind, kind_of
from .strategy_codec import Operator, ParamLayout, StrategyFile
from .strategy_layouts import for_dims, full_shape, param_layout, placement

__all__ = [
    "Operator",
    "ParamLayout",
    "Stage",
    "Strategies",
    "StrategyFile",
    "find",
    "for_dims",
    "for_tensors",
    "from_layout",
    "full_shape",
    "json_file",
    "layout",
    "merged_file",
    "param_layout",
    "placement",
    "raw_files",
    "read",
    "read_file",
]

_MAX_STAGE_RANKS = 1 << 17  # boxes are listed per rank; the largest jobs have tens of thousands
_MAX_RANKS = 1 << 20
_COMPARED_BYTES = 1 << 28  # ranks of a stage have equal files: past this, one per stage is read
_RAW_TIMES, _MERGED_TIMES = 2, 1  # what MindSpore has in current_stage; it means nothing


@dataclass(frozen=True)
class Stage:
    """The parameters of one pipeline stage, and the file that told."""

    number: int
    path: str
    params: Mapping[str, ParamLayout] = field(repr=False)
    operators: tuple[Operator, ...] = field(repr=False, default=())


@dataclass(frozen=True)
class Strategies:
    """What the strategy files of one job say, stage by stage in order.

    Attributes:
        stages: the parameters of each pipeline stage.
        notes: what a user should know of it.
    """

    stages: Mapping[int, Stage]
    notes: tuple[str, ...] = ()

    @property
    def num_stages(self) -> int:
        """Pipeline stages of the job, as far as the files tell."""
        return max(self.stages) + 1

    @property
    def stage_ranks(self) -> int:
        """Ranks in each stage."""
        first = next(iter(self.stages.values()))
        return prod(next(iter(first.params.values())).dev_matrix)

    @property
    def num_ranks(self) -> int:
        """Ranks of the job, as far as the files tell."""
        return self.num_stages * self.stage_ranks


# ---------------------------------------------------------------------------- files


def find(folder: Folder, under: str = "") -> tuple[str, ...]:
    r"""The strategy files directly in ``under``, by rank number; the JSON ones if no others.

    >>> from .reader import MemoryFolder
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
    """What the strategy files at ``paths`` say; each may be a file or a folder of them.

    Raw files of several ranks, merged files and JSON may be given together. Files of one
    stage must agree; but a merged file in a folder may be older than the raw ones beside it,
    which a job writes each time, and then it does not count.

    Raises:
        NotFoundError: there is no such file, or no strategy file in the folder.
        FormatError: a file is damaged or no strategy file, or files contradict each other.
    """
    stages, compared, seen = dict[int, Stage](), 0, set[frozenset[bytes]]()
    merged: list[StrategyFile] = []
    for path in _expand(folder, paths):
        compared += folder.files()[path].num_bytes
        if not path.endswith(".json"):
            if (
                stages
                and compared > _COMPARED_BYTES
                and messages.first_stage(folder, path) in stages
            ):
                continue
            items = messages.items(folder, path)
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
    """The one strategy file at ``path``; JSON if its name says so.

    Raises:
        FormatError: it is damaged, or no strategy file.
    """
    if not path.endswith(".json"):
        return messages.parse(folder, path)
    reader = protobuf.Reader(folder, path)
    messages.check_size(path, reader.num_bytes)
    data = reader.take(0, reader.num_bytes, reader.num_bytes, "a strategy")
    return strategy_codec.from_json(data, path)


def _expand(folder: Folder, paths: Sequence[str]) -> list[str]:
    """The strategy files that ``paths`` name, each once."""
    out, files = dict[str, None](), folder.files()
    for path in paths:
        alone = tuple(files) if not path and len(files) == 1 else ()
        found = alone or ((path,) if path in files else find(folder, path))
        if not found:
            prefix = path.rstrip("/") + "/" if path.rstrip("/") else ""
            others = [p for p in files if p.startswith(prefix)]
            raise NotFoundError(
                f"no strategy file at {path or folder.root}"
                + (f" (there are {format_list(others, 3)})" if others else "")
                + ". MindSpore writes them as strategy/ckpt_strategy_rank_0.ckpt; give that folder "
                "or one merged file."
            )
        for one in found:
            kind = kind_of(folder, one)
            if not kind.startswith("strategy"):
                raise FormatError(
                    f"{one} is {describe_kind(kind)}, not a strategy file. Strategy files are "
                    "called ckpt_strategy_rank_0.ckpt and lie in the folder strategy beside the "
                    "ranks."
                )
            out[one] = None
    return list(out)


def _stages_of(file: StrategyFile) -> list[Stage]:
    return [
        Stage(number, file.path, params, tuple(o for o in file.operators if o.stage == number))
        for number, params in file.stages.items()
    ]


def _add_merged(stages: dict[int, Stage], merged: Sequence[StrategyFile]) -> tuple[str, ...]:
    """Add to the stages of raw files those that merged files beside them have more; and notes.

    Raises:
        FormatError: there are no raw files, and the merged ones contradict each other.
    """
    raw, notes = dict(stages), list[str]()
    for file in merged:
        found = _stages_of(file)
        against = [s.number for s in found if s.number in raw and raw[s.number].params != s.params]
        if against:
            notes.append(
                f"{file.path} is not used: in stage {format_list(map(str, against))} it "
                f"contradicts the ranks' own files beside it ({raw[against[0]].path}), which a job "
                "writes each time. Delete it if it is older."
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
        f"{first.path} and {other.path} both tell of stage {first.number} and contradict each "
        f"other in {format_list(names)}. They are of different jobs; keep the files of one."
    )


def _check_ranks(strategies: Strategies) -> None:
    """Refuse parameters that disagree on how many ranks a stage has."""
    ranks = strategies.stage_ranks
    for stage in strategies.stages.values():
        for name, param in stage.params.items():
            if prod(param.dev_matrix) != ranks:
                first = next(iter(strategies.stages.values()))
                raise FormatError(
                    f"{stage.path}: {name} lies on {prod(param.dev_matrix)} ranks (device matrix "
                    f"{param.dev_matrix}), but {next(iter(first.params))} in {first.path} on "
                    f"{ranks}. All stages of a job have equally many; use the files of one job."
                )
    for what, count, most in (
        ("stages of", ranks, _MAX_STAGE_RANKS),
        ("a job of", strategies.num_ranks, _MAX_RANKS),
    ):
        if count > most:
            raise FormatError(
                f"{next(iter(strategies.stages.values())).path}: {what} {count} ranks; more than "
                f"{most} is absurd. The file is damaged; fetch it again."
            )


def _natural(path: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key by which rank_9 comes before rank_10."""
    return tuple(
        (0, int(part), "") if part.isdecimal() and len(part) < 20 else (1, 0, part)
        for part in re.split(r"([0-9]+)", path)
    )


# ---------------------------------------------------------------------------- to layouts


def layout(
    strategies: Strategies, num_ranks: int | None = None, *, partial: bool = False
) -> Layout:
    """Who holds which box of every parameter.

    Args:
        strategies: what the files say.
        num_ranks: how many ranks the checkpoint has, where that is known: to notice that
            the file of one stage was given for a job of several.
        partial: stages may be missing; their ranks are ``unknown``.

    Raises:
        CoverageError: the strategy of a stage is missing, and may not be.
        LayoutError: a parameter is cut in a way that is no even split.
    """
    per_stage, given = strategies.stage_ranks, sorted(strategies.stages)
    wanted = max(strategies.num_stages, -(-(num_ranks or 0) // per_stage))
    if len(given) < wanted and not partial:
        missing = [str(s) for s in range(min(wanted, 10_000)) if s not in strategies.stages]
        raise CoverageError(
            f"{strategies.stages[given[0]].path}: the strategy of stage "
            f"{format_list(map(str, given))} is given ({per_stage} ranks each), but the job has "
            f"{wanted} stages; missing: {format_list(missing)}. Give the folder with the strategy "
            "files of all ranks, or a merged one."
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
    """``layout``, which strategy files told, as what it means for tensors of ``shapes``."""
    changed = {
        name: fitted
        for name, shape in shapes.items()
        if len(shape) == 1
        and (placed := layout.placements.get(name))
        and (fitted := tuple(for_dims(p, 1) for p in placed)) != placed
    }
    return replace(layout, placements={**layout.placements, **changed}) if changed else layout


# ---------------------------------------------------------------------------- from layouts


def from_layout(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], *, optimizer_shard: bool = False
) -> Strategies:
    """The strategies that say what ``layout`` says of the tensors in ``shapes``.

    Args:
        layout: who holds which box.
        shapes: the full shape of every tensor to tell of.
        optimizer_shard: say splits of dim 0 as optimizer shards wherever they can be, as
            MindSpore does when it trains with one.

    Raises:
        LayoutError: a tensor's placement does not fit its shape or cannot be said in a
            strategy file, or a stage would hold no tensor.
    """
    placed = {n: layout.placements[n] for n in shapes if n in layout.placements}
    sizes = {p.num_ranks for all_of_it in placed.values() for p in all_of_it}
    if len(sizes) != 1 or layout.num_ranks % max(sizes):
        raise LayoutError(
            f"strategy files need stages of equally many ranks; these tensors lie on "
            f"{format_list(map(str, sorted(sizes))) or 'no'} of {layout.num_ranks}. Place every "
            "tensor on whole stages."
        )
    ranks = sizes.pop()
    params: list[dict[str, ParamLayout]] = [{} for _ in range(layout.num_ranks // ranks)]
    for name, all_of_it in placed.items():
        for one in all_of_it:
            if one.first_rank % ranks:
                raise LayoutError(
                    f"{name}: it begins at rank {one.first_rank}, but stages begin at multiples of "
                    f"{ranks}. Place it on a whole stage."
                )
            check_divides(one, shapes[name], name)
            params[one.first_rank // ranks][name] = param_layout(
                one, len(shapes[name]), optimizer_shard=optimizer_shard
            )
    empty = [str(number) for number, of_stage in enumerate(params) if not of_stage]
    if empty:
        raise LayoutError(
            f"stage {format_list(empty)} would hold no tensor, and a strategy file cannot say "
            "that. Take fewer stages."
        )
    return Strategies(
        {
            number: Stage(number, f"stage {number}", of_stage, (_operator(number),))
            for number, of_stage in enumerate(params)
        }
    )


def _operator(stage: int) -> Operator:
    """What stands in for the network's operators: MindSpore takes the stage from there."""
    return Operator(f"jaxshard_stage_{stage}", stage, ((1,),))


# ---------------------------------------------------------------------------- writing


def raw_files(strategies: Strategies) -> dict[str, bytes]:
    """``ckpt_strategy_rank_{r}.ckpt`` of every rank; ranks of a stage share their bytes.

    Raises:
        LayoutError: a stage has no parameter.
    """
    out = dict[str, bytes]()
    ranks = strategies.stage_ranks
    for number, stage in strategies.stages.items():
        file = StrategyFile(
            stage.path, {number: stage.params}, _operators(stage), False, _RAW_TIMES
        )
        data = messages.to_bytes(file)
        for rank in range(number * ranks, (number + 1) * ranks):
            out[f"ckpt_strategy_rank_{rank}.ckpt"] = data
    return out


def merged_file(strategies: Strategies) -> bytes:
    """All stages in one strategy file, as ``merge_pipeline_strategys`` makes it.

    Raises:
        LayoutError: a stage has no parameter.
    """
    return messages.to_bytes(_merged(strategies))


def json_file(strategies: Strategies) -> bytes:
    """All stages in one JSON strategy file.

    Raises:
        LayoutError: a stage has no parameter, or a map does not fit in JSON.
    """
    return strategy_codec.to_json(_merged(strategies))


def _merged(strategies: Strategies) -> StrategyFile:
    stages = strategies.stages.values()
    operators = tuple(o for stage in stages for o in _operators(stage))
    params = {stage.number: stage.params for stage in stages}
    return StrategyFile("merged", params, operators, True, _MERGED_TIMES)


def _operators(stage: Stage) -> tuple[Operator, ...]:
    return stage.operators or (_operator(stage.number),)
