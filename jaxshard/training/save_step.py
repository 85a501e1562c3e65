"""Saving a step from a snapshot.

Everything of a step is written beside the run, summed, recorded and then put in place at
once (``committing``); only then do older steps go. Whatever fails before leaves the run as
it was.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import rules as family_rules
from ..core.catalog import Catalog, Tensor
from ..core.layout import Layout
from ..core.notes import log_once
from ..core.numpy_dtypes import stored_as
from ..core.strategy import Strategy
from ..devices.host_shards import Snapshot, SnapshotMode
from ..devices.mesh import layout_of
from ..errors import FormatError, LayoutError, StorageError, format_list
from ..formats.registry import format_of
from ..storage.checksums import FileSums
from ..storage.transaction import Staging
from . import records
from .claims import Claim, replaceable
from .commit_step import commit, drop_unused_strategies, point_at, recover, remove
from .policy import Line, expired, following
from .records import MOVING, REMOVED, WHOLE, Record, Rollback, StepName, strategy_folder
from .restore_state import lay_out
from .run_directory import Places, check_units, only_writer, replace_file
from .state import Array, Leaf, Roles, as_array, is_number, take_apart
from .step_files import Part, Wish, check_room, copies_of, parts_of, sums_of, write_parts
from .steps import Step, find_steps, of_prefix, past_of

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
    scalars: frozenset[str]
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
            _drop_rollback(places, job.wish.prefix)
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
    past = (s for s in reversed(steps) if s.record and not s.left)
    return next((s.line for s in past if s.global_step < global_step), None)


def record_rollback(
    places: Places, prefix: str, to: StepName, line: Line, *, durable: bool
) -> None:
    """Record that the run goes on from ``to``, until its next save records that itself.

    Otherwise a run that crashes before that save would resume from a newer step, which it left.

    Args:
        places: the run's directory.
        prefix: of the job.
        to: the step that was restored.
        line: the line of that step.
        durable: fsync.

    Raises:
        StorageError: the disk refused, or another writer is at work.
    """
    with only_writer(places, durable=durable):
        steps = [s for s in find_steps(places) if s.record]
        newer = [s for s in of_prefix(steps, prefix) if s.line.order > line.order]
        order = max((s.line.order for s in steps), default=0)
        rollback = Rollback(prefix, to, following(line, order))
        path = places.own / rollback.file_name
        try:
            if newer:
                replace_file(path, rollback.to_bytes(), durable=durable)
            else:
                path.unlink(missing_ok=True)  # the run returned to what a rollback had left
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}.") from error


def _drop_rollback(places: Places, prefix: str) -> None:
    """Remove the record of a rollback, which a save by the run has replaced."""
    with suppress(OSError):  # the order of the save is no smaller, so a rollback that stays is void
        (places.own / Rollback(prefix, StepName(0, 0), Line()).file_name).unlink()


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
            format_list(left),
        )


def _written(job: Job) -> Record:
    """Write the step beside the run; its record."""
    places, wish = job.places, job.wish
    staged = places.staging(wish.step)
    staging = Staging(staged, str(wish.step), overwrite=True, durable=job.durable, kind="own")
    try:
        if format_of(job.kind).own_library:
            files, algorithm, units = _write_by_library(job, staging)
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
            snapshot,
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
    catalog = replace(job.snapshot.catalog, scalars=job.scalars)
    format = format_of(job.kind)
    found = [] if format.own_library else parts_of(format, catalog, job.weights, job.wish)
    for folder, names in job.copies.items():
        found += copies_of(format, catalog, names, job.wish, folder)
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


def _write_by_library(
    job: Job, staging: Staging
) -> tuple[dict[str, FileSums], str, tuple[str, ...]]:
    root = staging.files
    unit = f"{records.CHECKPOINT}/{records.step_folder(job.wish.prefix, job.wish.step)}"
    place = root / unit
    check_units(job.places, [unit])
    check_free(job, [unit])
    check_room(root, job.snapshot.num_bytes)  # Orbax packs, but not by much
    place.parent.mkdir(parents=True, exist_ok=True)
    format_of(job.kind).write_tree(place, job.snapshot.whole())
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


# --- Composing: what a step is made of, from a state and what the manager was told


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How all steps of a run are made; see ``CheckpointManager`` for what each of it means.

    Attributes:
        trained: which weights are trained; all are, if there is none.
        config: the contents of ``config.json``.
    """

    prefix: str
    format: str
    steps_per_epoch: int | None
    global_batch_size: int | None
    strategy: str | Strategy | Layout | None
    rules: family_rules.Rules | None
    remove_redundancy: bool
    save_optimizer: bool
    save_network_only: bool
    save_trainable_only: bool
    trained: tuple[re.Pattern[str], ...]
    snapshot: SnapshotMode
    roles: Roles
    rename: Callable[[str], str] | None
    config: bytes | None
    keeping: Keeping
    durable: bool
    workers: int | None
    host_bytes: int | None

    def step_name(self, step: int) -> StepName:
        """The name of step number ``step`` of the whole run."""
        # Checkpoint-2.0 folders are named by the step of the whole run
        epochs = None if format_of(self.format).own_step_folder else self.steps_per_epoch
        return records.step_name(step, epochs)

    def job(
        self,
        places: Places,
        step: int,
        state: Any,
        extras: Mapping[str, Any],
        loss_scale: float | None,
        after: Line | None,
    ) -> Job:
        """What it takes to save ``state`` as ``step`` in ``places``, all of it held still.

        Raises:
            LayoutError: the state cannot be saved in this way.
        """
        leaves = self._leaves(state)
        arrays = {leaf.name: as_array(leaf.value) for leaf in leaves}
        weights = frozenset(leaf.name for leaf in leaves if leaf.role == "weights")
        format = format_of(self.format)
        format.check_shapes({name: array.shape for name, array in arrays.items()})
        numbers = self._numbers(step, loss_scale)
        like = self._likes(leaves, arrays)
        told = weights | like.keys()
        scalars = {n for n, a in arrays.items() if n not in told and is_number(a)}
        if not format.scalars_in_json:
            added = {n: a for n, a in _number_tensors(numbers).items() if n not in arrays}
            arrays |= added
            scalars |= added.keys()
        layout = self._layout(arrays, frozenset(scalars), like)
        name = self.step_name(step)
        wish = Wish(self.prefix, name, step, layout, self.remove_redundancy, numbers, self.config)
        return Job(
            places,
            self.format,
            wish,
            Snapshot(arrays, mode=self.snapshot),
            weights,
            frozenset(scalars),
            self._copies(weights),
            extras,
            self.keeping,
            self.durable,
            self.workers,
            self.host_bytes,
            after,
        )

    def _leaves(self, state: Any) -> list[Leaf]:
        found = take_apart(state, self.roles, self.rename).leaves
        return [leaf for leaf in found if self.save_optimizer or leaf.role != "optimizer"]

    def _numbers(self, step: int, loss_scale: float | None) -> dict[str, Any]:
        return {
            "epoch_num": records.step_name(step, self.steps_per_epoch).epoch,
            "step_num": step,
            "global_step": step,
            "loss_scale": loss_scale,
            "global_batch_size": self.global_batch_size,
        }

    def _likes(self, leaves: Iterable[Leaf], arrays: Mapping[str, Array]) -> dict[str, str]:
        """What is kept for a weight and shaped as it, with the weight: both lie alike."""
        known = self.strategy.placements if isinstance(self.strategy, Layout) else arrays
        return {
            leaf.name: leaf.like
            for leaf in leaves
            if leaf.like and leaf.name in known
            if arrays[leaf.name].shape == arrays[leaf.like].shape
        }

    def _layout(
        self, arrays: Mapping[str, Array], scalars: frozenset[str], like: Mapping[str, str]
    ) -> Layout:
        if self.strategy is None:
            return layout_of(arrays)
        if isinstance(self.strategy, Layout):
            return self.strategy
        strategy = Strategy.of(self.strategy)
        return lay_out(_described(arrays, scalars), like, strategy, self.rules)

    def _copies(self, weights: frozenset[str]) -> dict[str, tuple[str, ...]]:
        ordered = sorted(weights)
        if self.save_trainable_only:
            names = [n for n in ordered if not self.trained or self._is_trained(n)]
            return {records.TRAINABLE: tuple(names)}
        return {records.NETWORK: tuple(ordered)} if self.save_network_only else {}

    def _is_trained(self, name: str) -> bool:
        return any(pattern.search(name) for pattern in self.trained)


def _described(arrays: Mapping[str, Array], scalars: frozenset[str]) -> Catalog:
    """Arrays as a catalog of names and shapes, which is what rules ask for."""
    tensors = {n: Tensor(n, stored_as(a.dtype), a.shape, ()) for n, a in arrays.items()}
    return Catalog("memory", "arrays", (), tensors, scalars=scalars)


def _number_tensors(numbers: Mapping[str, Any]) -> dict[str, Array]:
    """The job's numbers as MindFormers stores them."""
    kinds = {
        "epoch_num": (np.int64, ()),
        "step_num": (np.int64, ()),
        "global_step": (np.int32, (1,)),
        "loss_scale": (np.float32, ()),
        "global_batch_size": (np.int64, ()),
    }
    return {
        name: np.full(shape, numbers[name], dtype)
        for name, (dtype, shape) in kinds.items()
        if numbers.get(name) is not None
    }
