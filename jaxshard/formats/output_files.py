"""Requests for output files, and the files that a format plans for them.

A format's ``plan_files`` turns a ``Request`` into a ``Result``: which file holds which box of
which tensor. Both are plain values: they print, compare and pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

from ..core.layout import Layout
from ..planning.outputs import Entry, Outputs
from . import safetensors
from .safetensors import FileLayout


class Container(Protocol):
    """A container format of weight files: how one file stores tensors."""

    @property
    def crc(self) -> bool:
        """Whether each file ends with a checksum of all that precedes it."""
        ...

    def layout(self, entries: Sequence[Entry]) -> FileLayout:
        """Lay out the file of ``entries``."""
        ...


@dataclass(frozen=True)
class SafetensorsContainer:
    """safetensors files with ``metadata`` in their headers."""

    metadata: Mapping[str, str]
    crc: bool = False

    def layout(self, entries: Sequence[Entry]) -> FileLayout:
        """Lay out the file of ``entries``."""
        # crc_num is the checksum of the source's file
        metadata = {k: v for k, v in self.metadata.items() if k != "crc_num"}
        return safetensors.layout_file(
            [(e.tensor.name, e.tensor.dtype, e.shape) for e in entries], metadata
        )


@dataclass(frozen=True)
class Request:
    """Options of a result's files.

    Attributes:
        to: the layout, or None for a complete checkpoint.
        max_shard_bytes: the most tensor bytes of one file of a complete checkpoint; by
            default what is usual for the format.
        prefix: rank files are called ``rank_{r}/{prefix}_rank_{r}-{epoch}_{step}.safetensors``.
        step: the epoch and the step in these names; None: ``rank_{r}/{prefix}.safetensors``.
        remove_redundancy: store each shard on one of its holders only.
        format: the name of a format; by default the first that can hold ``to``.
        crc: end every ``.ckpt`` with a checksum.
        numbers: training scalars (``global_step`` …), for formats that keep them in JSON.
        one_file: the destination is one file, which holds the training scalars too.
        checksums: add a file with the checksums of all files.
    """

    to: Layout | None = None
    max_shard_bytes: int | None = None
    prefix: str = "checkpoint"
    step: tuple[int, int] | None = (1, 1)
    remove_redundancy: bool = False
    format: str | None = None
    crc: bool = False
    numbers: Mapping[str, Any] = field(default_factory=dict)
    one_file: bool = False
    checksums: bool = False


@dataclass(frozen=True)
class Result:
    """The files to write.

    Attributes:
        container: the container format of the weight files.
        side_files: other files, by path, with their contents.
        extras_to: the folder of the source's extras, relative to the result's root.
        files_per_rank: how many files a rank has; second ones are numbered after all first.
        checksums: whether to add a file with the checksums of all files.
    """

    format: str
    outputs: Outputs
    container: Container
    side_files: Mapping[str, bytes] = field(repr=False)
    extras_to: str = ""
    files_per_rank: int = 1
    checksums: bool = False


@dataclass(frozen=True)
class LazyArray:
    """An array that is read when the library that writes it needs it.

    Attributes:
        dtype: the NumPy dtype of its elements.
        read: returns the array; called once.
    """

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], Any]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return prod(self.shape)
