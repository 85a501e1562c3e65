"""``CheckpointManager``, the interface for training loops.

    manager = CheckpointManager("output", prefix="llama", save_every_steps=100, async_save=True)
    found = manager.restore(state, missing_ok=True)
    for step in range(found.step + 1 if found else 1, last + 1):
        state = train_step(state, batch)
        manager.maybe_save(step, state, extras={"data": reader.position()})
    manager.close()

It composes the rest of this package and decides nothing itself.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self, get_args

import jax

from .. import rules as family_rules
from ..core.layout import Layout
from ..core.strategy import Strategy
from ..devices.host_shards import SnapshotMode
from ..distributed.barriers import DEFAULT_TIMEOUT_S
from ..errors import (
    JaxshardError,
    LayoutError,
    StorageError,
)
from ..formats.huggingface import check_config
from ..formats.registry import format_of, names_where
from ..storage.resources import budget_for, parse_size
from . import records
from .claims import Claim, task_for
from .commit_step import is_on_disk
from .open_step import examine_all, newest_good
from .policy import Cadence, Line, Schedule
from .records import StepName
from .restore import Restored, restore, tidied, true_number
from .restore_state import Parts, Where
from .run_directory import Places
from .save_step import Job, Keeping, Recipe, record_rollback, save_step
from .state import Roles, one_of, optional, real, whole
from .steps import Step, find_steps
from .together import Company, save_together

_log = logging.getLogger("jaxshard.training")


class CheckpointManager:
    """Saves a run's steps, keeps the right ones, and brings a run back.

    A step is there once all of it is on the disk; until then, the steps before it are. The
    directory is MindFormers' own (see ``naming``), and what is beyond it is hidden.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        prefix: str = "CKP",
        format: str = "ranks",
        save_every_steps: int = 0,
        save_every_seconds: float = 0.0,
        keep_max: int = 5,
        keep_every: int = 0,
        steps_per_epoch: int | None = None,
        global_batch_size: int | None = None,
        strategy: str | Strategy | Layout | None = None,
        rules: family_rules.Rules | None = None,
        remove_redundancy: bool = False,
        save_optimizer: bool = True,
        save_network_only: bool = False,
        save_trainable_only: bool = False,
        trainable: Iterable[str] = (),
        async_save: bool = False,
        snapshot: SnapshotMode = "auto",
        fsync: bool = True,
        on_storage_error: Literal["raise", "warn"] = "raise",
        roles: Roles = Roles(),  # noqa: B008 - frozen
        rename: Callable[[str], str] | None = None,
        config: Mapping[str, Any] | None = None,
        workers: int | None = None,
        host_bytes: int | str | None = None,
        clock: Callable[[], float] = time.monotonic,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """A manager of the run in ``directory``; nothing is touched before the first save.

        Where there are several processes of JAX, each makes a manager, and all call its
        methods alike; they share the disk.

        Args:
            directory: the run's output folder; made when needed.
            prefix: the first part of files' names.
            format: how steps are stored. ``"ranks"``: a file for each rank. ``"iteration"``:
                a Checkpoint-2.0 folder. ``"huggingface"``: complete files, which is what
                MindSpore calls integrated. ``"orbax"``.
            save_every_steps: ``maybe_save`` saves steps that this divides; 0 for none.
            save_every_seconds: and whenever this time has passed; 0 for never.
            keep_max: how many of the newest steps stay; 0 for all.
            keep_every: steps that this divides stay for good.
            steps_per_epoch: how steps are counted in names; without it all are of epoch 1.
            global_batch_size: kept with every step, for resuming with another.
            strategy: how rank files are cut; by default as the arrays lie.
            rules: layout rules that go before the family's, where there is a strategy.
            remove_redundancy: store each shard on one of its holders only.
            save_optimizer: the optimizer's state too.
            save_network_only: the weights once more, alone, in ``checkpoint_network/``.
            save_trainable_only: those of them that are trained, in ``checkpoint_trainable/``;
                then not in ``checkpoint_network/``.
            trainable: regular expressions for the names of weights that are trained; all
                are, if none is given.
            async_save: ``save`` waits for the snapshot only. What fails afterwards is raised
                by the next call.
            snapshot: see ``devices.host_shards``; ``"copy"`` copies on the CPU backend too.
            fsync: have a step on disk before it counts.
            on_storage_error: when the disk is full or refuses, raise, or warn and let the
                training go on without that step.
            roles: where in a state the weights and the optimizer's state are.
            rename: the names of weights in files, from their names in the state.
            config: what the model is, for ``config.json`` of complete files.
            workers: threads; by default one a core, at most 8.
            host_bytes: the most memory for data in flight.
            clock: seconds; for ``save_every_seconds``, by which process 0 goes.
            timeout_s: how long several processes wait for each other.

        Raises:
            LayoutError: an option is impossible.
        """
        records.check_prefix(prefix)
        one_of("format", format, names_where("as_steps"))
        check_config(config)
        one_of("snapshot", snapshot, get_args(SnapshotMode))
        one_of("on_storage_error", on_storage_error, ("raise", "warn"))
        budget_for(host_bytes, workers)  # refused now, and not in the background
        keep_max, keep_every = whole("keep_max", keep_max), whole("keep_every", keep_every)
        save_every_steps = whole("save_every_steps", save_every_steps)
        if keep_max < 0 or keep_every < 0:
            raise LayoutError(f"keep_max={keep_max}, keep_every={keep_every}: 0 or more.")
        self._recipe = Recipe(
            prefix=prefix,
            format=format,
            steps_per_epoch=optional(whole, "steps_per_epoch", steps_per_epoch),
            global_batch_size=optional(whole, "global_batch_size", global_batch_size),
            strategy=strategy,
            rules=rules,
            remove_redundancy=remove_redundancy,
            save_optimizer=save_optimizer,
            save_network_only=save_network_only,
            save_trainable_only=save_trainable_only,
            trained=tuple(_pattern(text) for text in trainable),
            snapshot=snapshot,
            roles=roles,
            rename=rename,
            config=None if config is None else json.dumps(dict(config), indent=2).encode(),
            keeping=Keeping(keep_max, keep_every),
            durable=fsync,
            workers=workers,
            host_bytes=None if host_bytes is None else parse_size(host_bytes, "host_bytes"),
        )
        self._places = Places.of(directory)
        self._schedule = Schedule(Cadence(save_every_steps, save_every_seconds), clock())
        self._async, self._warn, self._clock = async_save, on_storage_error == "warn", clock
        self._company = Company(timeout_s)
        self._background = Background()
        self._said_never = False
        self._claim = Claim()
        self._line: Line | None = None  # of what was restored or saved last
        self._line_step = 0
        self._rollback: tuple[StepName, Line] | None = None  # that nothing on the disk shows yet
        self.last_failure: StorageError | None = None

    # --- saving --------------------------------------------------------------------------

    def maybe_save(
        self,
        step: int,
        state: Any,
        *,
        extras: Mapping[str, Any] | None = None,
        loss_scale: float | None = None,
        overwrite: bool = False,
    ) -> bool:
        """``save`` if it is time to; whether it was. Arguments and errors as ``save``.

        What counts is the newest step of this run that is saved and good: a save that failed,
        and steps that ``restore`` went back from, are due again.
        """
        self._background.raise_failure()
        step, now = whole("step", step), self._clock()
        self._say_if_never()
        self._record_rollback()
        may_differ = self._schedule.is_timed or step == self._schedule.tried
        is_due = self._schedule.is_due(step, now)
        if may_differ:  # no two clocks agree, and no two background saves end together
            is_due = self._company.of_process_0(is_due)
        if not is_due:
            return False
        self.save(step, state, extras=extras, loss_scale=loss_scale, overwrite=overwrite)
        return True

    def save(
        self,
        step: int,
        state: Any,
        *,
        extras: Mapping[str, Any] | None = None,
        loss_scale: float | None = None,
        overwrite: bool = False,
    ) -> None:
        """Save ``state`` as step number ``step`` of the whole run.

        A step of this run is replaced. A step that another job of the same prefix saved is kept:
        a number in this job's names keeps the two apart, as MindSpore does. Names of Checkpoint-2.0
        folders have no such number, so there it is an error.

        Args:
            step: counts from 1.
            state: any pytree of arrays, PRNG keys and numbers.
            extras: what JSON can hold: the position in the data, a configuration …
            loss_scale: kept where MindFormers looks for it.
            overwrite: replace files and folders of the step's name that are not this run's.

        Raises:
            StorageError: the disk is full or refuses (but see ``on_storage_error``), now or
                in the background since the last call. The steps before are all there.
            LayoutError: the state cannot be saved in this way, or a folder of the step's name
                exists that is not this run's; now or in the background since the last call.
        """
        self._record_rollback()
        job = self._agreed(step, state, dict(extras or {}), loss_scale, overwrite)
        self._schedule.began(job.wish.global_step, self._clock())
        if not self._async:
            self._run(job)
            return
        try:
            self._background.start(f"saving step {job.wish.step}", lambda: self._run(job))
        except BaseException:  # no thread could be started
            self._schedule.ended(saved=False)
            raise

    def _agreed(
        self,
        step: int,
        state: Any,
        extras: Mapping[str, Any],
        loss_scale: float | None,
        overwrite: bool,
    ) -> Job:
        """What is to be saved, held still, where all processes could do so."""
        jobs: list[Job] = []
        processes = self._company.processes
        try:
            with processes.together("saving a step: preparing") as meeting:
                jobs.append(self._prepared(step, state, extras, loss_scale))
                claim = replace(self._claim, overwrite=overwrite)
                meeting.says = str(0 if processes.index else _task(jobs[0], claim))
        except BaseException:
            for job in jobs:  # another process cannot: the arrays are the loop's again
                job.snapshot.close()
            raise
        return self._named_apart(jobs[0], int(meeting.heard[0]), overwrite)

    def _named_apart(self, job: Job, task: int, overwrite: bool) -> Job:
        """``job`` with the number that keeps its files apart from those of other jobs."""
        after = job.after
        if task != self._claim.task and not self._claim.restored:
            after = after or Line()  # it is a run of its own
        self._claim = replace(self._claim, task=task)
        wish = replace(job.wish, step=replace(job.wish.step, task=task))
        claim = replace(self._claim, overwrite=overwrite)
        return replace(job, wish=wish, after=after, claim=claim)

    def _prepared(
        self, step: int, state: Any, extras: Mapping[str, Any], loss_scale: float | None
    ) -> Job:
        """What is to be saved, held still."""
        step, loss_scale = whole("step", step), optional(real, "loss_scale", loss_scale)
        self._background.wait()  # never two writers, and never two snapshots
        format = format_of(self._recipe.format)
        if format.own_library and self._company.processes.are_several:
            raise LayoutError(
                f"format={format.name!r} is written by one process only. Save as ranks, iteration "
                "or huggingface, or call its own library in every process."
            )
        if not self._places.main:
            raise LayoutError(
                f"{self._places.root} is a folder of somebody else's steps. Give the directory "
                "above it, or another, to save in."
            )
        records.check_extras(extras)
        after = self._line if step > self._line_step else None  # else the loop went back unasked
        return self._recipe.job(self._places, step, state, extras, loss_scale, after)

    def wait(self) -> None:
        """Wait until what was begun in the background is on the disk.

        Raises:
            JaxshardError: it failed.
        """
        self._background.wait()

    def close(self) -> None:
        """As ``wait``; the manager may be used again all the same."""
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- coming back ---------------------------------------------------------------------

    def restore(
        self,
        target: Any,
        step: int | str | StepName | None = None,
        *,
        parts: Parts = "all",
        verify: bool = False,
        missing_ok: bool = False,
        strategy: str | Strategy | None = None,
        devices: Sequence[jax.Device] | None = None,
        strict: bool = True,
    ) -> Restored | None:
        """The newest good step, or the one named, in the layout of ``target``.

        Of several jobs' steps in one folder, those of ``prefix`` count. What is saved next grows
        from a state that was restored with all its parts: steps beyond it are left behind.

        Args:
            target: a state like the one saved, of arrays or ``jax.ShapeDtypeStruct``s, in
                whatever layout is wanted now; or a strategy, for ``{name: array}``.
            step: its number, ``"1_10"``, or the name of a file or folder.
            parts: ``"weights"``, ``"optimizer"`` or ``"no_optimizer"`` leave the other
                leaves as they are in ``target``.
            verify: compare the checksums of every byte first.
            missing_ok: None, instead of an error, if the run has no steps yet.
            strategy: lays out the leaves, whatever their shardings.
            devices: the device of each rank of the strategy.
            strict: refuse leaves that the step has not, and tensors that the target has not.

        Raises:
            NotFoundError: no such step, or no good one, or names do not fit.
            FormatError, CoverageError, StorageError: the step that was named is not good.
            LayoutError: the target does not fit.
        """
        self._background.wait()
        processes = self._company.processes.about(str(self._places.root))
        if missing_ok and step is None:
            newest = processes.agree("restoring: looking", lambda: tidied(self._places))
            if not newest:
                self._schedule.restored(None, self._clock())
                return None
        recipe = self._recipe
        where = Where(
            strategy,
            recipe.rules,
            devices,
            recipe.roles,
            recipe.rename,
            strict,
            recipe.workers,
            recipe.host_bytes,
        )
        found = restore(
            self._places,
            target,
            step,
            where=where,
            parts=parts,
            verify=verify,
            prefix=recipe.prefix,
            processes=processes,
        )
        whole_state = parts == "all" and not isinstance(target, str | Strategy)
        self._schedule.restored(found.step if whole_state else None, self._clock())
        if whole_state:
            self._line, self._line_step = found.line, 0  # the run goes on from here
            named = step is not None
            self._rollback = (found.name, found.line) if named and found.line else None
            self._claim = replace(self._claim, restored=True, task=found.name.task)
        return found

    def steps(self, *, deep: bool = False) -> list[Step]:
        """All steps there are, with their states; ``deep`` reads every byte.

        The last is restored first; what a run left behind by going back comes before the rest.
        """
        found = find_steps(self._places)
        return examine_all(self._places, found, deep=deep, workers=self._recipe.workers)

    def latest_step(self) -> int | None:
        """The number of the newest good step, by what is there; None if there is none."""
        found = newest_good(self._places, self._recipe.prefix)
        return (true_number(self._places, found) or found.global_step) if found else None

    # --- how a save is put together ------------------------------------------------------

    def _run(self, job: Job) -> None:
        saved = False
        try:
            processes = self._company.processes
            alone = not processes.are_several
            line = save_step(job).line if alone else save_together(job, processes)
            self._line, self._line_step = line, job.wish.global_step
            own = self._claim.saved | {job.wish.step}
            self._claim, saved = replace(self._claim, saved=own), True
        except StorageError as error:
            if not self._warn:
                raise
            self.last_failure = error
            _log.warning("step %s is not saved: %s", job.wish.step, error)
        finally:
            if not saved and is_on_disk(job.places, job.wish.step):
                self._line = None  # it is put in place later, and then the run grew from it
            self._schedule.ended(saved=saved)

    def _record_rollback(self) -> None:
        """Record a step that was restored by name, now that the loop goes on from it.

        ``restore`` itself writes nothing: jobs that only evaluate a step restore it by name too.
        """
        rollback, self._rollback = self._rollback, None
        if rollback is None or self._company.processes.index or not self._places.main:
            return
        name, line = rollback
        recipe = self._recipe
        try:
            record_rollback(self._places, recipe.prefix, name, line, durable=recipe.durable)
        except StorageError as error:
            _log.warning("that the run went back to step %s is not recorded: %s", name, error)

    def _say_if_never(self) -> None:
        """A loop that asks and never saves should hear of it before its work is lost."""
        if self._schedule.never_saves and not self._said_never:
            self._said_never = True
            _log.warning(
                "maybe_save saves nothing: the manager of %s was given neither save_every_steps "
                "nor save_every_seconds",
                self._places.root,
            )


def _task(job: Job, claim: Claim) -> int:
    """The number that keeps the files of ``job`` apart from those of other jobs."""
    if format_of(job.kind).own_step_folder:
        return 0  # the names of its folders have no place for one
    folders = (records.CHECKPOINT, *job.copies)
    ranks = job.wish.layout.num_ranks if format_of(job.kind).is_by_rank else 0
    return task_for(job.places, job.wish.prefix, job.wish.step, folders, ranks, claim)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise LayoutError(f"trainable: {text!r} is not a regular expression: {error}.") from None


# --- Background task: one at a time, its failure raised by the next call


class Background:
    """At most one thread, that does what it was given last."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: tuple[str, BaseException] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether the thread is still at it."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, what: str, work: Callable[[], None]) -> None:
        """Wait for what went before, and then do ``work`` in a thread.

        Raises:
            JaxshardError: what went before had failed; ``work`` is not begun.
        """
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failure = (what, error)
                # said at once as well: the next call may never come
                _log.error("%s failed in the background: %s", what, error)

        # not a daemon: a program that ends has its last save finished first
        self._thread = threading.Thread(target=run, name=f"jaxshard {what}")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is going on.

        Raises:
            JaxshardError: it had failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what failed since last asked; waits for nothing.

        Raises:
            JaxshardError: it had failed.
        """
        if self._failure is None or self.is_busy:
            return
        (what, error), self._failure = self._failure, None
        kind = type(error) if isinstance(error, JaxshardError) else StorageError
        raise kind(f"{what} failed in the background: {error}") from error
