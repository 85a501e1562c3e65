"""Saving steps: from a snapshot to a whole step in its place.

Everything of a step is written beside the run, summed, recorded and then put in place at
once (``committing``); only then do older steps go. Whatever fails before leaves the run as
it was.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import FormatError, LayoutError, StorageError, some
from ..notes import log_once
from ..storage.checksums import FileSums
from ..storage.staging import Staging
from . import naming
from .claims import Claim, replaceable
from .committing import commit, drop_unused_strategies, recover, remove
from .layouts import Part, Wish, copies_of, parts_of
from .lineage import Line, following
from .naming import StepName
from .places import Places, check_units, only_writer, replace_file
from .pointers import point_at
from .records import MOVING, REMOVED, WHOLE, Record, strategy_folder
from .retention import expired
from .snapshots import Snapshot
from .steps import Step, find_steps, of_prefix, past_of
from .writing import check_room, sums_of, write_parts

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
        after: what the step grows from, if the loop's manager knows.
        claim: what of what is there already may be replaced.
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
    after: Line | None = None
    claim: Claim = Claim()  # noqa: RUF009 - frozen


def save_step(job: Job, write: Callable[[Job], Record] | None = None) -> Record:
    """Save a step, and let go of those that may go; its record. ``write`` puts it beside the run.

    Raises:
        StorageError: the disk is full or refuses, or another writer is at work; nothing of
            the step is there, and all others are.
        LayoutError: the layout does not fit the tensors, the step is another job's, or a file or
            folder that has its name is not the run's own.
    """
    places = job.places
    with only_writer(places, durable=job.durable):
        for done in recover(places, durable=job.durable):
            _log.info("%s", done)
        try:
            _refuse_blocked(places, job.wish.step)
            line = _line_of(job)  # first: it may refuse
            record = replace((write or _written)(job), line=line)
            # again: files may have appeared while the step was written
            record = replace(record, replaces=check_free(job, record.units))
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
    return record


def _refuse_blocked(places: Places, step: StepName) -> None:
    """Refuse a step whose record could not be put in its place.

    Raises:
        StorageError: a folder has its name.
    """
    for state in (WHOLE, MOVING, REMOVED):
        path = places.record(step, state)
        if path.is_dir():
            raise StorageError(f"{path} is a folder, expected a record or nothing. Move it away.")


def _line_of(job: Job) -> Line:
    """Where the step stands among all saves; what it does not grow from is said.

    Raises:
        LayoutError: another job has saved a step of this name.
    """
    wish = job.wish
    found = find_steps(job.places)
    steps = [s for s in found if s.record]
    unread = sum(s.state == "corrupt" and not s.record and not s.paths for s in found)
    for step in steps:
        if step.name == wish.step and step.prefix not in ("", wish.prefix):
            raise LayoutError(
                f"{job.places.root} has a step {step.name} of the job {step.prefix!r}, which "
                f"{wish.prefix!r} would replace. Give each job a directory of its own."
            )
    ours = of_prefix(steps, wish.prefix)
    after = job.after or _guessed(ours, wish.global_step)
    # a record that cannot be read now has a place in the order all the same
    newest = max((s.line.order for s in steps), default=0) + unread
    line = following(after, newest)
    _say_what_is_left(wish.step, ours, line, after or Line())
    return line


def _guessed(steps: list[Step], global_step: int) -> Line | None:
    """What a step grows from where the loop restored without its manager, or went back unasked.

    The last one of the newest step's past that has a smaller number.
    """
    newest = max((s.line for s in steps), key=lambda line: line.order, default=Line())
    past, _ = past_of(steps, newest)
    return next((s.line for s in reversed(past) if s.global_step < global_step), None)


def _say_what_is_left(name: StepName, steps: Iterable[Step], line: Line, after: Line) -> None:
    left = [
        str(s.name)
        for s in steps
        if s.name != name and s.line.order > after.order
        if not line.grew_from(s.line.order)
    ]
    if left:
        _log.info(
            "step %s does not go on from %s, which is left behind: restored only where nothing "
            "else is good, and removed once the run has come further",
            name,
            some(left),
        )


def _written(job: Job) -> Record:
    """Write the step beside the run; its record."""
    places, wish = job.places, job.wish
    staged = places.staging(wish.step)
    staging = Staging(staged, str(wish.step), overwrite=True, durable=job.durable, kind="own")
    try:
        if job.kind == "orbax":
            files, algorithm, units = _write_orbax(job, staging)
        else:
            files, algorithm, units = {}, "", ()
        parts = all_parts(job)
        units_there = [*units, *units_of(parts)]
        check_units(places, units_there)
        check_free(job, units_there)
        snapshot = job.snapshot
        more, algorithm = write_parts(
            parts,
            staging,
            snapshot.read,
            snapshot.lend,
            workers=job.workers,
            host_bytes=job.host_bytes,
        )
        record = record_of(job, parts, {**files, **more}, algorithm, units)
    except BaseException:
        staging.abandon()
        raise
    staging.publish()
    return record


def check_free(job: Job, units: Iterable[str]) -> tuple[str, ...]:
    """Return those of ``units`` that the step replaces (errors as ``claims.replaceable``)."""
    return replaceable(job.places, job.wish.step, units, job.claim)


def all_parts(job: Job) -> list[Part]:
    """The files of a step, and of the further copies; of Orbax's only the copies."""
    catalog = replace(job.snapshot.catalog, hyper=job.hyper)
    found = [] if job.kind == "orbax" else parts_of(job.kind, catalog, job.weights, job.wish)
    for folder, names in job.copies.items():
        found += copies_of(job.kind, catalog, names, job.wish, folder)
    for part in found:
        for note in part.result.outputs.layout.notes:
            log_once(str(job.places.root), note)
    return found


def units_of(parts: Iterable[Part]) -> tuple[str, ...]:
    """What of ``parts`` is put in place at once."""
    return tuple(dict.fromkeys(unit for part in parts for unit in part.units))


def record_of(
    job: Job,
    parts: Sequence[Part],
    files: Mapping[str, FileSums],
    algorithm: str,
    units: tuple[str, ...] = (),
) -> Record:
    """What is to be known of a step that is written; its strategy files are kept.

    Raises:
        StorageError: the disk refused.
    """
    wish = job.wish
    strategy = next((part.strategy for part in parts if part.strategy), {})
    kept = _keep_strategy(job.places, strategy, durable=job.durable) if strategy else None
    return Record(
        wish.step,
        wish.global_step,
        job.kind,
        algorithm,
        units + units_of(parts),
        files,
        kept,
        job.extras,
        {name: n for name, n in wish.numbers.items() if n is not None},
        time.time(),
    )


def _write_orbax(job: Job, staging: Staging) -> tuple[dict[str, FileSums], str, tuple[str, ...]]:
    from ..formats import orbax  # noqa: PLC0415 - slow to import, and not for everybody

    root = staging.files
    unit = f"{naming.CHECKPOINT}/{naming.step_folder(job.wish.prefix, job.wish.step)}"
    place = root / unit
    check_units(job.places, [unit])
    check_free(job, [unit])
    check_room(root, job.snapshot.num_bytes)  # Orbax packs, but not by much
    place.parent.mkdir(parents=True, exist_ok=True)
    orbax.write(place, job.snapshot.whole())
    paths = sorted(p.relative_to(root).as_posix() for p in place.rglob("*") if p.is_file())
    for path in paths:
        staging.sync(root / path)
    files, algorithm = sums_of(root, paths)
    return files, algorithm, (unit,)


def _keep_strategy(places: Places, strategy: Mapping[str, bytes], *, durable: bool) -> str:
    """Have the strategy files in a folder named after their content; that folder."""
    kept = strategy_folder(strategy)
    place = places.root / kept
    try:
        for name, data in strategy.items():
            if not _holds(place / name, data):
                replace_file(place / name, data, durable=durable)
    except OSError as error:
        at = error.filename or place
        raise StorageError(f"{at} cannot be written: {error.strerror}.") from error
    return kept


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def _let_go(job: Job, saved: Record) -> None:
    """Remove the steps that may go; that one cannot be removed does not undo the save."""
    whole = [s for s in find_steps(job.places) if s.record and s.state == "complete"]
    past, left = past_of(of_prefix(whole, job.wish.prefix), saved.line)
    left = [step for step in left if step.name.task == saved.step.task]  # others' are theirs
    complete = {s.name: s.record for s in whole if s.record}
    gone = expired(
        {s.name: s.global_step for s in past},
        {s.name: s.global_step for s in left},
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


def _clear(places: Places, step: StepName) -> None:
    """Give back the room of a step that failed."""
    if places.record(step, MOVING).is_file():
        return  # it is on the disk, and will be put in place
    for path in _remains(places, step):
        shutil.rmtree(path, ignore_errors=True)


def _remains(places: Places, step: StepName) -> Iterable[Path]:
    staging = places.staging(step)
    return (staging, staging.with_name(f".{staging.name}.partial"))
