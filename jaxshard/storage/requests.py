"""Requests: the runs of a box, read from its file with as few requests as their gaps allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from ..catalog import Piece
from ..ranges import Runs

Bytes = NDArray[np.uint8]
Read = Callable[[Piece, int, memoryview], None]
"""``read(piece, offset, buffer)`` fills the buffer from byte ``offset`` of the piece's file."""
ReadRows = Callable[[Piece, Iterable[int], memoryview], None]
"""``rows(piece, offsets, buffer)``: as ``read``, of as many equal parts of the buffer as there are
offsets. A request for each row of a column, so what a request costs besides is what matters."""


def read_runs(
    read: Read, piece: Piece, runs: Runs, out: Bytes, rows: ReadRows | None = None
) -> None:
    """Fill ``out`` with ``runs`` of the file that stores ``piece``, one after the other."""
    requests = runs.coalesced()
    share = len(out) // max(1, len(requests))
    if rows is not None and requests.length == share and len(requests) > 1:
        rows(piece, requests.offsets(), out.data)
        return
    for i, (offset, length) in enumerate(requests):
        chunk = out[i * share : (i + 1) * share]
        if length == share:
            read(piece, offset, chunk.data)
        else:
            span = np.empty(length, np.uint8)
            read(piece, offset, span.data)
            _pick(span, runs, len(runs.outer) - len(requests.outer), chunk)


def _pick(span: Bytes, runs: Runs, inner: int, out: Bytes) -> None:
    """Copy the runs of the last ``inner`` dims out of the span that was read over them."""
    dims = runs.outer[len(runs.outer) - inner :]
    shape = (*(n for n, _ in dims), runs.length)
    strides = (*(s for _, s in dims), 1)
    view = np.lib.stride_tricks.as_strided(span, shape, strides, writeable=False)
    out.reshape(shape)[...] = view
