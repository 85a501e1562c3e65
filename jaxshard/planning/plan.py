"""A plan: made from headers alone, it knows its numbers before anything runs.

The run must match them, and a test counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..catalog import Catalog
from ..errors import CoverageError
from .blocks import BLOCK_BYTES, STEPPED_BLOCK_BYTES, TILE_BYTES
from .costs import tensor_cost
from .coverage import gaps_error
from .moves import Move, make_move
from .outputs import Outputs


@dataclass(frozen=True, slots=True)
class Totals:
    """What a plan will do. The run's own counters must equal these numbers."""

    num_tensors: int = 0
    num_files: int = 0
    bytes_needed: int = 0  # distinct source bytes that some target holds
    bytes_read: int = 0  # those, and the gaps read along
    num_reads: int = 0
    bytes_written: int = 0  # tensor bytes, headers not counted
    num_writes: int = 0
    num_copies: int = 0  # strided copies in memory


@dataclass(frozen=True)
class Plan:
    """How ``source`` becomes ``outputs``; ``print`` shows it as ``jaxshard plan`` does.

    Attributes:
        only: the numbers of the outputs' files that are made; None for all.
        block_bytes, tile_bytes: what is carried at a time; tiles where it is transposed.
        host_bytes: the most memory for data that a run in such blocks takes, on all its
            threads; 0 where that is not decided.
        reads: requests to each file of the source, in their order.
    """

    source: Catalog
    outputs: Outputs
    only: frozenset[int] | None = None
    block_bytes: int = BLOCK_BYTES
    tile_bytes: int = TILE_BYTES
    host_bytes: int = 0
    totals: Totals = field(default=Totals(), compare=False)
    reads: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the source and of the target's layout."""
        return tuple(dict.fromkeys((*self.source.notes, *self.outputs.layout.notes)))

    def moves(self) -> Iterator[Move]:
        """The journey of each tensor, those that finish the first files first."""
        names = self.outputs.layout.placements
        known = [t for t in self.source.tensors.values() if t.name in names]
        for tensor in sorted(known, key=lambda t: names[t.name][0].first_rank):
            if move := make_move(tensor, self.outputs, self.only):
                yield move

    def of(self, only: frozenset[int] | None) -> Plan:
        """The same for the files ``only``."""
        made = make_plan(
            self.source,
            self.outputs,
            only=only,
            block_bytes=self.block_bytes,
            tile_bytes=self.tile_bytes,
        )
        return replace(made, host_bytes=self.host_bytes)

    def __str__(self) -> str:
        from ..picture import plan_text  # noqa: PLC0415 - which draws plans, and so imports this

        return plan_text(self)


def make_plan(
    source: Catalog,
    outputs: Outputs,
    *,
    only: frozenset[int] | None = None,
    block_bytes: int = BLOCK_BYTES,
    tile_bytes: int = TILE_BYTES,
) -> Plan:
    """The plan that fills ``outputs`` (of the ranks ``only``, when given) from ``source``.

    Raises:
        CoverageError: the source lacks elements of some tensors; names, numbers, and which
            ranks' files would bring them, are said.
        LayoutError: a shard would cut through a byte of a packed dtype, or a group of rows
            that belong together.
    """
    numbers, reads = [0] * 6, Counter[int]()
    files = set(range(len(outputs.paths))) if only is None else only
    gaps: dict[str, CoverageError] = {}
    num_tensors = 0
    for name, placements in outputs.layout.placements.items():
        tensor = source.tensors.get(name)
        if tensor is None:
            continue
        num_tensors += 1
        try:
            cost = tensor_cost(tensor, placements, outputs, only, (block_bytes, tile_bytes))
        except CoverageError as error:
            gaps[name] = error
            continue
        for i, n in enumerate(cost.numbers):
            numbers[i] += n
        for file, n in cost.reads:
            reads[file] += n
    if gaps:
        raise gaps_error(source, gaps)
    totals = Totals(num_tensors, len(files), *numbers)
    plan = Plan(source, outputs, only, block_bytes, tile_bytes, totals=totals)
    return replace(plan, reads=tuple(reads[file] for file in range(len(source.files))))


def block_bytes_for(source: Catalog) -> int:
    """The blocks that suit ``source``: larger ones where values are computed on their way."""
    first = (tensor.pieces[0].view for tensor in source.tensors.values() if tensor.pieces)
    return STEPPED_BLOCK_BYTES if any(view and view.steps for view in first) else BLOCK_BYTES
