"""Blocks: what of a journey is carried at a time, and what happens to it between.

Small enough to stay in a core's cache; tiles where a source lies in another order of dims,
which would otherwise be read in tiny runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..box import Box
from ..cells import Cell
from ..ranges import Grid, blocks, blocks_along, byte_runs, tiles
from .forms import Forms, permuted_form

BLOCK_BYTES = 1 << 20  # a block stays in the cache of one core between its read and its write
STEPPED_BLOCK_BYTES = 2 << 20  # where values are computed: half the steps of Python for them
TILE_BYTES = 8 << 20  # what is read transposed needs more, or it is read in tiny runs


@dataclass(frozen=True, slots=True)
class Steps:
    """What happens to one block: parts read into it, parts written from it."""

    block: Box
    reads: tuple[tuple[int, Box], ...]
    writes: tuple[tuple[int, Box], ...]
    num_copies: int


def cell_blocks(
    cell: Cell,
    forms: Forms,
    unit: int,
    block_bytes: int,
    tile_bytes: int = TILE_BYTES,
    *,
    in_memory: bool = False,
) -> Grid:
    """The blocks that ``cell`` is carried in: tiles where a source lies transposed.

    Where targets are ``in_memory``, which is written anywhere at no cost, a transposed source
    is read in the order of its file.
    """
    found = [form for i, _ in cell.sources if (form := forms[i])]
    if not found:
        return blocks(cell.box, unit, block_bytes)
    widest = max(unit, *(form.item_bytes for form in found))
    permuted = permuted_form(cell, forms)
    if permuted is None:
        return blocks(cell.box, widest, block_bytes)
    strides = permuted.strides
    if not in_memory:
        return tiles(cell.box, strides, widest, tile_bytes)
    # longer rows of the target at a time are worth more than a block that stays in a cache
    return blocks_along(cell.box, _stored_order(strides), widest, max(block_bytes, tile_bytes // 2))


def _stored_order(strides: tuple[int, ...]) -> tuple[int, ...]:
    """The dims as they lie in the file, slowest first.

    A dim along which sources follow each other (stride 0: rows of two matrices in turns, say)
    stays inside the dim before it, so that what lies together in the target is done together.
    """
    keys, last = [], 1 << 62
    for dim, stride in enumerate(strides):
        last = stride or last
        keys.append((-last, dim))
    return tuple(dim for _, dim in sorted(keys))


def block_steps(
    cell: Cell, block: Box, sources: tuple[Box, ...], forms: Forms | None = None
) -> Steps:
    """The reads and writes of ``block``, and the strided copies between.

    A part that is one run of the block is read straight into it, or written straight
    from it; any other passes through a copy, and so does what has a form.
    """
    reads = tuple((i, p) for i, box in cell.sources if (p := box.intersect(block)))
    writes = tuple((i, p) for i, box in cell.targets if (p := box.intersect(block)))
    inside = block.shape
    copies = sum(bool(byte_runs(part.within(block), inside, 1).outer) for _, part in writes)
    for i, part in reads:
        formed = forms is not None and forms[i] is not None
        copies += formed or bool(byte_runs(part.within(block), inside, 1).outer)
    return Steps(block, reads, writes, copies)
