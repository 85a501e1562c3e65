"""Training scalars among the weights: ``global_step``, ``loss_scale`` and others.

MindSpore saves them as tensors. They are never cut, and every rank has all of them. With
a strategy file they are the tensors that it does not tell of; without one only their
names tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite, prod

from ..core.catalog import Tensor
from ..errors import FormatError, quote_name
from .strict_json import FETCH

NAMES = frozenset(
    {
        *("epoch_num", "step_num", "global_step", "global_batch_size", "consumed_samples"),
        *("learning_rate", "loss_scale", "scale_sense", "current_iterator_step"),
        *("last_overflow_iterator_step", "batch_num"),
    }
)

_FRACTIONS = frozenset({"learning_rate", "loss_scale", "scale_sense"})
_LIMIT = 1 << 63  # MindSpore keeps them as signed integers of 64 bits


def job_numbers(tensors: Iterable[Tensor]) -> frozenset[str]:
    """The names of those that are numbers of a job and no weights."""
    return frozenset(t.name for t in tensors if t.name in NAMES and prod(t.shape) == 1)


def checked(name: str, value: object, where: str) -> int | float:
    """Return the number of a job called ``name``, read from ``where``, in its own type.

    Raises:
        FormatError: the value is not such a number.

    >>> checked("global_step", 10.0, "common.json"), checked("loss_scale", 0.5, "common.json")
    (10, 0.5)
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if name in _FRACTIONS:
            return value
        if isfinite(value) and int(value) == value and abs(value) < _LIMIT:
            return int(value)
    expected = "a number" if name in _FRACTIONS else "a whole number of 64 bits"
    raise FormatError(f"{where}: {name} is {quote_name(repr(value))}, expected {expected}. {FETCH}")
