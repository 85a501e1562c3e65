"""Orbax items: trees of arrays, read and written through Orbax's own library.

Reads the metadata once per item, restores the requested leaves only, and streams tensors one at
a time into a new item. Log records of Orbax are suppressed meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
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
from jax.tree_util import tree_flatten_with_path, tree_leaves, tree_unflatten

from ..core.catalog import File
from ..core.decoders import FETCH, parse_object
from ..errors import FormatError, JaxshardError, LayoutError, StorageError, format_list
from .folder import Folder
from .output_files import LazyArray

Tree = Any

_GENERATOR = "random_key_impl"


class OrbaxItem:
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
                    f"{self._where}: Orbax cannot read {format_list(arguments)}: "
                    f"{first_line(error)}."
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
            raise StorageError(
                f"{place}: Orbax could not write it: {first_line(error)}."
            ) from error
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
            f"{where}: Orbax cannot read its metadata: {first_line(error)}. Fetch it again."
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


def first_line(error: Exception) -> str:
    """The first line of what Orbax says of an error; it says a lot."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _wide(wide: bool) -> AbstractContextManager[object]:
    """Where 64-bit elements are left as they are."""
    return jax.enable_x64(True) if wide else nullcontext()


# --- Writing for Orbax, one tensor at a time: for models that do not fit in memory


class _Handler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
    """Writes arrays one after the other, each read just before and gone after."""

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
    """Write ``tensors`` as a flat Orbax item at ``place``, which is replaced.

    Raises:
        StorageError: Orbax cannot write it.
        JaxshardError: what ``read`` raises.
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


# --- Leaf names

_VALUE = "value"  # where a Flax variable keeps what it holds

LeafPath = tuple[str, ...]


def leaf_names(paths: Sequence[LeafPath]) -> list[str]:
    """The names of leaves: their keys, joined by dots, without the ``value`` of Flax variables.

    A state of Flax NNX is stored with each leaf under a key of that name. Where the key has
    neighbours, or other leaves of the same branch lack it, it is a name like any other.

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
    """The leaves that are the values of Flax variables."""
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


# --- Orbax's log records

_ORBAX = os.path.dirname(os.path.abspath(ocp.__file__)) + os.sep
_LOGGERS = ("absl", "asyncio")
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")  # how TensorStore's errors begin
_JOIN_S = 10.0
_LATE_S = 0.1  # for what TensorStore's threads have still to report


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Orbax logs and prints meanwhile."""
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
    """Wait for the threads of an operation that failed with ``error``, and drop what they left.

    What they report falls into the operation then.
    """
    for thread in threading.enumerate():
        if thread not in before and type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, _JOIN_S)  # its own raises what the thread did
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):  # they hold the tasks
            with suppress(Exception):  # a coroutine that is cleared may raise once more
                frame.clear()
        error = error.__cause__ or error.__context__
    gc.collect()  # asyncio logs an exception that was not awaited when its task goes
    time.sleep(_LATE_S)


class _Quiet(logging.Filter):
    """The filter of the loggers, and the hook for what threads cannot raise.

    Several threads may be quiet at once: the first installs it, the last removes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock, self._count = threading.Lock(), 0
        self._before: Callable[[Any], Any] = sys.unraisablehook
        self._hook = self._unraisable  # one object: a bound method is a new one each time

    def begin(self) -> None:
        """Install it."""
        with self._lock:
            self._count += 1
            if self._count == 1:
                for name in _LOGGERS:
                    logging.getLogger(name).addFilter(self)
                self._before, sys.unraisablehook = sys.unraisablehook, self._hook

    def end(self) -> None:
        """Remove it, unless another thread is quiet still."""
        with self._lock:
            self._count -= 1
            if self._count == 0:
                for name in _LOGGERS:
                    logging.getLogger(name).removeFilter(self)
                if sys.unraisablehook is self._hook:  # else another hook was put over it
                    sys.unraisablehook = self._before

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged: it is not Orbax's."""
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
    """Whether an exception passed through Orbax."""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(_ORBAX):
            return True
        trace = trace.tb_next
    return False


_QUIET = _Quiet()
