"""Linux system calls beyond Python's ``os``, with fall-backs.

Reserving and writing back only make the disk's work easier: a result is the same without.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

IOV_MAX = 1024  # memory ranges that one preadv or pwritev takes
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_AT_CWD, _NO_REPLACE, _EXCHANGE = -100, 1, 2  # AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE
_NOT_OFFERED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_MOUNTS = Path("/proc/self/mountinfo")


def reserve(descriptor: int, num_bytes: int) -> None:
    """Make an empty file ``num_bytes`` long, with its room on the disk reserved if that can be.

    The file system then finds no room while it is written to, and a full disk is heard of
    before the first byte. ``posix_fallocate`` would do it, or write a byte to every block.

    Raises:
        OSError: there is no room.
    """
    call = _function("fallocate")
    if num_bytes and call is not None:
        if call(descriptor, 0, 0, num_bytes) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NOT_OFFERED:
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, num_bytes)


def start_writing_back(descriptor: int) -> None:
    """Have the disk begin with what was written to the file so far; nobody waits for it."""
    call = _function("sync_file_range")
    if call is not None:
        call(descriptor, 0, 0, _START_WRITING)  # if it fails, the later fsync will tell


def exchange(a: Path, b: Path) -> bool:
    """Exchange two paths in one step (``renameat2``); False where that is not offered.

    Raises:
        OSError: the disk refused.
    """
    return _renamed(a, b, _EXCHANGE)


def rename_new(a: Path, b: Path) -> bool:
    """Rename ``a`` to ``b``, which must not exist (``renameat2``); False where that is not offered.

    Raises:
        FileExistsError: something lies at ``b``.
        OSError: the disk refused.
    """
    return _renamed(a, b, _NO_REPLACE)


def _renamed(a: Path, b: Path, flag: int) -> bool:
    call = _function("renameat2")
    if call is None:
        return False
    if call(_AT_CWD, os.fsencode(a), _AT_CWD, os.fsencode(b), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_OFFERED:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def is_mount_point(path: Path) -> bool:
    """Whether a file system is mounted at ``path`` (absolute): it cannot be renamed or replaced.

    A folder bound to another of the same disk shows nowhere but in the system's own list.
    """
    if os.path.ismount(path):
        return True
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return False
    return any(_mounted_at(line) == os.fsencode(path) for line in lines)


def is_fuse(path: Path) -> bool:
    """Whether ``path`` is on a file system in user space, by the system's own list."""
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return False
    place = os.fsencode(os.path.realpath(path))
    over = [(_mounted_at(line), line) for line in lines]
    over = [(at, line) for at, line in over if place.startswith(at.rstrip(b"/") + b"/")]
    if not over:
        return False
    line = max(over, key=lambda one: len(one[0]))[1]
    return line.partition(b" - ")[2].startswith(b"fuse")


def _mounted_at(line: bytes) -> bytes:
    """The fifth field: spaces and backslashes are written as three octal digits."""
    field = line.split(b" ", 5)[4] if line.count(b" ") > 4 else b""
    return re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8) & 0xFF]), field)


@cache
def _function(name: str) -> Any:
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    wide, path = ctypes.c_int64, ctypes.c_char_p
    function.argtypes = {
        "fallocate": [ctypes.c_int, ctypes.c_int, wide, wide],
        "sync_file_range": [ctypes.c_int, wide, wide, ctypes.c_uint],
        "renameat2": [ctypes.c_int, path, ctypes.c_int, path, ctypes.c_uint],
    }[name]
    return function
