"""Publishing a save: write to a staging directory, then rename it atomically.

An interrupted save cannot be resumed, because its arrays are gone; the next save removes
its staging directory. An interrupted conversion is left alone.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Self

import jax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey, keystr, tree_flatten_with_path

from ..conversion.targets import refuse_on_stores
from ..core.catalog import Catalog
from ..devices.host_shards import Array, HostShards
from ..devices.mesh import rank_devices_of
from ..distributed.processes import Processes
from ..errors import LayoutError
from ..formats import rank_folder
from ..formats.output_files import Result
from ..formats.registry import Format
from ..planning.plan import make_plan
from ..storage.engine import run
from ..storage.fs import check_free_space
from ..storage.overwrite import refuse_source
from ..storage.remote import is_remote
from ..storage.resources import Budget, Counts
from ..storage.staging import os_errors_as, real_place
from ..storage.transaction import Transaction
from ..storage.writers import OutputFiles
from .shared_write import SharedWrite

_REQUEST = '{"made from": "arrays in memory"}'


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Destination of a save, and the files of the result that hold no tensors.

    Attributes:
        destination: a real path.
        side_files: contents by path; they take precedence over carried files.
        carried: a checkpoint whose other files are copied.
        extras_to: folder of the carried files and of ``checksums.json``.
        checksums: write ``checksums.json``.
        overwrite: replace an existing checkpoint.
        durable: fsync every file before the result is published.
    """

    destination: Path
    side_files: Mapping[str, bytes] = field(default_factory=dict)
    carried: Catalog | None = None
    extras_to: str = ""
    checksums: bool = False
    overwrite: bool = False
    durable: bool = True

    @classmethod
    def of(cls, result: Result, destination: Path, carried: Catalog | None, **how: bool) -> Self:
        """Describe the publication of ``result`` at ``destination``."""
        return cls(
            destination=real_place(destination),
            side_files={str(path): data for path, data in result.side_files.items()},
            carried=carried,
            extras_to=result.extras_to,
            checksums=result.checksums,
            **how,
        )

    def begin(self) -> Transaction:
        """Open a staging directory; remains of an earlier save are removed.

        Raises:
            LayoutError: the destination exists, or holds an interrupted conversion.
            StorageError: the filesystem refuses.
        """
        if self.overwrite and self.carried is not None:
            refuse_source(self.carried, self.destination, "the source of extras=")
        return Transaction(
            self.destination,
            _REQUEST,
            overwrite=self.overwrite,
            durable=self.durable,
            resumable=False,
        )

    def publish(self, staging: Transaction) -> None:
        """Add the other files and publish ``staging`` atomically."""
        staging.publish(partial(self._add_files, staging))

    def _add_files(self, staging: Transaction) -> None:
        for path in self.carried.extras if self.carried else ():
            if path in self.side_files or self.carried is None:
                continue
            place = staging.files / self.extras_to / path
            with os_errors_as(f"{place} cannot be written"):
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(self.carried.root) / path, place)
                staging.sync(place)
        for path, data in self.side_files.items():
            place = staging.files / path
            with os_errors_as(f"{place} cannot be written"):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
                staging.sync(place)
        if self.checksums:
            from ..storage.checksums import add_checksums  # noqa: PLC0415 - on request only

            add_checksums(staging.files / self.extras_to, staging.sync)


def commit(publication: Publication, write: Callable[[Transaction], Counts]) -> Counts:
    """Let ``write`` fill a staging directory, and publish it.

    Raises:
        LayoutError: the destination exists, or holds an interrupted conversion.
        StorageError: the disk is full or refuses.
    """
    staging = publication.begin()
    try:
        counts = write(staging)
        publication.publish(staging)
    except BaseException:
        staging.abandon()
        raise
    return counts


def write_files(
    source: HostShards,
    result: Result,
    staging: Transaction,
    budget: Budget,
    *,
    only: frozenset[int] | None = None,
) -> Counts:
    """Write the files of ``result``, or those of the ranks ``only``.

    Raises:
        StorageError: the disk is full or refuses.
    """
    outputs = result.outputs
    plan = make_plan(
        source.catalog, outputs, only=only, block_bytes=budget.block_bytes, is_bundled=True
    )
    check_free_space(staging.files, plan.totals.bytes_written)
    files = OutputFiles(plan, staging, result.container)
    try:
        return run(plan.journeys(), source, files, budget=budget)
    finally:
        files.close()


# --- An object store


def commit_upload(
    source: HostShards,
    result: Result,
    url: str,
    carried: Catalog | None,
    budget: Budget,
    overwrite: bool,
) -> Counts:
    """Write ``result`` to the object store at ``url``.

    Raises:
        LayoutError: the destination exists, or holds an interrupted upload.
        StorageError: the store fails or refuses.
    """
    from ..storage.upload import Upload, first_files, is_last, upload_files  # noqa: PLC0415 - obstore

    if overwrite and carried is not None:
        refuse_source(carried, url, "the source of extras=")
    request = f"{_REQUEST} {secrets.token_hex(8)}"  # of this save only
    upload = Upload(url, request, overwrite=overwrite, is_resumable=False)
    try:
        plan = make_plan(source.catalog, result.outputs, block_bytes=budget.block_bytes)
        last = {path: data for path, data in result.side_files.items() if is_last(path)}
        upload.begin()
        upload.put_all(first_files(result, carried))
        counts = upload_files(
            plan, result.container, source, upload, budget=budget, is_last=not last
        )
        upload.publish(last)
    except BaseException:
        upload.abandon()
        raise
    return counts


def check_on_store(
    path: str | PathLike[str], format: Format, processes: Processes, *, checksums: bool
) -> None:
    """Refuse what is not saved to an object store, if ``path`` is one.

    Raises:
        LayoutError: several processes save, or the format or its checksums are not for stores.
    """
    if not is_remote(path):
        return
    if processes.are_several:
        raise LayoutError(
            f"{len(processes.members)} processes cannot save to a store together. Save to a shared "
            "disk, and upload the folder with the tools of the store."
        )
    refuse_on_stores(format, checksums=checksums)


# --- Several processes: one result on a shared disk, or one on each process's own disk


def commit_shared(
    source: HostShards,
    result: Result,
    publication: Publication,
    budget: Budget,
    processes: Processes,
) -> Counts:
    """Write and publish one result from all processes; all must call it with the same arguments.

    Raises:
        LayoutError: the destination exists or holds an interrupted conversion, or the
            processes were given different arrays.
        StorageError: the disk refuses here or in another process, or one is missing.
    """
    processes = processes.about(str(publication.destination))
    shared = SharedWrite(
        source,
        [(source.catalog, result)],
        publication.destination,
        processes,
        durable=publication.durable,
    )
    with ExitStack() as on_error:
        staging: Transaction | None = None

        def begin() -> str:
            nonlocal staging
            staging = publication.begin()
            on_error.callback(staging.abandon)
            return shared.begin(staging)

        def publish() -> str:
            assert staging is not None
            shared.finish(staging)
            publication.publish(staging)
            return ""

        token = processes.broadcast("saving: beginning", begin)
        counts = shared.write("saving: writing", token, budget)
        processes.broadcast("saving: publishing", publish)
        on_error.pop_all()
    return counts


def commit_own(
    source: HostShards,
    result: Result,
    publication: Publication,
    budget: Budget,
    processes: Processes,
) -> Counts:
    """Write the files of the ranks of this process's devices to its own disk.

    The results are published when every process has written its own; otherwise none is.

    Raises:
        LayoutError: the ranks are not the devices, or the destination exists.
        StorageError: the disk refuses here or in another process, or one is missing.
    """
    processes = processes.about(str(publication.destination))
    with ExitStack() as on_error:
        with processes.together("saving: beginning own"):
            only = own_ranks(source.arrays, result.outputs.layout.num_ranks)
            staging = publication.begin()
            on_error.callback(staging.abandon)
        with processes.together("saving: writing own") as meeting:
            counts = write_files(source, result, staging, budget, only=only)
            meeting.sent = secrets.token_hex(8)
        token = meeting.received[0] if meeting.received else ""
        remote = {rank_folder.REMOTE_TENSORS: _remote_tensors(source.catalog, result, only, token)}
        with processes.together("saving: publishing own"):
            replace(publication, side_files={**publication.side_files, **remote}).publish(staging)
        on_error.pop_all()
    return counts


def _remote_tensors(catalog: Catalog, result: Result, only: frozenset[int], token: str) -> bytes:
    """Return the file that names this save, and the tensors that only other folders of it hold."""
    placements = result.outputs.layout.placements
    remote = [
        tensor
        for name, tensor in catalog.tensors.items()
        if not any(only.intersection(p.ranks) for p in placements.get(name, ()))
    ]
    return rank_folder.remote_tensors_json(remote, token)


def own_ranks(arrays: Mapping[str, Array], num_ranks: int) -> frozenset[int]:
    """Return the ranks whose devices belong to this process.

    Raises:
        LayoutError: the ranks are not the devices of the arrays.
    """
    devices: tuple[jax.Device, ...] = rank_devices_of(arrays)
    if len(devices) != num_ranks:
        raise LayoutError(
            f"the arrays are on {len(devices)} devices (expected {num_ranks}, one per rank). "
            "With shared_filesystem=False each process writes the ranks of its own devices: leave "
            "strategy= out, or save to a shared filesystem."
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
            "when it saves, so single_process=True is not possible. Save as huggingface or ranks."
        )
    for name, array in arrays.items():
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise LayoutError(
                f"{name}: other processes hold parts of it, so single_process=True cannot save "
                "it. Call save in all processes, without single_process=True."
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
            'must share a disk. With shared_filesystem=False, save with format="ranks".'
        )


# --- Formats with a library of their own: it writes the arrays, the commit is the same


def save_tree(
    format: Format, tree: Any, arrays: Mapping[str, Array], publication: Publication
) -> Counts:
    """Write ``tree`` with the format's own library, or ``arrays`` by name if it cannot store it.

    Raises:
        LayoutError: the destination exists, or an array is empty.
        StorageError: the disk is full or refuses.
    """
    format.check_shapes({name: tuple(array.shape) for name, array in arrays.items()})
    is_whole = _is_restorable(tree, len(arrays))

    def write(staging: Transaction) -> Counts:
        format.write_tree(staging.files, tree if is_whole else dict(arrays))
        for path in sorted(staging.files.rglob("*")):
            if path.is_file():
                staging.sync(path)
        return Counts(bytes_written=sum(array.nbytes for array in arrays.values()))

    return commit(publication, write)


def _is_restorable(tree: Any, num_arrays: int) -> bool:
    """Return whether Orbax can restore ``tree`` with the same structure.

    Every leaf must be an array, and all keys texts, numbers or attributes.
    """
    leaves = tree_flatten_with_path(tree)[0]
    keys = {key for path, _ in leaves for key in path}
    names = {(type(key), keystr((key,), simple=True)) for key in keys}
    return (
        len(leaves) == num_arrays
        and all(path for path, _ in leaves)
        and all(isinstance(key, DictKey | SequenceKey | GetAttrKey) for key in keys)
        and len(names) == len(keys)
    )
