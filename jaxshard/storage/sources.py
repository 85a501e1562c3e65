"""Sources: what reads the bytes of a catalog, whatever its format.

Most formats say where a tensor's bytes lie in a file; Orbax keeps that to itself and is
asked for the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ..catalog import Catalog, Piece
from .reading import FolderVersions, SourceFiles


class OpenSource(Protocol):
    """A catalog's bytes, open for reading."""

    def read(self, piece: Piece, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of the file that stores ``piece``."""
        ...

    def read_views(self, piece: Piece, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views`` one after the other, from byte ``offset`` of that file."""
        ...

    def read_rows(self, piece: Piece, offsets: Iterable[int], buffer: memoryview) -> None:
        """Fill equal parts of ``buffer``, each from one of ``offsets`` of that file."""
        ...

    def check_unchanged(self) -> None:
        """Refuse a result made from files that changed meanwhile (``FormatError``)."""
        ...

    def check_checksums(self, only: Iterable[int] | None = None) -> tuple[str, ...]:
        """Compare what the files, or those of ``only``, say of their bytes with them.

        Returns the paths of the files that have no checksum.

        Raises:
            FormatError: a file is damaged.
        """
        ...

    def close(self) -> None:
        """Close all handles."""
        ...


def open_source(catalog: Catalog) -> OpenSource:
    """What reads the tensors of ``catalog``."""
    if catalog.format == "orbax":
        from ..formats.orbax_restored import Restored  # noqa: PLC0415 - a second to import

        return Restored(catalog, unchanged=FolderVersions(catalog.root).check)
    return SourceFiles(catalog)
