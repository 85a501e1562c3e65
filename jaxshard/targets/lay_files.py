"""Laying out weight files: from the entries of a rank's file to the place of every byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..formats import safetensors
from ..formats.weight_files import int4_names, texts
from ..planning.outputs import Entry
from ..storage.writing import FileLayout, LayFile, Seal


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
    from ..formats import mindspore_ckpt_writing  # noqa: PLC0415 - seldom needed, and not small
    from ..storage.sealing import append_crc  # noqa: PLC0415

    def lay_file(entries: Sequence[Entry]) -> FileLayout:
        described = [(e.tensor.name, e.tensor.dtype, e.shape) for e in entries]
        return mindspore_ckpt_writing.layout_file(
            described, strings=texts(metadata), int4=int4_names(metadata), crc=crc
        )

    return lay_file, append_crc if crc else None
