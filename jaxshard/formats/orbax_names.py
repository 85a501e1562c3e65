"""File and leaf names of Orbax checkpoints.

Orbax is not imported here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..errors import FormatError, format_list

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

_VALUE = "value"  # where a Flax variable keeps what it holds

Path = tuple[str, ...]


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
            f"this Orbax checkpoint has {len(items)} items or steps ({format_list(items)}). Name "
            "the folder of one of them."
        )
    return items[0]


def _items(files: Iterable[str]) -> list[str]:
    """Folders with an item, at most two below: a step, and an item of it."""
    found = [f.removesuffix(_METADATA).rstrip("/") for f in files if _is_metadata(f)]
    return sorted(found)


def _is_metadata(path: str) -> bool:
    parts = path.split("/")
    return parts[-1] == _METADATA and len(parts) <= 3


def leaf_names(paths: Sequence[Path]) -> list[str]:
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


def _variables(paths: Sequence[Path]) -> set[Path]:
    """The leaves that are the values of Flax variables."""
    ending = {path for path in paths if len(path) > 1 and path[-1] == _VALUE}
    holders = {path[:-1] for path in ending}
    others = (p[:n] for p in paths for n in range(1, len(p)) if p not in ending or n < len(p) - 1)
    if not holders.isdisjoint(others):
        return set()
    if 2 * len(ending) > len(paths):
        return ending
    branches = defaultdict[str, list[Path]](list)
    for path in paths:
        branches[path[0] if path else ""].append(path)
    whole = [b for b in branches.values() if len(b) > 1 and ending.issuperset(b)]
    return {path for branch in whole for path in branch}
