"""Commit and removal of a step.

    saving    files are written below .jaxshard/1_10.saving          a crash: nothing happened
    moving    .jaxshard/1_10.moving says which, each is renamed      a crash: the next one goes on
    whole     1_10.moving is renamed to 1_10.json                    the step is there
    removing  1_10.json is renamed to 1_10.removed, files go         a crash: the next one goes on

Renaming is the only thing that happens to files in their place, so none is ever seen half
written; and a folder is taken away under its whole name before anything in it is deleted.
Whoever calls holds the directory (``places.only_writer``).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import (
    FormatError,
    StorageError,
    format_list,
)
from ..formats.registry import format_of
from ..storage.fs import publish_new
from . import records
from .records import (
    MOVING,
    REMOVED,
    WHOLE,
    Record,
    StepName,
    is_strategy_file,
)
from .run_directory import (
    Places,
    Unreadable,
    check_units,
    names_in,
    read_record,
    replace_file,
    sync_folder,
)

REMOVED_FOLDER = "removed"
_SCRATCH = re.compile(  # of files that were being written
    rf"\.((_\d+-)?\d+_\d+({MOVING}|{WHOLE})|rollback-.*{WHOLE}|{records.KEPT_STRATEGY.pattern})\.new"
)


def commit(places: Places, record: Record, *, durable: bool) -> None:
    """Put the step in ``places.staging`` in place; see ``places.check_units`` before.

    Raises:
        StorageError: the disk refused; the step is finished when it no longer does.
    """
    try:
        replace_file(places.record(record.step, MOVING), records.to_bytes(record), durable=durable)
        _put_in_place(places, record, durable=durable)
    except FileExistsError as error:
        raise StorageError(_in_the_way(places, record.step, error)) from error
    except OSError as error:
        raise StorageError(f"step {record.step} of {places.root}: {error}.") from error


def is_on_disk(places: Places, step: StepName) -> bool:
    """Whether all of ``step`` is on the disk and waits to be put in place."""
    return places.record(step, MOVING).is_file()


def remove(places: Places, record: Record) -> None:
    """Delete a step.

    Raises:
        StorageError: the disk refused.
    """
    check_units(places, record.units)
    try:
        os.rename(places.record(record.step), places.record(record.step, REMOVED))
        _delete(places, record)
    except OSError as error:
        raise StorageError(f"step {record.step} of {places.root}: {error}.") from error


def recover(places: Places, *, durable: bool = True) -> list[str]:
    """Go on with what was interrupted, and clear away what was never finished; what was done.

    Raises:
        StorageError: the disk refused.
    """
    done: list[str] = []
    try:
        for step in names_in(places, MOVING):
            _go_on(places, step, done, durable=durable)
        for step in names_in(places, REMOVED):
            _go_on_removing(places, step, done)
        for path in _leftovers(places):
            done.append(_cleared(path))
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{places.own} cannot be tidied up: {error}.") from error
    return done


def is_interrupted(places: Places) -> bool:
    """Whether there is something to ``recover``."""
    found = any(names_in(places, state) for state in (MOVING, REMOVED))
    return found or any(_leftovers(places))


def _go_on(places: Places, step: StepName, done: list[str], *, durable: bool) -> None:
    try:
        record = read_record(places, step, MOVING)
        check_units(places, record.units)
        check_units(places, record.units, places.staging(step))
        _put_in_place(places, record, durable=durable)
    except FileExistsError as error:
        done.append(_in_the_way(places, step, error))
        return
    except Unreadable as error:
        done.append(f"step {step} was being put in place, and stays as it is: {error}")
        return
    except FormatError:
        # it was cut off by a power failure, before anything was moved
        places.record(step, MOVING).unlink()
        return
    done.append(f"step {step} was on the disk and is now in place.")


def _in_the_way(places: Places, step: StepName, error: OSError) -> str:
    return (
        f"step {step} of {places.root} is on the disk and cannot be put in place: "
        f"{error.filename or places.steps} is another job's. Move that away; the step follows then."
    )


def _go_on_removing(places: Places, step: StepName, done: list[str]) -> None:
    try:
        record = read_record(places, step, REMOVED)
    except FormatError as error:
        # which files are the rest is not known; without a record they would pass for a step
        done.append(f"step {step} was being removed, and the rest of it stays: {error}")
        return
    check_units(places, record.units)
    _delete(places, record)
    done.append(f"step {step} was being removed; the rest of it is gone.")


def _cleared(path: Path) -> str:
    """Remove ``path``, which nothing needs; what came of it."""
    name = path.name.lstrip(".")
    try:
        _remove(path)
    except OSError as error:  # a reader on NFS has a file of it open: no reason not to save
        return f"{name} was never finished, and cannot be cleared away yet: {error.strerror}."
    return f"{name} was never finished, and is cleared away."


def _put_in_place(places: Places, record: Record, *, durable: bool) -> None:
    staging = places.staging(record.step)
    parents: set[Path] = set()
    for unit in record.units:
        source, place = staging / unit, places.root / unit
        parents |= {p for p in place.parents if p.is_relative_to(places.root)}
        if not os.path.lexists(source):
            continue  # moved by whoever was interrupted
        place.parent.mkdir(parents=True, exist_ok=True)
        if unit not in record.replaces:
            publish_new(source, place)
            continue
        if place.is_dir() and not place.is_symlink():
            _set_aside(places, place)
        os.replace(source, place)
    _delete_units(places, _replaced(places, record))
    if durable:
        for parent in sorted(parents, reverse=True):  # they may be new themselves
            sync_folder(parent)
    os.replace(places.record(record.step, MOVING), places.record(record.step, WHOLE))
    places.record(record.step, REMOVED).unlink(missing_ok=True)  # damaged: nobody could go on
    if durable:
        sync_folder(places.own)
    shutil.rmtree(staging, ignore_errors=True)


def _replaced(places: Places, record: Record) -> list[str]:
    """What an earlier save of the same step had and this one has not: files of more ranks."""
    with suppress(FormatError, FileNotFoundError, StorageError):
        before = read_record(places, record.step)
        check_units(places, before.units)
        return [unit for unit in before.units if unit not in record.units]
    return []


def _delete(places: Places, record: Record) -> None:
    _delete_units(places, record.units)
    places.record(record.step, REMOVED).unlink(missing_ok=True)
    drop_unused_strategies(places)


def _delete_units(places: Places, units: Iterable[str]) -> None:
    for unit in units:
        place = places.root / unit
        if place.is_dir() and not place.is_symlink():
            place = _set_aside(places, place)
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def _set_aside(places: Places, folder: Path) -> Path:
    """Take ``folder`` away in one step; where it is now, to be deleted at leisure."""
    aside = places.own / REMOVED_FOLDER / folder.name
    aside.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(aside):
        _remove(aside)
    os.rename(folder, aside)
    return aside


def drop_unused_strategies(places: Places) -> None:
    """Delete the strategy files of layouts that no step has any more."""
    with suppress(OSError):  # they are small, and the next save tries again
        _drop_unused(places)


def _drop_unused(places: Places) -> None:
    kept = sorted(filter(records.KEPT_STRATEGY.fullmatch, os.listdir(places.own)))
    if len(kept) < 2:
        return
    used = set()
    for state in (WHOLE, MOVING):
        for step in names_in(places, state):
            try:
                used.add(read_record(places, step, state).strategy)
            except FileNotFoundError:
                continue
            except FormatError:
                return  # which strategy it needs is not known
    for name in kept:
        if f"{records.FOLDER}/{name}" not in used:
            _drop_strategy(places.own / name)


def _drop_strategy(folder: Path) -> None:
    """Delete our files in ``folder``, and ``folder`` unless foreign files lie in it."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if records.is_strategy_file(name.removeprefix(".").removesuffix(".new")):
                (folder / name).unlink()
        folder.rmdir()


def _leftovers(places: Places) -> Iterator[Path]:
    moving = set(names_in(places, MOVING))
    for step in names_in(places, ".saving"):
        if step not in moving:
            yield places.staging(step)
    for name in sorted(os.listdir(places.own)):
        staged = records.parse_step(name.removeprefix(".").removesuffix(".saving.partial"))
        if _SCRATCH.fullmatch(name) or (staged and name == f".{staged}.saving.partial"):
            yield places.own / name
    removed = places.own / REMOVED_FOLDER
    if removed.is_symlink():
        yield removed
    elif removed.is_dir():
        yield from (removed / n for n in sorted(os.listdir(removed)) if _was_a_step(n))


def _was_a_step(name: str) -> bool:
    """Whether a folder of that name is one that is set aside when a step goes."""
    return records.parse_iteration(name) is not None or records.parse_folder(name) is not None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- The "latest" files of a run


def point_at(places: Places, record: Record) -> None:
    """Have the pointer files say that the step of ``record`` is the newest.

    One that cannot be written keeps no other one from being written.

    Raises:
        StorageError: the disk refused.
    """
    failed: list[str] = []
    for path, data in _pointers(places, record, failed):
        try:
            _put(path, data)
        except OSError as error:
            failed.append(f"{path}: {error.strerror}")
    if failed:
        raise StorageError(f"step {record.step} of {places.root}: {format_list(failed)}.")


def _pointers(places: Places, record: Record, failed: list[str]) -> Iterator[tuple[Path, bytes]]:
    """The pointer files of a step and their contents."""
    format = format_of(record.format)
    if format.own_step_folder:
        yield places.steps / records.TRACKER, str(record.global_step).encode()
    if not format.steps_in_names:
        return
    head = f"{records.CHECKPOINT}/"
    for unit in record.units:
        file = records.parse_rank_file(unit.removeprefix(head))
        if unit.startswith(head) and file:
            said = records.meta_json(file.prefix, file.rank, record.step)
            yield places.root / unit.rsplit("/", 1)[0] / records.META, said
    if record.strategy:
        try:
            _show_strategy(places.root / records.STRATEGY, places.root / record.strategy)
        except OSError as error:
            failed.append(f"{error.filename or records.STRATEGY}: {error.strerror}")


def _show_strategy(place: Path, kept: Path) -> None:
    """Make the strategy files at ``place`` those that are ``kept``; foreign files are ignored."""
    wanted = set(filter(is_strategy_file, os.listdir(kept)))
    for name in sorted(wanted):
        _put(place / name, (kept / name).read_bytes())
    for name in set(filter(is_strategy_file, os.listdir(place))) - wanted:
        # of a run on more ranks, or of a layout before: readers would take it for ours
        (place / name).unlink(missing_ok=True)


def _put(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return
    replace_file(path, data, durable=False)
