"""Numbers of a job that lie among the weights: ``global_step``, ``loss_scale`` and more.

MindSpore saves them as tensors. They are never cut, and every rank has all of them. With
a strategy file they are the tensors that it does not tell of; without one only their
names tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from ..catalog import Tensor

NAMES = frozenset(
    {
        *("epoch_num", "step_num", "global_step", "global_batch_size", "consumed_samples"),
        *("learning_rate", "loss_scale", "scale_sense", "current_iterator_step"),
        *("last_overflow_iterator_step", "batch_num"),
    }
)


def job_numbers(tensors: Iterable[Tensor]) -> frozenset[str]:
    """The names of those that are numbers of a job and no weights."""
    return frozenset(t.name for t in tensors if t.name in NAMES and prod(t.shape) == 1)
