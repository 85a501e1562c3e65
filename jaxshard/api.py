"""The verbs as functions: each a few lines that compose the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .catalog import Catalog
from .conversion import Options, Report, budget_of, execute, prepare
from .layout import Layout
from .opening import PathLike, open_checkpoint
from .planning import Plan
from .strategy import Strategy
from .verification import Verdict, verify_against
from .verification import verify as verify_alone

To = str | PathLike | Strategy | Layout
_DEFAULT = Options()


def open(path: PathLike, *, strategy: PathLike | None = None, suffix: str | None = None) -> Catalog:
    """The contents of the checkpoint at ``path``, from headers only; see ``open_checkpoint``."""
    return open_checkpoint(path, strategy=strategy, suffix=suffix)


def plan(source: Catalog | PathLike, to: To = "full", **how: Any) -> Plan:
    """What ``convert`` with the same arguments would read, copy and write; nothing is done."""
    return prepare(source, to, **how).plan


def convert(
    source: Catalog | PathLike,
    destination: PathLike,
    to: To = "full",
    *,
    options: Options = _DEFAULT,
    progress: Callable[[int], Callable[[int], None]] | None = None,
    **how: Any,
) -> Report:
    """Make ``destination`` from ``source``, laid out as ``to`` says.

    Args:
        source: a checkpoint, or its path.
        destination: a folder; it appears whole or not at all.
        to: ``"full"``, a strategy (``"dp2mp4pp2"``), strategy files, or a ``Layout``.
        options: threads, memory, resuming, overwriting, durability.
        progress: given the bytes to write, returns a function told of those written.
        how: as for ``prepare``: include, exclude, ranks, rules, remove_redundancy …

    Raises:
        JaxshardError: its five kinds say what to do; see ``errors``.
    """
    return execute(prepare(source, to, **how), destination, options=options, progress=progress)


def merge(source: Catalog | PathLike, destination: PathLike, **how: Any) -> Report:
    """``convert`` to one complete checkpoint."""
    return convert(source, destination, "full", **how)


def slice(source: Catalog | PathLike, destination: PathLike, to: To, **how: Any) -> Report:
    """``convert`` to one file a rank."""
    return convert(source, destination, to, **how)


def verify(
    checkpoint: Catalog | PathLike,
    against: Catalog | PathLike | None = None,
    *,
    options: Options = _DEFAULT,
    progress: Callable[[int], None] | None = None,
) -> Verdict:
    """Whether a checkpoint is whole and its replicas agree, and equals ``against`` if given."""
    budget = budget_of(options)
    catalog = _opened(checkpoint)
    verdict = verify_alone(catalog, budget=budget, progress=progress)
    if against is None or verdict.problems:
        return verdict
    return verify_against(catalog, _opened(against), budget=budget, progress=progress)


def _opened(checkpoint: Catalog | PathLike) -> Catalog:
    return checkpoint if isinstance(checkpoint, Catalog) else open_checkpoint(checkpoint)
