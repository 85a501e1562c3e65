"""Writing: the files of a plan's outputs, filled at their final offsets by many threads.

Every file's header is known from shapes, so files are laid out first and each shard
goes straight to its place. The header itself is written when all else is there, so that
no reader takes an unfinished file for a whole one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..garbage import paused
from ..planning.bundles import Bundle
from ..planning.moves import Move
from ..planning.outputs import Entry
from ..planning.plan import Plan
from .bundling import placed
from .linux import reserve
from .local import Handles
from .parts import PartStaging
from .staging import Staging, told


class FileLayout(Protocol):
    """What a format says of one file: its bytes that are no tensor's, and each tensor's place."""

    @property
    def segments(self) -> Sequence[tuple[int, bytes]]:
        """(offset, bytes) of everything that is not tensor data."""
        ...

    @property
    def num_bytes(self) -> int:
        """The file's size."""
        ...

    def spans(self, name: str, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """(file offset, length) of bytes ``offset … offset + length`` of a tensor's data."""
        ...


LayFile = Callable[[Sequence[Entry]], FileLayout]
Seal = Callable[[Path], None]

_HELD_BYTES = 8 << 20  # the disk works while files are filled, and the fsync at the end is short


class OutputFiles:
    """The files of a plan, open for writing."""

    def __init__(
        self,
        plan: Plan,
        staging: Staging | PartStaging,
        lay_file: LayFile,
        seal: Seal | None = None,
    ) -> None:
        outputs = plan.outputs
        wanted = range(len(outputs.paths)) if plan.only is None else sorted(plan.only)
        self._paths, self._staging = outputs.paths, staging
        self._content_of = outputs.content_of
        with paused():
            self._layouts: Mapping[int, FileLayout] = {
                c: lay_file(outputs.contents[c]) for c in {outputs.content_of[r] for r in wanted}
            }
        self._handles, self._seal = Handles(staging.files, os.O_WRONLY), seal
        self._lock = threading.Lock()
        sizes = outputs.rank_bytes()
        self._left = {rank: sizes[rank] for rank in wanted}
        self._held = dict.fromkeys(wanted, 0)  # written since the disk was last told to begin
        for rank in wanted:
            self._create(rank)
        for rank in [r for r, left in self._left.items() if not left]:
            self._finish(rank)

    def write(self, move: Move, target: int, offset: int, buffer: memoryview) -> int:
        """Store part of a target box in the file of every rank that wants it."""
        return self.write_views(move, target, offset, (buffer,), len(buffer))

    def write_views(
        self, move: Move, target: int, offset: int, views: Sequence[memoryview], num_bytes: int
    ) -> int:
        """Store ``views``, which one after the other are part of a target box, likewise."""
        ranks = move.targets[target].ranks
        for rank in ranks:
            path = self._paths[rank]
            spans = self._layouts[self._content_of[rank]].spans(move.name, offset, num_bytes)
            if len(spans) == 1:
                self._handles.write_views(path, spans[0][0], views)
            else:
                joined = views[0] if len(views) == 1 else memoryview(b"".join(views))
                done = 0
                for at, length in spans:
                    self._handles.write(path, at, joined[done : done + length])
                    done += length
            self._count(rank, num_bytes)
        return len(ranks)

    def write_bundle(self, bundle: Bundle, buffer: memoryview) -> int:
        """Store small tensors in the file of every rank that wants them."""
        known: dict[int, list[tuple[int, list[memoryview]]]] = {}  # ranks share contents
        for rank in bundle.ranks:
            content = self._content_of[rank]
            if content not in known:
                known[content] = placed(bundle, self._layouts[content].spans, buffer)
            for offset, views in known[content]:
                self._handles.write_views(self._paths[rank], offset, views)
            self._count(rank, bundle.data_bytes)
        return len(bundle.ranks)

    def _count(self, rank: int, num_bytes: int) -> None:
        """Note that ``num_bytes`` more of the file of ``rank`` are written."""
        with self._lock:
            self._left[rank] -= num_bytes
            self._held[rank] += num_bytes
            is_finished = not self._left[rank]
            is_due = self._staging.durable and self._held[rank] >= _HELD_BYTES
            if is_due:
                self._held[rank] = 0
        if is_finished:
            self._finish(rank)
        elif is_due:
            self._handles.start_writing_back(self._paths[rank])

    def close(self) -> None:
        """Close all handles."""
        self._handles.close()

    def _create(self, rank: int) -> None:
        layout = self._layouts[self._content_of[rank]]
        path = self._staging.files / self._paths[rank]
        with told(f"{path} cannot be made"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                reserve(file.fileno(), layout.num_bytes)

    def _finish(self, rank: int) -> None:
        path, layout = self._paths[rank], self._layouts[self._content_of[rank]]
        for offset, data in layout.segments:
            self._handles.write(path, offset, memoryview(data))
        if self._seal:
            self._seal(self._staging.files / path)
        self._staging.finish(path, layout.num_bytes)
