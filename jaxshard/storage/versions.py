"""Versions of files, which detect changes during a read.

A version is the size, times and inode of a file. It is taken when the headers are read,
compared at each descriptor that is opened, and once more after the last byte was read.
The inode finds a replaced file, and the change time a file that was rewritten in place
and given its old modification time: no program can set it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..core.catalog import File
from ..errors import FormatError, format_list
from .linux import is_fuse


def version_of(path: str, info: os.stat_result) -> File:
    """Return the file at ``path`` in the state that ``info`` describes."""
    return File(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)


class Versions:
    """The versions of the files below one folder that were opened. Safe to use from threads."""

    def __init__(self, root: str | os.PathLike[str], files: Iterable[File] = ()) -> None:
        """Expect ``files`` in the state that they describe; one without times in any state."""
        self._root = Path(root)
        self._expected = {f.path: f for f in files if f.mtime_ns}
        self._opened: dict[str, File] = {}
        self._lock = threading.Lock()

    def opened(self, path: str, descriptor: int) -> None:
        """Note that ``path`` was opened as ``descriptor``.

        Raises:
            FormatError: it is not the version that is expected, or that was opened before.
        """
        now = version_of(path, os.fstat(descriptor))
        with self._lock:
            before = self._opened.setdefault(path, self._expected.get(path, now))
        if not self._is_same(before, now):
            raise changed_while_read(self._root, [path])

    def check(self) -> None:
        """Compare every file that was opened with its present version.

        Raises:
            FormatError: a file was changed, replaced or removed.
        """
        with self._lock:
            opened = list(self._opened.values())
        changed = [before.path for before in opened if not self._is_current(before)]
        if changed:
            raise changed_while_read(self._root, changed)

    def _is_current(self, before: File) -> bool:
        try:
            info = os.stat(self._root / before.path)
        except OSError:
            return False
        return self._is_same(before, version_of(before.path, info))

    def _is_same(self, before: File, now: File) -> bool:
        if before == now:
            return True
        if replace(before, inode=0) != replace(now, inode=0):
            return False
        # of all systems, those in user space give a file another inode when it is looked up again
        return is_fuse(self._root / now.path)


def changed_while_read(root: str | Path, paths: Iterable[str]) -> FormatError:
    """Return the error that names ``paths`` below ``root``."""
    return FormatError(
        f"{format_list(paths)} of {root} changed while being read. Try again when nothing writes "
        "there."
    )
