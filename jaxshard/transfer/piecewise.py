"""The piecewise route: cut, copy device to device, join. Carries out what `pieces` decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .bits import as_bits, from_bits
from .geometry import Move
from .pieces import WHOLE, Cut, Join, Wave, positions, waves
from .shards import data_of, gathered_from

_AXIS = "device"


@dataclass(frozen=True)
class Program:
    """The cuts and joins of several moves between the same devices, compiled."""

    moves: tuple[Move, ...]
    rounds: tuple[_Round, ...]

    @property
    def peak_bytes(self) -> int:
        """Bytes of cuts, arrivals and temporaries on the fullest device, at the worst moment."""
        return max((r.peak_bytes for r in self.rounds), default=0)

    @property
    def num_compiled(self) -> int:
        """How many programs were compiled."""
        return sum(len(r.joins) + (r.cuts is not None) for r in self.rounds)

    def __call__(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """The arrays, each at its move's target. They must be at its source."""
        sources = [data_of(x) for x in arrays]
        shards: list[list[jax.Array | None]] = [[None] * len(m.target_boxes) for m in self.moves]
        for n, part in enumerate(self.rounds):
            part.run(self.moves, sources, shards)
            if n + 1 < len(self.rounds):  # the bound holds only if this wave's pieces are gone
                jax.block_until_ready(shards)
        return [
            jax.make_array_from_single_device_arrays(m.shape, m.target, list(_complete(s)))
            for m, s in zip(self.moves, shards, strict=True)
        ]


@dataclass(frozen=True)
class _Round:
    """One wave of each move: a program that cuts, and one that joins per set of devices."""

    waves: tuple[Wave | None, ...]
    cuts: jax.stages.Compiled | None
    joins: tuple[tuple[tuple[int, ...], jax.stages.Compiled], ...]
    peak_bytes: int

    def run(
        self,
        moves: Sequence[Move],
        sources: Sequence[Sequence[jax.Array]],
        shards: Sequence[list[jax.Array | None]],
    ) -> None:
        """Fill in the shards of this wave's targets."""
        cut = self._cut(moves, sources)
        joins = dict(self.joins)
        waiting: dict[tuple[int, ...], list[tuple[int, list[jax.Array]]]] = {}
        for m, wave in enumerate(self.waves):
            for join in wave.joins if wave else ():
                devices = tuple(moves[m].target_devices[d] for d in join.devices)
                made = {WHOLE: sources[m], **dict(enumerate(cut[m]))}
                slots = [
                    _send([made[o.cut][o.source] for o in slot], devices) for slot in join.slots
                ]
                if len(slots) == 1:
                    _place(shards[m], join.devices, data_of(slots[0]))
                else:
                    waiting.setdefault(join.devices, []).append((m, slots))
        for devices, parts in waiting.items():
            joined = joins[devices](*(slots for _, slots in parts))
            for (m, _), array in zip(parts, joined, strict=True):
                _place(shards[m], devices, data_of(array))

    def _cut(
        self, moves: Sequence[Move], sources: Sequence[Sequence[jax.Array]]
    ) -> list[list[list[jax.Array]]]:
        if self.cuts is None:
            return [[] for _ in moves]
        cutting = [m for m, wave in enumerate(self.waves) if wave and wave.cuts]
        stacked = [_stack(sources[m], moves[m].source_devices) for m in cutting]
        found: list[list[list[jax.Array]]] = [[] for _ in moves]
        for m, outputs in zip(cutting, self.cuts(*stacked), strict=True):
            found[m] = [data_of(x) for x in outputs]
        return found


@lru_cache(maxsize=4096)
def program(moves: tuple[Move, ...], limit_bytes: tuple[int, ...]) -> Program:
    """The program for moves between the same devices, each held to its own limit if possible."""
    planned = [waves(m, limit) for m, limit in zip(moves, limit_bytes, strict=True)]
    rounds = []
    for n in range(max(map(len, planned))):
        now = tuple(p[n] if n < len(p) else None for p in planned)
        rounds.append(_round(moves, now))
    return Program(moves, tuple(rounds))


def _round(moves: tuple[Move, ...], now: tuple[Wave | None, ...]) -> _Round:
    temporary = 0
    cutting = [(m, w.cuts) for m, w in zip(moves, now, strict=True) if w and w.cuts]
    cuts = _compile_cuts(cutting) if cutting else None
    if cuts is not None:
        temporary = _temporary_bytes(cuts)
    by_devices: dict[tuple[int, ...], list[tuple[Move, Join]]] = {}
    for m, wave in zip(moves, now, strict=True):
        for join in wave.joins if wave else ():
            if len(join.slots) > 1:
                by_devices.setdefault(join.devices, []).append((m, join))
    joins = tuple((devices, _compile_joins(parts)) for devices, parts in by_devices.items())
    temporary = max([temporary, *(_temporary_bytes(j) for _, j in joins)])
    peak = sum(w.peak_bytes for w in now if w)
    return _Round(now, cuts, joins, peak + temporary)


def _compile_cuts(parts: Sequence[tuple[Move, tuple[Cut, ...]]]) -> jax.stages.Compiled:
    mesh = _line(parts[0][0].source_devices)

    def cut(*shards: jax.Array) -> list[list[jax.Array]]:
        me = jax.lax.axis_index(_AXIS)
        return [
            [from_bits(_slice(as_bits(shard), c, me), m.dtype) for c in cuts]
            for shard, (m, cuts) in zip(shards, parts, strict=True)
        ]

    inputs = [
        jax.ShapeDtypeStruct(_stacked_shape(m.source_boxes[0].shape, mesh), m.dtype)
        for m, _ in parts
    ]
    return _compile(cut, mesh, inputs)


def _slice(shard: jax.Array, cut: Cut, me: jax.Array) -> jax.Array:
    if len(set(cut.starts)) == 1:
        limits = tuple(a + n for a, n in zip(cut.starts[0], cut.shape, strict=True))
        return jax.lax.slice(shard, cut.starts[0], limits)
    start = jnp.asarray(np.array(cut.starts, np.int32))[me]
    return jax.lax.dynamic_slice(shard, list(start), cut.shape)


def _compile_joins(parts: Sequence[tuple[Move, Join]]) -> jax.stages.Compiled:
    move, join = parts[0]
    mesh = _line(tuple(move.target_devices[d] for d in join.devices))

    def joined(*slots: list[jax.Array]) -> list[jax.Array]:
        return [
            from_bits(_assemble([as_bits(s) for s in pieces], j), m.dtype)
            for pieces, (m, j) in zip(slots, parts, strict=True)
        ]

    inputs = [
        [
            jax.ShapeDtypeStruct(_stacked_shape(shape, mesh), m.dtype)
            for shape in product(*j.segments)
        ]
        for m, j in parts
    ]
    return _compile(joined, mesh, inputs)


def _assemble(slots: Sequence[jax.Array], join: Join) -> jax.Array:
    cut_dims = [d for d, lengths in enumerate(join.segments) if len(lengths) > 1]
    if len(cut_dims) == 1:
        return jnp.concatenate(slots, axis=cut_dims[0])
    whole = jnp.zeros([sum(lengths) for lengths in join.segments], slots[0].dtype)
    for at, slot in zip(positions(join.segments), slots, strict=True):
        whole = jax.lax.dynamic_update_slice(whole, slot, at)
    return whole


def _compile(
    function: Callable[..., Any], mesh: Mesh, inputs: Sequence[object]
) -> jax.stages.Compiled:
    spread = PartitionSpec(_AXIS)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=spread,
        out_specs=spread,
        check_vma=False,
    )
    sharding = NamedSharding(mesh, spread)
    with jax.enable_x64(True):
        return jax.jit(mapped, in_shardings=sharding).lower(*inputs).compile()


def _temporary_bytes(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    return int(memory.temp_size_in_bytes) if memory is not None else 0


@lru_cache(maxsize=1024)
def _line(devices: tuple[jax.Device, ...]) -> Mesh:
    return Mesh(np.array(devices, dtype=object), (_AXIS,), axis_types=(AxisType.Auto,))


def _stacked_shape(shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
    return (mesh.devices.size * shape[0], *shape[1:])


def _stack(shards: Sequence[jax.Array], devices: tuple[jax.Device, ...]) -> jax.Array:
    """The shards seen as one array, cut along dim 0 by device; nothing is copied."""
    mesh = _line(devices)
    shape = _stacked_shape(shards[0].shape, mesh)
    sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
    return jax.make_array_from_single_device_arrays(shape, sharding, list(shards))


def _send(pieces: Sequence[jax.Array], devices: tuple[jax.Device, ...]) -> jax.Array:
    """The pieces, each copied to its device, as one array cut along dim 0."""
    mesh = _line(devices)
    shape = _stacked_shape(pieces[0].shape, mesh)
    return gathered_from(pieces, NamedSharding(mesh, PartitionSpec(_AXIS)), shape)


def _place(
    shards: list[jax.Array | None], devices: Sequence[int], found: Sequence[jax.Array]
) -> None:
    for device, shard in zip(devices, found, strict=True):
        shards[device] = shard


def _complete(shards: Sequence[jax.Array | None]) -> list[jax.Array]:
    assert all(s is not None for s in shards), "every target device has its shard"
    return [s for s in shards if s is not None]
