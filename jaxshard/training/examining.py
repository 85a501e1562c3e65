"""Examining: a closer look at a step: its headers, and every byte if asked.

Whoever only wants to know which steps there are needs none of this (``steps``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ..errors import CoverageError, FormatError, JaxshardError, NotFoundError, StorageError
from ..storage.budget import default_workers
from .checksums import FileSums, algorithm, first_difference
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
        with ThreadPoolExecutor(
            workers or default_workers(), thread_name_prefix="jaxshard"
        ) as pool:
            for _ in pool.map(check, record.files.items()):
                pass
    except FileNotFoundError as error:
        raise NotFoundError(f"{error.filename} is missing.") from error
    except OSError as error:
        if isinstance(error, JaxshardError):
            raise
        raise StorageError(f"{error.filename or places.root}: {error.strerror}.") from error


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
