"""Shared writing: files that several processes fill together, each with bytes of its own.

One process lays the files out; all write at final offsets and put what they wrote on
the disk. Nobody can see from one file alone that it is complete: they have to meet.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from ..outputs import Outputs
from .local import Handles
from .staging import told
from .writing import FileLayout, LayFile


class SharedFiles:
    """The files of ``outputs`` below ``folder``."""

    def __init__(self, outputs: Outputs, folder: Path, lay_file: LayFile) -> None:
        self._outputs, self._folder = outputs, folder
        self._layouts: list[FileLayout] = [lay_file(content) for content in outputs.contents]
        self._handles = Handles(folder, os.O_WRONLY)
        self._written: set[int] = set()
        self._lock = threading.Lock()

    def lay_out(self) -> None:
        """Make all files, with all that is no tensor's; one process does, before the others write.

        Raises:
            StorageError: the disk is full or refuses.
        """
        for rank, path in enumerate(self._outputs.paths):
            layout = self._layouts[self._outputs.content_of[rank]]
            place = self._folder / path
            with told(f"{place} cannot be made"):
                place.parent.mkdir(parents=True, exist_ok=True)
                with open(place, "wb") as file:
                    file.truncate(layout.num_bytes)
            for offset, data in layout.segments:
                self._handles.write(path, offset, memoryview(data))
            self._written.add(rank)

    def write(self, rank: int, name: str, offset: int, data: memoryview) -> None:
        """Store ``data`` from byte ``offset`` of what the file of ``rank`` holds of a tensor.

        Raises:
            StorageError: the disk is full or refuses.
        """
        layout, done = self._layouts[self._outputs.content_of[rank]], 0
        for at, length in layout.spans(name, offset, len(data)):
            self._handles.write(self._outputs.paths[rank], at, data[done : done + length])
            done += length
        if rank not in self._written:
            with self._lock:
                self._written.add(rank)

    def sync(self) -> None:
        """Wait until all that this process wrote is on the disk.

        Raises:
            StorageError: the disk refuses.
        """
        for rank in sorted(self._written):
            self._handles.sync(self._outputs.paths[rank])

    def seal(self, seal: Callable[[Path], None]) -> None:
        """Finish every file; one process does, when all have written."""
        for path in self._outputs.paths:
            seal(self._folder / path)

    def close(self) -> None:
        """Close all handles."""
        self._handles.close()
