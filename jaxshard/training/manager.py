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
from itertools import count
from types import TracebackType
from typing import Any, Literal, Self, get_args

import jax

from .. import rules as family_rules
from ..conversion.open import Config
from ..core.layout import Layout, Strategy
from ..devices.host_shards import SnapshotMode
from ..distributed.processes import DEFAULT_TIMEOUT_S, Processes, processes_of_jax
from ..errors import JaxshardError, LayoutError, StorageError
from ..formats.huggingface import check_config
from ..formats.registry import format_of, names_where
from ..mapping import Mapping as NamesAndShapes
from ..storage.remote import refuse_remote
from ..storage.resources import budget_for, parse_size
from . import records
from .commit_step import Claim, is_on_disk, task_for
from .open_step import examine_all, newest_good
from .policy import Cadence, Lineage, RetentionPolicy, Schedule
from .records import StepName
from .restore import RestoreResult, newest_step, restore, true_number
from .restore_state import Parts, RestoreOptions
from .run_directory import RunDirectory
from .save_step import record_rollback, save_step
from .state import Roles, one_of, optional, real, whole
from .step_files import SaveOptions, SaveRequest, compose_request
from .steps import RunStep, find_steps

_log = logging.getLogger("jaxshard.training")


class CheckpointManager:
    """Saves steps of a training run, applies retention, and restores them.

    A step exists once it is completely on disk; until then, the steps before it do. Files have
    MindFormers' names (see ``records``), and all other files are in a hidden folder.
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
        """Manage the run in ``directory``; the first save creates it.

        If JAX has several processes, each creates a manager, and all call its methods with the
        same arguments; they share the disk.

        Args:
            directory: output folder of the run.
            prefix: first part of the names of files.
            format: how steps are stored. ``"ranks"``: a file for each rank. ``"iteration"``:
                a Checkpoint-2.0 folder. ``"huggingface"``: complete files, which MindSpore
                calls integrated. ``"orbax"``.
            save_every_steps: ``maybe_save`` saves steps that this divides; 0 for none.
            save_every_seconds: it also saves when this time has passed; 0 for never.
            keep_max: how many of the newest steps to keep; 0 for all.
            keep_every: keep steps that this divides for good; 0 for none.
            steps_per_epoch: names count steps within their epoch; by default all are of epoch 1.
            global_batch_size: stored with every step, for resuming with another batch size.
            strategy: layout of rank files; by default that of the arrays.
            rules: layout rules that precede the family's, if there is a strategy.
            remove_redundancy: store each shard on one of its holders only.
            save_optimizer: save the optimizer's state too.
            save_network_only: also save the weights alone in ``checkpoint_network/``.
            save_trainable_only: also save the trainable weights alone in
                ``checkpoint_trainable/``; then not in ``checkpoint_network/``.
            trainable: regular expressions of the names of trainable weights; by default all are.
            async_save: ``save`` waits for the snapshot only. The next call raises what fails
                afterwards.
            snapshot: see ``devices.host_shards``; ``"copy"`` copies on the CPU backend too.
            fsync: sync every file to disk before the step exists.
            on_storage_error: if the disk is full or refuses, raise an error, or warn and let the
                training continue without that step.
            roles: keys of the weights and of the optimizer's state in a state.
            rename: maps names of weights in the state to names in files.
            config: description of the model, for ``config.json`` of complete files.
            workers: threads; by default one per core, at most 8.
            host_bytes: maximum host memory for data in flight.
            clock: seconds, for ``save_every_seconds``; process 0's counts.
            timeout_s: how long processes wait for each other.

        Raises:
            LayoutError: an option is invalid.
        """
        records.check_prefix(prefix)
        one_of("format", format, names_where("as_steps"))
        check_config(config)
        one_of("snapshot", snapshot, get_args(SnapshotMode))
        one_of("on_storage_error", on_storage_error, ("raise", "warn"))
        budget_for(host_bytes, workers)  # refused now, and not in the background
        self._options = SaveOptions(
            prefix=prefix,
            format=format_of(format),
            steps_per_epoch=optional(whole, "steps_per_epoch", steps_per_epoch),
            global_batch_size=optional(whole, "global_batch_size", global_batch_size),
            strategy=strategy,
            rules=rules,
            remove_redundancy=remove_redundancy,
            save_optimizer=save_optimizer,
            save_network_only=save_network_only,
            save_trainable_only=save_trainable_only,
            trainable=tuple(_pattern(text) for text in trainable),
            snapshot=snapshot,
            roles=roles,
            rename=rename,
            config=None if config is None else json.dumps(dict(config), indent=2).encode(),
            retention=RetentionPolicy(whole("keep_max", keep_max), whole("keep_every", keep_every)),
            durable=fsync,
            workers=workers,
            host_bytes=None if host_bytes is None else parse_size(host_bytes, "host_bytes"),
        )
        refuse_remote(directory)
        self._directory = RunDirectory.of(directory)
        cadence = Cadence(whole("save_every_steps", save_every_steps), save_every_seconds)
        self._schedule = Schedule(cadence, clock())
        self._async, self._warn, self._clock = async_save, on_storage_error == "warn", clock
        self._members = _Members(timeout_s)
        self._background = _Background()
        self._has_warned = False
        self._claim = Claim()
        self._lineage: Lineage | None = None  # of the step restored or saved last
        self._lineage_step = 0
        self._rollback: tuple[StepName, Lineage] | None = None  # not recorded on disk yet
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
        """Call ``save`` if the step is due; return whether it was.

        A step is due if the newest step of this run that is saved and good requires it: a failed
        save is due again, and so are steps that ``restore`` went back from.
        """
        self._background.raise_failure()
        step, now = whole("step", step), self._clock()
        self._warn_if_never_due()
        self._record_rollback()
        may_differ = self._schedule.is_timed or step == self._schedule.tried
        is_due = self._schedule.is_due(step, now)
        if may_differ:  # clocks differ, and background saves end at different times
            is_due = self._members.choice_of_process_0(is_due)
        if is_due:
            self.save(step, state, extras=extras, loss_scale=loss_scale, overwrite=overwrite)
        return is_due

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
            extras: values that JSON can hold: the position in the data, a configuration …
            loss_scale: stored for MindFormers.
            overwrite: replace files and folders of the step's name that are not this run's.

        Raises:
            StorageError: the disk is full or refuses (but see ``on_storage_error``), now or
                in the background since the last call. All earlier steps still exist.
            LayoutError: the format cannot store the state, or a folder of the step's name
                exists that is not this run's; now or in the background since the last call.
        """
        self._record_rollback()
        request = self._agree_on_request(step, state, dict(extras or {}), loss_scale, overwrite)
        self._schedule.began(request.global_step, self._clock())
        if not self._async:
            self._save(request)
            return
        try:
            self._background.start(f"saving step {request.step}", lambda: self._save(request))
        except BaseException:  # no thread could be started
            self._schedule.ended(saved=False)
            raise

    def wait(self) -> None:
        """Wait until a background save is on disk.

        Raises:
            JaxshardError: it failed.
        """
        self._background.wait()

    def close(self) -> None:
        """As ``wait``; the manager stays usable."""
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

    # --- restoring -----------------------------------------------------------------------

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
        names: NamesAndShapes | str | None = None,
        config: Config | None = None,
    ) -> RestoreResult | None:
        """Restore the newest good step, or the named one, in the layout of ``target``.

        If a folder has steps of several jobs, those of ``prefix`` count. The next save continues
        a state that was restored with all its parts: steps beyond it are left behind.

        Args:
            target: a state like the saved one, of arrays or ``jax.ShapeDtypeStruct``s, in any
                layout; or a strategy, for ``{name: array}``.
            step: its number, ``"1_10"``, or the name of a file or folder.
            parts: ``"weights"``, ``"optimizer"`` or ``"no_optimizer"`` leave the other
                leaves as they are in ``target``.
            verify: compare the checksums of all bytes first.
            missing_ok: return None, instead of an error, if the run has no steps.
            strategy: layout of the leaves; their shardings are ignored.
            devices: the device of each rank of the strategy.
            strict: refuse leaves missing in the step, and tensors missing in the target.
            names: a mapping of the saved names and shapes to those of ``target``, or what
                ``mapping.find_mapping`` takes; moments are mapped with their weights.
            config: the model's ``config.json``, or its path, which tables of ``names`` need.

        Raises:
            NotFoundError: no such step, no good step, or names do not match.
            FormatError, CoverageError, StorageError: the named step is not good.
            LayoutError: the target does not fit.
        """
        self._background.wait()
        options, run = self._options, self._directory
        processes = self._members.processes.about(str(run.root))
        if missing_ok and step is None:
            newest = processes.broadcast("restoring: looking", lambda: newest_step(run))
            if not newest:
                self._schedule.restored(None, self._clock())
                return None
        found = restore(
            run,
            target,
            step,
            options=RestoreOptions(
                strategy,
                options.rules,
                devices,
                options.roles,
                options.rename,
                strict,
                options.workers,
                options.host_bytes,
                names,
                config,
            ),
            parts=parts,
            verify=verify,
            prefix=options.prefix,
            processes=processes,
        )
        whole_state = parts == "all" and not isinstance(target, str | Strategy)
        self._schedule.restored(found.step if whole_state else None, self._clock())
        if whole_state:
            self._lineage, self._lineage_step = found.lineage, 0  # the run continues from here
            named = step is not None
            self._rollback = (found.name, found.lineage) if named and found.lineage else None
            self._claim = replace(self._claim, restored=True, task=found.name.task)
        return found

    def steps(self, *, deep: bool = False) -> list[RunStep]:
        """Return all steps with their states; ``deep`` reads all bytes.

        The last is restored first; steps that the run left behind precede all others.
        """
        found = find_steps(self._directory)
        return examine_all(self._directory, found, deep=deep, workers=self._options.workers)

    def latest_step(self) -> int | None:
        """Return the number of the newest good step, by its files; None if no step is good."""
        found = newest_good(self._directory, self._options.prefix)
        return (true_number(self._directory, found) or found.global_step) if found else None

    # --- parts of a save -----------------------------------------------------------------

    def _agree_on_request(
        self,
        step: int,
        state: Any,
        extras: Mapping[str, Any],
        loss_scale: float | None,
        overwrite: bool,
    ) -> SaveRequest:
        """Return the request, if every process could take its snapshot."""
        processes, request = self._members.processes, None
        try:
            with processes.together("saving a step: preparing") as meeting:
                request = self._compose(step, state, extras, loss_scale)
                # after the wait for the save before, which may have changed the claim
                claim = replace(self._claim, overwrite=overwrite)
                meeting.sent = str(0 if processes.index else _task_of(request, claim))
        except BaseException:
            if request is not None:  # another process failed: release the arrays
                request.snapshot.close()
            raise
        # files of other jobs are avoided by a number, on which process 0 decides
        task, after = int(meeting.received[0]), request.after
        if task != self._claim.task and not self._claim.restored:
            after = after or Lineage()  # this job is a run of its own
        self._claim = replace(self._claim, task=task)
        name, claim = replace(request.step, task=task), replace(claim, task=task)
        return replace(request, step=name, after=after, claim=claim)

    def _compose(
        self, step: int, state: Any, extras: Mapping[str, Any], loss_scale: float | None
    ) -> SaveRequest:
        step, loss_scale = whole("step", step), optional(real, "loss_scale", loss_scale)
        self._background.wait()  # never two writers, and never two snapshots
        format = self._options.format
        if format.own_library and self._members.processes.are_several:
            raise LayoutError(
                f"format={format.name!r} is written by one process only. Save as ranks, iteration "
                "or huggingface, or call its own library in every process."
            )
        if not self._directory.main:
            raise LayoutError(
                f"{self._directory.root} is a folder of steps without jaxshard's records. Give the "
                "directory above it, or another, to save in."
            )
        records.check_extras(extras)
        # a loop that went back without restore has another ancestor
        after = self._lineage if step > self._lineage_step else None
        return compose_request(
            self._directory,
            self._options,
            step,
            state,
            extras=extras,
            loss_scale=loss_scale,
            after=after,
        )

    def _save(self, request: SaveRequest) -> None:
        saved = False
        try:
            self._lineage = save_step(request, self._members.processes)
            self._lineage_step = request.global_step
            self._claim = replace(self._claim, saved=self._claim.saved | {request.step})
            saved = True
        except StorageError as error:
            if not self._warn:
                raise
            self.last_failure = error
            _log.warning("step %s is not saved: %s", request.step, error)
        finally:
            if not saved and is_on_disk(request.directory, request.step):
                self._lineage = None  # a later commit completes it: then the run continues it
            self._schedule.ended(saved=saved)

    def _record_rollback(self) -> None:
        """Record the step that was restored by name, now that the loop continues from it.

        ``restore`` itself writes nothing, because evaluation jobs restore steps by name too.
        """
        rollback, self._rollback = self._rollback, None
        if rollback is None or self._members.processes.index or not self._directory.main:
            return
        name, lineage = rollback
        prefix, durable = self._options.prefix, self._options.durable
        try:
            record_rollback(self._directory, prefix, name, lineage, durable=durable)
        except StorageError as error:
            _log.warning("the return to step %s is not recorded: %s", name, error)

    def _warn_if_never_due(self) -> None:
        """Warn once if ``maybe_save`` never saves, before work is lost."""
        if self._schedule.never_saves and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "maybe_save saves nothing: the manager of %s was given neither save_every_steps "
                "nor save_every_seconds",
                self._directory.root,
            )


def _task_of(request: SaveRequest, claim: Claim) -> int:
    """Return the number that keeps this job's files apart from those of other jobs."""
    options = request.options
    if options.format.own_step_folder:
        return 0  # its folder names contain no such number
    folders = (records.CHECKPOINT, *request.copies)
    ranks = request.layout.num_ranks if options.format.is_by_rank else 0
    return task_for(request.directory, options.prefix, request.step, folders, ranks, claim)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise LayoutError(f"trainable: {text!r} is not a regular expression: {error}.") from None


class _Background:
    """One background task at a time; the next call raises its failure."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: tuple[str, BaseException] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a task is running."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, name: str, task: Callable[[], None]) -> None:
        """Wait for the previous task, then run ``task`` in a thread.

        Raises:
            JaxshardError: the previous task failed; ``task`` is not started.
        """
        self.wait()

        def run() -> None:
            try:
                task()
            except BaseException as error:
                self._failure = (name, error)
                # logged too, because there may be no next call
                _log.error("%s failed in the background: %s", name, error)

        # not a daemon: a program that exits completes its last save first
        self._thread = threading.Thread(target=run, name=f"jaxshard {name}")
        self._thread.start()

    def wait(self) -> None:
        """Wait until no task is running.

        Raises:
            JaxshardError: the task failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise the failure of a finished task, once; does not wait.

        Raises:
            JaxshardError: the task failed.
        """
        if self._failure is None or self.is_busy:
            return
        (name, error), self._failure = self._failure, None
        kind = type(error) if isinstance(error, JaxshardError) else StorageError
        raise kind(f"{name} failed in the background: {error}") from error


_NUMBERS = count()


class _Members:
    """The processes of the job, each with a manager of the same run; found when first needed.

    Every process creates its managers in the same order. So the meetings of one manager are
    separate from those of another, and from those of ``save`` and ``load``: a manager may save
    in the background meanwhile.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._number = timeout_s, next(_NUMBERS)
        self._found: Processes | None = None

    @property
    def processes(self) -> Processes:
        """All processes; without ``jax.distributed`` no device is initialised."""
        if self._found is None:
            several = jax.distributed.is_initialized()
            found = processes_of_jax(self._timeout_s) if several else Processes()
            self._found = found.apart(f"manager {self._number}")
        return self._found

    def choice_of_process_0(self, choice: bool) -> bool:
        """Return the choice of process 0."""
        return bool(self.processes.broadcast("choosing", lambda: "yes" if choice else ""))
