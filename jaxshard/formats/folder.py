"""Folders of files: the protocol that formats read through, and recognition of formats.

A format turns bytes into a catalog and back without opening files, so it can be tested in
memory and works on any storage. Formats are recognised by file names and first bytes. File kinds
need their first bytes because MindSpore calls weights and strategies alike ``.ckpt``, as PyTorch
calls its own, and an encrypted file differs in its first four bytes only.
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
        """Path of the folder, for messages and for reopening."""
        ...

    def files(self) -> Mapping[str, File]:
        """Return every file below the folder by relative path (``/`` between parts), sorted.

        Links to files are followed; hidden files and folders are skipped.
        """
        ...

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes of the file at ``path`` from ``offset``.

        Raises:
            NotFoundError: no such file.
            FormatError: the file ends before ``offset + length``.
            StorageError: an I/O error.
        """
        ...


class MemoryFolder:
    """Files in memory, for tests and generated files."""

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
                f"{offset + length} were requested."
            )
        return data


# --- kinds of files, by their first bytes ---------------------------------------------------------

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
_DESCRIPTIONS: dict[Kind, str] = {
    "weights.ckpt": "a MindSpore weight checkpoint",
    "strategy.ckpt": "a MindSpore strategy file",
    "strategy.json": "JSON",
    "safetensors": "a safetensors file",
    "torch": "a PyTorch checkpoint",
    "empty": "empty",
    "unknown": "of an unknown format",
}


def kind_of(folder: Folder, path: str) -> Kind:
    """Return the apparent kind of the file at ``path``, from 16 bytes.

    Raises:
        NotFoundError: no such file.
    """
    file = folder.files().get(path)
    if file is None:
        raise NotFoundError(f"{folder.root} has no file {path}.")
    head = folder.read(path, 0, min(16, file.num_bytes))
    if path.endswith(".json") and head.lstrip()[:1] == b"{":
        return "strategy.json"
    return kind_of_head(head)


def kind_of_head(head: bytes) -> Kind:
    r"""Return the apparent kind of a file that starts with the 16 bytes ``head``.

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
    first = head[0]  # the first protobuf key: field 1 is bytes in weights, a number in strategies
    return "weights.ckpt" if first == 0x0A else "strategy.ckpt" if first == 0x08 else "unknown"


def describe_kind(kind: Kind) -> str:
    """Return a noun phrase for ``kind``, as in "… is a MindSpore strategy file".

    >>> describe_kind("AES-GCM")
    'a checkpoint encrypted with AES-GCM'
    """
    return _DESCRIPTIONS.get(kind) or f"a checkpoint encrypted with {kind}"


# --- Checkpoint 2.0 folders, by file names --------------------------------------------------------

ITERATION_METADATA, COMMON, TRACKER = (
    "metadata.json",
    "common.json",
    "latest_checkpointed_iteration.txt",
)

_ITERATION = re.compile(r"iteration_(\d{1,18})")
_ITERATION_FILE = re.compile(r"(?:[^/]*-)?(?:model|opt)-\d{7}-\d{7}\.safetensors")


def latest_iteration(folder: Folder) -> str | None:
    """Return the newest iteration folder below ``folder``, or None.

    It is the one that the tracker file names, or else the one with the largest number.
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
    """Return whether ``files`` are one Checkpoint 2.0 iteration with metadata."""
    names = set(files)
    return ITERATION_METADATA in names and any(map(_ITERATION_FILE.fullmatch, names))


# --- Orbax checkpoints, by file names -------------------------------------------------------------

_ORBAX_METADATA = "_METADATA"

#: Orbax's files at the top of an item; other files there are extras.
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
    """Return whether ``files`` are an Orbax item or contain items."""
    return bool(_orbax_items(files))


def is_orbax_item(files: Iterable[str]) -> bool:
    """Return whether ``files`` are an Orbax item themselves."""
    return _ORBAX_METADATA in set(files)


def orbax_item_folder(files: Iterable[str]) -> str:
    """Return the folder of the item in a checkpoint; "" if the checkpoint is the item.

    Raises:
        FormatError: the checkpoint has several items.

    >>> orbax_item_folder(["_METADATA", "d/0f"]), orbax_item_folder(["default/_METADATA", "x"])
    ('', 'default')
    """
    items = _orbax_items(files)
    if "" in items:
        return ""
    if len(items) != 1:
        raise FormatError(
            f"this Orbax checkpoint has {len(items)} items or steps ({format_list(items)}; "
            "expected one). Pass the folder of one of them."
        )
    return items[0]


def _orbax_items(files: Iterable[str]) -> list[str]:
    """List folders with an item, at most two levels deep: a step and its item."""
    found = [f.removesuffix(_ORBAX_METADATA).rstrip("/") for f in files if _is_orbax_metadata(f)]
    return sorted(found)


def _is_orbax_metadata(path: str) -> bool:
    parts = path.split("/")
    return parts[-1] == _ORBAX_METADATA and len(parts) <= 3
