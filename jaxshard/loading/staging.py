"""Staging: host memory that shards pass through on their way to a device, used again and again.

    arenas   ┌ tensor 1 ┬ tensor 2 ┬──── free ────┐     each pinned, if the device can
             └──────────┴──────────┴──────────────┘     use that
    take     the first place that is large enough; waits until there is one
    give     when the device has the bytes, its place is free

Pages that nobody has touched and memory that is not pinned cost several times what reading
a warm file does, so there is as little of it as keeps devices busy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from .pinning import Pin
from .regions import region

Bytes = NDArray[np.uint8]

ARENA_BYTES = 64 << 20
_ALIGNMENT = 64


class Staging:
    """At most ``most_bytes`` of memory, or as much as one tensor needs if that is more.

    Threads may give while one takes.
    """

    def __init__(self, most_bytes: int, pin: Pin | None = None) -> None:
        self._most, self._pin = most_bytes, pin
        self._arenas: list[_Arena] = []
        self._stopped = False
        self._changed = threading.Condition()

    @property
    def num_bytes(self) -> int:
        """Bytes of all arenas."""
        return sum(arena.memory.size for arena in self._arenas)

    def take(self, num_bytes: int) -> Bytes | None:
        """Memory of that length, on a cache line; None if all was stopped meanwhile."""
        size = -(-max(num_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
        with self._changed:
            while (place := self._place(size)) is None:
                if self._make_room(size):
                    self._arenas.append(_Arena(max(size, min(ARENA_BYTES, self._most)), self._pin))
                elif self._stopped:
                    return None
                else:
                    self._changed.wait()
        return place[:num_bytes]

    def give(self, memory: Bytes) -> None:
        """Take back what was taken; nobody may look at it any more."""
        with self._changed:
            address = memory.ctypes.data
            next(arena for arena in self._arenas if arena.holds(address)).free(address)
            self._changed.notify_all()

    def stop(self) -> None:
        """Wake whoever waits: nothing more will be given back."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Unpin all, and let go of it; nothing may be on its way to a device."""
        for arena in self._arenas:
            arena.close()
        self._arenas.clear()

    def _place(self, size: int) -> Bytes | None:
        return next((p for arena in self._arenas if (p := arena.cut(size)) is not None), None)

    def _make_room(self, size: int) -> bool:
        """Whether another arena may be made, without those in which nothing lies if need be."""
        wanted = max(size, min(ARENA_BYTES, self._most))
        if self.num_bytes + wanted > self._most:
            idle = [arena for arena in self._arenas if arena.is_idle]
            left = self.num_bytes - sum(arena.memory.size for arena in idle)
            if left and left + wanted > self._most:
                return False
            for arena in idle:
                arena.close()
                self._arenas.remove(arena)
        return True


class _Arena:
    """One piece of memory, and what of it is in use: (start, end), in order."""

    def __init__(self, num_bytes: int, pin: Pin | None) -> None:
        self.memory, prepare = region(num_bytes)
        self._address = self.memory.ctypes.data
        if prepare:
            prepare(0, num_bytes)
        self._unpin: Callable[[], None] | None = pin and pin(self._address, num_bytes)
        self._used: list[tuple[int, int]] = []

    @property
    def is_idle(self) -> bool:
        return not self._used

    def holds(self, address: int) -> bool:
        return 0 <= address - self._address < self.memory.size

    def cut(self, size: int) -> Bytes | None:
        """The first free bytes of that length."""
        for number, (start, end) in enumerate(self._gaps()):
            if end - start >= size:
                self._used.insert(number, (start, start + size))
                return self.memory[start : start + size]
        return None

    def free(self, address: int) -> None:
        self._used = [used for used in self._used if used[0] != address - self._address]

    def close(self) -> None:
        if self._unpin:
            self._unpin()

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """Before each part that is used, and after the last; some are empty."""
        at = 0
        for start, end in self._used:
            yield at, start
            at = end
        yield at, self.memory.size
