"""Balanced loads: each byte is read by one process and sent to the others.

For storage that is slower than the network between the hosts. A tensor of which several
processes hold the same shard is first read cut further, so that nobody reads what
another does; then the devices put the wanted shards together.

    wanted     process 0  |---- w ----|     process 1  |---- w ----|
    read       process 0  |-- w --|         process 1          |-- w --|

Everybody decides alike from the shardings, and does the same in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from .. import resharding
from ..core.cache import cached
from ..devices.mesh import partition_spec, placement_of, sharding
from ..distributed.partition import cut_by_replicas
from ..resharding.geometry import all_device_boxes, bits_of
from .requests import ArrayRequest, adopts


def spread(wants: Sequence[ArrayRequest]) -> list[ArrayRequest]:
    """What to read so that no two processes read the same: ``wants`` with other shardings."""
    found, turns = [], 0
    for want in wants:
        shape = want.tensor.shape
        if bits_of(want.dtype) < 8 or not is_shared(want.sharding, shape):
            found.append(want)
            continue
        finer = _finer(want.sharding, shape)
        if finer is None:  # too small to cut: one replica reads it for all, and they take turns
            finer = _one_replica(want.sharding, turns)
            turns += 1
        found.append(want if finer is None else replace(want, sharding=finer))
    return found


def gathered(arrays: Sequence[jax.Array], wants: Sequence[ArrayRequest]) -> list[jax.Array]:
    """The arrays as they are wanted, from what ``spread`` had read; nothing goes over a host."""
    moved = [n for n, w in enumerate(wants) if arrays[n].sharding != w.sharding]
    found = list(arrays)
    if moved:
        there = resharding.reshard(
            [arrays[n] for n in moved], [wants[n].sharding for n in moved], donate=True
        )
        for n, array in zip(moved, there, strict=True):
            found[n] = array
    return found


def kept_bytes(first: Sequence[ArrayRequest], wants: Sequence[ArrayRequest]) -> int:
    """Host memory that the arrays take on CPU devices once they are put together."""
    total = 0
    for before, want in zip(first, wants, strict=True):
        if before.sharding != want.sharding:
            local = list(want.sharding.addressable_devices)
            shard = prod(want.sharding.shard_shape(want.tensor.shape)) * want.dtype.itemsize
            total += shard * len(local) if adopts(local) else 0
    return total


@cached(4096)
def is_shared(named: Sharding, shape: tuple[int, ...]) -> bool:
    """Whether several processes hold one shard."""
    holders: dict[object, set[int]] = {}
    for device, box in all_device_boxes(named, shape).items():
        holders.setdefault(box, set()).add(device.process_index)
    return any(len(processes) > 1 for processes in holders.values())


@cached(4096)
def _finer(named: Sharding, shape: tuple[int, ...]) -> NamedSharding | None:
    """``named`` cut further by all its replicas, so that every device holds something else."""
    if not isinstance(named, NamedSharding):
        return None
    finer = cut_by_replicas(placement_of(named), shape)
    return None if finer is None else sharding(finer, tuple(named.mesh.devices.flat))


def _one_replica(named: Sharding, turn: int) -> NamedSharding | None:
    """``named`` on those of its devices alone that together hold each shard once."""
    if not isinstance(named, NamedSharding):
        return None
    placement = placement_of(named)
    used = {a for axes in placement.spec for a in axes}
    free = tuple(n for a, n in placement.axes if a not in used)
    index = iter(np.unravel_index(turn % prod(free), free) if free else ())
    at = tuple(slice(None) if a in used else int(next(index)) for a, _ in placement.axes)
    names = tuple(a for a, _ in placement.axes if a in used)
    grid = np.asarray(named.mesh.devices[at], dtype=object).reshape(
        tuple(n for a, n in placement.axes if a in used)
    )
    if not names:
        names, grid = ("one",), grid.reshape(1)
    return NamedSharding(Mesh(grid, names), partition_spec(placement))
