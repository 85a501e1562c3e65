"""Files of a catalog as sources: read, or mapped into memory.

Mapped files are not copied: their pages are those of the page cache, which the system reclaims
when it needs memory. The price is that a mapped file must not be truncated by another program,
because an access beyond its end kills this process (SIGBUS). So files are mapped on request only.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.catalog import Catalog, StoredShard
from ..errors import LayoutError, NotFoundError, StorageError
from ..formats.registry import Orbax, format_of
from . import prefetch
from .io import PrefetchRange, Source
from .local import Handles, LocalFolder, Versions
from .places import is_remote

if TYPE_CHECKING:
    from .vectored_io import IOVec

_AHEAD_HANDLES = 8


class SourceFiles(Source):
    """The files of a catalog, opened when they are first read."""

    can_scatter = True

    def __init__(self, catalog: Catalog) -> None:
        self._files = catalog.files
        self._by_mindspore = catalog.metadata.get("format") == "ms"
        inside = [file.path for file in catalog.files if not os.path.isabs(file.path)]
        self._folder = LocalFolder(catalog.root, inside)
        self._versions = Versions(catalog.root, catalog.files)
        self._handles = Handles(Path(catalog.root), versions=self._versions)
        # a file's readahead is each descriptor's own; one file is fetched ahead at a time
        self._ahead = Handles(Path(catalog.root), most=_AHEAD_HANDLES)

    def read(self, piece: StoredShard, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of the file that stores ``piece``."""
        self._handles.read_into(self._files[piece.file].path, offset, buffer)

    def read_views(self, piece: StoredShard, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views`` one after the other, from byte ``offset`` of that file."""
        self._handles.read_views(self._files[piece.file].path, offset, views)

    def read_rows(self, piece: StoredShard, offsets: Sequence[int], buffer: memoryview) -> None:
        """Fill equal parts of ``buffer``, each from one of ``offsets`` of that file."""
        self._handles.read_rows(self._files[piece.file].path, offsets, buffer)

    def read_scattered(self, piece: StoredShard, offset: int, memory: IOVec) -> None:
        """Fill ``memory`` from byte ``offset`` of that file."""
        self._handles.read_scattered(self._files[piece.file].path, offset, memory)

    def is_cached(self, piece: StoredShard, offset: int) -> bool:
        """Return whether byte ``offset`` of that file is in the page cache, or unknown."""
        with self._handles.use(self._files[piece.file].path) as descriptor:
            return prefetch.is_cached(descriptor, offset)

    def prefetch(self, wanted: PrefetchRange) -> None:
        """Start reading the bytes ``wanted`` into the page cache, without waiting.

        Errors are left to the read that follows.
        """
        with (
            suppress(StorageError, NotFoundError),
            self._ahead.use(self._files[wanted.piece.file].path) as descriptor,
        ):
            prefetch.begin_reading(
                descriptor,
                wanted.offset,
                wanted.num_bytes,
                before=wanted.before,
                ends=wanted.ends,
            )

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
            from ..formats.weight_files import check_crc  # noqa: PLC0415 - rarely needed

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


class MappedFiles(SourceFiles):
    """The files of a catalog, mapped when they are first lent.

    A mapping exists as long as a view of it does.
    """

    can_lend = True

    def __init__(self, catalog: Catalog) -> None:
        super().__init__(catalog)
        self._maps: dict[int, memoryview] = {}
        self._lock = threading.Lock()

    def lend(self, piece: StoredShard, offset: int, num_bytes: int) -> memoryview | None:
        """Return ``num_bytes`` of that file in memory; None if it ends before."""
        with self._lock:
            if piece.file not in self._maps:
                self._maps[piece.file] = self._map(self._files[piece.file].path)
            part = self._maps[piece.file][offset : offset + num_bytes]
        return part if len(part) == num_bytes else None

    def close(self) -> None:
        """Close all files; memory that was lent stays valid."""
        super().close()
        self._maps.clear()

    def _map(self, path: str) -> memoryview:
        with self._handles.use(path) as descriptor:
            if not os.fstat(descriptor).st_size:
                return memoryview(b"")
            return memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))


def open_source(catalog: Catalog, *, mapped: bool = False) -> Source:
    """Open what reads the tensors of ``catalog``; its files are ``mapped`` on request.

    Raises:
        LayoutError: remote files are to be mapped.
    """
    if is_remote(catalog.root) or any("://" in file.path for file in catalog.files):
        from .fetch import RemoteFiles  # noqa: PLC0415 - obstore

        if mapped:
            raise LayoutError(f"{catalog.root}: remote files cannot be mapped. Leave out mmap=.")
        return RemoteFiles(catalog)
    if isinstance(format_of(catalog.format), Orbax):
        from .orbax_source import OrbaxSource  # noqa: PLC0415 - imports JAX

        return OrbaxSource(catalog)
    return MappedFiles(catalog) if mapped else SourceFiles(catalog)
