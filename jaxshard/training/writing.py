"""Writing: a snapshot becomes the files of a step, and each byte is summed on its way.

The engine hands over blocks while they are in the cache of the core that carries them; the
checksum is taken there, so that it costs no second look at memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..catalog import Piece
from ..errors import StorageError
from ..planning.moves import Move
from ..planning.plan import Plan, make_plan
from ..storage.budget import LENT_BLOCK_BYTES, budget_for
from ..storage.checksums import FileSums, Gathered
from ..storage.engine import run
from ..storage.staging import Staging
from ..storage.writing import FileLayout, OutputFiles
from .layouts import Part

Read = Callable[[Piece, int, memoryview], None]
Lend = Callable[[Piece, int, int], memoryview | None]


def write_parts(
    parts: Sequence[Part],
    staging: Staging,
    read: Read,
    lend: Lend,
    *,
    workers: int | None = None,
    host_bytes: int | None = None,
) -> tuple[dict[str, FileSums], str]:
    """Write the files of ``parts`` into ``staging``; their checksums, and of which kind.

    Raises:
        StorageError: the disk is full or refuses.
    """
    plans = [make_plan(part.catalog, part.result.outputs) for part in parts]
    check_room(staging.files, sum(plan.totals.bytes_written for plan in plans))
    gathered = Gathered()
    budget = budget_for(host_bytes, workers, LENT_BLOCK_BYTES)
    found: dict[str, FileSums] = {}
    for part, plan in zip(parts, plans, strict=True):
        observer = _Observer(plan, part, gathered)
        files = OutputFiles(plan, staging, part.result.lay_file, part.result.seal)
        try:
            run(plan.moves(), read, observer.around(files.write), budget=budget, lend=lend)
        finally:
            files.close()
        found |= observer.sums()
        for path, data in part.result.side_files.items():
            write_file(staging, path, data)
            gathered.add(path, 0, data)
            found[path] = gathered.of(path, len(data))
    return found, gathered.algorithm


def write_file(staging: Staging, path: str, data: bytes) -> None:
    """Write one whole file into ``staging``.

    Raises:
        StorageError: the disk refused.
    """
    place = staging.files / path
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        staging.sync(place)
    except OSError as error:
        raise StorageError(f"{place} cannot be written: {error.strerror}.") from error


def sums_of(root: Path, paths: Iterable[str]) -> tuple[dict[str, FileSums], str]:
    """The checksums of files that somebody else wrote, by reading them again.

    Raises:
        StorageError: the disk refused.
    """
    gathered = Gathered()
    found = {}
    for path in paths:
        at = 0
        try:
            with open(root / path, "rb", buffering=0) as file:
                while data := file.read(4 << 20):
                    gathered.add(path, at, data)
                    at += len(data)
        except OSError as error:
            raise StorageError(f"{root / path} cannot be read: {error.strerror}.") from error
        found[path] = gathered.of(path, at)
    return found, gathered.algorithm


def check_room(place: Path, num_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        StorageError: fewer bytes are free.
    """
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise StorageError(
            f"{place} has {free} bytes free, and the step needs {num_bytes}. Make room, keep fewer "
            "steps, or save elsewhere."
        )


class _Observer:
    """Stands between the engine and the files, and sums what passes."""

    def __init__(self, plan: Plan, part: Part, gathered: Gathered) -> None:
        outputs = plan.outputs
        self._paths, self._content_of, self._gathered = outputs.paths, outputs.content_of, gathered
        self._layouts: list[FileLayout] = [part.result.lay_file(c) for c in outputs.contents]
        for path, content in zip(self._paths, self._content_of, strict=True):
            for offset, data in self._layouts[content].segments:
                gathered.add(path, offset, data)

    def around(
        self, write: Callable[[Move, int, int, memoryview], int]
    ) -> Callable[[Move, int, int, memoryview], int]:
        def observed(move: Move, target: int, offset: int, buffer: memoryview) -> int:
            ranks = move.targets[target].ranks
            total = self._gathered.compute(buffer)  # replicas share it
            for rank in ranks:
                spans = self._layouts[self._content_of[rank]].spans(move.name, offset, len(buffer))
                done = 0
                for at, length in spans:
                    whole = length == len(buffer)
                    value = total if whole else self._gathered.compute(buffer[done : done + length])
                    self._gathered.add_sum(self._paths[rank], at, length, value)
                    done += length
            return write(move, target, offset, buffer)

        return observed

    def sums(self) -> dict[str, FileSums]:
        """The checksums of every file."""
        return {
            path: self._gathered.of(path, self._layouts[content].num_bytes)
            for path, content in zip(self._paths, self._content_of, strict=True)
        }
