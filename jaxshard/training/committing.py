"""Committing: a step appears when all of it is on the disk, and goes as one.

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
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import FormatError, StorageError
from . import naming, records
from .naming import StepName
from .places import Places, check_units, replace_file, sync_folder
from .records import MOVING, REMOVED, WHOLE, Record


def commit(places: Places, record: Record, *, durable: bool) -> None:
    """Put the step in ``places.staging`` in place; see ``places.check_units`` before.

    Raises:
        StorageError: the disk refused; the step is finished when it no longer does.
    """
    try:
        replace_file(places.record(record.step, MOVING), records.to_bytes(record), durable=durable)
        _put_in_place(places, record, durable=durable)
    except OSError as error:
        raise StorageError(f"step {record.step} of {places.root}: {error}.") from error


def is_on_disk(places: Places, step: StepName) -> bool:
    """Whether all of ``step`` is on the disk and waits to be put in place."""
    return places.record(step, MOVING).exists()


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
        for path in sorted(places.own.glob(f"*{MOVING}")):
            _go_on(places, path, done, durable=durable)
        for path in sorted(places.own.glob(f"*{REMOVED}")):
            _go_on_removing(places, path, done)
        for path in _leftovers(places):
            _remove(path)
            done.append(f"{path.name.lstrip('.')} was never finished, and is cleared away.")
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{places.own} cannot be tidied up: {error}.") from error
    return done


def is_interrupted(places: Places) -> bool:
    """Whether there is something to ``recover``."""
    found = (places.own.glob(f"*{state}") for state in (MOVING, REMOVED))
    return any(any(paths) for paths in found) or any(_leftovers(places))


def _go_on(places: Places, path: Path, done: list[str], *, durable: bool) -> None:
    step = naming.parse_step(path.stem)
    try:
        record = records.from_bytes(path.read_bytes(), str(path))
        if record.step != step:
            raise FormatError(f"{path} is the record of step {record.step}.")
        check_units(places, record.units)
        check_units(places, record.units, places.staging(record.step))
        _put_in_place(places, record, durable=durable)
    except FormatError:
        path.unlink()  # it was cut off by a power failure, before anything was moved
        return
    done.append(f"step {record.step} was on the disk and is now in place.")


def _go_on_removing(places: Places, path: Path, done: list[str]) -> None:
    try:
        record = records.from_bytes(path.read_bytes(), str(path))
    except FormatError as error:
        # which files are the rest is not known; without a record they would pass for a step
        done.append(f"step {path.stem} was being removed, and the rest of it stays: {error}")
        return
    check_units(places, record.units)
    _delete(places, record)
    done.append(f"step {path.stem} was being removed; the rest of it is gone.")


def _put_in_place(places: Places, record: Record, *, durable: bool) -> None:
    staging = places.staging(record.step)
    parents: set[Path] = set()
    for unit in record.units:
        source, place = staging / unit, places.root / unit
        parents |= {p for p in place.parents if p.is_relative_to(places.root)}
        if not os.path.lexists(source):
            continue  # moved by whoever was interrupted
        place.parent.mkdir(parents=True, exist_ok=True)
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
    path = places.record(record.step)
    with suppress(FormatError, FileNotFoundError, StorageError):
        before = records.from_bytes(path.read_bytes(), str(path))
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
    aside = places.own / "removed" / folder.name
    aside.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(aside):
        _remove(aside)
    os.rename(folder, aside)
    return aside


def drop_unused_strategies(places: Places) -> None:
    """Delete the strategy files of layouts that no step has any more."""
    folders = sorted(places.own.glob("strategy-*"))
    if len(folders) < 2:
        return
    used = set()
    for path in places.own.glob(f"*{WHOLE}"):
        with suppress(FormatError, OSError):
            used.add(records.from_bytes(path.read_bytes(), str(path)).strategy)
    for folder in folders:
        if f"{records.FOLDER}/{folder.name}" not in used:
            shutil.rmtree(folder, ignore_errors=True)


def _leftovers(places: Places) -> Iterable[Path]:
    moving = {path.stem for path in places.own.glob(f"*{MOVING}")}
    for path in places.own.glob("*.saving"):
        if path.stem not in moving:
            yield path
    yield from places.own.glob(".*.saving.partial")
    yield from places.own.glob(".*.new")
    removed = places.own / "removed"
    yield from [removed] if removed.is_symlink() else removed.glob("*")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def names_in(places: Places, state: str) -> list[StepName]:
    """The steps that have a record in ``state``."""
    found = (naming.parse_step(path.stem) for path in places.own.glob(f"*{state}"))
    return sorted(step for step in found if step)
