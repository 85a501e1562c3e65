"""Restoring the newest good step onto any layout.

    steps, newest first     50 partial   40 corrupt   30 complete   20 …
                            passed over, and said so  ↑ restored

A step is good if it is complete, its headers agree with its files' sizes, and, when asked,
every byte has its checksum. What is wrong with the *request* (a name that no step has) is
an error; what is wrong with a *step* leads to the next best one in a new listing: the run's
own process may have removed the step while it was read, and saved another.
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
from ..core.catalog import Catalog
from ..core.notes import log_notes
from ..distributed.barriers import Processes
from ..errors import (
    CoverageError,
    FormatError,
    JaxshardError,
    LayoutError,
    NotFoundError,
    StorageError,
    format_list,
)
from ..formats.huggingface import TRAINING_SCALARS
from ..formats.registry import format_of
from ..storage.identity import check_same, identity
from .commit_step import is_interrupted, is_on_disk, recover
from .open_step import check_sums, open_step
from .policy import Lineage, Progress
from .records import (
    MOVING,
    StepName,
    parse_step,
    parse_wish,
)
from .restore_state import Parts, RestoreOptions, RestorePlan, plan_restore
from .run_directory import RunDirectory, names_in, read_record, writer_lock
from .state import one_of
from .steps import RunStep, find_steps, of_one_job

_SAME = "{}"  # nothing more to compare
_MAX_TRIES = 1000  # steps that went while they were read
_PUTTING_S, _POLL_S = 5.0, 0.02  # a writer takes a few renames to put a step in place
_log = logging.getLogger("jaxshard.training")


@dataclass(frozen=True)
class RestoreResult:
    """A state as it was.

    Attributes:
        state: the target, with the saved leaves in it.
        step: the step it is of, counted over the whole run.
        name: the same as epoch and step.
        extras: what was saved with it; empty if its record is lost or it is MindFormers'.
        numbers: the job's numbers that were saved: ``epoch_num``, ``loss_scale`` …
        passed_over: newer steps that were not good, each with the reason.
        lineage: what the next save of this run grows from; None if others saved it.
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
        """How far the run had come: what ``resume_point`` takes."""
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
    processes: Processes = Processes(),  # noqa: B008 - nobody but this process
) -> RestoreResult:
    """The state saved at ``step``, by default the newest good one, by the job of ``prefix``.

    It is the same in all ``processes``, and good for all of them.

    Raises:
        NotFoundError: there is no such step or no good one, or names do not fit.
        FormatError, CoverageError, StorageError: the step that was named is not good.
        LayoutError: the target does not fit, or several steps are meant.
        StorageError: another process failed otherwise, or did not come in time.
    """
    one_of("parts", parts, get_args(Parts))
    processes.agree("restoring: tidying", lambda: newest_step(run))
    search = _Search(run, prefix, parse_wish(step), processes)
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
                what = identity(catalog) if is_shown else _SAME  # a record is in the label
                meeting.says = json.dumps(["", what])
            except (FormatError, CoverageError, StorageError, _Missing) as error:
                failure = error.cause if isinstance(error, _Missing) else error
                meeting.says = json.dumps([_reason(run, found, failure), ""])
        reason = _refusal(meeting.heard, run, processes)
        if reason:
            failure = failure or CoverageError(f"step {found.name}: another process: {reason}")
            passed = [*_others(passed, found.name), (str(found.name), reason)]
            if search.wish is None:
                _log.warning("step %s is passed over: %s", found.name, reason)
            search.only(found.name)
            continue
        passed = _others(passed, found.name)  # it is whole by now
        if passed:
            _log.warning("step %s is restored instead of %s", found.name, passed[0][0])
        notes = (*catalog.notes, *wanted.notes, *_notes(run, search.steps, found))
        log_notes(f"step {found.name}", notes)
        record = found.record
        number = record.global_step if record else _number(numbers, found)
        extras = dict(record.extras) if record else {}
        line = record.lineage if record else None
        return RestoreResult(state, number, found.name, extras, numbers, tuple(passed), line, notes)
    if failure and search.wish is not None:
        raise failure
    raise NotFoundError(_none(run, search.wish, passed))


def _others(passed: list[tuple[str, str]], name: StepName) -> list[tuple[str, str]]:
    return [one for one in passed if one[0] != str(name)]


def _refusal(heard: Sequence[str], run: RunDirectory, processes: Processes) -> str:
    """Why a step is not good for all processes, which must see the same one; empty if it is."""
    said = [json.loads(text) for text in heard]
    why = next((why for why, _ in said if why), "")
    if not why and processes.are_several:
        try:
            check_same([what for _, what in said], str(run.root), processes.members)
        except CoverageError as error:
            return str(error)
    return str(why)


def finish_interrupted(run: RunDirectory) -> list[str]:
    """Go on with a save or a removal that was interrupted, if no other process is at work."""
    try:
        if not run.own.is_dir() or not is_interrupted(run):
            return []
    except OSError:  # what is wrong with the folder, listing the steps will tell
        return []
    with suppress(StorageError), writer_lock(run, is_reader=True):
        done = recover(run)
        for line in done:
            _log.info("%s", line)
        return done
    return []


def newest_step(run: RunDirectory) -> str:
    """Finish what was interrupted; the newest step there is then, empty if there is none."""
    finish_interrupted(run)
    found = find_steps(run)
    return str(found[-1].name) if found else ""


class _Missing(Exception):
    """A step lacks a file: the step's fault, unlike a name that the request gets wrong."""

    def __init__(self, cause: JaxshardError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Search:
    """The steps to try, the best first, as process 0 sees them; each once.

    The directory is listed again for every step: retention of a run that goes on removes steps,
    and newer ones appear.

    Attributes:
        steps: all steps of the job in the last listing here.
        wish: the step that the caller names.
    """

    def __init__(
        self, run: RunDirectory, prefix: str, wish: StepName | int | None, processes: Processes
    ) -> None:
        self._run, self._prefix, self._processes = run, prefix, processes
        self.wish, self.steps = wish, list[RunStep]()
        self._tried: set[str] = set()

    def __iter__(self) -> Iterator[RunStep]:
        for _ in range(_MAX_TRIES):
            label = self._processes.agree("restoring: which", self._choose)
            if not label:
                return
            self._tried.add(label)
            if self._processes.index:
                self.steps = of_one_job(find_steps(self._run), self._prefix)
            seen = {_label(step): step for step in self.steps}
            yield seen.get(label) or _unseen(label, self._processes.index)

    def only(self, name: StepName) -> None:
        """RestoreOptions a step was named, try no other one than ``name``."""
        if self.wish is not None:
            self.wish = name

    def _choose(self) -> str:
        """The best step that was not tried yet; empty if there is none."""
        until = time.monotonic() + _PUTTING_S
        while True:
            self.steps = of_one_job(find_steps(self._run), self._prefix)
            labels = map(_label, reversed(_meant(self._run, self.steps, self.wish)))
            label = next((one for one in labels if one not in self._tried), "")
            in_place = not names_in(self._run, MOVING)
            if label or in_place or not self._tried or time.monotonic() > until:
                return label
            time.sleep(_POLL_S)


def _label(step: RunStep) -> str:
    """The step in words that all processes share; another save of the name has another one."""
    return " ".join(map(str, step.identity))


def _meant(run: RunDirectory, steps: list[RunStep], wish: StepName | int | None) -> list[RunStep]:
    """Those of ``steps`` that the caller means, the best last."""
    if wish is None:
        return steps
    if isinstance(wish, int):
        return _numbered(run, steps, wish)
    exact = [step for step in steps if step.name == wish]
    return exact or [step for step in steps if replace(step.name, task=0) == wish]


def _numbered(run: RunDirectory, steps: list[RunStep], number: int) -> list[RunStep]:
    """The steps of that number in the whole run.

    Names of others' rank files tell the step within its epoch only: where there are several
    epochs, their own numbers are asked.
    """
    told = [
        s
        for s in steps
        if s.global_step == number and (s.record or format_of(s.format).own_step_folder)
    ]
    if told:
        return told
    if len({step.name.epoch for step in steps}) == 1:
        return [step for step in steps if step.global_step == number]
    unsaid = [step for step in steps if not step.record]
    asked = [(step, true_number(run, step)) for step in unsaid]
    found = [step for step, true in asked if true == number]
    if found:
        return found
    silent = [step for step, true in asked if true is None and step.name.step == number]
    if len(silent) > 1:
        raise LayoutError(
            f"step {number} may be {' or '.join(str(s.name) for s in silent)}, and their files do "
            "not tell. Give the name instead of the number."
        )
    return silent


def true_number(run: RunDirectory, step: RunStep) -> int | None:
    """Which step of the whole run a step is by the numbers in its files, if they are there."""
    if step.record:
        return step.record.global_step
    if step.state != "complete" or format_of(step.format).own_step_folder:
        return None  # which its name tells
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
    except NotFoundError as error:  # names are known to fit: it is a file
        raise _Missing(error) from error


def _check_still(run: RunDirectory, step: RunStep) -> None:
    """Refuse what was read while the step was replaced: it may be half of each save.

    One that was removed meanwhile is whole: its files go, and do not change.

    Raises:
        CoverageError: it was saved again.
        FormatError: its record cannot be read any more.
    """
    if step.record is None:
        return
    if is_on_disk(run, step.name):
        raise CoverageError("another save of it is being put in place")
    with suppress(FileNotFoundError):
        if read_record(run, step.name) != step.record:
            raise CoverageError("it was saved again while it was read")


def _reason(run: RunDirectory, step: RunStep, failure: JaxshardError) -> str:
    """Why a step is passed over."""
    reason = str(failure) or type(failure).__name__
    if step.record is None or run.record(step.name).exists():
        return reason
    return f"it was removed while it was read: {reason}"


def _opened(
    run: RunDirectory, step: RunStep, verify: bool, workers: int | None, processes: Processes
) -> Catalog:
    """The catalog of a step that is good; several processes read its bytes in shares."""
    if verify and step.state == "complete" and step.record is None:
        raise FormatError(
            "it has no checksums, so it cannot be verified; restore it by name, without verify"
        )
    if step.state == "incomplete":
        raise CoverageError(f"it is incomplete: {step.reason}")
    if step.state != "complete":
        raise FormatError(f"it is {step.state}: {step.reason}")
    try:
        if verify and step.record:
            mine = dict(list(step.record.files.items())[processes.index :: processes.count])
            check_sums(run, replace(step.record, files=mine), workers=workers)
        return open_step(run, step.record, step.format, step.paths)
    except NotFoundError as error:
        raise _Missing(error) from error


def _numbers(catalog: Catalog) -> dict[str, Any]:
    return {
        n: v for n, v in read_scalars(catalog).items() if n in TRAINING_SCALARS and v is not None
    }


def _number(numbers: dict[str, Any], step: RunStep) -> int:
    """The step of a run that kept no record of it."""
    if format_of(step.format).own_step_folder:
        return step.global_step
    return int(numbers.get("step_num") or numbers.get("global_step") or step.global_step)


def _none(run: RunDirectory, wish: object, passed: list[tuple[str, str]]) -> str:
    there = [str(s.name) for s in find_steps(run)]
    if wish is not None:
        held = f"there are {format_list(reversed(there))}" if there else "there are none"
        return f"{run.root} has no step {wish}; {held}."
    if not passed:
        return f"{run.root} has no steps. Save one, or give another directory."
    told = "; ".join(f"{name}: {reason}" for name, reason in passed[:5])
    return f"none of the {len(passed)} steps of {run.root} is good: {told}"
