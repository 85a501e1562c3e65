"""Shares: what one process writes of the files that several make together.

Of arrays it has the shards that ``sharing`` says are its own, and of files the bytes at which
they lie. Used alike for a checkpoint and for a step of a training run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..catalog import Catalog, Piece
from ..planning.moves import Move
from ..storage.budget import Budget, Counts
from ..storage.engine import run
from ..storage.shared_writing import SharedFiles
from ..targets.results import Result
from .sharing import Place, shared_moves

Read = Callable[[Piece, int, memoryview], None]
Lend = Callable[[Piece, int, int], memoryview | None]


def lay_out(result: Result, folder: Path, *, durable: bool) -> None:
    """Make all files of ``result``, with what is no tensor's; one process does, for all.

    Raises:
        StorageError: the disk is full or refuses.
    """
    files = SharedFiles(result.outputs, folder, result.lay_file)
    try:
        files.lay_out()
        if durable:
            files.sync()
    finally:
        files.close()


def write_share(
    catalog: Catalog,
    result: Result,
    folder: Path,
    read: Read,
    lend: Lend,
    *,
    owner_of: Callable[[Piece], int],
    here: int,
    budget: Budget,
    durable: bool,
) -> Counts:
    """Write the shards whose owner is process ``here``; they are on the disk when this returns.

    Raises:
        StorageError: the disk is full or refuses.
    """
    files = SharedFiles(result.outputs, folder, result.lay_file)
    places: dict[str, tuple[Place, ...]] = {}

    def moves() -> Iterator[Move]:
        for shared in shared_moves(catalog, result.outputs, owner_of, here):
            places[shared.move.name] = shared.places
            yield shared.move

    def write(move: Move, target: int, offset: int, buffer: memoryview) -> int:
        ranks = move.targets[target].ranks
        for number in ranks:
            place, done = places[move.name][number], 0
            for at, length in place.spans(offset, len(buffer)):
                files.write(place.rank, move.name, at, buffer[done : done + length])
                done += length
        return len(ranks)

    try:
        counts = run(moves(), read, write, budget=budget, lend=lend)
        if durable:
            files.sync()
    finally:
        files.close()
    return counts


def seal(result: Result, folder: Path, *, durable: bool) -> None:
    """Finish every file, when all have written; one process does, for all.

    Raises:
        StorageError: the disk refuses.
    """
    if result.seal is None:
        return
    files = SharedFiles(result.outputs, folder, result.lay_file)
    try:
        files.seal(result.seal)
        if durable:
            files.sync()
    finally:
        files.close()
