"""Transactions: a staging directory that is published by one rename.

    out/                      does not exist, or is the previous result, whole
    .out.partial/             see ``staging``
        journal.json          what is being made, from which files
        finished              a line for each file that is complete and on the disk
        files/                the result so far
        before                with --overwrite: the files at ``out`` when the run began
        placing               the folder that is about to be renamed
        replaced/             the old result, if the filesystem cannot exchange two names
        removing              the part of the old result that is being removed

A crash at any instant leaves ``out`` as it was. Publishing renames ``files`` to ``out``, and
never replaces what appeared there meanwhile. An old result is exchanged with the new one, and
checked again before it is removed: if it is more than a result, or changed since the run began,
the two are exchanged back. Then the rest is removed.
A result names its request in an extended attribute, so that a run which is resumed after the end
finds that nothing is left to do.
Readers ignore ``.out.partial``, which is hidden and has no checkpoint at its top.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OVERWRITE, RESUME, LayoutError, StorageError
from . import staging
from .fs import delete, exchange, is_mount_point, publish_new, write_file_atomic
from .staging import (
    FILES,
    JOURNAL,
    LOCK,
    PLACING,
    identity_of_file,
    in_use,
    is_same,
    lock,
    open_lock,
    os_errors_as,
    other_request,
    read_finished,
    real_place,
    record_finished,
    remove_others,
    request_in,
    staging_folder,
    sync,
)

if TYPE_CHECKING:  # imports all formats
    from .overwrite import Kind

_FINISHED, _BEFORE, _REPLACED, _REMOVING = "finished", "before", "replaced", "removing"
_MADE_FROM = "user.jaxshard.made_from"  # an extended attribute of the result
_CLAIMS = (_FINISHED, PLACING)
_FOLDERS = ("checkpoint", "strategies", "own")  # kinds of results that are folders


class Transaction:
    """A result that is being made, and appears at once or not at all.

    Attributes:
        files: the folder to write into, which is published.
        finished: the files that an earlier, interrupted run completed, with their sizes.
        published: whether that run published the result too; nothing is left to do.
        durable: whether a file is on the disk before it counts as finished.
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
        kind: Kind | None = None,
        resumable: bool = True,
    ) -> None:
        """Begin or resume the making of ``destination``.

        Args:
            destination: the folder to publish as; with ``only``, the file.
            request: a text that two runs share if and only if they make the same result.
            resume: continue an interrupted run of the same request, if there is one.
            overwrite: replace an existing result, and discard an interrupted run.
            durable: flush every file to the disk before it counts as finished.
            only: publish this file of the result instead of its folder.
            kind: the kind of result, which decides what it may replace (see ``overwrite``).
            resumable: a later run of the same request can continue after an interruption, and
                finds a published result done; otherwise an interrupted run is discarded.

        Raises:
            LayoutError: the destination exists, or an interrupted run or another program left
                files there.
            StorageError: another run is writing there, or the disk fails.
        """
        self._destination = destination = real_place(destination)
        self.durable, self.finished, self.published = durable, dict[str, int](), False
        self._request, self._overwrite, self._resumable = request, overwrite, resumable
        self._kind: Kind = kind or ("weight file" if only else "checkpoint")
        self._lock = -1
        self._base = staging_folder(destination)
        self.files = self._base / FILES
        self._made = self.files / only if only else self.files
        with os_errors_as(f"{self._base} cannot be made"):
            if not os.path.lexists(self._base):
                self.published = resumable and resume and was_made_from(destination, request)
                if self.published:
                    return
                self._refuse_existing()
            self._lock = self._take_lock()
            try:
                self._enter(resume)
            except BaseException:
                self.abandon()
                raise

    def finish(self, path: str, num_bytes: int) -> None:
        """Record that the file at ``path`` is complete, after flushing it to the disk."""
        self.sync(self.files / path)
        record_finished(self._base / _FINISHED, path, num_bytes, durable=self.durable)

    def publish(self, last: Callable[[], None] | None = None) -> bool:
        """Rename the result to its destination in one step; return True.

        ``last`` is called just before, and writes the files that are not in the plan.

        Raises:
            LayoutError: a file appeared at the destination meanwhile, and is kept.
            StorageError: the disk failed.
        """
        if last is not None:
            last()
        place(
            self._base,
            self._destination,
            durable=self.durable,
            made=self._made,
            kind=self._kind,
            overwrite=self._overwrite,
        )
        self._remove()
        return True

    def abandon(self) -> None:
        """Stop; keep finished files for a later run to resume, or remove everything."""
        if self._lock < 0:
            return
        if has_work(self._base) or holds_replaced(self._base):
            self._release()
        else:
            self._remove()

    def _refuse_existing(self) -> None:
        refuse_existing(self._destination, self._overwrite, kind=self._kind)

    def _enter(self, resume: bool) -> None:
        """Complete what an earlier run left, and begin or resume."""
        settle(self._base, self._destination)
        can_be_done = self._resumable and (resume or not self._overwrite)
        if can_be_done and is_done(self._base, self._destination, self._request):
            self.published = True
            self._remove()
            return
        self._refuse_existing()
        if has_work(self._base) and self._goes_on(resume):
            self.files.mkdir(exist_ok=True)
            self.finished = read_finished(self._base / _FINISHED, self.files)
            remove_others(self.files, self.finished)
        else:
            begin(self._base, self._request, self.durable, self._resumable)
        if self._overwrite:
            note_before(self._base, self._destination, kind=self._kind, durable=self.durable)

    def _goes_on(self, resume: bool) -> bool:
        """Return whether to resume the interrupted run; False discards it.

        Raises:
            LayoutError: neither was requested.
        """
        is_same = request_in(self._base) == self._request
        if self._overwrite or (is_same and resume):
            return is_same and resume
        if not self._resumable:
            raise LayoutError(
                f"an interrupted conversion left {self._base}. Finish that one with --resume, or "
                f"discard it with {OVERWRITE}."
            )
        if resume:
            raise other_request(self._base)
        raise LayoutError(
            f"an interrupted run left {self._base}. Go on with {RESUME}, or discard it with "
            f"{OVERWRITE}."
        )

    def _take_lock(self) -> int:
        path = self._base / LOCK
        while True:
            staging.claim(self._base)
            try:
                descriptor = open_lock(path)
            except FileNotFoundError:  # removed since, by its own run
                continue
            if not lock(descriptor, fcntl.LOCK_EX):
                os.close(descriptor)
                raise in_use(self._destination)
            if is_same(descriptor, path):
                return descriptor
            os.close(descriptor)  # it belongs to a run that has just ended

    def sync(self, path: Path) -> None:
        """Flush ``path`` to the disk, if the result has to be durable."""
        if self.durable:
            sync(path)

    def _remove(self) -> None:
        remove_base(self._base)
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


# --- Steps that several processes with one result share


def refuse_existing(destination: Path, overwrite: bool, *, kind: Kind = "checkpoint") -> None:
    """Check that a result of ``kind`` may be published at ``destination``.

    Raises:
        LayoutError: it exists, is not empty, and may not be replaced, or it cannot be.
    """
    if not os.path.lexists(destination):
        return
    if is_mount_point(destination):
        raise LayoutError(
            f"{destination} is a mount point, and a result is published by renaming a folder to "
            f"its name, which a mount point's cannot be. Use {destination / 'result'}."
        )
    if kind in _FOLDERS and destination.is_dir() and not any(destination.iterdir()):
        return
    if not overwrite:
        raise LayoutError(
            f"{destination} exists. Choose another destination, or replace it with {OVERWRITE}."
        )
    refuse_other(kind, destination, destination)


def refuse_other(kind: Kind, found: Path, destination: Path) -> None:
    """Check that a result of ``kind`` may replace ``found``, which is or was at ``destination``.

    Raises:
        LayoutError: it may not.
    """
    from . import overwrite as replacing  # noqa: PLC0415 - imports all formats

    replacing.refuse_other(kind, found, destination)


def has_work(base: Path) -> bool:
    """Return whether ``base`` has finished, unpublished files that a run can resume from."""
    there_is = (base / _FINISHED).exists() or any(base.glob("*.journal"))
    return there_is and staging.is_resumable(base) and not was_placed(base)


def begin(base: Path, request: str, durable: bool, resumable: bool = True) -> None:
    """Empty ``base`` except for its locks, and prepare it for ``request``."""
    left = [e for e in base.iterdir() if e.suffix != ".lock" and e.name not in (LOCK, JOURNAL)]
    # claims are removed first, so that a kill leaves none without its files
    for entry in sorted(left, key=lambda e: e.suffix != ".journal" and e.name not in _CLAIMS):
        delete(entry)
    staging.write_journal(base, request, durable=durable, resumable=resumable)
    (base / FILES).mkdir()


# --- Publishing


@dataclass(frozen=True, slots=True)
class _Placing:
    """The file or folder that is about to be renamed, its path in the base, and its kind."""

    inode: int
    mtime_ns: int
    made: str
    kind: Kind


def place(
    base: Path,
    destination: Path,
    *,
    durable: bool,
    made: Path | None = None,
    kind: Kind = "checkpoint",
    overwrite: bool = False,
) -> None:
    """Rename ``base/files``, or ``made`` in it, to ``destination`` in one step.

    Raises:
        LayoutError: the destination may not be replaced, and is still there.
        StorageError: the disk failed; the files are where they were.
    """
    files, made = base / FILES, made or base / FILES
    with os_errors_as(f"{destination} cannot be published (the finished files are in {files})"):
        if staging.is_resumable(base):
            _note_request(made, request_in(base) or "")
        if durable:
            for folder, _, _ in os.walk(files):
                sync(Path(folder))
        placing = _Placing(*_identity_of(made), made.relative_to(base).as_posix(), kind)
        (base / PLACING).write_text(json.dumps(asdict(placing)))
        if durable:
            sync(base / PLACING)
            sync(base)
        try:
            _swap(base, made, destination, kind if overwrite else None)
        except FileExistsError:
            raise LayoutError(
                f"{destination} appeared while the result was being made, and is kept. Move it "
                f"away, or replace it with {OVERWRITE}, and run again."
            ) from None
        if durable:
            sync(destination.parent)
        settle(base, destination)


def _swap(base: Path, new: Path, place: Path, kind: Kind | None) -> None:
    """Rename ``new`` to ``place``, exchanging it with what a result of ``kind`` may replace.

    Raises:
        FileExistsError: ``place`` exists, and nothing may be replaced.
        LayoutError: ``place`` may not be replaced.
    """
    try:
        publish_new(new, place)
    except FileExistsError:
        if kind is None:
            raise
        _refuse_replacing(base, kind, place, place)  # checked again after the exchange
        if not exchange(new, place):
            _swap_in_two_steps(base, new, place, kind)


def _swap_in_two_steps(base: Path, new: Path, place: Path, kind: Kind) -> None:
    """Replace without an exchange: for a moment ``place`` does not exist."""
    replaced = base / _REPLACED / new.name
    replaced.parent.mkdir(exist_ok=True)
    os.rename(place, replaced)
    try:
        _refuse_replacing(base, kind, replaced, place)
        publish_new(new, place)
    except BaseException:
        publish_new(replaced, place)
        raise


def note_before(base: Path, destination: Path, *, kind: Kind, durable: bool) -> None:
    """Record the files at ``destination``; only these may be replaced later."""
    if kind != "own":
        from . import overwrite as replacing  # noqa: PLC0415 - imports all formats

        files = json.dumps(replacing.files_of(destination)).encode()
        write_file_atomic(base / _BEFORE, files, durable=durable)


def _refuse_replacing(base: Path, kind: Kind, found: Path, destination: Path) -> None:
    """Check that ``found`` is a result, and unchanged since the run began.

    Raises:
        LayoutError: it is not.
    """
    refuse_other(kind, found, destination)
    if kind != "own":
        from . import overwrite as replacing  # noqa: PLC0415 - imports all formats

        try:
            before = json.loads((base / _BEFORE).read_bytes())
        except (FileNotFoundError, ValueError):  # lost in a power failure: names decide
            return
        replacing.refuse_changed(before, found, destination)


def settle(base: Path, destination: Path) -> None:
    """Complete a publication: remove the replaced result, or put it back.

    The replaced result is checked under its new name, where no other program changes it. A kill
    may come before that, so every run begins with this function.

    Raises:
        LayoutError: the replaced files are more than a result, and were put back.
        StorageError: they cannot be put back.
    """
    placing = _read_placing(base)
    if placing and _is_linked(base / placing.made, destination):
        os.unlink(base / placing.made)  # published by a link, and killed before this
    for replaced in (base / _REPLACED).glob("*"):
        _settle_two_steps(base, replaced, destination)
    if placing is None or not was_placed(base):
        return
    replaced = base / placing.made
    if os.path.lexists(replaced):
        try:
            _refuse_replacing(base, placing.kind, replaced, destination)
        except LayoutError:
            _bring_back(replaced, destination)
            raise
        delete(base / _REMOVING)
        os.rename(replaced, base / _REMOVING)
    with suppress(OSError):  # the result is published; leftovers are not a reason to fail
        delete(base / _REMOVING)


def _is_linked(made: Path, destination: Path) -> bool:
    """Return whether ``made`` and ``destination`` are links to one file."""
    return made.is_file() and _identity_of(made) == _identity_of(destination)


def _settle_two_steps(base: Path, replaced: Path, destination: Path) -> None:
    if was_placed(base):  # it was checked before
        delete(base / _REMOVING)
        os.rename(replaced, base / _REMOVING)
        return
    try:
        publish_new(replaced, destination)
    except FileExistsError:
        raise StorageError(
            f"{destination} exists, and its previous content is in {replaced}, because a run was "
            "killed while replacing it. Move one of them away, then run again."
        ) from None


def _bring_back(replaced: Path, destination: Path) -> None:
    """Exchange the replaced files and the result back."""
    try:
        if exchange(replaced, destination):
            return
    except FileNotFoundError:  # the result was moved away since
        pass
    try:
        publish_new(replaced, destination)
    except OSError as error:
        raise StorageError(
            f"{destination} was replaced although it held more than a result, and cannot be put "
            f"back ({error.strerror}). Move it back from {replaced}."
        ) from error


def remove_base(base: Path) -> None:
    """Remove ``base``; the record of a publication is removed last."""
    if not was_placed(base):
        (base / PLACING).unlink(missing_ok=True)
    staging.remove(base)


def holds_replaced(base: Path) -> bool:
    """Return whether ``base`` has a replaced result that was not checked since."""
    placing = _read_placing(base)
    taken_out = placing and was_placed(base) and os.path.lexists(base / placing.made)
    return bool(taken_out) or any((base / _REPLACED).glob("*"))


def was_placed(base: Path) -> bool:
    """Return whether the result in ``base`` was renamed, and only the cleanup is left.

    The old result is in its place then, and must not be taken for the new one.
    """
    placing = _read_placing(base)
    return placing is not None and _identity_of(base / placing.made)[0] != placing.inode


def is_done(base: Path, destination: Path, request: str) -> bool:
    """Return whether an earlier run of ``request`` published and was killed during cleanup."""
    return was_published(base, destination, request) or (
        not has_work(base) and was_made_from(destination, request)
    )


def was_published(base: Path, destination: Path, request: str) -> bool:
    """Return whether an earlier run of ``request`` in ``base`` made ``destination``."""
    placing = _read_placing(base)
    return (
        placing is not None
        and (placing.inode, placing.mtime_ns) == _identity_of(destination)
        and request_in(base) == request
    )


def _note_request(made: Path, request: str) -> None:
    """Store the request in an extended attribute of the result, if the filesystem has them."""
    with suppress(OSError, AttributeError):  # only Linux has them
        os.setxattr(made, _MADE_FROM, _digest(made, request))


def was_made_from(destination: Path, request: str) -> bool:
    """Return whether ``destination`` has the attribute of ``request``, and is unchanged since."""
    with suppress(OSError, AttributeError):
        return os.getxattr(destination, _MADE_FROM) == _digest(destination, request)
    return False


def _digest(result: Path, request: str) -> bytes:
    """Return a digest of ``request`` and of the size, time and inode of the files of ``result``."""
    digest = hashlib.sha256(request.encode())
    for path in sorted([result] if result.is_file() else filter(Path.is_file, result.rglob("*"))):
        name = path.relative_to(result).as_posix()
        digest.update(repr((name, identity_of_file(path))).encode())
    return digest.hexdigest().encode()


def _identity_of(path: Path) -> tuple[int, int]:
    """Return inode and time of ``path``, because inode numbers are reused; zeros if absent."""
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    return info.st_ino, info.st_mtime_ns


def _read_placing(base: Path) -> _Placing | None:
    """Return the record of a publication; None if absent or torn, because nothing moved then."""
    try:
        return _Placing(**json.loads((base / PLACING).read_text()))
    except (OSError, ValueError, TypeError):
        return None
