"""The reader protocol that formats use instead of opening files.

A format turns bytes into a catalog and back and opens nothing itself, so that it
can be tested in memory and used on any storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..core.catalog import File
from ..errors import FormatError, NotFoundError


class Folder(Protocol):
    """A folder of files that can be listed and read by range."""

    @property
    def root(self) -> str:
        """Where the folder is, for messages and for opening it again."""
        ...

    def files(self) -> Mapping[str, File]:
        """Every file below the folder by its relative path (``/`` between parts), sorted.

        Links to files are followed; hidden files and folders are left out.
        """
        ...

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes of the file at ``path`` from ``offset``.

        Raises:
            NotFoundError: no such file.
            FormatError: the file ends before ``offset + length``.
            StorageError: the disk refused.
        """
        ...


class MemoryFolder:
    """Files held in memory: what tests and generated files use."""

    def __init__(self, contents: Mapping[str, bytes], root: str = "memory") -> None:
        self._contents = dict(sorted(contents.items()))
        self._root = root

    @property
    def root(self) -> str:
        return self._root

    def files(self) -> Mapping[str, File]:
        return {p: File(p, len(b)) for p, b in self._contents.items()}

    def read(self, path: str, offset: int, length: int) -> bytes:
        if path not in self._contents:
            raise NotFoundError(f"{self._root} has no file {path}.")
        data = self._contents[path][offset : offset + length]
        if len(data) != length:
            raise FormatError(
                f"{path} ends at byte {len(self._contents[path])}; bytes {offset} to "
                f"{offset + length} were asked for."
            )
        return data
