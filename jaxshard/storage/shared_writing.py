"""Shared writing: files that several processes fill together, each with bytes of its own.

One process lays the files out; all write at final offsets and put what they wrote on
the disk. Nobody can see from one file alone that it is complete: they have to meet.

    .out.partial/files-7c01…/     the files, in a folder named by a word that the processes of
                                  one save share: who is late from an earlier save, which the
                                  others gave up, finds no folder to write into
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import LayoutError, NotFoundError, StorageError
from ..planning.outputs import Outputs
from .local import Handles
from .staging import FILES, Staging, staging_folder, told
from .writing import FileLayout, LayFile

SEEN_WITHIN_S = 60.0  # what a network file system may take to show a new folder to others


def shared_folder(destination: Path, token: str) -> Path:
    """Where the processes that share ``token`` write what becomes ``destination``."""
    return staging_folder(destination) / f"{FILES}-{token}"


def token_of(outputs: Iterable[Outputs]) -> str:
    """A word for one attempt, in which others see whether they would lay out the same files."""
    return f"{secrets.token_hex(8)}-{_digest(outputs)}"


def check_alike(token: str, outputs: Iterable[Outputs], process: int) -> None:
    """Refuse to write into files that process 0 has laid out otherwise.

    Raises:
        LayoutError: they lie otherwise.
    """
    if token.rpartition("-")[2] != _digest(outputs):
        raise LayoutError(
            f"process {process} would lay out other files than process 0 has. Give all processes "
            "arrays of the same names, shapes and dtypes in the same order, and the same options."
        )


def _digest(outputs: Iterable[Outputs]) -> str:
    digest = hashlib.sha256()
    for files in outputs:
        for content in files.contents:
            told = [(e.tensor.name, e.tensor.dtype.name, e.shape) for e in content]
            digest.update(repr(told).encode())
        digest.update(repr((files.paths, files.content_of)).encode())
    return digest.hexdigest()[:16]


def wait_for(folder: Path, within_s: float, process: int) -> None:
    """Wait until the folder that process 0 has made is seen here.

    Raises:
        StorageError: it is not: the hosts do not share that disk.
    """
    until = time.monotonic() + min(SEEN_WITHIN_S, within_s)
    while not folder.is_dir():
        if time.monotonic() > until:
            raise StorageError(
                f"process {process} does not see {folder}, which process 0 has made. Save to a "
                "disk that all hosts share, or give shared=False: each process then writes the "
                "files of its own devices to its own disk."
            )
        time.sleep(0.05)


def bring_in(staging: Staging, folder: Path) -> None:
    """Make what all wrote into ``folder`` what ``staging`` publishes."""
    with told(f"{folder} cannot be moved"):
        os.rmdir(staging.files)
        os.rename(folder, staging.files)


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
            try:
                self._handles.write(self._outputs.paths[rank], at, data[done : done + length])
            except NotFoundError:
                raise StorageError(
                    f"{self._folder} is gone: the others gave this save up before this process "
                    "had written. Save again, with a longer timeout_s if this one is slower."
                ) from None
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
        for rank, path in enumerate(self._outputs.paths):
            seal(self._folder / path)
            self._written.add(rank)

    def close(self) -> None:
        """Close all handles."""
        self._handles.close()
