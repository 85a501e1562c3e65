"""Saving steps: from a snapshot to a whole step in its place.

Everything of a step is written beside the run, summed, recorded and then put in place at
once (``committing``); only then do older steps go. Whatever fails before leaves the run as
it was.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import FormatError, StorageError
from ..storage.staging import Staging
from . import naming
from .checksums import FileSums
from .committing import commit, drop_unused_strategies, recover, remove
from .layouts import Part, Wish, copies_of, parts_of
from .places import Places, only_writer, replace_file, sync_folder
from .pointers import point_at
from .records import Record, strategy_folder
from .retention import expired
from .snapshots import Snapshot
from .steps import find_steps
from .writing import sums_of, write_parts

_log = logging.getLogger("jaxshard.training")


@dataclass(frozen=True)
class Keeping:
    """Which older steps stay; see ``retention.expired``."""

    keep_max: int = 5
    keep_every: int = 0


@dataclass(frozen=True)
class Job:
    """All that is needed to save one step, away from the loop.

    Attributes:
        weights: which tensors are the model's.
        copies: further copies: a folder, and the names of the tensors in it.
    """

    places: Places
    kind: str
    wish: Wish
    snapshot: Snapshot
    weights: frozenset[str]
    hyper: frozenset[str]
    copies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    keeping: Keeping = Keeping()
    durable: bool = True
    workers: int | None = None
    host_bytes: int | None = None


def save_step(job: Job) -> None:
    """Save a step, and let go of those that may go.

    Raises:
        StorageError: the disk is full or refuses, or another writer is at work; nothing of
            the step is there, and all others are.
        LayoutError: the layout does not fit the tensors.
    """
    places = job.places
    with only_writer(places):
        for line in recover(places, durable=job.durable):
            _log.info("%s", line)
        try:
            record = _written(job)
            job.snapshot.check_still()
            commit(places, record, durable=job.durable)
        except BaseException:
            _clear(places, job.wish.step)
            raise
        finally:
            job.snapshot.close()
        try:
            point_at(places, record)
        except StorageError as error:  # the step is whole all the same
            _log.warning("step %s is saved, but pointers to it are not: %s", record.step, error)
        _let_go(job, record)


def _written(job: Job) -> Record:
    """Write the step beside the run; its record."""
    places, wish = job.places, job.wish
    staged = places.staging(wish.step)
    staging = Staging(staged, str(wish.step), overwrite=True, durable=job.durable, private=True)
    catalog = replace(job.snapshot.catalog, hyper=job.hyper)
    try:
        if job.kind == "orbax":
            files, algorithm, units = _write_orbax(job, staging.files)
            parts: list[Part] = []
        else:
            files, algorithm, units = {}, "", ()
            parts = parts_of(job.kind, catalog, job.weights, wish)
        for folder, names in job.copies.items():
            parts += copies_of(job.kind, catalog, names, wish, folder)
        snapshot = job.snapshot
        more, algorithm = write_parts(
            parts,
            staging,
            snapshot.read,
            snapshot.lend,
            workers=job.workers,
            host_bytes=job.host_bytes,
        )
        strategy = next((part.strategy for part in parts if part.strategy), {})
        kept = _keep_strategy(places, strategy, durable=job.durable) if strategy else None
    except BaseException:
        staging.abandon()
        raise
    staging.publish()
    units += tuple(dict.fromkeys(u for part in parts for u in part.units))
    return Record(
        wish.step,
        wish.global_step,
        job.kind,
        algorithm,
        units,
        {**files, **more},
        kept,
        job.extras,
        {name: n for name, n in wish.numbers.items() if n is not None},
        time.time(),
    )


def _write_orbax(job: Job, root: Path) -> tuple[dict[str, FileSums], str, tuple[str, ...]]:
    from ..formats import orbax  # noqa: PLC0415 - slow to import, and not for everybody

    unit = f"{naming.CHECKPOINT}/{naming.step_folder(job.wish.prefix, job.wish.step)}"
    place = root / unit
    place.parent.mkdir(parents=True, exist_ok=True)
    orbax.write(place, job.snapshot.whole())
    paths = sorted(p.relative_to(root).as_posix() for p in place.rglob("*") if p.is_file())
    files, algorithm = sums_of(root, paths)
    return files, algorithm, (unit,)


def _keep_strategy(places: Places, strategy: Mapping[str, bytes], *, durable: bool) -> str:
    """Have the strategy files in a folder named after their content; that folder."""
    kept = strategy_folder(strategy)
    place = places.root / kept
    if all(_holds(place / name, data) for name, data in strategy.items()):
        return kept
    scratch = places.own / f".{place.name}.new"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)  # damaged: its steps are no worse off without it
    try:
        for name, data in strategy.items():
            replace_file(scratch / name, data, durable=durable)
        os.rename(scratch, place)
        if durable:
            sync_folder(places.own)
    except OSError as error:
        raise StorageError(f"{place} cannot be written: {error.strerror}.") from error
    return kept


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def _let_go(job: Job, saved: Record) -> None:
    """Remove the steps that may go; that one cannot be removed does not undo the save."""
    complete = {
        s.name: s.record
        for s in find_steps(job.places)
        if s.record is not None and s.state == "complete"
    }
    gone = expired(
        {name: record.global_step for name, record in complete.items()},
        saved.step,
        keep_max=job.keeping.keep_max,
        keep_every=job.keeping.keep_every,
    )
    for name in gone:
        try:
            remove(job.places, complete[name])
        except (StorageError, FormatError) as error:
            _log.warning("step %s cannot be removed: %s", name, error)
    if not gone:
        drop_unused_strategies(job.places)


def _clear(places: Places, step: naming.StepName) -> None:
    """Give back the room of a step that failed."""
    if places.record(step, ".moving").exists():
        return  # it is on the disk, and will be put in place
    for path in _remains(places, step):
        shutil.rmtree(path, ignore_errors=True)


def _remains(places: Places, step: naming.StepName) -> Iterable[Path]:
    staging = places.staging(step)
    return (staging, staging.with_name(f".{staging.name}.partial"))
