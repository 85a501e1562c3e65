"""Side files (config, tokenizer) copied into a result.

A checkpoint may be a stranger's, and a link in it may lead anywhere: to keys, say. So a link
is followed only to where the checkpoint's own files are: below its folder, or in a folder that
really holds one of its weight files, which is how the Hugging Face cache is made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ..core.catalog import Catalog
from ..errors import format_list
from .places import is_remote
from .transaction import told


def carried(catalog: Catalog) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The extras of ``catalog`` that are carried along, and what to say of the others."""
    if is_remote(catalog.root):  # a store has no links
        return tuple(catalog.extras), ()
    root = os.path.realpath(catalog.root)
    homes = {os.path.dirname(os.path.realpath(os.path.join(root, f.path))) for f in catalog.files}
    kept, left = list[str](), list[str]()
    for path in catalog.extras:
        real = os.path.realpath(os.path.join(root, path))
        is_own = os.path.dirname(real) in homes or real.startswith(os.path.join(root, ""))
        (kept if is_own else left).append(path)
    notes = (
        [
            f"{format_list(left)}: links to files that are not the checkpoint's own, so not "
            "carried along."
        ]
        if left
        else []
    )
    return tuple(kept), tuple(notes)


def copy_extras(
    root: str,
    extras: Iterable[str],
    into: Path,
    *,
    leave_out: Callable[[Path], bool],
    sync: Callable[[Path], None],
) -> None:
    """Copy ``extras`` of the folder ``root`` into ``into``, but those to be left out.

    Raises:
        StorageError: the disk is full or refuses.
    """
    if is_remote(root):
        from .remote import RemoteFolder  # noqa: PLC0415 - only for remote paths

        folder = RemoteFolder(root)
        found = ((path, folder.read_whole(path)) for path in extras)
        write_files(found, into, sync)
        return
    for path in extras:
        if not leave_out(Path(root, path)):
            with told(f"{into / path} cannot be written"):
                (into / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(root, path), into / path)
                sync(into / path)


def write_files(
    files: Iterable[tuple[str, bytes]], into: Path, sync: Callable[[Path], None]
) -> None:
    """Write ``files``, by path, into ``into``.

    Raises:
        StorageError: the disk is full or refuses.
    """
    for path, data in files:
        with told(f"{into / path} cannot be written"):
            (into / path).parent.mkdir(parents=True, exist_ok=True)
            (into / path).write_bytes(data)
            sync(into / path)
