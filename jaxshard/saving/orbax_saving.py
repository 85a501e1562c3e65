"""Saving for Orbax: arrays in, Orbax's own library out, committed like every other format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.tree_util import DictKey, GetAttrKey, SequenceKey, keystr, tree_flatten_with_path

from ..catalog import Catalog
from ..storage.budget import Counts
from ..storage.staging import Staging
from ..targets.folders import refuse_empty
from .arrays import Array
from .committing import publish


def save(
    tree: Any,
    arrays: Mapping[str, Array],
    destination: Path,
    carried: Catalog | None,
    *,
    overwrite: bool,
    durable: bool,
) -> Counts:
    """Write ``tree`` for Orbax, or ``arrays`` by name where Orbax cannot have it as it is.

    Raises:
        LayoutError: the destination exists, or an array is empty.
        StorageError: the disk is full or refuses.
    """
    refuse_empty({name: tuple(array.shape) for name, array in arrays.items()})
    from ..formats import orbax  # noqa: PLC0415 - a second to import, and seldom wanted

    as_it_is = _is_restorable(tree, len(arrays))

    def write(files: Path, staging: Staging) -> Counts:
        orbax.write(files, tree if as_it_is else dict(arrays))
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
