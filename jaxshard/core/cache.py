"""LRU cache bounded by the total weight of its entries.

A model has few shapes, and asks where their boxes lie again and again. But a strategy file
from a stranger may tell of thousands of ways to cut, each over a hundred thousand ranks:
a cache that counts entries would hold all of their boxes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values by key, the least lately asked for dropped when they weigh more than ``most``."""

    def __init__(self, most: int) -> None:
        self._most, self._weight = most, 0
        self._kept: dict[K, tuple[V, int]] = {}  # in the order of asking
        self._lock = threading.Lock()

    @property
    def weight(self) -> int:
        """What all that is kept weighs together."""
        return self._weight

    def get(self, key: K, weight: int, make: Callable[[], V]) -> V:
        """What is kept for ``key``, or what ``make`` makes; that is kept, and weighs ``weight``.

        >>> recent = Recent[str, int](10)
        >>> [recent.get(key, 6, lambda: len(key)) for key in ("a", "bc")], recent.weight
        ([1, 2], 6)
        """
        with self._lock:
            found = self._kept.pop(key, None)
            if found is not None:
                self._kept[key] = found
                return found[0]
        made = make()
        with self._lock:
            if key not in self._kept:
                self._weight += weight
            self._kept[key] = made, weight
            while self._weight > self._most and len(self._kept) > 1:
                self._weight -= self._kept.pop(next(iter(self._kept)))[1]
        return made
