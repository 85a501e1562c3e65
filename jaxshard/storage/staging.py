"""Staging directories: ownership, locks and finished files.

    .out.partial/
        lock            created first, empty
        journal.json    the first line names the folder; the request follows

A folder is ours if this user owns it, it is not a link, and its journal names it. The journal is
written before any other content and removed after it, so a kill leaves a folder with a journal, or
one with empty locks only. Anything else belongs to another program, and is neither written into
nor deleted.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import MEND_THE_DISK, OVERWRITE, LayoutError, StorageError, format_list
from .fs import delete, fsync_path, scratch_of, write_file_atomic
from .remote import refuse_remote

FILES = "files"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RECORDING = threading.Lock()
JOURNAL, LOCK, TURN, PLACING = "journal.json", "lock", "turn.lock", "placing"
_LAST = (PLACING, JOURNAL, TURN, LOCK)  # the proof of ownership is removed in this order
_NAME, _RESUMABLE = "jaxshard", "resumable"
_MOST_BYTES = 64 << 20  # a journal of ours is far smaller


def claim(base: Path) -> None:
    """Create a staging folder at ``base``, or take over one that an earlier run left.

    Raises:
        LayoutError: the files there are not ours.
        OSError: the disk failed.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with suppress(FileExistsError):
            os.mkdir(base)
            return
        with suppress(FileNotFoundError):  # removed since, by its own run: create it
            refuse_others(base)
            return


def refuse_others(base: Path) -> None:
    """Check that ``base`` is a staging folder of this user.

    Raises:
        LayoutError: it is not; the message lists what is there.
        FileNotFoundError: it does not exist.
    """
    if why := _why_not_ours(base):
        raise LayoutError(
            f"{base}: this is where the result is made, but {why}. Move it away, or choose another "
            "destination."
        )


def _why_not_ours(base: Path) -> str | None:
    info = os.lstat(base)
    if stat.S_ISLNK(info.st_mode):
        return "it is a link"
    if not stat.S_ISDIR(info.st_mode):
        return "it is not a folder"
    if info.st_uid != os.geteuid() and info.st_uid != _owner_of_new(base.parent):
        return f"it belongs to user {info.st_uid} (expected {os.geteuid()})"
    names = sorted(os.listdir(base))
    if JOURNAL in names:
        return None if read_journal(base) else f"its {JOURNAL} is not jaxshard's"
    other = [n for n in names if not _is_first(base / n, base)]
    return f"it holds {format_list(other, 3)} and no {JOURNAL} of jaxshard's" if other else None


def _owner_of_new(folder: Path) -> int:
    """Return the owner of new files in ``folder``: NFS may map root to another user."""
    import tempfile  # noqa: PLC0415 - rarely needed

    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid


def _is_first(path: Path, base: Path) -> bool:
    """Return whether ``path`` may precede the journal: an empty lock, or the journal's scratch."""
    info = os.lstat(path)
    is_lock = path.name in (LOCK, TURN) and info.st_size == 0
    return stat.S_ISREG(info.st_mode) and (is_lock or path == scratch_of(base / JOURNAL))


def write_journal(
    base: Path, request: str, *, durable: bool = True, resumable: bool = True
) -> None:
    """Write the journal of ``base``: its name, the request, and whether a run can resume it."""
    head = json.dumps({_NAME: base.name, _RESUMABLE: resumable})
    write_file_atomic(base / JOURNAL, f"{head}\n{request}".encode(), durable=durable)


def read_journal(base: Path) -> tuple[str, bool] | None:
    """Return the request of ``base`` and whether a run can resume it; None if it is not ours.

    Raises:
        FileNotFoundError: the journal does not exist.
    """
    journal = base / JOURNAL
    info = os.lstat(journal)
    if not stat.S_ISREG(info.st_mode) or info.st_size > _MOST_BYTES:
        return None
    try:
        head, _, request = journal.read_bytes().decode().partition("\n")
        facts = json.loads(head)
    except (ValueError, RecursionError):
        return None
    is_ours = isinstance(facts, dict) and facts.get(_NAME) == base.name
    return (request, facts.get(_RESUMABLE) is not False) if is_ours else None


def request_in(base: Path) -> str | None:
    """Return the request of ``base``, if it has one."""
    with suppress(FileNotFoundError):
        found = read_journal(base)
        return found and found[0]
    return None


def is_resumable(base: Path) -> bool:
    """Return whether a later run can resume the work in ``base``."""
    with suppress(FileNotFoundError):
        found = read_journal(base)
        return found is not None and found[1]
    return False


def remove(base: Path) -> None:
    """Remove ``base``; the proof of ownership goes last, so that a kill does not matter."""
    with suppress(OSError):
        for entry in sorted(base.iterdir()):
            if entry.name not in _LAST:
                delete(entry)
        for name in _LAST:
            (base / name).unlink(missing_ok=True)
        base.rmdir()


# --- Places


@contextmanager
def os_errors_as(what: str) -> Iterator[None]:
    """Convert ``OSError``s raised inside into ``StorageError(what)``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        raise StorageError(
            f"{what}: {error.strerror}. "
            + (MEND_THE_DISK if full else "Choose another destination, or mend this one.")
        ) from error


def real_place(destination: Path) -> Path:
    """Return the real path of ``destination``, links followed.

    Raises:
        LayoutError: it is the root of the disk, or a remote store.
    """
    refuse_remote(destination)
    real = Path(os.path.realpath(destination))
    if not real.name:
        raise LayoutError(f"{destination} cannot be replaced. Choose another destination.")
    return real


def staging_folder(destination: Path) -> Path:
    """Return the staging directory of ``destination``, an absolute path."""
    return destination.with_name(f".{destination.name}.partial")


def is_unfinished(path: Path) -> bool:
    """Return whether ``path`` is, or is in, a result that is not yet published."""
    at = Path(os.path.abspath(path))
    return any(
        place.name.endswith(".partial") and (place / LOCK).exists() for place in (at, *at.parents)
    )


# --- Locks


def open_lock(path: Path) -> int:
    """Open or create the lock file at ``path``; links are not followed."""
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def lock(descriptor: int, kind: int, *, wait: bool = False) -> bool:
    """Lock an open file; False if another process has it. The lock ends with the process.

    Raises:
        StorageError: the filesystem does not support file locks.
    """
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise StorageError(
            f"the filesystem does not support file locks ({error.strerror}), which keep "
            "two writers apart. Mount it with locks (NFS 4; Lustre: -o flock), or write to another "
            "disk."
        ) from error
    return True


def is_same(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def in_use(destination: Path) -> StorageError:
    """Return the error for a destination that another process is writing."""
    return StorageError(
        f"another process is writing {destination}. Wait for it, or choose another destination."
    )


def other_request(base: Path) -> LayoutError:
    """Return the error for work in ``base`` that was requested otherwise."""
    return LayoutError(
        f"{base} is from another conversion, or its source has changed since. "
        f"Repeat that one exactly, or discard it with {OVERWRITE}."
    )


# --- Finished files


def record_finished(journal: Path, path: str, num_bytes: int, *, durable: bool) -> None:
    """Add a line to ``journal``: the file at ``path`` is complete. Safe from several threads."""
    with os_errors_as(f"{journal} cannot be written"), _RECORDING:
        identity = [*identity_of_file(journal.parent / FILES / path), "" if durable else _boot()]
        with open(journal, "a", encoding="utf-8") as lines:
            lines.write(json.dumps([path, num_bytes, identity]) + "\n")
            lines.flush()
            if durable:
                os.fsync(lines.fileno())


def read_finished(journal: Path, files: Path) -> dict[str, int]:
    """Return the finished files that are unchanged since; a torn last line does not count."""
    found: dict[str, int] = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        try:
            name, num_bytes, (*identity, boot) = json.loads(line)
            if identity == identity_of_file(files / name) and boot in ("", _boot()):
                found[name] = num_bytes
        except (ValueError, TypeError, OSError):
            continue
    return found


def identity_of_file(path: Path) -> list[int]:
    """Return size, time and inode, which differ after a file was replaced or rewritten."""
    info = path.stat()
    return [info.st_size, info.st_mtime_ns, info.st_ino]


def _boot() -> str:
    """Return the boot id: files that were never flushed survive at most until a reboot."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"


def remove_others(files: Path, finished: Container[str]) -> None:
    """Remove unfinished files, because the disk may need their space."""
    for folder, _, names in os.walk(files):
        for name in names:
            path = Path(folder, name)
            if path.relative_to(files).as_posix() not in finished:
                path.unlink()


def sync(path: Path) -> None:
    """Wait until ``path``, a file or a folder, is on the disk."""
    with os_errors_as(f"{path} cannot be put on the disk"):
        fsync_path(path)
