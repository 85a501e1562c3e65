"""The CPU route: NumPy copies between zero-copy views of shards.

Every distinct target shard is assembled once, from zero-copy views of the source shards, in
the buffer that becomes the device's; replicas share it. A shard that is one aligned run of a
source shard is not copied but aliases it. Nothing is compiled.

    source shards   ░░░░ ▒▒▒▒        views
    target shards   ░░▒▒ ░░▒▒        one buffer each, filled by a few threads

NumPy owns such buffers: a program that receives one by donation allocates another for its
result. Dtypes narrower than a byte have no zero-copy view and use the device routes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from ..core.box import Box
from ..core.runtime import cached
from .geometry import ShardingChange, is_contiguous, num_bytes

Bytes = npt.NDArray[np.generic]

_ALIGNMENT_BYTES = 64  # XLA:CPU copies buffers with less alignment
_INLINE_BYTES = 1 << 20  # for less, waking a thread costs more than it saves
_TASK_BYTES = 8 << 20
_AHEAD_BYTES = 256 << 20  # target shards being filled before the call waits for the first


Slices = tuple[Any, ...]  # they end in an ellipsis, so that a 0-d array stays an array


@dataclass(frozen=True, slots=True)
class Fill:
    """Distinct target shard, and the parts of source shards that fill it.

    Attributes:
        shape: of the target shard.
        copies: (number of the source shard, slices of it, slices of this one).
        may_alias: whether it is one run of one source shard.
    """

    shape: tuple[int, ...]
    copies: tuple[tuple[int, Slices, Slices], ...]
    may_alias: bool


@dataclass(frozen=True, slots=True)
class Filling:
    """Plan of one move.

    Attributes:
        sources: numbers of the source shards to read.
        fills: all distinct target shards.
        of_device: for each target device, the index of its shard in ``fills``.
        bits: the unsigned dtype in which elements are copied.
    """

    sources: tuple[int, ...]
    fills: tuple[Fill, ...]
    of_device: tuple[int, ...]
    bits: np.dtype[np.generic]


@cached(8192)
def filling(move: ShardingChange) -> Filling:
    """Return the plan of one move, which reads the first of equal replicas."""
    first_holder: dict[Box, int] = {}
    for ordinal, box in enumerate(move.source_boxes):
        first_holder.setdefault(box, ordinal)
    distinct: dict[Box, int] = {}
    of_device = [distinct.setdefault(box, len(distinct)) for box in move.target_boxes]
    fills = [_fill(wanted, first_holder) for wanted in distinct]
    # NumPy copies strided bfloat16 three times slower than uint16
    bits = f"u{move.dtype.itemsize}" if move.dtype.itemsize <= 8 else move.dtype
    return Filling(
        tuple({o: None for fill in fills for o, _, _ in fill.copies}),
        tuple(fills),
        (0,) if move.target.is_fully_replicated else tuple(of_device),
        np.dtype(bits),
    )


def num_copied(move: ShardingChange) -> int:
    """Return the number of distinct target shards that cannot alias a source shard."""
    return sum(not fill.may_alias for fill in filling(move).fills)


def _fill(wanted: Box, holders: dict[Box, int]) -> Fill:
    copies = []
    alias = False
    for held, ordinal in holders.items():
        shared = held.intersect(wanted)
        if shared is not None:
            source, target = shared.within(held), shared.within(wanted)
            copies.append((ordinal, (*source.slices, ...), (*target.slices, ...)))
            alias = shared == wanted and is_contiguous(source, held.shape)
    return Fill(wanted.shape, tuple(copies), alias)


def run(
    arrays: Iterable[jax.Array],
    moves: Sequence[ShardingChange],
    done: Callable[[int, jax.Array], None],
    *,
    share: bool = True,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Execute ``moves``, calling ``done(n, array)`` as each one completes.

    A move without copies completes immediately, while threads copy for earlier moves.
    ``meanwhile`` is called once all moves have started; threads may still be copying then.

    Without ``share``, no target shard aliases a source shard.
    """
    waiting: deque[_Started] = deque()
    ahead_bytes = 0
    for n, (array, move) in enumerate(zip(arrays, moves, strict=True)):
        started = _start(n, array, move, share=share)
        if not started.tasks:
            _finish(started, done)
            continue
        waiting.append(started)
        ahead_bytes += started.new_bytes
        while ahead_bytes > _AHEAD_BYTES:
            ahead_bytes -= waiting[0].new_bytes
            _finish(waiting.popleft(), done)
    meanwhile()
    while waiting:
        _finish(waiting.popleft(), done)


@dataclass(frozen=True, slots=True)
class _Started:
    n: int
    move: ShardingChange
    shards: list[Bytes]
    tasks: list[Future[None]]
    new_bytes: int


def _start(n: int, array: jax.Array, move: ShardingChange, *, share: bool) -> _Started:
    plan = filling(move)
    data = array.addressable_shards
    views = {o: np.asarray(data[o].data).view(plan.bits) for o in plan.sources}
    shards: list[Bytes] = []
    copies: list[tuple[Bytes, Bytes]] = []
    new_bytes = 0
    for fill in plan.fills:
        if share and fill.may_alias:
            ordinal, source, _ = fill.copies[0]
            view = views[ordinal][source]
            if view.__array_interface__["data"][0] % _ALIGNMENT_BYTES == 0:
                shards.append(view)
                continue
        shard = aligned_empty(fill.shape, plan.bits)
        new_bytes += shard.nbytes
        shards.append(shard)
        copies += [(shard[target], views[o][source]) for o, source, target in fill.copies]
    return _Started(n, move, shards, list(_submit(copies, new_bytes)), new_bytes)


def _finish(started: _Started, done: Callable[[int, jax.Array], None]) -> None:
    for task in started.tasks:
        task.result()
    move = started.move
    typed = [shard.view(move.dtype) for shard in started.shards]
    order = iter([typed[n] for n in filling(move).of_device])
    done(
        started.n,
        jax.make_array_from_callback(move.shape, move.target, lambda _: next(order)),
    )


def _submit(copies: Sequence[tuple[Bytes, Bytes]], total_bytes: int) -> Iterator[Future[None]]:
    """Copy small parts in this thread, and large ones in others, `_TASK_BYTES` per task."""
    if total_bytes < _INLINE_BYTES:
        if copies:
            _copy(copies)
        return
    batch: list[tuple[Bytes, Bytes]] = []
    batch_bytes = 0
    for dst, src in copies:
        for part in _rows(dst, src):
            batch.append(part)
            batch_bytes += part[0].nbytes
            if batch_bytes >= _TASK_BYTES:
                yield _pool().submit(_copy, batch)
                batch, batch_bytes = [], 0
    if batch:
        yield _pool().submit(_copy, batch)


def _rows(dst: Bytes, src: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
    """Split a large copy along dim 0, so that several threads share it."""
    parts = min(max(dst.nbytes // _TASK_BYTES, 1), dst.shape[0] if dst.ndim else 1)
    if parts == 1:
        yield dst, src
        return
    for k in range(parts):
        rows = slice(dst.shape[0] * k // parts, dst.shape[0] * (k + 1) // parts)
        yield dst[rows], src[rows]


def _copy(copies: Sequence[tuple[Bytes, Bytes]]) -> None:
    for dst, src in copies:
        np.copyto(dst, src)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Bytes:
    """Return an uninitialized array whose memory XLA:CPU can alias."""
    size = num_bytes(shape, dtype)
    raw = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[skip : skip + size].view(dtype).reshape(shape)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(min(cpus, 8), "jaxshard-reshard")
