"""Scattering: a block that several targets share by columns, read straight into their memory.

file     |aabbaabbaabb|      one vectored request
memory   |aaaaaa|  |bbbbbb|  no block between, and no copy
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from ..box import Box
from ..planning.blocks import Steps
from ..planning.moves import Move
from ..ranges import Runs, byte_runs
from .requests import Bytes
from .vectors import Places

_LEAST_BYTES = 1 << 10  # of a row: below, a copy by NumPy is as quick as the kernel's


@dataclass(frozen=True, slots=True)
class Scatter:
    """Where the bytes of a block lie and go.

    Attributes:
        source: which source of the move.
        runs: its bytes in the source's file: one run.
        num_rows: rows of the block, each cut alike.
        parts: for each target in the order of a row: its number, where its bytes begin in
            the target, and how many of a row it gets.
    """

    source: int
    runs: Runs
    num_rows: int
    parts: tuple[tuple[int, int, int], ...]


def scatter_of(move: Move, steps: Steps) -> Scatter | None:
    """How a block can be scattered; None if it is not one run that is cut by columns."""
    if len(steps.reads) != 1 or len(steps.writes) < 2 or steps.reads[0][1] != steps.block:
        return None
    source = steps.reads[0][0]
    dim = _cut(steps.block, [part for _, part in steps.writes])
    if move.forms[source] is not None or dim is None:
        return None
    stored, unit, shape = move.sources[source], move.unit_bytes, steps.block.shape
    runs = byte_runs(
        steps.block.within(stored), stored.shape, unit, move.pieces[source][0].offset
    ).coalesced()
    parts = []
    for index, part in sorted(steps.writes, key=lambda write: write[1].start[dim]):
        target = move.targets[index].box
        there = byte_runs(part.within(target), target.shape, unit)
        width = unit * prod(part.shape[dim:])
        if there.outer or width < _LEAST_BYTES:
            return None
        parts.append((index, there.offset, width))
    if runs.outer or runs.num_bytes != steps.block.size * unit:
        return None
    return Scatter(source, runs, prod(shape[:dim]), tuple(parts))


def _cut(block: Box, parts: Sequence[Box]) -> int | None:
    """The one dim along which ``parts``, side by side, are ``block``."""
    one = parts[0]
    cut = [d for d in range(len(block.start)) if one.shape[d] != block.shape[d]]
    if len(cut) != 1:
        return None
    dim, at = cut[0], block.start[cut[0]]
    for part in sorted(parts, key=lambda part: part.start[dim]):
        wide = [d for d in range(len(block.start)) if d != dim and part.shape[d] != block.shape[d]]
        if wide or part.start[dim] != at:
            return None
        at = part.stop[dim]
    return dim if at == block.stop[dim] else None


def places_of(scatter: Scatter, memory: Sequence[Bytes]) -> Places:
    """The places to fill, where ``memory`` is what each target gets of the block."""
    table = np.empty((scatter.num_rows, len(memory), 2), np.uint64)
    rows = np.arange(scatter.num_rows, dtype=np.uint64)
    for k, (data, (_, _, width)) in enumerate(zip(memory, scatter.parts, strict=True)):
        table[:, k, 0] = data.ctypes.data + rows * np.uint64(width)
        table[:, k, 1] = width
    return Places(table, memory)
