"""Examining: a closer look at a step: its headers, and every byte if asked.

Whoever only wants to know which steps there are needs none of this (``steps``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import CoverageError, FormatError, NotFoundError, StorageError
from ..storage.checksum_file import Checksums, check_files
from .opening_steps import open_step
from .places import Places
from .records import Record
from .steps import Step


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
    checksums = Checksums(record.algorithm, record.files)
    check_files(places.root, checksums, workers=workers, progress=progress)
