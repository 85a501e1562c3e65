"""Folders that are not on a disk and keep count of what is read from them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from jaxshard.core.catalog import File
from jaxshard.formats.folder import MemoryFolder


class CountingFolder(MemoryFolder):
    """Files in memory; every read is noted as (path, offset, length)."""

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        super().__init__(contents)
        self.reads: list[tuple[str, int, int]] = []

    def read(self, path: str, offset: int, length: int) -> bytes:
        self.reads.append((path, offset, length))
        return super().read(path, offset, length)

    @property
    def num_bytes(self) -> int:
        """Bytes read so far."""
        return sum(length for _, _, length in self.reads)


class SparseFolder:
    """One file of any size: ``segments`` at their offsets and zeros between them."""

    def __init__(self, path: str, num_bytes: int, segments: Sequence[tuple[int, bytes]]) -> None:
        self.root = "sparse"
        self._file = File(path, num_bytes)
        self._segments = list(segments)
        self._starts = [at for at, _ in segments]
        self.num_reads, self.num_bytes = 0, 0

    def files(self) -> Mapping[str, File]:
        return {self._file.path: self._file}

    def read(self, path: str, offset: int, length: int) -> bytes:
        assert path == self._file.path
        assert 0 <= offset <= offset + length <= self._file.num_bytes
        self.num_reads, self.num_bytes = self.num_reads + 1, self.num_bytes + length
        out = bytearray(length)
        number = max(0, bisect_right(self._starts, offset) - 1)
        for at, data in self._segments[number:]:
            if at >= offset + length:
                break
            a, b = max(at, offset), min(at + len(data), offset + length)
            if a < b:
                out[a - offset : b - offset] = data[a - at : b - at]
        return bytes(out)
