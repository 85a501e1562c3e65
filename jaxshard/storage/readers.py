"""Readers of a catalog's files, and checks that these did not change."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..core.catalog import Catalog, StoredShard
from ..errors import NotFoundError, StorageError
from .local import Handles, LocalFolder
from .versions import Versions, changed_while_read

if TYPE_CHECKING:
    from .vectored_io import Places

_AHEAD_HANDLES = 8


class FolderVersions:
    """All files of a folder whose library reads them itself: they must not change meanwhile."""

    def __init__(self, root: str) -> None:
        """Take the present versions."""
        self._root, self._before = root, LocalFolder(root).files()

    def check(self) -> None:
        """Compare them with the versions of now.

        Raises:
            FormatError: a file was changed, replaced, added or removed.
        """
        now = LocalFolder(self._root).files()
        changed = [p for p in {**self._before, **now} if self._before.get(p) != now.get(p)]
        if changed:
            raise changed_while_read(self._root, changed)


class SourceFiles:
    """The files of a catalog, open for reading."""

    def __init__(self, catalog: Catalog) -> None:
        self._files = catalog.files
        self._by_mindspore = catalog.metadata.get("format") == "ms"
        inside = [file.path for file in catalog.files if not os.path.isabs(file.path)]
        self._folder = LocalFolder(catalog.root, inside)
        self._versions = Versions(catalog.root, catalog.files)
        self._handles = Handles(Path(catalog.root), opened=self._versions.opened)
        # a file's readahead is each descriptor's own; one file is fetched ahead at a time
        self._ahead = Handles(Path(catalog.root), most=_AHEAD_HANDLES)

    def read(self, piece: StoredShard, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of the file that stores ``piece``."""
        self._handles.read_into(self._files[piece.file].path, offset, buffer)

    def read_views(self, piece: StoredShard, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views`` one after the other, from byte ``offset`` of that file."""
        self._handles.read_views(self._files[piece.file].path, offset, views)

    def read_rows(self, piece: StoredShard, offsets: Iterable[int], buffer: memoryview) -> None:
        """Fill equal parts of ``buffer``, each from one of ``offsets`` of that file."""
        self._handles.read_rows(self._files[piece.file].path, list(offsets), buffer)

    def read_places(self, piece: StoredShard, offset: int, places: Places) -> None:
        """Fill ``places`` one after the other, from byte ``offset`` of that file."""
        self._handles.read_places(self._files[piece.file].path, offset, places)

    def opened(self, path: str, descriptor: int) -> None:
        """Note a descriptor of ``path`` that was opened elsewhere (errors as ``Versions``)."""
        self._versions.opened(path, descriptor)

    def is_cached(self, piece: StoredShard, offset: int) -> bool:
        """Whether byte ``offset`` of that file can be read without waiting for a disk."""
        return self._handles.is_cached(self._files[piece.file].path, offset)

    def begin_reading(
        self, piece: StoredShard, offset: int, num_bytes: int, *, before: int = 0, ends: bool = True
    ) -> None:
        """Have the disk fetch these bytes of that file; nobody waits for them.

        Whoever reads them will hear of a file that cannot be opened.

        Args:
            piece: names the file.
            offset: the first byte.
            num_bytes: how many.
            before: the bytes just before ``offset`` that were asked for likewise.
            ends: whether what follows will not be asked for.
        """
        path = self._files[piece.file].path
        with suppress(StorageError, NotFoundError):
            self._ahead.begin_reading(path, offset, num_bytes, before=before, ends=ends)

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
            from ..formats.weight_files import check_crc  # noqa: PLC0415 - seldom needed

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


# --- Sources: what reads the bytes of a catalog, whatever its format


class OpenSource(Protocol):
    """A catalog's bytes, open for reading."""

    def read(self, piece: StoredShard, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of the file that stores ``piece``."""
        ...

    def read_views(self, piece: StoredShard, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views`` one after the other, from byte ``offset`` of that file."""
        ...

    def read_rows(self, piece: StoredShard, offsets: Iterable[int], buffer: memoryview) -> None:
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
        from ..formats.orbax import OrbaxSource  # noqa: PLC0415 - a second to import

        return OrbaxSource(catalog, unchanged=FolderVersions(catalog.root).check)
    return SourceFiles(catalog)
