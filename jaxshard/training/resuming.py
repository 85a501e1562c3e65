"""Resuming from the newest good step below a path.

    rank_0/llama_rank_0-1_20.ckpt   rank_1/llama_rank_1-1_20.ckpt (cut short)    passed over
    rank_0/llama_rank_0-1_10.ckpt   rank_1/llama_rank_1-1_10.ckpt                opened

The steps and their order are those of ``steps``: what a run left behind comes last. Where names of
rank files do not have MindFormers' form, the names of all ranks tell the saves. A step is good if
its headers are, and the checksums that its files carry. This module loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..conversion.open import open_checkpoint, open_some
from ..core.catalog import Catalog
from ..errors import CoverageError, FormatError, JaxshardError, NotFoundError, StorageError
from ..formats import rank_names
from ..formats.registry import format_of
from ..storage.local import LocalFolder
from ..storage.readers import open_source
from . import naming
from .open_step import open_step
from .run_directory import Places
from .steps import Step, find_steps, of_one_job

_BAD = (FormatError, CoverageError, StorageError, NotFoundError)


@dataclass(frozen=True)
class _Save:
    """One save that may be resumed from: what notes call it, and how it is opened."""

    label: str
    open: Callable[[], Catalog]


def open_newest(
    path: Path, *, strategy: Path | None = None, prefix: str = "", kind: str | None = None
) -> Catalog | None:
    """Open the newest good save below ``path``, with a note for each that is passed over.

    Args:
        path: a run's directory, or its folder of steps.
        strategy: the strategy files that the steps were saved with, if not their own.
        prefix: whose steps count, where several jobs share the folder.
        kind: of rank files, where both lie there: ``"ckpt"`` or ``"safetensors"``.

    Returns:
        None where the names are those of no steps, or of several jobs or kinds: then the formats
        decide what the checkpoint is.

    Raises:
        JaxshardError: what is wrong with the newest save, if none is good.
    """
    notes: list[str] = []
    failure: JaxshardError | None = None
    for save in _saves(path, strategy, prefix, kind):
        try:
            catalog = _examined(save.open())
        except _BAD as error:
            failure = failure or error
            notes.append(f"step {save.label} is passed over: {error}")
            continue
        if notes:
            notes.append(f"step {save.label} is resumed from instead.")
        return replace(catalog, notes=(*notes, *catalog.notes))
    if failure:
        raise failure
    return None


def _examined(catalog: Catalog) -> Catalog:
    """``catalog``, of which the checksums that its files carry are right."""
    files = open_source(catalog)
    try:
        files.check_checksums()
    finally:
        files.close()
    return catalog


def _saves(path: Path, strategy: Path | None, prefix: str, kind: str | None) -> Iterator[_Save]:
    """The saves below ``path``, the newest first."""
    if not path.is_dir():
        return
    places = Places.of(path)
    steps = [s for s in find_steps(places) if not s.format or format_of(s.format).is_by_rank]
    if kind is not None and len(_kinds(steps)) > 1:
        steps = [step for step in steps if _kinds([step]) <= {kind}]
    if not any(step.format for step in steps):
        yield from _unnamed(path, strategy)
        return
    jobs = {step.prefix for step in steps if step.prefix}
    if len(_kinds(steps)) > 1 or (len(jobs) > 1 and prefix not in jobs):
        return
    for step in reversed(of_one_job(steps, prefix)):
        yield _save_of(places, step, strategy)


def _kinds(steps: Iterable[Step]) -> set[str]:
    """The kinds of the rank files of ``steps``."""
    paths = [
        path for step in steps for path in _paths(step) if format_of(step.format).steps_in_names
    ]
    return {path.rpartition(".")[2] for path in paths}


def _paths(step: Step) -> tuple[str, ...]:
    """The files or the folder of a step, relative to the folder of steps."""
    if step.record is None:
        return step.paths
    head = f"{naming.CHECKPOINT}/"
    return tuple(u.removeprefix(head) for u in step.record.units if u.startswith(head))


def _save_of(places: Places, step: Step, strategy: Path | None) -> _Save:
    def opened() -> Catalog:
        if step.state != "complete":
            error = CoverageError if step.state == "incomplete" else FormatError
            raise error(f"it is {step.state}: {step.reason}")
        paths = _paths(step)
        if format_of(step.format).own_step_folder:
            return open_checkpoint(places.steps / paths[0], src_strategy=strategy)
        if step.record and strategy is None:
            return open_step(places, step.record, step.format)
        return open_some(places.steps, paths, src_strategy=strategy)

    return _Save(str(step.name), opened)


def _unnamed(path: Path, strategy: Path | None) -> Iterator[_Save]:
    """The saves of rank files whose names are of another form than MindFormers'."""
    for place in (path, path / naming.CHECKPOINT):
        left = set(LocalFolder(place).files()) if place.is_dir() else set[str]()
        while any(map(rank_names.is_rank_file, left)):
            try:
                names = tuple(rank_names.choose(left).paths.values())
            except CoverageError:
                return  # the formats tell why
            left -= {*names}
            yield _named(place, names, strategy)


def _named(place: Path, names: tuple[str, ...], strategy: Path | None) -> _Save:
    return _Save(names[0], lambda: open_some(place, names, src_strategy=strategy))
