"""Safetensors files by hand, and the package's opinion of them: for several tests."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors

from jaxshard.errors import FormatError
from jaxshard.formats.folder import MemoryFolder
from jaxshard.formats.safetensors import MAX_HEADER_BYTES, FileLayout, read_header

ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}

#: What the package opens and we refuse, on purpose.
STRICTER = (
    "duplicate key",
    "must have exactly the keys",
    "__metadata__ is a ",
    "at most 64 dims",
)


def packed(header: object, data: bytes = b"") -> bytes:
    """A file with ``header`` (bytes, text, or an object to dump) and ``data``."""
    text = header if isinstance(header, bytes) else as_text(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def as_text(header: object) -> str:
    return header if isinstance(header, str) else json.dumps(header)


@dataclass
class WatchedFolder:
    """One file that fails the test when a read leaves it, or is larger than any header."""

    content: bytes
    root: str = "watched"
    read_bytes: list[int] = field(default_factory=list)

    def files(self) -> Mapping[str, Any]:
        return MemoryFolder({"f": self.content}).files()

    def read(self, path: str, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert 0 <= length <= MAX_HEADER_BYTES
        assert offset + length <= len(self.content)
        self.read_bytes.append(length)
        return self.content[offset : offset + length]


def read_all(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name to dtype, shape and bytes, by our header."""
    header = read_header(WatchedFolder(content), "f")
    return {e.name: (e.dtype.name, e.shape, content[e.start : e.stop]) for e in header.entries}


def read_by_package(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (e["dtype"], tuple(e["shape"]), bytes(e["data"]))
        for name, e in safetensors.deserialize(content)
    }


def filled(layout: FileLayout, seed: int = 0) -> bytes:
    rest = layout.num_bytes - len(layout.segments[0][1])
    return layout.segments[0][1] + random.Random(seed).randbytes(rest)


def disagreement(content: bytes) -> str | None:
    """How our reader and the package differ on ``content``, or None."""
    try:
        mine = read_all(content)
    except FormatError as error:
        refused = str(error)
    else:
        try:
            theirs = read_by_package(content)
        except safetensors.SafetensorError as error:
            # JSON's -0 is an integer to Python and a float to Rust; it means 0 to both
            return None if b"-0" in content else f"we read what it refuses: {error}"
        return None if mine == theirs else "we read different tensors"
    if any(reason in refused for reason in STRICTER):
        return None
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return f"it reads what we refuse: {refused}"
