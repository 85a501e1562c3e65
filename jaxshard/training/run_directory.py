"""The run directory: paths, locks and small files.

    output/checkpoint …, output/strategy      files of the steps: see ``records``
    output/.jaxshard/1_10.json                record of a step: see ``records``
    output/.jaxshard/1_10.saving/             staging directory of a step, laid out as ``output``
    output/.jaxshard/rollback-llama.json      return to an earlier step, until the next save
    output/.jaxshard/strategy-5e1f…/          strategy files, one folder for each layout
    output/.jaxshard/removed/                 folders being deleted

The folder ``.jaxshard`` is hidden, so other readers ignore it. Foreign files in it are neither
read nor removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError, StorageError
from ..formats.rank_names import rank_of_folder
from ..storage.fs import fsync_dir, write_file_atomic
from . import records
from .records import Record, Rollback, StepName

_ITERATION = re.compile(r"iteration_\d+")
WAIT_S = 10.0  # for another writer: the previous job may be about to end
_POLL_S = 0.02
_READER = b"a reader that tidies up"  # older versions compare it


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run's directory.

    Attributes:
        root: paths in records are relative to it.
        main: the folder of the steps, below ``root``; empty if ``root`` is a foreign folder of
            steps itself.
    """

    root: Path
    main: str = records.CHECKPOINT

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> RunDirectory:
        """Return the run of ``directory``, which may be its ``checkpoint`` folder."""
        root = Path(os.path.abspath(directory))
        if (root / records.CHECKPOINT).is_dir() or (root / records.FOLDER).is_dir():
            return cls(root)
        if root.name == records.CHECKPOINT and (root.parent / records.FOLDER).is_dir():
            return cls(root.parent)
        with suppress(OSError):
            names = os.listdir(root)
            if any(rank_of_folder(n) is not None or _ITERATION.fullmatch(n) for n in names):
                return cls(root, "")
        return cls(root)

    @property
    def steps(self) -> Path:
        """The folder of the steps."""
        return self.root / self.main

    @property
    def own(self) -> Path:
        """The folder ``.jaxshard``."""
        return self.root / records.FOLDER

    def record(self, step: StepName, state: str = records.WHOLE) -> Path:
        """Return the path of the record of ``step`` in a state."""
        return self.own / f"{step}{state}"

    def staging(self, step: StepName) -> Path:
        """Return the staging directory of ``step``."""
        return self.own / f"{step}.saving"

    @property
    def strategies(self) -> tuple[Path, ...]:
        """Folders that may hold the strategy files of a run without records."""
        return (self.root / records.STRATEGY, self.steps / records.STRATEGY) + (
            () if self.main else (self.root.parent / records.STRATEGY,)
        )


def names_in(run: RunDirectory, ending: str) -> list[StepName]:
    """Return the steps with an entry in ``.jaxshard`` that ends in ``ending``.

    Raises:
        OSError: the folder cannot be listed.
    """
    try:
        entries = os.listdir(run.own)
    except (FileNotFoundError, NotADirectoryError):
        return []
    stems = (entry.removesuffix(ending) for entry in entries if entry.endswith(ending))
    found = ((stem, records.parse_step(stem)) for stem in stems)
    return sorted(step for stem, step in found if step and str(step) == stem)


def read_record(run: RunDirectory, step: StepName, state: str = records.WHOLE) -> Record:
    """Read the record of ``step`` in a state.

    Raises:
        FileNotFoundError: no such record.
        FormatError: it is damaged, or another step's.
        Unreadable: the disk refuses.
    """
    path = run.record(step, state)
    name = f"{records.FOLDER}/{path.name}"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would never end
            raise Unreadable(f"{name} is not a file. Move it away.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(f"{name} cannot be read: {error.strerror}.") from error
    record = records.from_bytes(data, name)
    if record.step != step:
        raise FormatError(f"{name} is the record of step {record.step}.")
    return record


def rollbacks_in(run: RunDirectory) -> list[Rollback]:
    """Return the rollbacks after which nothing has been saved; damaged files are ignored.

    Raises:
        OSError: the folder cannot be listed.
    """
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in filter(records.is_rollback_file, sorted(os.listdir(run.own))):
            with suppress(OSError, FormatError):
                found.append(Rollback.from_bytes((run.own / name).read_bytes(), name))
    return found


class Unreadable(FormatError):
    """Record that may be intact, but cannot be read now: nothing may be deleted for it."""


_held: set[int] = set()  # descriptors of locks


def _close_in_child() -> None:
    """Close the locks in a forked process: a copy that stays open would keep the lock."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def writer_lock(
    run: RunDirectory, *, durable: bool = False, is_reader: bool = False
) -> Iterator[None]:
    """Hold the exclusive lock of the directory.

    Args:
        run: the run's directory.
        durable: fsync a new folder for the lock.
        is_reader: the caller only recovers before it reads. It does not wait for a writer, and
            writers wait for it without a limit. They wait ``WAIT_S`` for another writer.

    Raises:
        StorageError: another process holds the lock, or the lock cannot be created.
    """
    descriptor = _opened_lock(run, durable=durable)
    _held.add(descriptor)
    try:
        _lock(run, descriptor, 0 if is_reader else WAIT_S)
        _sign(descriptor, _READER if is_reader else b"")
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked copy would keep it
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def _opened_lock(run: RunDirectory, *, durable: bool) -> int:
    try:
        if run.own.is_symlink():
            raise StorageError(
                f"{run.own} is a link, and jaxshard writes and deletes files in it. Replace it "
                "by a folder, or pass the directory that it points to."
            )
        make_folder(run.own, durable=durable)
        return os.open(run.own / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        at = error.filename or run.own
        raise StorageError(f"{at} cannot be created or opened: {error.strerror}.") from error


def _sign(descriptor: int, text: bytes) -> None:
    """Write the kind of process that holds the lock into it."""
    with suppress(OSError):  # on a full disk, writers wait for a reader as for a writer
        if os.fstat(descriptor).st_size != len(text):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text, 0)


def _lock(run: RunDirectory, descriptor: int, wait_s: float) -> None:
    try:
        has_it = _locked(descriptor, wait_s)
    except OSError as error:
        raise StorageError(
            f"{run.own} cannot be locked: {error.strerror}. Its filesystem has no locks, so "
            "two writers could overwrite each other. Save on a filesystem with locks."
        ) from error
    if not has_it:
        raise StorageError(
            f"another writer is at work in {run.root}. Wait for it, or save elsewhere."
        )


def _locked(descriptor: int, wait_s: float) -> bool:
    """Return True if the lock was acquired within ``wait_s`` seconds of other writers."""
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_reader = wait_s and os.pread(descriptor, len(_READER), 0) == _READER
            if time.monotonic() >= until and not is_reader:
                return False
            time.sleep(_POLL_S)
        else:
            return True


def check_units(run: RunDirectory, units: Iterable[str], below: Path | None = None) -> None:
    """Refuse units outside of the directory, through a link, or on another filesystem.

    Args:
        run: the run's directory.
        units: paths relative to it.
        below: the folder that they are relative to instead.

    Raises:
        StorageError: there are such units.
    """
    root = Path(os.path.realpath(run.root))
    for parent in sorted({os.path.dirname(unit) for unit in units}):
        at = (below or run.root) / parent
        while not os.path.lexists(at):
            at = at.parent
        real = Path(os.path.realpath(at))
        if not real.is_relative_to(root):
            raise StorageError(
                f"{at} leads to {real}, outside of {root}. Pass the directory itself instead "
                "of a link to it."
            )
        if not real.is_dir():
            raise StorageError(f"{at} is not a folder. Move it away.")
        if run.own.is_dir() and real.stat().st_dev != run.own.stat().st_dev:
            raise StorageError(
                f"{at} is on another disk than {run.own}, and a step is renamed into "
                "place. Save in a directory that is on one disk."
            )


def make_folder(path: Path, *, durable: bool) -> None:
    """Create the folder ``path`` and its parents, unless they exist.

    Raises:
        OSError: the disk refuses.
    """
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    if durable:
        for place in missing:
            sync_folder(place.parent)


def replace_file(path: Path, data: bytes, *, durable: bool) -> None:
    """Write ``data`` to ``path`` atomically, and create its parents.

    Raises:
        OSError: the disk refuses.
    """
    make_folder(path.parent, durable=durable)
    write_file_atomic(path, data, durable=durable)


sync_folder = fsync_dir
