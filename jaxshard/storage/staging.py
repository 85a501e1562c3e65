"""Staging: a result is written beside its place and published by one rename.

    out/                      does not exist, or is the previous result, whole
    .out.partial/
        journal.json          what is being made, from which files
        finished              a line for each file that is complete and on the disk
        files/                the result so far
        placing               which folder is about to get its name

A crash at any instant leaves ``out`` as it was. Publishing renames ``files`` to
``out`` (exchanging the two when an old result is replaced), then removes the rest.
Readers pass ``.out.partial`` by: it is hidden and has no checkpoint at its top.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import MEND_THE_DISK, OVERWRITE, RESUME, LayoutError, StorageError
from .linux import exchange, is_mount_point

FILES, JOURNAL, LOCK = "files", "journal.json", "lock"
_FINISHED, _PLACING, _REPLACED = "finished", "placing", "replaced"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RECORDING = threading.Lock()


class Staging:
    """A result in the making.

    Attributes:
        files: the folder to write into; what lies there is published.
        finished: the files an earlier, interrupted run completed, with their sizes.
        published: whether that run had even published the result; nothing is left to do.
        durable: have every file on the disk before it counts as finished.
    """

    def __init__(
        self,
        destination: Path,
        request: str,
        *,
        resume: bool = False,
        overwrite: bool = False,
        durable: bool = True,
        only: str | None = None,
        private: bool = False,
    ) -> None:
        """Begin, or go on with, the making of ``destination``.

        Args:
            destination: the folder to publish as; with ``only``, the file.
            request: a text that two runs share exactly if they make the same result.
            resume: go on with an interrupted run of the same request, if there is one.
            overwrite: replace an existing result, and discard an interrupted run.
            durable: have every file on the disk before it counts as finished.
            only: publish this file of the result, and not the folder it is in.
            private: whatever lies at the destination is nobody's but the caller's.

        Raises:
            LayoutError: the destination exists, or an interrupted run lies there.
            StorageError: another run is writing there, or the disk refuses.
        """
        self._destination = destination = real_place(destination)
        self.durable, self.finished = durable, dict[str, int]()
        self._base = staging_folder(destination)
        self.files = self._base / FILES
        self._made = self.files / only if only else self.files
        with told(f"{self._base} cannot be made"):
            self.published = resume and was_published(self._base, destination, request)
            if not self.published:
                refuse_existing(destination, overwrite, as_file=only is not None, private=private)
            there_was = self._base.exists()
            self._base.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            try:
                if self.published:
                    self._remove()
                    return
                if there_was and not resume and not overwrite:
                    raise LayoutError(
                        f"an interrupted run left {self._base}. Go on with {RESUME}, or "
                        f"discard it with {OVERWRITE}."
                    )
                put_back(self._base, destination)
                self.finished = self._begin(request, resume, overwrite)
            except BaseException:
                self._release()
                raise

    def finish(self, path: str, num_bytes: int) -> None:
        """Record that the file at ``path`` is complete; it is put on the disk first."""
        self.sync(self.files / path)
        record_finished(self._base / _FINISHED, path, num_bytes, durable=self.durable)

    def publish(self, last: Callable[[], None] | None = None) -> bool:
        """Make the result visible under its name, in one step; True: it is there now.

        ``last`` is called just before, and writes what belongs to no file of the plan.
        """
        if last is not None:
            last()
        place(self._base, self._destination, durable=self.durable, made=self._made)
        self._remove()
        return True

    def abandon(self) -> None:
        """Stop. What was finished is kept for a later run to resume; otherwise all goes."""
        if (self._base / _FINISHED).exists() or (self._base / _REPLACED).exists():
            self._release()
        else:
            self._remove()

    def _begin(self, request: str, resume: bool, overwrite: bool) -> dict[str, int]:
        journal = self._base / JOURNAL
        if resume and journal.exists() and not was_placed(self._base, self._made):
            if journal.read_text() == request:
                self.files.mkdir(exist_ok=True)
                finished = read_finished(self._base / _FINISHED, self.files)
                _remove_others(self.files, finished)
                return finished
            if has_work(self._base) and not overwrite:
                raise other_request(self._base)
        begin(self._base, request)
        return {}

    def _take_lock(self) -> int:
        path = self._base / LOCK
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        # a lock that is no longer there is of a run that has just ended
        if not lock(descriptor, fcntl.LOCK_EX) or not is_same(descriptor, path):
            os.close(descriptor)
            raise in_use(self._destination)
        return descriptor

    def sync(self, path: Path) -> None:
        """Wait until ``path`` is on the disk, where the result is to be durable."""
        if self.durable:
            sync(path)

    def _remove(self) -> None:
        remove_base(self._base)
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


# --- the steps, which several processes that share one result take too ---------------


@contextmanager
def told(what: str) -> Iterator[None]:
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
        LayoutError: it is the root of the disk.
    """
    real = Path(os.path.realpath(destination))
    if not real.name:
        raise LayoutError(f"{destination} cannot be replaced. Choose another destination.")
    return real


def staging_folder(destination: Path) -> Path:
    """Where ``destination`` (an absolute path) is made."""
    return destination.with_name(f".{destination.name}.partial")


def refuse_existing(
    destination: Path, overwrite: bool, *, as_file: bool = False, private: bool = False
) -> None:
    """Refuse a destination that something lies at; ``as_file``, one that is to be a file.

    Raises:
        LayoutError: it exists, is not empty, and may not be replaced, or it cannot be.
    """
    if not destination.exists():
        return
    if is_mount_point(destination):
        raise LayoutError(
            f"{destination} is a mount point, and a result is published by renaming a folder to "
            f"its name, which a mount point's cannot be. Use {destination / 'result'}."
        )
    if not as_file and destination.is_dir() and not any(destination.iterdir()):
        return
    if not overwrite:
        raise LayoutError(
            f"{destination} exists. Choose another destination, or replace it with {OVERWRITE}."
        )
    if private:
        return
    from . import replacing  # noqa: PLC0415 - the formats' names, needed only here

    (replacing.refuse_other_file if as_file else replacing.refuse_foreign)(destination)


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


def has_work(base: Path) -> bool:
    """Whether a file was finished in ``base``, by a run alone or by one part of several."""
    return (base / _FINISHED).exists() or any(base.glob("*.journal"))


def begin(base: Path, request: str) -> None:
    """Make ``base`` empty but for its locks, and ready for the making of ``request``."""
    for entry in [e for e in base.iterdir() if e.suffix != ".lock" and e.name != LOCK]:
        _remove(entry)
    (base / FILES).mkdir()
    scratch = base / "journal.new"
    scratch.write_text(request)
    scratch.rename(base / JOURNAL)


def record_finished(journal: Path, path: str, num_bytes: int, *, durable: bool) -> None:
    """Add a line to ``journal``: the file at ``path`` is complete. Safe from several threads."""
    with told(f"{journal} cannot be written"), _RECORDING:
        identity = [*_identity(journal.parent / FILES / path), "" if durable else _boot()]
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
            if identity == _identity(files / name) and boot in ("", _boot()):
                found[name] = num_bytes
        except (ValueError, TypeError, OSError):
            continue
    return found


def _identity(path: Path) -> list[int]:
    """What a finished file is known by: one that was exchanged or written again is another."""
    info = path.stat()
    return [info.st_size, info.st_mtime_ns, info.st_ino]


def _boot() -> str:
    """What stays until the machine is started again: files never put on the disk may too."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"


def _remove_others(files: Path, finished: Container[str]) -> None:
    """Remove what was not finished: its room may be what the disk lacks."""
    for folder, _, names in os.walk(files):
        for name in names:
            path = Path(folder, name)
            if path.relative_to(files).as_posix() not in finished:
                path.unlink()


def sync(path: Path) -> None:
    """Wait until ``path``, a file or a folder, is on the disk."""
    with told(f"{path} cannot be put on the disk"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def place(base: Path, destination: Path, *, durable: bool, made: Path | None = None) -> None:
    """Make ``base/files``, or what of it is ``made``, the ``destination``, in one step.

    Raises:
        StorageError: the disk refused; the files are where they were.
    """
    files, made = base / FILES, made or base / FILES
    with told(f"{destination} cannot be published (the finished files are in {files})"):
        if durable:
            for folder, _, _ in os.walk(files):
                sync(Path(folder))
        (base / _PLACING).write_text(f"{made.stat().st_ino}\n{(base / JOURNAL).read_text()}")
        if durable:
            sync(base / _PLACING)
            sync(base)
        _swap(made, destination)
        if durable:
            sync(destination.parent)


def remove_files(base: Path) -> None:
    """Remove what was replaced."""
    for name in (FILES, _REPLACED):
        shutil.rmtree(base / name, ignore_errors=True)


def remove_base(base: Path) -> None:
    """Remove all of ``base``; what says that the result was published goes last."""
    remove_files(base)
    shutil.rmtree(base, ignore_errors=True)


def was_placed(base: Path, made: Path | None = None) -> bool:
    """Whether what was ``made`` in ``base`` has got its name, and only the tidying is left.

    What lies in ``files`` then is the old result, and must not be taken for the new one.
    """
    try:
        placing = (base / _PLACING).read_text().partition("\n")[0]
        return placing != "" and str((made or base / FILES).stat().st_ino) != placing
    except FileNotFoundError:
        return (base / _PLACING).exists()


def was_published(base: Path, destination: Path, request: str) -> bool:
    """Whether ``destination`` is what an earlier run of ``request`` in ``base`` made."""
    try:
        noted = (base / _PLACING).read_text()
        return noted == f"{destination.stat().st_ino}\n{request}"
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_same(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``, and not one that was removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def put_back(base: Path, destination: Path) -> None:
    """Where a result was being replaced in two steps, and only the first was done, undo it."""
    replaced = base / _REPLACED
    if replaced.exists() and not destination.exists():
        os.rename(replaced, destination)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _swap(new: Path, place: Path) -> None:
    """Put ``new`` at ``place`` at once, and what was there where ``new`` was, or beside that."""
    if new.is_file():
        os.replace(new, place)
    elif not place.exists() or (place.is_dir() and not any(place.iterdir())):
        os.rename(new, place)
    elif not exchange(new, place):  # a file system without: two steps, nothing lost
        os.rename(place, new.with_name(_REPLACED))
        os.rename(new, place)


def is_unfinished(path: Path) -> bool:
    """Whether ``path`` is a result in the making, or lies in one: no checkpoint yet."""
    at = Path(os.path.abspath(path))
    return any(
        place.name.endswith(".partial") and (place / LOCK).exists() for place in (at, *at.parents)
    )
