"""Prefetch thread: readahead for the next tensors of a load.

A file's own readahead begins with the first read, and waits whenever all threads are busy with
memory. So one more thread, which reads nothing itself, tells the disk what will be wanted, in
the order of the load. It keeps near, or the page cache would drop what it fetched too early;
and it is not begun where the page cache has the files already.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..core.catalog import StoredShard
from ..core.ranges import byte_runs
from ..planning.copies import TensorCopy
from ..storage.io import Source

WINDOW_BYTES = 256 << 20  # how far ahead: little beside the page cache, much for any disk
_PORTIONS = 8  # in a window: what is told at once of a run of bytes that is wanted without a gap
_GAP_BYTES = 4 << 10
_PROBES = 32
_SPARSE = 2  # a span of which less than one part in so many is wanted is left to the reads


@dataclass(slots=True)
class Portion:
    """Bytes of one file that are wanted without a gap, and where they are in all that are.

    Args:
        piece: names the file.
        offset: the first byte.
        num_bytes: how many.
        before: how many just before ``offset`` are wanted as well.
        ends: whether those that follow are not wanted.
        told_bytes: of all moves that begin before the end, what they are about.
    """

    piece: StoredShard
    offset: int
    num_bytes: int
    before: int = 0
    ends: bool = True
    told_bytes: int = 0


class ReadingAhead:
    """A thread that stays up to ``window_bytes`` ahead of the move that was begun last."""

    def __init__(
        self, moves: Sequence[TensorCopy], source: Source, *, window_bytes: int = WINDOW_BYTES
    ) -> None:
        self._moves, self._source, self._window = moves, source, window_bytes
        self._changed = threading.Condition()
        self._begun_bytes, self._ended = 0, False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, if there is something to wait for."""
        if _is_all_cached(self._moves, self._source):
            return
        self._thread = threading.Thread(target=self._work, name="jaxshard prefetch")
        self._thread.start()

    def reached(self, move: TensorCopy) -> None:
        """The load has come to ``move``; all moves are told, in their order."""
        if self._thread is not None:
            with self._changed:
                self._begun_bytes += _num_bytes(move)
                self._changed.notify()

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            with self._changed:
                self._ended = True
                self._changed.notify()
            self._thread.join()

    def _work(self) -> None:
        told_bytes = 0
        for part in portions(self._moves, self._window // _PORTIONS):
            with self._changed:
                while not self._ended and told_bytes >= self._begun_bytes + self._window:
                    self._changed.wait()
            if self._ended:
                return
            self._source.prefetch(
                part.piece, part.offset, part.num_bytes, before=part.before, ends=part.ends
            )
            told_bytes = part.told_bytes


def portions(moves: Iterable[TensorCopy], portion_bytes: int) -> Iterator[Portion]:
    """What ``moves`` read, in their order; spans that follow each other in a file are joined.

    Those of a long run are joined until there are ``portion_bytes``.
    """
    last: Portion | None = None
    told_bytes = 0
    for move in moves:
        told_bytes += _num_bytes(move)
        for piece, offset, num_bytes in spans(move):
            if last is not None and not _goes_on(last, piece, offset):
                yield last
                last = None
            if last is not None and last.num_bytes >= portion_bytes:
                last.ends = False
                yield last
                last = Portion(piece, offset, 0, last.before + offset - last.offset)
            if last is None:
                last = Portion(piece, offset, 0)
            last.num_bytes = offset + num_bytes - last.offset
            last.told_bytes = told_bytes
    if last is not None:
        yield last


def _goes_on(last: Portion, piece: StoredShard, offset: int) -> bool:
    """Whether ``offset`` comes after ``last`` at once, padding between tensors not counted."""
    gap = offset - last.offset - last.num_bytes
    return piece.file == last.piece.file and 0 <= gap < _GAP_BYTES


def spans(move: TensorCopy) -> Iterator[tuple[StoredShard, int, int]]:
    """(piece, file offset, bytes) of what ``move`` reads of each source, from first to last.

    What lies scattered is left out: most of what is between would be fetched for nothing.
    """
    wanted: dict[int, list[tuple[int, int, int]]] = {}
    for cell in move.cells:
        for index, part in cell.sources[:1]:
            form, piece, stored = move.forms[index], move.pieces[index][0], move.sources[index]
            if form is None:
                runs = byte_runs(part.within(stored), stored.shape, move.unit_bytes, piece.offset)
            else:
                runs, _ = form.runs(part, stored, piece.offset)
            if runs.num_bytes:
                last = sum((n - 1) * stride for n, stride in runs.outer)
                span = (runs.offset, runs.offset + last + runs.length, runs.num_bytes)
                wanted.setdefault(index, []).append(span)
    for index, found in wanted.items():
        start, stop = min(a for a, _, _ in found), max(b for _, b, _ in found)
        if sum(n for _, _, n in found) * _SPARSE >= stop - start:
            yield move.pieces[index][0], start, stop - start


def _num_bytes(move: TensorCopy) -> int:
    return sum(target.box.size for target in move.targets) * move.unit_bytes


def _is_all_cached(moves: Sequence[TensorCopy], source: Source) -> bool:
    """By a look at a few places in all the files."""
    some = moves[:: max(1, len(moves) // _PROBES)]
    places = (span for move in some for span in spans(move))
    return all(
        source.is_cached(piece, at)
        for piece, offset, num_bytes in places
        for at in (offset, offset + num_bytes - 1)
    )
