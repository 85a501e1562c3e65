"""Bundles: small tensors that are read and written together.

A tensor of a few bytes costs as many steps as one of a megabyte. So neighbours are bundled:
adjacent tensors of a file become one read, and tensors with the same targets one write.

    stored    |abc|def|ghi|    one read
    buffer    |abcdefghi|
    wanted    |abcdefghi|      one write, or one per run if a file has another order

The bundles depend on the plan alone, so its totals are known before the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import NamedTuple

from ..core.catalog import StoredShard, Tensor
from .outputs import Outputs

SMALL_BYTES = 16 << 10  # larger tensors cost more for their bytes than for their steps
_MAX_MEMBERS = 4096  # so that several threads share the work, and progress is visible
_GAP_BYTES = 256  # gaps to read through: some formats have a header before each tensor

Ranks = tuple[int, ...]
RanksOf = Callable[[Tensor], Ranks | None]
"""The ranks whose files hold all of a tensor; None if some hold a part of it."""


class Span(NamedTuple):
    """One read: ``num_bytes`` from byte ``offset`` of the file that stores ``piece``.

    The bytes are stored in the buffer from byte ``start`` on.
    """

    piece: StoredShard
    offset: int
    start: int
    num_bytes: int


class Bundle(NamedTuple):
    """Small tensors that are copied together.

    Attributes:
        names: of the tensors.
        starts: offset of each in the buffer.
        lengths: bytes of each.
        reads: the reads that fill the buffer.
        num_bytes: bytes of the buffer, gaps between neighbours included.
        ranks: the ranks whose files hold all of them.
    """

    names: tuple[str, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    reads: tuple[Span, ...]
    num_bytes: int
    ranks: Ranks

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(self.lengths)

    @property
    def numbers(self) -> tuple[int, int, int, int, int, int]:
        """Bytes needed, bytes read, reads, bytes written, writes and copies."""
        data, ranks = self.data_bytes, len(self.ranks)
        return data, self.num_bytes, len(self.reads), data * ranks, ranks, 0


def bundled(
    tensors: Iterable[Tensor], ranks_of: RanksOf, max_bytes: int
) -> Iterator[Tensor | Bundle]:
    """Yield ``tensors``, with consecutive small whole ones replaced by bundles.

    Args:
        tensors: in the order of copying.
        ranks_of: the ranks of each.
        max_bytes: maximum bytes of a bundle.
    """
    limit = min(SMALL_BYTES, max_bytes)
    run = _Run(max_bytes, ())
    for tensor in tensors:
        size = small_bytes(tensor, limit)
        ranks = ranks_of(tensor) if size else None
        if ranks and run.add(tensor, size, ranks):
            continue
        if ranks or 0 not in tensor.shape:  # empty tensors do not end a bundle
            yield from run.ended()
            run = _Run(max_bytes, ranks or ())
        if ranks:
            run.add(tensor, size, ranks)  # an empty run accepts any tensor
        else:
            yield tensor
    yield from run.ended()


def small_bytes(tensor: Tensor, limit: int) -> int:
    """Return the bytes of a small tensor stored as one shard; 0 for any other."""
    shape = tensor.shape
    size = prod(shape) * tensor.dtype.bits >> 3
    if not 0 < size <= limit or tensor.factors is not None or not tensor.shards:
        return 0
    piece = tensor.shards[0]
    whole = piece.view is None and piece.box.stop == shape and not any(piece.box.start)
    return size if whole else 0


def ranks_of(outputs: Outputs, only: frozenset[int] | None) -> RanksOf:
    """Return a function: the ranks, of those ``only``, that hold all of a tensor."""
    placements = outputs.layout.placements
    known: dict[tuple[int, int], Ranks | None] = {}  # tensors share placements, hence by identity

    def found(tensor: Tensor) -> Ranks | None:
        placed = placements[tensor.name]
        if any(any(p.spec) or len(p.spec) > len(tensor.shape) for p in placed):
            return None
        ranks = tuple(
            rank
            for placement in placed
            for shard in placement.shards(tensor.shape)
            for rank in outputs.holders(tensor.name, placement, shard)
        )
        return ranks if only is None else tuple(r for r in ranks if r in only)

    def cached(tensor: Tensor) -> Ranks | None:
        key = id(placements[tensor.name]), len(tensor.shape)
        try:
            return known[key]
        except KeyError:
            ranks = known[key] = found(tensor)
            return ranks

    return found if outputs.kept else cached


class _Run:
    """Consecutive small tensors with the same ranks, for one bundle."""

    __slots__ = (
        "_end",
        "_file",
        "_max_bytes",
        "lengths",
        "num_bytes",
        "ranks",
        "reads",
        "starts",
        "tensors",
    )

    def __init__(self, max_bytes: int, ranks: Ranks) -> None:
        self.ranks, self._max_bytes = ranks, max_bytes
        self.tensors: list[Tensor] = []
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.reads: list[tuple[StoredShard, int]] = []  # each with its offset in the buffer
        self.num_bytes = 0
        self._file, self._end = -1, 0  # of the last read

    def add(self, tensor: Tensor, size: int, ranks: Ranks) -> bool:
        """Append ``tensor`` of ``size`` bytes if it fits and has the same ranks."""
        piece, start = tensor.shards[0], self.num_bytes
        gap = piece.offset - self._end if piece.file == self._file else -1
        follows = 0 <= gap <= _GAP_BYTES
        if follows:
            start += gap
        if (
            ranks != self.ranks
            or start + size > self._max_bytes
            or len(self.tensors) == _MAX_MEMBERS
        ):
            return False
        if not follows:
            self.reads.append((piece, start))
            self._file = piece.file
        self._end = piece.offset + size
        self.tensors.append(tensor)
        self.starts.append(start)
        self.lengths.append(size)
        self.num_bytes = start + size
        return True

    def ended(self) -> Iterator[Tensor | Bundle]:
        """Yield the bundle; a single tensor stays unbundled."""
        if len(self.tensors) < 2:
            yield from self.tensors
            return
        ends = [*(start for _, start in self.reads[1:]), self.num_bytes]
        yield Bundle(
            tuple([tensor.name for tensor in self.tensors]),
            tuple(self.starts),
            tuple(self.lengths),
            tuple(
                Span(piece, piece.offset, start, end - start)
                for (piece, start), end in zip(self.reads, ends, strict=True)
            ),
            self.num_bytes,
            self.ranks,
        )
