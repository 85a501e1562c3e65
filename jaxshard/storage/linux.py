"""What Linux offers beyond Python's ``os``, and what is done where it does not.

Both calls only make the disk's work easier: a result is the same without them.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from typing import Any

_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_NOT_OFFERED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


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


@cache
def _function(name: str) -> Any:
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    wide = ctypes.c_int64
    function.argtypes = {
        "fallocate": [ctypes.c_int, ctypes.c_int, wide, wide],
        "sync_file_range": [ctypes.c_int, wide, wide, ctypes.c_uint],
    }[name]
    return function
