"""Policies: when to save, which steps to keep, and where a run resumes.

    maybe_save(40)   began      saved     40 is on disk: not due again
    maybe_save(40)   began      failed    40 is due again
    restore → 30                          30 is on disk, and the steps after it are due again

This module reads no clock: callers pass the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from ..errors import LayoutError


@dataclass(frozen=True, slots=True)
class Cadence:
    """When to save.

    Attributes:
        every_steps: save steps that this divides; 0 for never.
        every_seconds: save once this time has passed since the last save; 0 for never.

    >>> Cadence(every_steps=10).is_due(20, now=0.0, last_step=10, last_time=0.0)
    True
    >>> Cadence(every_seconds=60).is_due(21, now=59.0, last_step=20, last_time=0.0)
    False
    """

    every_steps: int = 0
    every_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.every_steps < 0 or not self.every_seconds >= 0:
            raise LayoutError(
                f"save_every_steps={self.every_steps}, save_every_seconds={self.every_seconds}: "
                "neither may be negative. Pass 0 for never."
            )

    def is_due(self, step: int, *, now: float, last_step: int | None, last_time: float) -> bool:
        """Whether ``step`` should be saved, given when the last one was (or saving began)."""
        if step == last_step:
            return False  # the last step of an epoch and of the run are often the same
        by_steps = self.every_steps > 0 and step % self.every_steps == 0
        by_seconds = self.every_seconds > 0 and now - last_time >= self.every_seconds
        return by_steps or by_seconds


@dataclass(frozen=True, slots=True)
class Mark:
    """A save: its step, or None for a state that is not saved, and its start time."""

    step: int | None
    time: float


class Schedule:
    """Decides when a run saves, by its saves that succeeded, not by its attempts.

    ``ended`` may be called by the thread that saves in the background. All processes of a job
    make the same calls in the same order, but see a background save end at different times:
    only where ``step == tried`` can that change the answer of ``is_due``.

    Attributes:
        tried: the step of the last attempt or restore.
    """

    def __init__(self, cadence: Cadence, now: float) -> None:
        self._cadence = cadence
        self._saved = Mark(None, now)
        self._begun: Mark | None = None  # in progress
        self.tried: int | None = None

    @property
    def never_saves(self) -> bool:
        """Whether no step is ever due."""
        return self._cadence == Cadence()

    @property
    def is_timed(self) -> bool:
        """Whether the clock matters, which differs between processes."""
        return self._cadence.every_seconds > 0

    def is_due(self, step: int, now: float) -> bool:
        """Return True if ``step`` should be saved now."""
        self._reach(step)
        last = self._begun or self._saved
        return self._cadence.is_due(step, now=now, last_step=last.step, last_time=last.time)

    def began(self, step: int, now: float) -> None:
        """Count ``step`` as saved until ``ended`` reports otherwise."""
        self._reach(step)
        self._begun, self.tried = Mark(step, now), step

    def ended(self, *, saved: bool) -> None:
        """Record the end of the save in progress."""
        begun = self._begun
        if saved and begun is not None:
            self._saved = begun
        self._begun = None

    def restored(self, step: int | None, now: float) -> None:
        """Record that the run continues from ``step``; None if no step holds all of its state.

        Then the time of the last save is unchanged.
        """
        time = now if step is not None else self._saved.time
        self._saved, self._begun, self.tried = Mark(step, time), None, step

    def _reach(self, step: int) -> None:
        """Forget steps beyond ``step``: the loop went back without ``restore``."""
        if self.tried is None or step >= self.tried:
            return
        self._saved, self.tried = replace(self._saved, step=None), None
        if self._begun is not None:
            self._begun = replace(self._begun, step=None)


# --- Retention: which steps may go

_Name = TypeVar("_Name")


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """Which older steps stay.

    Attributes:
        keep_max: how many of the newest to keep; 0 for all.
        keep_every: keep steps that this divides for good; 0 for none.
    """

    keep_max: int = 0
    keep_every: int = 0

    def __post_init__(self) -> None:
        if self.keep_max < 0 or self.keep_every < 0:
            raise LayoutError(
                f"keep_max={self.keep_max}, keep_every={self.keep_every}: neither may be negative. "
                "Give 0 to keep all steps, or none for good."
            )

    def expired(
        self, past: Mapping[_Name, int], abandoned: Mapping[_Name, int]
    ) -> tuple[_Name, ...]:
        """Return the steps that may be removed now that the last of ``past`` is saved.

        Abandoned steps neither count nor expire until the run has passed them; then they are the
        oldest. The step just saved never expires.

        Args:
            past: the step just saved, last, and before it its ancestors, oldest first; all
                complete, with their numbers in the whole run.
            abandoned: the other complete steps, oldest first.

        >>> steps = {"1_10": 10, "1_20": 20, "1_30": 30, "1_40": 40}
        >>> RetentionPolicy(keep_max=2, keep_every=20).expired(steps, {})
        ('1_10',)
        """
        if not self.keep_max or not past:
            return ()
        reached = list(past.values())[-1]
        numbers = {**abandoned, **past}
        counted = [*(step for step in abandoned if abandoned[step] <= reached), *past]
        every = self.keep_every
        return tuple(s for s in counted[: -self.keep_max] if not every or numbers[s] % every)


# --- Lineage: the ancestors of a step, and the steps that a run left behind


@dataclass(frozen=True, slots=True)
class Lineage:
    """Position of a save among all saves of a directory, and its ancestors.

    Attributes:
        order: 1 for the first; 0 for steps without a record.
        abandoned: first and last order of each range of saves that are not its ancestors.
    """

    order: int = 0
    abandoned: tuple[tuple[int, int], ...] = ()

    def descends_from(self, order: int) -> bool:
        """Return True if the save of that order is an ancestor of this one, or itself.

        >>> [Lineage(4, ((3, 3),)).descends_from(n) for n in (1, 2, 3, 4, 5)]
        [True, True, False, True, False]
        """
        return order <= self.order and not any(a <= order <= b for a, b in self.abandoned)


def next_lineage(after: Lineage | None, newest: int) -> Lineage:
    """Return the lineage of a save that continues ``after``; ``newest`` is the largest order.

    >>> next_lineage(Lineage(2), newest=3)
    Lineage(order=4, abandoned=((3, 3),))
    >>> next_lineage(Lineage(4, ((3, 3),)), newest=4)
    Lineage(order=5, abandoned=((3, 3),))
    >>> next_lineage(None, newest=4)
    Lineage(order=5, abandoned=((1, 4),))
    """
    before = after or Lineage()
    newest = max(newest, before.order)
    skipped = ((before.order + 1, newest),) if before.order < newest else ()
    return Lineage(newest + 1, before.abandoned + skipped)


# --- Progress: where a run resumes with another batch size or other data


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a run, stored in its checkpoint.

    Attributes:
        epoch_num: current epoch, from 1.
        step_num: steps of the whole run.
        global_step: the optimizer's count of steps.
        global_batch_size: samples in each step; None if not recorded.
    """

    epoch_num: int
    step_num: int
    global_step: int
    global_batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Counters of a resumed run.

    Attributes:
        initial_epoch: completed epochs.
        initial_step: completed steps, in steps of the new batch size.
        global_step: the same for the optimizer's count.
        data_skip_steps: batches of the data to skip.
    """

    initial_epoch: int
    initial_step: int
    global_step: int
    data_skip_steps: int


def resume_point(
    saved: Progress,
    *,
    global_batch_size: int | None = None,
    steps_per_epoch: int | None = None,
    sink_mode: bool = False,
    ignore_data_skip: bool = False,
    data_skip_steps: int | None = None,
) -> ResumePoint:
    """Return the counters of a run that resumes from ``saved``.

    Args:
        saved: progress stored in the checkpoint.
        global_batch_size: of the resumed run; by default unchanged.
        steps_per_epoch: of the resumed run; without it no epoch is incomplete.
        sink_mode: count epochs like MindFormers with data sinks: scaled like steps, and not
            reduced for an incomplete epoch.
        ignore_data_skip: read the data from its start.
        data_skip_steps: skip this many batches, of the new size, instead of those of ``saved``.

    Raises:
        LayoutError: a number is negative, or a batch has no samples.

    >>> resume_point(Progress(4, 40, 40, 16), global_batch_size=32, sink_mode=True)
    ResumePoint(initial_epoch=2, initial_step=20, global_step=20, data_skip_steps=20)
    """
    before = saved.global_batch_size
    now = global_batch_size if global_batch_size is not None else before
    _check(saved, now, steps_per_epoch, data_skip_steps)

    def scaled(steps: int) -> int:
        # whole numbers: 49 * (1 / 49) is less than 1 in floating point, and would lose a step
        return steps * before // now if before and now else steps

    initial_step = scaled(saved.step_num)
    if sink_mode:
        initial_epoch = scaled(saved.epoch_num)
    else:
        is_incomplete = bool(steps_per_epoch and initial_step % steps_per_epoch)
        initial_epoch = saved.epoch_num - is_incomplete
    skip = initial_step if data_skip_steps is None else data_skip_steps
    return ResumePoint(
        initial_epoch, initial_step, scaled(saved.global_step), 0 if ignore_data_skip else skip
    )


def _check(
    saved: Progress, batch: int | None, steps_per_epoch: int | None, skip: int | None
) -> None:
    for name, value, least in (
        ("epoch_num", saved.epoch_num, 0),
        ("step_num", saved.step_num, 0),
        ("global_step", saved.global_step, 0),
        ("the saved global_batch_size", saved.global_batch_size, 1),
        ("global_batch_size", batch, 1),
        ("steps_per_epoch", steps_per_epoch, 1),
        ("data_skip_steps", skip, 0),
    ):
        if value is not None and value < least:
            raise LayoutError(f"{name} is {value} (expected {least} or more).")
