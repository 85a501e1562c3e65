"""Buffers of shards: aligned, pre-faulted or pinned.

Touching fresh memory costs more than reading a warm file, so every distinct shard is
allocated once, and what is given to JAX is never written again: ``device_put`` keeps
aligned memory instead of copying it, writable or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import (
    dataclass,
    replace,
)
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.numpy_dtypes import Bytes
from ..devices.host_memory import ALIGNMENT, UNALIGNED, Prepare, allocate
from ..errors import LayoutError
from ..storage.resources import (
    LEAST_BYTES,
    Budget,
    default_budget,
    fit_budget,
)
from .requests import (
    ShardRequest,
    TensorRequest,
    adopts,
    is_kept,
)


def as_array(memory: Bytes, shard: ShardRequest) -> NDArray[np.generic]:
    """``memory`` as the array that ``shard`` is."""
    return memory.view(shard.conversion.dtype).reshape(shard.box.shape)


def staged_bytes(job: TensorRequest) -> int:
    """How much memory the shards of ``job`` take on their way to a device."""
    return UNALIGNED + sum(_apart(shard.num_bytes) for shard in job.shards)


def _apart(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class RequestBuffers:
    """The memory of one job's shards while it is being filled."""

    __slots__ = ("_direct", "_prepare", "job", "left_bytes", "shards", "staged")

    def __init__(
        self, job: TensorRequest, given: dict[int, Bytes], staged: Bytes | None = None
    ) -> None:
        """Allocate all shards but those of ``given``, which are filled already.

        With memory that is ``staged`` (`staged_bytes` of it), they lie there, one after the
        other, where CPU devices do not use them in place.
        """
        self.job, self.staged = job, staged
        self._prepare: list[Prepare | None] = []
        self.shards: list[Bytes] = []
        at = UNALIGNED
        for number, shard in enumerate(job.shards):
            memory, prepare = given.get(number), None
            if memory is None and staged is not None:
                memory = staged[at : at + shard.num_bytes]
                at += _apart(shard.num_bytes)
            elif memory is None:
                memory, prepare = allocate(shard.num_bytes)
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


# --- Memory budget of a load, checked before it begins

_CGROUP = Path("/sys/fs/cgroup")
_SPARE_BYTES = 64 << 20
_BLOCK_BYTES = 2 << 20
_LEAST_STAGING_BYTES = 128 << 20
_MOST_STAGING_BYTES = 512 << 20


def load_budget(host_bytes: int, workers: int) -> Budget:
    """Threads and blocks for ``host_bytes``: larger blocks than between files, if they fit.

    A block that goes into memory is written in a few long copies, so that fewer steps
    between blocks save more than a colder cache costs.

    Raises:
        LayoutError: not even one thread with the smallest block fits.
    """
    budget = fit_budget(host_bytes, workers)
    larger = replace(budget, block_bytes=_BLOCK_BYTES)
    return larger if larger.host_bytes <= host_bytes else budget


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Host memory that a load takes.

    Attributes:
        kept_bytes: distinct shards that become arrays on CPU devices.
        largest_bytes: the most that one tensor's shards take on their way to other devices.
        passing_bytes: what all of them take there.
    """

    kept_bytes: int
    largest_bytes: int
    passing_bytes: int


def need_of(
    jobs: Sequence[TensorRequest], extra_bytes: int = 0, *, adopted: bool = True
) -> MemoryNeed:
    """What the jobs take in host memory, apart from the engine's blocks, and ``extra_bytes``.

    Arrays on CPU devices are what was read into if that is ``adopted``, and copies if not.
    """
    kept, largest, total = extra_bytes, 0, 0
    for job in jobs:
        if is_kept(job, adopted=adopted):
            kept += job.num_bytes
            continue
        staged = staged_bytes(job)
        largest, total = max(largest, staged), total + staged
        for use in job.uses:
            if adopts([device for device, _ in use]):
                kept += sum(job.shards[number].num_bytes for _, number in use)
    return MemoryNeed(kept, largest, total)


def share_out(need: MemoryNeed, host_bytes: int | None, workers: int) -> tuple[Budget, int | None]:
    """Threads and blocks, and the most bytes of shards in flight to devices.

    The latter is None where all shards stay in host memory. Where a person says how much
    there is, one tensor's shards come first, and blocks get at most half of what is left:
    so the next tensor can be read while one is on its way.

    Raises:
        LayoutError: ``host_bytes`` is less than one thread and the largest tensor need.
    """
    limit = default_budget() if host_bytes is None else host_bytes
    if not need.largest_bytes:
        return load_budget(limit, workers), None
    if host_bytes is None:
        budget = load_budget(limit, workers)
        return budget, min(_staging_bytes(need.largest_bytes), need.passing_bytes)
    left = host_bytes - need.largest_bytes
    if left < LEAST_BYTES:
        raise LayoutError(
            f"host_bytes={host_bytes}: the shards of one tensor take {need.largest_bytes} bytes on "
            f"their way to the devices, and reading at least {LEAST_BYTES}. Give host_bytes="
            f"{need.largest_bytes + LEAST_BYTES} or more."
        )
    budget = load_budget(max(LEAST_BYTES, left // 2), workers)
    return budget, min(host_bytes - budget.host_bytes, need.passing_bytes)


def _staging_bytes(largest_bytes: int) -> int:
    """As much as lets one tensor be read while another is sent, while that is not very much."""
    most = max(largest_bytes, _MOST_STAGING_BYTES)
    return max(_LEAST_STAGING_BYTES, min(2 * largest_bytes, most))


def check_memory(need: MemoryNeed, reading_bytes: int, in_flight_bytes: int = 0) -> None:
    """Refuse a load that this machine has not the memory for.

    Raises:
        LayoutError: with what is needed and what there is.
    """
    total = need.kept_bytes + in_flight_bytes + reading_bytes
    there = available_bytes()
    if there is not None and total + _SPARE_BYTES > there:
        raise LayoutError(
            f"the load needs {total} bytes of host memory (arrays {need.kept_bytes}, on their way "
            f"{in_flight_bytes}, reading {reading_bytes}), and {there} are available. "
            "Load fewer tensors with include=, another dtype=, or onto more machines."
        )


def available_bytes() -> int | None:
    """Bytes of memory this process can still get, as the system tells; None where it does not."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit.isdigit():
            used = int((_CGROUP / "memory.current").read_text())
            found.append(max(0, int(limit) - used + _reclaimable()))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def _reclaimable() -> int:
    """Page cache that counts against the group's limit and goes when memory is needed."""
    for line in (_CGROUP / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
