"""Orbax checkpoints, through Orbax's own library: the only module that imports it.

    _METADATA, manifest.ocdbt, d/ …    an item: a tree of arrays
    default/_METADATA …                a step of a CheckpointManager has its item in a folder

Where an array's bytes lie in the files is Orbax's to know. So a tensor here is one piece,
whose "file" is the tensor's number; whoever reads it asks ``orbax_restored`` for its elements.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from jax.tree_util import tree_flatten_with_path, tree_leaves, tree_unflatten

from ..box import Box
from ..catalog import Catalog, File, Model, Piece, Tensor
from ..elements import stored_as
from ..errors import FormatError, JaxshardError, LayoutError, StorageError, some
from ..selection import groups
from . import huggingface
from .folder import Folder
from .orbax_names import ITEM_FILES, item_folder

Tree = Any
Asked = tuple[np.dtype[np.generic], Sharding]

_GROUP_BYTES = 256 << 20


def read(folder: Folder, files: Mapping[str, File]) -> Catalog:
    """The catalog of the Orbax checkpoint in ``folder``, from its metadata.

    A tensor's name is the keys of its leaf, joined by dots.

    Raises:
        FormatError: Orbax cannot read the metadata.
    """
    item = item_folder(list(files))
    where = str(Path(folder.root, item))
    leaves, notes = _leaves(where)
    config = posixpath.join(item, huggingface.CONFIG)
    model = Model()
    if config in files:
        model, unread = huggingface.read_model(folder, files, config)
        notes += unread
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
    extras = tuple(f for f in files if "/" not in f and f not in ITEM_FILES) if not item else ()
    return Catalog(where, "orbax", listed, tensors, model=model, extras=extras, notes=tuple(notes))


def load(
    catalog: Catalog, asked: Mapping[str, Asked], group_bytes: int = _GROUP_BYTES
) -> dict[str, jax.Array]:
    """The arrays ``asked`` for by name, each with its dtype and sharding.

    Orbax reads the parts that this process's devices hold, of as many tensors at a time as
    have ``group_bytes`` together; of one, if it alone has more.

    Raises:
        FormatError: Orbax cannot read them.
    """
    item, found = Item(catalog.root), dict[str, jax.Array]()
    for names in groups({n: catalog.tensors[n].num_bytes for n in asked}, group_bytes):
        arguments = {
            name: ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=dtype, sharding=sharding)
            for name, (dtype, sharding) in ((n, asked[n]) for n in names)
        }
        wide = any(asked[n][0].itemsize == 8 for n in names)
        for name, array in item.restore(arguments, wide=wide).items():
            check(name, array, catalog.tensors[name].shape, asked[name][0])
            found[name] = array
    return found


class Item:
    """An Orbax item, whose metadata is read once for all that is restored from it.

    Attributes:
        leaves: what the metadata says of each leaf, by name.
    """

    def __init__(self, where: str) -> None:
        """Find its leaves.

        Raises:
            FormatError: Orbax cannot read the metadata.
        """
        self._where = Path(where).absolute()
        with quiet():
            paths, self._structure = tree_flatten_with_path(_metadata(where))
        self._names = [_name(path) for path, _ in paths]
        self.leaves = {name: leaf for name, (_, leaf) in zip(self._names, paths, strict=True)}

    def restore(self, arguments: Mapping[str, ocp.RestoreArgs], *, wide: bool) -> dict[str, Any]:
        """The leaves that ``arguments`` names; the others are not read.

        Raises:
            FormatError: Orbax cannot read them.
        """
        wanted = [0 if n in arguments else ocp.PLACEHOLDER for n in self._names]
        how = [arguments.get(n, ocp.RestoreArgs()) for n in self._names]
        with quiet(), _wide(wide):
            reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
            try:
                found = reader.restore(
                    self._where,
                    args=ocp.args.PyTreeRestore(
                        tree_unflatten(self._structure, wanted),
                        restore_args=tree_unflatten(self._structure, how),
                    ),
                )
            except Exception as error:  # Orbax raises a bare Exception of damaged data
                raise FormatError(
                    f"{self._where}: Orbax cannot read {some(arguments)}: {said(error)}."
                ) from error
            finally:
                reader.close()
        leaves = tree_leaves(found, is_leaf=lambda x: x is ocp.PLACEHOLDER)
        return {n: leaf for n, leaf in zip(self._names, leaves, strict=True) if n in arguments}


def write(place: Path, tree: Tree) -> None:
    """Write ``tree`` as an Orbax item at ``place``, which is replaced.

    Raises:
        StorageError: Orbax cannot write it.
    """
    leaves = tree_leaves(tree)
    with quiet(), _wide(any(leaf.dtype.itemsize == 8 for leaf in leaves)):
        saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        try:
            saver.save(place.absolute(), args=ocp.args.PyTreeSave(tree), force=True)
        except Exception as error:  # Orbax raises a bare Exception, among others
            raise StorageError(f"{place}: Orbax could not write it: {said(error)}.") from error
        finally:
            saver.close()


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
            f"{where}: Orbax cannot read its metadata: {said(error)}. Fetch it again."
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
    with quiet():
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


def check(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
    """Refuse an array that is not what the metadata says.

    Raises:
        FormatError: with what it is.
    """
    if tuple(array.shape) != shape or np.dtype(array.dtype) != dtype:
        raise FormatError(
            f"{name}: Orbax returned {array.dtype} {tuple(array.shape)}, its metadata says "
            f"{dtype} {shape}."
        )


def _name(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


def said(error: Exception) -> str:
    """The first line of what Orbax says of an error; it says a lot."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _wide(wide: bool) -> AbstractContextManager[object]:
    """Where 64-bit elements are left as they are."""
    return jax.enable_x64(True) if wide else nullcontext()


@contextmanager
def quiet() -> Iterator[None]:
    """Orbax warns of what is meant here: no sharding given, a target given per leaf."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
