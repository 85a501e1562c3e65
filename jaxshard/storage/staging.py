"""Staging: a result is written beside its place and published by one rename.

    out/                      does not exist, or is the previous result, whole
    .out.partial/
        journal.json          what is being made, from which files
        finished              a line for each file that is complete and on the disk
        files/                the result so far
        publishing            while files is renamed: which folder it is

A crash at any instant leaves ``out`` as it was. Publishing renames ``files`` to
``out`` (exchanging the two when an old result is replaced), then removes the rest.
Readers pass ``.out.partial`` by: it is hidden and has no checkpoint at its top.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LayoutError, StorageError

_FILES, _JOURNAL, _FINISHED, _LOCK = "files", "journal.json", "finished", "lock"
_PUBLISHING, _REPLACED = "publishing", "replaced"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Staging:
    """A result in the making.

    Attributes:
        files: the folder to write into; what lies there is published.
        finished: the files an earlier, interrupted run completed.
        published: whether that run had even published the result; nothing is left to do.
    """

    def __init__(
        self,
        destination: Path,
        request: str,
        *,
        resume: bool = False,
        overwrite: bool = False,
        durable: bool = True,
    ) -> None:
        """Begin, or go on with, the making of ``destination``.

        Args:
            destination: the folder to publish as.
            request: a text that two runs share exactly if they make the same result.
            resume: go on with an interrupted run of the same request, if there is one.
            overwrite: replace an existing result, and discard an interrupted run.
            durable: have every file on the disk before it counts as finished.

        Raises:
            LayoutError: the destination exists, or an interrupted run lies there.
            StorageError: another run is writing there, or the disk refuses.
        """
        self._destination = destination = Path(os.path.realpath(destination))
        if not destination.name:
            raise LayoutError(f"{destination} cannot be replaced. Choose another destination.")
        self._request, self._durable, self._finishing = request, durable, threading.Lock()
        self._base = destination.with_name(f".{destination.name}.partial")
        self.files = self._base / _FILES
        self.finished: frozenset[str] = frozenset()
        with _told(f"{self._base} cannot be made"):
            self.published = resume and self._was_published(request)
            if not self.published:
                _refuse_existing(destination, overwrite)
            there_was = self._base.exists()
            self._base.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            try:
                if self.published:
                    self._remove()
                    return
                if there_was and not resume and not overwrite:
                    raise LayoutError(
                        f"an interrupted run left {self._base}. Go on with --resume, or discard "
                        "it with --overwrite."
                    )
                self.finished = self._begin(request, resume, overwrite)
            except BaseException:
                self._release()
                raise

    def finish(self, path: str) -> None:
        """Record that the file at ``path`` is complete; it is put on the disk first."""
        self.sync(self.files / path)
        line = json.dumps([path, *self._identity(path)]) + "\n"
        with (
            self._finishing,
            _told(f"{self._base / _FINISHED} cannot be written"),
            open(self._base / _FINISHED, "a", encoding="utf-8") as journal,
        ):
            journal.write(line)
            journal.flush()
            if self._durable:
                os.fsync(journal.fileno())

    def publish(self) -> None:
        """Make the result visible under its name, in one step."""
        with _told(
            f"{self._destination} cannot be published (the finished files are in {self.files})"
        ):
            if self._durable:
                for folder, _, _ in os.walk(self.files):
                    self.sync(Path(folder))
            (self._base / _PUBLISHING).write_text(_inode(self.files) + self._request)
            self.sync(self._base / _PUBLISHING)
            self.sync(self._base)
            _swap(self.files, self._destination)
            self.sync(self._destination.parent)
        self._remove()

    def abandon(self) -> None:
        """Stop. What was finished is kept for a later run to resume; otherwise all goes."""
        if (self._base / _FINISHED).exists() or (self._base / _REPLACED).exists():
            self._release()
        else:
            self._remove()

    def _was_published(self, request: str) -> bool:
        """Whether a run of this request ended between the renaming and the tidying up."""
        try:
            noted = (self._base / _PUBLISHING).read_text()
            return noted == _inode(self._destination) + request
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _begin(self, request: str, resume: bool, overwrite: bool) -> frozenset[str]:
        journal, replaced = self._base / _JOURNAL, self._base / _REPLACED
        if replaced.exists() and not self._destination.exists():
            replaced.rename(self._destination)  # an earlier run ended between two renames
        if resume and journal.exists():
            if journal.read_text() == request:
                return self._keep_finished()
            if (self._base / _FINISHED).exists() and not overwrite:
                raise LayoutError(
                    f"{self._base} is from another conversion, or its source has changed since. "
                    "Repeat that one exactly, or discard it with --overwrite."
                )
        for name in (_JOURNAL, _FINISHED, _PUBLISHING, _FILES):
            _remove(self._base / name)
        self.files.mkdir()
        scratch = journal.with_suffix(".new")
        scratch.write_text(request)
        scratch.rename(journal)
        return frozenset()

    def _keep_finished(self) -> frozenset[str]:
        """The files that were finished and not touched since; all others are removed."""
        finished = frozenset(self._read_finished())
        self.files.mkdir(exist_ok=True)
        for folder, _, names in os.walk(self.files):
            for name in names:
                path = Path(folder, name)
                if path.relative_to(self.files).as_posix() not in finished:
                    path.unlink()  # its room may be what the disk lacks
        return finished

    def _read_finished(self) -> Iterator[str]:
        path = self._base / _FINISHED
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                name, *identity = json.loads(line)
                if identity[:3] == self._identity(name)[:3] and identity[3] in ("", _boot()):
                    yield name
            except (ValueError, TypeError, IndexError, OSError):
                continue  # a torn last line is no promise

    def _identity(self, path: str) -> list[object]:
        """What a finished file is known by: an exchanged or rewritten one is another.

        What was not put on the disk counts only until the machine is started again.
        """
        info = (self.files / path).stat()
        return [info.st_size, info.st_mtime_ns, info.st_ino, "" if self._durable else _boot()]

    def _take_lock(self) -> int:
        path = self._base / _LOCK
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino != path.stat().st_ino:  # of a run that has just ended
                raise FileNotFoundError
        except OSError:
            os.close(descriptor)
            raise StorageError(
                f"another process is writing {self._destination}. Wait for it, or choose another "
                "destination."
            ) from None
        return descriptor

    def sync(self, path: Path) -> None:
        """Wait until ``path`` is on the disk, where the result is to be durable."""
        if self._durable:
            with _told(f"{path} cannot be put on the disk"):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def _remove(self) -> None:
        for name in (_FILES, _REPLACED):  # what says that all is published goes last
            shutil.rmtree(self._base / name, ignore_errors=True)
        shutil.rmtree(self._base, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        """Let another run take the lock; once, for the number may be another file's by then."""
        descriptor, self._lock = self._lock, -1
        if descriptor >= 0:
            os.close(descriptor)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """The disk's refusals inside, as an error that says ``what`` failed."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{what}: {error.strerror}. Make room or mend the disk, then run again with --resume."
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
            else f"{what}: {error.strerror}. Choose another destination, or mend this one."
        ) from error


def _inode(path: Path) -> str:
    info = path.stat()
    return f"{info.st_dev} {info.st_ino}\n"


def _boot() -> str:
    """What is the same until the machine is started again."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"


def _refuse_existing(destination: Path, overwrite: bool) -> None:
    if not destination.exists() or overwrite:
        return
    if destination.is_dir() and not any(destination.iterdir()):
        return
    raise LayoutError(
        f"{destination} exists. Choose another destination, or replace it with --overwrite."
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _swap(new: Path, place: Path) -> None:
    """Put ``new`` at ``place`` at once, and what was there where ``new`` was, or beside that."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        os.rename(new, place)
    elif not _exchange(new, place):  # a file system without: two steps, nothing lost
        os.rename(place, new.with_name(_REPLACED))
        os.rename(new, place)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two paths atomically (Linux ``renameat2``); False where that does not exist."""
    at_cwd, exchange = -100, 2
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if call(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code))


def is_unfinished(path: Path) -> bool:
    """Whether ``path`` is a result in the making, or lies in one: no checkpoint yet."""
    at = Path(os.path.abspath(path))
    return any(
        place.name.endswith(".partial") and (place / _LOCK).exists() for place in (at, *at.parents)
    )
