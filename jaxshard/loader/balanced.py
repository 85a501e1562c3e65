"""Balanced loads: each byte is read by one process and sent to the others.

For storage that is slower than the network between the hosts. If several processes hold the
same shard of a tensor, it is first read with a finer sharding, so that each byte is read once;
then the devices gather the requested shards.

    wanted     process 0  |---- w ----|     process 1  |---- w ----|
    read       process 0  |-- w --|         process 1          |-- w --|

All processes compute the same from the shardings, and run the same programs in the same order.
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
    """Return ``wants`` with shardings of which no two processes read the same byte."""
    found, turns = [], 0
    for want in wants:
        shape = want.tensor.shape
        if bits_of(want.dtype) < 8 or not is_shared(want.sharding, shape):
            found.append(want)
            continue
        finer = _finer(want.sharding, shape)
        if finer is None:  # too small to split: one replica reads it for all, in turns
            finer = _one_replica(want.sharding, turns)
            turns += 1
        found.append(want if finer is None else replace(want, sharding=finer))
    return found


def gathered(arrays: Sequence[jax.Array], wants: Sequence[ArrayRequest]) -> list[jax.Array]:
    """Reshard the arrays from the shardings of `spread` to those of ``wants``, on the devices."""
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
    """Return the host memory of the gathered arrays on CPU devices."""
    total = 0
    for before, want in zip(first, wants, strict=True):
        if before.sharding != want.sharding:
            local = list(want.sharding.addressable_devices)
            shard = prod(want.sharding.shard_shape(want.tensor.shape)) * want.dtype.itemsize
            total += shard * len(local) if adopts(local) else 0
    return total


@cached(4096)
def is_shared(named: Sharding, shape: tuple[int, ...]) -> bool:
    """Return whether several processes hold the same shard."""
    holders: dict[object, set[int]] = {}
    for device, box in all_device_boxes(named, shape).items():
        holders.setdefault(box, set()).add(device.process_index)
    return any(len(processes) > 1 for processes in holders.values())


@cached(4096)
def _finer(named: Sharding, shape: tuple[int, ...]) -> NamedSharding | None:
    """Return ``named`` split further by all its replicas; None if it is not divisible."""
    if not isinstance(named, NamedSharding):
        return None
    finer = cut_by_replicas(placement_of(named), shape)
    return None if finer is None else sharding(finer, tuple(named.mesh.devices.flat))


def _one_replica(named: Sharding, turn: int) -> NamedSharding | None:
    """Return ``named`` on one replica of its devices, chosen by ``turn``."""
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
