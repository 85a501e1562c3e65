"""Steps in a run directory: their states, their order, and their listing.

    complete      every file exists with its size; with ``deep``, its checksums match too
    incomplete    a file is missing: of a rank, or of a folder
    corrupt       a file has another size or other bytes than the saved one, or is unreadable
    partial       a save or a removal is in progress, or was interrupted

Steps saved by jaxshard have a record. Foreign steps (MindFormers') are judged by their names and
headers. Files decide, never a pointer file.

The last step is restored first. Recorded steps are in the order of their saves; those that the
run left behind by going back come before all others. Foreign steps are in the order of their names.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import FormatError, LayoutError, StorageError, format_list
from ..formats.folder import is_orbax_item
from ..formats.rank_names import rank_of_folder
from ..formats.registry import HuggingFace, Iteration, Orbax, RankFolders
from . import records
from .policy import Lineage
from .records import MOVING, REMOVED, WHOLE, Record, Rollback, StepName
from .run_directory import RunDirectory, names_in, read_record, rollbacks_in

State = Literal["complete", "incomplete", "corrupt", "partial"]

_STAGED = (".saving", ".saving.partial")
_TRIES = 100  # a writer changes a record a few times for each step
_log = logging.getLogger("jaxshard.training")


@dataclass(frozen=True)
class RunStep:
    """One step of a run.

    Attributes:
        name: epoch and step.
        global_step: number in the whole run; without a record, the step in the epoch.
        format: name of the format.
        state: see the module; by names and sizes, until headers or bytes are examined.
        reason: why it is not complete, or why it precedes steps with smaller names.
        saved_at: seconds since 1970.
        paths: files, or the folder, relative to ``RunDirectory.steps``; only without a record.
        prefix: of the job, if the names of its files contain it; several jobs may share a folder.
        abandoned: whether the run left it behind by going back to an earlier step.
    """

    name: StepName
    global_step: int
    format: str
    state: State = "complete"
    reason: str = ""
    num_bytes: int = 0
    saved_at: float = 0.0
    record: Record | None = field(default=None, repr=False)
    paths: tuple[str, ...] = field(default=(), repr=False)
    prefix: str = ""
    abandoned: bool = False

    @classmethod
    def of_record(cls, record: Record, state: State = "complete", reason: str = "") -> RunStep:
        """Return the step of ``record``."""
        return cls(
            record.step,
            record.global_step,
            record.format,
            state,
            reason,
            record.num_bytes,
            record.saved_at,
            record,
            prefix=record.prefix,
        )

    @property
    def task(self) -> int:
        """MindSpore's number of a job whose prefix was taken by files of another job."""
        return self.name.task

    @property
    def lineage(self) -> Lineage:
        """Position among all saves; foreign steps are not counted."""
        return self.record.lineage if self.record else Lineage()

    @property
    def identity(self) -> tuple[object, ...]:
        """Values that differ between two saves of one name, and before and after a commit."""
        is_saved, saved_at = self.state != "partial", self.saved_at if self.record else 0.0
        return (self.name, self.prefix, is_saved, self.lineage.order, saved_at, *self.paths[:1])


def find_steps(run: RunDirectory) -> list[RunStep]:
    """Return all steps of a run, judged by names, sizes and records; the last is restored first.

    Raises:
        StorageError: the directory cannot be listed.
    """
    for tries in range(_TRIES):
        try:
            before = _records_in(run)
            found, rollbacks = _found(run), rollbacks_in(run)
            after = _records_in(run)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and tries < _TRIES - 1:
                continue  # removed during the scan
            at = error.filename or run.root
            raise StorageError(f"{at} cannot be listed: {error.strerror}.") from error
        # a record that is renamed during the scan could be missed under both names
        if after == before:
            break
        time.sleep(0.0005 * tries)  # a continuous writer could invalidate every scan
    return _in_order(found, rollbacks)


def of_one_job(steps: Iterable[RunStep], prefix: str) -> list[RunStep]:
    """Return the steps of the job of ``prefix``, or of the only job if it has none.

    Raises:
        LayoutError: there are steps of several other jobs.
    """
    steps = list(steps)
    jobs = {step.prefix for step in steps if step.prefix}
    if prefix in jobs:
        return of_prefix(steps, prefix)
    if len(jobs) > 1:
        raise LayoutError(
            f"prefix={prefix!r}: the directory has steps of {len(jobs)} other jobs "
            f"({format_list(sorted(jobs))}). Pass the prefix of the job to continue."
        )
    return steps


def of_prefix(steps: Iterable[RunStep], prefix: str) -> list[RunStep]:
    """Return the steps that are not known to be another job's."""
    return [step for step in steps if step.prefix in ("", prefix)]


def past_of(steps: Iterable[RunStep], line: Lineage) -> tuple[list[RunStep], list[RunStep]]:
    """Return the recorded steps that ``line`` descends from, and the others, in save order."""
    known = sorted((step for step in steps if step.record), key=_when)
    ours = [step for step in known if line.descends_from(step.lineage.order)]
    return ours, [step for step in known if not line.descends_from(step.lineage.order)]


# --- order of restoring -----------------------------------------------------------------------


def _in_order(found: list[RunStep], rollbacks: list[Rollback]) -> list[RunStep]:
    known = _by_line([step for step in found if step.record], rollbacks)
    others = sorted((step for step in found if not step.record), key=lambda step: step.name)
    ordered = []
    while known and others:
        ordered.append((others if _is_newer(others[-1], known[-1]) else known).pop())
    return [*known, *others, *reversed(ordered)]


def _by_line(recorded: list[RunStep], rollbacks: list[Rollback]) -> list[RunStep]:
    """Sort by save order, with the steps that each job left behind first."""
    prefixes = {step.prefix for step in recorded if step.prefix}
    only = next(iter(prefixes), "") if len(prefixes) < 2 else ""
    jobs: dict[str, list[RunStep]] = {}
    for step in recorded:
        jobs.setdefault(step.prefix if len(prefixes) > 1 else only, []).append(step)
    every_left: list[RunStep] = []
    every_past: list[RunStep] = []
    for prefix, steps in jobs.items():
        newest = max(steps, key=_when)
        line, reason = (
            newest.lineage,
            f"left behind: {newest.name} was saved later, from an earlier step",
        )
        for rollback in rollbacks:
            # names of Checkpoint-2.0 folders have no prefix
            is_ours = rollback.prefix == prefix or not prefixes
            if is_ours and rollback.lineage.order > line.order:
                line, reason = rollback.lineage, f"left behind: the run went back to {rollback.to}"
        past, left = past_of(steps, line)
        every_left += [replace(step, abandoned=True, reason=step.reason or reason) for step in left]
        every_past += past
    every_past.sort(key=_when)
    return every_left + every_past


def _when(step: RunStep) -> tuple[int, StepName]:
    return step.lineage.order, step.name


def _is_newer(other: RunStep, ours: RunStep) -> bool:
    """Return True if a foreign step follows a recorded one: by its name, and by its age."""
    is_older = bool(other.saved_at) and other.saved_at < ours.saved_at - 1
    return other.name > ours.name and not is_older


# --- scan of the directory --------------------------------------------------------------------


def _records_in(run: RunDirectory) -> list[tuple[str, int, int]]:
    """Return the name, inode and modification time of every record."""
    found = []
    for state in (WHOLE, MOVING, REMOVED):
        for step in names_in(run, state):
            path = run.record(step, state)
            with suppress(OSError):
                info = os.stat(path)
                found.append((path.name, info.st_ino, info.st_mtime_ns))
    return found


def _found(run: RunDirectory) -> list[RunStep]:
    own = {step.name: step for step in _recorded(run)}
    for step in _unfinished(run):
        own.setdefault(step.name, step)
    return [*own.values(), *_foreign(run, own)]


def _recorded(run: RunDirectory) -> Iterator[RunStep]:
    """Yield the steps that were complete, according to their records."""
    moving = set(names_in(run, MOVING))
    for name in names_in(run, WHOLE):
        if name in moving:
            yield RunStep(name, name.step, "", "partial", "a newer save of it was interrupted")
            continue
        try:
            record = read_record(run, name)
        except FormatError as error:
            yield RunStep(name, name.step, "", "corrupt", str(error))
            continue
        state, reason = _sizes(run, record)
        yield RunStep.of_record(record, state, reason)


def _sizes(run: RunDirectory, record: Record) -> tuple[State, str]:
    """Return the state by the sizes of the files, and the reason."""
    missing = []
    for path, sums in record.files.items():
        try:
            num_bytes = os.stat(run.root / path).st_size
        except (FileNotFoundError, NotADirectoryError):
            missing.append(path)
            continue
        except OSError as error:
            return "corrupt", f"{path} cannot be read: {error.strerror}"
        if num_bytes != sums.num_bytes:
            return "corrupt", f"{path} has {num_bytes} bytes (expected {sums.num_bytes})"
    if missing:
        return "incomplete", f"{format_list(missing)} is missing"
    return "complete", ""


def _unfinished(run: RunDirectory) -> Iterator[RunStep]:
    for name in names_in(run, MOVING):
        yield RunStep(name, name.step, "", "partial", "its commit was interrupted")
    for name in names_in(run, REMOVED):
        yield RunStep(name, name.step, "", "partial", "its removal was interrupted")
    for name in _staged(run):
        yield RunStep(name, name.step, "", "partial", "its save is in progress, or was interrupted")


def _staged(run: RunDirectory) -> list[StepName]:
    """Return the steps with a staging directory."""
    if not run.own.is_dir():
        return []
    found = []
    for entry in sorted(os.listdir(run.own)):
        for ending in _STAGED:
            step = records.parse_step(entry.removeprefix(".").removesuffix(ending))
            if step and entry.removeprefix(".") == f"{step}{ending}":
                found.append(step)
    return found


def _foreign(run: RunDirectory, own: Mapping[StepName, RunStep]) -> Iterator[RunStep]:
    """Yield the foreign steps."""
    if not run.steps.is_dir():
        return
    ranks: dict[int, list[str]] = {}
    for entry in sorted(os.scandir(run.steps), key=lambda entry: entry.name):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        if (rank := rank_of_folder(entry.name)) is not None:
            ranks[rank] = _listed(entry.path)
        elif (number := records.parse_iteration(entry.name)) is not None:
            name = StepName(1, number)
            if not _is_ours(own, name):
                yield _folder(entry, name, Iteration.name)
        elif found := records.parse_folder(entry.name):
            prefix, name = found
            if not _is_ours(own, name, prefix):
                is_orbax = is_orbax_item(_listed(entry.path))
                kind = Orbax.name if is_orbax else HuggingFace.name
                yield _folder(entry, name, kind, prefix)
    yield from _rank_steps(run, ranks, own)


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        raise
    except OSError as error:  # only steps that need it are incomplete
        _log.warning("%s cannot be listed: %s", folder, error.strerror)
        return []


def _is_ours(own: Mapping[StepName, RunStep], name: StepName, prefix: str = "") -> bool:
    """Return True if the step has a record; a damaged record has no prefix."""
    step = own.get(name)
    return step is not None and (not prefix or step.prefix in ("", prefix))


def _folder(entry: os.DirEntry[str], name: StepName, kind: str, prefix: str = "") -> RunStep:
    try:
        files = [p.stat() for p in Path(entry.path).rglob("*") if p.is_file()]
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = f"{error.filename or entry.path} cannot be read: {error.strerror}"
        return RunStep(name, name.step, kind, "corrupt", reason, paths=(entry.name,), prefix=prefix)
    return RunStep(
        name,
        name.step,
        kind,
        num_bytes=sum(f.st_size for f in files),
        saved_at=max((f.st_mtime for f in files), default=0.0),
        paths=(entry.name,),
        prefix=prefix,
    )


def _rank_steps(
    run: RunDirectory, ranks: Mapping[int, list[str]], own: Mapping[StepName, RunStep]
) -> Iterator[RunStep]:
    """Yield the steps in rank folders; incomplete if a rank of the job has no file."""
    found: dict[tuple[str, StepName, str], dict[int, str]] = {}
    of_job: dict[str, set[int]] = {}
    for rank, names in ranks.items():
        for name in names:
            file = records.parse_rank_file(f"rank_{rank}/{name}")
            if file:
                key = (file.prefix, replace(file.step, task=file.task), file.extension)
                found.setdefault(key, {})[rank] = f"rank_{rank}/{name}"
                of_job.setdefault(file.prefix, set()).add(rank)
    for (prefix, step, _), by_rank in found.items():
        if _is_ours(own, step, prefix):
            continue
        # an empty folder belongs to the only job
        needed = of_job[prefix] if len(of_job) > 1 else set(ranks)
        lacking = sorted(needed - set(by_rank))
        stats = [os.stat(run.steps / path) for path in by_rank.values()]
        yield RunStep(
            step,
            step.step,
            RankFolders.name,
            "incomplete" if lacking else "complete",
            f"rank {format_list(map(str, lacking))} has no file" if lacking else "",
            sum(s.st_size for s in stats),
            max(s.st_mtime for s in stats),
            paths=tuple(by_rank[r] for r in sorted(by_rank)),
            prefix=prefix,
        )


# --- Listing of a run's steps, as text and as data

_UNITS = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def steps_of_run(path: str | os.PathLike[str]) -> list[RunStep]:
    """Return the steps in ``path`` if it is the directory of a run, else an empty list.

    Raises:
        StorageError: it cannot be listed.
    """
    root = Path(path)
    if not root.is_dir():
        return []
    run = RunDirectory.of(root)
    return find_steps(run) if run.main and run.root == root.absolute() else []


def rows(steps: Iterable[RunStep], size: Callable[[float], str], now: float) -> list[list[str]]:
    """Return table rows, newest first: step, number, state, format, size, age, reason."""
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


def facts(steps: Iterable[RunStep]) -> list[dict[str, Any]]:
    """Return the listing as JSON values."""
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


def resumes_from(steps: Iterable[RunStep]) -> RunStep | None:
    """Return the step that a restore would choose: the last complete one."""
    return next((s for s in reversed(list(steps)) if s.state == "complete"), None)


def verdict(best: RunStep | None, *, deep: bool) -> str:
    """Return a sentence on the step that a restore would choose."""
    if best is None:
        return "no step is complete"
    if best.record is None:
        return f"a run resumes from {best.name} (without checksums)"
    checked = "all bytes match" if deep else "bytes are not compared: use verify --deep"
    return f"a run resumes from {best.name} ({checked})"


def is_well(steps: Iterable[RunStep]) -> bool:
    """Return True if a step is complete and none is damaged; partial steps are not damaged."""
    states = [s.state for s in steps]
    return "complete" in states and not {"corrupt", "incomplete"} & set(states)


def age(seconds: float) -> str:
    """Format a duration in its largest suitable unit.

    >>> age(59.6), age(3700), age(200_000)
    ('60 s', '62 min', '2 days')
    """
    for unit, name in _UNITS:
        if seconds >= 2 * unit or unit == 1.0:
            return f"{max(seconds, 0) / unit:.0f} {name}"
    return ""
