"""Prefetch: reads into the page cache ahead of a load, and the thread that requests them.

A file's own readahead begins with the first read, and stops whenever all threads are busy with
memory. So one more thread, which reads nothing itself, requests the next bytes of the load in
order. It stays near, because the page cache would evict what was fetched too early, and it does
not start if the page cache already has the files.

The hint for this, ``fadvise``, makes the kernel allocate a page for every 4 KiB, which is most of
the cost of a cold load. A file's own readahead allocates pages of up to 2 MiB, larger ones each
time it was right, and continues whenever the first page of its last fetch is accessed, even by a
read that does not wait (``RWF_NOWAIT``). So a long run is accessed at a byte here and there, ahead
of the disk. ``fadvise`` follows for the bytes which that missed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from ..core.catalog import StoredShard
from ..core.ranges import byte_runs
from ..planning.copies import TensorCopy
from .io import PrefetchRange, Source

WINDOW_BYTES = 256 << 20  # ahead of the load: little for the page cache, much for any disk
_RANGES = 8  # in a window: a long run is requested in ranges
_GAP_BYTES = 4 << 10
_PROBES = 32
_SPARSE = 2  # a span of which less than one part in so many is read is not prefetched

_ADVICE_BYTES = 1 << 20  # every device tested accepts this at once; smaller hints are slower
# (bytes since the start of a run, distance of the accesses up to there): readahead begins small,
# and its first page may be a small one until the accesses are evenly spaced
_RAMP = ((64 << 10, 4 << 10), (512 << 10, 16 << 10), (8 << 20, 64 << 10))
_STEP_BYTES = 1 << 20
_READAHEADS = ("/sys/class/bdi/{}", "/sys/dev/block/{}/../queue")  # of a file system, a disk
_WINDOWS = 2  # readaheads under way when the first page of one is accessed


class PrefetchThread:
    """A thread that stays up to ``window_bytes`` ahead of the copy that was started last."""

    def __init__(
        self, moves: Sequence[TensorCopy], source: Source, *, window_bytes: int = WINDOW_BYTES
    ) -> None:
        self._moves, self._source, self._window = moves, source, window_bytes
        self._changed = threading.Condition()
        self._started_bytes, self._is_closed = 0, False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless everything is cached."""
        if _is_all_cached(self._moves, self._source):
            return
        self._thread = threading.Thread(target=self._work, name="jaxshard prefetch")
        self._thread.start()

    def reached(self, move: TensorCopy) -> None:
        """Note that the load has started ``move``; to be called for each, in order."""
        if self._thread is not None:
            with self._changed:
                self._started_bytes += _num_bytes(move)
                self._changed.notify()

    def close(self) -> None:
        """Stop the thread."""
        if self._thread is not None:
            with self._changed:
                self._is_closed = True
                self._changed.notify()
            self._thread.join()

    def _work(self) -> None:
        total_bytes = 0
        for wanted in ranges(self._moves, self._window // _RANGES):
            with self._changed:
                while not self._is_closed and total_bytes >= self._started_bytes + self._window:
                    self._changed.wait()
            if self._is_closed:
                return
            self._source.prefetch(wanted)
            total_bytes = wanted.total_bytes


def ranges(moves: Iterable[TensorCopy], range_bytes: int) -> Iterator[PrefetchRange]:
    """Yield the ranges that ``moves`` read, in order; adjacent spans of a file are joined.

    A range is complete when it has ``range_bytes``.
    """
    last: PrefetchRange | None = None
    total_bytes = 0
    for move in moves:
        total_bytes += _num_bytes(move)
        for piece, offset, num_bytes in spans(move):
            if last is not None and not _continues(last, piece, offset):
                yield last
                last = None
            if last is not None and last.num_bytes >= range_bytes:
                last.ends = False
                yield last
                last = PrefetchRange(piece, offset, 0, last.before + offset - last.offset)
            if last is None:
                last = PrefetchRange(piece, offset, 0)
            last.num_bytes = offset + num_bytes - last.offset
            last.total_bytes = total_bytes
    if last is not None:
        yield last


def _continues(last: PrefetchRange, piece: StoredShard, offset: int) -> bool:
    """Return whether ``offset`` follows ``last``, apart from padding between tensors."""
    gap = offset - last.offset - last.num_bytes
    return piece.file == last.piece.file and 0 <= gap < _GAP_BYTES


def spans(move: TensorCopy) -> Iterator[tuple[StoredShard, int, int]]:
    """Yield (piece, file offset, bytes) of the span that ``move`` reads of each source.

    Sparse spans are left out, because most of their bytes would be fetched for nothing.
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
    """Return whether a few probed bytes of all files are in the page cache."""
    some = moves[:: max(1, len(moves) // _PROBES)]
    places = (span for move in some for span in spans(move))
    return all(
        source.is_cached(piece, at)
        for piece, offset, num_bytes in places
        for at in (offset, offset + num_bytes - 1)
    )


# --- Hints to the kernel


def is_cached(descriptor: int, offset: int) -> bool:
    """Return whether the byte at ``offset`` is in the page cache; True if that is unknown."""
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return True
    return True


def begin_reading(
    descriptor: int, offset: int, num_bytes: int, *, before: int = 0, ends: bool = True
) -> None:
    """Start reading bytes into the page cache, without waiting.

    ``descriptor`` must be used for this only, because readahead follows one reader per descriptor.
    The other arguments are those of ``PrefetchRange``.
    """
    stop = offset + num_bytes
    with suppress(OSError):
        _drive_readahead(descriptor, offset, before, stop, ends=ends)
    with suppress(OSError, AttributeError):
        for at in range(offset, stop, _ADVICE_BYTES):
            length = min(_ADVICE_BYTES, stop - at)
            os.posix_fadvise(descriptor, at, length, os.POSIX_FADV_WILLNEED)


def _drive_readahead(descriptor: int, offset: int, before: int, stop: int, *, ends: bool) -> None:
    """Have the file's own readahead fetch bytes up to ``stop``, and few beyond."""
    info = os.fstat(descriptor)
    window = _window_bytes(info.st_dev)
    if window < _STEP_BYTES:
        return
    if ends and stop < info.st_size:
        stop -= _WINDOWS * window
    for at in _marks(offset, before, stop):
        is_cached(descriptor, at)  # an access that does not wait


def _marks(offset: int, before: int, stop: int) -> Iterator[int]:
    """Yield the bytes to access of a run that began ``before`` bytes ahead of ``offset``."""
    start = offset - before
    at = offset
    for until, step in _RAMP:
        end = min(start + until, stop)
        yield from range(at, end, step)
        at = max(at, end)
    yield from range(at, stop, _STEP_BYTES)


@cache
def _window_bytes(device: int) -> int:
    """Return the size of one readahead on this device; 0 if it is unknown."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for place in _READAHEADS:
        with suppress(OSError, ValueError):
            return int(Path(place.format(number), "read_ahead_kb").read_text()) << 10
    return 0
