"""Verification: completeness, checksums, equal replicas, equality with another checkpoint.

What headers can tell is checked when a checkpoint is opened. This module reads the
data: replicas are compared with each other, and two checkpoints of any layouts with
one another, tensor by tensor, in the memory of a few blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core.box import Box
from ..core.catalog import Catalog, StoredShard, Tensor, View
from ..errors import CoverageError, FormatError, LayoutError, NotFoundError, format_list
from ..formats.registry import format_of
from ..planning.cells import are_disjoint
from ..planning.copies import TensorCopy, check_covered, move_into
from ..planning.plan import remedy
from ..storage.engine import run
from ..storage.io import Sink, Source
from ..storage.readers import open_source
from ..storage.resources import Budget

_ONE = "Fetch both again, or move the wrong one away: one replica is enough."


@dataclass(frozen=True)
class Verdict:
    """What was checked, and what is wrong.

    Attributes:
        problems: what is wrong; all is well if there are none and nothing is ``unchecked``.
        unchecked: what the checkpoint holds beside tensors, which was not looked at.
    """

    num_tensors: int
    bytes_compared: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


class _Comparison(Sink):
    """Compares blocks with the bytes of another source; keeps each tensor's first difference."""

    def __init__(self, catalog: Catalog, source: Source) -> None:
        """Compare with the pieces of ``catalog``, which ``source`` reads."""
        self._catalog, self._source = catalog, source
        self._found: dict[str, str] = {}
        self.bytes_compared = 0
        self._lock = threading.Lock()

    def write(self, move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        """Compare ``buffer`` with every piece that stores the same box."""
        pieces, numbers = self._catalog.tensors[move.name].shards, move.targets[target].ranks
        for piece in (pieces[number] for number in numbers):
            different = _first_difference(self._source, piece, piece.offset + offset, buffer)
            if different is not None:
                what = self._describe(move, piece, _element(move, target, offset + different))
                with self._lock:
                    self._found.setdefault(move.name, what)
        with self._lock:
            self.bytes_compared += len(buffer) * len(numbers)
        return 1

    def problems(self) -> tuple[str, ...]:
        """Return the first difference of each tensor, by name."""
        return tuple(self._found[name] for name in sorted(self._found))

    def _describe(self, move: TensorCopy, piece: StoredShard, at: tuple[int, ...]) -> str:
        path = self._catalog.files[piece.file].path
        return (
            f"{move.name}: the values differ, first at element {at} ({path} of "
            f"{self._catalog.root})."
        )


class _ReplicaComparison(_Comparison):
    def _describe(self, move: TensorCopy, piece: StoredShard, at: tuple[int, ...]) -> str:
        both = (self._catalog.files[p.file].path for p in (_read_at(move, at), piece))
        return f"{move.name} differs between {' and '.join(both)}. {_ONE}"


def verify(
    catalog: Catalog, *, budget: Budget, progress: Callable[[int], None] | None = None
) -> Verdict:
    """Check that every tensor is stored completely, its checksums, and that its replicas are equal.

    A note says where there are no checksums: flipped bits in such a file are not found.
    """
    problems = [text for _, text in _incomplete(catalog)]
    verdict, without = _compare_replicas(catalog, budget, progress)
    found, notes = _checksums(catalog, without, budget)
    return replace(
        verdict,
        num_tensors=len(catalog.tensors),
        problems=(*problems, *found, *verdict.problems),
        notes=(*verdict.notes, *notes),
        unchecked=tuple(f"{name} ({what})" for name, what in catalog.left_out.items()),
    )


def differing_replicas(
    catalog: Catalog, *, budget: Budget, progress: Callable[[int], None] | None = None
) -> Verdict:
    """Check that what is stored in several files, whole or in part, is the same in all of them.

    Of a mapped catalog, the tensors that it is made of.
    """
    return _compare_replicas(catalog, budget, progress)[0]


def _compare_replicas(
    catalog: Catalog, budget: Budget, progress: Callable[[int], None] | None
) -> tuple[Verdict, tuple[str, ...]]:
    """What differs, and the files that have no checksum of their own: their bytes are read once."""
    catalog = _stored(catalog)
    moves = [m for t in catalog.tensors.values() if (m := _replicas(t))]
    with open_source(catalog) as files:
        without = files.check_checksums()
        seen = _ReplicaComparison(catalog, files)
        run(moves, files, seen, budget=budget, progress=progress, ahead=moves)
    verdict = Verdict(len(catalog.tensors), seen.bytes_compared, seen.problems(), catalog.notes)
    return verdict, without


def verify_against(
    catalog: Catalog,
    other: Catalog,
    *,
    budget: Budget,
    progress: Callable[[int], None] | None = None,
) -> Verdict:
    """Check that two checkpoints hold the same tensors, bit for bit, whatever their layouts.

    Raises:
        LayoutError: both are mapped.
    """
    if _is_mapped(other):
        if _is_mapped(catalog):
            raise LayoutError(
                f"{catalog.root} and {other.root} are both mapped. Write one of them, and compare "
                "the other with that."
            )
        catalog, other = other, catalog  # the one that is carried may be; the other is read as is
    found = [*_incomplete(catalog), *_incomplete(other), *_headers_differ(catalog, other)]
    problems, broken = [text for _, text in found], {name for name, _ in found}
    here, there = open_source(catalog), open_source(other)
    seen = _Comparison(other, there)

    def moves() -> Iterator[TensorCopy]:
        for tensor in _in_both(catalog, other):
            if tensor.name not in broken:
                boxes: dict[Box, tuple[int, ...]] = {}
                for i, piece in enumerate(other.tensors[tensor.name].shards):  # replicas too
                    boxes[piece.box] = (*boxes.get(piece.box, ()), i)
                yield move_into(tensor, boxes)

    try:
        here.check_checksums()
        there.check_checksums()
        run(moves(), here, seen, budget=budget, progress=progress, ahead=moves())
        here.check_unchanged()
        there.check_unchanged()
    finally:
        here.close()
        there.close()
    told = (*problems, *seen.problems())
    return Verdict(len(catalog.tensors), seen.bytes_compared, told, (*catalog.notes, *other.notes))


def _is_mapped(catalog: Catalog) -> bool:
    return any(p.view for t in catalog.tensors.values() for p in t.shards)


def _incomplete(catalog: Catalog) -> list[tuple[str, str]]:
    """The names of tensors that are not all there, and what is missing."""
    problems = []
    for tensor in catalog.tensors.values():
        try:
            check_covered(tensor)
        except CoverageError as error:
            problems.append((tensor.name, f"{error} {remedy(catalog, (tensor.name,))}"))
    return problems


def _stored(catalog: Catalog) -> Catalog:
    """``catalog`` before any mapping, and its tensors before any step on their values.

    Where steps are all that happens (an adapter is added), they lie as any others do.
    """
    catalog = _origin(catalog)
    return replace(catalog, tensors={n: _as_it_lies(t) for n, t in catalog.tensors.items()})


def _origin(catalog: Catalog) -> Catalog:
    """``catalog`` before any mapping."""
    while catalog.origin is not None:
        catalog = catalog.origin.catalog
    return catalog


def _checksums(
    catalog: Catalog, without: Sequence[str], budget: Budget
) -> tuple[list[str], list[str]]:
    """What is damaged by ``checksums.json``; without one, a note on files ``without`` checksums."""
    from ..storage.checksums import check_folder  # noqa: PLC0415 - verify alone reads them

    stored = _origin(catalog)
    if format_of(stored.format).own_library:  # which compares its own whenever it reads
        return [], []
    try:
        if check_folder(stored.root, (f.path for f in stored.files), workers=budget.workers):
            return [], []
    except (FormatError, NotFoundError) as error:
        return [str(error)], []
    if not without:
        return [], []
    return [], [
        f"{len(without)} of {len(stored.files)} files have no checksums "
        f"({format_list(without, 3)}): a flipped bit in them is found only where replicas differ. "
        "Write with checksums=True (--checksums) to have them."
    ]


def _as_it_lies(tensor: Tensor) -> Tensor:
    if not any(p.view for p in tensor.shards):
        return tensor
    kinds = {p.view.dtype if p.view else tensor.dtype for p in tensor.shards}
    if len(kinds) > 1 or any(p.view and _is_turned(p.box, p.view) for p in tensor.shards):
        raise LayoutError(f"{tensor.name} is mapped; compare what it is made of.")
    pieces = tuple(replace(p, view=None) for p in tensor.shards)
    return replace(tensor, dtype=kinds.pop(), shards=pieces)


def _is_turned(box: Box, view: View) -> bool:
    """Whether the elements of ``box`` do not lie in its own order, one after the other."""
    inner = view.dtype.unit_bytes
    for n, stride in zip(reversed(box.shape), reversed(view.strides), strict=True):
        if n != 1 and stride != inner:
            return True
        inner *= n
    return False


def _replicas(tensor: Tensor) -> TensorCopy | None:
    """The journey that reads once what several pieces store; None if none do.

    A box goes to all its pieces but the one that it is read from; one that overlaps others is
    read from any of them, and so goes to all of its own.
    """
    stored: dict[Box, list[int]] = {}
    for number, piece in enumerate(tensor.shards):
        stored.setdefault(piece.box, []).append(number)
    boxes = [box for box in stored if box.size]
    overlap = set[Box]()
    if len(boxes) > 1 and not are_disjoint(boxes):
        overlap = {a for a in boxes if any(a != b and a.intersect(b) for b in boxes)}
    wanted = {
        box: tuple(numbers if box in overlap else numbers[1:])
        for box, numbers in stored.items()
        if box in overlap or len(numbers) > 1
    }
    return move_into(tensor, wanted) if wanted else None


def _read_at(move: TensorCopy, at: tuple[int, ...]) -> StoredShard:
    """The piece that the element ``at`` is read from: of those that hold it, the first."""
    point = Box(at, tuple(i + 1 for i in at))
    return next(
        pieces[0]
        for box, pieces in zip(move.sources, move.pieces, strict=True)
        if box.contains(point)
    )


def _headers_differ(a: Catalog, b: Catalog) -> Iterator[tuple[str, str]]:
    """The names of tensors that are not in both alike, and how they differ."""
    for here, there in ((a, b), (b, a)):
        for name in here.tensors:
            if name not in there.tensors:
                yield name, f"{name}: only in {here.root}."
    for name in dict.fromkeys((*a.left_out, *b.left_out)):
        what = " and ".join(
            f"{there.left_out[name]} in {there.root}" for there in (a, b) if name in there.left_out
        )
        yield name, f"{name}: {what}, and only tensors are compared."
    for tensor in _in_both(a, b):
        twin = b.tensors[tensor.name]
        if (tensor.dtype, tensor.shape) != (twin.dtype, twin.shape):
            yield (
                tensor.name,
                f"{tensor.name}: {tensor.dtype} {tensor.shape} in {a.root}, but {twin.dtype} "
                f"{twin.shape} in {b.root}.",
            )


def _in_both(a: Catalog, b: Catalog) -> Iterable[Tensor]:
    return (t for name, t in a.tensors.items() if name in b.tensors)


def _first_difference(
    files: Source, piece: StoredShard, offset: int, buffer: memoryview
) -> int | None:
    theirs = np.empty(len(buffer), np.uint8)
    files.read(piece, offset, theirs.data)
    if theirs.data == buffer:
        return None
    return int(np.flatnonzero(theirs != np.frombuffer(buffer, np.uint8))[0])


def _element(move: TensorCopy, target: int, offset: int) -> tuple[int, ...]:
    """Where in the tensor the byte at ``offset`` of a target box is."""
    box = move.targets[target].box
    index, left = [], offset // move.unit_bytes
    for n in reversed(box.shape):
        index.append(left % n)
        left //= n
    return tuple(a + i for a, i in zip(box.start, reversed(index), strict=True))
