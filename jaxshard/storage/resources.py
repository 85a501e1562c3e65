"""Threads of a run: how many and their memory, the queue they share, and their counters.

Threads and not processes, because all that takes long (reads, writes, copies) releases the
interpreter. This module is apart from the engine, so that a dry run needs no NumPy.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Generic, NamedTuple, TypeVar

from ..core.box import Box
from ..errors import LayoutError
from ..planning.copies import BLOCK_BYTES, TILE_BYTES, Cell, TensorCopy

_BLOCKS_PER_WORKER = 8  # its block, its spare, and a span read with gaps (see ranges.coalesced)
_TILES_PER_WORKER = 3  # what was read, what it becomes, and the block it goes into
_LEAST_BLOCK = 64 << 10
_DEFAULT_BYTES = 256 << 20
_UNITS = {
    **{"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", re.ASCII)

LENT_BLOCK_BYTES = 4 << 20
"""A block of what lies in memory already, and only passes through a core's cache to be summed or
put in order: fewer, longer calls are then worth more than that cache."""

LEAST_BYTES = _LEAST_BLOCK * _BLOCKS_PER_WORKER  # of host memory, with which one thread works


@dataclass(slots=True)
class Counts:
    """What a run did; equals the plan's totals of the same names."""

    bytes_needed: int = 0
    bytes_read: int = 0
    num_reads: int = 0
    bytes_written: int = 0
    num_writes: int = 0
    num_copies: int = 0
    num_requests: int = 0
    bytes_fetched: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Budget:
    """Threads, and the sizes of their blocks, within a limit of host memory.

    Attributes:
        workers: the number of threads.
        block_bytes: a block.
        tile_bytes: a block of what is read transposed.
        limit_bytes: the limit; what the threads do not need is for fetched bytes. 0: no limit.
    """

    workers: int
    block_bytes: int
    tile_bytes: int = BLOCK_BYTES
    limit_bytes: int = field(default=0, compare=False, repr=False)

    @property
    def host_bytes(self) -> int:
        """The most memory the threads hold at once.

        Tiles as small as a block take the room of blocks: both are never carried at once.
        """
        tiles = _TILES_PER_WORKER if self.tile_bytes > self.block_bytes else 0
        return self.workers * (self.block_bytes * _BLOCKS_PER_WORKER + self.tile_bytes * tiles)


def fit_budget(host_bytes: int, workers: int, block_bytes: int = BLOCK_BYTES) -> Budget:
    """The most threads, up to ``workers``, and block size that ``host_bytes`` allows.

    Args:
        host_bytes: what there is.
        workers: the most threads.
        block_bytes: the largest block that is of use.

    Raises:
        LayoutError: not even one thread with the smallest block fits.

    >>> fit_budget(64 << 20, workers=2)
    Budget(workers=2, block_bytes=1048576, tile_bytes=8388608)
    """
    if workers < 1:
        raise LayoutError(f"{workers} workers; at least 1 is needed.")
    if host_bytes < LEAST_BYTES:
        raise LayoutError(
            f"{host_bytes} bytes of host memory are too few: one thread needs {LEAST_BYTES}. "
            f"Give host_bytes= or --host-bytes {LEAST_BYTES} or more."
        )
    workers = min(workers, host_bytes // LEAST_BYTES)
    block = _power_of_two(min(block_bytes, host_bytes // workers // _BLOCKS_PER_WORKER))
    left = host_bytes // workers - block * _BLOCKS_PER_WORKER
    tile = _power_of_two(min(TILE_BYTES, max(block, left // _TILES_PER_WORKER)))
    return Budget(workers, block, tile, host_bytes)


def budget_for(
    host_bytes: int | str | None, workers: int | None, block_bytes: int = BLOCK_BYTES
) -> Budget:
    """The budget for what a caller gave: None is the default, and 0 is an error.

    Raises:
        LayoutError: as ``fit_budget``.
    """
    return fit_budget(
        default_budget() if host_bytes is None else parse_size(host_bytes, "host_bytes"),
        default_workers() if workers is None else workers,
        block_bytes,
    )


def parse_size(size: int | str, argument: str) -> int:
    """Return the bytes that ``argument`` specifies: a number, or text with a unit.

    Raises:
        LayoutError: it is not a positive number with a unit.

    >>> parse_size("5GB", "limit"), parse_size("4 GiB", "limit"), parse_size(7, "limit")
    (5000000000, 4294967296, 7)
    """
    match = _SIZE.fullmatch(str(size)) if not isinstance(size, bool) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    num_bytes = _times(match[1], unit) if match and unit else 0
    if num_bytes < 1:
        raise LayoutError(
            f"{argument}= (--{argument.replace('_', '-')}): {size!r} is not a size. Write it like "
            "5GB (10**9), 4GiB (2**30) or 500MB."
        )
    return num_bytes


def _times(number: str, unit: int) -> int:
    """``number``, a decimal fraction, of ``unit``, exactly and rounded down."""
    whole, _, part = number.partition(".")
    return int(whole + part) * unit // int(10 ** len(part))


def default_budget() -> int:
    """The default of ``host_bytes``: 256 MiB, or a sixteenth of a smaller machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(_DEFAULT_BYTES, memory // 16)


def default_workers() -> int:
    """The default of ``workers``: a thread for each core that is ours, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


def _power_of_two(limit: int) -> int:
    return 1 << (limit.bit_length() - 1)


BATCH_BLOCKS = 16  # blocks that a thread takes at a time: enough to read ahead, few to wait for

T = TypeVar("T")


class Batch(NamedTuple):
    """Adjacent blocks of one cell."""

    move: TensorCopy
    cell: Cell
    blocks: tuple[Box, ...]


class WorkQueue(Generic[T]):
    """An iterator that several threads take items from.

    ``stopped`` is called when the last item was taken or the queue is stopped: a thread may wait
    inside ``items`` for another, which has failed.
    """

    def __init__(self, items: Iterator[T], stopped: Callable[[], None] | None = None) -> None:
        self._items, self._lock, self._is_stopped = items, threading.Lock(), False
        self._stopped = stopped

    def next(self) -> T | None:
        """Return the next item; None at the end, or if the queue is stopped."""
        with self._lock:
            return None if self._is_stopped else next(self._items, None)

    def stop(self) -> None:
        """Return no more items to any thread."""
        self._is_stopped = True
        if self._stopped:
            self._stopped()


def run_threads(jobs: Sequence[Callable[[WorkQueue[T]], None]], queue: WorkQueue[T]) -> None:
    """Run each of ``jobs`` on ``queue`` in its own thread; a single job runs in this thread.

    The first error of any thread stops all of them and is raised.
    """
    if len(jobs) == 1:
        jobs[0](queue)
        return
    errors: list[BaseException] = []

    def guarded(job: Callable[[WorkQueue[T]], None], done: threading.Event) -> None:
        try:
            job(queue)
        except BaseException as error:  # an interrupt too: the caller raises it
            errors.append(error)
            queue.stop()
        finally:
            done.set()

    # not join(): in Python 3.11 an interrupted join() takes the thread for finished
    ended = [threading.Event() for _ in jobs]
    for given in zip(jobs, ended, strict=True):
        threading.Thread(target=guarded, args=given, name="jaxshard").start()
    try:
        for event in ended:
            event.wait()
    finally:  # on an interrupt too: no file may be closed while a thread writes to it
        queue.stop()
        for event in ended:
            event.wait()
    if errors:
        raise errors[0]
