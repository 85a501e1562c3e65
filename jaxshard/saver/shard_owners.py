"""Ownership of shards: which process writes which one.

Several processes fill the same files, each the parts that it alone is to write. A shard
that several hold is written by one of them; shards of one process that lie side by
side are joined, so that rows are written as long as they can be.

    held by       0 0 1 1            written    by process 0     by process 1
    the tensor    a b c d  ×2 rows              ab·· ab··        ··cd ··cd

Every process computes the same shares from the shardings alone, and they compare that at the
end: what nobody thinks his own would be zeros in a file that looks whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import jax

from ..core.box import Box
from ..core.catalog import Catalog, StoredShard, Tensor
from ..core.dtypes import in_units
from ..core.ranges import Runs, byte_runs
from ..distributed.partition import assign
from ..errors import LayoutError, StorageError
from ..planning.copies import TensorCopy, move_into
from ..planning.outputs import Outputs
from ..resharding.geometry import all_device_boxes
from ..storage.resources import Counts
from .host_shards import Array

_Holders = tuple[tuple[Box, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a box that this process writes lies in the box that a rank's file holds."""

    rank: int
    runs: Runs

    def spans(self, offset: int, num_bytes: int) -> Iterator[tuple[int, int]]:
        """(offset in the tensor's data, length) of bytes ``offset …`` of the box, row by row.

        >>> list(Place(0, Runs(offset=8, length=4, outer=((3, 16),))).spans(2, 6))
        [(10, 2), (24, 4)]
        """
        while num_bytes:
            row, inside = divmod(offset, self.runs.length)
            length = min(self.runs.length - inside, num_bytes)
            yield self._start(row) + inside, length
            offset, num_bytes = offset + length, num_bytes - length

    def _start(self, row: int) -> int:
        at = self.runs.offset
        for count, stride in reversed(self.runs.outer):
            row, index = divmod(row, count)
            at += index * stride
        return at


@dataclass(frozen=True, slots=True)
class SharedMove:
    """The journey of one tensor's shards; ``Target.ranks`` are indices into ``places``."""

    move: TensorCopy
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Owners:
    """Which process writes each distinct shard.

    Attributes:
        of_box: by a tensor's name and the shard's box.
        digest: of the choices between several processes. All must have made the same, or a
            shard is written by nobody.
    """

    of_box: Mapping[tuple[str, Box], int] = field(repr=False)
    digest: str


def owners(arrays: Mapping[str, Array]) -> Owners:
    """The process that writes each distinct shard, about equally many bytes each.

    A shard that one process alone holds weighs nothing: an array on a device of each process's
    own (a step counter) looks otherwise in each, and must not change what they choose for
    the rest. Of what is on the host each has a copy, and process 0 writes it.
    """
    weights: dict[tuple[str, Box], int] = {}
    holders: dict[tuple[str, Box], tuple[int, ...]] = {}
    found: dict[tuple[str, Box], int] = {}
    for name, array in arrays.items():
        if not isinstance(array, jax.Array):
            found[name, Box.whole(array.shape)] = 0
            continue
        for box, processes in _holders(array.sharding, tuple(array.shape)):
            if len(processes) == 1:
                found[name, box] = processes[0]
            else:
                weights[name, box] = box.size * array.dtype.itemsize
                holders[name, box] = processes
    chosen = assign(weights, holders)
    return Owners(found | chosen, _digest(chosen))


def _digest(chosen: Mapping[tuple[str, Box], int]) -> str:
    digest = hashlib.sha256()
    for (name, box), process in chosen.items():
        digest.update(f"{name}\0{box.start}{box.stop}{process}\0".encode())
    return digest.hexdigest()


def check_shares(told: Sequence[str], num_bytes: int) -> None:
    """Refuse what several processes wrote if some of it was written by nobody.

    Args:
        told: what each process says of its ``share``.
        num_bytes: of all tensors in all files.

    Raises:
        LayoutError: the processes chose differently.
        StorageError: bytes are missing.
    """
    shares = [json.loads(text) for text in told]
    odd = [i for i, (digest, _) in enumerate(shares) if digest != shares[0][0]]
    if odd:
        raise LayoutError(
            f"process {odd[0]} was given arrays that lie otherwise than those of process 0, so "
            "parts would be written by nobody. Give all processes the same names in the same order "
            "with the same shardings."
        )
    written = sum(count for _, count in shares)
    if written < num_bytes:
        raise StorageError(
            f"{len(shares)} processes wrote {written} bytes of {num_bytes}: the devices of none of "
            "them hold the rest. Every process must be given all arrays."
        )


def share(owner: Owners, counts: Counts) -> str:
    """What a process tells the others of what it wrote."""
    return json.dumps([owner.digest, counts.bytes_written])


@lru_cache(maxsize=4096)
def _holders(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> _Holders:
    found: dict[Box, dict[int, None]] = {}
    for device, box in all_device_boxes(sharding, shape).items():
        found.setdefault(box, {})[device.process_index] = None
    return tuple((box, tuple(processes)) for box, processes in found.items())


def shared_moves(
    catalog: Catalog, outputs: Outputs, owner: Callable[[StoredShard], int], here: int
) -> Iterator[SharedMove]:
    """The journeys of the shards whose ``owner`` is process ``here``."""
    for tensor in catalog.tensors.values():
        pieces = tuple(p for p in tensor.shards if owner(p) == here)
        if pieces and tensor.name in outputs.layout.placements:
            yield _shared_move(replace(tensor, shards=pieces), outputs)


def _shared_move(tensor: Tensor, outputs: Outputs) -> SharedMove:
    fine = replace(tensor, shape=tensor.fine_shape, factors=None)  # what the pieces are boxes of
    own = joined(tuple(p.box for p in tensor.shards))
    wanted: dict[Box, tuple[int, ...]] = {}
    places: list[Place] = []
    for placement in outputs.layout.placements[tensor.name]:
        for shard in placement.shards(tensor.shape):
            ranks = outputs.holders(tensor.name, placement, shard)
            held = tensor.fine(shard.box)
            for part in filter(None, (held.intersect(box) for box in own)):
                _, (inner, outer) = in_units(fine.shape, (part, held), tensor.dtype)
                runs = byte_runs(inner.within(outer), outer.shape, tensor.dtype.unit_bytes)
                first = len(places)
                places += [Place(rank, runs) for rank in ranks]
                wanted[part] = (*wanted.get(part, ()), *range(first, len(places)))
    return SharedMove(move_into(fine, wanted), tuple(places))


@lru_cache(maxsize=4096)
def joined(boxes: tuple[Box, ...]) -> tuple[Box, ...]:
    """Disjoint boxes with those that lie side by side made one, the last dim first.

    >>> joined((Box((0, 0), (2, 4)), Box((0, 4), (2, 8)), Box((2, 0), (4, 8))))
    (Box(start=(0, 0), stop=(4, 8)),)
    """
    found = list(boxes)
    for dim in reversed(range(len(found[0].start) if found else 0)):
        found = _joined_along(found, dim)
    return tuple(found)


def _joined_along(boxes: Sequence[Box], dim: int) -> list[Box]:
    groups: dict[object, list[Box]] = {}
    for box in boxes:
        ends = tuple(zip(box.start, box.stop, strict=True))
        groups.setdefault((ends[:dim], ends[dim + 1 :]), []).append(box)
    found = []
    for group in groups.values():
        group.sort(key=lambda box: box.start[dim])
        last = group[0]
        for box in group[1:]:
            if box.start[dim] == last.stop[dim]:
                last = Box(last.start, box.stop)
            else:
                found.append(last)
                last = box
        found.append(last)
    return found
