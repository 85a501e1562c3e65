"""Restoring: the newest good step, onto whatever layout the caller has now.

    steps, newest first     50 partial   40 corrupt   30 complete   20 …
                            passed over, and said so  ↑ restored

A step is good if it is complete, its headers agree with its files' sizes, and, when asked,
every byte has its checksum. What is wrong with the *request* (a name that no step has) is
an error; what is wrong with a *step* leads to the one before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from ..catalog import Catalog
from ..errors import (
    CoverageError,
    FormatError,
    JaxshardError,
    LayoutError,
    NotFoundError,
    StorageError,
    some,
)
from ..formats.job_numbers import NAMES
from ..multiprocess.barriers import Processes
from ..targets.job_values import job_values
from .checks import one_of
from .committing import is_interrupted, recover
from .examining import check_sums
from .filling import Parts, Where, fill
from .lineage import Line
from .naming import StepName, parse_step, parse_wish
from .opening_steps import open_step
from .places import Places, only_writer
from .progress import Progress
from .steps import Step, find_steps, of_one_job

_log = logging.getLogger("jaxshard.training")


@dataclass(frozen=True)
class Restored:
    """A state as it was.

    Attributes:
        state: the target, with the saved leaves in it.
        step: the step it is of, counted over the whole run.
        name: the same as epoch and step.
        extras: what was saved with it; empty if its record is lost or it is MindFormers'.
        numbers: the job's numbers that were saved: ``epoch_num``, ``loss_scale`` …
        passed_over: newer steps that were not good, each with the reason.
        line: what the next save of this run grows from; None if others saved it.
    """

    state: Any = field(repr=False)
    step: int
    name: StepName
    extras: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    passed_over: tuple[tuple[str, str], ...] = ()
    line: Line | None = field(default=None, repr=False)

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
    places: Places,
    target: Any,
    step: int | str | StepName | None,
    *,
    where: Where,
    parts: Parts = "all",
    verify: bool = False,
    prefix: str = "",
    processes: Processes = Processes(),  # noqa: B008 - nobody but this process
) -> Restored:
    """The state saved at ``step``, by default the newest good one, by the job of ``prefix``.

    It is the same in all ``processes``, and good for all of them.

    Raises:
        NotFoundError: there is no such step or no good one, or names do not fit.
        FormatError, CoverageError, StorageError: the step that was named is not good.
        LayoutError: the target does not fit, or several steps are meant.
        StorageError: another process failed otherwise, or did not come in time.
    """
    one_of("parts", parts, get_args(Parts))
    processes.agree("restoring: tidying", lambda: tidied(places))
    wish = parse_wish(step)
    passed: list[tuple[str, str]] = []
    steps = of_one_job(find_steps(places), prefix)
    for found in _agreed(reversed(_meant(places, steps, wish)), processes):
        failure: JaxshardError | None = None
        with processes.together("restoring a step") as meeting:
            try:
                catalog = _opened(places, found, verify, where.workers, processes)
                state = fill(catalog, target, where, parts)
                numbers = dict(found.record.numbers) if found.record else _numbers(catalog)
            except (FormatError, CoverageError, StorageError, _Missing) as error:
                failure = error.cause if isinstance(error, _Missing) else error
                meeting.says = str(error) or type(error).__name__
        reason = next(filter(None, meeting.heard), "")  # good is what is good for all
        if reason:
            if wish is not None:
                raise failure or CoverageError(f"step {found.name}: another process: {reason}")
            passed.append((str(found.name), reason))
            _log.warning("step %s is passed over: %s", found.name, reason)
            continue
        if passed:
            _log.warning("step %s is restored instead of %s", found.name, passed[0][0])
        _say(places, steps, found, catalog)
        record = found.record
        number = record.global_step if record else _number(numbers, found)
        extras = dict(record.extras) if record else {}
        line = record.line if record else None
        return Restored(state, number, found.name, extras, numbers, tuple(passed), line)
    raise NotFoundError(_none(places, wish, passed))


def finish_interrupted(places: Places) -> list[str]:
    """Go on with a save or a removal that was interrupted, if nobody else is at work."""
    if not places.own.is_dir() or not is_interrupted(places):
        return []
    with suppress(StorageError), only_writer(places):
        done = recover(places)
        for line in done:
            _log.info("%s", line)
        return done
    return []


def tidied(places: Places) -> str:
    """Finish what was interrupted; the newest step there is then, empty if there is none."""
    finish_interrupted(places)
    found = find_steps(places)
    return str(found[-1].name) if found else ""


class _Missing(Exception):
    """A step lacks a file: the step's fault, unlike a name that the request gets wrong."""

    def __init__(self, cause: JaxshardError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _meant(places: Places, steps: list[Step], wish: StepName | int | None) -> list[Step]:
    """Those of ``steps`` that the caller means, the best last."""
    if isinstance(wish, int):
        return _numbered(places, steps, wish)
    return [step for step in steps if wish in (None, step.name)]


def _numbered(places: Places, steps: list[Step], number: int) -> list[Step]:
    """The steps of that number in the whole run.

    Names of others' rank files tell the step within its epoch only: where there are several
    epochs, their own numbers are asked.
    """
    told = [s for s in steps if s.global_step == number and (s.record or s.format == "iteration")]
    if told:
        return told
    if len({step.name.epoch for step in steps}) == 1:
        return [step for step in steps if step.global_step == number]
    unsaid = [step for step in steps if not step.record]
    asked = [(step, true_number(places, step)) for step in unsaid]
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


def true_number(places: Places, step: Step) -> int | None:
    """Which step of the whole run a step is by the numbers in its files, if they are there."""
    if step.record:
        return step.record.global_step
    if step.state != "complete" or step.format == "iteration":
        return None  # which its name tells
    try:
        numbers = _numbers(open_step(places, None, step.format, step.paths))
    except JaxshardError:
        return None
    found = numbers.get("step_num") or numbers.get("global_step")
    return int(found) if found else None


def _say(places: Places, steps: list[Step], step: Step, catalog: Catalog) -> None:
    """What a person should know of a step that is restored."""
    level = logging.INFO if step.record else logging.WARNING  # ours is no news
    for note in catalog.notes:
        _log.log(level, "step %s: %s", step.name, note)
    if step.left:
        _log.warning("step %s is restored, which was %s", step.name, step.reason)
    if step.record is None and places.own.is_dir():
        _log.warning(
            "step %s has no record in %s, so it comes without extras, and nothing tells whether "
            "its bytes are as they were saved",
            step.name,
            places.own,
        )
    left = [str(s.name) for s in steps if s.left and s.name > step.name]
    if left and not step.left:
        _log.warning("step %s is restored, and not %s, which is left behind", step.name, some(left))


def _agreed(ours: Iterable[Step], processes: Processes) -> Iterator[Step]:
    """The steps to try, the best first, as process 0 sees them."""
    if not processes.are_several:
        yield from ours
        return
    by_name = {str(step.name): step for step in ours}
    for name in json.loads(processes.agree("restoring: which", lambda: json.dumps(list(by_name)))):
        yield by_name.get(name) or _unseen(name, processes.index)


def _unseen(name: str, process: int) -> Step:
    step = parse_step(name)
    assert step is not None
    reason = f"process {process} does not see it"
    return Step(step, step.step, "", "incomplete", reason)


def _opened(
    places: Places, step: Step, verify: bool, workers: int | None, processes: Processes
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
            check_sums(places, replace(step.record, files=mine), workers=workers)
        return open_step(places, step.record, step.format, step.paths)
    except NotFoundError as error:
        raise _Missing(error) from error


def _numbers(catalog: Catalog) -> dict[str, Any]:
    return {n: v for n, v in job_values(catalog).items() if n in NAMES and v is not None}


def _number(numbers: dict[str, Any], step: Step) -> int:
    """The step of a run that kept no record of it."""
    if step.format == "iteration":
        return step.global_step
    return int(numbers.get("step_num") or numbers.get("global_step") or step.global_step)


def _none(places: Places, wish: object, passed: list[tuple[str, str]]) -> str:
    there = [str(s.name) for s in find_steps(places)]
    if wish is not None:
        held = f"there are {some(reversed(there))}" if there else "there are none"
        return f"{places.root} has no step {wish}; {held}."
    if not passed:
        return f"{places.root} has no steps. Save one, or give another directory."
    told = "; ".join(f"{name}: {reason}" for name, reason in passed[:5])
    return f"none of the {len(passed)} steps of {places.root} is good: {told}"
