"""Output files of rank folders: one weight file a rank, and the strategy files.

This module decides which file holds which box, and touches no disk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import lcm, prod

from ..core.catalog import Catalog, Tensor
from ..core.layout import Layout, Placement, check_divides
from ..errors import LayoutError, format_list
from ..formats import rank_folder, rank_names, strategy_files, strategy_layouts
from ..planning.outputs import arrange
from ..rules.match import weight_name
from .results import Request, Result, as_ckpt, as_safetensors

STRATEGY_FOLDER = "strategy"


def rank_folders(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """``rank_{r}/{prefix}_rank_{r}-{epoch}_{step}.safetensors``, or ``.ckpt``, and ``strategy/``.

    Raises:
        LayoutError: a tensor is not in the layout, or does not divide.
    """
    layout = _by_stages(placed(source, tensors, request), source)
    strategy, notes = _strategy(source, tensors, layout)
    layout = replace(layout, notes=(*layout.notes, *notes))
    kind = "ckpt" if request.format == "ckpt" else "safetensors"
    prefix = rank_names.check_prefix(request.prefix)
    paths = [rank_names.file_path(r, prefix, request.step, kind) for r in range(layout.num_ranks)]
    once = request.remove_redundancy
    keepers = rank_folder.keepers(_of_strategy(layout, source.hyper)) if once else None
    outputs = arrange(tensors, layout, paths, remove_redundancy=once, keepers=keepers)
    side = {f"{STRATEGY_FOLDER}/{path}": data for path, data in strategy.items()}
    if kind == "ckpt":
        lay_file, seal = as_ckpt(source.metadata, crc=request.crc)
        return Result("ckpt", outputs, lay_file, side, seal)
    redundancy = {"remove_redundancy": str(once)}  # as Python writes bools
    metadata = {**source.metadata, "format": "ms", **redundancy}
    return Result("ranks", outputs, as_safetensors(metadata), side)


def placed(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Layout:
    """The layout asked for, with the job's numbers on every rank.

    Raises:
        LayoutError: a tensor is not in the layout.
    """
    assert request.to is not None
    layout = strategy_files.for_tensors(request.to, {t.name: t.shape for t in tensors})
    _check_names(source, tensors, layout)
    return _with_hyper(layout, source, tensors)


def _strategy(
    source: Catalog, tensors: Sequence[Tensor], layout: Layout
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The strategy files of all ranks, or one of our own where those cannot say it; and notes.

    Hyper parameters are not told of: they are never cut.
    """
    weights = [t for t in tensors if t.name not in source.hyper]
    told = weights or tensors
    for tensor in told:
        for placement in layout.placements[tensor.name]:
            check_divides(placement, tensor.shape, tensor.name)
    every = _of_strategy(layout, source.hyper if weights else frozenset())
    absent = _absent_shapes(every, {t.name: t.shape for t in tensors}, source.lost)
    shapes = {t.name: t.shape for t in told} | absent
    every = strategy_files.for_tensors(every, absent)
    try:
        return strategy_files.raw_files(strategy_files.from_layout(every, shapes)), ()
    except LayoutError as error:
        note = (
            f"{STRATEGY_FOLDER}/{strategy_layouts.LAYOUT_FILE} says who holds what; MindSpore's "
            f"own format cannot: {str(error).split('. ')[0]}."
        )
        return {strategy_layouts.LAYOUT_FILE: strategy_layouts.layout_file_bytes(every, shapes)}, (
            note,
        )


def _absent_shapes(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], lost: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Shapes of what the strategy has and no file: it stays in the result's strategy.

    A state keeps its turn there, and has the shape of its weight. Of weights on ranks whose
    files are elsewhere only the cut is known; any shape that it divides says the same.
    """
    found = {}
    for name, placements in layout.placements.items():
        weight = weight_name(name)
        if name in shapes or (weight not in shapes and weight not in lost):
            continue
        shape = shapes.get(weight) or _least_shape(placements)
        with suppress(LayoutError):
            for placement in placements:
                check_divides(strategy_layouts.for_dims(placement, len(shape)), shape)
            found[name] = shape
    return found


def _least_shape(placements: Sequence[Placement]) -> tuple[int, ...]:
    dims = max(len(p.spec) for p in placements)
    return tuple(lcm(*(p.ways(dim) for p in placements)) for dim in range(dims))


def _by_stages(layout: Layout, source: Catalog) -> Layout:
    """``layout`` with what lies on several stages told stage by stage, the job's numbers apart."""
    stage = prod(n for _, n in layout.stage_axes) if layout.stage_axes else layout.num_ranks
    placements = {
        name: tuple(s for p in placed for s in _by_stage(p, stage))
        for name, placed in layout.placements.items()
        if name not in source.hyper
    }
    return replace(layout, placements={**layout.placements, **placements})


def _of_strategy(layout: Layout, hyper: frozenset[str]) -> Layout:
    """All names of the strategy, also those that no file has: MindSpore counts them all."""
    every = {**layout.absent, **layout.placements}
    return replace(layout, placements={n: p for n, p in every.items() if n not in hyper})


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
            f"{len(unplaced)} tensors are not in the target's strategy: {format_list(unplaced)}. "
            "Leave them out (of a conversion with exclude=, --exclude; optimizer states with "
            "drop_prefix=, --drop-prefix adam_), or give a strategy that has them."
        )
