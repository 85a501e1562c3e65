"""Memory-mapped files of a catalog.

Nothing is copied, and the pages are the page cache's own, which the system takes back
when it needs room. The price: where another program truncates a mapped file, touching
what is gone ends this process (SIGBUS). So files are mapped only where that was asked for.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.catalog import Catalog, StoredShard
from ..errors import NotFoundError, StorageError

Bytes = NDArray[np.uint8]


class MappedFiles:
    """The files of a catalog, mapped when first asked for.

    A mapping lives as long as somebody holds a part of it.
    """

    def __init__(
        self, catalog: Catalog, opened: Callable[[str, int], None] = lambda path, descriptor: None
    ) -> None:
        """Map files of ``catalog``; ``opened`` is called with each path and its descriptor."""
        self._opened = opened
        self._root, self._files = Path(catalog.root), catalog.files
        self._maps: dict[int, Bytes] = {}
        self._lock = threading.Lock()

    def lend(self, piece: StoredShard, offset: int, num_bytes: int) -> memoryview | None:
        """``num_bytes`` from byte ``offset`` of the file that stores ``piece``."""
        part = self.part(piece.file, offset, num_bytes)
        return part.data if part.size == num_bytes else None

    def part(self, file: int, offset: int, num_bytes: int) -> Bytes:
        """The same as an array; shorter where the file ends before."""
        with self._lock:
            if file not in self._maps:
                path = self._files[file].path
                self._maps[file] = _map(self._root / path, lambda d: self._opened(path, d))
            return self._maps[file][offset : offset + num_bytes]


def _map(path: Path, opened: Callable[[int], None]) -> Bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist (any more).") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}.") from error
    try:
        opened(descriptor)
        if not os.fstat(descriptor).st_size:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), np.uint8)
    except OSError as error:
        raise StorageError(f"{path} cannot be mapped: {error.strerror}.") from error
    finally:
        os.close(descriptor)
