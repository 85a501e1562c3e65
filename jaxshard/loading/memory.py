"""Memory for shards: aligned so that JAX's CPU backend uses it as it is.

Touching fresh memory costs more than reading a warm file, so every distinct shard is
allocated once, and what is given to JAX is never written again: ``device_put`` keeps
aligned memory instead of copying it, writable or not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .regions import LEAST_BYTES, Prepare, region
from .wanted import Job, Shard

Bytes = NDArray[np.uint8]

ALIGNMENT = 64  # what XLA's CPU backend asks of memory that it uses in place
_OFF = 16  # the largest element


def aligned_empty(num_bytes: int) -> Bytes:
    """Uninitialised memory that starts on an aligned address."""
    return _allocated(num_bytes)[0]


def _allocated(num_bytes: int) -> tuple[Bytes, Prepare | None]:
    """Aligned memory, and what makes its pages if it has none yet."""
    if num_bytes >= LEAST_BYTES:
        return region(num_bytes)
    memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes], None


def _allocated_off(num_bytes: int) -> tuple[Bytes, Prepare | None]:
    """The same, not aligned as the backend asks, though well enough for every element."""
    memory, prepare = _allocated(num_bytes + _OFF)
    if prepare is None:
        return memory[_OFF:], None
    made = prepare  # told to the checker of types: it is there
    return memory[_OFF:], lambda offset, num_bytes: made(offset + _OFF, num_bytes)


def is_aligned(memory: Bytes) -> bool:
    """Whether JAX's CPU backend would use ``memory`` in place."""
    return memory.ctypes.data % ALIGNMENT == 0


def as_array(memory: Bytes, shard: Shard) -> NDArray[np.generic]:
    """``memory`` as the array that ``shard`` is."""
    return memory.view(shard.conversion.dtype).reshape(shard.box.shape)


class JobMemory:
    """The memory of one job's shards while it is being filled."""

    __slots__ = ("_direct", "_prepare", "job", "left_bytes", "shards")

    def __init__(self, job: Job, given: dict[int, Bytes], *, adopted: bool = True) -> None:
        """Allocate all shards but those of ``given``, which are filled already.

        What is not to be ``adopted`` lies where the backend does not use it in place.
        """
        self.job = job
        allocate = _allocated if adopted else _allocated_off
        made = [
            (given[i], None) if i in given else allocate(shard.num_bytes)
            for i, shard in enumerate(job.shards)
        ]
        self.shards = [memory for memory, _ in made]
        self._prepare = [prepare for _, prepare in made]
        self._direct = [shard.conversion.is_copy for shard in job.shards]
        self.left_bytes = 0

    def place(self, shards: tuple[int, ...], offset: int, num_bytes: int) -> memoryview | None:
        """Where those stored bytes of a box lie in the end, if that is one place."""
        if len(shards) != 1 or not self._direct[shards[0]]:
            return None
        prepare = self._prepare[shards[0]]
        if prepare and num_bytes:
            prepare(offset, num_bytes)
        return self.shards[shards[0]][offset : offset + num_bytes].data

    def fill(self, shards: tuple[int, ...], offset: int, data: memoryview) -> None:
        """Put stored bytes of a box into every shard that wants them, unless they were placed."""
        if len(shards) == 1 and self._direct[shards[0]]:
            return
        for number in shards:
            conversion = self.job.shards[number].conversion
            conversion.fill(self.shards[number], offset, np.frombuffer(data, np.uint8))
