"""Restoring the newest good step onto any layout.

    steps, newest first     50 partial   40 corrupt   30 complete   20 …
                            passed over, with a note  ↑ restored

A step is good if it is complete, its headers match the sizes of its files, and, with ``verify``,
all checksums match. An invalid *request* (a name that no step has) is an error. A bad *step* leads
to the next one in a new listing, because retention may have removed the step while it was read,
after another was saved.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from ..conversion.open import read_scalars
from ..core.catalog import Catalog, log_done, log_notes
from ..distributed.processes import Processes
from ..errors import (
    CoverageError,
    FormatError,
    JaxshardError,
    LayoutError,
    NotFoundError,
    StorageError,
    format_list,
)
from ..formats.huggingface import NO_CONFIG, TRAINING_SCALARS
from ..formats.registry import format_of
from ..storage.checksums import Checksums, check_files
from ..storage.identity import check_same, identity
from .commit_step import is_interrupted, is_on_disk, recover
from .open_step import open_step
from .policy import Lineage, Progress
from .records import MOVING, StepName, parse_step, parse_step_argument
from .restore_state import Parts, RestoreOptions, RestorePlan, plan_restore
from .run_directory import RunDirectory, names_in, read_record, writer_lock
from .state import one_of
from .steps import RunStep, find_steps, of_one_job

_SAME = "{}"  # nothing more to compare
_MAX_TRIES = 1000  # a step may be removed while it is read
_PUTTING_S, _POLL_S = 5.0, 0.02  # a writer commits a step by a few renames
_log = logging.getLogger("jaxshard.training")


@dataclass(frozen=True)
class RestoreResult:
    """A restored step.

    Attributes:
        state: the target with the saved leaves.
        step: number of the step in the whole run.
        name: its epoch and step.
        extras: values saved with it; empty for a step without a record, such as MindFormers'.
        numbers: the saved training scalars: ``epoch_num``, ``loss_scale`` …
        passed_over: newer steps that were not good, each with the reason.
        lineage: the lineage that the next save continues; None without a record.
        notes: findings on the step and on its layout that are not errors; they are logged too.
    """

    state: Any = field(repr=False)
    step: int
    name: StepName
    extras: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    passed_over: tuple[tuple[str, str], ...] = ()
    lineage: Lineage | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def progress(self) -> Progress:
        """Progress of the run, for ``resume_point``."""
        batch = self.numbers.get("global_batch_size")
        return Progress(
            int(self.numbers.get("epoch_num") or self.name.epoch),
            int(self.numbers.get("step_num") or self.step),
            int(self.numbers.get("global_step") or self.step),
            int(batch) if batch else None,
        )


def restore(
    run: RunDirectory,
    target: Any,
    step: int | str | StepName | None,
    *,
    options: RestoreOptions,
    parts: Parts = "all",
    verify: bool = False,
    prefix: str = "",
    processes: Processes = Processes(),  # noqa: B008 - this process alone
) -> RestoreResult:
    """Restore ``step`` of the job of ``prefix``, by default the newest good one.

    All ``processes`` restore the same step, which is good in each of them.

    Raises:
        NotFoundError: no such step, no good step, or names do not match.
        FormatError, CoverageError, StorageError: the named step is not good.
        LayoutError: the target does not fit, or ``step`` is ambiguous.
        StorageError: another process failed, or is missing.
    """
    began = time.monotonic()
    one_of("parts", parts, get_args(Parts))
    processes.broadcast("restoring: tidying", lambda: newest_step(run))
    search = _Search(run, prefix, parse_step_argument(step), processes)
    passed: list[tuple[str, str]] = []
    failure: JaxshardError | None = None
    for found in search:
        failure = None
        with processes.together("restoring a step") as meeting:
            try:
                catalog = _opened(run, found, verify, options.workers, processes)
                wanted = plan_restore(catalog, target, options, parts)
                state = _read(wanted)
                numbers = dict(found.record.numbers) if found.record else _numbers(catalog)
                _check_still(run, found)
                is_shown = found.record is None and processes.are_several
                what = identity(catalog) if is_shown else _SAME  # the label identifies a record
                meeting.sent = json.dumps(["", what])
            except (FormatError, CoverageError, StorageError, _Missing) as error:
                failure = error.cause if isinstance(error, _Missing) else error
                meeting.sent = json.dumps([_reason(run, found, failure), ""])
        reason = _refusal(meeting.received, run, processes)
        if reason:
            failure = failure or CoverageError(f"step {found.name}: another process: {reason}")
            passed = [*_others(passed, found.name), (str(found.name), reason)]
            if search.requested is None:
                _log.warning("step %s is passed over: %s", found.name, reason)
            search.only(found.name)
            continue
        passed = _others(passed, found.name)  # it may have been committed meanwhile
        if passed:
            _log.warning("step %s is restored instead of %s", found.name, passed[0][0])
        stored = [n for n in catalog.notes if found.record is None or n != NO_CONFIG]
        notes = (*stored, *wanted.notes, *_notes(run, search.steps, found))
        log_notes(f"step {found.name}", notes)
        log_done("restore step", found.name, wanted.num_bytes, time.monotonic() - began)
        record = found.record
        number = record.global_step if record else _number(numbers, found)
        extras = dict(record.extras) if record else {}
        line = record.lineage if record else None
        return RestoreResult(state, number, found.name, extras, numbers, tuple(passed), line, notes)
    if failure and search.requested is not None:
        raise failure
    raise NotFoundError(_none(run, search.requested, passed))


def _others(passed: list[tuple[str, str]], name: StepName) -> list[tuple[str, str]]:
    return [one for one in passed if one[0] != str(name)]


def _refusal(heard: Sequence[str], run: RunDirectory, processes: Processes) -> str:
    """Return why a step is not good for all processes; empty if it is, and the same in each."""
    said = [json.loads(text) for text in heard]
    why = next((why for why, _ in said if why), "")
    if not why and processes.are_several:
        try:
            check_same([what for _, what in said], str(run.root), processes.members)
        except CoverageError as error:
            return str(error)
    return str(why)


def finish_interrupted(run: RunDirectory) -> list[str]:
    """Complete an interrupted save or removal, unless another process holds the lock."""
    try:
        if not run.own.is_dir() or not is_interrupted(run):
            return []
    except OSError:  # listing the steps raises an error
        return []
    with suppress(StorageError), writer_lock(run, is_reader=True):
        done = recover(run)
        for line in done:
            _log.info("%s", line)
        return done
    return []


def newest_step(run: RunDirectory) -> str:
    """Recover the run; return the name of its newest step, empty if it has no steps."""
    finish_interrupted(run)
    found = find_steps(run)
    return str(found[-1].name) if found else ""


class _Missing(Exception):
    """The step lacks a file, which is not an error of the request."""

    def __init__(self, cause: JaxshardError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Search:
    """Iterator over the steps to try, the best first, as process 0 lists them.

    The directory is listed again for every step, because a running job removes and adds steps.

    Attributes:
        steps: all steps of the job in the last listing of this process.
        requested: the step of the caller.
    """

    def __init__(
        self, run: RunDirectory, prefix: str, requested: StepName | int | None, processes: Processes
    ) -> None:
        self._run, self._prefix, self._processes = run, prefix, processes
        self.requested, self.steps = requested, list[RunStep]()
        self._tried: set[str] = set()

    def __iter__(self) -> Iterator[RunStep]:
        for _ in range(_MAX_TRIES):
            label = self._processes.broadcast("restoring: which", self._choose)
            if not label:
                return
            self._tried.add(label)
            if self._processes.index:
                self.steps = of_one_job(find_steps(self._run), self._prefix)
            seen = {_label(step): step for step in self.steps}
            yield seen.get(label) or _unseen(label, self._processes.index)

    def only(self, name: StepName) -> None:
        """RestoreOptions a step was named, try no other one than ``name``."""
        if self.requested is not None:
            self.requested = name

    def _choose(self) -> str:
        """Return the label of the best untried step; empty if all were tried."""
        until = time.monotonic() + _PUTTING_S
        while True:
            self.steps = of_one_job(find_steps(self._run), self._prefix)
            labels = map(_label, reversed(_meant(self._run, self.steps, self.requested)))
            label = next((one for one in labels if one not in self._tried), "")
            in_place = not names_in(self._run, MOVING)
            if label or in_place or not self._tried or time.monotonic() > until:
                return label
            time.sleep(_POLL_S)


def _label(step: RunStep) -> str:
    """Return a text that identifies a save of a step in all processes."""
    return " ".join(map(str, step.identity))


def _meant(
    run: RunDirectory, steps: list[RunStep], requested: StepName | int | None
) -> list[RunStep]:
    """Return the steps that match the caller's, the best last."""
    if requested is None:
        return steps
    if isinstance(requested, int):
        return _numbered(run, steps, requested)
    exact = [step for step in steps if step.name == requested]
    return exact or [step for step in steps if replace(step.name, task=0) == requested]


def _numbered(run: RunDirectory, steps: list[RunStep], number: int) -> list[RunStep]:
    """Return the steps of that number in the whole run.

    Names of foreign rank files contain the step within its epoch only: if there are several
    epochs, the training scalars in the files decide.
    """
    certain = [
        s
        for s in steps
        if s.global_step == number and (s.record or format_of(s.format).own_step_folder)
    ]
    if certain:
        return certain
    if len({step.name.epoch for step in steps}) == 1:
        return [step for step in steps if step.global_step == number]
    read = [(step, true_number(run, step)) for step in steps if not step.record]
    found = [step for step, true in read if true == number]
    if found:
        return found
    unknown = [step for step, true in read if true is None and step.name.step == number]
    if len(unknown) > 1:
        raise LayoutError(
            f"step {number} is ambiguous: {' or '.join(str(s.name) for s in unknown)}, whose files "
            "do not contain the number. Pass the name instead."
        )
    return unknown


def true_number(run: RunDirectory, step: RunStep) -> int | None:
    """Return the number of a step in the whole run, by its files; None if unknown."""
    if step.record:
        return step.record.global_step
    if step.state != "complete" or format_of(step.format).own_step_folder:
        return None  # its name contains it
    try:
        numbers = _numbers(open_step(run, None, step.format, step.paths))
    except JaxshardError:
        return None
    found = numbers.get("step_num") or numbers.get("global_step")
    return int(found) if found else None


def _notes(run: RunDirectory, steps: list[RunStep], step: RunStep) -> list[str]:
    """Findings on the place of a restored step among all ``steps``."""
    notes = []
    if step.abandoned:
        notes.append(f"it was {step.reason}")
    if step.record is None and run.own.is_dir():
        notes.append(
            f"it has no record in {run.own}, so it is restored without extras, and its bytes "
            "cannot be compared with what was saved."
        )
    left = [str(s.name) for s in steps if s.abandoned and s.name > step.name]
    if left and not step.abandoned:
        notes.append(f"it is restored instead of {format_list(left)}, which the run left behind.")
    return notes


def _unseen(label: str, process: int) -> RunStep:
    step = parse_step(label.split(" ", maxsplit=1)[0])
    assert step is not None
    reason = f"process {process} does not see it, or sees another save of it"
    return RunStep(step, step.step, "", "incomplete", reason)


def _read(wanted: RestorePlan) -> Any:
    try:
        return wanted.read()
    except NotFoundError as error:  # the names match, so a file is missing
        raise _Missing(error) from error


def _check_still(run: RunDirectory, step: RunStep) -> None:
    """Refuse a state that was read during another save of the step: it may be a mixture.

    If the step was removed meanwhile, the state is consistent: files are deleted, not changed.

    Raises:
        CoverageError: the step was saved again.
        FormatError: its record is no longer readable.
    """
    if step.record is None:
        return
    if is_on_disk(run, step.name):
        raise CoverageError("another save of it is being put in place")
    with suppress(FileNotFoundError):
        if read_record(run, step.name) != step.record:
            raise CoverageError("it was saved again while it was read")


def _reason(run: RunDirectory, step: RunStep, failure: JaxshardError) -> str:
    """Return why a step is passed over."""
    reason = str(failure) or type(failure).__name__
    if step.record is None or run.record(step.name).exists():
        return reason
    return f"it was removed while it was read: {reason}"


def _opened(
    run: RunDirectory, step: RunStep, verify: bool, workers: int | None, processes: Processes
) -> Catalog:
    """Open a good step; with ``verify``, each process reads a share of the bytes."""
    if verify and step.state == "complete" and step.record is None:
        raise FormatError(
            "it has no checksums, so it cannot be verified. Restore it without verify=True."
        )
    if step.state == "incomplete":
        raise CoverageError(f"it is incomplete: {step.reason}")
    if step.state != "complete":
        raise FormatError(f"it is {step.state}: {step.reason}")
    try:
        if verify and step.record:
            mine = dict(list(step.record.files.items())[processes.index :: processes.count])
            checksums = Checksums(step.record.algorithm, mine)
            check_files(run.root, checksums, workers=workers)
        return open_step(run, step.record, step.format, step.paths)
    except NotFoundError as error:
        raise _Missing(error) from error


def _numbers(catalog: Catalog) -> dict[str, Any]:
    return {
        n: v for n, v in read_scalars(catalog).items() if n in TRAINING_SCALARS and v is not None
    }


def _number(numbers: dict[str, Any], step: RunStep) -> int:
    """Return the number of a step without a record."""
    if format_of(step.format).own_step_folder:
        return step.global_step
    return int(numbers.get("step_num") or numbers.get("global_step") or step.global_step)


def _none(run: RunDirectory, requested: object, passed: list[tuple[str, str]]) -> str:
    there = [str(s.name) for s in find_steps(run)]
    if requested is not None:
        held = f"its steps are {format_list(reversed(there))}" if there else "it has no steps"
        return f"{run.root} has no step {requested}: {held}."
    if not passed:
        return f"{run.root} has no steps. Save one, or pass another directory."
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed[:5])
    return f"{run.root}: none of its {len(passed)} steps is good: {reasons}"
