"""Ownership of staging directories.

    .out.partial/
        lock            the first thing that is made in it, empty
        journal.json    its first line names the folder; what is being made follows

Ours is a folder (not a link to one) that this user owns and whose journal names it. The journal
is written before any other content and removed after it, so a kill leaves a folder with a journal,
or one that holds nothing but empty locks. Anything else belongs to another program, and is
neither written into nor deleted.
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
from .places import refuse_remote

FILES = "files"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RECORDING = threading.Lock()
JOURNAL, LOCK, TURN, PLACING = "journal.json", "lock", "turn.lock", "placing"
_LAST = (PLACING, JOURNAL, TURN, LOCK)  # what tells that the folder is ours goes in this order
_NAME, _RESUMABLE = "jaxshard", "resumable"
_MOST_BYTES = 64 << 20  # a journal of ours is far smaller


def claim(base: Path) -> None:
    """Have a staging folder of ours at ``base``: a new one, or what an earlier run left.

    Raises:
        LayoutError: what lies there is not ours.
        OSError: the disk refused.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with suppress(FileExistsError):
            os.mkdir(base)
            return
        with suppress(FileNotFoundError):  # removed since, by the run that it was of: make it
            refuse_others(base)
            return


def refuse_others(base: Path) -> None:
    """Refuse what lies at ``base`` unless it is a staging folder that this user made.

    Raises:
        LayoutError: with what is there.
        FileNotFoundError: nothing lies there.
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
    """Which user owns what is made in ``folder``: NFS may map root to another one."""
    import tempfile  # noqa: PLC0415 - seldom needed

    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid


def _is_first(path: Path, base: Path) -> bool:
    """Whether ``path`` may be there before the journal: an empty lock, or the journal's scratch."""
    info = os.lstat(path)
    is_lock = path.name in (LOCK, TURN) and info.st_size == 0
    return stat.S_ISREG(info.st_mode) and (is_lock or path == scratch_of(base / JOURNAL))


def write_journal(
    base: Path, request: str, *, durable: bool = True, resumable: bool = True
) -> None:
    """Note in ``base`` that it is ours, what is being made, and whether a later run can go on."""
    head = json.dumps({_NAME: base.name, _RESUMABLE: resumable})
    write_file_atomic(base / JOURNAL, f"{head}\n{request}".encode(), durable=durable)


def read_journal(base: Path) -> tuple[str, bool] | None:
    """What is being made in ``base``, and whether a later run can go on; None: it is not ours.

    Raises:
        FileNotFoundError: there is no journal.
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
    """What is being made in ``base``, if anything."""
    with suppress(FileNotFoundError):
        found = read_journal(base)
        return found and found[0]
    return None


def is_resumable(base: Path) -> bool:
    """Whether a later run can go on with what is being made in ``base``."""
    with suppress(FileNotFoundError):
        found = read_journal(base)
        return found is not None and found[1]
    return False


def remove(base: Path) -> None:
    """Remove ``base``, which is ours; what tells so goes last, that a kill changes nothing."""
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
    """The disk's refusals inside, as an error that says ``what`` failed."""
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
    """Where ``destination`` is, links followed.

    Raises:
        LayoutError: it is the root of the disk, or a remote store.
    """
    refuse_remote(destination)
    real = Path(os.path.realpath(destination))
    if not real.name:
        raise LayoutError(f"{destination} cannot be replaced. Choose another destination.")
    return real


def staging_folder(destination: Path) -> Path:
    """Where ``destination`` (an absolute path) is made."""
    return destination.with_name(f".{destination.name}.partial")


def is_unfinished(path: Path) -> bool:
    """Whether ``path`` is a result in the making, or lies in one: no checkpoint yet."""
    at = Path(os.path.abspath(path))
    return any(
        place.name.endswith(".partial") and (place / LOCK).exists() for place in (at, *at.parents)
    )


# --- Locks


def open_lock(path: Path) -> int:
    """Open the lock file at ``path``, made if need be; links are not followed."""
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def lock(descriptor: int, kind: int, *, wait: bool = False) -> bool:
    """Lock an open file; False if another process has it. The lock goes with the process.

    Raises:
        StorageError: this disk has no locks.
    """
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise StorageError(
            f"the disk locks no files ({error.strerror}), so nothing keeps two writers apart. "
            "Mount it with locks (NFS 4; Lustre: -o flock), or write to another disk."
        ) from error
    return True


def is_same(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``, and not one that was removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def in_use(destination: Path) -> StorageError:
    """What is said to whoever comes second."""
    return StorageError(
        f"another process is writing {destination}. Wait for it, or choose another destination."
    )


def other_request(base: Path) -> LayoutError:
    """What is said where the work in ``base`` is not the work asked for."""
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
    """Finished files that nobody has touched since; a torn last line is no promise."""
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
    """What a finished file is known by: one that was exchanged or written again is another."""
    info = path.stat()
    return [info.st_size, info.st_mtime_ns, info.st_ino]


def _boot() -> str:
    """What stays until the machine is started again: files never put on the disk may too."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"


def remove_others(files: Path, finished: Container[str]) -> None:
    """Remove what was not finished: its room may be what the disk lacks."""
    for folder, _, names in os.walk(files):
        for name in names:
            path = Path(folder, name)
            if path.relative_to(files).as_posix() not in finished:
                path.unlink()


def sync(path: Path) -> None:
    """Wait until ``path``, a file or a folder, is on the disk."""
    with os_errors_as(f"{path} cannot be put on the disk"):
        fsync_path(path)
