"""Source and Sink: the two ends of the engines.

    source ── read ──► block ── write ──► sink      both are files
    source ──────── read ───────► place             the sink is memory, which is filled directly
       lend ─────── write ──────► sink              the source is memory, which is written directly

Files, mapped files and arrays are sources, and so is any store that can fill a buffer from a byte
offset. Both ends are called from several threads at a time. This module imports no NumPy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..core.catalog import StoredShard
from ..core.runtime import paused
from ..planning.bundles import Bundle
from ..planning.copies import TensorCopy
from .resources import Counts

if TYPE_CHECKING:  # NumPy, which file to file does without
    from .vectored_io import IOVec

Span = tuple[int, int, int]
"""A file's number in the catalog, the first byte, and the byte after the last."""
GAP_BYTES = 1 << 20  # fetched along with what is wanted: a request of 20 ms costs as much


@dataclass(slots=True)
class PrefetchRange:
    """Bytes of one file that will be read.

    Attributes:
        piece: names the file.
        offset: the first byte.
        num_bytes: the number of bytes.
        before: the number of bytes just before ``offset`` that will be read as well.
        ends: whether the bytes that follow will not be read; little is fetched beyond then.
        total_bytes: the size of all copies that begin before the end of the range.
    """

    piece: StoredShard
    offset: int
    num_bytes: int
    before: int = 0
    ends: bool = True
    total_bytes: int = 0


class Source(ABC):
    """The bytes of a catalog; a subclass has to define ``read`` only.

    Attributes:
        can_lend: ``lend`` may return memory, so the engine tries it before ``read``.
        can_scatter: ``read_scattered`` is defined.
        request_bytes: ``fetched`` is defined, because a read by itself waits for long; how many
            bytes it fetches by one request. 0 for other sources.
    """

    can_lend = False
    can_scatter = False
    request_bytes = 0

    @abstractmethod
    def read(self, piece: StoredShard, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of the file that stores ``piece``."""

    def read_views(self, piece: StoredShard, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views`` one after the other, from byte ``offset`` of that file."""
        for view in views:
            self.read(piece, offset, view)
            offset += len(view)

    def read_rows(self, piece: StoredShard, offsets: Sequence[int], buffer: memoryview) -> None:
        """Fill equal parts of ``buffer``, each from one of ``offsets`` of that file."""
        width = len(buffer) // max(1, len(offsets))
        for row, offset in enumerate(offsets):
            self.read(piece, offset, buffer[row * width : (row + 1) * width])

    def read_scattered(self, piece: StoredShard, offset: int, memory: IOVec) -> None:
        """Fill ``memory`` from byte ``offset`` of that file."""
        raise NotImplementedError

    def lend(self, piece: StoredShard, offset: int, num_bytes: int) -> memoryview | None:
        """Return the memory that has the bytes which ``read`` would copy, or None."""
        return None

    def is_cached(self, piece: StoredShard, offset: int) -> bool:
        """Return whether byte ``offset`` of that file can be read without waiting."""
        return True

    def prefetch(self, wanted: PrefetchRange) -> None:  # noqa: B027 - optional
        """Start fetching the bytes ``wanted``, without waiting."""

    def fetched(
        self, batches: Iterable[Sequence[Span]], window_bytes: int
    ) -> Generator[Callable[[], None]]:
        """Fetch what each of ``batches`` reads, ahead and in their order (see ``fetch``).

        At most ``window_bytes`` are held at once. Yields, for each batch once its bytes are here,
        what to call when the batch is done.
        """
        raise NotImplementedError

    @property
    def requested(self) -> tuple[int, int]:
        """The requests to a store so far, and their bytes."""
        return 0, 0

    def stop(self) -> None:  # noqa: B027 - optional
        """Wake every thread that waits in ``fetched``: the run has failed, or is complete."""

    def check_unchanged(self) -> None:  # noqa: B027 - optional
        """Check that no file changed since its header was read.

        Raises:
            FormatError: a file changed.
        """

    def check_checksums(self, only: Iterable[int] | None = None) -> tuple[str, ...]:
        """Compare the files, or those with the numbers ``only``, with their own checksums.

        Returns the paths of the files that have none.

        Raises:
            FormatError: a file is damaged.
        """
        return ()

    def close(self) -> None:  # noqa: B027 - optional
        """Close all files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close all files, and check that none changed, unless there is an error already."""
        self.close()
        if error is None:
            self.check_unchanged()


class Sink(ABC):
    """Where blocks are written; a subclass has to define ``write`` only.

    Attributes:
        is_memory: ``place`` may return memory, so the engine tries it before ``write``.
        is_in_order: a thread that is far ahead of the others has to wait or needs memory, so each
            takes one block at a time.
    """

    is_memory = False
    is_in_order = False

    @abstractmethod
    def write(self, move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        """Store ``buffer`` at byte ``offset`` of a target box of ``move``.

        Returns the number of writes, one for each rank that holds the box. Also called for bytes
        that are in the memory which ``place`` returned; nothing is left to copy then.
        """

    def write_bundle(self, bundle: Bundle, buffer: memoryview) -> int:
        """Store the tensors of ``bundle``, whose bytes are ``buffer``; return the writes."""
        raise NotImplementedError

    def place(
        self, move: TensorCopy, target: int, offset: int, num_bytes: int
    ) -> memoryview | None:
        """Return the memory where those bytes of a target box end up, or None."""
        return None

    def stop(self) -> None:  # noqa: B027 - optional
        """Wake every thread that waits for memory: the run has failed, or is complete."""


@paused()
def copy_bundle(bundle: Bundle, buffer: memoryview, source: Source, sink: Sink) -> Counts:
    """Copy ``bundle`` by way of ``buffer``, which is large enough, and return the counts."""
    data = _lent(bundle, source) if source.can_lend else None
    if data is None:
        data = buffer[: bundle.num_bytes]
        for span in bundle.reads:
            source.read(span.piece, span.offset, data[span.start : span.start + span.num_bytes])
    writes = sink.write_bundle(bundle, data)
    needed, read_bytes, reads, *_ = bundle.numbers
    return Counts(needed, read_bytes, reads, writes * needed, writes, 0)


def _lent(bundle: Bundle, source: Source) -> memoryview | None:
    """Join the bytes of ``bundle`` from lent memory; None if some are not lent."""
    views = []
    for piece, offset, _, num_bytes in bundle.reads:
        view = source.lend(piece, offset, num_bytes)
        if view is None:
            return None
        views.append(view)
    return memoryview(b"".join(views))
