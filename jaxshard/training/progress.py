"""Progress: where a run resumes when the batch size or the data has changed.

What a run has seen is counted in samples; a step is a batch of them. So with a batch
twice as large, 40 steps become 20. The data is its own matter: a new data set is read
from its start, or from wherever its own training had come to.

    same data          skip what was seen          data_skip = initial_step
    new data           skip nothing                ignore_data_skip=True
    new data, begun    skip what was seen of it    data_skip_steps=2

These are MindFormers' rules. This module knows no data and no checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LayoutError


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run had come, as its checkpoint says.

    Attributes:
        epoch_num: the epoch it was in, from 1.
        step_num: steps of the whole run.
        global_step: the optimizer's own count of them.
        global_batch_size: samples in each step; None if it was not recorded.
    """

    epoch_num: int
    step_num: int
    global_step: int
    global_batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where to go on.

    Attributes:
        initial_epoch: epochs that are done, so the number to begin counting from.
        initial_step: steps that are done, in steps of the new batch size.
        global_step: the same for the optimizer's own count.
        data_skip_steps: batches of the data to pass over.
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
    """Where a run that had come to ``saved`` goes on.

    Args:
        saved: what the checkpoint says.
        global_batch_size: of the run that resumes; by default as before.
        steps_per_epoch: of the run that resumes; without it no epoch is broken off.
        sink_mode: epochs count as MindFormers does when it feeds data in sinks: scaled like
            steps, and not set back by an epoch that was broken off.
        ignore_data_skip: read the data from its start.
        data_skip_steps: pass over so many batches, instead of those of ``saved``. They are
            batches of the new size.

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
        broken_off = bool(steps_per_epoch and initial_step % steps_per_epoch)
        initial_epoch = saved.epoch_num - broken_off
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
            raise LayoutError(f"{name} is {value}; it must be {least} or more.")
