"""Retention: which steps may go.

    saved   10  20  30  40  50         keep_max=2, keep_every=20
    kept        20      40  50         20 and 40 for good, 40 and 50 as the newest two

The newest are those that were saved last, whatever their names (``lineage``). Only whole steps
count and only whole steps go: what is broken is evidence, and is left to its owner. This module
decides and removes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from .naming import StepName


def expired(
    past: Mapping[StepName, int],
    left: Mapping[StepName, int],
    *,
    keep_max: int = 0,
    keep_every: int = 0,
) -> tuple[StepName, ...]:
    """The steps that may be removed now that the last of ``past`` is whole.

    Steps of a run that was left behind by going back to an earlier one neither count nor go
    until the new run has come further than they; then they are the oldest. The step just saved
    never goes.

    Args:
        past: the step just saved, last, and before it those that it grew from, oldest first;
            all whole, with their numbers in the whole run.
        left: the other whole steps, oldest first.
        keep_max: how many of the newest to keep; 0 for all.
        keep_every: keep steps that this divides for good; 0 for none.

    >>> steps = {StepName(1, n): n for n in (10, 20, 30, 40)}
    >>> expired(steps, {}, keep_max=2, keep_every=20)
    (StepName(epoch=1, step=10, task=0),)
    """
    if not keep_max or not past:
        return ()
    reached = list(past.values())[-1]
    numbers = {**left, **past}
    counted = [*(step for step in left if left[step] <= reached), *past]
    return tuple(s for s in counted[:-keep_max] if not keep_every or numbers[s] % keep_every)
