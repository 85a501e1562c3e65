"""Orbax checkpoints, read and written through Orbax's own library.

    _METADATA, manifest.ocdbt, d/ …    an item: a tree of arrays
    default/_METADATA …                a CheckpointManager step stores its item in a folder

Only Orbax knows the byte offsets of an array. So each tensor in the catalog is one shard whose
"file" is the tensor's number; ``storage.orbax_source`` reads it. Importing this module imports
JAX.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import posixpath
import re
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from jax.tree_util import tree_flatten_with_path, tree_leaves, tree_unflatten
from numpy.typing import NDArray

from ..core.box import Box
from ..core.catalog import Catalog, File, Model, StoredShard, Tensor, group_by_bytes
from ..core.decoders import FETCH, parse_object
from ..core.dtypes import DType
from ..core.numpy_dtypes import held_as
from ..errors import FormatError, JaxshardError, LayoutError, StorageError, format_list
from . import huggingface
from .folder import ORBAX_FILES, Folder, orbax_item_folder
from .output_files import LazyArray

Target = tuple[np.dtype[np.generic], Sharding]

_GROUP_BYTES = 256 << 20
_ARRAY_METADATA = "array_metadatas/"  # one file per saving process


def read(folder: Folder, files: Mapping[str, File]) -> Catalog:
    """Read the catalog of the Orbax checkpoint in ``folder`` from its metadata.

    A tensor's name is the key path of its leaf, joined by dots (see ``leaf_names``). None, empty
    dicts and empty lists are not leaves.

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
    described = [f for f in files if f.startswith(posixpath.join(inside, _ARRAY_METADATA))]
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
    """Return the dtype of a leaf, or its description if it is not a supported array."""
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
    catalog: Catalog, asked: Mapping[str, Target], group_bytes: int = _GROUP_BYTES
) -> dict[str, jax.Array]:
    """Load arrays by name, each with its requested dtype and sharding.

    Orbax reads the shards of this process's devices. It restores tensors in groups of at most
    ``group_bytes``, or one tensor if that is larger.

    Raises:
        FormatError: Orbax cannot read them.
    """
    item, found = OrbaxItem(catalog.root), dict[str, jax.Array]()
    for names in group_by_bytes(((n, catalog.tensors[n].num_bytes) for n in asked), group_bytes):
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
    """Put the data of random keys on devices; Orbax would wrap it in keys."""
    return jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])


# --- items: reading and writing -------------------------------------------------------------------

Tree = Any

_GENERATOR = "random_key_impl"


class OrbaxItem:
    """An Orbax item; its metadata is read once for all restores.

    Attributes:
        leaves: the metadata of each leaf, by name.
    """

    def __init__(self, where: str) -> None:
        """Read the metadata of the item at ``where``.

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
                f"{where}: duplicate leaf names {format_list(twice)}, because a key contains a "
                "dot. Rename one."
            )

    def keys(self, folder: Folder, described: Sequence[File]) -> dict[str, str]:
        """Return the leaves that are random keys, with JAX's names of their generators.

        The item's metadata describes keys as plain uint32 arrays. The files ``described``, one
        per saving process, distinguish them.

        Raises:
            FormatError: a file is damaged.
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
        """Restore the leaves named in ``arguments``; other leaves are not read.

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
                    f"{self._where}: Orbax cannot read {format_list(arguments)}: "
                    f"{first_line(error)}."
                ) from error
            finally:
                reader.close()
        leaves = tree_leaves(found, is_leaf=lambda x: x is ocp.PLACEHOLDER)
        return {n: leaf for n, leaf in zip(self._names, leaves, strict=True) if n in arguments}


def write(place: Path, tree: Tree) -> None:
    """Write ``tree`` as an Orbax item at ``place``, replacing it.

    Raises:
        StorageError: Orbax cannot write it.
    """
    leaves = tree_leaves(tree)
    with quiet(), _wide(any(leaf.dtype.itemsize >= 8 for leaf in leaves)):
        saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        try:
            saver.save(place.absolute(), args=ocp.args.PyTreeSave(tree), force=True)
        except Exception as error:  # Orbax raises a bare Exception, among others
            raise StorageError(
                f"{place}: Orbax could not write it: {first_line(error)}."
            ) from error
        finally:
            saver.close()


def _generators(folder: Folder, file: File) -> Iterator[tuple[str, str | None]]:
    """Yield (array, random generator or None) of each array that ``file`` describes.

    Raises:
        FormatError: the file is damaged.
    """
    try:
        metadata = parse_object(folder.read(file.path, 0, file.num_bytes), file.path)
        for entry in metadata["array_metadatas"]:
            one = entry["array_metadata"]
            generator = (one.get("ext_metadata") or {}).get(_GENERATOR)
            yield str(one["param_name"]), None if generator is None else str(generator)
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{file.path}: not metadata of Orbax arrays ({type(error).__name__}). {FETCH}"
        ) from None


def _metadata(where: str) -> Tree:
    """Return the item's tree, with the metadata of each leaf.

    Raises:
        FormatError: Orbax cannot read it.
    """
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        item = reader.metadata(Path(where).absolute()).item_metadata
    except Exception as error:  # Orbax raises a bare Exception, among others
        raise FormatError(
            f"{where}: Orbax cannot read its metadata: {first_line(error)}. Fetch it again."
        ) from error
    finally:
        reader.close()
    if item is None:
        raise FormatError(
            f"{where}: Orbax finds no arrays that match the metadata. Fetch the checkpoint again."
        )
    return item.tree


def check(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
    """Raise FormatError if an array does not match its metadata."""
    if tuple(array.shape) != shape or np.dtype(array.dtype) != dtype:
        raise FormatError(
            f"{name}: Orbax returned {array.dtype} {tuple(array.shape)} (expected {dtype} "
            f"{shape}). {FETCH}"
        )


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def first_line(error: Exception) -> str:
    """Return the first line of an Orbax error, whose messages are long."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _wide(wide: bool) -> AbstractContextManager[object]:
    """Return a context in which JAX keeps 64-bit dtypes, if ``wide``."""
    return jax.enable_x64(True) if wide else nullcontext()


# --- writing for Orbax, one tensor at a time: for models that do not fit in memory ----------------


class _Handler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
    """Writes arrays one at a time; each is read just before and released after its write."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(
        self, values: Sequence[LazyArray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        options = args or [ocp.SaveArgs()] * len(values)
        for value, info, option in zip(values, infos, options, strict=True):
            array = np.asarray(value.read())
            for written in await super().serialize([array], [info], [option]):
                await asyncio.to_thread(written.result)
        return []


def write_streaming(place: Path, tensors: Mapping[str, LazyArray]) -> None:
    """Write ``tensors`` one at a time as a flat Orbax item at ``place``, replacing it.

    Raises:
        StorageError: Orbax cannot write it.
        JaxshardError: raised by a tensor's ``read``.
    """
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, _Handler()))
    with quiet():
        saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))
        try:
            saver.save(place.absolute(), args=ocp.args.PyTreeSave(dict(tensors)), force=True)
        except (OSError, ValueError) as error:
            if isinstance(error, JaxshardError):
                raise
            raise StorageError(
                f"{place}: Orbax could not write it: {first_line(error)}."
            ) from error
        finally:
            saver.close()


# --- leaf names -----------------------------------------------------------------------------------

_VALUE = "value"  # the key of a Flax variable's array

LeafPath = tuple[str, ...]


def leaf_names(paths: Sequence[LeafPath]) -> list[str]:
    """Return leaf names: key paths joined by dots, without the ``value`` of Flax variables.

    Flax NNX stores each leaf of a state under the key ``value``. If that key has siblings, or
    other leaves of the same branch lack it, it is an ordinary name.

    >>> leaf_names([("lin", "bias", "value"), ("lin", "kernel", "value")])
    ['lin.bias', 'lin.kernel']
    >>> leaf_names([("attn", "query"), ("attn", "value")])
    ['attn.query', 'attn.value']
    """
    variables = _variables(paths)
    short = [".".join(path[:-1] if path in variables else path) for path in paths]
    is_clear = len(set(short)) == len(short)
    return short if is_clear else [".".join(path) for path in paths]


def _variables(paths: Sequence[LeafPath]) -> set[LeafPath]:
    """Return the paths of leaves that are values of Flax variables."""
    ending = {path for path in paths if len(path) > 1 and path[-1] == _VALUE}
    holders = {path[:-1] for path in ending}
    others = (p[:n] for p in paths for n in range(1, len(p)) if p not in ending or n < len(p) - 1)
    if not holders.isdisjoint(others):
        return set()
    if 2 * len(ending) > len(paths):
        return ending
    branches = defaultdict[str, list[LeafPath]](list)
    for path in paths:
        branches[path[0] if path else ""].append(path)
    whole = [b for b in branches.values() if len(b) > 1 and ending.issuperset(b)]
    return {path for branch in whole for path in branch}


# --- Orbax's log records --------------------------------------------------------------------------

_ORBAX = os.path.dirname(os.path.abspath(ocp.__file__)) + os.sep
_LOGGERS = ("absl", "asyncio")
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")  # how TensorStore's errors begin
_JOIN_S = 10.0
_LATE_S = 0.1  # for late reports of TensorStore's threads


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress Orbax's own log records inside the context.

    Orbax's threads log a traceback for each exception they raise, asyncio logs exceptions that
    no coroutine awaited, and TensorStore's threads report to closed event loops. Callers get one
    error instead. Only records from Orbax's own code are dropped, at any level, and only inside
    the context: records of other libraries on the same loggers pass.
    """
    threads = set(threading.enumerate())
    _QUIET.begin()
    try:
        yield
    except BaseException as error:
        _settle(threads, error)
        raise
    finally:
        _QUIET.end()


def _settle(before: set[threading.Thread], error: BaseException | None) -> None:
    """Join the threads of an operation that failed with ``error`` and drop its frames.

    Their reports are then logged inside the operation, and suppressed.
    """
    for thread in threading.enumerate():
        if thread not in before and type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, _JOIN_S)  # its own join raises the thread's error
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):  # frames hold the tasks
            with suppress(Exception):  # a cleared coroutine may raise again
                frame.clear()
        error = error.__cause__ or error.__context__
    gc.collect()  # asyncio logs exceptions not awaited when it frees their tasks
    time.sleep(_LATE_S)


class _Quiet(logging.Filter):
    """Log filter, and hook for unraisable exceptions.

    Several threads may use it concurrently: the first installs it, the last removes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock, self._count = threading.Lock(), 0
        self._before: Callable[[Any], Any] = sys.unraisablehook
        self._hook = self._unraisable  # one object: a bound method is a new one each time

    def begin(self) -> None:
        """Install the filter and the hook for the first user."""
        with self._lock:
            self._count += 1
            if self._count == 1:
                for name in _LOGGERS:
                    logging.getLogger(name).addFilter(self)
                self._before, sys.unraisablehook = sys.unraisablehook, self._hook

    def end(self) -> None:
        """Remove them after the last user."""
        with self._lock:
            self._count -= 1
            if self._count == 0:
                for name in _LOGGERS:
                    logging.getLogger(name).removeFilter(self)
                if sys.unraisablehook is self._hook:  # otherwise another hook replaced it
                    sys.unraisablehook = self._before

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a record: True unless it is Orbax's."""
        _, error, trace = record.exc_info or (None, None, None)
        is_orbaxs = record.pathname.startswith(_ORBAX) or _ORBAX in record.getMessage()
        is_tensorstores = record.name == "asyncio" and bool(_STATUS.match(str(error)))
        return not (is_orbaxs or is_tensorstores or _is_in(trace))

    def _unraisable(self, args: Any) -> None:
        is_late = isinstance(args.exc_value, RuntimeError) and "loop is closed" in str(
            args.exc_value
        )
        if not is_late:
            self._before(args)


def _is_in(trace: TracebackType | None) -> bool:
    """Return whether an exception passed through Orbax's code."""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(_ORBAX):
            return True
        trace = trace.tb_next
    return False


_QUIET = _Quiet()
