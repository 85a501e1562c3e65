"""Verification: completeness, checksums, equal replicas, equality with another checkpoint.

Headers are checked when a checkpoint is opened. This module reads the data: it compares replicas
with each other, and two checkpoints of any layouts tensor by tensor, in the memory of a few blocks.
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
from ..planning.copies import TensorCopy, are_disjoint, check_covered, move_into
from ..planning.plan import remedy
from ..storage.engine import run
from ..storage.io import Sink, Source
from ..storage.readers import open_source
from ..storage.resources import Budget

_ONE = "Fetch both again, or move the wrong one away: one replica is enough."


@dataclass(frozen=True)
class Verdict:
    """The outcome of a verification.

    Attributes:
        problems: differences and damage; if this and ``unchecked`` are empty, all is well.
        unchecked: contents that are not tensors and were not checked.
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
    """Check that every tensor is complete, matches its checksums, and has equal replicas.

    A note lists files without checksums, in which flipped bits are not detected.
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
    """Check that boxes stored in several files have the same bytes in all of them.

    The source tensors of a mapped catalog are compared.
    """
    return _compare_replicas(catalog, budget, progress)[0]


def _compare_replicas(
    catalog: Catalog, budget: Budget, progress: Callable[[int], None] | None
) -> tuple[Verdict, tuple[str, ...]]:
    """Compare replicas; also return the files without a checksum. Each byte is read once."""
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
    """Check that two checkpoints of any layouts hold the same tensors, bit for bit.

    Raises:
        LayoutError: both are mapped.
    """
    if _is_mapped(other):
        if _is_mapped(catalog):
            raise LayoutError(
                f"{catalog.root} and {other.root} are both mapped. Write one of them, and compare "
                "the other with that."
            )
        catalog, other = other, catalog  # the first may be mapped, the second is read as stored
    found = [*_incomplete(catalog), *_incomplete(other), *_headers_differ(catalog, other)]
    problems, broken = [text for _, text in found], {name for name, _ in found}

    def moves() -> Iterator[TensorCopy]:
        for tensor in _in_both(catalog, other):
            if tensor.name not in broken:
                boxes: dict[Box, tuple[int, ...]] = {}
                for i, piece in enumerate(other.tensors[tensor.name].shards):  # replicas too
                    boxes[piece.box] = (*boxes.get(piece.box, ()), i)
                yield move_into(tensor, boxes)

    with open_source(catalog) as here, open_source(other) as there:
        here.check_checksums()
        there.check_checksums()
        seen = _Comparison(other, there)
        run(moves(), here, seen, budget=budget, progress=progress, ahead=moves())
    problems += seen.problems()
    notes = (*catalog.notes, *other.notes)
    return Verdict(len(catalog.tensors), seen.bytes_compared, tuple(problems), notes)


def _is_mapped(catalog: Catalog) -> bool:
    return any(p.view for t in catalog.tensors.values() for p in t.shards)


def _incomplete(catalog: Catalog) -> list[tuple[str, str]]:
    """Return the names of incomplete tensors, and the missing parts."""
    problems = []
    for tensor in catalog.tensors.values():
        try:
            check_covered(tensor)
        except CoverageError as error:
            problems.append((tensor.name, f"{error} {remedy(catalog, (tensor.name,))}"))
    return problems


def _stored(catalog: Catalog) -> Catalog:
    """Return ``catalog`` before any mapping, with tensors before any transform of their values.

    Tensors that are only transformed (an adapter is added) are stored as any others.
    """
    catalog = _origin(catalog)
    return replace(catalog, tensors={n: _as_stored(t) for n, t in catalog.tensors.items()})


def _origin(catalog: Catalog) -> Catalog:
    """Return ``catalog`` before any mapping."""
    while catalog.origin is not None:
        catalog = catalog.origin.catalog
    return catalog


def _checksums(
    catalog: Catalog, without: Sequence[str], budget: Budget
) -> tuple[list[str], list[str]]:
    """Return damage found by ``checksums.json``, or a note on files ``without`` checksums."""
    from ..storage.checksums import check_folder  # noqa: PLC0415 - only verify reads them

    stored = _origin(catalog)
    if format_of(stored.format).own_library:  # it compares its own when it reads
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


def _as_stored(tensor: Tensor) -> Tensor:
    if not any(p.view for p in tensor.shards):
        return tensor
    kinds = {p.view.dtype if p.view else tensor.dtype for p in tensor.shards}
    if len(kinds) > 1 or any(p.view and _is_strided(p.box, p.view) for p in tensor.shards):
        raise LayoutError(f"{tensor.name} is mapped. Compare its source tensors.")
    pieces = tuple(replace(p, view=None) for p in tensor.shards)
    return replace(tensor, dtype=kinds.pop(), shards=pieces)


def _is_strided(box: Box, view: View) -> bool:
    """Return whether the elements of ``box`` are not stored contiguously in its own order."""
    inner = view.dtype.unit_bytes
    for n, stride in zip(reversed(box.shape), reversed(view.strides), strict=True):
        if n != 1 and stride != inner:
            return True
        inner *= n
    return False


def _replicas(tensor: Tensor) -> TensorCopy | None:
    """Return the copy that reads boxes with several stored shards once; None if there are none.

    A box is compared with all its shards but the one that it is read from. A box that overlaps
    others may be read from any of them, so it is compared with all of its own.
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
    """Return the shard that the element ``at`` is read from: the first that holds it."""
    point = Box(at, tuple(i + 1 for i in at))
    return next(
        pieces[0]
        for box, pieces in zip(move.sources, move.pieces, strict=True)
        if box.contains(point)
    )


def _headers_differ(a: Catalog, b: Catalog) -> Iterator[tuple[str, str]]:
    """Yield the names of tensors whose headers differ, and the differences."""
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
    """Return the index in the tensor of the byte at ``offset`` of a target box."""
    box = move.targets[target].box
    index, left = [], offset // move.unit_bytes
    for n in reversed(box.shape):
        index.append(left % n)
        left //= n
    return tuple(a + i for a, i in zip(box.start, reversed(index), strict=True))
