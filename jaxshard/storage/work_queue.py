"""Work queue: batches of blocks shared by threads.

Threads, and not processes: all that takes long (reading, writing, copying) lets other
threads run meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from ..core.box import Box
from ..planning.cells import Cell
from ..planning.copies import TensorCopy

BATCH_BLOCKS = 16  # blocks handed to a thread at a time: enough to read ahead, little to wait for

T = TypeVar("T")


class Batch(NamedTuple):
    """Neighbouring blocks of one cell."""

    move: TensorCopy
    cell: Cell
    blocks: tuple[Box, ...]


class Shared(Generic[T]):
    """An iterator that several threads take from.

    ``stopped`` is called when there is nothing more to be had, for whatever reason: one thread
    may wait inside ``items`` for what another, which has failed, will never do.
    """

    def __init__(self, items: Iterator[T], stopped: Callable[[], None] | None = None) -> None:
        self._items, self._lock, self._stopped = items, threading.Lock(), False
        self._tell = stopped

    def next(self) -> T | None:
        """The next item, or None: there is none left, or somebody said stop."""
        with self._lock:
            return None if self._stopped else next(self._items, None)

    def stop(self) -> None:
        """Give nothing more to anybody."""
        self._stopped = True
        if self._tell:
            self._tell()


def in_threads(jobs: Sequence[Callable[[Shared[T]], None]], source: Shared[T]) -> None:
    """Run each of ``jobs`` on ``source`` in a thread of its own; one alone runs in this one.

    The first error of any thread stops all of them and is raised.
    """
    if len(jobs) == 1:
        jobs[0](source)
        return
    errors: list[BaseException] = []

    def guarded(job: Callable[[Shared[T]], None], done: threading.Event) -> None:
        try:
            job(source)
        except BaseException as error:  # also an interrupt: whoever waits must hear of it
            errors.append(error)
            source.stop()
        finally:
            done.set()

    # not join(): in Python 3.11 one that was interrupted takes the thread for ended
    ended = [threading.Event() for _ in jobs]
    for given in zip(jobs, ended, strict=True):
        threading.Thread(target=guarded, args=given, name="jaxshard").start()
    try:
        for event in ended:
            event.wait()
    finally:  # an interrupt here: nothing is closed under a thread that still writes
        source.stop()
        for event in ended:
            event.wait()
    if errors:
        raise errors[0]
