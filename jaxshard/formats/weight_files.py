"""One weight file, a ``.safetensors`` or a ``.ckpt``, told in the same words.

What a safetensors header keeps in its metadata, a ``.ckpt`` has among its tensors: text,
and which tensors are packed Int4. Here both become metadata, so that either kind can be
written from either. This module knows nothing of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..box import Box
from ..dtypes import DType
from . import safetensors
from .folder import Folder

INT4 = "Int4"  # MindSpore's safetensors have a metadata key for each such tensor, with this value
_NOT_TEXT = {"format", "remove_redundancy", "crc_num"}  # said of the file, not kept in it


class Stored(NamedTuple):
    """A tensor of one file; ``pieces`` are (byte offset in the file, box of the tensor)."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, Box], ...]


@dataclass(frozen=True, slots=True)
class WeightFile:
    """What one file holds, in the order of its bytes."""

    entries: tuple[Stored, ...] = field(repr=False)
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()


def read_weight_file(folder: Folder, path: str) -> WeightFile:
    """The tensors in the file at ``path``, whose name says its kind, from headers only.

    Raises:
        FormatError: it is damaged, encrypted, or not what its name says.
        NotFoundError: there is no such file.
    """
    if not path.endswith(".ckpt"):
        return _safetensors(safetensors.read_header(folder, path))
    from . import mindspore_ckpt  # noqa: PLC0415 - seldom needed, and not small

    header = mindspore_ckpt.read_header(folder, path)
    int4 = {e.name: INT4 for e in header.entries if e.tensor_type == INT4}
    entries = tuple(Stored(e.name, e.dtype, e.shape, e.pieces) for e in header.entries)
    return WeightFile(entries, {**header.strings, **int4}, header.notes)


def _safetensors(header: safetensors.Header) -> WeightFile:
    whole: dict[tuple[int, ...], Box] = {}  # thousands of tensors share a shape, and so its box
    entries = []
    for name, kind, shape, start, _ in header.entries:
        box = whole.get(shape) or whole.setdefault(shape, Box.whole(shape))
        entries.append(Stored(name, kind, shape, ((start, box),)))
    return WeightFile(tuple(entries), header.metadata)


def texts(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of ``metadata`` is text to be kept in a ``.ckpt``."""
    return {k: v for k, v in metadata.items() if k not in _NOT_TEXT and v != INT4}


def int4_names(metadata: Mapping[str, str]) -> frozenset[str]:
    """The tensors that ``metadata`` says are packed Int4."""
    return frozenset(k for k, v in metadata.items() if v == INT4)
