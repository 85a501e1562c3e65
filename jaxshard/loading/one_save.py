"""One save: hosts that share no disk load folders of the same save, or hear that they do not.

Each publishes its own folder. A host that died at that moment may still have the one of an
earlier save; together the folders would be a model that never was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..catalog import Catalog
from ..errors import CoverageError, some
from ..formats import elsewhere
from ..storage.local import LocalFolder


def save_of(catalog: Catalog) -> str:
    """Which save a host's own folder is of; empty where it is no such folder.

    Raises:
        FormatError: the file that says so is damaged.
    """
    place = Path(catalog.root) / elsewhere.NAME
    if catalog.layout is None or not place.is_file():
        return ""
    folder = LocalFolder(place)
    try:
        return elsewhere.save_of(folder)
    finally:
        folder.close()


def check_one_save(said: Sequence[str], root: str) -> None:
    """Refuse folders of different saves.

    Args:
        said: by process, what ``save_of`` gave there.
        root: the folder of this process.

    Raises:
        CoverageError: they differ.
    """
    groups: dict[str, list[int]] = {}
    for process, save in enumerate(said):
        groups.setdefault(save, []).append(process)
    if len(groups) < 2:
        return
    told = [f"processes {some(map(str, found), 4)}" for found in groups.values()]
    raise CoverageError(
        f"{root}: the hosts' folders are of {len(groups)} different saves: {'; '.join(told)}. A "
        "save was cut short while they published. Load an earlier save that all of them have, or "
        "save again."
    )
