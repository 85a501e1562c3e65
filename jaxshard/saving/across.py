"""Across processes: one checkpoint, written by all of them, that appears once for all.

    process 0   lays out the files ┤          ├ writes its share ┤ all have ├ publishes
    others                         ├ see them ┤ write theirs     ┤ written  ├ hear of it

Every meeting has a time-out. A process that dies, or whose disk is full, lets the others
raise; what was there before is still there, and the next save clears the leavings away.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax

from ..array_layouts import rank_devices_of
from ..catalog import Catalog, Piece
from ..errors import LayoutError, StorageError
from ..formats import elsewhere
from ..multiprocess.barriers import Processes
from ..planning import Move
from ..results import Result
from ..storage.budget import Budget, Counts
from ..storage.engine import run
from ..storage.shared_writing import SharedFiles
from ..storage.staging import FILES, Staging, real_place, staging_folder
from .arrays import Array, ArraySource
from .committing import abandon, add_files, begin, check_room, write_files
from .sharing import Place, owners, shared_moves

_TOKEN = "together"
_SEEN_WITHIN_S = 60.0  # what a network file system may take to show a new folder to others


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
        LayoutError: the destination exists, or an interrupted conversion lies there.
        StorageError: the disk refuses here or elsewhere, or a process does not come in time.
    """
    work = replace(work, destination=real_place(work.destination))
    processes = work.processes.about(str(work.destination))
    led = _Led(work)
    try:
        token = processes.agree("saving: beginning", led.begin)
        with processes.together("saving: writing"):
            counts = _write(work, arrays, token, processes)
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

    def begin(self) -> str:
        work = self._work
        self._staging = begin(
            work.destination, work.carried, overwrite=work.overwrite, durable=work.durable
        )
        check_room(self._staging.files, sum(work.result.outputs.rank_bytes()))
        files = _files(work)
        try:
            files.lay_out()
        finally:
            files.close()
        token = secrets.token_hex(8)
        (staging_folder(work.destination) / _TOKEN).write_text(token)
        return token

    def publish(self) -> str:
        work, staging = self._work, self._staging
        assert staging is not None
        if work.result.seal is not None:
            files = _files(work)
            files.seal(work.result.seal)
        side_files = dict(work.result.side_files)
        add = partial(add_files, staging, side_files, work.carried, work.result.extras_to)
        staging.publish(add)
        return ""

    def abandon(self) -> None:
        if self._staging is not None:
            abandon(self._staging, self._work.destination)


def _write(work: Work, arrays: Mapping[str, Array], token: str, processes: Processes) -> Counts:
    _check_shared(work.destination, token, processes)
    owner = owners(arrays, processes.index)

    def owner_of(piece: Piece) -> int:
        shard = work.source.shard_of(piece)
        return 0 if shard is None else owner[shard]

    files = _files(work)
    places: dict[str, tuple[Place, ...]] = {}

    def moves() -> Iterator[Move]:
        catalog, outputs = work.source.catalog, work.result.outputs
        for shared in shared_moves(catalog, outputs, owner_of, processes.index):
            places[shared.move.name] = shared.places
            yield shared.move

    def write(move: Move, target: int, offset: int, buffer: memoryview) -> int:
        ranks = move.targets[target].ranks
        for number in ranks:
            place, done = places[move.name][number], 0
            for at, length in place.spans(offset, len(buffer)):
                files.write(place.rank, move.name, at, buffer[done : done + length])
                done += length
        return len(ranks)

    try:
        counts = run(moves(), work.source.read, write, budget=work.budget, lend=work.source.lend)
        if work.durable:
            files.sync()
    finally:
        files.close()
    return counts


def _files(work: Work) -> SharedFiles:
    folder = staging_folder(work.destination) / FILES
    return SharedFiles(work.result.outputs, folder, work.result.lay_file)


def _check_shared(destination: Path, token: str, processes: Processes) -> None:
    """Wait until the folder that process 0 has made is seen here.

    Raises:
        StorageError: it is not: the hosts do not share that disk.
    """
    until = time.monotonic() + min(_SEEN_WITHIN_S, processes.timeout_s / 2)
    place = staging_folder(destination) / _TOKEN
    while True:
        try:
            if place.read_text() == token:
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise StorageError(
                f"process {processes.index} does not see what process 0 has made beside "
                f"{destination}. Save to a disk that all hosts share, or give shared=False: each "
                "process then writes the files of its own devices to its own disk."
            )
        time.sleep(0.05)


def commit_own(work: Work, arrays: Mapping[str, Array]) -> Counts:
    """Write the files of the ranks whose devices this process has, to a disk of its own.

    The results of all processes appear when all have written theirs, or none does.

    Raises:
        LayoutError: the ranks are not the devices, or the destination exists.
        StorageError: the disk refuses here or elsewhere, or a process does not come in time.
    """
    destination = real_place(work.destination)
    processes = work.processes.about(str(destination))
    with processes.together("saving: beginning"):
        only = own_ranks(arrays, work.result.outputs.layout.num_ranks)
        staging = begin(destination, work.carried, overwrite=work.overwrite, durable=work.durable)
    try:
        with processes.together("saving: writing"):
            counts = write_files(work.source, work.result, staging, work.budget, only=only)
        side_files = {**work.result.side_files, **_told_of_others(work, only)}
        with processes.together("saving: publishing"):
            staging.publish(
                partial(add_files, staging, side_files, work.carried, work.result.extras_to)
            )
    except BaseException:
        abandon(staging, destination)
        raise
    return counts


def _told_of_others(work: Work, only: frozenset[int]) -> dict[str, bytes]:
    """The file that says which tensors only other processes' folders hold, if there are any."""
    placements = work.result.outputs.layout.placements
    others = [
        tensor
        for name, tensor in work.source.catalog.tensors.items()
        if not any(only.intersection(p.ranks) for p in placements.get(name, ()))
    ]
    return {elsewhere.NAME: elsewhere.to_bytes(others)} if others else {}


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


def holders_of(arrays: Mapping[str, Array]) -> set[int]:
    """The processes whose devices hold some of ``arrays``; this one, if all are on the host."""
    found = set[int]()
    for array in arrays.values():
        if isinstance(array, jax.Array):
            devices: set[jax.Device] = array.sharding.device_set
            found |= {device.process_index for device in devices}
    return found or {jax.process_index()}


def check_across(format: str, *, shared: bool) -> None:
    """Refuse what several processes cannot write.

    Raises:
        LayoutError: the format is not one for it.
    """
    if format == "orbax":
        raise LayoutError(
            "Orbax's own format is written here by one process only. Save as huggingface or ranks, "
            "or call Orbax itself in every process."
        )
    if not shared and format not in ("ranks", "ckpt"):
        raise LayoutError(
            f"{format} files hold what several processes have, so they need a disk that all of "
            'them share. With shared=False, save with format="ranks".'
        )
