"""A plan: made from headers alone, it knows its numbers before anything runs.

The run must match them, and a test counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..catalog import Catalog, Tensor
from ..errors import CoverageError
from ..garbage import paused
from .blocks import BLOCK_BYTES, STEPPED_BLOCK_BYTES, TILE_BYTES
from .bundles import Bundle, bundled, ranks_of
from .costs import Limits, tensor_cost
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
        is_bundled: whether small tensors that go the same way are carried together.
        items: what is carried, in this order: tensors, and bundles of them.
        reads: requests to each file of the source, in their order.
    """

    source: Catalog
    outputs: Outputs
    only: frozenset[int] | None = None
    block_bytes: int = BLOCK_BYTES
    tile_bytes: int = TILE_BYTES
    host_bytes: int = 0
    is_bundled: bool = False
    items: tuple[Tensor | Bundle, ...] = field(default=(), compare=False, repr=False)
    totals: Totals = field(default=Totals(), compare=False)
    reads: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the source and of the target's layout."""
        return tuple(dict.fromkeys((*self.source.notes, *self.outputs.layout.notes)))

    def moves(self) -> Iterator[Move]:
        """The journey of each tensor, those that finish the first files first."""
        for tensor in _in_order(self.source, self.outputs):
            if move := make_move(tensor, self.outputs, self.only):
                yield move

    def journeys(self) -> Iterator[Move | Bundle]:
        """The same, with bundles for the tensors that are carried together."""
        for item in self.items:
            if isinstance(item, Bundle):
                yield item
            elif move := make_move(item, self.outputs, self.only):
                yield move

    def of(self, only: frozenset[int] | None) -> Plan:
        """The same for the files ``only``."""
        made = make_plan(
            self.source,
            self.outputs,
            only=only,
            block_bytes=self.block_bytes,
            tile_bytes=self.tile_bytes,
            is_bundled=self.is_bundled,
        )
        return replace(made, host_bytes=self.host_bytes)

    def __str__(self) -> str:
        from ..picture import plan_text  # noqa: PLC0415 - which draws plans, and so imports this

        return plan_text(self)


@paused()
def make_plan(
    source: Catalog,
    outputs: Outputs,
    *,
    only: frozenset[int] | None = None,
    block_bytes: int = BLOCK_BYTES,
    tile_bytes: int = TILE_BYTES,
    is_bundled: bool = False,
) -> Plan:
    """The plan that fills ``outputs`` (of the ranks ``only``, when given) from ``source``.

    Raises:
        CoverageError: the source lacks elements of some tensors; names, numbers, and which
            ranks' files would bring them, are said.
        LayoutError: a shard would cut through a byte of a packed dtype, or a group of rows
            that belong together.
    """
    tensors = _in_order(source, outputs)
    items: tuple[Tensor | Bundle, ...] = tuple(tensors)
    if is_bundled:
        items = tuple(bundled(tensors, ranks_of(outputs, only), block_bytes))
    totals, reads = _counted(source, outputs, only, items, (block_bytes, tile_bytes))
    return Plan(
        source,
        outputs,
        only,
        block_bytes,
        tile_bytes,
        is_bundled=is_bundled,
        items=items,
        totals=totals,
        reads=reads,
    )


def _counted(
    source: Catalog,
    outputs: Outputs,
    only: frozenset[int] | None,
    items: Iterable[Tensor | Bundle],
    limits: Limits,
) -> tuple[Totals, tuple[int, ...]]:
    """The numbers of carrying ``items``, and the requests to each file of ``source``.

    Raises:
        CoverageError: the source lacks elements of some tensors.
    """
    numbers, reads = [0] * 6, Counter[int]()
    gaps: dict[str, CoverageError] = {}
    num_tensors = 0
    for item in items:
        if isinstance(item, Bundle):
            num_tensors += len(item.names)
            added: tuple[int, ...] = item.numbers
            files: Sequence[tuple[int, int]] = [(span.piece.file, 1) for span in item.reads]
        else:
            num_tensors += 1
            try:
                placed = outputs.layout.placements[item.name]
                cost = tensor_cost(item, placed, outputs, only, limits)
            except CoverageError as error:
                gaps[item.name] = error
                continue
            added, files = cost.numbers, cost.reads
        for i, n in enumerate(added):
            numbers[i] += n
        for file, n in files:
            reads[file] += n
    if gaps:
        raise gaps_error(source, gaps)
    num_files = len(outputs.paths) if only is None else len(only)
    totals = Totals(num_tensors, num_files, *numbers)
    return totals, tuple(reads[file] for file in range(len(source.files)))


def _in_order(source: Catalog, outputs: Outputs) -> list[Tensor]:
    """The tensors of ``source`` that go somewhere, those of the first files first."""
    names = outputs.layout.placements
    known = [t for t in source.tensors.values() if t.name in names]
    return sorted(known, key=lambda t: names[t.name][0].first_rank)


def block_bytes_for(source: Catalog) -> int:
    """The blocks that suit ``source``: larger ones where values are computed on their way."""
    first = (tensor.pieces[0].view for tensor in source.tensors.values() if tensor.pieces)
    return STEPPED_BLOCK_BYTES if any(view and view.steps for view in first) else BLOCK_BYTES
