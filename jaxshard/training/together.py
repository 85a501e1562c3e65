"""Steps saved by several processes with one commit.

    process 0   holds the directory, lays out ┤ writes its share ┤ sums its files ┤ records, commits
    others                            see them ┤ write theirs     ┤ sum theirs     ┤ hear of it

What is written lies in a folder that only this attempt knows the name of, so a process that is
late from an attempt given up finds nowhere to write. Sums are taken by reading what was written,
each file by one process: parts of one file come from several. Recovery, retention and the
pointer files are process 0's alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import jax

from ..distributed.barriers import Processes, processes_of_jax
from ..distributed.partition import cut_evenly
from ..errors import StorageError
from ..saver.shared_write import SharedWrite
from ..storage.checksums import BEST, FileSums, Gathered
from ..storage.resources import LENT_BLOCK_BYTES, budget_for
from ..storage.transaction import Staging, staging_folder
from .policy import Line
from .records import Record
from .run_directory import check_units
from .save_step import Job, all_parts, check_free, record_of, save_step, units_of
from .step_files import Part, sums_of, write_file

_BEGIN, _WRITE, _SUM, _COMMIT = (
    f"saving a step: {what}" for what in ("beginning", "writing", "summing", "committing")
)


def save_together(job: Job, processes: Processes) -> Line | None:
    """Save a step; all processes call it, each with what its own devices hold.

    Where it stands among all saves process 0 is told, and goes on from it.

    Raises:
        StorageError: the disk refuses here or elsewhere, another writer is at work, or a process
            does not come in time; nothing of the step is there, and all others are.
        LayoutError: the processes were given different states.
    """
    processes = processes.about(f"step {job.wish.step} of {job.places.root}")
    if processes.index == 0:
        return _Leader(job, processes).save()
    _follow(job, processes)
    return None


def _follow(job: Job, processes: Processes) -> None:
    try:
        token = processes.agree(_BEGIN, lambda: "")
        work = _Work(job, processes)
        work.token = token
        work.write()
        work.sum_up()
        processes.agree(_COMMIT, lambda: "")
    finally:
        job.snapshot.close()


class _Leader:
    """What process 0 does: all that ``save_step`` does alone, the writing with the others."""

    def __init__(self, job: Job, processes: Processes) -> None:
        self._job, self._processes = job, processes
        self._next = _BEGIN  # the meeting at which the others wait

    def save(self) -> Line:
        try:
            record = save_step(self._job, self._written)
        except BaseException as error:
            if self._next:
                self._say_failed(error)
            raise
        self._processes.agree(_COMMIT, lambda: "")
        return record.line

    def _say_failed(self, error: BaseException) -> None:
        """Have the others hear of what failed here alone."""

        def fail() -> str:
            raise error

        self._processes.agree(self._next, fail)

    def _written(self, job: Job) -> Record:
        staged = job.places.staging(job.wish.step)
        staging = Staging(
            staged, str(job.wish.step), overwrite=True, durable=job.durable, kind="own"
        )
        try:
            work = _Work(job, self._processes)
            self._begin(work, staging)
            work.write()
            own = work.sum_up()
            self._next = _COMMIT
            record = self._finish(work, staging, own)
        except BaseException:
            staging.abandon()
            raise
        staging.publish()
        return record

    def _begin(self, work: _Work, staging: Staging) -> None:
        def begin() -> str:
            units = units_of(work.parts)
            check_units(self._job.places, units)
            check_free(self._job, units)
            return work.shared.begin(staging)

        name, self._next = self._next, ""  # the others hear what fails from here on
        work.token = self._processes.agree(name, begin)

    def _finish(self, work: _Work, staging: Staging, own: Mapping[str, FileSums]) -> Record:
        sums = dict(own)
        for process in range(1, self._processes.count):
            sums |= _fetch(work.place(process))
        work.shared.finish(staging)
        gathered = Gathered()
        for part in work.parts:
            for path, data in part.result.side_files.items():
                write_file(staging, path, data)
                gathered.add(path, 0, data)
                sums[path] = gathered.of(path, len(data))
        return record_of(self._job, work.parts, sums, gathered.algorithm)


class _Work:
    """One process's part in one attempt."""

    def __init__(self, job: Job, processes: Processes) -> None:
        self.token, self._job, self._processes = "", job, processes
        self.parts: Sequence[Part] = all_parts(job)
        self.shared = SharedWrite(
            job.snapshot,
            [(part.catalog, part.result) for part in self.parts],
            job.places.staging(job.wish.step),
            processes,
            durable=job.durable,
        )

    def write(self) -> None:
        """Write what this process alone writes; when it returns, all have."""
        budget = budget_for(self._job.host_bytes, self._job.workers, LENT_BLOCK_BYTES)
        self.shared.write(_WRITE, self.token, budget)

    def sum_up(self) -> dict[str, FileSums]:
        """The sums of the files that fall to this process; process 0 finds those of all."""
        here = self._processes.index
        with self._processes.together(_SUM) as meeting:
            budget = budget_for(self._job.host_bytes, self._job.workers)
            found, meeting.says = _sums(self.shared.folder, self._paths(), budget.workers)
            if here:
                _leave(self.place(here), found)
        _check_sums(meeting.heard)
        return found

    def _paths(self) -> list[str]:
        """Files next to each other, which a process has mostly written itself."""
        sized = [
            pair
            for part in self.parts
            for pair in zip(
                part.result.outputs.paths, part.result.outputs.rank_bytes(), strict=True
            )
        ]
        cuts = cut_evenly([num_bytes for _, num_bytes in sized], self._processes.count)
        here = self._processes.index
        return [path for (path, _), to in zip(sized, cuts, strict=True) if to == here]

    def place(self, process: int) -> Path:
        """Where a process leaves its sums."""
        base = staging_folder(self._job.places.staging(self._job.wish.step))
        return base / f"sums-{self.token}-{process}.json"


def _sums(root: Path, paths: Sequence[str], workers: int) -> tuple[dict[str, FileSums], str]:
    found: dict[str, FileSums] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="jaxshard") as pool:
        for sums, _ in pool.map(lambda path: sums_of(root, [path]), paths):
            found |= sums
    return found, BEST


def _leave(place: Path, sums: Mapping[str, FileSums]) -> None:
    told = {path: [s.num_bytes, list(s.chunks)] for path, s in sums.items()}
    try:
        place.write_text(json.dumps(told))
    except OSError as error:
        raise StorageError(f"{place} cannot be written: {error.strerror}.") from error


def _fetch(place: Path) -> dict[str, FileSums]:
    try:
        told = json.loads(place.read_text())
    except OSError as error:
        raise StorageError(f"{place} cannot be read: {error.strerror}.") from error
    return {
        path: FileSums(num_bytes, tuple((a, b, c) for a, b, c in chunks))
        for path, (num_bytes, chunks) in told.items()
    }


def _check_sums(algorithms: Sequence[str]) -> None:
    odd = [i for i, name in enumerate(algorithms) if name != algorithms[0]]
    if odd:
        raise StorageError(
            f"process {odd[0]} computes {algorithms[odd[0]]} checksums and process 0 "
            f"{algorithms[0]}. Install the same packages on all hosts."
        )


# --- Company: the processes of a job that keep one run together, each with a manager of its own

_NUMBERS = count()


class Company:
    """The processes whose managers are one; found when they are first needed.

    All make their managers in the same order. So each manager's meetings are apart from those of
    another, and from those of ``save`` and ``load``: one may save in the background meanwhile.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._number = timeout_s, next(_NUMBERS)
        self._found: Processes | None = None

    @property
    def processes(self) -> Processes:
        """All of them; no device is woken where JAX was not told that there are several."""
        if self._found is None:
            alone = not jax.distributed.is_initialized()
            found = Processes() if alone else processes_of_jax(self._timeout_s)
            self._found = found.apart(f"manager {self._number}")
        return self._found

    def of_process_0(self, choice: bool) -> bool:
        """What process 0 chose, whatever this one would have."""
        return bool(self.processes.agree("choosing", lambda: "yes" if choice else ""))
