"""Filesystem primitives: publish, exchange and replace files atomically.

Each primitive is atomic for readers and for a kill at any moment. If a filesystem does not offer
such an operation, the fall-back and its gap are documented. System calls beyond Python's ``os``
and bounded reads of text files are here too. This module does not depend on checkpoints.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import FormatError, NotFoundError, StorageError

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)


def publish_new(made: Path, place: Path) -> None:
    """Rename ``made`` to ``place`` without replacing anything there.

    An empty folder may be replaced by a folder.

    Raises:
        FileExistsError: ``place`` exists; both are unchanged.
        OSError: the disk failed.
    """
    try:
        if rename_new(made, place):
            return
    except FileExistsError:
        if not (_is_folder(made) and _is_folder(place)):
            raise
    (_rename_folder if _is_folder(made) else _rename_file)(made, place)


def _rename_folder(made: Path, place: Path) -> None:
    """POSIX lets a folder replace an empty folder only, so this is atomic on every file system."""
    try:
        os.rename(made, place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from error


def _rename_file(made: Path, place: Path) -> None:
    """Rename without ``renameat2``: by a hard link, which never replaces, or after a check.

    An empty file created exclusively would reserve the name, but a kill would leave it there as a
    result. A file that appears between the check and the rename is the smaller risk.
    """
    try:
        os.link(made, place, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from error
        os.rename(made, place)
    else:
        os.unlink(made)


def write_file_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace the content of ``path`` by ``data`` atomically.

    For jaxshard's own folders: a file that a killed call left at the scratch name is removed.

    Raises:
        OSError: the disk failed.
    """
    scratch = scratch_of(path)
    scratch.unlink(missing_ok=True)  # exclusively below, so that no link is written through
    with open(scratch, "xb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(scratch, path)
    if durable:
        fsync_dir(path.parent)


def write_user_file(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Write ``data`` as the new file ``path`` atomically; with ``overwrite`` replace a file there.

    Raises:
        FileExistsError: ``path`` exists, and is unchanged.
        OSError: the disk failed.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    with open(scratch, "xb") as file:
        try:
            file.write(data)
            file.flush()
            if overwrite:
                os.replace(scratch, path)
            else:
                publish_new(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def scratch_of(path: Path) -> Path:
    """Return the scratch name that ``write_file_atomic`` renames to ``path``."""
    return path.with_name(f".{path.name}.new")


def fsync_path(path: Path) -> None:
    """Flush ``path``, a file or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


fsync_dir = fsync_path


def delete(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder with its content, if it exists.

    Raises:
        OSError: the disk failed.
    """
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_free_space(
    place: Path,
    num_bytes: int,
    what: str = "result",
    remedy: str = "Make room, or choose another disk.",
) -> None:
    """Check that the filesystem of ``place`` has ``num_bytes`` free.

    Raises:
        StorageError: it has fewer.
    """
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise StorageError(
            f"{place} has {free} bytes free, and the {what} needs {num_bytes}. {remedy}"
        )


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


# --- Linux system calls beyond Python's ``os``, with fall-backs

IOV_MAX = 1024  # memory ranges that one preadv or pwritev takes
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_AT_CWD, _NO_REPLACE, _EXCHANGE = -100, 1, 2  # AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE
_NOT_OFFERED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_MOUNTS = Path("/proc/self/mountinfo")


def reserve(descriptor: int, num_bytes: int) -> None:
    """Make an empty file ``num_bytes`` long, and reserve its blocks if the filesystem can.

    The filesystem then need not allocate during writes, and a full disk is an error before the
    first byte. ``posix_fallocate`` might write a byte to every block instead.

    Raises:
        OSError: the disk is full.
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
    """Start writing the dirty pages of the file to the disk, without waiting."""
    call = _function("sync_file_range")
    if call is not None:
        call(descriptor, 0, 0, _START_WRITING)  # if it fails, the later fsync raises


def exchange(a: Path, b: Path) -> bool:
    """Exchange two paths in one step (``renameat2``); False if that is not offered.

    Raises:
        OSError: the disk failed.
    """
    return _renamed(a, b, _EXCHANGE)


def rename_new(a: Path, b: Path) -> bool:
    """Rename ``a`` to ``b``, which must not exist (``renameat2``); False if that is not offered.

    Raises:
        FileExistsError: ``b`` exists.
        OSError: the disk failed.
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
    """Return whether ``path`` (absolute) is a mount point, which cannot be renamed or replaced.

    A bind mount of the same disk shows only in the system's list of mounts.
    """
    if os.path.ismount(path):
        return True
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return False
    return any(_mounted_at(line) == os.fsencode(path) for line in lines)


def is_fuse(path: Path) -> bool:
    """Return whether ``path`` is on a FUSE filesystem, by the system's list of mounts."""
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


# --- Bounded reading of small text files that a user names

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
