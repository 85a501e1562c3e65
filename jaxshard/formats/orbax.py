"""Orbax checkpoints through Orbax's own library.

    _METADATA, manifest.ocdbt, d/ …    an item: a tree of arrays
    default/_METADATA …                a step of a CheckpointManager has its item in a folder

Where an array's bytes lie in the files is Orbax's to know. So a tensor here is one piece,
whose "file" is the tensor's number; whoever reads it asks ``orbax_restored`` for its elements.
"""

from __future__ import annotations

import asyncio
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from jax.tree_util import tree_flatten_with_path, tree_leaves, tree_unflatten
from numpy.typing import NDArray

from ..core.box import Box
from ..core.catalog import Catalog, File, Model, StoredShard, Tensor, group_by_bytes
from ..core.dtypes import DType
from ..core.numpy_dtypes import held_as
from ..errors import FormatError, JaxshardError, LayoutError, StorageError, format_list
from . import huggingface
from .orbax_names import ITEM_FILES, item_folder, leaf_names
from .orbax_quiet import quiet
from .reader import Folder
from .strict_json import FETCH, parse_object

Tree = Any
Asked = tuple[np.dtype[np.generic], Sharding]

_GROUP_BYTES = 256 << 20
_OF_ARRAYS = "array_metadatas/"  # a file for each process that saved
_GENERATOR = "random_key_impl"


def read(folder: Folder, files: Mapping[str, File]) -> Catalog:
    """The catalog of the Orbax checkpoint in ``folder``, from its metadata.

    A tensor's name is the keys of its leaf, joined by dots (see ``leaf_names``). None, and empty
    dicts and lists, hold nothing and have no name.

    Raises:
        FormatError: Orbax cannot read the metadata.
    """
    inside = item_folder(list(files))
    where = str(Path(folder.root, inside))
    item = Item(where)
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
        tuple(f for f in files if "/" not in f and f not in (*ITEM_FILES, huggingface.CHECKSUMS))
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
    item, found = Item(catalog.root), dict[str, jax.Array]()
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
        self._paths = [tuple(_name((key,)) for key in path) for path, _ in paths]
        self._names = leaf_names(self._paths)
        self.leaves = {name: leaf for name, (_, leaf) in zip(self._names, paths, strict=True)}
        if len(self.leaves) < len(paths):
            twice = [name for name, times in Counter(self._names).items() if times > 1]
            raise LayoutError(
                f"{where} has two leaves called {format_list(twice)}, because a key has a dot in "
                "it. Rename one."
            )

    def keys(self, folder: Folder, described: Sequence[File]) -> dict[str, str]:
        """The leaves that are random keys, and JAX's names of their generators.

        The tree's metadata describes the data of keys; which arrays they are is in the files
        ``described`` of ``folder``, one for each process that saved.

        Raises:
            FormatError: such a file is damaged.
        """
        unsure = {
            ".".join(path): name
            for path, name in zip(self._paths, self._names, strict=True)
            if getattr(self.leaves[name], "dtype", None) == np.uint32 and self.leaves[name].shape
        }
        found = {}
        for file in described if unsure else ():
            for stored, generator in _generators(folder, file):
                if (name := unsure.pop(stored, None)) and generator:
                    found[name] = generator
            if not unsure:
                break
        return found

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
                    f"{self._where}: Orbax cannot read {format_list(arguments)}: {said(error)}."
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
    with quiet(), _wide(any(leaf.dtype.itemsize >= 8 for leaf in leaves)):
        saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        try:
            saver.save(place.absolute(), args=ocp.args.PyTreeSave(tree), force=True)
        except Exception as error:  # Orbax raises a bare Exception, among others
            raise StorageError(f"{place}: Orbax could not write it: {said(error)}.") from error
        finally:
            saver.close()


def _generators(folder: Folder, file: File) -> Iterator[tuple[str, str | None]]:
    """For each array that ``file`` describes, whose random keys it is, if any.

    Raises:
        FormatError: it is damaged.
    """
    try:
        said = parse_object(folder.read(file.path, 0, file.num_bytes), file.path)
        for entry in said["array_metadatas"]:
            one = entry["array_metadata"]
            generator = (one.get("ext_metadata") or {}).get(_GENERATOR)
            yield str(one["param_name"]), None if generator is None else str(generator)
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{file.path} does not describe Orbax's arrays ({type(error).__name__}). {FETCH}"
        ) from None


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


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def said(error: Exception) -> str:
    """The first line of what Orbax says of an error; it says a lot."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _wide(wide: bool) -> AbstractContextManager[object]:
    """Where 64-bit elements are left as they are."""
    return jax.enable_x64(True) if wide else nullcontext()


# --- Writing for Orbax, one tensor at a time: for models that do not fit in memory


@dataclass(frozen=True)
class Later:
    """An array that will be there when it is asked for.

    Attributes:
        shape: of the array.
        dtype: of its elements.
        read: gives the array; called once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    read: Callable[[], NDArray[np.generic]]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return int(np.prod(self.shape, dtype=np.int64))


class _Handler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
    """Writes arrays one after the other, each read just before and gone after."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(
        self, values: Sequence[Later], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        options = args or [ocp.SaveArgs()] * len(values)
        for value, info, option in zip(values, infos, options, strict=True):
            array = np.asarray(value.read())
            for written in await super().serialize([array], [info], [option]):
                await asyncio.to_thread(written.result)
        return []


def write_streaming(place: Path, tensors: Mapping[str, Later]) -> None:
    """Write ``tensors`` as a flat Orbax item at ``place``, which is replaced.

    Raises:
        StorageError: Orbax cannot write it.
        JaxshardError: what ``read`` raises.
    """
    registry = ocp.type_handlers.create_type_handler_registry((Later, _Handler()))
    with quiet():
        saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))
        try:
            saver.save(place.absolute(), args=ocp.args.PyTreeSave(dict(tensors)), force=True)
        except (OSError, ValueError) as error:
            if isinstance(error, JaxshardError):
                raise
            raise StorageError(f"{place}: Orbax could not write it: {said(error)}.") from error
        finally:
            saver.close()
