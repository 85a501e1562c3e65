"""Buffers of shards: aligned, pre-faulted or pinned.

Touching fresh memory costs more than reading a warm file, so every distinct shard is
allocated once, and what is given to JAX is never written again: ``device_put`` keeps
aligned memory instead of copying it, writable or not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..core.numpy_dtypes import Bytes
from ..devices.host_memory import LEAST_BYTES, Prepare, region
from .requests import Job, Shard

ALIGNMENT = 64  # what XLA's CPU backend asks of memory that it uses in place
_OFF = 16  # well enough for every element, and not as the backend asks


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


def off_line(num_bytes: int) -> Bytes:
    """Uninitialised memory, aligned for every element, which no CPU device would use in place."""
    memory = np.empty(num_bytes + ALIGNMENT + _OFF, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT + _OFF
    return memory[start : start + num_bytes]


def is_aligned(memory: Bytes) -> bool:
    """Whether JAX's CPU backend would use ``memory`` in place."""
    return memory.ctypes.data % ALIGNMENT == 0


def as_array(memory: Bytes, shard: Shard) -> NDArray[np.generic]:
    """``memory`` as the array that ``shard`` is."""
    return memory.view(shard.conversion.dtype).reshape(shard.box.shape)


def staged_bytes(job: Job) -> int:
    """How much memory the shards of ``job`` take on their way to a device."""
    return _OFF + sum(_apart(shard.num_bytes) for shard in job.shards)


def _apart(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class JobMemory:
    """The memory of one job's shards while it is being filled."""

    __slots__ = ("_direct", "_prepare", "job", "left_bytes", "shards", "staged")

    def __init__(self, job: Job, given: dict[int, Bytes], staged: Bytes | None = None) -> None:
        """Allocate all shards but those of ``given``, which are filled already.

        With memory that is ``staged`` (`staged_bytes` of it), they lie there, one after the
        other, where CPU devices do not use them in place.
        """
        self.job, self.staged = job, staged
        self._prepare: list[Prepare | None] = []
        self.shards: list[Bytes] = []
        at = _OFF
        for number, shard in enumerate(job.shards):
            memory, prepare = given.get(number), None
            if memory is None and staged is not None:
                memory = staged[at : at + shard.num_bytes]
                at += _apart(shard.num_bytes)
            elif memory is None:
                memory, prepare = _allocated(shard.num_bytes)
            self.shards.append(memory)
            self._prepare.append(prepare)
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
