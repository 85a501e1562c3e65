"""Files of a catalog as sources: read, prefetched into the page cache, or mapped into memory.

Mapped files are not copied: their pages are those of the page cache, which the system reclaims
when it needs memory. The price is that a mapped file must not be truncated by another program,
because an access beyond its end kills this process (SIGBUS). So files are mapped on request only.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.catalog import Catalog, StoredShard
from ..core.ranges import byte_runs
from ..errors import LayoutError, NotFoundError, StorageError
from ..formats.registry import Orbax, format_of
from ..planning.copies import TensorCopy
from .io import PrefetchRange, Source
from .local import Handles, LocalFolder, Versions
from .remote import is_remote

if TYPE_CHECKING:
    from .vectored_io import IOVec

_AHEAD_HANDLES = 8


class SourceFiles(Source):
    """The files of a catalog, opened when they are first read."""

    can_scatter = True

    def __init__(self, catalog: Catalog) -> None:
        self._files = catalog.files
        self._by_mindspore = catalog.metadata.get("format") == "ms"
        inside = [file.path for file in catalog.files if not os.path.isabs(file.path)]
        self._folder = LocalFolder(catalog.root, inside)
        self._versions = Versions(catalog.root, catalog.files)
        self._handles = Handles(Path(catalog.root), versions=self._versions)
        # a file's readahead is each descriptor's own; one file is fetched ahead at a time
        self._ahead = Handles(Path(catalog.root), most=_AHEAD_HANDLES)

    def read(self, piece: StoredShard, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of the file that stores ``piece``."""
        self._handles.read_into(self._files[piece.file].path, offset, buffer)

    def read_views(self, piece: StoredShard, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views`` one after the other, from byte ``offset`` of that file."""
        self._handles.read_views(self._files[piece.file].path, offset, views)

    def read_rows(self, piece: StoredShard, offsets: Sequence[int], buffer: memoryview) -> None:
        """Fill equal parts of ``buffer``, each from one of ``offsets`` of that file."""
        self._handles.read_rows(self._files[piece.file].path, offsets, buffer)

    def read_scattered(self, piece: StoredShard, offset: int, memory: IOVec) -> None:
        """Fill ``memory`` from byte ``offset`` of that file."""
        self._handles.read_scattered(self._files[piece.file].path, offset, memory)

    def is_cached(self, piece: StoredShard, offset: int) -> bool:
        """Return whether byte ``offset`` of that file is in the page cache, or unknown."""
        with self._handles.use(self._files[piece.file].path) as descriptor:
            return is_cached(descriptor, offset)

    def prefetch(self, wanted: PrefetchRange) -> None:
        """Start reading the bytes ``wanted`` into the page cache, without waiting.

        Errors are left to the read that follows.
        """
        with (
            suppress(StorageError, NotFoundError),
            self._ahead.use(self._files[wanted.piece.file].path) as descriptor,
        ):
            begin_reading(
                descriptor,
                wanted.offset,
                wanted.num_bytes,
                before=wanted.before,
                ends=wanted.ends,
            )

    def check_unchanged(self) -> None:
        """Refuse a result made from files that changed meanwhile.

        Raises:
            FormatError: a file that was read is not in the state of when its header was read.
        """
        self._versions.check()

    def check_checksums(self, only: Iterable[int] | None = None) -> tuple[str, ...]:
        """Compare the checksums of those of MindSpore's files that have one with their bytes.

        Returns the paths of the files without one.

        Args:
            only: the numbers of the files to look at; by default all. Asked for them only if
                there is a file that could have a checksum.

        Raises:
            FormatError: a file is damaged.
        """
        able = {
            number
            for number, file in enumerate(self._files)
            if file.path.endswith(".ckpt") or self._by_mindspore
        }
        if able and only is not None:
            able &= set(only)
        having = set[int]()
        for number in sorted(able):
            from ..formats.weight_files import check_crc  # noqa: PLC0415 - rarely needed

            if check_crc(*self._at(self._files[number].path)):
                having.add(number)
        return tuple(f.path for n, f in enumerate(self._files) if n not in having)

    def _at(self, path: str) -> tuple[LocalFolder, str]:
        """The folder of a file, and its path in it; an absolute one is in another folder."""
        if os.path.isabs(path):
            return LocalFolder(path), os.path.basename(path)
        return self._folder, path

    def close(self) -> None:
        """Close all handles."""
        self._handles.close()
        self._ahead.close()


class MappedFiles(SourceFiles):
    """The files of a catalog, mapped when they are first lent.

    A mapping exists as long as a view of it does.
    """

    can_lend = True

    def __init__(self, catalog: Catalog) -> None:
        super().__init__(catalog)
        self._maps: dict[int, memoryview] = {}
        self._lock = threading.Lock()

    def lend(self, piece: StoredShard, offset: int, num_bytes: int) -> memoryview | None:
        """Return ``num_bytes`` of that file in memory; None if it ends before."""
        with self._lock:
            if piece.file not in self._maps:
                self._maps[piece.file] = self._map(self._files[piece.file].path)
            part = self._maps[piece.file][offset : offset + num_bytes]
        return part if len(part) == num_bytes else None

    def close(self) -> None:
        """Close all files; memory that was lent stays valid."""
        super().close()
        self._maps.clear()

    def _map(self, path: str) -> memoryview:
        with self._handles.use(path) as descriptor:
            if not os.fstat(descriptor).st_size:
                return memoryview(b"")
            return memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))


def open_source(catalog: Catalog, *, mapped: bool = False) -> Source:
    """Open what reads the tensors of ``catalog``; its files are ``mapped`` on request.

    Raises:
        LayoutError: remote files are to be mapped.
    """
    if is_remote(catalog.root) or any("://" in file.path for file in catalog.files):
        from .fetch import RemoteFiles  # noqa: PLC0415 - obstore

        if mapped:
            raise LayoutError(f"{catalog.root}: remote files cannot be mapped. Leave out mmap=.")
        return RemoteFiles(catalog)
    if isinstance(format_of(catalog.format), Orbax):
        from .orbax_source import OrbaxSource  # noqa: PLC0415 - imports JAX

        return OrbaxSource(catalog)
    return MappedFiles(catalog) if mapped else SourceFiles(catalog)


# --- Prefetch: reads into the page cache ahead of a load, and the thread that requests them

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
