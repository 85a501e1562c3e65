"""Claims: which names a save may use, and what it may replace.

    the run's own step, saved before     replaced
    a step of another job of the prefix  both are kept: llama_rank_0_1-1_10 (as MindSpore names it),
                                         llama-_1-1_10; an error for iteration_00000010
    a folder without a record            an error
    any of these with overwrite=True     replaced

A step is the run's own if this manager saved it, or if the run was restored here: then all recorded
steps of its prefix are, also those that it went back from.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import FormatError, LayoutError, format_list
from . import records
from .records import MOVING, REMOVED, WHOLE, StepName
from .run_directory import Places, read_record
from .steps import find_steps, of_prefix

_log = logging.getLogger("jaxshard.training")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a manager may replace.

    Attributes:
        restored: whether the run goes on from a step of this directory.
        saved: the steps that the manager saved itself.
        task: the number behind the rank in this job's files; 0 for none.
        overwrite: replace what lies in the way, whoever made it.
    """

    restored: bool = False
    saved: frozenset[StepName] = frozenset()
    task: int = 0
    overwrite: bool = False

    def owns(self, step: StepName) -> bool:
        """Whether a recorded step of that name and the job's prefix is the run's own."""
        return self.restored or step in self.saved


def task_for(
    places: Places, prefix: str, step: StepName, folders: Iterable[str], ranks: int, claim: Claim
) -> int:
    """Return the number that keeps ``step`` apart from the same step of other jobs.

    Args:
        places: the run's directory.
        prefix: of the files.
        step: the epoch and the step in it.
        folders: with rank files of the step: ``checkpoint``, and those of further copies.
        ranks: number of rank files in each; 0 if the step is one folder.
        claim: the job's; it keeps its number as long as that is free.

    Raises:
        StorageError: the directory cannot be listed.
    """
    kinds = list(folders)

    def is_free(task: int) -> bool:
        name = replace(step, task=task)
        units = (
            f"{k}/{records.rank_file(prefix, r, name, k)}" for k in kinds for r in range(ranks)
        )
        known = _prefix_of(places, name)
        if known is not None and (known not in ("", prefix) or claim.owns(name)):
            return True  # what it holds is refused, or replaced, when it is saved
        if not ranks:
            return known is None  # a folder without a record is refused when it is saved
        return not known and not any(os.path.lexists(places.root / unit) for unit in units)

    if claim.overwrite or is_free(claim.task):
        return claim.task
    tasks = [s.name.task for s in of_prefix(find_steps(places), prefix)]
    task = max([claim.task, *tasks]) + 1
    while not is_free(task):
        task += 1
    name = replace(step, task=task)
    _log.warning(
        "%s has a step %s of another job with the prefix %r. Both are kept: this job's is called "
        "%s. Restore a step first to continue that job.",
        places.steps,
        replace(step, task=claim.task),
        prefix,
        Path(records.rank_file(prefix, 0, name)).name
        if ranks
        else records.step_folder(prefix, name),
    )
    return task


def _prefix_of(places: Places, step: StepName) -> str | None:
    """Which job recorded ``step``; empty if the record does not tell, None if there is none."""
    for state in (WHOLE, MOVING, REMOVED):
        try:
            return read_record(places, step, state).prefix
        except FileNotFoundError:
            continue
        except FormatError:
            return ""
    return None


def replaceable(
    places: Places, step: StepName, units: Iterable[str], claim: Claim
) -> tuple[str, ...]:
    """Return those of ``units`` that are there and may be replaced by a save of ``step``.

    Raises:
        LayoutError: a unit is there that is not the step's own.
    """
    units = list(units)
    there = tuple(unit for unit in units if os.path.lexists(places.root / unit))
    if claim.overwrite or not there:
        return there
    known = _recorded_units(places, step, units)
    strange = [unit for unit in there if unit not in known]
    if strange:
        raise LayoutError(
            f"{places.root} has {format_list(strange)} already, and no record of a step {step} "
            "that it belongs to. Give another prefix or directory, move it away, or replace it "
            "with overwrite=True."
        )
    if not claim.owns(step):
        raise LayoutError(
            f"{places.root} has a step {step} ({format_list(there)}) that this manager neither "
            "saved nor restored. Restore a step first to continue that job, give another "
            "directory, or replace it with overwrite=True."
        )
    return there


def _recorded_units(places: Places, step: StepName, units: list[str]) -> set[str]:
    """The units that a record of ``step`` is about; all, where it cannot be read."""
    found = set[str]()
    for state in (WHOLE, REMOVED):
        try:
            found |= {*read_record(places, step, state).units}
        except FileNotFoundError:
            continue
        except FormatError:
            found |= {*units}
    return found
