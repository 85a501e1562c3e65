"""Plans: all reads, copies and writes of a conversion, with their totals.

The counters of a run must equal the totals of its plan; a test compares them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from ..core.box import Box
from ..core.catalog import Catalog, StoredShard, Tensor
from ..core.dtypes import DType
from ..core.layout import Layout, Placement
from ..core.ranges import byte_runs
from ..core.runtime import cached, paused
from ..errors import CoverageError, JaxshardError, format_list, html_table, size_text
from .bundles import Bundle, bundled, ranks_of
from .copies import (
    BLOCK_BYTES,
    STEPPED_BLOCK_BYTES,
    TILE_BYTES,
    Forms,
    Steps,
    TensorCopy,
    block_steps,
    cell_blocks,
    cells,
    firsts,
    form_of,
    make_move,
    move_into,
    part_runs,
    unit_boxes,
)
from .outputs import Outputs
from .pictures import count, format_title, layout_pictures, note_lines, output_table

Limits = tuple[int, int]  # bytes of a block, and of a tile
_Numbers = tuple[int, ...]  # bytes needed, bytes read, reads, bytes written, writes, copies
_Geometry = tuple[_Numbers, tuple[int, ...]]  # those, and the reads of each source


@dataclass(frozen=True, slots=True)
class TensorCost:
    """Cost of copying one tensor."""

    numbers: _Numbers
    reads: tuple[tuple[int, int], ...]  # (file, requests to it)


def tensor_cost(
    tensor: Tensor,
    placements: tuple[Placement, ...],
    outputs: Outputs,
    only: frozenset[int] | None,
    limits: Limits,
) -> TensorCost:
    """Return the cost of copying ``tensor`` into the files of ``only``, all if None.

    Raises:
        CoverageError: elements of the tensor are not stored.
        LayoutError: a shard would split a group of elements that belong together.
    """
    read = firsts(tensor.shards)
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
        return _with_operands(TensorCost(numbers, _by_file(_all_read(read), reads)), read, limits)
    except JaxshardError as error:
        raise type(error)(f"{tensor.name}: {error}") from None


def _all_read(read: tuple[StoredShard, ...]) -> Iterator[StoredShard]:
    """Yield ``read``, and the shards of the operands that are read with their parts."""
    yield from read
    for piece in read:
        for step in piece.view.factors if piece.view else ():
            yield from firsts(step.scale.shards)


def _by_file(pieces: Iterable[StoredShard], reads: Iterable[int]) -> tuple[tuple[int, int], ...]:
    return tuple((p.file, n) for p, n in zip(pieces, reads, strict=True) if n)


def _with_operands(cost: TensorCost, pieces: Iterable[StoredShard], limits: Limits) -> TensorCost:
    """Add the reads of the small tensors that transforms need, once each."""
    views = dict.fromkeys(p.view for p in pieces if p.view and p.view.steps)
    for operand in dict.fromkeys(t for view in views for t in view.whole_operands):
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


@cached(4096)
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


@cached(4096)
def _cost(
    sources: tuple[Box, ...],
    forms: Forms,
    wanted: tuple[tuple[Box, int], ...],
    unit: int,
    limits: Limits,
) -> _Geometry:
    """Count the engine's steps: those of one block of each kind, times the number of blocks."""
    factors = [step for form in forms if form for step in form.factors]
    total = [0] * 5
    reads = [0] * (len(sources) + sum(len(step.scale.shards) for step in factors))
    for cell in cells(sources, tuple(box for box, _ in wanted)):
        parts = [part for _, part in (*cell.sources, *cell.targets)]
        grid = cell_blocks(cell, forms, unit, *limits)
        # a block may begin inside a group that shares a factor, so blocks with factors all differ
        for block, times in ((b, 1) for b in grid) if factors else grid.kinds(parts):
            steps = block_steps(cell, block, sources, forms)
            numbers = _block_cost(steps, sources, forms, wanted, unit, reads, times)
            if factors:
                added = _factor_cost(steps, sources, forms, reads, limits)
                numbers = (numbers[0] + added[0], numbers[1] + added[1], *numbers[2:])
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
    """Return bytes needed, read and written, writes and copies; add requests to ``reads``."""
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


def _factor_cost(
    steps: Steps, sources: tuple[Box, ...], forms: Forms, reads: list[int], limits: Limits
) -> tuple[int, int]:
    """Return bytes needed and read of the factors of a block; add requests to ``reads``."""
    needed = read = 0
    first, at = {}, len(sources)
    for index, form in enumerate(forms):
        first[index] = at
        at += sum(len(step.scale.shards) for step in form.factors) if form else 0
    for index, part in steps.reads:
        form, at = forms[index], first[index]
        for step in form.factors if form else ():
            box = step.part_of(part.within(sources[index]).start, part.shape)
            move = move_into(step.scale, {box: (0,)})
            wanted = ((move.targets[0].box, 1),)
            numbers, requests = _cost(move.sources, move.forms, wanted, move.unit_bytes, limits)
            needed, read = needed + numbers[0], read + numbers[1]
            for i, n in enumerate(requests, at):
                reads[i] += n
            at += len(requests)
    return needed, read


# --- Coverage: incomplete tensors, and the ranks whose files hold the missing shards

_MAX_SHARDS, _MAX_HOLDERS = 8, 4  # shards in a message, and holders of each


def gaps_error(source: Catalog, gaps: Mapping[str, CoverageError]) -> CoverageError:
    """Return the error for the incomplete tensors ``gaps`` of ``source``."""
    first, *others = gaps
    text = str(gaps[first])
    if others:
        text += f" {len(others)} more tensors are incomplete: {format_list(others, 3)}."
    return CoverageError(f"{text} {remedy(source, gaps)}")


def remedy(source: Catalog, names: Iterable[str] | None = None) -> str:
    """Return the files to fetch so that the tensors ``names`` (default: all) are complete."""
    stored = source
    while stored.origin is not None:  # a mapping's tensors have other names, the same ranks
        stored, names = stored.origin.catalog, None
    if stored.layout is None:
        return "Fetch the missing files."
    lost: dict[tuple[int, ...], None] = {}
    for name in stored.tensors if names is None else names:
        lost |= dict.fromkeys(_lost_shards(stored.tensors[name], stored.layout))
    if not lost:
        return "Fetch the missing files."
    one_of = [" or ".join(_ranks(holders)) for holders in sorted(lost)]
    more = f"; and {len(one_of) - _MAX_SHARDS} more" if len(one_of) > _MAX_SHARDS else ""
    return f"Fetch {'; '.join(one_of[:_MAX_SHARDS])}{more}."


def _lost_shards(tensor: Tensor, layout: Layout) -> list[tuple[int, ...]]:
    """Return the holders of each shard of ``tensor`` that is not stored completely."""
    stored = dict.fromkeys(p.box for p in tensor.shards)
    wanted: dict[Box, list[int]] = {}
    for placement in layout.placements.get(tensor.name, ()):
        for shard in placement.shards(tensor.shape):
            ranks = (placement.first_rank + r for r in shard.holders)
            wanted.setdefault(shard.box, []).extend(ranks)
    return [
        tuple(sorted(ranks))
        for box, ranks in wanted.items()
        if box not in stored and not _is_held(tuple(stored), box)
    ]


def _is_held(stored: tuple[Box, ...], box: Box) -> bool:
    try:
        cells(stored, (box,))
    except CoverageError:
        return False
    return True


def _ranks(holders: tuple[int, ...]) -> list[str]:
    shown = [f"rank_{rank}" for rank in holders[:_MAX_HOLDERS]]
    return shown if len(holders) <= _MAX_HOLDERS else [*shown, "…"]


# --- The plan, computed from headers alone


@dataclass(frozen=True, slots=True)
class Totals:
    """Totals of a plan. The counters of a run must equal them."""

    num_tensors: int = 0
    num_files: int = 0
    bytes_needed: int = 0  # distinct source bytes of the targets
    bytes_read: int = 0  # those, and the gaps between them
    num_reads: int = 0
    bytes_written: int = 0  # tensor bytes, headers not counted
    num_writes: int = 0
    num_copies: int = 0  # strided copies in memory
    num_requests: int = 0  # to a store, each for several reads; 0 for local files
    bytes_fetched: int = 0  # by these requests, the gaps between reads included


@dataclass(frozen=True)
class Plan:
    """Plan from ``source`` to ``outputs``; ``print`` shows it as ``jaxshard plan`` does.

    Attributes:
        only: the numbers of the output files to write; None for all.
        block_bytes, tile_bytes: size of a block, and of a transposed one.
        host_bytes: peak memory for data of a run with such blocks, on all its threads; 0 if
            not yet determined.
        is_bundled: whether small tensors with the same ranks are copied together.
        items: tensors and bundles, in the order of copying.
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
        """Findings in the source and the target's layout that are not errors."""
        return tuple(dict.fromkeys((*self.source.notes, *self.outputs.layout.notes)))

    def moves(self) -> Iterator[TensorCopy]:
        """Yield the copy of each tensor, those of the first files first."""
        for tensor in _in_order(self.source, self.outputs):
            if move := make_move(tensor, self.outputs, self.only):
                yield move

    def journeys(self) -> Iterator[TensorCopy | Bundle]:
        """Yield the copies, with bundles for tensors that are copied together."""
        for item in self.items:
            if isinstance(item, Bundle):
                yield item
            elif move := make_move(item, self.outputs, self.only):
                yield move

    def of(self, only: frozenset[int] | None) -> Plan:
        """Return the same plan for the files ``only``."""
        made = make_plan(
            self.source,
            self.outputs,
            only=only,
            block_bytes=self.block_bytes,
            tile_bytes=self.tile_bytes,
            is_bundled=self.is_bundled,
        )
        return replace(made, host_bytes=self.host_bytes)

    def __repr__(self) -> str:
        total = self.totals
        return (
            f"Plan({total.num_tensors:,} tensors to {total.num_files:,} files, "
            f"{size_text(total.bytes_read)} read, {size_text(total.bytes_written)} written)"
        )

    def _repr_html_(self) -> str:
        """Return the totals, as a table for notebooks."""
        rows = [(f.name, f"{getattr(self.totals, f.name):,}") for f in fields(self.totals)]
        return html_table(repr(self), ("", "total"), rows)

    def __str__(self) -> str:
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
    """Return the plan that fills ``outputs``, of the ranks ``only`` if given, from ``source``.

    Raises:
        CoverageError: the source lacks elements of some tensors; the message has names, numbers,
            and the ranks whose files hold them.
        LayoutError: a shard would split a byte of a packed dtype, or a group of rows.
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
    """Return the totals of ``items``, and the requests to each file of ``source``.

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
    """Return the tensors of ``source`` in ``outputs``, those of the first files first."""
    names = outputs.layout.placements
    known = [t for t in source.tensors.values() if t.name in names]
    return sorted(known, key=lambda t: names[t.name][0].first_rank)


def block_bytes_for(source: Catalog) -> int:
    """Return the block size for ``source``: larger if values are transformed."""
    first = (tensor.shards[0].view for tensor in source.tensors.values() if tensor.shards)
    return STEPPED_BLOCK_BYTES if any(view and view.steps for view in first) else BLOCK_BYTES


# --- The plan as text


def plan_text(plan: Plan) -> str:
    """Return the output of ``jaxshard plan``."""
    t = plan.totals
    over = t.bytes_read - t.bytes_needed
    lines = [
        f"{plan.source.root}: {format_title(plan.source)}",
        "",
        f"reads   {size_text(t.bytes_read)} in {count(t.num_reads, 'request')}{_most_of_one(plan)}"
        + (f", {size_text(over)} of them in gaps" if over else ""),
        *_fetches(t),
        f"writes  {size_text(t.bytes_written)} in {count(t.num_writes, 'request')} "
        f"to {count(t.num_files, 'file')}",
        f"copies  {t.num_copies:,} blocks in memory are cut or joined on the way",
        *_holds(plan),
        "",
        output_table(plan.outputs, plan.only),
    ]
    if plan.outputs.paths[0].startswith("rank_"):
        for drawn in layout_pictures(plan.source.tensors.values(), plan.outputs.layout):
            lines += ["", drawn]
    return "\n".join([*lines, *note_lines(plan.notes)])


def _fetches(totals: Totals) -> list[str]:
    if not totals.num_requests:
        return []
    size, requests = size_text(totals.bytes_fetched), count(totals.num_requests, "request")
    return [f"fetches {size} in {requests} to the store"]


def _holds(plan: Plan) -> list[str]:
    num_bytes = plan.host_bytes
    return [f"holds   {size_text(num_bytes)} of data in memory at most"] if num_bytes else []


def _most_of_one(plan: Plan) -> str:
    """Return the most requests to one file, if several files are read."""
    used = [n for n in plan.reads if n]
    return f" to {count(len(used), 'file')}, at most {max(used):,} to one" if len(used) > 1 else ""
