"""Execution options of a conversion, which do not change its result."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ..core.catalog import Catalog
from ..distributed.environment import part_of
from ..distributed.partition import Part
from ..planning.copies import BLOCK_BYTES
from ..planning.plan import block_bytes_for
from ..storage.resources import Budget, default_budget, default_workers, fit_budget


@dataclass(frozen=True)
class Options:
    """How a conversion runs; none of these change the result.

    Attributes:
        workers: threads; by default one a core, at most 8.
        host_bytes: the most memory for data in flight; by default 256 MiB or a
            sixteenth of the machine's memory, whichever is less.
        resume: go on with an interrupted run.
        overwrite: replace an existing destination, if it is a checkpoint.
        durable: have every file on the disk (fsync) before the result appears.
        part: make one part only, of several that as many processes make on a disk they
            share. The last to be done publishes; a part begun again goes on. ``"auto"``
            asks ``jax.distributed``, or the environment of the job.
        check_replicas: before anything is written, read all that the source stores several
            times, and refuse it where that differs. Otherwise the first replica is taken.
    """

    workers: int | None = None
    host_bytes: int | None = None
    resume: bool = False
    overwrite: bool = False
    durable: bool = True
    part: Part | Literal["auto"] | None = None
    check_replicas: bool = False


_NAMES = frozenset(field.name for field in fields(Options))


def with_given(options: Options, how: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """``options`` with those of ``how`` that are such, and the rest of it.

    >>> with_given(Options(), {"overwrite": True, "exclude": "lora"})[1]
    {'exclude': 'lora'}
    """
    given = {name: value for name, value in how.items() if name in _NAMES}
    return replace(options, **given), {n: v for n, v in how.items() if n not in given}


def chosen_part(options: Options) -> Part | None:
    """The part that ``options`` mean (errors as ``part_of``)."""
    if options.part == "auto":
        return part_of("auto", "auto", os.environ)
    return options.part


def budget_of(options: Options, source: Catalog | None = None) -> Budget:
    """Threads, and the blocks that suit ``source``, as ``options`` allow.

    Raises:
        LayoutError: as ``fit_budget``.
    """
    host_bytes = default_budget() if options.host_bytes is None else options.host_bytes
    workers = default_workers() if options.workers is None else options.workers
    return fit_budget(host_bytes, workers, block_bytes_for(source) if source else BLOCK_BYTES)
