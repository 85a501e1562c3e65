"""Saving a step from a snapshot, by one process or by all processes of a job.

    process 0   takes the lock, creates the files ┤ writes its share ┤ its checksums ┤ commits
    others                             find them  ┤ write theirs     ┤ theirs        ┤ return

A step is written to a staging directory and committed (``commit_step``); only then are older
steps removed. A save that fails before the commit changes nothing in the run. Recovery,
retention and the pointer files are left to process 0.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..core.catalog import log_done
from ..distributed.processes import Processes, cut_evenly
from ..errors import FormatError, LayoutError, StorageError, format_list
from ..saver.shared_write import SharedWrite
from ..storage.checksums import BEST, FileSums, Gathered
from ..storage.resources import LENT_BLOCK_BYTES, Budget, budget_for
from ..storage.staging import staging_folder
from ..storage.transaction import Transaction
from .commit_step import commit, drop_unused_strategies, recover, remove, replaceable, update_latest
from .policy import Lineage, next_lineage
from .records import MOVING, REMOVED, WHOLE, Record, Rollback, StepName, strategy_folder
from .run_directory import RunDirectory, check_units, replace_file, writer_lock
from .step_files import (
    SaveRequest,
    StepPart,
    check_room,
    parts_of,
    sums_of,
    units_of,
    write_parts,
    write_side_files,
)
from .steps import RunStep, find_steps, of_prefix, past_of

_BEGIN, _WRITE, _SUM, _COMMIT = (
    f"saving a step: {what}" for what in ("beginning", "writing", "summing", "committing")
)
_log = logging.getLogger("jaxshard.training")


def save_step(request: SaveRequest, processes: Processes) -> Lineage | None:
    """Save a step and remove the steps that retention allows; all ``processes`` call it.

    Returns:
        The lineage of the step in process 0, None in the others.

    Raises:
        StorageError: the disk is full or refuses here or in another process, another writer is
            at work, or a process is missing. The step does not exist; all others do.
        LayoutError: the layout does not fit the tensors, the processes were given different
            states, or the step's name is taken by files that the run may not replace.
    """
    if not processes.are_several:
        return _save(request, _write_step).lineage
    processes = processes.about(f"step {request.step} of {request.directory.root}")
    if processes.index == 0:
        return _Leader(request, processes).save().lineage
    try:
        token = processes.broadcast(_BEGIN, lambda: "")
        work = _SharedStep(request, processes)
        work.write(token)
        work.sum_up()
        processes.broadcast(_COMMIT, lambda: "")
    finally:
        request.snapshot.close()
    return None


def _save(request: SaveRequest, write: Callable[[SaveRequest], Record]) -> Record:
    """Save a step whose files ``write`` puts into its staging directory."""
    began = time.monotonic()
    run, durable = request.directory, request.options.durable
    with writer_lock(run, durable=durable):
        for done in recover(run, durable=durable):
            _log.info("%s", done)
        try:
            _refuse_blocked(run, request.step)
            before = find_steps(run)
            lineage = _lineage_of(request, before)  # before any write, because it may refuse
            record = replace(write(request), lineage=lineage)
            # again: files may have appeared during the write
            record = replace(record, replaces=_check_free(request, record.units))
            request.snapshot.check_still()
            commit(run, record, durable=durable)
            _drop_rollback(run, request.options.prefix)
        except BaseException:
            _remove_staging(run, request.step)
            raise
        finally:
            request.snapshot.close()
        try:
            update_latest(run, record)
        except StorageError as error:  # the step is complete without its pointers
            _log.warning("step %s is saved, but pointers to it are not: %s", record.step, error)
        _apply_retention(request, record, before)
    num_bytes = sum(sums.num_bytes for sums in record.files.values())
    log_done("save step", record.step, num_bytes, time.monotonic() - began)
    return record


def _refuse_blocked(run: RunDirectory, step: StepName) -> None:
    """Refuse a step whose record could not be renamed into place.

    Raises:
        StorageError: a folder has its name.
    """
    for state in (WHOLE, MOVING, REMOVED):
        path = run.record(step, state)
        if path.is_dir():
            raise StorageError(f"{path} is a folder, expected a record or nothing. Move it away.")


def _check_free(request: SaveRequest, units: Iterable[str]) -> tuple[str, ...]:
    """Return those of ``units`` that the step replaces (errors as ``replaceable``)."""
    return replaceable(request.directory, request.step, units, request.claim)


def _write_step(request: SaveRequest) -> Record:
    """Write the files of a step to its staging directory; return its record."""
    run, options = request.directory, request.options
    staging = _staging_of(request)
    try:
        parts = parts_of(request)
        units = units_of(parts)
        if options.format.own_library:
            units = (request.folder, *units)
        check_units(run, units)
        _check_free(request, units)
        files = _write_by_library(request, staging) if options.format.own_library else {}
        budget = budget_for(options.host_bytes, options.workers, LENT_BLOCK_BYTES)
        more, algorithm = write_parts(parts, staging, request.snapshot, budget)
        record = _record_of(request, parts, {**files, **more}, algorithm, units)
    except BaseException:
        staging.abandon()
        raise
    staging.publish()
    return record


def _staging_of(request: SaveRequest) -> Transaction:
    place = request.directory.staging(request.step)
    durable = request.options.durable
    return Transaction(place, str(request.step), overwrite=True, durable=durable, kind="own")


def _write_by_library(request: SaveRequest, staging: Transaction) -> dict[str, FileSums]:
    """Write the whole state by the format's own library; return the files' checksums."""
    root, place = staging.files, staging.files / request.folder
    check_room(root, request.snapshot.num_bytes)  # Orbax compresses, but not by much
    place.parent.mkdir(parents=True, exist_ok=True)
    request.options.format.write_tree(place, request.snapshot.whole())
    paths = sorted(p.relative_to(root).as_posix() for p in place.rglob("*") if p.is_file())
    for path in paths:
        staging.sync(root / path)
    return sums_of(root, paths)[0]


def _record_of(
    request: SaveRequest,
    parts: Sequence[StepPart],
    files: Mapping[str, FileSums],
    algorithm: str,
    units: tuple[str, ...],
) -> Record:
    """Return the record of a written step; its strategy files are stored by content.

    Raises:
        StorageError: the disk refuses.
    """
    strategy = next((part.strategy for part in parts if part.strategy), {})
    return Record(
        request.step,
        request.global_step,
        request.options.format.name,
        algorithm,
        units,
        files,
        _store_strategy(request, strategy) if strategy else None,
        request.extras,
        {name: n for name, n in request.numbers.items() if n is not None},
        time.time(),
    )


def _store_strategy(request: SaveRequest, strategy: Mapping[str, bytes]) -> str:
    """Write the strategy files to a folder named by their content, unless they are there."""
    folder = strategy_folder(strategy)
    place = request.directory.root / folder
    try:
        for name, data in strategy.items():
            if not _has_content(place / name, data):
                replace_file(place / name, data, durable=request.options.durable)
    except OSError as error:
        at = error.filename or place
        raise StorageError(f"{at} cannot be written: {error.strerror}.") from error
    return folder


def _has_content(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def _apply_retention(request: SaveRequest, saved: Record, before: Iterable[RunStep]) -> None:
    """Remove the steps that may go; a step that cannot be removed does not undo the save.

    ``before`` are the steps that existed when the save began: the lock keeps them as they were.
    """
    run, prefix, step = request.directory, request.options.prefix, saved.step
    whole = [s for s in before if s.record and s.state == "complete" and s.name != step]
    whole.append(RunStep.of_record(saved))
    past, left = past_of(of_prefix(whole, prefix), saved.lineage)
    left = [s for s in left if s.name.task == step.task]  # other jobs remove their own
    gone = request.options.retention.expired(
        {s.name: s.global_step for s in past}, {s.name: s.global_step for s in left}
    )
    for record in [s.record for s in whole if s.record and s.name in gone]:
        try:
            remove(run, record)
        except (StorageError, FormatError) as error:
            _log.warning("step %s cannot be removed: %s", record.step, error)
    if not gone:
        drop_unused_strategies(run)


def _remove_staging(run: RunDirectory, step: StepName) -> None:
    """Free the disk space of a step that failed."""
    if run.record(step, MOVING).is_file():
        return  # its files are complete, and the next process renames them into place
    staging = run.staging(step)
    for path in (staging, staging.with_name(f".{staging.name}.partial")):
        shutil.rmtree(path, ignore_errors=True)


# --- Lineage: which step the saved one continues


def _lineage_of(request: SaveRequest, found: list[RunStep]) -> Lineage:
    """Return the lineage of the step; log the steps that it abandons.

    Raises:
        LayoutError: another job has saved a step of this name.
    """
    prefix = request.options.prefix
    steps = [s for s in found if s.record]
    for step in steps:
        if step.name == request.step and step.prefix not in ("", prefix):
            raise LayoutError(
                f"{request.directory.root} has a step {step.name} of the job {step.prefix!r}, "
                f"which {prefix!r} would replace. Give each job a directory of its own."
            )
    ours = of_prefix(steps, prefix)
    after = request.after or _guessed(ours, request.global_step) or Lineage()
    # an unreadable record has a place in the order too
    unread = sum(s.state == "corrupt" and not s.record and not s.paths for s in found)
    newest = max((s.lineage.order for s in steps), default=0) + unread
    lineage = next_lineage(after, newest)
    abandoned = [
        str(s.name)
        for s in ours
        if s.name != request.step and s.lineage.order > after.order
        if not lineage.descends_from(s.lineage.order)
    ]
    if abandoned:
        _log.info(
            "step %s does not continue %s, which the run leaves behind: restored only if no other "
            "step is good, and removed once the run has passed it",
            request.step,
            format_list(abandoned),
        )
    return lineage


def _guessed(steps: list[RunStep], global_step: int) -> Lineage | None:
    """Return the lineage of the newest earlier step, for loops that restored by other means."""
    past = (s for s in reversed(steps) if not s.abandoned)
    return next((s.lineage for s in past if s.global_step < global_step), None)


def record_rollback(
    run: RunDirectory, prefix: str, to: StepName, lineage: Lineage, *, durable: bool
) -> None:
    """Record that the run continues from ``to``, until its next save records that itself.

    Otherwise a run that crashes before that save would resume from a newer, abandoned step.

    Args:
        run: the run's directory.
        prefix: of the job.
        to: the restored step.
        lineage: the lineage of that step.
        durable: fsync.

    Raises:
        StorageError: the disk refuses, or another writer is at work.
    """
    with writer_lock(run, durable=durable):
        steps = [s for s in find_steps(run) if s.record]
        newer = [s for s in of_prefix(steps, prefix) if s.lineage.order > lineage.order]
        order = max((s.lineage.order for s in steps), default=0)
        rollback = Rollback(prefix, to, next_lineage(lineage, order))
        path = run.own / rollback.file_name
        try:
            if newer:
                replace_file(path, rollback.to_bytes(), durable=durable)
            else:
                path.unlink(missing_ok=True)  # the run returned to a step it had abandoned
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}.") from error


def _drop_rollback(run: RunDirectory, prefix: str) -> None:
    """Remove the record of a rollback, which the lineage of a saved step replaces."""
    with suppress(OSError):  # a file that stays is ignored, because the step's order is not smaller
        (run.own / Rollback(prefix, StepName(0, 0), Lineage()).file_name).unlink()


# --- Several processes: process 0 leads, and each writes the shards of its own devices


class _Leader:
    """A save led by process 0."""

    def __init__(self, request: SaveRequest, processes: Processes) -> None:
        self._request, self._processes = request, processes
        self._next = _BEGIN  # the meeting at which the other processes wait

    def save(self) -> Record:
        try:
            record = _save(self._request, self._write_step)
        except BaseException as error:
            if self._next:
                self._report(error)
            raise
        self._processes.broadcast(_COMMIT, lambda: "")
        return record

    def _report(self, error: BaseException) -> None:
        """Raise in the other processes what failed in this one only."""

        def fail() -> str:
            raise error

        self._processes.broadcast(self._next, fail)

    def _write_step(self, request: SaveRequest) -> Record:
        staging = _staging_of(request)
        try:
            work = _SharedStep(request, self._processes)
            token = self._begin(work, staging)
            work.write(token)
            sums = work.sum_up()
            self._next = _COMMIT
            record = work.finish(staging, sums)
        except BaseException:
            staging.abandon()
            raise
        staging.publish()
        return record

    def _begin(self, work: _SharedStep, staging: Transaction) -> str:
        def begin() -> str:
            units = units_of(work.parts)
            check_units(self._request.directory, units)
            _check_free(self._request, units)
            return work.shared.begin(staging)

        name, self._next = self._next, ""  # from here on, failures are reported by the meetings
        return self._processes.broadcast(name, begin)


class _SharedStep:
    """One process's share of one attempt to save a step."""

    def __init__(self, request: SaveRequest, processes: Processes) -> None:
        self._request, self._processes, self._token = request, processes, ""
        self.parts = parts_of(request)
        self.shared = SharedWrite(
            request.snapshot,
            [(part.catalog, part.result) for part in self.parts],
            request.directory.staging(request.step),
            processes,
            durable=request.options.durable,
        )

    def write(self, token: str) -> None:
        """Write this process's shards; returns when every process has."""
        self._token = token
        self.shared.write(_WRITE, token, self._budget(LENT_BLOCK_BYTES))

    def sum_up(self) -> dict[str, FileSums]:
        """Compute the checksums of this process's share of the files; several wrote each."""
        here = self._processes.index
        with self._processes.together(_SUM) as meeting:
            found = _sums(self.shared.folder, self._paths(), self._budget().workers)
            meeting.sent = BEST
            if here:
                _write_sums(self._sums_file(here), found)
        _check_algorithms(meeting.received)
        return found

    def finish(self, staging: Transaction, own: Mapping[str, FileSums]) -> Record:
        """Complete the files in process 0, and return the record of the step."""
        sums = dict(own)
        for process in range(1, self._processes.count):
            sums |= _read_sums(self._sums_file(process))
        self.shared.finish(staging)
        gathered = Gathered()
        sums |= write_side_files(self.parts, staging, gathered)
        units = units_of(self.parts)
        return _record_of(self._request, self.parts, sums, gathered.algorithm, units)

    def _budget(self, *block_bytes: int) -> Budget:
        options = self._request.options
        return budget_for(options.host_bytes, options.workers, *block_bytes)

    def _paths(self) -> list[str]:
        """Return adjacent files, most of whose bytes this process has written."""
        sized = [
            pair
            for outputs in (part.result.outputs for part in self.parts)
            for pair in zip(outputs.paths, outputs.rank_bytes(), strict=True)
        ]
        cuts = cut_evenly([num_bytes for _, num_bytes in sized], self._processes.count)
        here = self._processes.index
        return [path for (path, _), to in zip(sized, cuts, strict=True) if to == here]

    def _sums_file(self, process: int) -> Path:
        """Return the file with the checksums that ``process`` computed."""
        base = staging_folder(self._request.directory.staging(self._request.step))
        return base / f"sums-{self._token}-{process}.json"


def _sums(root: Path, paths: Sequence[str], workers: int) -> dict[str, FileSums]:
    found: dict[str, FileSums] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="jaxshard") as pool:
        for sums, _ in pool.map(lambda path: sums_of(root, [path]), paths):
            found |= sums
    return found


def _write_sums(place: Path, sums: Mapping[str, FileSums]) -> None:
    listed = {path: [s.num_bytes, list(s.chunks)] for path, s in sums.items()}
    try:
        place.write_text(json.dumps(listed))
    except OSError as error:
        raise StorageError(f"{place} cannot be written: {error.strerror}.") from error


def _read_sums(place: Path) -> dict[str, FileSums]:
    try:
        listed = json.loads(place.read_text())
    except OSError as error:
        raise StorageError(f"{place} cannot be read: {error.strerror}.") from error
    return {
        path: FileSums(num_bytes, tuple((a, b, c) for a, b, c in chunks))
        for path, (num_bytes, chunks) in listed.items()
    }


def _check_algorithms(algorithms: Sequence[str]) -> None:
    odd = [i for i, name in enumerate(algorithms) if name != algorithms[0]]
    if odd:
        raise StorageError(
            f"process {odd[0]} computes {algorithms[odd[0]]} checksums and process 0 "
            f"{algorithms[0]}. Install the same packages on all hosts."
        )
