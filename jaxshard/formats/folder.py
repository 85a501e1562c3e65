"""The reader protocol that formats use instead of opening files.

A format turns bytes into a catalog and back and opens nothing itself, so that it
can be tested in memory and used on any storage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

from ..core.catalog import File
from ..errors import FormatError, NotFoundError, format_list


class Folder(Protocol):
    """A folder of files that can be listed and read by range."""

    @property
    def root(self) -> str:
        """Where the folder is, for messages and for opening it again."""
        ...

    def files(self) -> Mapping[str, File]:
        """Every file below the folder by its relative path (``/`` between parts), sorted.

        Links to files are followed; hidden files and folders are left out.
        """
        ...

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes of the file at ``path`` from ``offset``.

        Raises:
            NotFoundError: no such file.
            FormatError: the file ends before ``offset + length``.
            StorageError: the disk refused.
        """
        ...


class MemoryFolder:
    """Files held in memory: what tests and generated files use."""

    def __init__(self, contents: Mapping[str, bytes], root: str = "memory") -> None:
        self._contents = dict(sorted(contents.items()))
        self._root = root

    @property
    def root(self) -> str:
        return self._root

    def files(self) -> Mapping[str, File]:
        return {p: File(p, len(b)) for p, b in self._contents.items()}

    def read(self, path: str, offset: int, length: int) -> bytes:
        if path not in self._contents:
            raise NotFoundError(f"{self._root} has no file {path}.")
        data = self._contents[path][offset : offset + length]
        if len(data) != length:
            raise FormatError(
                f"{path} ends at byte {len(self._contents[path])}; bytes {offset} to "
                f"{offset + length} were asked for."
            )
        return data


# --- Detection of file kinds by their first bytes

Kind = Literal[
    "weights.ckpt",
    "strategy.ckpt",
    "strategy.json",
    "AES-GCM",
    "AES-CBC",
    "SM4-CBC",
    "safetensors",
    "torch",
    "empty",
    "unknown",
]

_ENCRYPTED: dict[bytes, Kind] = {  # the first four bytes, little-endian 0x7F3A5ED8 and on
    bytes.fromhex("d85e3a7f"): "AES-GCM",
    bytes.fromhex("d95e3a7f"): "AES-CBC",
    bytes.fromhex("da5e3a7f"): "SM4-CBC",
}
#: The kinds that hold weights.
WEIGHTS: frozenset[Kind] = frozenset(
    {"weights.ckpt", "safetensors", "torch", "AES-GCM", "AES-CBC", "SM4-CBC"}
)
_TOLD: dict[Kind, str] = {
    "weights.ckpt": "a MindSpore weight checkpoint",
    "strategy.ckpt": "a MindSpore strategy file",
    "strategy.json": "JSON",
    "safetensors": "a safetensors file",
    "torch": "a PyTorch checkpoint",
    "empty": "empty",
    "unknown": "in no format known here",
}


def kind_of(folder: Folder, path: str) -> Kind:
    """What the file at ``path`` seems to be.

    Raises:
        NotFoundError: there is no such file.
    """
    file = folder.files().get(path)
    if file is None:
        raise NotFoundError(f"{folder.root} has no file {path}.")
    head = folder.read(path, 0, min(16, file.num_bytes))
    if path.endswith(".json") and head.lstrip()[:1] == b"{":
        return "strategy.json"
    return kind_of_head(head)


def kind_of_head(head: bytes) -> Kind:
    r"""What a file beginning with the 16 bytes ``head`` seems to be.

    >>> kind_of_head(b"\n\x10\n\x03f32"), kind_of_head(b"\x08\x02\x12<")
    ('weights.ckpt', 'strategy.ckpt')
    """
    if not head:
        return "empty"
    if head[:4] in _ENCRYPTED:
        return _ENCRYPTED[head[:4]]
    if head[8:9] == b"{" and head[4:8] == bytes(4):  # a header shorter than 4 GiB
        return "safetensors"
    if head[:2] == b"PK" or head[:1] == b"\x80":  # a zip, or a pickle
        return "torch"
    if head[:1] == b"{":
        return "strategy.json"
    first = head[0]  # the key of the first field: bytes for a value, a number for a strategy
    return "weights.ckpt" if first == 0x0A else "strategy.ckpt" if first == 0x08 else "unknown"


def describe_kind(kind: Kind) -> str:
    """``kind`` as a noun in a sentence: "… is *a MindSpore strategy file*".

    >>> describe_kind("AES-GCM")
    'a checkpoint encrypted with AES-GCM'
    """
    return _TOLD.get(kind) or f"a checkpoint encrypted with {kind}"


# --- File names of Checkpoint 2.0 folders

ITERATION_METADATA, COMMON, TRACKER = (
    "metadata.json",
    "common.json",
    "latest_checkpointed_iteration.txt",
)

_ITERATION = re.compile(r"iteration_(\d{1,18})")
_ITERATION_FILE = re.compile(r"(?:[^/]*-)?(?:model|opt)-\d{7}-\d{7}\.safetensors")


def latest_iteration(folder: Folder) -> str | None:
    """The iteration folder below ``folder`` that counts, or None if there is none.

    It is the one that the tracker names, if it is there, else the one with the largest number.
    """
    files = folder.files()
    found = dict[int, str]()
    for path in files:
        parent, _, name = path.partition("/")
        match = _ITERATION.fullmatch(parent)
        if match and (name == ITERATION_METADATA or _ITERATION_FILE.fullmatch(name)):
            found[int(match[1])] = parent
    if not found:
        return None
    tracker = files.get(TRACKER)
    if tracker is not None and tracker.num_bytes <= 64:
        text = folder.read(TRACKER, 0, tracker.num_bytes).decode("ascii", "replace").strip()
        if text.isdecimal() and int(text) in found:
            return found[int(text)]
    return found[max(found)]


def is_iteration(files: Iterable[str]) -> bool:
    """Whether these are the files of one iteration, with its metadata."""
    names = set(files)
    return ITERATION_METADATA in names and any(map(_ITERATION_FILE.fullmatch, names))


# --- File and leaf names of Orbax checkpoints

_ORBAX_METADATA = "_METADATA"

#: The files of an item that lie at its top; others there are not Orbax's.
ORBAX_FILES = frozenset(
    {
        _ORBAX_METADATA,
        "_CHECKPOINT_METADATA",
        "_sharding",
        "_strings.json",
        "commit_success.txt",
        "checkpoint",
        "manifest.ocdbt",
        "orbax.checkpoint",
    }
)


def is_orbax(files: Iterable[str]) -> bool:
    """Whether these files are an Orbax item, or a folder of items."""
    return bool(_orbax_items(files))


def is_orbax_item(files: Iterable[str]) -> bool:
    """Whether these files are an item themselves, and none lies in a folder of theirs only."""
    return _ORBAX_METADATA in set(files)


def orbax_item_folder(files: Iterable[str]) -> str:
    """The folder of the item, relative to the checkpoint: "" where it is the item itself.

    Raises:
        FormatError: there are several items.

    >>> orbax_item_folder(["_METADATA", "d/0f"]), orbax_item_folder(["default/_METADATA", "x"])
    ('', 'default')
    """
    items = _orbax_items(files)
    if "" in items:
        return ""
    if len(items) != 1:
        raise FormatError(
            f"this Orbax checkpoint has {len(items)} items or steps ({format_list(items)}). Name "
            "the folder of one of them."
        )
    return items[0]


def _orbax_items(files: Iterable[str]) -> list[str]:
    """Folders with an item, at most two below: a step, and an item of it."""
    found = [f.removesuffix(_ORBAX_METADATA).rstrip("/") for f in files if _is_orbax_metadata(f)]
    return sorted(found)


def _is_orbax_metadata(path: str) -> bool:
    parts = path.split("/")
    return parts[-1] == _ORBAX_METADATA and len(parts) <= 3
