"""How an Orbax checkpoint is known by the names of its files, without importing Orbax."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import FormatError, some

_METADATA = "_METADATA"

#: The files of an item that lie at its top; others there are not Orbax's.
ITEM_FILES = frozenset(
    {
        _METADATA,
        "_CHECKPOINT_METADATA",
        "_sharding",
        "_strings.json",
        "commit_success.txt",
        "checkpoint",
        "manifest.ocdbt",
        "orbax.checkpoint",
    }
)


def recognise(files: Iterable[str]) -> bool:
    """Whether these files are an Orbax item, or a folder of items."""
    return bool(_items(files))


def is_item(files: Iterable[str]) -> bool:
    """Whether these files are an item themselves, and none lies in a folder of theirs only."""
    return _METADATA in set(files)


def item_folder(files: Iterable[str]) -> str:
    """The folder of the item, relative to the checkpoint: "" where it is the item itself.

    Raises:
        FormatError: there are several items.

    >>> item_folder(["_METADATA", "d/0f"]), item_folder(["default/_METADATA", "x"])
    ('', 'default')
    """
    items = _items(files)
    if "" in items:
        return ""
    if len(items) != 1:
        raise FormatError(
            f"this Orbax checkpoint has {len(items)} items or steps ({some(items)}). Name the "
            "folder of one of them."
        )
    return items[0]


def _items(files: Iterable[str]) -> list[str]:
    """Folders with an item, at most two below: a step, and an item of it."""
    found = [f.removesuffix(_METADATA).rstrip("/") for f in files if _is_metadata(f)]
    return sorted(found)


def _is_metadata(path: str) -> bool:
    parts = path.split("/")
    return parts[-1] == _METADATA and len(parts) <= 3
