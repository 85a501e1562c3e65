"""The exchange route: shards between devices of several processes.

No process can put a piece on another's device by itself; all of them run one program over the
union of both sets, in which devices send to each other. Every shard is cut into the pieces
that its receivers want, and the pieces travel in rounds, in which each device
sends to at most one other and receives from at most one.

    source  |--0--|--1--|              devices 0 1
    target        |a|b|c|d|            devices 1 2 3 4
    round 1   0 → 1 (a)   1 → 3 (c)
    round 2   0 → 2 (b)   1 → 4 (d)

What each device holds beyond its source and its target: one piece on its way out, and
one on its way in; and where it is in only one of the sets, a blank shard of the other kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..core.box import Box
from ..core.cache import cached
from .geometry import Move, Traffic, all_device_boxes, as_bits, from_bits
from .programs import Executable, compile_program
from .shards import data_of

_AXIS = "device"


@dataclass(frozen=True, slots=True)
class Send:
    """The elements ``box`` (global) go from one device of the union to another, or stay."""

    source: int
    target: int
    box: Box


@dataclass(frozen=True, slots=True)
class Round:
    """Pieces of one shape that travel at once: every device sends one at most, and gets one."""

    shape: tuple[int, ...]
    sends: tuple[Send, ...]


@dataclass(frozen=True)
class Program:
    """The exchange of arrays of one geometry, compiled."""

    move: Move
    devices: tuple[jax.Device, ...]
    rounds: tuple[Round, ...]
    executable: Executable

    def __call__(self, array: jax.Array) -> jax.Array:
        """The array at the move's target; all processes of the union must call it."""
        move = self.move
        out = self.executable.call(_on_union(array, move, self.devices))
        there = {shard.device: shard.data for shard in out.addressable_shards}
        mine = [d for d in all_device_boxes(move.target, move.shape) if d in there]
        parts = [there[device] for device in mine]
        if not move.shape:
            parts = [part.reshape(()) for part in parts]
        return jax.make_array_from_single_device_arrays(
            move.shape, move.target, parts, dtype=move.dtype
        )


@cached(4096)
def program(move: Move) -> Program:
    """The program for ``move``. Every process of the union gets the same."""
    devices = union(move)
    found = rounds(move)
    sharding = NamedSharding(Mesh(np.array(devices), (_AXIS,)), PartitionSpec(_AXIS))
    held, wanted = _local(move.source, move), _local(move.target, move)
    tables = [_tables(r, move, devices) for r in found]

    def exchange(shard: jax.Array) -> jax.Array:
        bits = as_bits(shard)
        me = jax.lax.axis_index(_AXIS)
        out = jnp.zeros(wanted, bits.dtype)
        for trip, table in zip(found, tables, strict=True):
            size = trip.shape or (1,)
            piece = jax.lax.dynamic_slice(bits, table.out[me], size)
            piece = jax.lax.ppermute(piece, _AXIS, [(s.source, s.target) for s in trip.sends])
            before = jax.lax.dynamic_slice(out, table.into[me], size)
            piece = jnp.where(table.receives[me], piece, before)
            out = jax.lax.dynamic_update_slice(out, piece, table.into[me])
        return from_bits(out, move.dtype)

    spec = PartitionSpec(_AXIS)
    # tables are looked up by a device's own number, which the checker of replicas cannot follow
    mapped = jax.shard_map(
        exchange, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    described = jax.ShapeDtypeStruct(_stacked(held, len(devices)), move.dtype)
    with jax.enable_x64(True):
        made = compile_program(mapped, [described], (sharding,), sharding)
    return Program(move, devices, found, made)


def union(move: Move) -> tuple[jax.Device, ...]:
    """All devices of the source and the target, in an order that every process agrees on."""
    both = set(move.source.device_set) | set(move.target.device_set)
    return tuple(sorted(both, key=lambda d: d.id))


@cached(4096)
def rounds(move: Move) -> tuple[Round, ...]:
    """All pieces, in rounds. No round has two pieces from, or for, one device."""
    num_devices = len(union(move))
    by_shape: dict[tuple[int, ...], list[Send]] = defaultdict(list)
    for send in _sends(move):
        by_shape[send.box.shape].append(send)
    found = []
    for shape, sends in by_shape.items():
        # by how far they go: pieces that go equally far do not meet
        left = sorted(sends, key=lambda s: ((s.target - s.source) % num_devices, s.source))
        while left:
            chosen, later = [], []
            busy: tuple[set[int], set[int]] = (set(), set())
            for send in left:
                if send.source in busy[0] or send.target in busy[1]:
                    later.append(send)
                else:
                    chosen.append(send)
                    busy[0].add(send.source)
                    busy[1].add(send.target)
            found.append(Round(shape, tuple(chosen)))
            left = later
    return tuple(found)


def exchange_traffic(move: Move) -> Traffic:
    """Bytes that all devices of all processes get, from themselves and from others."""
    same = cross = 0
    for send in _sends(move):
        num_bytes = send.box.size * move.dtype.itemsize
        if send.source == send.target:
            same += num_bytes
        else:
            cross += num_bytes
    return Traffic(same, cross)


def blank_bytes(move: Move) -> int:
    """Bytes of the blank shards on a device that is in only one of the two sets."""
    source, target = move.source.device_set, move.target.device_set
    blank = move.source_shard_bytes if target - source else 0
    return max(blank, move.target_shard_bytes if source - target else 0)


@cached(4096)
def _sends(move: Move) -> tuple[Send, ...]:
    """Every piece that a target device wants, from the nearest replica that has sent least."""
    devices = union(move)
    at = {device: n for n, device in enumerate(devices)}
    holders: dict[Box, list[jax.Device]] = defaultdict(list)
    for device, box in all_device_boxes(move.source, move.shape).items():
        holders[box].append(device)
    sent = dict.fromkeys(devices, 0)
    parts: dict[Box, list[tuple[Box, list[jax.Device]]]] = {}  # replicas want the same: look once
    found = []
    for device, wanted in all_device_boxes(move.target, move.shape).items():
        if wanted not in parts:
            touching = ((held.intersect(wanted), who) for held, who in holders.items())
            parts[wanted] = [(shared, who) for shared, who in touching if shared is not None]
        for shared, replicas in parts[wanted]:
            source = min(replicas, key=lambda d: (_distance(d, device), sent[d], d.id))
            sent[source] += shared.size
            found.append(Send(at[source], at[device], shared))
    return tuple(found)


def _distance(a: jax.Device, b: jax.Device) -> int:
    return 0 if a == b else 1 if a.process_index == b.process_index else 2


@dataclass(frozen=True)
class _Tables:
    """By device: where its piece of one round begins in its source shard and its target shard."""

    out: Any
    into: Any
    receives: Any


def _tables(trip: Round, move: Move, devices: Sequence[jax.Device]) -> _Tables:
    ndim = max(len(move.shape), 1)
    out = np.zeros((len(devices), ndim), np.int32)
    into = np.zeros((len(devices), ndim), np.int32)
    receives = np.zeros(len(devices), bool)
    sources = all_device_boxes(move.source, move.shape)
    targets = all_device_boxes(move.target, move.shape)
    for send in trip.sends:
        receives[send.target] = True
        if move.shape:
            out[send.source] = send.box.within(sources[devices[send.source]]).start
            into[send.target] = send.box.within(targets[devices[send.target]]).start
    return _Tables(*map(jnp.asarray, (out, into, receives)))


def _local(sharding: Any, move: Move) -> tuple[int, ...]:
    """The shape of one shard as the program sees it: with at least one dim."""
    return tuple(sharding.shard_shape(move.shape)) or (1,)


def _stacked(shape: tuple[int, ...], num: int) -> tuple[int, ...]:
    return (num * shape[0], *shape[1:])


def _on_union(array: jax.Array, move: Move, devices: Sequence[jax.Device]) -> jax.Array:
    """The source shards below each other, one a device; blank where a device has none."""
    held = _local(move.source, move)
    shape = _stacked(held, len(devices))
    sharding = NamedSharding(Mesh(np.array(devices), (_AXIS,)), PartitionSpec(_AXIS))
    there = {next(iter(shard.devices())): shard for shard in data_of(array)}
    parts = []
    for device in sharding.addressable_devices_indices_map(shape):
        shard = there.get(device)
        if shard is None:
            shard = jnp.zeros(held, move.dtype, device=device)
        parts.append(shard if move.shape else shard.reshape(held))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=move.dtype)
