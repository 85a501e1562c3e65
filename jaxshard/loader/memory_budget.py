"""Host memory of a load: the buffers of its shards, and the budget for them.

A page fault costs more than reading a cached file, so each distinct shard is allocated once.
A buffer is never written again after it was passed to JAX, because ``device_put`` aliases
aligned memory instead of copying it, even if it is writable.
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
from ..devices.host_memory import (
    ALIGNMENT,
    UNALIGNED,
    Prepare,
    allocate,
)
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
    """Return ``memory`` as the NumPy array of ``shard``."""
    return memory.view(shard.conversion.dtype).reshape(shard.box.shape)


def staged_bytes(request: TensorRequest) -> int:
    """Return the transfer buffer size for the shards of ``request``."""
    return UNALIGNED + sum(_apart(shard.num_bytes) for shard in request.shards)


def _apart(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class RequestBuffers:
    """Buffers of one request's shards while they are filled."""

    __slots__ = ("_direct", "_prepare", "left_bytes", "request", "shards", "staged")

    def __init__(
        self, request: TensorRequest, given: dict[int, Bytes], staged: Bytes | None = None
    ) -> None:
        """Allocate all shards but those of ``given``, which are complete.

        If there is a transfer buffer ``staged`` (of `staged_bytes`), the shards are allocated in
        it, at addresses that CPU devices do not alias.
        """
        self.request, self.staged = request, staged
        self._prepare: list[Prepare | None] = []
        self.shards: list[Bytes] = []
        at = UNALIGNED
        for number, shard in enumerate(request.shards):
            memory, prepare = given.get(number), None
            if memory is None and staged is not None:
                memory = staged[at : at + shard.num_bytes]
                at += _apart(shard.num_bytes)
            elif memory is None:
                memory, prepare = allocate(shard.num_bytes)
            self.shards.append(memory)
            self._prepare.append(prepare)
        self._direct = [shard.conversion.is_copy for shard in request.shards]
        self.left_bytes = 0

    def place(self, shards: tuple[int, ...], offset: int, num_bytes: int) -> memoryview | None:
        """Return the destination of these stored bytes of a box, if they have exactly one."""
        if len(shards) != 1 or not self._direct[shards[0]]:
            return None
        prepare = self._prepare[shards[0]]
        if prepare and num_bytes:
            prepare(offset, num_bytes)
        return self.shards[shards[0]][offset : offset + num_bytes].data

    def fill(self, shards: tuple[int, ...], offset: int, data: memoryview) -> None:
        """Copy stored bytes of a box to every shard that needs them, unless they are in place."""
        if len(shards) == 1 and self._direct[shards[0]]:
            return
        for number in shards:
            conversion = self.request.shards[number].conversion
            conversion.fill(self.shards[number], offset, np.frombuffer(data, np.uint8))


# --- Memory budget, checked before the load

_CGROUP = Path("/sys/fs/cgroup")
_SPARE_BYTES = 64 << 20  # for allocations that are not counted
_BLOCK_BYTES = 2 << 20  # that fit a core's L2 cache on current servers
_MIN_STAGING_BYTES = 128 << 20  # below, transfers of small tensors wait for each other
_MAX_STAGING_BYTES = 512 << 20  # more was not faster


def load_budget(host_bytes: int, workers: int) -> Budget:
    """Choose threads and blocks for ``host_bytes``; blocks are larger than between files.

    A block is copied to memory in a few long runs, so the lower number of blocks saves more
    time than the lower cache hit rate costs.

    Raises:
        LayoutError: the budget is too small for one thread.
    """
    budget = fit_budget(host_bytes, workers)
    larger = replace(budget, block_bytes=_BLOCK_BYTES)
    return larger if larger.host_bytes <= host_bytes else budget


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Host memory that a load needs.

    Attributes:
        kept_bytes: distinct shards that become arrays on CPU devices.
        largest_bytes: the largest transfer buffer of one tensor, for other devices.
        passing_bytes: the sum of these buffers over all tensors.
    """

    kept_bytes: int
    largest_bytes: int
    passing_bytes: int


def need_of(
    requests: Sequence[TensorRequest], extra_bytes: int = 0, *, adopted: bool = True
) -> MemoryNeed:
    """Return the host memory of ``requests`` without the engine's blocks, plus ``extra_bytes``.

    Arrays on CPU devices alias the read buffers if ``adopted``; otherwise they are copies.
    """
    kept, largest, total = extra_bytes, 0, 0
    for request in requests:
        if is_kept(request, adopted=adopted):
            kept += request.num_bytes
            continue
        staged = staged_bytes(request)
        largest, total = max(largest, staged), total + staged
        for use in request.uses:
            if adopts([device for device, _ in use]):
                kept += sum(request.shards[number].num_bytes for _, number in use)
    return MemoryNeed(kept, largest, total)


def share_out(need: MemoryNeed, host_bytes: int | None, workers: int) -> tuple[Budget, int | None]:
    """Divide ``host_bytes`` into threads and blocks, and buffers for transfers to devices.

    The latter are None if all shards stay in host memory. A budget of the caller must hold the
    largest tensor; blocks get at most half of the rest, so that one tensor can be read during
    the transfer of another.

    Raises:
        LayoutError: ``host_bytes`` is too small for one thread and the largest tensor.
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
            f"host_bytes={host_bytes}: the shards of one tensor need {need.largest_bytes} bytes "
            f"for their transfer, and reading at least {LEAST_BYTES}. Pass host_bytes="
            f"{need.largest_bytes + LEAST_BYTES} or more."
        )
    budget = load_budget(max(LEAST_BYTES, left // 2), workers)
    return budget, min(host_bytes - budget.host_bytes, need.passing_bytes)


def _staging_bytes(largest_bytes: int) -> int:
    """Return enough for reading one tensor during the transfer of another, within bounds."""
    most = max(largest_bytes, _MAX_STAGING_BYTES)
    return max(_MIN_STAGING_BYTES, min(2 * largest_bytes, most))


def check_memory(need: MemoryNeed, reading_bytes: int, in_flight_bytes: int = 0) -> None:
    """Refuse a load that exceeds the available memory.

    Raises:
        LayoutError: with the needed and the available bytes.
    """
    total = need.kept_bytes + in_flight_bytes + reading_bytes
    there = available_bytes()
    if there is not None and total + _SPARE_BYTES > there:
        raise LayoutError(
            f"the load needs {total} bytes of host memory (arrays {need.kept_bytes}, transfers "
            f"{in_flight_bytes}, reading {reading_bytes}), and {there} are available. "
            "Load fewer tensors with include=, another dtype=, or onto more machines."
        )


def available_bytes() -> int | None:
    """Return the memory that this process can still allocate; None if the system has no figure."""
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
    """Return the page cache in the cgroup, which the kernel evicts under memory pressure."""
    for line in (_CGROUP / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
