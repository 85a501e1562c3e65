"""Transactions: a staging directory that is published by one rename.

    out/                      does not exist, or is the previous result, whole
    .out.partial/             see ``staging``
        journal.json          what is being made, from which files
        finished              a line for each file that is complete and on the disk
        files/                the result so far
        before                with --overwrite: the files that lay at ``out`` when the run began
        placing               which folder is about to get its name
        replaced/             the old result, where the file system cannot exchange
        removing              what of the old result may go, and is going

A crash at any instant leaves ``out`` as it was. Publishing renames ``files`` to ``out``, and
never replaces what appeared there meanwhile. Where an old result is replaced the two are
exchanged, and what came out is looked at again before it goes: if it is more than a result, or
changed since the run began, they are exchanged back. Then the rest is removed.
A result names what it was made from in an extended attribute, so that a run which is resumed
after the end finds that nothing is left to do.
Readers pass ``.out.partial`` by: it is hidden and has no checkpoint at its top.
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

if TYPE_CHECKING:  # the formats' names, seldom needed
    from .overwrite import Kind

_FINISHED, _BEFORE, _REPLACED, _REMOVING = "finished", "before", "replaced", "removing"
_MADE_FROM = "user.jaxshard.made_from"  # an extended attribute of the result
_CLAIMS = (_FINISHED, PLACING)
_FOLDERS = ("checkpoint", "strategies", "own")  # the kinds of results that are folders


class Transaction:
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
        kind: Kind | None = None,
        resumable: bool = True,
    ) -> None:
        """Begin, or go on with, the making of ``destination``.

        Args:
            destination: the folder to publish as; with ``only``, the file.
            request: a text that two runs share exactly if they make the same result.
            resume: go on with an interrupted run of the same request, if there is one.
            overwrite: replace an existing result, and discard an interrupted run.
            durable: have every file on the disk before it counts as finished.
            only: publish this file of the result, and not the folder it is in.
            kind: what is made, and so what it may replace: see ``replacing``.
            resumable: a later run of the same request can go on with what this one leaves, and
                finds it done where it was published; otherwise it is discarded.

        Raises:
            LayoutError: the destination exists, or an interrupted run lies there, or what is
                not ours.
            StorageError: another run is writing there, or the disk refuses.
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
        """Record that the file at ``path`` is complete; it is put on the disk first."""
        self.sync(self.files / path)
        record_finished(self._base / _FINISHED, path, num_bytes, durable=self.durable)

    def publish(self, last: Callable[[], None] | None = None) -> bool:
        """Make the result visible under its name, in one step; True: it is there now.

        ``last`` is called just before, and writes what belongs to no file of the plan.

        Raises:
            LayoutError: something appeared at the destination meanwhile, and is kept.
            StorageError: the disk refused.
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
        """Stop. What was finished is kept for a later run to resume; otherwise all goes."""
        if self._lock < 0:
            return
        if has_work(self._base) or holds_replaced(self._base):
            self._release()
        else:
            self._remove()

    def _refuse_existing(self) -> None:
        refuse_existing(self._destination, self._overwrite, kind=self._kind)

    def _enter(self, resume: bool) -> None:
        """Settle what an earlier run left, and begin or go on."""
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
        """Whether the work that lies there is gone on with; False: it is discarded.

        Raises:
            LayoutError: it is neither.
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
            except FileNotFoundError:  # removed since, by the run that it was of
                continue
            if not lock(descriptor, fcntl.LOCK_EX):
                os.close(descriptor)
                raise in_use(self._destination)
            if is_same(descriptor, path):
                return descriptor
            os.close(descriptor)  # it is of a run that has just ended

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


# --- Steps that several processes with one result share


def refuse_existing(destination: Path, overwrite: bool, *, kind: Kind = "checkpoint") -> None:
    """Refuse a destination that something lies at which a result of ``kind`` may not replace.

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
    """Refuse to replace ``found``, which lies or lay at ``destination``; see ``replacing``.

    Raises:
        LayoutError: it is not what a result of ``kind`` may replace.
    """
    from . import overwrite as replacing  # noqa: PLC0415 - the formats' names, needed only here

    replacing.refuse_other(kind, found, destination)


def has_work(base: Path) -> bool:
    """Whether ``base`` holds finished files that are not published and can be gone on with."""
    there_is = (base / _FINISHED).exists() or any(base.glob("*.journal"))
    return there_is and staging.is_resumable(base) and not was_placed(base)


def begin(base: Path, request: str, durable: bool, resumable: bool = True) -> None:
    """Make ``base`` empty but for its locks, and ready for the making of ``request``."""
    left = [e for e in base.iterdir() if e.suffix != ".lock" and e.name not in (LOCK, JOURNAL)]
    # claims go first, so that a kill leaves none to files that are gone
    for entry in sorted(left, key=lambda e: e.suffix != ".journal" and e.name not in _CLAIMS):
        delete(entry)
    staging.write_journal(base, request, durable=durable, resumable=resumable)
    (base / FILES).mkdir()


# --- Publishing


@dataclass(frozen=True, slots=True)
class _Placing:
    """What is about to get its name: which file or folder, where in the base, and its kind."""

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
    """Make ``base/files``, or what of it is ``made``, the ``destination``, in one step.

    Raises:
        LayoutError: what lies at the destination may not be replaced, and is still there.
        StorageError: the disk refused; the files are where they were.
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
    """Put ``new`` at ``place`` at once; what a result of ``kind`` may replace comes out.

    Raises:
        FileExistsError: something lies there, and nothing may be replaced.
        LayoutError: something else lies there.
    """
    try:
        publish_new(new, place)
    except FileExistsError:
        if kind is None:
            raise
        _refuse_replacing(base, kind, place, place)  # it is looked at again when it is out
        if not exchange(new, place):
            _swap_in_two_steps(base, new, place, kind)


def _swap_in_two_steps(base: Path, new: Path, place: Path, kind: Kind) -> None:
    """What a file system without exchange gets: for a moment nothing lies at ``place``."""
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
    """Note the files that lie at ``destination``, which are those that may be replaced later."""
    if kind != "own":
        from . import overwrite as replacing  # noqa: PLC0415 - the formats' names, needed only here

        files = json.dumps(replacing.files_of(destination)).encode()
        write_file_atomic(base / _BEFORE, files, durable=durable)


def _refuse_replacing(base: Path, kind: Kind, found: Path, destination: Path) -> None:
    """Refuse to replace ``found`` unless it is a result, as it was when the run began.

    Raises:
        LayoutError: it is more.
    """
    refuse_other(kind, found, destination)
    if kind != "own":
        from . import overwrite as replacing  # noqa: PLC0415 - the formats' names, needed only here

        try:
            before = json.loads((base / _BEFORE).read_bytes())
        except (FileNotFoundError, ValueError):  # lost in a power failure: names decide
            return
        replacing.refuse_changed(before, found, destination)


def settle(base: Path, destination: Path) -> None:
    """Finish what was begun when a result was published: what it replaced goes, or comes back.

    What was exchanged is looked at where it cannot change under its name any more; a kill may
    come before that, so every run begins with it.

    Raises:
        LayoutError: what was replaced is more than a result, and is in its place again.
        StorageError: it cannot be put there.
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
    with suppress(OSError):  # the result is there; what cannot be deleted is no reason to fail
        delete(base / _REMOVING)


def _is_linked(made: Path, destination: Path) -> bool:
    """Whether the file ``made`` has the name of the destination, too."""
    return made.is_file() and _identity_of(made) == _identity_of(destination)


def _settle_two_steps(base: Path, replaced: Path, destination: Path) -> None:
    if was_placed(base):  # it was looked at before
        delete(base / _REMOVING)
        os.rename(replaced, base / _REMOVING)
        return
    try:
        publish_new(replaced, destination)
    except FileExistsError:
        raise StorageError(
            f"{destination} exists, and what lay there before is in {replaced}, because a run was "
            "killed while it replaced it. Move one of them away, then run again."
        ) from None


def _bring_back(replaced: Path, destination: Path) -> None:
    """Exchange what was replaced with the result again."""
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
    """Remove all of ``base``; what says that the result was published goes late, if it was."""
    if not was_placed(base):
        (base / PLACING).unlink(missing_ok=True)
    staging.remove(base)


def holds_replaced(base: Path) -> bool:
    """Whether something that was replaced lies in ``base`` and was not looked at since."""
    placing = _read_placing(base)
    taken_out = placing and was_placed(base) and os.path.lexists(base / placing.made)
    return bool(taken_out) or any((base / _REPLACED).glob("*"))


def was_placed(base: Path) -> bool:
    """Whether what was made in ``base`` has got its name, and only the tidying is left.

    What lies in its place then is the old result, and must not be taken for the new one.
    """
    placing = _read_placing(base)
    return placing is not None and _identity_of(base / placing.made)[0] != placing.inode


def is_done(base: Path, destination: Path, request: str) -> bool:
    """Whether an earlier run of ``request`` published, and was killed while it tidied up."""
    return was_published(base, destination, request) or (
        not has_work(base) and was_made_from(destination, request)
    )


def was_published(base: Path, destination: Path, request: str) -> bool:
    """Whether ``destination`` is what an earlier run of ``request`` in ``base`` made."""
    placing = _read_placing(base)
    return (
        placing is not None
        and (placing.inode, placing.mtime_ns) == _identity_of(destination)
        and request_in(base) == request
    )


def _note_request(made: Path, request: str) -> None:
    """Have the result say what it was made from, where the file system has attributes."""
    with suppress(OSError, AttributeError):  # only Linux has them
        os.setxattr(made, _MADE_FROM, _digest(made, request))


def was_made_from(destination: Path, request: str) -> bool:
    """Whether ``destination`` says that it was made from ``request``, and is as it was then."""
    with suppress(OSError, AttributeError):
        return os.getxattr(destination, _MADE_FROM) == _digest(destination, request)
    return False


def _digest(result: Path, request: str) -> bytes:
    """A word for ``request`` and for the files of ``result``, by size, time and inode."""
    digest = hashlib.sha256(request.encode())
    for path in sorted([result] if result.is_file() else filter(Path.is_file, result.rglob("*"))):
        name = path.relative_to(result).as_posix()
        digest.update(repr((name, identity_of_file(path))).encode())
    return digest.hexdigest().encode()


def _identity_of(path: Path) -> tuple[int, int]:
    """Which file or folder lies at ``path``, and of when; numbers of removed ones come again."""
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    return info.st_ino, info.st_mtime_ns


def _read_placing(base: Path) -> _Placing | None:
    """What was about to get its name; one that was cut short is none, for nothing moved yet."""
    try:
        return _Placing(**json.loads((base / PLACING).read_text()))
    except (OSError, ValueError, TypeError):
        return None
