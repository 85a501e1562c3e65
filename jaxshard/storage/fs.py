"""Filesystem primitives: publish, exchange and replace files atomically.

Knows nothing of checkpoints. Each primitive is atomic for readers and for a kill at any moment;
where a file system offers no such operation, the fall-back and its gap are documented.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from ..errors import StorageError
from .linux import exchange, rename_new

__all__ = [
    "check_free_space",
    "delete",
    "exchange",
    "fsync_dir",
    "fsync_path",
    "publish_new",
    "write_file_atomic",
]

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)


def publish_new(made: Path, place: Path) -> None:
    """Rename ``made`` to ``place`` without replacing anything there.

    An empty folder holds nothing, so a folder takes its place.

    Raises:
        FileExistsError: something lies at ``place``; both are as they were.
        OSError: the disk refused.
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
    """Without ``renameat2``: a hard link never replaces; without links either, look right before.

    An empty file made exclusively would reserve the name, but a kill would leave it there as a
    result; a file that appears between the look and the rename is the lesser danger.
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
    """Make ``path`` hold ``data``; at any instant it holds that, or what it held before.

    For folders of our own: what an earlier, killed call left at the scratch name is removed.

    Raises:
        OSError: the disk refused.
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


def scratch_of(path: Path) -> Path:
    """Where ``write_file_atomic`` writes what becomes ``path``."""
    return path.with_name(f".{path.name}.new")


def fsync_path(path: Path) -> None:
    """Wait until the content of ``path``, a file or the names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


fsync_dir = fsync_path


def delete(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a folder with all in it, if it is there.

    Raises:
        OSError: the disk refused.
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
