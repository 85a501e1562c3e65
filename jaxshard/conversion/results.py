"""Requests and results: the layout and format that a conversion produces.

Values only; ``targets`` makes the one into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.layout import Layout
from ..formats import safetensors
from ..formats.registry import FORMATS
from ..formats.weight_files import int4_names, texts
from ..planning.outputs import Entry, Outputs
from ..storage.writers import FileLayout, LayFile, Seal

__all__ = ["FORMATS", "Request", "Result"]


@dataclass(frozen=True)
class Request:
    """How the result should be, apart from where.

    Attributes:
        to: the layout, or None for a complete checkpoint.
        max_shard_bytes: the most tensor bytes of one file of a complete checkpoint; by
            default what is usual for the format.
        prefix: rank files are called ``rank_{r}/{prefix}_rank_{r}-{epoch}_{step}.safetensors``.
        step: the epoch and the step in these names; None: ``rank_{r}/{prefix}.safetensors``.
        remove_redundancy: store each shard on one of its holders only.
        format: one of ``known.FORMATS``; by default Hugging Face's for a complete checkpoint, and
            rank folders for a layout.
        crc: end every ``.ckpt`` with a checksum.
        numbers: the values of the job's numbers, for formats that keep them in JSON.
        one_file: the destination names a file, so the job's numbers have none of their own.
        checksums: write the checksums of all files into a file beside them.
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
    """The files to make.

    Attributes:
        lay_file: lays out the weight file of a list of entries.
        side_files: other files, by path, with their contents.
        seal: finishes a weight file of which all bytes are written.
        extras_to: where files that are carried along go, under the result's root.
        files_per_rank: how many files a rank has; second ones are numbered after all first.
        checksums: whether the checksums of all files are to be written beside them.
    """

    format: str
    outputs: Outputs
    lay_file: Callable[[Sequence[Entry]], FileLayout]
    side_files: Mapping[str, bytes] = field(repr=False)
    seal: Callable[[Path], None] | None = None
    extras_to: str = ""
    files_per_rank: int = 1
    checksums: bool = False


# --- Laying out weight files: from the entries of a rank's file to the place of every byte


def as_safetensors(metadata: Mapping[str, str]) -> LayFile:
    """Lays entries out as a safetensors file with ``metadata``."""
    metadata = {k: v for k, v in metadata.items() if k != "crc_num"}  # that of another file

    def lay_file(entries: Sequence[Entry]) -> FileLayout:
        return safetensors.layout_file(
            [(e.tensor.name, e.tensor.dtype, e.shape) for e in entries], metadata
        )

    return lay_file


def as_ckpt(metadata: Mapping[str, str], *, crc: bool = False) -> tuple[LayFile, Seal | None]:
    """Lays entries out as MindSpore's ``.ckpt``; and what finishes the file, if anything."""
    from ..formats import mindspore_ckpt  # noqa: PLC0415 - seldom needed, and not small
    from ..storage.writers import append_crc  # noqa: PLC0415

    def lay_file(entries: Sequence[Entry]) -> FileLayout:
        described = [(e.tensor.name, e.tensor.dtype, e.shape) for e in entries]
        return mindspore_ckpt.layout_file(
            described, strings=texts(metadata), int4=int4_names(metadata), crc=crc
        )

    return lay_file, append_crc if crc else None
