"""Sealing: what can be written only when all else of a file is there."""

from __future__ import annotations

import zlib
from pathlib import Path

from ..formats.mindspore_ckpt import CRC_BYTES
from ..formats.mindspore_ckpt_writing import crc_trailer
from .staging import told

_BLOCK_BYTES = 8 << 20


def append_crc(path: Path) -> None:
    """Fill the room at the end of the ``.ckpt`` at ``path`` with the checksum of what precedes.

    Raises:
        StorageError: the disk refused.
    """
    with told(f"{path} cannot be sealed"), open(path, "r+b") as file:
        end = file.seek(0, 2) - CRC_BYTES
        file.seek(0)
        crc, left = 0, end
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            crc = zlib.crc32(block, crc)
            left -= len(block)
        file.seek(end)
        file.write(crc_trailer(crc))
