"""Publishing of a save: staged, then published by one rename.

What a save leaves behind when it is cut short cannot be gone on with, because the arrays
are gone; so the next save clears it away. The leavings of a conversion are not touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jax.tree_util import DictKey, GetAttrKey, SequenceKey, keystr, tree_flatten_with_path

from ..core.catalog import Catalog
from ..errors import LayoutError, StorageError
from ..formats.output_files import Result
from ..formats.registry import Format
from ..planning.plan import make_plan
from ..storage.engine import run
from ..storage.resources import Budget, Counts
from ..storage.transaction import Staging, real_place, told
from ..storage.writers import OutputFiles
from .host_shards import Array, ArraySource

_REQUEST = '{"made from": "arrays in memory"}'


def commit(
    source: ArraySource,
    result: Result,
    destination: Path,
    carried: Catalog | None,
    budget: Budget,
    *,
    overwrite: bool,
    durable: bool,
) -> Counts:
    """Write the files of ``result`` from ``source`` and publish them as ``destination``.

    Raises:
        LayoutError: the destination exists, or an interrupted conversion lies there.
        StorageError: the disk is full or refuses.
    """
    return publish(
        destination,
        lambda files, staging: write_files(source, result, staging, budget),
        side_files={f"{path}": data for path, data in result.side_files.items()},
        carried=carried,
        extras_to=result.extras_to,
        checksums=result.checksums,
        overwrite=overwrite,
        durable=durable,
    )


def write_files(
    source: ArraySource,
    result: Result,
    staging: Staging,
    budget: Budget,
    *,
    only: frozenset[int] | None = None,
) -> Counts:
    """Write the files of ``result``, or of its ranks ``only``.

    Raises:
        StorageError: the disk is full or refuses.
    """
    outputs = result.outputs
    plan = make_plan(
        source.catalog, outputs, only=only, block_bytes=budget.block_bytes, is_bundled=True
    )
    check_room(staging.files, plan.totals.bytes_written)
    files = OutputFiles(plan, staging, result.container)
    try:
        return run(plan.journeys(), source, files, budget=budget)
    finally:
        files.close()


def publish(
    destination: Path,
    write: Callable[[Path, Staging], Counts],
    *,
    side_files: Mapping[str, bytes],
    carried: Catalog | None = None,
    extras_to: str = "",
    checksums: bool = False,
    overwrite: bool,
    durable: bool,
) -> Counts:
    """Have ``write`` fill a folder, add the other files, and give it its name.

    Raises:
        LayoutError: the destination exists, or an interrupted conversion lies there.
        StorageError: the disk is full or refuses.
    """
    destination = real_place(destination)
    staging = begin(destination, carried, overwrite=overwrite, durable=durable)
    try:
        counts = write(staging.files, staging)
        staging.publish(partial(add_files, staging, side_files, carried, extras_to, checksums))
    except BaseException:
        staging.abandon()
        raise
    return counts


def begin(destination: Path, carried: Catalog | None, *, overwrite: bool, durable: bool) -> Staging:
    """A staging for ``destination`` (a real place); what an earlier save left there is gone.

    Raises:
        LayoutError: the destination exists, or an interrupted conversion lies there.
        StorageError: the disk refuses.
    """
    if overwrite:
        _refuse_inside(destination, carried)
    return Staging(destination, _REQUEST, overwrite=overwrite, durable=durable, resumable=False)


def add_files(
    staging: Staging,
    side_files: Mapping[str, bytes],
    carried: Catalog | None,
    extras_to: str,
    checksums: bool = False,
) -> None:
    """Write the other files: those of the format go before those carried along."""
    for path in carried.extras if carried else ():
        if path in side_files or carried is None:
            continue
        place = staging.files / extras_to / path
        with told(f"{place} cannot be written"):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(carried.root) / path, place)
            staging.sync(place)
    for path, data in side_files.items():
        place = staging.files / path
        with told(f"{place} cannot be written"):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            staging.sync(place)
    if checksums:
        from ..storage.checksum_file import add_checksums  # noqa: PLC0415 - on request only

        add_checksums(staging.files / extras_to, staging.sync)


def _refuse_inside(destination: Path, carried: Catalog | None) -> None:
    """Refuse to replace the checkpoint that files are carried from."""
    if carried is None:
        return
    source = Path(carried.root).resolve()
    if source == destination or destination in source.parents:
        raise LayoutError(
            f"{destination} holds the checkpoint whose files are to be carried along. Choose "
            "another destination."
        )


def check_room(place: Path, num_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        StorageError: fewer bytes are free.
    """
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise StorageError(
            f"{place} has {free} bytes free, and the result needs {num_bytes}. Make room, or "
            "choose another disk."
        )


# --- Saving for Orbax: arrays in, Orbax's own library out, committed like every other format


def save(
    format: Format,
    tree: Any,
    arrays: Mapping[str, Array],
    destination: Path,
    carried: Catalog | None,
    *,
    overwrite: bool,
    durable: bool,
) -> Counts:
    """Write ``tree`` with the format's own library, or ``arrays`` by name if it cannot store it.

    Raises:
        LayoutError: the destination exists, or an array is empty.
        StorageError: the disk is full or refuses.
    """
    format.check_shapes({name: tuple(array.shape) for name, array in arrays.items()})
    as_it_is = _is_restorable(tree, len(arrays))

    def write(files: Path, staging: Staging) -> Counts:
        format.write_tree(files, tree if as_it_is else dict(arrays))
        for path in sorted(files.rglob("*")):
            if path.is_file():
                staging.sync(path)
        return Counts(bytes_written=sum(array.nbytes for array in arrays.values()))

    return publish(
        destination, write, side_files={}, carried=carried, overwrite=overwrite, durable=durable
    )


def _is_restorable(tree: Any, num_arrays: int) -> bool:
    """Whether Orbax can store ``tree`` as it is, and restore it into one of the same structure.

    Every leaf is an array, and the keys of all paths are texts, numbers or attributes.
    """
    leaves = tree_flatten_with_path(tree)[0]
    keys = {key for path, _ in leaves for key in path}
    names = {(type(key), keystr((key,), simple=True)) for key in keys}
    return (
        len(leaves) == num_arrays
        and all(path for path, _ in leaves)
        and all(isinstance(key, DictKey | SequenceKey | GetAttrKey) for key in keys)
        and len(names) == len(keys)
    )
