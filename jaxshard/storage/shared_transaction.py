"""Transactions of several processes: each writes parts of one result.

    .out.partial/
        journal.json    the request, and the number of parts
        lock            shared lock of every running part
        turn.lock       exclusive lock of a part that begins or ends
        part-1.lock     exclusive lock of part 1, so that two processes do not run it
        part-1.journal  a line for each file that part 1 has finished
        part-1.done     part 1 is complete
        part-1.told     part 1 was restarted after the publication, and knows of it
        files/          the result so far

Parts run at any time and in any order; the last to complete publishes. A killed part is started
again and resumes, because its locks ended with it. All parts may be started again after the
publication too: an extended attribute of the result names the request and the files, so each part
finds that nothing is left to do. Without extended attributes a restarted part is refused, because
the result exists. If the staging directory still exists then, each restarted part leaves a mark in
it, and the last removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LayoutError, StorageError
from . import staging
from . import transaction as steps


class SharedTransaction:
    """One part of a result that several processes make; used like ``Transaction``.

    Attributes:
        files: the folder to write into.
        finished: the files that an earlier run of this part completed, with their sizes.
        published: whether the result is published already: nothing is left to do.
        durable: whether a file is on the disk before it counts as finished.
    """

    def __init__(
        self,
        destination: Path,
        request: str,
        index: int,
        count: int,
        *,
        overwrite: bool = False,
        durable: bool = True,
    ) -> None:
        """Begin, join or resume the making of ``destination``.

        Args:
            destination: the folder to publish as.
            request: a text that all parts share.
            index: the number of this part.
            count: the number of parts.
            overwrite: replace an existing result, and discard another interrupted run.
            durable: flush every file to the disk before it counts as finished.

        Raises:
            LayoutError: the destination exists, or other work is there.
            StorageError: this part runs already, or the disk fails.
        """
        self._destination = destination = staging.real_place(destination)
        self._count, self.durable, self._overwrite = count, durable, overwrite
        self._base = base = staging.staging_folder(destination)
        self.files = base / staging.FILES
        self._name = f"part-{index}"
        self._request = json.dumps({"parts": count, "request": request})
        self._locks: list[int] = []
        self.published = False
        try:
            with staging.os_errors_as(f"{base} cannot be made"):
                self._join()
                self.finished = staging.read_finished(base / f"{self._name}.journal", self.files)
        except BaseException:
            self.abandon()
            raise

    def finish(self, path: str, num_bytes: int) -> None:
        """Record that the file at ``path`` is complete, after flushing it to the disk."""
        self.sync(self.files / path)
        journal = self._base / f"{self._name}.journal"
        staging.record_finished(journal, path, num_bytes, durable=self.durable)

    def publish(self, last: Callable[[], None] | None = None) -> bool:
        """Complete this part; return whether the result is published now.

        Exactly one part calls ``last``, when all others are complete.
        """
        done = self._base / f"{self._name}.done"
        with staging.os_errors_as(f"{done} cannot be written"):
            done.touch()
        with self._turn() as is_there:
            is_last = is_there and all(
                (self._base / f"part-{i}.done").exists() for i in range(self._count)
            )
            if is_last:
                if last is not None:
                    last()
                steps.place(
                    self._base,
                    self._destination,
                    durable=self.durable,
                    overwrite=self._overwrite,
                )
                steps.remove_base(self._base)
        self.abandon()
        return is_last or not is_there

    def abandon(self) -> None:
        """Stop; finished files are kept for the next run of this part."""
        while self._locks:
            os.close(self._locks.pop())

    def sync(self, path: Path) -> None:
        """Flush ``path`` to the disk, if the result has to be durable."""
        if self.durable:
            staging.sync(path)

    def _join(self) -> None:
        while not self._joined():
            pass  # the folder was removed meanwhile: its result was published

    def _joined(self) -> bool:
        if not os.path.lexists(self._base):
            self.published = steps.was_made_from(self._destination, self._request)
            if self.published:
                return True
            steps.refuse_existing(self._destination, self._overwrite)
        staging.claim(self._base)
        with self._turn() as is_there:
            if is_there:
                try:
                    self._enter()
                except BaseException:
                    self._leave_nothing()
                    raise
        return is_there

    def _enter(self) -> None:
        """Complete what an earlier run left, and begin, join or resume."""
        self._lock(self._base / staging.LOCK, fcntl.LOCK_SH, self._is_in_use)
        steps.settle(self._base, self._destination)
        if steps.is_done(self._base, self._destination, self._request):
            self._acknowledge()
            return
        steps.refuse_existing(self._destination, self._overwrite)
        if not self._is_ours():
            self._begin()
        self.files.mkdir(exist_ok=True)  # a kill may have come between the journal and this folder
        self._lock(
            self._base / f"{self._name}.lock",
            fcntl.LOCK_EX,
            lambda: StorageError(
                f"{self._name} of {self._destination} runs already. Wait for it, or give "
                "each process its own number."
            ),
        )
        (self._base / f"{self._name}.done").unlink(missing_ok=True)
        if self._overwrite:
            steps.note_before(
                self._base, self._destination, kind="checkpoint", durable=self.durable
            )

    def _acknowledge(self) -> None:
        """Note that an earlier run published; the last part to do so removes the directory."""
        self.published = True
        self.abandon()
        told = [self._base / f"part-{i}.told" for i in range(self._count)]
        if not steps.was_made_from(self._destination, self._request):  # no such attributes here
            (self._base / f"{self._name}.told").touch()
            if not all(path.exists() for path in told):
                return
        steps.remove_base(self._base)

    def _leave_nothing(self) -> None:
        """Remove the folder of a refused part, if it has no work."""
        self.abandon()
        if (
            steps.has_work(self._base)
            or steps.holds_replaced(self._base)
            or staging.request_in(self._base) not in (None, self._request)
        ):
            return
        descriptor = staging.open_lock(self._base / staging.LOCK)
        try:
            if staging.lock(descriptor, fcntl.LOCK_EX):  # no other part is at work
                steps.remove_base(self._base)
        finally:
            os.close(descriptor)

    def _is_ours(self) -> bool:
        return staging.request_in(self._base) == self._request and not steps.was_placed(self._base)

    def _begin(self) -> None:
        """Discard the work there, if no part is running and it may be discarded."""
        os.close(self._locks.pop())
        others = LayoutError(f"other parts are at work: {staging.other_request(self._base)}")
        self._lock(self._base / staging.LOCK, fcntl.LOCK_EX, lambda: others)
        if steps.has_work(self._base) and not self._overwrite:
            raise staging.other_request(self._base)
        steps.begin(self._base, self._request, self.durable)
        fcntl.flock(self._locks[-1], fcntl.LOCK_SH)  # no race: this part has the turn lock

    def _is_in_use(self) -> StorageError:
        return staging.in_use(self._destination)

    def _lock(self, path: Path, kind: int, refusal: Callable[[], Exception]) -> None:
        descriptor = staging.open_lock(path)
        self._locks.append(descriptor)
        if not staging.lock(descriptor, kind):
            raise refusal()

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Wait for the turn lock; yield whether the folder still exists then."""
        path = self._base / staging.TURN
        try:
            descriptor = staging.open_lock(path)
        except FileNotFoundError:
            yield False
            return
        try:
            staging.lock(descriptor, fcntl.LOCK_EX, wait=True)
            yield staging.is_same(descriptor, path)
        finally:
            os.close(descriptor)
