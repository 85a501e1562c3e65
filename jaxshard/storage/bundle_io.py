"""Execution of bundles: few reads and writes for many small tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..core.catalog import StoredShard
from ..core.garbage import paused
from ..planning.bundles import Bundle
from .resources import Counts

Read = Callable[[StoredShard, int, memoryview], None]
Lend = Callable[[StoredShard, int, int], memoryview | None]
WriteBundle = Callable[[Bundle, memoryview], int]
"""``write(bundle, buffer)`` stores all of it; returns how many writes that took."""


@paused()
def carry(
    bundle: Bundle, buffer: memoryview, read: Read, write: WriteBundle, lend: Lend | None = None
) -> Counts:
    """Carry ``bundle`` by way of ``buffer``, which is large enough; the counts of it."""
    data = None if lend is None else _lent(bundle, lend)
    if data is None:
        data = buffer[: bundle.num_bytes]
        for span in bundle.reads:
            read(span.piece, span.offset, data[span.start : span.start + span.num_bytes])
    writes = write(bundle, data)
    needed, read_bytes, reads, *_ = bundle.numbers
    return Counts(needed, read_bytes, reads, writes * needed, writes, 0)


def _lent(bundle: Bundle, lend: Lend) -> memoryview | None:
    """The buffer, of what lies in memory already; None if some of it does not."""
    views = []
    for piece, offset, _, num_bytes in bundle.reads:
        view = lend(piece, offset, num_bytes)
        if view is None:
            return None
        views.append(view)
    return memoryview(b"".join(views))


def placed(
    bundle: Bundle, place_of: Callable[[str, int, int], Sequence[tuple[int, int]]], data: memoryview
) -> list[tuple[int, list[memoryview]]]:
    """The writes that store ``bundle`` in a file: an offset, and what goes there in a row.

    Args:
        bundle: the tensors, whose bytes are ``data``.
        place_of: ``place_of(name, offset, num_bytes)``: where bytes of a tensor lie in the file.
        data: the buffer of the bundle.
    """
    runs: list[tuple[int, int, int]] = []  # (file offset, start and end in the buffer)
    at, end = -1, -1
    for name, first, length in zip(bundle.names, bundle.starts, bundle.lengths, strict=True):
        start = first
        for offset, part in place_of(name, 0, length):
            if runs and offset == at and start == end:
                runs[-1] = (*runs[-1][:2], end + part)
            else:
                runs.append((offset, start, start + part))
            at, end = offset + part, start + part
            start = end
    writes: list[tuple[int, list[memoryview]]] = []
    at = -1
    for offset, start, end in sorted(runs):
        if offset != at:
            writes.append((offset, []))
        writes[-1][1].append(data[start:end])
        at = offset + end - start
    return writes
