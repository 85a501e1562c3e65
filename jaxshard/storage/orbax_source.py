"""Byte source of Orbax tensors, which are restored on demand.

Orbax gives a tensor whole or not at all. So one is restored when its first byte is asked
for, and let go when its last has been read; if that never comes, because only a part of it
is wanted, it goes when others need the room.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import orbax.checkpoint as ocp

from ..core.catalog import Catalog, StoredShard
from ..core.numpy_dtypes import Bytes, held_as, pack
from ..formats.orbax import (
    OrbaxItem,
    check,
)
from .io import Source
from .local import FolderVersions

_HELD_BYTES = 256 << 20


class OrbaxSource(Source):
    """Reads from an Orbax checkpoint as from files. Safe to use from several threads.

    Attributes:
        held_bytes: the most that is held at a time, if no tensor alone has more. It grows
            where a tensor is wanted again that had to go: one made of several reads them in
            turns, and restoring each of them again for every block would never end.
    """

    def __init__(self, catalog: Catalog, held_bytes: int = _HELD_BYTES) -> None:
        """Read the metadata, and note the versions of the files.

        Raises:
            FormatError: Orbax cannot read it.
        """
        self.held_bytes, self._versions = held_bytes, FolderVersions(catalog.root)
        self._item, self._files = OrbaxItem(catalog.root), catalog.files
        self._locks = [threading.Lock() for _ in self._files]
        self._held: OrderedDict[int, Bytes | None] = OrderedDict()  # None: it is on its way
        self._left = [file.num_bytes for file in self._files]
        self._gone: set[int] = set()
        self._lock = threading.Lock()

    def read(self, piece: StoredShard, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of the tensor that is ``piece``.

        Raises:
            FormatError: Orbax cannot read it.
        """
        data = self._data(piece.file, len(buffer))
        np.frombuffer(buffer, np.uint8)[...] = data[offset : offset + len(buffer)]

    def check_unchanged(self) -> None:
        """Check that no file of the checkpoint changed since it was opened (``FormatError``)."""
        self._versions.check()

    def close(self) -> None:
        """Let go of what is held."""
        with self._lock:
            self._held.clear()

    def _data(self, number: int, num_bytes: int) -> Bytes:
        """All bytes of a tensor, of which ``num_bytes`` are about to be read."""
        with self._locks[number]:
            with self._lock:
                data = self._held.get(number)
                if data is not None:
                    self._held.move_to_end(number)
            if data is None:
                data = self._restore(number)
            with self._lock:
                self._left[number] -= num_bytes
                if self._left[number] <= 0:
                    self._let_go(number)
        return data

    def _restore(self, number: int) -> Bytes:
        with self._lock:
            self._make_room(number)
            self._held[number] = None
        try:
            data = self._restored(number)
        except BaseException:
            with self._lock:
                self._held.pop(number, None)
            raise
        with self._lock:
            self._held[number] = data
        return data

    def _make_room(self, number: int) -> None:
        """Let those go that were not used for longest, until there is room for one more."""
        if number in self._gone:
            self.held_bytes *= 2
        for other in [n for n, data in self._held.items() if data is not None]:
            total = sum(self._files[n].num_bytes for n in (*self._held, number))
            if total > self.held_bytes:
                self._let_go(other)

    def _let_go(self, number: int) -> None:
        self._held.pop(number, None)
        self._gone.add(number)

    def _restored(self, number: int) -> Bytes:
        name = self._files[number].path
        leaf = self._item.leaves[name]
        dtype = np.dtype(leaf.dtype)
        arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)}
        array = self._item.restore(arguments, wide=dtype.itemsize >= 8)[name]
        check(name, array, tuple(leaf.shape), dtype)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return pack(data) if held_as(dtype, array.shape).bits == 4 else data
