"""Commit, recovery and removal of a step, and which existing files a step may replace.

    saving    files are written below .jaxshard/1_10.saving          crash: no step
    moving    .jaxshard/1_10.moving lists the files, each renamed    crash: continued by the next
    whole     1_10.moving is renamed to 1_10.json                    the step exists
    removing  1_10.json is renamed to 1_10.removed, files deleted    crash: continued by the next

Files are only ever renamed into place, so no reader sees one half written. A folder is renamed
away before anything in it is deleted. The caller holds the lock (``run_directory.writer_lock``).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import FormatError, LayoutError, StorageError, format_list
from ..formats.registry import format_of
from ..storage.fs import publish_new
from . import records
from .records import MOVING, REMOVED, WHOLE, Record, StepName, is_strategy_file
from .run_directory import (
    RunDirectory,
    Unreadable,
    check_units,
    names_in,
    read_record,
    replace_file,
    sync_folder,
)
from .steps import find_steps, of_prefix

_log = logging.getLogger("jaxshard.training")

REMOVED_FOLDER = "removed"
_SCRATCH = re.compile(  # temporary files of an interrupted writer
    rf"\.((_\d+-)?\d+_\d+({MOVING}|{WHOLE})|rollback-.*{WHOLE}|{records.KEPT_STRATEGY.pattern})\.new"
)


def commit(run: RunDirectory, record: Record, *, durable: bool) -> None:
    """Rename the step in ``run.staging`` into place; call ``check_units`` before.

    Raises:
        StorageError: the disk refuses; the next process that can completes the commit.
    """
    try:
        replace_file(run.record(record.step, MOVING), records.to_bytes(record), durable=durable)
        _put_in_place(run, record, durable=durable)
    except FileExistsError as error:
        raise StorageError(_in_the_way(run, record.step, error)) from error
    except OSError as error:
        raise StorageError(f"step {record.step} of {run.root}: {error}.") from error


def is_on_disk(run: RunDirectory, step: StepName) -> bool:
    """Return True if ``step`` is completely written, but not yet renamed into place."""
    return run.record(step, MOVING).is_file()


def remove(run: RunDirectory, record: Record) -> None:
    """Delete a step.

    Raises:
        StorageError: the disk refuses.
    """
    check_units(run, record.units)
    try:
        os.rename(run.record(record.step), run.record(record.step, REMOVED))
        _delete(run, record)
    except OSError as error:
        raise StorageError(f"step {record.step} of {run.root}: {error}.") from error


def recover(run: RunDirectory, *, durable: bool = True) -> list[str]:
    """Complete interrupted commits and removals, and delete unfinished saves; return a log.

    Raises:
        StorageError: the disk refuses.
    """
    done: list[str] = []
    try:
        for step in names_in(run, MOVING):
            _complete_commit(run, step, done, durable=durable)
        for step in names_in(run, REMOVED):
            _complete_removal(run, step, done)
        for path in _leftovers(run):
            done.append(_delete_leftover(path))
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{run.own} cannot be recovered: {error}.") from error
    return done


def is_interrupted(run: RunDirectory) -> bool:
    """Return True if there is anything to ``recover``."""
    found = any(names_in(run, state) for state in (MOVING, REMOVED))
    return found or any(_leftovers(run))


def _complete_commit(run: RunDirectory, step: StepName, done: list[str], *, durable: bool) -> None:
    try:
        record = read_record(run, step, MOVING)
        check_units(run, record.units)
        check_units(run, record.units, run.staging(step))
        _put_in_place(run, record, durable=durable)
    except FileExistsError as error:
        done.append(_in_the_way(run, step, error))
        return
    except Unreadable as error:
        done.append(f"step {step} was being moved into place, and stays as it is: {error}")
        return
    except FormatError:
        # a power failure truncated it, before any file was moved
        run.record(step, MOVING).unlink()
        return
    done.append(f"step {step} was complete and is now in place.")


def _in_the_way(run: RunDirectory, step: StepName, error: OSError) -> str:
    return (
        f"step {step} of {run.root} is complete and cannot be moved into place: "
        f"{error.filename or run.steps} is another job's. Move that away; the next save or restore "
        "completes the step."
    )


def _complete_removal(run: RunDirectory, step: StepName, done: list[str]) -> None:
    try:
        record = read_record(run, step, REMOVED)
    except FormatError as error:
        # its files are unknown; without a record the rest would look like a foreign step
        done.append(f"step {step} was being removed, and the rest of it stays: {error}")
        return
    check_units(run, record.units)
    _delete(run, record)
    done.append(f"step {step} was being removed; the removal is complete.")


def _delete_leftover(path: Path) -> str:
    """Delete ``path``, which is not needed; return a line for the log."""
    name = path.name.lstrip(".")
    try:
        _remove(path)
    except OSError as error:  # on NFS, a reader may have a file open: the save continues
        return f"{name} was never finished, and cannot be deleted yet: {error.strerror}."
    return f"{name} was never finished, and is deleted."


def _put_in_place(run: RunDirectory, record: Record, *, durable: bool) -> None:
    staging = run.staging(record.step)
    parents: set[Path] = set()
    for unit in record.units:
        source, place = staging / unit, run.root / unit
        parents |= {p for p in place.parents if p.is_relative_to(run.root)}
        if not os.path.lexists(source):
            continue  # the interrupted process had moved it
        place.parent.mkdir(parents=True, exist_ok=True)
        if unit not in record.replaces:
            publish_new(source, place)
            continue
        if place.is_dir() and not place.is_symlink():
            _rename_away(run, place)
        os.replace(source, place)
    _delete_units(run, _replaced(run, record))
    if durable:
        for parent in sorted(parents, reverse=True):  # the folders may be new too
            sync_folder(parent)
    os.replace(run.record(record.step, MOVING), run.record(record.step, WHOLE))
    run.record(record.step, REMOVED).unlink(missing_ok=True)  # left if it was damaged
    if durable:
        sync_folder(run.own)
    shutil.rmtree(staging, ignore_errors=True)


def _replaced(run: RunDirectory, record: Record) -> list[str]:
    """Return units of an earlier save of the step that this one lacks: files of more ranks."""
    with suppress(FormatError, FileNotFoundError, StorageError):
        before = read_record(run, record.step)
        check_units(run, before.units)
        return [unit for unit in before.units if unit not in record.units]
    return []


def _delete(run: RunDirectory, record: Record) -> None:
    _delete_units(run, record.units)
    run.record(record.step, REMOVED).unlink(missing_ok=True)
    drop_unused_strategies(run)


def _delete_units(run: RunDirectory, units: Iterable[str]) -> None:
    for unit in units:
        place = run.root / unit
        if place.is_dir() and not place.is_symlink():
            place = _rename_away(run, place)
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def _rename_away(run: RunDirectory, folder: Path) -> Path:
    """Rename ``folder`` out of the run atomically; return where it can be deleted."""
    aside = run.own / REMOVED_FOLDER / folder.name
    aside.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(aside):
        _remove(aside)
    os.rename(folder, aside)
    return aside


def drop_unused_strategies(run: RunDirectory) -> None:
    """Delete the strategy files of layouts that no step uses."""
    with suppress(OSError):  # they are small, and the next save tries again
        _drop_unused(run)


def _drop_unused(run: RunDirectory) -> None:
    kept = sorted(filter(records.KEPT_STRATEGY.fullmatch, os.listdir(run.own)))
    if len(kept) < 2:
        return
    used = set()
    for state in (WHOLE, MOVING):
        for step in names_in(run, state):
            try:
                used.add(read_record(run, step, state).strategy)
            except FileNotFoundError:
                continue
            except FormatError:
                return  # its strategy is unknown
    for name in kept:
        if f"{records.FOLDER}/{name}" not in used:
            _drop_strategy(run.own / name)


def _drop_strategy(folder: Path) -> None:
    """Delete jaxshard's files in ``folder``, and ``folder`` if it is empty then."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if records.is_strategy_file(name.removeprefix(".").removesuffix(".new")):
                (folder / name).unlink()
        folder.rmdir()


def _leftovers(run: RunDirectory) -> Iterator[Path]:
    moving = set(names_in(run, MOVING))
    for step in names_in(run, ".saving"):
        if step not in moving:
            yield run.staging(step)
    for name in sorted(os.listdir(run.own)):
        staged = records.parse_step(name.removeprefix(".").removesuffix(".saving.partial"))
        if _SCRATCH.fullmatch(name) or (staged and name == f".{staged}.saving.partial"):
            yield run.own / name
    removed = run.own / REMOVED_FOLDER
    if removed.is_symlink():
        yield removed
    elif removed.is_dir():
        yield from (removed / n for n in sorted(os.listdir(removed)) if _was_a_step(n))


def _was_a_step(name: str) -> bool:
    """Return True if ``name`` is that of a step's folder."""
    return records.parse_iteration(name) is not None or records.parse_folder(name) is not None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- Pointer files of MindSpore and MindFormers; jaxshard does not read them
#
#     checkpoint/rank_{r}/meta.json                     MindFormers' rank files
#     strategy/ckpt_strategy_rank_{r}.ckpt              their strategy files
#     checkpoint/latest_checkpointed_iteration.txt      Checkpoint-2.0 folders


def update_latest(run: RunDirectory, record: Record) -> None:
    """Write the pointer files for the step of ``record``.

    A pointer that cannot be written does not prevent the others.

    Raises:
        StorageError: the disk refuses.
    """
    failed: list[str] = []
    for path, data in _pointers(run, record, failed):
        try:
            _write_if_changed(path, data)
        except OSError as error:
            failed.append(f"{path}: {error.strerror}")
    if failed:
        raise StorageError(f"step {record.step} of {run.root}: {format_list(failed)}.")


def _pointers(run: RunDirectory, record: Record, failed: list[str]) -> Iterator[tuple[Path, bytes]]:
    """Yield the pointer files of a step with their contents."""
    format = format_of(record.format)
    if format.own_step_folder:
        yield run.steps / records.TRACKER, str(record.global_step).encode()
    if not format.steps_in_names:
        return
    head = f"{records.CHECKPOINT}/"
    for unit in record.units:
        file = records.parse_rank_file(unit.removeprefix(head))
        if unit.startswith(head) and file:
            data = records.meta_json(file.prefix, file.rank, record.step)
            yield run.root / unit.rsplit("/", 1)[0] / records.META, data
    if record.strategy:
        try:
            _copy_strategy(run.root / records.STRATEGY, run.root / record.strategy)
        except OSError as error:
            failed.append(f"{error.filename or records.STRATEGY}: {error.strerror}")


def _copy_strategy(place: Path, kept: Path) -> None:
    """Make the strategy files at ``place`` those of ``kept``; other files are ignored."""
    wanted = set(filter(is_strategy_file, os.listdir(kept)))
    for name in sorted(wanted):
        _write_if_changed(place / name, (kept / name).read_bytes())
    for name in set(filter(is_strategy_file, os.listdir(place))) - wanted:
        # of more ranks or of an earlier layout: readers would combine it with these
        (place / name).unlink(missing_ok=True)


def _write_if_changed(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return
    replace_file(path, data, durable=False)


# --- Claims: which names a save may use, and which existing files it may replace
#
#     the run's own step, saved before     replaced
#     a step of another job of the prefix  both are kept: llama_rank_0_1-1_10 (MindSpore's name),
#                                          llama-_1-1_10; an error for iteration_00000010
#     a folder without a record            an error
#     any of these with overwrite=True     replaced
#
# A step is the run's own if this manager saved it. After a restore all recorded steps of the
# prefix are, also those that the run left behind.


@dataclass(frozen=True, slots=True)
class Claim:
    """Steps that a manager may replace.

    Attributes:
        restored: whether the run continues a step of this directory.
        saved: the steps that the manager saved itself.
        task: number of the job in the names of its steps; 0 for none.
        overwrite: replace existing files and folders of other jobs too.
    """

    restored: bool = False
    saved: frozenset[StepName] = frozenset()
    task: int = 0
    overwrite: bool = False

    def owns(self, step: StepName) -> bool:
        """Return True if a recorded step of that name and the job's prefix is the run's own."""
        return self.restored or step in self.saved


def task_for(
    run: RunDirectory, prefix: str, step: StepName, folders: Iterable[str], ranks: int, claim: Claim
) -> int:
    """Return the number that keeps ``step`` apart from the same step of other jobs.

    Args:
        run: the run's directory.
        prefix: of the files.
        step: the epoch and the step in it.
        folders: with rank files of the step: ``checkpoint``, and those of further copies.
        ranks: number of rank files in each; 0 if the step is one folder.
        claim: the job's; it keeps its number as long as that is free.

    Raises:
        StorageError: the directory cannot be listed.
    """
    kinds = list(folders)

    def is_free(task: int) -> bool:
        name = replace(step, task=task)
        units = (
            f"{k}/{records.rank_file(prefix, r, name, k)}" for k in kinds for r in range(ranks)
        )
        known = _prefix_of(run, name)
        if known is not None and (known not in ("", prefix) or claim.owns(name)):
            return True  # the save refuses or replaces it
        if not ranks:
            return known is None  # the save refuses a folder without a record
        return not known and not any(os.path.lexists(run.root / unit) for unit in units)

    if claim.overwrite or is_free(claim.task):
        return claim.task
    tasks = [s.name.task for s in of_prefix(find_steps(run), prefix)]
    task = max([claim.task, *tasks]) + 1
    while not is_free(task):
        task += 1
    name = replace(step, task=task)
    _log.warning(
        "%s has a step %s of another job with the prefix %r. Both are kept: this job's is called "
        "%s. Restore a step first to continue that job.",
        run.steps,
        replace(step, task=claim.task),
        prefix,
        Path(records.rank_file(prefix, 0, name)).name
        if ranks
        else records.step_folder(prefix, name),
    )
    return task


def _prefix_of(run: RunDirectory, step: StepName) -> str | None:
    """Return the prefix of a recorded step; empty if unknown, None without a record."""
    for state in (WHOLE, MOVING, REMOVED):
        try:
            return read_record(run, step, state).prefix
        except FileNotFoundError:
            continue
        except FormatError:
            return ""
    return None


def replaceable(
    run: RunDirectory, step: StepName, units: Iterable[str], claim: Claim
) -> tuple[str, ...]:
    """Return those of ``units`` that exist and that a save of ``step`` may replace.

    Raises:
        LayoutError: a unit exists that is not the step's own.
    """
    units = list(units)
    there = tuple(unit for unit in units if os.path.lexists(run.root / unit))
    if claim.overwrite or not there:
        return there
    known = _recorded_units(run, step, units)
    unrecorded = [unit for unit in there if unit not in known]
    if unrecorded:
        raise LayoutError(
            f"{run.root} has {format_list(unrecorded)} already, and no record of a step {step} "
            "that it belongs to. Give another prefix or directory, move it away, or replace it "
            "with overwrite=True."
        )
    if not claim.owns(step):
        raise LayoutError(
            f"{run.root} has a step {step} ({format_list(there)}) that this manager neither "
            "saved nor restored. Restore a step first to continue that job, give another "
            "directory, or replace it with overwrite=True."
        )
    return there


def _recorded_units(run: RunDirectory, step: StepName, units: list[str]) -> set[str]:
    """Return the units in the records of ``step``; all of ``units`` if one is unreadable."""
    found = set[str]()
    for state in (WHOLE, REMOVED):
        try:
            found |= {*read_record(run, step, state).units}
        except FileNotFoundError:
            continue
        except FormatError:
            found |= {*units}
    return found
