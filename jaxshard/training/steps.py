"""Steps: what is in a run's directory, and in what state.

    complete      every file is there with its size; with ``deep``, with its checksums too
    incomplete    a file is missing: of a rank, or of a folder
    corrupt       a file has another size or other bytes than were saved, or cannot be read
    partial       it is being saved or removed, or that was interrupted

Steps that we saved have a record. Others (MindFormers') are judged by their headers, and
can be no better than complete by those. What is there decides, never a pointer file.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..errors import CoverageError, FormatError, JaxshardError, NotFoundError, StorageError, some
from . import naming, records
from .checksums import FileSums, algorithm, first_difference
from .committing import names_in
from .naming import StepName
from .opening_steps import open_step
from .places import Places
from .records import MOVING, REMOVED, WHOLE, Record

State = Literal["complete", "incomplete", "corrupt", "partial"]

_RANK = re.compile(r"rank_(\d{1,7})")
_SAVING = re.compile(r"\.?(\d+_\d+)\.saving(\.partial)?")


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        name: its epoch and step.
        global_step: its number in the whole run, as far as it is known: for steps that have
            no record, the step in the epoch.
        format: how it is stored.
        paths: its files, or the folder it is, relative to ``Places.steps``; of steps without
            a record.
        state: see the module; "complete" until somebody looks closer.
        reason: why it is not complete.
        saved_at: seconds since 1970.
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


def find_steps(places: Places) -> list[Step]:
    """All steps of a run, oldest first, judged by names, sizes and records.

    Raises:
        StorageError: the directory cannot be listed.
    """
    try:
        own = {step.name: step for step in _recorded(places)}
        for step in _unfinished(places):
            own.setdefault(step.name, step)
        others = [s for s in _others(places) if s.name not in own]
    except OSError as error:
        raise StorageError(f"{places.root} cannot be listed: {error.strerror}.") from error
    return sorted([*own.values(), *others], key=lambda step: step.name)


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
    compute = algorithm(record.algorithm)
    lock = threading.Lock()

    def check(item: tuple[str, FileSums]) -> None:
        path, sums = item
        with open(places.root / path, "rb", buffering=0) as file:
            reader = _Reader(file.fileno())
            at = first_difference(sums, compute, reader.read)
        if at is not None:
            raise FormatError(
                f"{path} is damaged at or after byte {at}: its checksum is not what was saved."
            )
        if progress:
            with lock:
                progress(sums.num_bytes)

    try:
        with ThreadPoolExecutor(workers or _cores(), thread_name_prefix="jaxshard") as pool:
            for _ in pool.map(check, record.files.items()):
                pass
    except FileNotFoundError as error:
        raise NotFoundError(f"{error.filename} is missing.") from error
    except OSError as error:
        if isinstance(error, JaxshardError):
            raise
        raise StorageError(f"{error.filename or places.root}: {error.strerror}.") from error


def _cores() -> int:
    return min(8, len(os.sched_getaffinity(0)))


class _Reader:
    """Reads into one buffer: fresh memory for each chunk would cost more than the reading."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._buffer = descriptor, bytearray()

    def read(self, offset: int, length: int) -> memoryview:
        if len(self._buffer) < length:
            self._buffer = bytearray(length)
        whole = memoryview(self._buffer)[:length]
        done = 0
        while done < length:
            got = os.preadv(self._descriptor, [whole[done:]], offset + done)
            if not got:
                return whole[:done]
            done += got
        return whole


def _recorded(places: Places) -> Iterator[Step]:
    """Steps whose record says that they were whole."""
    moving = set(names_in(places, MOVING))
    for name in names_in(places, WHOLE):
        path = places.record(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue  # removed meanwhile
        if name in moving:
            yield Step(name, name.step, "", "partial", "a newer save of it was interrupted")
            continue
        try:
            record = records.from_bytes(data, f"{records.FOLDER}/{path.name}")
            if record.step != name:
                raise FormatError(f"{path.name} is the record of step {record.step}.")
        except FormatError as error:
            yield Step(name, name.step, "", "corrupt", str(error))
            continue
        state, reason = _sizes(places, record)
        yield Step(
            name,
            record.global_step,
            record.format,
            state,
            reason,
            record.num_bytes,
            record.saved_at,
            record,
        )


def _sizes(places: Places, record: Record) -> tuple[State, str]:
    """The state that files' sizes tell, and why."""
    missing = []
    for path, sums in record.files.items():
        try:
            num_bytes = os.stat(places.root / path).st_size
        except OSError:
            missing.append(path)
            continue
        if num_bytes != sums.num_bytes:
            return "corrupt", f"{path} has {num_bytes} bytes; {sums.num_bytes} were saved"
    if missing:
        return "incomplete", f"{some(missing)} is missing"
    return "complete", ""


def _unfinished(places: Places) -> Iterator[Step]:
    for name in names_in(places, MOVING):
        yield Step(name, name.step, "", "partial", "putting it in place was interrupted")
    for name in names_in(places, REMOVED):
        yield Step(name, name.step, "", "partial", "removing it was interrupted")
    if not places.own.is_dir():
        return
    for entry in sorted(os.listdir(places.own)):
        match = _SAVING.fullmatch(entry)
        name_of = naming.parse_step(match[1]) if match else None
        if name_of:
            yield Step(name_of, name_of.step, "", "partial", "saving it is on its way, or was")


def _others(places: Places) -> Iterator[Step]:
    """Steps that somebody else saved."""
    if not places.steps.is_dir():
        return
    ranks: dict[int, list[str]] = {}
    for entry in sorted(os.scandir(places.steps), key=lambda entry: entry.name):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        if match := _RANK.fullmatch(entry.name):
            ranks[int(match[1])] = sorted(os.listdir(entry.path))
        elif (number := naming.parse_iteration(entry.name)) is not None:
            yield _folder(entry, StepName(1, number), "iteration")
        elif found := naming.parse_folder(entry.name):
            kind = "orbax" if (Path(entry.path) / "_METADATA").exists() else "huggingface"
            yield _folder(entry, found, kind)
    yield from _rank_steps(places, ranks)


def _folder(entry: os.DirEntry[str], name: StepName, kind: str) -> Step:
    files = [p.stat() for p in Path(entry.path).rglob("*") if p.is_file()]
    return Step(
        name,
        name.step,
        kind,
        num_bytes=sum(f.st_size for f in files),
        saved_at=max((f.st_mtime for f in files), default=0.0),
        paths=(entry.name,),
    )


def _rank_steps(places: Places, ranks: Mapping[int, list[str]]) -> Iterator[Step]:
    """The steps in rank folders: one is incomplete if any rank has no file of it."""
    found: dict[StepName, dict[int, str]] = {}
    for rank, names in ranks.items():
        for name in names:
            file = naming.parse_rank_file(f"rank_{rank}/{name}")
            if file:
                found.setdefault(file.step, {})[rank] = f"rank_{rank}/{name}"
    for step, by_rank in found.items():
        lacking = sorted(set(ranks) - set(by_rank))
        stats = [os.stat(places.steps / path) for path in by_rank.values()]
        yield Step(
            step,
            step.step,
            "ranks",
            "incomplete" if lacking else "complete",
            f"rank {some(map(str, lacking))} has no file of it" if lacking else "",
            sum(s.st_size for s in stats),
            max(s.st_mtime for s in stats),
            paths=tuple(by_rank[r] for r in sorted(by_rank)),
        )
