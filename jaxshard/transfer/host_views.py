"""The route of the CPU backend, where host memory *is* device memory: one copy, by NumPy.

Every distinct target shard is put together once, from zero-copy views of the source
shards, in the buffer that becomes the device's; replicas share it. A shard that is one aligned run
of a source shard is not copied at all but becomes a view of it. Nothing is compiled.

    source shards   ░░░░ ▒▒▒▒        views
    target shards   ░░▒▒ ░░▒▒        one buffer each, filled by a few threads

Such buffers belong to NumPy: a program that is given one by donation uses another for
its result. Dtypes narrower than a byte have no zero-copy view and take the device routes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import jax
import numpy as np
import numpy.typing as npt

from ..box import Box
from .geometry import Move, is_contiguous, num_bytes

Bytes = npt.NDArray[np.generic]

_ALIGNMENT_BYTES = 64  # XLA:CPU copies what is not aligned so
_TASK_BYTES = 8 << 20  # below, a thread costs more to wake than it saves
_AHEAD_BYTES = 256 << 20  # of target shards being filled before the first is waited for


@dataclass(frozen=True, slots=True)
class Fill:
    """One distinct target shard and the parts of source shards (by number) that fill it."""

    shape: tuple[int, ...]
    copies: tuple[tuple[int, Box, Box], ...]  # source, box in its shard, box in this one
    may_alias: bool


@dataclass(frozen=True, slots=True)
class Filling:
    """All distinct shards of a move, and which of them each target device holds."""

    fills: tuple[Fill, ...]
    of_device: tuple[int, ...]


@lru_cache(maxsize=8192)
def filling(move: Move) -> Filling:
    """The plan for one move; a replica's share is the first replica's."""
    first_holder: dict[Box, int] = {}
    for ordinal, box in enumerate(move.source_boxes):
        first_holder.setdefault(box, ordinal)
    distinct: dict[Box, int] = {}
    of_device = [distinct.setdefault(box, len(distinct)) for box in move.target_boxes]
    fills = []
    for wanted in distinct:
        copies = []
        for held, ordinal in first_holder.items():
            shared = held.intersect(wanted)
            if shared is not None:
                copies.append((ordinal, shared.within(held), shared.within(wanted)))
        held_shape = move.source_boxes[copies[0][0]].shape
        alias = len(copies) == 1 and is_contiguous(copies[0][1], held_shape)
        fills.append(Fill(wanted.shape, tuple(copies), alias))
    return Filling(tuple(fills), tuple(of_device))


def run(
    arrays: Iterable[jax.Array], moves: Sequence[Move], done: Callable[[int, jax.Array], None]
) -> None:
    """Carry out ``moves``; ``done(n, array)`` is called as each one is complete, in order."""
    waiting: deque[_Started] = deque()
    ahead_bytes = 0
    for n, (array, move) in enumerate(zip(arrays, moves, strict=True)):
        started = _start(n, array, move)
        waiting.append(started)
        ahead_bytes += started.new_bytes
        while waiting and (ahead_bytes > _AHEAD_BYTES or not waiting[0].tasks):
            ahead_bytes -= waiting[0].new_bytes
            _finish(waiting.popleft(), done)
    while waiting:
        _finish(waiting.popleft(), done)


@dataclass(frozen=True, slots=True)
class _Started:
    n: int
    move: Move
    buffers: list[Bytes]
    tasks: list[Future[None]]
    new_bytes: int


def _start(n: int, array: jax.Array, move: Move) -> _Started:
    plan = filling(move)
    shards = array.addressable_shards
    views: dict[int, Bytes] = {}
    buffers: list[Bytes] = []
    copies: list[tuple[Bytes, Bytes]] = []
    new_bytes = 0
    for fill in plan.fills:
        for ordinal, _, _ in fill.copies:
            if ordinal not in views:
                views[ordinal] = np.asarray(shards[ordinal].data)
        parts = [(views[o][src.slices], dst) for o, src, dst in fill.copies]
        if fill.may_alias and _is_aligned(parts[0][0]):
            buffers.append(parts[0][0])
            continue
        buffer = aligned_empty(fill.shape, move.dtype)
        new_bytes += buffer.nbytes
        buffers.append(buffer)
        copies += [(_as_bits(buffer[dst.slices]), _as_bits(part)) for part, dst in parts]
    return _Started(n, move, buffers, list(_submit(copies)), new_bytes)


def _finish(started: _Started, done: Callable[[int, jax.Array], None]) -> None:
    for task in started.tasks:
        task.result()
    move = started.move
    if move.target.is_fully_replicated:
        order = iter(started.buffers)
    else:
        order = iter([started.buffers[n] for n in filling(move).of_device])
    done(
        started.n,
        jax.make_array_from_callback(move.shape, move.target, lambda _: next(order)),
    )


def _submit(copies: Sequence[tuple[Bytes, Bytes]]) -> Iterator[Future[None]]:
    """Copy small parts here, and large ones in threads, about `_TASK_BYTES` at a time."""
    total = sum(dst.nbytes for dst, _ in copies)
    if total < _TASK_BYTES:
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
    """A large copy in parts along dim 0, so that several threads share it."""
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
    """An uninitialized array whose memory XLA:CPU takes over instead of copying it."""
    size = num_bytes(shape, dtype)
    raw = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[skip : skip + size].view(dtype).reshape(shape)


def _as_bits(view: Bytes) -> Bytes:
    """The same memory as integers: NumPy copies a strided bfloat16 three times slower."""
    return view.view(f"u{view.itemsize}") if view.itemsize <= 8 else view


def _is_aligned(view: Bytes) -> bool:
    return bool(view.ctypes.data % _ALIGNMENT_BYTES == 0)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(min(cpus, 8), "jaxshard-reshard")
