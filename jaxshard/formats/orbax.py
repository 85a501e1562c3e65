"""Orbax checkpoints through Orbax's own library.

    _METADATA, manifest.ocdbt, d/ …    an item: a tree of arrays
    default/_METADATA …                a step of a CheckpointManager has its item in a folder

Where an array's bytes lie in the files is Orbax's to know. So a tensor here is one piece,
whose "file" is the tensor's number; whoever reads it asks ``orbax_restored`` for its elements.
"""

from __future__ import annotations

import posixpath
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from numpy.typing import NDArray

from ..core.box import Box
from ..core.catalog import Catalog, File, Model, StoredShard, Tensor, group_by_bytes
from ..core.dtypes import DType
from ..core.numpy_dtypes import held_as, pack
from ..errors import LayoutError
from . import huggingface
from .folder import ORBAX_FILES, Folder, orbax_item_folder
from .orbax_items import OrbaxItem, check

Asked = tuple[np.dtype[np.generic], Sharding]

_GROUP_BYTES = 256 << 20
_OF_ARRAYS = "array_metadatas/"  # a file for each process that saved


def read(folder: Folder, files: Mapping[str, File]) -> Catalog:
    """The catalog of the Orbax checkpoint in ``folder``, from its metadata.

    A tensor's name is the keys of its leaf, joined by dots (see ``leaf_names``). None, and empty
    dicts and lists, hold nothing and have no name.

    Raises:
        FormatError: Orbax cannot read the metadata.
    """
    inside = orbax_item_folder(list(files))
    where = str(Path(folder.root, inside))
    item = OrbaxItem(where)
    config = posixpath.join(inside, huggingface.CONFIG)
    model, notes = Model(), list[str]()
    if config in files:
        model, notes = huggingface.read_model(folder, files, config)
    tensors: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, leaf in item.leaves.items():
        kind = _kind(leaf)
        if isinstance(kind, str):
            left_out[name] = kind
            continue
        shape = tuple(leaf.shape)
        tensors[name] = Tensor(name, kind, shape, (StoredShard(len(tensors), 0, Box.whole(shape)),))
    listed = tuple(File(name, t.num_bytes) for name, t in tensors.items())
    extras = (
        tuple(f for f in files if "/" not in f and f not in (*ORBAX_FILES, huggingface.CHECKSUMS))
        if not inside
        else ()
    )
    described = [f for f in files if f.startswith(posixpath.join(inside, _OF_ARRAYS))]
    return Catalog(
        where,
        "orbax",
        listed,
        tensors,
        model=model,
        extras=extras,
        notes=tuple(notes),
        keys=item.keys(folder, [files[f] for f in sorted(described)]),
        left_out=left_out,
    )


def _kind(leaf: Any) -> DType | str:
    """The dtype of a leaf, or what it is if it is no array that there is a dtype for."""
    if not hasattr(leaf, "dtype") or getattr(leaf, "shape", None) is None:
        return (
            "a text"
            if isinstance(leaf, ocp.metadata.StringMetadata)
            else f"a {type(leaf).__name__}"
        )
    try:
        return held_as(np.dtype(leaf.dtype), tuple(leaf.shape))
    except LayoutError:
        return f"an array of {leaf.dtype}"


def load(
    catalog: Catalog, asked: Mapping[str, Asked], group_bytes: int = _GROUP_BYTES
) -> dict[str, jax.Array]:
    """The arrays ``asked`` for by name, each with its dtype and sharding.

    Orbax reads the parts that this process's devices hold, of as many tensors at a time as
    have ``group_bytes`` together; of one, if it alone has more.

    Raises:
        FormatError: Orbax cannot read them.
    """
    item, found = OrbaxItem(catalog.root), dict[str, jax.Array]()
    for names in group_by_bytes({n: catalog.tensors[n].num_bytes for n in asked}, group_bytes):
        arguments = {
            name: ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=dtype, sharding=sharding)
            if name not in catalog.keys
            else ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
            for name, (dtype, sharding) in ((n, asked[n]) for n in names)
        }
        wide = any(asked[n][0].itemsize >= 8 for n in names)
        for name, array in item.restore(arguments, wide=wide).items():
            check(name, array, catalog.tensors[name].shape, asked[name][0])
            found[name] = _placed(array, asked[name][1]) if name in catalog.keys else array
    return found


def _placed(data: NDArray[np.uint32], sharding: Sharding) -> jax.Array:
    """The data of keys, which Orbax would make keys of if it put them on devices."""
    return jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])


# --- Reading a tensor like a file

Bytes = NDArray[np.uint8]

_HELD_BYTES = 256 << 20


class OrbaxSource:
    """Reads from an Orbax checkpoint as from files. Safe to use from several threads.

    Attributes:
        held_bytes: the most that is held at a time, if no tensor alone has more. It grows
            where a tensor is wanted again that had to go: one made of several reads them in
            turns, and restoring each of them again for every block would never end.
    """

    def __init__(
        self,
        catalog: Catalog,
        held_bytes: int = _HELD_BYTES,
        unchanged: Callable[[], None] = lambda: None,
    ) -> None:
        """Read the metadata; ``unchanged`` raises if the files are not those of now any more.

        Raises:
            FormatError: Orbax cannot read it.
        """
        self.held_bytes, self._unchanged = held_bytes, unchanged
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

    def read_views(self, piece: StoredShard, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views`` one after the other, from byte ``offset`` of the tensor."""
        for view in views:
            self.read(piece, offset, view)
            offset += len(view)

    def read_rows(self, piece: StoredShard, offsets: Iterable[int], buffer: memoryview) -> None:
        """Fill equal parts of ``buffer``, each from one of ``offsets`` of the tensor."""
        starts = list(offsets)
        share = len(buffer) // max(1, len(starts))
        for number, offset in enumerate(starts):
            self.read(piece, offset, buffer[number * share : (number + 1) * share])

    def check_unchanged(self) -> None:
        """Refuse a result made of files that changed meanwhile (``FormatError``)."""
        self._unchanged()

    def check_checksums(self, only: Iterable[int] | None = None) -> tuple[str, ...]:
        """Return no paths: Orbax's files check themselves when they are read."""
        return ()

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
