"""State of the process: bounded caches and pauses of the garbage collector.

The boxes of one strategy are computed for each of a model's few shapes and looked up often. But
an untrusted strategy file may specify thousands of placements, each over a hundred thousand
ranks, so a cache that counts entries would be unbounded in memory.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper, lru_cache
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")

_clear: list[Callable[[], object]] = []


def clear_caches() -> None:
    """Free everything that is cached for reuse: compiled programs, plans, host memory.

    Programs and plans refer to meshes and devices, so these live as long as their entries.
    """
    for clear in _clear:
        clear()


def clears(clear: Callable[[], None]) -> Callable[[], None]:
    """Register ``clear``, a function that frees cached objects, with `clear_caches`."""
    _clear.append(clear)
    return clear


def cached(max_entries: int) -> Callable[[Callable[..., V]], _lru_cache_wrapper[V]]:
    """Cache the results of a function by its arguments (``lru_cache``) until `clear_caches`.

    >>> double = cached(8)(lambda n: 2 * n)
    >>> double(4), double.cache_info().currsize
    (8, 1)
    """

    def decorate(function: Callable[..., V]) -> _lru_cache_wrapper[V]:
        found = lru_cache(maxsize=max_entries)(function)
        _clear.append(found.cache_clear)
        return found

    return decorate


class LRUCache(Generic[K, V]):
    """Thread-safe cache that evicts the least recently used entries above ``max_weight``.

    The newest entry is kept even if it is heavier than that.
    """

    def __init__(self, max_weight: int) -> None:
        self._max_weight, self._weight = max_weight, 0
        self._entries: dict[K, tuple[V, int]] = {}  # least recently used first
        self._lock = threading.Lock()
        _clear.append(self.clear)

    @property
    def weight(self) -> int:
        """Total weight of the entries."""
        return self._weight

    def get(self, key: K, weight: int, make: Callable[[], V]) -> V:
        """Return the value of ``key``; on a miss, insert what ``make`` returns, of ``weight``.

        ``make`` runs without the lock, so threads that miss together may each compute the value.

        >>> cache = LRUCache[str, int](10)
        >>> [cache.get(key, 6, lambda: len(key)) for key in ("a", "bc")], cache.weight
        ([1, 2], 6)
        """
        with self._lock:
            hit = self._entries.pop(key, None)
            if hit is not None:
                self._entries[key] = hit
                return hit[0]
        value = make()
        with self._lock:
            if key not in self._entries:
                self._weight += weight
            self._entries[key] = value, weight
            while self._weight > self._max_weight and len(self._entries) > 1:
                self._weight -= self._entries.pop(next(iter(self._entries)))[1]
        return value

    def clear(self) -> None:
        """Drop all entries."""
        with self._lock:
            self._entries.clear()
            self._weight = 0


# --- The garbage collector


@contextmanager
def paused() -> Iterator[None]:
    """Pause collection of cycles; reference counting still frees all other objects.

    The collector scans the live objects again and again as their number grows. None of the
    records of a million tensors is garbage, and scanning them would take half of the time.

    >>> with paused():
    ...     gc.isenabled()
    False
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
