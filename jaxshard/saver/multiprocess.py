"""Saves by several processes with one commit.

    process 0   lays out the files ┤          ├ writes its share ┤ all have ├ publishes
    others                         ├ see them ┤ write theirs     ┤ written  ├ hear of it

Every meeting has a time-out. A process that dies, or whose disk is full, lets the others
raise; what was there before is still there, and the next save clears the leavings away.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax

from ..core.catalog import Catalog, StoredShard
from ..devices.mesh import rank_devices_of
from ..distributed.barriers import Processes
from ..errors import LayoutError
from ..formats import rank_folder
from ..formats.output_files import Result
from ..formats.registry import Format
from ..planning.copies import TensorCopy
from ..storage.engine import run
from ..storage.io import Sink, Source
from ..storage.resources import Budget, Counts
from ..storage.transaction import Staging, real_place
from ..storage.writers import SharedFiles, bring_in, check_alike, shared_folder, token_of, wait_for
from .host_shards import Array, ArraySource
from .publish import add_files, begin, check_room, write_files
from .shard_owners import Place, SharedMove, check_shares, owners, share, shared_moves


def lay_out(result: Result, folder: Path, *, durable: bool) -> None:
    """Make all files of ``result``, with what is no tensor's; one process does, for all.

    Raises:
        StorageError: the disk is full or refuses.
    """
    files = SharedFiles(result.outputs, folder, result.container)
    try:
        files.lay_out()
        if durable:
            files.sync()
    finally:
        files.close()


def write_share(
    catalog: Catalog,
    result: Result,
    folder: Path,
    source: Source,
    *,
    owner_of: Callable[[StoredShard], int],
    here: int,
    budget: Budget,
    durable: bool,
) -> Counts:
    """Write the shards whose owner is process ``here``; they are on the disk when this returns.

    Raises:
        StorageError: the disk is full or refuses.
    """
    files = SharedFiles(result.outputs, folder, result.container)
    sink = _Shares(files)
    try:
        counts = run(
            sink.moves(shared_moves(catalog, result.outputs, owner_of, here)),
            source,
            sink,
            budget=budget,
        )
        if durable:
            files.sync()
    finally:
        files.close()
    return counts


class _Shares(Sink):
    """The parts of shared files that one process writes."""

    def __init__(self, files: SharedFiles) -> None:
        self._files = files
        self._places: dict[str, tuple[Place, ...]] = {}

    def moves(self, shared: Iterable[SharedMove]) -> Iterator[TensorCopy]:
        """Yield the moves, whose places are needed to write them."""
        for one in shared:
            self._places[one.move.name] = one.places
            yield one.move

    def write(self, move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        """Store part of a target box in the file of every rank that holds it."""
        ranks = move.targets[target].ranks
        for number in ranks:
            place, done = self._places[move.name][number], 0
            for at, length in place.spans(offset, len(buffer)):
                self._files.write(place.rank, move.name, at, buffer[done : done + length])
                done += length
        return len(ranks)


def seal(result: Result, folder: Path, *, durable: bool) -> None:
    """Finish every file, when all have written; one process does, for all.

    Raises:
        StorageError: the disk refuses.
    """
    if not result.container.crc:
        return
    files = SharedFiles(result.outputs, folder, result.container)
    try:
        files.append_crcs()
        if durable:
            files.sync()
    finally:
        files.close()


# --- Across processes: one checkpoint, written by all of them, that appears once for all


@dataclass(frozen=True)
class Work:
    """What is to be saved, where, and by whom."""

    source: ArraySource
    result: Result
    destination: Path
    carried: Catalog | None
    budget: Budget
    processes: Processes
    overwrite: bool
    durable: bool


def commit_across(work: Work, arrays: Mapping[str, Array]) -> Counts:
    """Write this process's share and publish; what this process did. All must call it alike.

    Raises:
        LayoutError: the destination exists, an interrupted conversion lies there, or the
            processes were given different arrays.
        StorageError: the disk refuses here or elsewhere, or a process does not come in time.
    """
    work = replace(work, destination=real_place(work.destination))
    processes = work.processes.about(str(work.destination))
    led = _Led(work)
    try:
        token = processes.agree("saving: beginning", led.begin)
        with processes.together("saving: writing") as meeting:
            check_alike(token, [work.result.outputs], processes.index)
            folder = shared_folder(work.destination, token)
            wait_for(folder, processes.timeout_s / 2, processes.index)
            owner = owners(arrays)

            def owner_of(piece: StoredShard) -> int:
                shard = work.source.shard_of(piece)
                return 0 if shard is None else owner.of_box[shard]

            counts = write_share(
                work.source.catalog,
                work.result,
                folder,
                work.source,
                owner_of=owner_of,
                here=processes.index,
                budget=work.budget,
                durable=work.durable,
            )
            meeting.says = share(owner, counts)
        check_shares(meeting.heard, sum(work.result.outputs.rank_bytes()))
        processes.agree("saving: publishing", led.publish)
    except BaseException:
        led.abandon()
        raise
    return counts


class _Led:
    """What process 0 does for all."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._staging: Staging | None = None
        self._folder = Path()

    def begin(self) -> str:
        work = self._work
        self._staging = begin(
            work.destination, work.carried, overwrite=work.overwrite, durable=work.durable
        )
        check_room(self._staging.files, sum(work.result.outputs.rank_bytes()))
        token = token_of([work.result.outputs])
        self._folder = shared_folder(work.destination, token)
        self._folder.mkdir()
        lay_out(work.result, self._folder, durable=work.durable)
        return token

    def publish(self) -> str:
        work, staging = self._work, self._staging
        assert staging is not None
        seal(work.result, self._folder, durable=work.durable)
        bring_in(staging, self._folder)
        side_files = dict(work.result.side_files)
        add = partial(
            add_files,
            staging,
            side_files,
            work.carried,
            work.result.extras_to,
            work.result.checksums,
        )
        staging.publish(add)
        return ""

    def abandon(self) -> None:
        if self._staging is not None:
            self._staging.abandon()


def commit_own(work: Work, arrays: Mapping[str, Array]) -> Counts:
    """Write the files of the ranks whose devices this process has, to a disk of its own.

    The results of all processes appear when all have written theirs, or none does.

    Raises:
        LayoutError: the ranks are not the devices, or the destination exists.
        StorageError: the disk refuses here or elsewhere, or a process does not come in time.
    """
    destination = real_place(work.destination)
    processes = work.processes.about(str(destination))
    staging: Staging | None = None
    try:
        with processes.together("saving: beginning own"):
            only = own_ranks(arrays, work.result.outputs.layout.num_ranks)
            staging = begin(
                destination, work.carried, overwrite=work.overwrite, durable=work.durable
            )
        with processes.together("saving: writing own") as meeting:
            counts = write_files(work.source, work.result, staging, work.budget, only=only)
            meeting.says = secrets.token_hex(8)
        token = meeting.heard[0] if meeting.heard else ""
        side_files = {**work.result.side_files, **_told_of_others(work, only, token)}
        with processes.together("saving: publishing own"):
            staging.publish(
                partial(
                    add_files,
                    staging,
                    side_files,
                    work.carried,
                    work.result.extras_to,
                    work.result.checksums,
                )
            )
    except BaseException:
        if staging is not None:
            staging.abandon()
        raise
    return counts


def _told_of_others(work: Work, only: frozenset[int], token: str) -> dict[str, bytes]:
    """The file that says which save this is, and which tensors only other folders of it hold."""
    placements = work.result.outputs.layout.placements
    others = [
        tensor
        for name, tensor in work.source.catalog.tensors.items()
        if not any(only.intersection(p.ranks) for p in placements.get(name, ()))
    ]
    return {rank_folder.REMOTE_TENSORS: rank_folder.remote_tensors_json(others, token)}


def own_ranks(arrays: Mapping[str, Array], num_ranks: int) -> frozenset[int]:
    """The ranks whose devices this process has; ranks are as in ``array_layouts``.

    Raises:
        LayoutError: the ranks are not the devices that the arrays lie on.
    """
    devices: tuple[jax.Device, ...] = rank_devices_of(arrays)
    if len(devices) != num_ranks:
        raise LayoutError(
            f"the arrays lie on {len(devices)} devices, and {num_ranks} ranks are to be saved. "
            "With shared=False each process writes the ranks of its own devices: leave strategy= "
            "out, or save to a shared disk."
        )
    here = jax.process_index()
    return frozenset(r for r, device in enumerate(devices) if device.process_index == here)


def check_alone(arrays: Mapping[str, Array], format: Format) -> None:
    """Refuse what this process, of several, cannot save by itself.

    Raises:
        LayoutError: other processes hold parts, or the format is not one for it.
    """
    if format.own_library and jax.process_count() > 1:
        raise LayoutError(
            f"format {format.name!r}: its library synchronizes all {jax.process_count()} processes "
            "when it saves, so alone=True is not possible. Save as huggingface or ranks."
        )
    for name, array in arrays.items():
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise LayoutError(
                f"{name}: other processes hold parts of it, so alone=True cannot save it. Call "
                "save in all processes, without alone=True."
            )


def check_across(format: Format, *, shared: bool) -> None:
    """Refuse what several processes cannot write.

    Raises:
        LayoutError: the format is not one for it.
    """
    if format.own_library:
        raise LayoutError(
            f"format {format.name!r} is written by one process only. Save as huggingface or ranks, "
            "or call its own library in every process."
        )
    if not shared and not format.on_own_disks:
        raise LayoutError(
            f"format {format.name!r}: each file holds data of several processes, so all of them "
            'must share a disk. With shared=False, save with format="ranks".'
        )
