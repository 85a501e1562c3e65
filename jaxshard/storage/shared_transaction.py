"""Transactions of several processes: each writes parts of one result.

    .out.partial/
        journal.json    what is being made, and in how many parts
        lock            held by every part that is at work, shared
        turn.lock       held while a part begins or ends, by one alone
        part-1.lock     held by part 1, so that it is not done twice at once
        part-1.journal  a line for each file that part 1 has finished
        part-1.done     part 1 is complete
        part-1.told     part 1 has heard that all was published before it was started again
        files/          the result so far

They need not run at the same time, nor in any order: the last to be done publishes. A
part that was killed is started again and goes on; its locks went with it. All parts may be
started again after the result got its name, too: an extended attribute of the result names
the request and the files, so each part finds that nothing is left to do. On a file system
without such attributes a part that is started again is refused, because the result exists;
only if this folder is still there, each part notes that it knows, and the last removes it.
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
    """One part of a result in the making; used as ``Staging`` is.

    Attributes:
        files: the folder to write into.
        finished: the files an earlier run of this part completed, with their sizes.
        published: whether the result has its name already: nothing is left to do.
        durable: have every file on the disk before it counts as finished.
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
        """Begin, join or go on with the making of ``destination``.

        Args:
            destination: the folder to publish as.
            request: a text that all parts share.
            index: which part this is.
            count: of how many.
            overwrite: replace an existing result, and discard another interrupted run.
            durable: have every file on the disk before it counts as finished.

        Raises:
            LayoutError: the destination exists, or other work lies there.
            StorageError: this part runs already, or the disk refuses.
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
        """Record that the file at ``path`` is complete; it is put on the disk first."""
        self.sync(self.files / path)
        journal = self._base / f"{self._name}.journal"
        staging.record_finished(journal, path, num_bytes, durable=self.durable)

    def publish(self, last: Callable[[], None] | None = None) -> bool:
        """This part is complete; whether the result is there now, because it was the last.

        Of all parts exactly one calls ``last``, when all others are complete.
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
        """Stop. What was finished is kept for the next run of this part."""
        while self._locks:
            os.close(self._locks.pop())

    def sync(self, path: Path) -> None:
        """Wait until ``path`` is on the disk, where the result is to be durable."""
        if self.durable:
            staging.sync(path)

    def _join(self) -> None:
        while not self._joined():
            pass  # the folder went while we waited: its result was published

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
        """Settle what an earlier run left, and begin, join or go on."""
        self._lock(self._base / staging.LOCK, fcntl.LOCK_SH, self._is_in_use)
        steps.settle(self._base, self._destination)
        if steps.is_done(self._base, self._destination, self._request):
            self._hear()
            return
        steps.refuse_existing(self._destination, self._overwrite)
        if not self._is_ours():
            self._begin()
        self.files.mkdir(exist_ok=True)  # a kill may come between the journal and this folder
        self._lock(
            self._base / f"{self._name}.lock",
            fcntl.LOCK_EX,
            lambda: StorageError(
                f"{self._name} of {self._destination} runs already. Wait for it, or give "
                "each process a number of its own."
            ),
        )
        (self._base / f"{self._name}.done").unlink(missing_ok=True)
        if self._overwrite:
            steps.note_before(
                self._base, self._destination, kind="checkpoint", durable=self.durable
            )

    def _hear(self) -> None:
        """Note that an earlier run published all; the last part that does so tidies up."""
        self.published = True
        self.abandon()
        told = [self._base / f"part-{i}.told" for i in range(self._count)]
        if not steps.was_made_from(self._destination, self._request):  # no such attributes here
            (self._base / f"{self._name}.told").touch()
            if not all(path.exists() for path in told):
                return
        steps.remove_base(self._base)

    def _leave_nothing(self) -> None:
        """This part is refused: remove the folder if it was made for it, or holds no work."""
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
        """Discard what lies there, if nobody is at work on it and it may go."""
        os.close(self._locks.pop())
        others = LayoutError(f"other parts are at work: {staging.other_request(self._base)}")
        self._lock(self._base / staging.LOCK, fcntl.LOCK_EX, lambda: others)
        if steps.has_work(self._base) and not self._overwrite:
            raise staging.other_request(self._base)
        steps.begin(self._base, self._request, self.durable)
        fcntl.flock(self._locks[-1], fcntl.LOCK_SH)  # nobody can come between: it is our turn

    def _is_in_use(self) -> StorageError:
        return staging.in_use(self._destination)

    def _lock(self, path: Path, kind: int, refusal: Callable[[], Exception]) -> None:
        descriptor = staging.open_lock(path)
        self._locks.append(descriptor)
        if not staging.lock(descriptor, kind):
            raise refusal()

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Wait to be alone; whether the folder is still there then."""
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
