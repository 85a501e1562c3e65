"""Orbax checkpoints, through Orbax's own library: the only module that imports it.

    _METADATA, manifest.ocdbt, d/ …    an item: a tree of arrays
    default/_METADATA …                a step of a CheckpointManager has its item in a folder

Where an array's bytes lie in the files is Orbax's to know. So a tensor here is one piece,
whose "file" is the tensor's number; whoever reads it asks `Restored` for its elements.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from jax.tree_util import tree_flatten_with_path, tree_leaves, tree_unflatten
from numpy.typing import NDArray

from ..box import Box
from ..catalog import Catalog, File, Model, Piece, Tensor
from ..elements import numpy_dtype, stored_as
from ..errors import FormatError, JaxshardError, LayoutError, StorageError, some
from . import huggingface
from .orbax_names import ITEM_FILES, item_folder

Tree = Any
Asked = tuple[np.dtype[np.generic], Sharding]


def read(root: str, files: Sequence[str]) -> Catalog:
    """The catalog of the Orbax checkpoint at ``root``, from its metadata.

    A tensor's name is the keys of its leaf, joined by dots.

    Raises:
        FormatError: Orbax cannot read the metadata.
    """
    folder = item_folder(files)
    where = str(Path(root, folder))
    leaves, notes = _leaves(where)
    tensors: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        try:
            kind = stored_as(np.dtype(leaf.dtype))
        except JaxshardError as error:
            notes.append(f"{name} is left out: {error}")
            continue
        shape = tuple(leaf.shape)
        tensors[name] = Tensor(name, kind, shape, (Piece(len(tensors), 0, Box.whole(shape)),))
    listed = tuple(File(name, t.num_bytes) for name, t in tensors.items())
    extras = tuple(f for f in files if "/" not in f and f not in ITEM_FILES) if not folder else ()
    return Catalog(
        where, "orbax", listed, tensors, model=_model(where), extras=extras, notes=tuple(notes)
    )


def load(catalog: Catalog, asked: Mapping[str, Asked]) -> dict[str, jax.Array]:
    """The arrays ``asked`` for by name, each with its dtype and sharding.

    Orbax reads the parts that this process's devices hold.

    Raises:
        FormatError: Orbax cannot read them.
    """
    arguments = {
        name: ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=dtype, sharding=sharding)
        for name, (dtype, sharding) in asked.items()
    }
    wide = any(dtype.itemsize == 8 for dtype, _ in asked.values())
    found = _restore(catalog, arguments, wide=wide)
    for name, array in found.items():
        _check(name, array, catalog.tensors[name].shape, asked[name][0])
    return found


class Restored:
    """The tensors of an Orbax checkpoint as bytes, for the engine.

    A tensor is restored whole when its first byte is asked for, and dropped once its last
    has been read. Safe to use from several threads.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._names = [file.path for file in catalog.files]
        self._locks = [threading.Lock() for _ in self._names]
        self._held: dict[int, NDArray[np.uint8]] = {}
        self._left: dict[int, int] = {}

    def read(self, piece: Piece, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of the tensor that is ``piece``.

        Raises:
            FormatError: Orbax cannot read it.
        """
        number = piece.file
        with self._locks[number]:
            if number not in self._held:
                self._held[number] = self._restored(self._names[number])
                self._left[number] = self._held[number].size
            data = self._held[number]
            self._left[number] -= len(buffer)
            if self._left[number] <= 0:
                del self._held[number]
        np.frombuffer(buffer, np.uint8)[...] = data[offset : offset + len(buffer)]

    def read_views(self, piece: Piece, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views`` one after the other, from byte ``offset`` of the tensor."""
        for view in views:
            self.read(piece, offset, view)
            offset += len(view)

    def check_unchanged(self) -> None:
        """Orbax writes a checkpoint once, under a name of its own."""

    def check_checksums(self) -> None:
        """Orbax's files check themselves when they are read."""

    def close(self) -> None:
        """Let go of what is held."""
        self._held.clear()

    def _restored(self, name: str) -> NDArray[np.uint8]:
        tensor = self._catalog.tensors[name]
        wanted = numpy_dtype(tensor.dtype)
        arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=wanted)}
        array = _restore(self._catalog, arguments, wide=wanted.itemsize == 8)[name]
        _check(name, array, tensor.shape, wanted)
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write(place: Path, tree: Tree) -> None:
    """Write ``tree`` as an Orbax item at ``place``, which is replaced.

    Raises:
        StorageError: Orbax cannot write it.
    """
    leaves = tree_leaves(tree)
    with _quiet(), _wide(any(leaf.dtype.itemsize == 8 for leaf in leaves)):
        saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        try:
            saver.save(place.absolute(), args=ocp.args.PyTreeSave(tree), force=True)
        except Exception as error:  # Orbax raises a bare Exception, among others
            raise StorageError(f"{place}: Orbax could not write it: {_said(error)}.") from error
        finally:
            saver.close()


def _model(where: str) -> Model:
    """What a ``config.json`` beside the item says, if there is one that can be read."""
    try:
        config = json.loads(Path(where, huggingface.CONFIG).read_text())
    except (OSError, ValueError):
        return Model()
    return huggingface.model_of(config) if isinstance(config, dict) else Model()


def _metadata(where: str) -> Tree:
    """The tree of the item, with descriptions for leaves.

    Raises:
        FormatError: Orbax cannot read it.
    """
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        item = reader.metadata(Path(where).absolute()).item_metadata
    except Exception as error:  # Orbax raises a bare Exception, among others
        raise FormatError(
            f"{where}: Orbax cannot read its metadata: {_said(error)}. Fetch it again."
        ) from error
    finally:
        reader.close()
    if item is None:
        raise FormatError(
            f"{where}: Orbax finds no arrays for its metadata. Fetch the checkpoint again."
        )
    return item.tree


def _leaves(where: str) -> tuple[dict[str, Any], list[str]]:
    """The arrays' metadata by name; and what a person should know."""
    with _quiet():
        tree = _metadata(where)
    found, others = {}, []
    for path, leaf in tree_flatten_with_path(tree)[0]:
        name = _name(path)
        if not hasattr(leaf, "dtype") or getattr(leaf, "shape", None) is None:
            others.append(name)
        elif name in found:
            raise LayoutError(
                f"{where} has two leaves called {name}, because a key has a dot in it. Rename one."
            )
        else:
            found[name] = leaf
    note = f"{len(others)} leaves are no arrays and are left out: {some(others)}."
    return found, [note] if others else []


def _restore(
    catalog: Catalog, arguments: Mapping[str, ocp.RestoreArgs], *, wide: bool
) -> dict[str, Any]:
    """The leaves that ``arguments`` names; the others are not read."""
    with _quiet(), _wide(wide):
        paths, structure = tree_flatten_with_path(_metadata(catalog.root))
        names = [_name(path) for path, _ in paths]
        where = Path(catalog.root).absolute()
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        try:
            item = tree_unflatten(
                structure, [0 if n in arguments else ocp.PLACEHOLDER for n in names]
            )
            how = tree_unflatten(structure, [arguments.get(n, ocp.RestoreArgs()) for n in names])
            found = reader.restore(where, args=ocp.args.PyTreeRestore(item, restore_args=how))
        except Exception as error:  # Orbax raises a bare Exception of damaged data
            raise FormatError(
                f"{where}: Orbax cannot read {some(arguments)}: {_said(error)}."
            ) from error
        finally:
            reader.close()
    leaves = tree_leaves(found, is_leaf=lambda x: x is ocp.PLACEHOLDER)
    return {n: leaf for n, leaf in zip(names, leaves, strict=True) if n in arguments}


def _check(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
    if tuple(array.shape) != shape or np.dtype(array.dtype) != dtype:
        raise FormatError(
            f"{name}: Orbax returned {array.dtype} {tuple(array.shape)}, its metadata says "
            f"{dtype} {shape}."
        )


def _name(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


def _said(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _wide(wide: bool) -> AbstractContextManager[object]:
    """Where 64-bit elements are left as they are."""
    return jax.enable_x64(True) if wide else nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns of what is meant here: no sharding given, a target given per leaf."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
