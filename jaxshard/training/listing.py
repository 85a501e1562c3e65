"""Listing of a run's steps, as text and as data.

    step   state      format   size       age
    1_30   complete   ranks    1.7 GB     5 min
    1_20   corrupt    ranks    1.7 GB     10 min   checkpoint/rank_3/… has 12 bytes; 4096 were saved

This module knows no device: login nodes look at runs too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .open_step import examine_all
from .run_directory import Places
from .steps import Step, find_steps

_UNITS = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def steps_of_run(path: str | os.PathLike[str]) -> list[Step]:
    """The steps in ``path`` if it is the directory of a run, else none.

    Raises:
        StorageError: it cannot be listed.
    """
    root = Path(path)
    if not root.is_dir():
        return []
    places = Places.of(root)
    return find_steps(places) if places.main and places.root == root.absolute() else []


def examined(
    path: str | os.PathLike[str],
    steps: Iterable[Step],
    *,
    deep: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Step]:
    """``steps`` with the states that their headers tell, and with ``deep`` every byte.

    Raises:
        LayoutError: no package here computes the checksums.
    """
    return examine_all(Places.of(path), steps, deep=deep, workers=workers, progress=progress)


def rows(steps: Iterable[Step], size: Callable[[float], str], now: float) -> list[list[str]]:
    """A row for each of ``steps``, backwards: step, number, state, format, size, age, reason."""
    return [
        [
            str(s.name),
            str(s.global_step),
            s.state,
            s.format or "-",
            size(s.num_bytes) if s.num_bytes else "-",
            age(now - s.saved_at) if s.saved_at else "-",
            s.reason,
        ]
        for s in reversed(list(steps))
    ]


def facts(steps: Iterable[Step]) -> list[dict[str, Any]]:
    """The same for a program."""
    return [
        {
            "step": str(s.name),
            "global_step": s.global_step,
            "state": s.state,
            "reason": s.reason,
            "format": s.format,
            "num_bytes": s.num_bytes,
            "saved_at": s.saved_at,
            "checksums": s.record.algorithm if s.record else None,
        }
        for s in steps
    ]


def resumes_from(steps: Iterable[Step]) -> Step | None:
    """The step that a restore would take: the last complete one."""
    return next((s for s in reversed(list(steps)) if s.state == "complete"), None)


def verdict(best: Step | None, *, deep: bool) -> str:
    """A sentence on the step that a restore would take."""
    if best is None:
        return "no step is complete"
    if best.record is None:
        return f"a run resumes from {best.name} (whoever saved it kept no checksums)"
    how = "every byte is as it was saved" if deep else "bytes are not compared: verify --deep does"
    return f"a run resumes from {best.name} ({how})"


def is_well(steps: Iterable[Step]) -> bool:
    """Whether nothing is broken. What is on its way is not broken."""
    states = [s.state for s in steps]
    return "complete" in states and not {"corrupt", "incomplete"} & set(states)


def age(seconds: float) -> str:
    """How long ago, in the largest unit that makes sense.

    >>> age(59.6), age(3700), age(200_000)
    ('60 s', '62 min', '2 days')
    """
    for unit, name in _UNITS:
        if seconds >= 2 * unit or unit == 1.0:
            return f"{max(seconds, 0) / unit:.0f} {name}"
    return ""


def clock() -> float:
    """Seconds since 1970."""
    return time.time()
