"""Bounded reading of small text files that a user names."""

from __future__ import annotations

import os
import select
from pathlib import Path

from ..errors import FormatError, NotFoundError, StorageError

_WAIT_SECONDS = 10  # for a pipe, as a shell's <(command) makes one


def read_bytes(path: str | os.PathLike[str], max_bytes: int, subject: str = "") -> bytes:
    """Return all bytes of the file or pipe at ``path``; ``subject`` leads error messages.

    Raises:
        NotFoundError: it does not exist.
        FormatError: it has more than ``max_bytes``.
        StorageError: it cannot be read, or a pipe stays silent.
    """
    subject = subject or str(path)
    try:
        # without O_NONBLOCK, opening a pipe that has no writer would wait forever
        descriptor = os.open(Path(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return _read_all(descriptor, max_bytes, subject)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{subject} does not exist.") from None
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{subject} cannot be read: {error.strerror}.") from error


def read_text(path: str | os.PathLike[str], max_bytes: int, subject: str = "") -> str:
    """Return the UTF-8 text of the file or pipe at ``path`` (arguments as ``read_bytes``).

    Raises:
        NotFoundError, StorageError: as ``read_bytes``.
        FormatError: it has more than ``max_bytes``, or is not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes, subject).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{subject or path} is not UTF-8 text ({error.reason} at byte {error.start}). "
            "Check the path."
        ) from None


def _read_all(descriptor: int, max_bytes: int, subject: str) -> bytes:
    parts = list[bytes]()
    left = max_bytes + 1
    while left:
        try:
            part = os.read(descriptor, min(left, 1 << 20))
        except BlockingIOError:
            if select.select([descriptor], [], [], _WAIT_SECONDS)[0]:
                continue
            raise StorageError(f"{subject} sent nothing for {_WAIT_SECONDS} s.") from None
        if not part:
            return b"".join(parts)
        parts.append(part)
        left -= len(part)
    raise FormatError(f"{subject} has more than {max_bytes} bytes. Check the path.")
