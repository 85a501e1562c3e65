"""Saving for Orbax: arrays in, Orbax's own library out, committed like every other format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

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
    """Write ``tree`` for Orbax, or ``arrays`` by name where it is no tree of dicts and lists.

    Raises:
        LayoutError: the destination exists, or an array is empty.
        StorageError: the disk is full or refuses.
    """
    refuse_empty({name: tuple(array.shape) for name, array in arrays.items()})
    from ..formats import orbax  # noqa: PLC0415 - a second to import, and seldom wanted

    as_it_is = _is_plain(tree) and len(jax.tree_util.tree_leaves(tree)) == len(arrays)

    def write(files: Path, staging: Staging) -> Counts:
        orbax.write(files, tree if as_it_is else dict(arrays))
        for path in sorted(files.rglob("*")):
            if path.is_file():
                staging.sync(path)
        return Counts(bytes_written=sum(array.nbytes for array in arrays.values()))

    return publish(
        destination, write, side_files={}, carried=carried, overwrite=overwrite, durable=durable
    )


def _is_plain(tree: Any) -> bool:
    if isinstance(tree, dict):
        return all(isinstance(key, str) and _is_plain(value) for key, value in tree.items())
    if isinstance(tree, list | tuple):
        return all(map(_is_plain, tree))
    return jax.tree_util.all_leaves([tree])
