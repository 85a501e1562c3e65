"""Writes of one result by several processes, led by process 0.

    process 0   creates the files ┤            ├ writes its shards ┤ completes them
    others                        ├ find them  ┤ write theirs      ┤

Each process writes the shards that it owns. A shard on devices of several processes has one
owner; shards of one owner that are adjacent are joined, so that rows are written as long as
possible.

    held by       0 0 1 1            written    by process 0     by process 1
    the tensor    a b c d  ×2 rows              ab·· ab··        ··cd ··cd

Every process computes the owners from the shardings alone. They compare the result at the end,
because a shard without an owner would be zeros in a file that looks complete. Every barrier has
a timeout: if a process dies or its disk is full, the others raise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax

from ..core.box import Box
from ..core.catalog import Catalog, StoredShard, Tensor
from ..core.dtypes import in_units
from ..core.ranges import Runs, byte_runs
from ..core.runtime import cached
from ..devices.host_shards import Array, HostShards, Snapshot
from ..distributed.processes import Processes, assign
from ..errors import LayoutError, StorageError
from ..formats.output_files import Result
from ..planning.copies import TensorCopy, move_into
from ..planning.outputs import Outputs
from ..resharding.geometry import all_device_boxes
from ..storage.engine import run
from ..storage.fs import check_free_space
from ..storage.io import Sink
from ..storage.resources import Budget, Counts
from ..storage.transaction import Transaction
from ..storage.writers import SharedFiles, bring_in, check_alike, shared_folder, token_of, wait_for

_Holders = tuple[tuple[Box, tuple[int, ...]], ...]


class SharedWrite:
    """Files of a job that all its processes write together, each its own shards.

    Process 0 calls `begin`, passes the token to the others, and calls `finish` when every
    process has returned from `write`.

    Attributes:
        folder: the files so far; its name contains the token, so a process that is late from
            an abandoned attempt finds no file to write to.
    """

    def __init__(
        self,
        source: HostShards,
        results: Sequence[tuple[Catalog, Result]],
        destination: Path,
        processes: Processes,
        *,
        durable: bool,
    ) -> None:
        """Write ``results``, each of a catalog of shards of ``source``, for ``destination``."""
        self._source, self._results = source, results
        self._destination, self._processes, self._durable = destination, processes, durable
        self.folder = Path()

    @property
    def _outputs(self) -> list[Outputs]:
        return [result.outputs for _, result in self._results]

    @property
    def num_bytes(self) -> int:
        """Tensor bytes of all files."""
        return sum(sum(outputs.rank_bytes()) for outputs in self._outputs)

    def begin(self, staging: Transaction) -> str:
        """Create all files with their headers in process 0; return the token of the attempt.

        Raises:
            StorageError: the disk is full or refuses.
        """
        check_free_space(staging.files, self.num_bytes)
        token = token_of(self._outputs)
        self.folder = shared_folder(self._destination, token)
        self.folder.mkdir()
        for _, result in self._results:
            with self._open(result) as files:
                files.lay_out()
        return token

    def write(self, meeting: str, token: str, budget: Budget) -> Counts:
        """Write this process's shards; when it returns, every process has written its own.

        Raises:
            LayoutError: the processes were given different arrays.
            StorageError: the disk refuses here or in another process, or one is missing.
        """
        here, processes = self._processes.index, self._processes
        with processes.together(meeting) as met:
            check_alike(token, self._outputs, here)
            self.folder = shared_folder(self._destination, token)
            wait_for(self.folder, processes.timeout_s / 2, here)
            owner = owners(self._source.arrays)

            def owner_of(piece: StoredShard) -> int:
                shard = self._source.shard_of(piece)
                return 0 if shard is None else owner.of_box[shard]

            counts = Counts()
            for catalog, result in self._results:
                with self._open(result) as files:
                    sink = _OwnShards(files)
                    copies = sink.copies(shared_copies(catalog, result.outputs, owner_of, here))
                    counts += run(copies, self._source, sink, budget=budget)
            if isinstance(self._source, Snapshot):
                self._source.check_still()
            met.sent = share(owner, counts)
        check_shares(met.received, self.num_bytes)
        return counts

    def finish(self, staging: Transaction) -> None:
        """Complete all files in process 0, and move them into ``staging``.

        Raises:
            StorageError: the filesystem refuses.
        """
        for _, result in self._results:
            if result.container.crc:
                with self._open(result) as files:
                    files.append_crcs()
        bring_in(staging, self.folder)

    @contextmanager
    def _open(self, result: Result) -> Iterator[SharedFiles]:
        """Open the files of ``result``; what is written to them is synced at the end."""
        files = SharedFiles(result.outputs, self.folder, result.container)
        try:
            yield files
            if self._durable:
                files.sync()
        finally:
            files.close()


class _OwnShards(Sink):
    """The regions of shared files that this process writes."""

    def __init__(self, files: SharedFiles) -> None:
        self._files = files
        self._spans: dict[str, tuple[FileSpan, ...]] = {}

    def copies(self, shared: Iterable[SharedCopy]) -> Iterator[TensorCopy]:
        """Yield the copies, and keep their spans for `write`."""
        for each in shared:
            self._spans[each.copy.name] = each.spans
            yield each.copy

    def write(self, move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        """Store part of a target box in the file of every rank that holds it."""
        numbers = move.targets[target].ranks
        for number in numbers:
            span, done = self._spans[move.name][number], 0
            for at, length in span.spans(offset, len(buffer)):
                self._files.write(span.rank, move.name, at, buffer[done : done + length])
                done += length
        return len(numbers)


# --- Owners: which process writes which shard


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Runs of a box of this process within the data of a tensor in a rank's file."""

    rank: int
    runs: Runs

    def spans(self, offset: int, num_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (offset in the tensor's data, length) of each row of bytes ``offset …`` of the box.

        >>> list(FileSpan(0, Runs(offset=8, length=4, outer=((3, 16),))).spans(2, 6))
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
class SharedCopy:
    """A copy of one tensor's shards; its ``Target.ranks`` are indices into ``spans``."""

    copy: TensorCopy
    spans: tuple[FileSpan, ...]


@dataclass(frozen=True)
class Owners:
    """Which process writes each distinct shard.

    Attributes:
        of_box: by a tensor's name and the shard's box.
        digest: of all choices between several processes. It must be the same in each, or a
            shard is written by no process.
    """

    of_box: Mapping[tuple[str, Box], int] = field(repr=False)
    digest: str


def owners(arrays: Mapping[str, Array]) -> Owners:
    """Assign each distinct shard to a process, balanced by bytes.

    A shard with a single holder has no weight: an array on a local device of each process (a
    step counter) has a different sharding in each, which must not change the other choices.
    Process 0 writes NumPy arrays, because every process has a copy.
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


def check_shares(reports: Sequence[str], num_bytes: int) -> None:
    """Check that several processes wrote all bytes, according to their reports.

    Args:
        reports: the ``share`` of each process.
        num_bytes: of all tensors in all files.

    Raises:
        LayoutError: the processes chose different owners.
        StorageError: bytes are missing.
    """
    shares = [json.loads(text) for text in reports]
    odd = [i for i, (digest, _) in enumerate(shares) if digest != shares[0][0]]
    if odd:
        raise LayoutError(
            f"process {odd[0]}: the arrays have other shardings than in process 0, so no process "
            "would write some shards. Pass the same names in the same order with the same "
            "shardings in all processes."
        )
    written = sum(count for _, count in shares)
    if written < num_bytes:
        raise StorageError(
            f"{len(shares)} processes wrote {written} bytes (expected {num_bytes}): none of "
            "their devices holds the rest. Pass all arrays in every process."
        )


def share(owner: Owners, counts: Counts) -> str:
    """Return a process's report of its owners and written bytes."""
    return json.dumps([owner.digest, counts.bytes_written])


@cached(4096)
def _holders(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> _Holders:
    found: dict[Box, dict[int, None]] = {}
    for device, box in all_device_boxes(sharding, shape).items():
        found.setdefault(box, {})[device.process_index] = None
    return tuple((box, tuple(processes)) for box, processes in found.items())


def shared_copies(
    catalog: Catalog, outputs: Outputs, owner: Callable[[StoredShard], int], here: int
) -> Iterator[SharedCopy]:
    """Yield the copies of the shards whose ``owner`` is process ``here``."""
    for tensor in catalog.tensors.values():
        pieces = tuple(p for p in tensor.shards if owner(p) == here)
        if pieces and tensor.name in outputs.layout.placements:
            yield _shared_copy(replace(tensor, shards=pieces), outputs)


def _shared_copy(tensor: Tensor, outputs: Outputs) -> SharedCopy:
    fine = replace(
        tensor, shape=tensor.fine_shape, factors=None
    )  # the pieces are boxes of this tensor
    own = joined(tuple(p.box for p in tensor.shards))
    wanted: dict[Box, tuple[int, ...]] = {}
    spans: list[FileSpan] = []
    for placement in outputs.layout.placements[tensor.name]:
        for shard in placement.shards(tensor.shape):
            ranks = outputs.holders(tensor.name, placement, shard)
            held = tensor.fine(shard.box)
            for part in filter(None, (held.intersect(box) for box in own)):
                _, (inner, outer) = in_units(fine.shape, (part, held), tensor.dtype)
                runs = byte_runs(inner.within(outer), outer.shape, tensor.dtype.unit_bytes)
                first = len(spans)
                spans += [FileSpan(rank, runs) for rank in ranks]
                wanted[part] = (*wanted.get(part, ()), *range(first, len(spans)))
    return SharedCopy(move_into(fine, wanted), tuple(spans))


@cached(4096)
def joined(boxes: tuple[Box, ...]) -> tuple[Box, ...]:
    """Join adjacent boxes of a disjoint set, the last dim first.

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
