"""Execution of a prepared conversion, published atomically.

The files are written to a staging directory. The finished files of an interrupted run are kept
for the next one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.catalog import Catalog
from ..distributed.processes import Part, part_of
from ..errors import CoverageError, LayoutError, size_text
from ..formats.output_files import Result
from ..formats.registry import FORMATS
from ..planning.plan import Plan
from ..storage import file_to_file, writers
from ..storage.fs import check_free_space
from ..storage.io import Source
from ..storage.overwrite import refuse_source
from ..storage.readers import open_source
from ..storage.remote import is_remote
from ..storage.resources import Budget, Counts
from ..storage.shared_transaction import SharedTransaction
from ..storage.transaction import Transaction
from ..storage.writers import OutputFiles, put_beside
from . import targets
from .open import PathLike
from .prepare import Prepared, downloaded_first, files_to_check, part_plan

if TYPE_CHECKING:  # obstore, NumPy
    from ..storage.upload import Upload

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    destination: str
    counts: Counts
    num_files: int
    skipped_files: int
    notes: tuple[str, ...] = ()
    part: Part | None = None
    is_published: bool = True  # False: other parts are still to be made

    def __repr__(self) -> str:
        skipped = f", {self.skipped_files:,} skipped" * bool(self.skipped_files)
        state = "" if self.is_published else ", not yet published"
        return (
            f"Report({self.destination!r}, {self.num_files:,} files{skipped}, "
            f"{size_text(self.counts.bytes_written)}, {len(self.notes)} notes{state})"
        )


def execute(
    prepared: Prepared,
    destination: PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    fsync: bool = True,
    process_index: int | str | None = None,
    process_count: int | str | None = None,
    check_replicas: bool = False,
    stream: bool = False,
    progress: Callable[[int], Progress] | None = None,
) -> Report:
    """Write a prepared conversion to ``destination``.

    Args:
        prepared: the decided conversion.
        destination: a directory, or a file if ``prepared`` is for one.
        resume: continue an interrupted run.
        overwrite: replace an existing destination, if it is a checkpoint.
        fsync: have every file on disk before the result is published.
        process_index: index of this process (0-based), if several processes share the work. The
            last to finish publishes; a process that is started again continues.
        process_count: number of processes; ``"auto"`` takes both numbers from
            ``jax.distributed``, or from the environment of SLURM or Open MPI.
        check_replicas: read all replicas of the source first, and refuse it if they differ.
            Otherwise the first replica is used.
        stream: read a repository of the Hub by ranges, and write nothing to its local cache.
            Otherwise the files that are read are downloaded to the cache first.
        progress: called with the total byte count; returns a callback that receives bytes written.

    Raises:
        StorageError: the filesystem is full or fails, or another run writes the destination.
        CoverageError: replicas of the source differ, if ``check_replicas``.
        LayoutError: the destination exists and may not be replaced, or holds the source or an
            interrupted run; the format cannot be written by several processes.
        FormatError: the source changed meanwhile, or does not match its checksums.
    """
    part = part_of(process_index, process_count, os.environ)
    if part and FORMATS[prepared.result.format].own_library:
        raise LayoutError(
            f"format {prepared.result.format!r} is written by one process, not in parts. Leave out "
            "process_index= and process_count=."
        )
    if not stream:
        prepared = downloaded_first(prepared, part)
    catalog, budget = prepared.plan.source, prepared.budget
    only = targets.single_file(prepared.result, destination)
    refuse_source(catalog, destination)
    if check_replicas:
        _refuse_differing(catalog, budget)
    if is_remote(destination):
        _refuse_on_stores(prepared.result, part)
        return _upload(prepared, destination, only, resume, overwrite, progress)
    place, plan = Path(destination), part_plan(prepared.plan, part)
    how = {"overwrite": overwrite, "durable": fsync}
    staging = _staging(place, prepared.request, only, part, resume=resume, **how)
    left = targets.notes_on_left_out(catalog, prepared.result, only)
    notes = (*plan.notes, *left)
    if staging.published:
        return Report(str(destination), Counts(), 0, plan.totals.num_files, notes, part)
    try:
        plan, skipped = _without_finished(plan, staging)
        check_free_space(staging.files, plan.totals.bytes_written)
        tell = progress(plan.totals.bytes_written) if progress else None
        with open_source(catalog) as source:
            source.check_checksums(files_to_check(plan))
            counts = _write(plan, prepared.result, source, staging, budget, tell)
        is_published = staging.publish(
            None if only else partial(_write_side_files, prepared, staging, place)
        )
    except BaseException:
        staging.abandon()
        raise
    if is_published and not only:
        notes += put_beside(place, prepared.result.side_files, **how)
    num_files = plan.totals.num_files
    return Report(str(destination), counts, num_files, skipped, notes, part, is_published)


def _upload(
    prepared: Prepared,
    destination: PathLike,
    only: str | None,
    resume: bool,
    overwrite: bool,
    progress: Callable[[int], Progress] | None,
) -> Report:
    """Write a prepared conversion to a store (arguments and errors as ``execute``)."""
    from ..storage.upload import Upload, first_files, is_last, upload_files  # noqa: PLC0415 - obstore, NumPy

    plan, result, catalog = prepared.plan, prepared.result, prepared.plan.source
    options = {"resume": resume, "overwrite": overwrite, "only": only is not None}
    upload = Upload(os.fspath(destination), prepared.request, **options)
    notes = (*plan.notes, *targets.notes_on_left_out(catalog, result, only))
    num_files = plan.totals.num_files
    if upload.published:
        return Report(str(destination), Counts(), 0, num_files, notes)
    try:
        upload.check_sizes(plan.outputs, result.container)
        plan, skipped = _without_finished(plan, upload)
        tell = progress(plan.totals.bytes_written) if progress else None
        last = {p: data for p, data in result.side_files.items() if is_last(p) and not only}
        with open_source(catalog) as source:
            source.check_checksums(files_to_check(plan))
            upload.begin()
            if not only:
                upload.put_all(first_files(result, catalog))
            counts = upload_files(
                plan,
                result.container,
                source,
                upload,
                budget=prepared.budget,
                is_last=not last,
                progress=tell,
            )
        upload.publish(last)
    except BaseException:
        upload.abandon()
        raise
    return Report(str(destination), counts, plan.totals.num_files, skipped, notes)


def _refuse_on_stores(result: Result, part: Part | None) -> None:
    """Refuse what is not written to stores.

    Raises:
        LayoutError: parts by several processes, Orbax, or checksums.
    """
    if part:
        raise LayoutError(
            "one process writes to a store. Leave out process_index= and process_count=, or write "
            "to a shared disk, and upload the folder with the tools of the store."
        )
    targets.refuse_on_stores(FORMATS[result.format], checksums=result.checksums)


@contextmanager
def progress_of(
    given: bool | Callable[[int], Progress] | None, what: str
) -> Iterator[Callable[[int], Progress] | None]:
    """Yield ``given``, or for True a bar on standard error, if that is a terminal or a notebook."""
    if not isinstance(given, bool):
        yield given
        return
    if not given:
        yield None
        return
    from rich import console, progress  # noqa: PLC0415 - a tenth of a second, on request only

    screen = console.Console(stderr=True)
    bar = progress.Progress(
        progress.TextColumn(what),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not (screen.is_terminal or screen.is_jupyter),
    )
    with bar:

        def start(total: int) -> Progress:
            task = bar.add_task(what, total=total or None)
            return lambda num_bytes: bar.advance(task, num_bytes)

        yield start


def _write(
    plan: Plan,
    result: Result,
    source: Source,
    staging: Transaction | SharedTransaction,
    budget: Budget,
    tell: Progress | None,
) -> Counts:
    """Write the weight files of ``plan``; return the counts."""
    if (format := FORMATS[result.format]).own_library:
        from .load_rank import LazyTensors  # noqa: PLC0415 - NumPy, not needed by other formats

        tensors = LazyTensors(source, budget, tell)
        format.write_tensors(staging.files, tensors.of(plan))
        counts = tensors.counts
        for path in sorted(p for p in staging.files.rglob("*") if p.is_file()):
            staging.sync(path)
        return counts
    files = OutputFiles(plan, staging, result.container)
    try:
        if source.request_bytes:
            from ..storage import engine  # noqa: PLC0415 - NumPy

            moves, ahead = plan.journeys(), plan.journeys()
            return engine.run(moves, source, files, budget=budget, progress=tell, ahead=ahead)
        return file_to_file.run(plan.journeys(), source, files, budget=budget, progress=tell)
    finally:
        files.close()


def _staging(
    destination: Path,
    request: str,
    only: str | None,
    part: Part | None,
    *,
    resume: bool,
    overwrite: bool,
    durable: bool,
) -> Transaction | SharedTransaction:
    if part is None:
        return Transaction(
            destination,
            request,
            resume=resume,
            overwrite=overwrite,
            durable=durable,
            only=only,
        )
    if only:
        raise LayoutError(
            f"{destination} is one file, which one process writes. Leave out "
            "process_count= (--process-count), or name a folder."
        )
    return SharedTransaction(
        destination, request, part.index, part.count, overwrite=overwrite, durable=durable
    )


def _refuse_differing(catalog: Catalog, budget: Budget) -> None:
    """Check that all replicas of the source are equal."""
    from .verify import differing_replicas  # noqa: PLC0415 - imports NumPy, rarely needed

    problems = differing_replicas(catalog, budget=budget).problems
    if problems:
        more = f" {len(problems) - 1} more tensors have differences." if len(problems) > 1 else ""
        raise CoverageError(f"{problems[0]}{more}")


def _without_finished(
    plan: Plan, staging: Transaction | SharedTransaction | Upload
) -> tuple[Plan, int]:
    """Return ``plan`` without the files that an earlier run finished, and their number."""
    paths = plan.outputs.paths
    wanted = set(range(len(paths))) if plan.only is None else set(plan.only)
    done = {rank for rank in wanted if paths[rank] in staging.finished}
    return (plan.of(frozenset(wanted - done)), len(done)) if done else (plan, 0)


def _write_side_files(
    prepared: Prepared, staging: Transaction | SharedTransaction, destination: Path
) -> None:
    source, inside = prepared.plan.source, destination.resolve()

    def is_an_earlier_result(path: Path) -> bool:
        return inside in path.resolve().parents

    writers.copy_extras(
        source.root,
        source.extras,
        staging.files / prepared.result.extras_to,
        leave_out=is_an_earlier_result,
        sync=staging.sync,
    )
    writers.write_files(prepared.result.side_files.items(), staging.files, staging.sync)
    if prepared.result.checksums:
        from ..storage.checksums import add_checksums  # noqa: PLC0415 - on request only

        add_checksums(staging.files / prepared.result.extras_to, staging.sync)
