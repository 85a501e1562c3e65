"""Examining: a closer look at a step: its headers, and every byte if asked.

Whoever only wants to know which steps there are needs none of this (``steps``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ..errors import CoverageError, FormatError, NotFoundError, StorageError
from ..storage.checksum_file import Checksums, check_files
from .opening_steps import open_step
from .places import Places
from .records import Record
from .steps import Step, find_steps, of_one_job


def examine(
    places: Places,
    step: Step,
    *,
    deep: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Step:
    """``step`` with the state that its headers tell, and with ``deep`` its bytes.

    Raises:
        LayoutError: no package here computes its checksums.
    """
    if step.state != "complete":
        return step
    try:
        if deep and step.record:
            check_sums(places, step.record, workers=workers, progress=progress)
        open_step(places, step.record, step.format, step.paths)
    except (CoverageError, NotFoundError) as error:
        return replace(step, state="incomplete", reason=str(error))
    except (FormatError, StorageError) as error:
        return replace(step, state="corrupt", reason=str(error))
    return step


def examine_all(
    places: Places,
    steps: Iterable[Step],
    *,
    deep: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Step]:
    """``steps``, each as ``examine`` finds it, but for those that went meanwhile.

    Raises:
        LayoutError: no package here computes the checksums.
        StorageError: the directory cannot be listed.
    """
    before = list(steps)
    after = [
        examine(places, step, deep=deep, workers=workers, progress=progress) for step in before
    ]
    if all(a.state == b.state for a, b in zip(after, before, strict=True)):
        return after
    there = {step.identity for step in find_steps(places)}
    pairs = zip(after, before, strict=True)
    return [a for a, b in pairs if a.state == b.state or b.identity in there]


def newest_good(places: Places, prefix: str = "") -> Step | None:
    """The step that the job of ``prefix`` goes on from, by headers; None if there is none.

    The directory is listed again after a step that is not good: retention may have removed it.

    Raises:
        LayoutError: there are steps of several other jobs.
        StorageError: the directory cannot be listed.
    """
    tried: set[object] = set()
    while True:
        steps = of_one_job(find_steps(places), prefix)
        step = next((s for s in reversed(steps) if s.identity not in tried), None)
        if step is None or (found := examine(places, step)).state == "complete":
            return found if step else None
        tried.add(step.identity)


def check_sums(
    places: Places,
    record: Record,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Read every byte of a step and compare the checksums.

    Raises:
        FormatError: a file is not what was saved.
        StorageError: the disk refused.
        NotFoundError: a file is missing.
        LayoutError: no package here computes the checksums.
    """
    checksums = Checksums(record.algorithm, record.files)
    check_files(places.root, checksums, workers=workers, progress=progress)
