"""The "latest" files of a run.

    checkpoint/rank_{r}/meta.json                     MindFormers' rank files
    strategy/ckpt_strategy_rank_{r}.ckpt              who holds what of them
    checkpoint/latest_checkpointed_iteration.txt      Checkpoint-2.0 folders

They are written after the step is whole, from its record; we ourselves read none of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import StorageError, format_list
from ..formats.registry import format_of
from . import naming
from .records import Record, is_strategy_file
from .run_directory import Places, replace_file


def point_at(places: Places, record: Record) -> None:
    """Have the pointer files say that the step of ``record`` is the newest.

    One that cannot be written keeps no other one from being written.

    Raises:
        StorageError: the disk refused.
    """
    failed: list[str] = []
    for path, data in _pointers(places, record, failed):
        try:
            _put(path, data)
        except OSError as error:
            failed.append(f"{path}: {error.strerror}")
    if failed:
        raise StorageError(f"step {record.step} of {places.root}: {format_list(failed)}.")


def _pointers(places: Places, record: Record, failed: list[str]) -> Iterator[tuple[Path, bytes]]:
    """The pointer files of a step and their contents."""
    format = format_of(record.format)
    if format.own_step_folder:
        yield places.steps / naming.TRACKER, str(record.global_step).encode()
    if not format.steps_in_names:
        return
    head = f"{naming.CHECKPOINT}/"
    for unit in record.units:
        file = naming.parse_rank_file(unit.removeprefix(head))
        if unit.startswith(head) and file:
            said = naming.meta_json(file.prefix, file.rank, record.step)
            yield places.root / unit.rsplit("/", 1)[0] / naming.META, said
    if record.strategy:
        try:
            _show_strategy(places.root / naming.STRATEGY, places.root / record.strategy)
        except OSError as error:
            failed.append(f"{error.filename or naming.STRATEGY}: {error.strerror}")


def _show_strategy(place: Path, kept: Path) -> None:
    """Make the strategy files at ``place`` those that are ``kept``; foreign files are ignored."""
    wanted = set(filter(is_strategy_file, os.listdir(kept)))
    for name in sorted(wanted):
        _put(place / name, (kept / name).read_bytes())
    for name in set(filter(is_strategy_file, os.listdir(place))) - wanted:
        # of a run on more ranks, or of a layout before: readers would take it for ours
        (place / name).unlink(missing_ok=True)


def _put(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return
    replace_file(path, data, durable=False)
