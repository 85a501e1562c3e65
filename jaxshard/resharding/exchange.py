"""The exchange route: shards between devices of several processes.

A process cannot write to another's device by itself, so all of them run one program over the
union of both device sets, in which devices send to each other. Every shard is split into the
pieces that its receivers want. Pieces are sent in rounds: in each, a device sends to at most
one device and receives from at most one.

    source  |--0--|--1--|              devices 0 1
    target        |a|b|c|d|            devices 1 2 3 4
    round 1   0 → 1 (a)   1 → 3 (c)
    round 2   0 → 2 (b)   1 → 4 (d)

Beyond source and target, each device holds one outgoing and one incoming piece. A device that
is in only one of the sets also holds a blank shard of the other.
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
from ..core.runtime import cached
from .compiled import Executable, compile_program
from .geometry import ShardingChange, Traffic, all_device_boxes, as_bits, data_of, from_bits

_AXIS = "device"


@dataclass(frozen=True, slots=True)
class Send:
    """Copy of the elements ``box`` (global) between devices of the union, or within one."""

    source: int
    target: int
    box: Box


@dataclass(frozen=True, slots=True)
class Round:
    """Pieces of one shape, sent together: at most one from and one to each device."""

    shape: tuple[int, ...]
    sends: tuple[Send, ...]


@dataclass(frozen=True)
class ExchangeProgram:
    """Compiled exchange of arrays of one geometry."""

    move: ShardingChange
    devices: tuple[jax.Device, ...]
    rounds: tuple[Round, ...]
    executable: Executable

    def __call__(self, array: jax.Array) -> jax.Array:
        """Return the array at the move's target; all processes of the union must call this."""
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
def program(move: ShardingChange) -> ExchangeProgram:
    """Compile the program of ``move``, the same in every process of the union."""
    devices = union(move)
    found = rounds(move)
    sharding = NamedSharding(Mesh(np.array(devices), (_AXIS,)), PartitionSpec(_AXIS))
    held, wanted = _local(move.source, move), _local(move.target, move)
    tables = [_tables(r, move, devices) for r in found]

    def exchange(shard: jax.Array) -> jax.Array:
        bits = as_bits(shard)
        me = jax.lax.axis_index(_AXIS)
        out = jnp.zeros(wanted, bits.dtype)
        for one_round, table in zip(found, tables, strict=True):
            size = one_round.shape or (1,)
            piece = jax.lax.dynamic_slice(bits, table.out[me], size)
            piece = jax.lax.ppermute(piece, _AXIS, [(s.source, s.target) for s in one_round.sends])
            before = jax.lax.dynamic_slice(out, table.into[me], size)
            piece = jnp.where(table.receives[me], piece, before)
            out = jax.lax.dynamic_update_slice(out, piece, table.into[me])
        return from_bits(out, move.dtype)

    spec = PartitionSpec(_AXIS)
    # check_vma cannot follow tables that are indexed by the device's own number
    mapped = jax.shard_map(
        exchange, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    described = jax.ShapeDtypeStruct(_stacked(held, len(devices)), move.dtype)
    with jax.enable_x64(True):
        made = compile_program(mapped, [described], (sharding,), sharding)
    return ExchangeProgram(move, devices, found, made)


def union(move: ShardingChange) -> tuple[jax.Device, ...]:
    """Return all devices of source and target, in the same order in every process."""
    both = set(move.source.device_set) | set(move.target.device_set)
    return tuple(sorted(both, key=lambda d: d.id))


@cached(4096)
def rounds(move: ShardingChange) -> tuple[Round, ...]:
    """Return all pieces in rounds, without two pieces from or to one device in a round."""
    num_devices = len(union(move))
    by_shape: dict[tuple[int, ...], list[Send]] = defaultdict(list)
    for send in _sends(move):
        by_shape[send.box.shape].append(send)
    found = []
    for shape, sends in by_shape.items():
        # by distance: pieces with equal distance have distinct senders and receivers
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


def exchange_traffic(move: ShardingChange) -> Traffic:
    """Return the bytes that all devices of all processes receive, per kind of link."""
    same = cross = 0
    for send in _sends(move):
        num_bytes = send.box.size * move.dtype.itemsize
        if send.source == send.target:
            same += num_bytes
        else:
            cross += num_bytes
    return Traffic(same, cross)


def blank_bytes(move: ShardingChange) -> int:
    """Return the bytes of the blank shard on a device that is in only one of the sets."""
    source, target = move.source.device_set, move.target.device_set
    blank = move.source_shard_bytes if target - source else 0
    return max(blank, move.target_shard_bytes if source - target else 0)


@cached(4096)
def _sends(move: ShardingChange) -> tuple[Send, ...]:
    """Return all pieces, each from the nearest replica, of these the least used one."""
    devices = union(move)
    at = {device: n for n, device in enumerate(devices)}
    holders: dict[Box, list[jax.Device]] = defaultdict(list)
    for device, box in all_device_boxes(move.source, move.shape).items():
        holders[box].append(device)
    sent = dict.fromkeys(devices, 0)
    parts: dict[Box, list[tuple[Box, list[jax.Device]]]] = {}  # computed once for all replicas
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
    """For each device, the start of its piece of one round in its source and target shard."""

    out: Any
    into: Any
    receives: Any


def _tables(one_round: Round, move: ShardingChange, devices: Sequence[jax.Device]) -> _Tables:
    ndim = max(len(move.shape), 1)
    out = np.zeros((len(devices), ndim), np.int32)
    into = np.zeros((len(devices), ndim), np.int32)
    receives = np.zeros(len(devices), bool)
    sources = all_device_boxes(move.source, move.shape)
    targets = all_device_boxes(move.target, move.shape)
    for send in one_round.sends:
        receives[send.target] = True
        if move.shape:
            out[send.source] = send.box.within(sources[devices[send.source]]).start
            into[send.target] = send.box.within(targets[devices[send.target]]).start
    return _Tables(*map(jnp.asarray, (out, into, receives)))


def _local(sharding: Any, move: ShardingChange) -> tuple[int, ...]:
    """Return the shape of one shard in the program: at least one dim."""
    return tuple(sharding.shard_shape(move.shape)) or (1,)


def _stacked(shape: tuple[int, ...], num: int) -> tuple[int, ...]:
    return (num * shape[0], *shape[1:])


def _on_union(array: jax.Array, move: ShardingChange, devices: Sequence[jax.Device]) -> jax.Array:
    """Stack the source shards along dim 0, with a blank for devices without a shard."""
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
