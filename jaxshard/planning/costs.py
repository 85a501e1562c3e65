"""Costs: the requests, copies and bytes of one tensor's journey, counted as the engine takes them.

Tensors of one geometry share one cost, so that 90,000 tensors on 2,048 ranks are counted
in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from ..box import Box
from ..catalog import Piece, Tensor
from ..cells import cells
from ..dtypes import DType
from ..errors import JaxshardError
from ..layout import Placement
from ..ranges import byte_runs
from .blocks import Steps, block_steps, cell_blocks
from .forms import Forms, form_of, part_runs
from .moves import firsts, make_move, move_into, unit_boxes
from .outputs import Outputs

Limits = tuple[int, int]  # bytes of a block, and of a tile
_Numbers = tuple[int, ...]  # bytes needed, bytes read, reads, bytes written, writes, copies
_Geometry = tuple[_Numbers, tuple[int, ...]]  # those, and the reads of each source


@dataclass(frozen=True, slots=True)
class TensorCost:
    """What one tensor's journey takes."""

    numbers: _Numbers
    reads: tuple[tuple[int, int], ...]  # (file, requests to it)


def tensor_cost(
    tensor: Tensor,
    placements: tuple[Placement, ...],
    outputs: Outputs,
    only: frozenset[int] | None,
    limits: Limits,
) -> TensorCost:
    """What it takes to bring ``tensor`` into the files of ``only`` (all where that is None).

    Raises:
        CoverageError: elements of it are nowhere.
        LayoutError: a shard would cut through what belongs together.
    """
    read = firsts(tensor.pieces)
    if tensor.factors is not None:
        for placement in placements:
            tensor.check_groups(placement)
    try:
        if only is None:
            kept = tuple((tensor.name, p.first_rank) in outputs.kept for p in placements)
            plain = tuple((p.axes, p.spec) for p in placements)
            shape = _Shape(tensor.shape, tensor.factors, tensor.dtype)
            sources = tuple(p.box for p in read)
            forms = tuple(map(form_of, read))
            numbers, reads = _whole_cost(shape, sources, forms, plain, kept, limits)
        else:
            move = make_move(tensor, outputs, only)
            if move is None:
                return TensorCost((0,) * 6, ())
            wanted = tuple((t.box, len(t.ranks)) for t in move.targets)
            numbers, reads = _cost(move.sources, move.forms, wanted, move.unit_bytes, limits)
        return _with_operands(TensorCost(numbers, _by_file(read, reads)), read, limits)
    except JaxshardError as error:
        raise type(error)(f"{tensor.name}: {error}") from None


def _by_file(pieces: Iterable[Piece], reads: Iterable[int]) -> tuple[tuple[int, int], ...]:
    return tuple((p.file, n) for p, n in zip(pieces, reads, strict=True) if n)


def _with_operands(cost: TensorCost, pieces: Iterable[Piece], limits: Limits) -> TensorCost:
    """``cost`` and the reads of the small tensors that steps need, once each."""
    views = dict.fromkeys(p.view for p in pieces if p.view and p.view.steps)
    for operand in dict.fromkeys(t for view in views for t in view.operands):
        move = move_into(operand, {Box.whole(operand.shape): (0,)})
        wanted = ((move.targets[0].box, 1),)
        numbers, reads = _cost(move.sources, move.forms, wanted, move.unit_bytes, limits)
        added = (a + b for a, b in zip(cost.numbers[:3], numbers[:3], strict=True))
        files = _by_file((p[0] for p in move.pieces), reads)
        cost = TensorCost((*added, *cost.numbers[3:]), (*cost.reads, *files))
    return cost


@dataclass(frozen=True, slots=True)
class _Shape:
    """The geometry of a tensor, without its name."""

    shape: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...] | None
    dtype: DType

    def fine(self, boxes: Iterable[Box]) -> tuple[tuple[int, ...], tuple[Box, ...]]:
        tensor = Tensor("", self.dtype, self.shape, (), self.factors)
        return tensor.fine_shape, tuple(map(tensor.fine, boxes))


@lru_cache(maxsize=4096)
def _whole_cost(
    shape: _Shape,
    sources: tuple[Box, ...],
    forms: Forms,
    placements: tuple[tuple[tuple[tuple[str, int], ...], tuple[tuple[str, ...], ...]], ...],
    kept: tuple[bool, ...],
    limits: Limits,
) -> _Geometry:
    wanted: dict[Box, int] = {}
    for (axes, spec), single in zip(placements, kept, strict=True):
        for shard in Placement(axes, spec).shards(shape.shape):
            wanted[shard.box] = wanted.get(shard.box, 0) + (1 if single else len(shard.holders))
    fine_shape, fine = shape.fine(wanted)
    in_source, in_target, unit = unit_boxes(fine_shape, shape.dtype, sources, fine)
    counted = tuple(zip(in_target, wanted.values(), strict=True))
    return _cost(in_source, forms, counted, unit, limits)


@lru_cache(maxsize=4096)
def _cost(
    sources: tuple[Box, ...],
    forms: Forms,
    wanted: tuple[tuple[Box, int], ...],
    unit: int,
    limits: Limits,
) -> _Geometry:
    """The engine's steps, counted: those of one block of each kind, times how many there are."""
    total, reads = [0] * 5, [0] * len(sources)
    for cell in cells(sources, tuple(box for box, _ in wanted)):
        parts = [part for _, part in (*cell.sources, *cell.targets)]
        for block, times in cell_blocks(cell, forms, unit, *limits).kinds(parts):
            steps = block_steps(cell, block, sources, forms)
            numbers = _block_cost(steps, sources, forms, wanted, unit, reads, times)
            for i, n in enumerate(numbers):
                total[i] += n * times
    needed, read, written, writes, copies = total
    return (needed, read, sum(reads), written, writes, copies), tuple(reads)


def _block_cost(
    steps: Steps,
    sources: tuple[Box, ...],
    forms: Forms,
    wanted: tuple[tuple[Box, int], ...],
    unit: int,
    reads: list[int],
    times: int,
) -> tuple[int, int, int, int, int]:
    """Bytes needed and read, bytes written, writes and copies of a block; ``reads`` times."""
    needed = read = written = writes = 0
    for index, part in steps.reads:
        runs = part_runs(part, sources[index], forms[index], unit)
        if runs is not None:
            requests = runs.coalesced()
            needed += runs.num_bytes
            read += requests.num_bytes
            reads[index] += len(requests) * times
    for index, part in steps.writes:
        target, num_ranks = wanted[index]
        written += part.size * unit * num_ranks
        writes += len(byte_runs(part.within(target), target.shape, unit)) * num_ranks
    return needed, read, written, writes, steps.num_copies
