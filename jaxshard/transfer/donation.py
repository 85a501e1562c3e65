"""Donation: which source shards are freed, and when.

Two arrays of a tree may hold the same memory: one array that stands there twice, or one that was
made from another by a reshard with nothing to move. A shard is freed as soon as the last leaf that
holds its memory has been moved, and not at all where a target holds it as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import jax

from .geometry import Move
from .shards import data_of, shared_shards

_Memory = tuple[jax.Device, int]


class Donated:
    """The donated shards that are still held."""

    def __init__(self, arrays: Sequence[jax.Array]) -> None:
        self._shards = [[(_memory(shard), shard) for shard in data_of(x)] for x in arrays]
        self._needed: dict[_Memory, list[jax.Array]] = defaultdict(list)
        for shards in self._shards:
            for memory, shard in shards:
                self._needed[memory].append(shard)
        self._num_moved: dict[_Memory, int] = defaultdict(int)
        self._kept: set[_Memory] = set()

    def moved(self, n: int, move: Move) -> None:
        """Free what array ``n`` holds, except what another still needs or its target may share."""
        for (memory, _), is_shared in zip(self._shards[n], shared_shards(move), strict=True):
            self._num_moved[memory] += 1
            if is_shared:
                self._kept.add(memory)
            holders = self._needed[memory]
            if self._num_moved[memory] == len(holders) and memory not in self._kept:
                for holder in holders:
                    holder.delete()
        self._shards[n] = []


def _memory(shard: jax.Array) -> _Memory:
    (device,) = shard.devices()
    return device, shard.unsafe_buffer_pointer()
