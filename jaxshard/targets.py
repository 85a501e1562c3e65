"""Targets: from what a person asks for to the files of the result.

    full            a complete checkpoint in the Hugging Face layout
    dp2mp4pp2       one file a rank, cut by the family's rules
    DIR or FILE     one file a rank, cut as those strategy files say

This module decides and touches no disk; ``convert`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from .catalog import Catalog, Tensor
from .errors import LayoutError, NotFoundError, some
from .formats import huggingface_files, layout_file, rank_files, safetensors, strategy_files
from .layout import Layout, Placement, check_divides
from .outputs import Entry, Outputs, arrange
from .rules import Policy, Rules, rules_for
from .rules import layout as lay_out
from .storage.writing import FileLayout
from .strategy import Strategy

HYPER_FILE = "hyper_param.safetensors"
STRATEGY_FOLDER = "strategy"


@dataclass(frozen=True)
class Request:
    """How the result should be, apart from where.

    Attributes:
        to: the layout, or None for a complete checkpoint.
        max_shard_bytes: the most tensor bytes of one file of a complete checkpoint.
        prefix: rank files are called ``rank_{r}/{prefix}{r}.safetensors``.
        remove_redundancy: store each shard on one of its holders only.
    """

    to: Layout | None = None
    max_shard_bytes: int = 5 * 10**9
    prefix: str = "checkpoint_"
    remove_redundancy: bool = False


@dataclass(frozen=True)
class Result:
    """The files to make.

    Attributes:
        lay_file: lays out the weight file of a list of entries.
        side_files: other files, by path, with their contents.
    """

    format: str
    outputs: Outputs
    lay_file: Callable[[Sequence[Entry]], FileLayout]
    side_files: Mapping[str, bytes] = field(repr=False)


def lay_out_for(
    source: Catalog,
    strategy: Strategy,
    rules: Rules | None = None,
    *,
    unmatched: Policy = "error",
    uneven: Policy = "error",
) -> Layout:
    """The layout of ``source``'s tensors under ``strategy``, by its family's rules.

    ``rules`` go before the family's, or stand alone where the family is not known. Names
    without a rule and dims that do not divide are refused, or left whole with ``"replicate"``.

    Raises:
        LayoutError: names without a rule, or dims that do not divide.
    """
    names = list(source.tensors)
    try:
        table = rules_for(source.model, names)
    except (LayoutError, NotFoundError):
        if rules is None:
            raise
        table = rules
    else:
        table = table.override(rules) if rules else table
    shapes = {t.name: t.shape for t in source.tensors.values()}
    return lay_out(shapes, strategy, table, source.model, source.hyper, unmatched, uneven)


def make_result(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """The files that hold ``tensors`` of ``source`` as ``request`` wants them.

    Raises:
        LayoutError: the layout does not fit the tensors.
    """
    if request.to is None:
        return _complete(source, tensors, request.max_shard_bytes)
    return _ranks(source, tensors, request)


def _complete(source: Catalog, tensors: Sequence[Tensor], max_shard_bytes: int) -> Result:
    hyper = [t for t in tensors if t.name in source.hyper]
    weights = [t for t in tensors if t.name not in source.hyper]
    groups = huggingface_files.plan_files([(t.name, t.num_bytes) for t in weights], max_shard_bytes)
    paths = huggingface_files.file_names(len(groups))
    if hyper:
        groups, paths = [*groups, [t.name for t in hyper]], [*paths, HYPER_FILE]
    placements = {
        name: (Placement((), first_rank=i),) for i, group in enumerate(groups) for name in group
    }
    outputs = arrange([*weights, *hyper], Layout(len(groups), placements), paths)
    side = {}
    if len(groups) - bool(hyper) > 1:
        weight_map = {name: paths[p[0].first_rank] for name, p in placements.items()}
        total = sum(t.num_bytes for t in tensors)
        side["model.safetensors.index.json"] = huggingface_files.index_json(weight_map, total, {})
    metadata = {"format": "pt", **source.metadata}
    if metadata["format"] == "ms":
        metadata["format"] = "pt"  # transformers loads no file that says otherwise
    return Result("huggingface", outputs, _safetensors(metadata), side)


def _ranks(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    layout = request.to
    assert layout is not None
    _check_names(source, tensors, layout)
    layout = _with_hyper(layout, source, tensors)
    strategy, notes = _strategy(source, tensors, layout)
    layout = replace(layout, notes=(*layout.notes, *notes))
    paths = [rank_files.file_path(r, request.prefix) for r in range(layout.num_ranks)]
    outputs = arrange(tensors, layout, paths, remove_redundancy=request.remove_redundancy)
    metadata = {
        **source.metadata,
        "format": "ms",
        "remove_redundancy": str(request.remove_redundancy),
    }
    side = {f"{STRATEGY_FOLDER}/{path}": data for path, data in strategy.items()}
    return Result("ranks", outputs, _safetensors(metadata), side)


def _strategy(
    source: Catalog, tensors: Sequence[Tensor], layout: Layout
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The strategy files of all ranks, or one of our own where those cannot say it; and notes.

    Hyper parameters are not told of: they are never cut.
    """
    told = [t for t in tensors if t.name not in source.hyper] or tensors
    stage = prod(n for _, n in layout.stage_axes) if layout.stage_axes else layout.num_ranks
    placements = {
        t.name: tuple(s for p in layout.placements[t.name] for s in _by_stage(p, stage))
        for t in told
    }
    split = Layout(layout.num_ranks, placements)
    for tensor in told:
        for placement in placements[tensor.name]:
            check_divides(placement, tensor.shape, tensor.name)
    try:
        strategies = strategy_files.from_layout(split, {t.name: t.shape for t in told})
        return strategy_files.raw_files(strategies), ()
    except LayoutError as error:
        note = (
            f"{STRATEGY_FOLDER}/{layout_file.NAME} says who holds what; MindSpore's own format "
            f"cannot: {str(error).split('. ')[0]}."
        )
        return {layout_file.NAME: layout_file.to_bytes(layout, (t.name for t in told))}, (note,)


def _by_stage(placement: Placement, stage: int) -> list[Placement]:
    """A tensor that lies whole on the ranks of several stages, stage by stage."""
    if placement.spec or placement.num_ranks <= stage:
        return [placement]
    firsts = range(placement.first_rank, placement.ranks.stop, stage)
    return [Placement((("all", stage),), (), first) for first in firsts]


def _with_hyper(layout: Layout, source: Catalog, tensors: Iterable[Tensor]) -> Layout:
    """``layout`` with the tensors that are no weights on every rank."""
    everywhere = (Placement((("all", layout.num_ranks),)),)
    added = {t.name: everywhere for t in tensors if t.name in source.hyper}
    return replace(layout, placements={**layout.placements, **added})


def _check_names(source: Catalog, tensors: Iterable[Tensor], layout: Layout) -> None:
    weights = {t.name for t in tensors} - source.hyper
    unplaced = sorted(weights - set(layout.placements))
    if unplaced:
        raise LayoutError(
            f"{len(unplaced)} tensors are not in the target's strategy: {some(unplaced)}. Leave "
            "them out with --exclude, or give a strategy that has them."
        )


def _safetensors(metadata: Mapping[str, str]) -> Callable[[Sequence[Entry]], FileLayout]:
    def lay_file(entries: Sequence[Entry]) -> FileLayout:
        return safetensors.layout_file(
            [(e.tensor.name, e.tensor.dtype, e.shape) for e in entries], metadata
        )

    return lay_file
