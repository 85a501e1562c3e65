"""Checks: what a caller gives, as a plain value; NumPy's and JAX's numbers among it.

A number that only the record's JSON would refuse fails late, in the background, after all the
bytes were written. So it is looked at on its way in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ..errors import LayoutError, nearest

_T = TypeVar("_T")


def whole(name: str, value: Any) -> int:
    """``value`` as a whole number.

    Raises:
        LayoutError: it is none.

    >>> whole("step", 7)
    7
    """
    try:
        return operator.index(value)
    except TypeError:
        raise LayoutError(
            f"{name} is {value!r:.80}, a {type(value).__name__}; give a whole number."
        ) from None


def real(name: str, value: Any) -> float:
    """``value`` as a number.

    Raises:
        LayoutError: it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise LayoutError(
            f"{name} is {value!r:.80}, a {type(value).__name__}; give a number."
        ) from None


def optional(check: Callable[[str, Any], _T], name: str, value: Any) -> _T | None:
    """``value`` as ``check`` has it; None if there is none."""
    return None if value is None else check(name, value)


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse a choice that there is not.

    Raises:
        LayoutError: such a choice.
    """
    choices = tuple(known)
    if value not in choices:
        raise LayoutError(f"{name}={value!r} is none of {choices}.{nearest(str(value), choices)}")
