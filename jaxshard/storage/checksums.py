"""CRC-32C checksums of files in chunks.

A file is covered by chunks, each the bytes of one write, in any order and of any size. So
they are computed while the bytes are on their way, in the cache of the core that writes.

CRC-32C by the package ``google-crc32c``, or by ``crc32c`` if it is installed: processors have an
instruction for it. Without either, the CRC-32 of the standard library. Both find every single
flipped bit and every burst of up to 32 bits. The algorithm is recorded. This module opens no file.
"""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import FormatError, LayoutError

Sum = Callable[[bytes | memoryview], int]
Chunk = tuple[int, int, int]  # offset in the file, bytes, checksum


def _find_crc32c() -> Sum | None:
    try:
        from crc32c import crc32c  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415

        return lambda data: int(crc32c(data))
    except ImportError:
        pass
    try:
        from google_crc32c import value  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415

    except ImportError:
        return None

    def compute(data: bytes | memoryview) -> int:
        if not isinstance(data, bytes):
            # It refuses a memoryview and takes an array. NumPy is not imported for this alone.
            numpy = sys.modules.get("numpy")
            data = bytes(data) if numpy is None else numpy.frombuffer(data, "u1")
        return int(value(data))

    return compute


_CRC32C = _find_crc32c()

ALGORITHMS: Mapping[str, Sum] = {
    **({"crc32c": _CRC32C} if _CRC32C else {}),
    "crc32": zlib.crc32,
}
BEST = next(iter(ALGORITHMS))


def algorithm(name: str) -> Sum:
    """The function that computes ``name``.

    Raises:
        LayoutError: no package here computes it.
        FormatError: it is none that jaxshard writes.

    >>> hex(algorithm("crc32")(b"123456789"))
    '0xcbf43926'
    """
    found = ALGORITHMS.get(name)
    if found is not None:
        return found
    if name == "crc32c":
        raise LayoutError(
            "the checksums are CRC-32C, and no package here computes them. "
            "Install one: pip install google-crc32c."
        )
    raise FormatError(f"checksums of an unknown kind, {name!r}. A newer jaxshard wrote them.")


@dataclass(frozen=True, slots=True)
class FileSums:
    """The checksums of one file: its size, and chunks that cover it, by offset."""

    num_bytes: int
    chunks: tuple[Chunk, ...]

    def check_whole(self, path: str) -> None:
        """Refuse chunks that leave a byte of the file uncovered, or cover one twice.

        Raises:
            FormatError: such chunks.
        """
        at = 0
        for offset, length, _ in self.chunks:
            if offset != at or length <= 0:
                raise FormatError(
                    f"{path}: its checksums cover bytes up to {at} and then from {offset}. Save "
                    "the step again."
                )
            at += length
        if at != self.num_bytes:
            raise FormatError(
                f"{path}: its checksums cover {at} bytes of {self.num_bytes}. Save the step again."
            )


class Gathered:
    """Checksums as they come in, from several threads."""

    def __init__(self, name: str = BEST) -> None:
        self.algorithm = name
        self.compute = algorithm(name)
        self._chunks: dict[str, list[Chunk]] = {}
        self._lock = threading.Lock()

    def add(self, path: str, offset: int, data: bytes | memoryview) -> None:
        """Cover ``data`` of the file at ``path``."""
        if len(data):
            self.add_sum(path, offset, len(data), self.compute(data))

    def add_sum(self, path: str, offset: int, length: int, value: int) -> None:
        """Cover bytes whose checksum is known already."""
        with self._lock:
            self._chunks.setdefault(path, []).append((offset, length, value))

    def of(self, path: str, num_bytes: int) -> FileSums:
        """All of one file.

        Raises:
            FormatError: some of it was not covered.
        """
        sums = FileSums(num_bytes, tuple(sorted(self._chunks.get(path, ()))))
        sums.check_whole(path)
        return sums


def first_difference(
    sums: FileSums, compute: Sum, read: Callable[[int, int], bytes | memoryview]
) -> int | None:
    """The offset of the first chunk that is not what it was, or None.

    >>> data = b"abcdef"
    >>> sums = FileSums(6, ((0, 3, zlib.crc32(b"abc")), (3, 3, zlib.crc32(b"xyz"))))
    >>> first_difference(sums, zlib.crc32, lambda offset, length: data[offset : offset + length])
    3
    """
    for offset, length, expected in sums.chunks:
        if compute(read(offset, length)) != expected:
            return offset
    return None
