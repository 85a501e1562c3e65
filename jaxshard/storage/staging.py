"""Staging: a result is written beside its place and published by one rename.

    out/                      does not exist, or is the previous result, whole
    .out.partial/
        journal.json          what is being made, from which files
        finished              a line for each file that is complete and on the disk
        files/                the result so far

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
from pathlib import Path

from ..errors import LayoutError, NotFoundError, StorageError

_FILES, _JOURNAL, _FINISHED, _LOCK = "files", "journal.json", "finished", "lock"


class Staging:
    """A result in the making.

    Attributes:
        files: the folder to write into; what lies there is published.
        finished: the files an earlier, interrupted run completed, with their sizes.
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
            resume: go on with an interrupted run of the same request.
            overwrite: replace an existing result, and discard an interrupted run.
            durable: have every file on the disk before it counts as finished.

        Raises:
            LayoutError: the destination exists, or an interrupted run lies there.
            NotFoundError: nothing to resume.
            StorageError: another run is writing there, or the disk refuses.
        """
        self._destination = destination = Path(os.path.abspath(destination))
        self._durable = durable
        self._base = destination.with_name(f".{destination.name}.partial")
        self.files = self._base / _FILES
        _refuse_existing(destination, overwrite)
        if self._base.exists() and not resume and not overwrite:
            raise LayoutError(
                f"an interrupted run left {self._base}. Go on with --resume, or discard it with "
                "--overwrite."
            )
        if resume and not overwrite and not self._base.exists():
            raise NotFoundError(
                f"there is nothing to resume at {self._base}. Run without --resume."
            )
        try:
            self._base.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self.finished = self._begin(request, resume)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{self._base} cannot be made: {error.strerror}.") from error

    def finish(self, path: str, num_bytes: int) -> None:
        """Record that the file at ``path`` is complete; it is put on the disk first."""
        self.sync(self.files / path)
        with open(self._base / _FINISHED, "a", encoding="utf-8") as journal:
            journal.write(json.dumps([path, num_bytes]) + "\n")
            journal.flush()
            if self._durable:
                os.fsync(journal.fileno())

    def publish(self) -> None:
        """Make the result visible under its name, in one step."""
        if self._durable:
            for folder, _, _ in os.walk(self.files):
                self.sync(Path(folder))
        try:
            old = _swap(self.files, self._destination)
        except OSError as error:
            raise StorageError(
                f"{self._destination} cannot be published: {error.strerror}. The finished files "
                f"are in {self.files}."
            ) from error
        self.sync(self._destination.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        self._remove()

    def abandon(self) -> None:
        """Stop. What was finished is kept for a later run to resume; otherwise all goes."""
        if (self._base / _FINISHED).exists():
            os.close(self._lock)
        else:
            self._remove()

    def _begin(self, request: str, resume: bool) -> dict[str, int]:
        journal = self._base / _JOURNAL
        if resume and journal.exists() and journal.read_text() == request:
            return self._read_finished()
        if resume and journal.exists() and (self._base / _FINISHED).exists():
            os.close(self._lock)
            raise LayoutError(
                f"{self._base} is from another conversion, or its source has changed since. "
                "Repeat that one exactly, or discard it with --overwrite."
            )
        for name in (_FILES, _FINISHED, _JOURNAL):
            _remove(self._base / name)
        self.files.mkdir()
        scratch = journal.with_suffix(".new")
        scratch.write_text(request)
        scratch.rename(journal)
        return {}

    def _read_finished(self) -> dict[str, int]:
        """Finished files that are still there with their size; a torn last line is no promise."""
        found: dict[str, int] = {}
        path = self._base / _FINISHED
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                name, num_bytes = json.loads(line)
                if (self.files / name).stat().st_size == num_bytes:
                    found[name] = num_bytes
            except (ValueError, OSError):
                continue
        self.files.mkdir(exist_ok=True)
        return found

    def _take_lock(self) -> int:
        descriptor = os.open(self._base / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _remove(self) -> None:
        shutil.rmtree(self._base, ignore_errors=True)
        os.close(self._lock)


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


def _swap(new: Path, place: Path) -> Path | None:
    """Put ``new`` at ``place`` at once; where the previous content of ``place`` now is."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        os.rename(new, place)
        return None
    if _exchange(new, place):
        return new
    aside = new.with_name("replaced")  # a file system without exchange: two steps, nothing lost
    os.rename(place, aside)
    os.rename(new, place)
    return aside


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
    """Whether ``path`` is a result in the making, or its files: no checkpoint yet."""
    return any(
        (place / _JOURNAL).exists() and (place / _FILES).is_dir() for place in (path, path.parent)
    )
