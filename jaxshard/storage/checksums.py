"""CRC-32C checksums of files in chunks.

A file is covered by chunks, each the bytes of one write, in any order and of any size. So
they are computed while the bytes are on their way, in the cache of the core that writes.

CRC-32C by the package ``google-crc32c``, or by ``crc32c`` if it is installed: processors have an
instruction for it. Without either, the CRC-32 of the standard library. Both find every single
flipped bit and every burst of up to 32 bits. The algorithm is recorded. This module opens no file.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import zlib
from collections.abc import (
    Callable,
    Iterable,
    Mapping,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.decoders import (
    FETCH,
    parse_object,
)
from ..errors import (
    FormatError,
    JaxshardError,
    LayoutError,
    NotFoundError,
    StorageError,
    format_list,
    quote_name,
)
from ..formats.huggingface import CHECKSUMS
from .fs import read_bytes
from .local import transfer
from .resources import default_workers
from .staging import os_errors_as

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
    """Return the function that computes ``name``.

    Raises:
        LayoutError: no package here computes it.
        FormatError: jaxshard does not write this kind.

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


# --- ``checksums.json``: the checksums of a checkpoint's files

_CHUNK_BYTES = 64 << 20  # threads share a large file, and an error names the damaged part
_MAX_BYTES = 256 << 20
_VERSION = 1


@dataclass(frozen=True)
class Checksums:
    """The checksums of some files, by their path below one folder."""

    algorithm: str
    files: Mapping[str, FileSums]


def compute_checksums(
    root: Path, paths: Iterable[str], workers: int | None = None, algorithm_name: str = BEST
) -> Checksums:
    """Read the files ``paths`` below ``root``; their checksums.

    Raises:
        StorageError: a file cannot be read.
    """
    compute = algorithm(algorithm_name)
    sizes = {path: os.path.getsize(root / path) for path in sorted(paths)}
    chunks = [
        (path, at, min(_CHUNK_BYTES, size - at))
        for path, size in sizes.items()
        for at in range(0, size, _CHUNK_BYTES)
    ]

    def one(chunk: tuple[str, int, int]) -> tuple[str, tuple[int, int, int]]:
        path, at, length = chunk
        with open(root / path, "rb", buffering=0) as file:
            return path, (at, length, compute(_Reader(file.fileno()).read(at, length)))

    found: dict[str, list[tuple[int, int, int]]] = {path: [] for path in sizes}
    try:
        with ThreadPoolExecutor(workers or default_workers(), "jaxshard") as pool:
            for path, chunk in pool.map(one, chunks):
                found[path].append(chunk)
    except OSError as error:
        raise StorageError(f"{error.filename or root}: {error.strerror}.") from error
    files = {path: FileSums(sizes[path], tuple(found[path])) for path in sizes}
    return Checksums(algorithm_name, files)


def add_checksums(folder: Path, sync: Callable[[Path], None]) -> None:
    """Write the checksums of all files below ``folder`` into it.

    Raises:
        StorageError: the disk is full or refuses.
    """
    below = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    checksums = compute_checksums(folder, (path for path in below if path != CHECKSUMS))
    with os_errors_as(f"{folder / CHECKSUMS} cannot be written"):
        (folder / CHECKSUMS).write_bytes(to_bytes(checksums))
        sync(folder / CHECKSUMS)


def check_files(
    root: Path,
    checksums: Checksums,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Read every byte of the files of ``checksums`` and compare.

    Raises:
        FormatError: a file is not what was saved.
        StorageError: the disk refused.
        NotFoundError: a file is missing.
        LayoutError: no package here computes the checksums.
    """
    compute, lock = algorithm(checksums.algorithm), threading.Lock()

    def check(item: tuple[str, FileSums]) -> None:
        path, sums = item
        _check_file(root, path, sums, compute)
        if progress:
            with lock:
                progress(sums.num_bytes)

    try:
        with ThreadPoolExecutor(workers or default_workers(), "jaxshard") as pool:
            for _ in pool.map(check, checksums.files.items()):
                pass
    except FileNotFoundError as error:
        raise NotFoundError(f"{error.filename} is missing.") from error
    except OSError as error:
        if isinstance(error, JaxshardError):
            raise
        raise StorageError(f"{error.filename or root}: {error.strerror}.") from error


def _check_file(root: Path, path: str, sums: FileSums, compute: Sum) -> None:
    with open(root / path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        at = first_difference(sums, compute, _Reader(file.fileno()).read)
    if at is not None:
        raise FormatError(
            f"{path} is damaged at or after byte {at}: its checksum is not what was saved."
        )
    if size != sums.num_bytes:
        raise FormatError(f"{path} has {size} bytes, and was saved with {sums.num_bytes}. {FETCH}")


def to_bytes(checksums: Checksums) -> bytes:
    """Return the contents of the file that holds ``checksums``."""
    files = {
        path: {
            "num_bytes": sums.num_bytes,
            "chunks": [[at, length, f"{value:08x}"] for at, length, value in sums.chunks],
        }
        for path, sums in checksums.files.items()
    }
    whole = {"version": _VERSION, "algorithm": checksums.algorithm, "files": files}
    return (json.dumps(whole, separators=(",", ":")) + "\n").encode()


def read_checksums(root: Path) -> Checksums | None:
    """Read the checksums in the folder ``root``; None if it has none.

    Raises:
        FormatError: the file is not what it claims to be.
    """
    place = root / CHECKSUMS
    if not place.is_file():
        return None
    raw = parse_object(read_bytes(place, _MAX_BYTES), str(place))
    version, kind, files = (raw.get(k) for k in ("version", "algorithm", "files"))
    if version != _VERSION or not isinstance(kind, str) or not isinstance(files, dict):
        raise FormatError(
            f"{place}: version {quote_name(repr(version))} (expected {_VERSION}). {FETCH}"
        )
    return Checksums(kind, {path: _file_sums(place, path, one) for path, one in files.items()})


def _file_sums(place: Path, path: str, one: Any) -> FileSums:
    try:
        chunks = tuple((int(at), int(n), int(value, 16)) for at, n, value in one["chunks"])
        sums = FileSums(int(one["num_bytes"]), chunks)
    except (KeyError, TypeError, ValueError):
        raise FormatError(
            f"{place}: {quote_name(path)} has no readable checksums. {FETCH}"
        ) from None
    if path.startswith("/") or ".." in path.split("/"):
        raise FormatError(f"{place}: {quote_name(path)} is not a path inside the folder. {FETCH}")
    sums.check_whole(path)
    return sums


def check_folder(
    root: str | os.PathLike[str],
    paths: Iterable[str],
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> bool:
    """Compare the files ``paths`` below ``root`` with the checksums there; False if it has none.

    Raises:
        FormatError: a file is not what was saved, or has no checksum among the others.
        NotFoundError, StorageError, LayoutError: as ``check_files``.
    """
    checksums = read_checksums(Path(root))
    if checksums is None:
        return False
    wanted = [path for path in paths if not os.path.isabs(path)]
    check_covered(checksums, wanted, os.fspath(root))
    chosen = Checksums(checksums.algorithm, {path: checksums.files[path] for path in wanted})
    check_files(Path(root), chosen, workers=workers, progress=progress)
    return True


def check_covered(checksums: Checksums, paths: Iterable[str], root: str) -> None:
    """Refuse files that ``checksums`` does not cover.

    Raises:
        FormatError: there are such.
    """
    lacking = [path for path in paths if path not in checksums.files]
    if lacking:
        raise FormatError(
            f"{CHECKSUMS} of {root} has no checksum of {format_list(map(quote_name, lacking))}: "
            f"the files are of different saves. {FETCH}"
        )


class _Reader:
    """Reads into one buffer: fresh memory for each chunk would cost more than the reading."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._buffer = descriptor, bytearray()

    def read(self, offset: int, length: int) -> memoryview:
        if len(self._buffer) < length:
            self._buffer = bytearray(length)
        whole = memoryview(self._buffer)[:length]
        return whole[: transfer(os.preadv, self._descriptor, offset, (whole,))]
