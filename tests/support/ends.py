"""Sources and sinks of the engine made of functions."""

from __future__ import annotations

from typing import Any

from jaxshard.storage.io import Sink, Source


def _nothing(*_: Any) -> None:
    return None


class From(Source):
    """Reads with ``read``; lends with ``lend`` and scatters with ``scatter`` where given."""

    def __init__(self, read: Any = _nothing, lend: Any = None, scatter: Any = None) -> None:
        self.can_lend, self.can_scatter = lend is not None, scatter is not None
        self.read, self.lend, self.read_scattered = read, lend, scatter  # type: ignore[method-assign]

    def read(self, piece: Any, offset: int, buffer: memoryview) -> None: ...


class Into(Sink):
    """Writes with ``write``; places with ``place`` where given."""

    def __init__(self, write: Any = lambda *_: 1, place: Any = None) -> None:
        self.is_memory = place is not None
        self.write, self.place = write, place  # type: ignore[method-assign]

    def write(self, move: Any, target: int, offset: int, buffer: memoryview) -> int: ...  # type: ignore[empty-body]
