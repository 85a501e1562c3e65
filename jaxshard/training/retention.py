"""Retention: which steps may go.

    saved   10  20  30  40  50         keep_max=2, keep_every=20
    kept        20      40  50         20 and 40 for good, 40 and 50 as the newest two

Only whole steps count and only whole steps go: what is broken is evidence, and is left
to its owner. This module decides and removes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from .naming import StepName


def expired(
    complete: Mapping[StepName, int],
    just_saved: StepName,
    *,
    keep_max: int = 0,
    keep_every: int = 0,
) -> tuple[StepName, ...]:
    """The steps of ``complete`` that may be removed now that ``just_saved`` is whole.

    Steps beyond ``just_saved`` belong to a run that was left behind by resuming from an
    earlier step; they neither count nor go, so that the step just saved is never the oldest.

    Args:
        complete: the steps that are whole, with their numbers in the whole run.
        just_saved: the newest of this run, whole and on the disk.
        keep_max: how many of the newest to keep; 0 for all.
        keep_every: keep steps that this divides for good; 0 for none.

    >>> steps = {StepName(1, n): n for n in (10, 20, 30, 40)}
    >>> expired(steps, StepName(1, 40), keep_max=2, keep_every=20)
    (StepName(epoch=1, step=10),)
    """
    if not keep_max:
        return ()
    ours = sorted({s for s in complete if s <= just_saved} | {just_saved})
    old = ours[:-keep_max]
    return tuple(s for s in old if not keep_every or complete[s] % keep_every)
