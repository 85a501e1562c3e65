"""Opening and examination of a step, and of the newest good step below a path.

The folder of a rank holds many steps, and the strategy files of a directory describe only the
newest. So a step is opened with its own files and its own strategy. The formats read the headers.

    rank_0/llama_rank_0-1_20.ckpt   rank_1/llama_rank_1-1_20.ckpt (truncated)    passed over
    rank_0/llama_rank_0-1_10.ckpt   rank_1/llama_rank_1-1_10.ckpt                opened
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import (
    dataclass,
    replace,
)
from pathlib import Path

from ..conversion.open import (
    open_checkpoint,
    open_some,
    open_strategy,
    strategy_of,
)
from ..conversion.select import refuse_lost
from ..core.catalog import Catalog, File
from ..core.layout import Layout
from ..errors import (
    CoverageError,
    FormatError,
    JaxshardError,
    NotFoundError,
    StorageError,
)
from ..formats import rank_folder, rank_names
from ..formats.folder import Folder, MemoryFolder
from ..formats.registry import Format, format_of
from ..storage.checksums import (
    check_files,
)
from ..storage.local import LocalFolder
from ..storage.readers import open_source
from . import records
from .records import Record, is_strategy_file, kept_strategy
from .run_directory import RunDirectory
from .steps import RunStep, find_steps, of_one_job

STATE_FOLDER = "training_state"  # in a complete checkpoint: all tensors but the weights


class FolderSubset:
    """Folder that contains some of the files of another."""

    def __init__(self, folder: Folder, paths: Iterable[str]) -> None:
        listed = folder.files()
        self._folder = folder
        self._files = {path: listed[path] for path in sorted(paths) if path in listed}

    @property
    def root(self) -> str:
        """The folder of the files."""
        return self._folder.root

    def files(self) -> Mapping[str, File]:
        """The files by path."""
        return self._files

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Read bytes of a file."""
        return self._folder.read(path, offset, length)


def open_step(
    run: RunDirectory, record: Record | None, kind: str, paths: tuple[str, ...] = ()
) -> Catalog:
    """Return the catalog of a step, from headers only.

    Args:
        run: the run's directory.
        record: of the step; None if it is foreign.
        kind: name of its format.
        paths: without a record: its files, or its folder, below ``run.steps``.

    Raises:
        FormatError: a file is damaged.
        CoverageError: files contradict each other, or the strategy is missing.
        NotFoundError: a file is missing.
        StorageError: the disk refuses.
    """
    if record:
        head = f"{run.main}/" if run.main else ""
        paths = tuple(u.removeprefix(head) for u in record.units if u.startswith(head))
    if not paths:
        raise FormatError(f"a step of {run.root} has no files.")
    format = format_of(kind)
    if format.steps_in_names:
        return _open_ranks(run, record, paths)
    where = run.steps / paths[0]
    if format.own_library or format.own_step_folder or not format.is_complete:
        return open_checkpoint(where)
    folder = LocalFolder(where)
    try:
        return _open_complete(format, folder)
    finally:
        folder.close()


def _open_ranks(run: RunDirectory, record: Record | None, paths: tuple[str, ...]) -> Catalog:
    layout = _layout(run, record, len(paths))
    if record and layout.num_ranks != len(paths):
        raise CoverageError(
            f"step {record.step} has {len(paths)} rank files (expected {layout.num_ranks}, the "
            "ranks of its strategy)."
        )
    folder = LocalFolder(run.steps, paths)  # other files may be incomplete now
    try:
        catalog = rank_folder.read(folder, layout)
    finally:
        folder.close()
    refuse_lost(catalog)  # a step that lacks a stage is incomplete
    return catalog


def _layout(run: RunDirectory, record: Record | None, num_ranks: int) -> Layout:
    if record and record.strategy:
        return strategy_of(_kept_strategy(run, record.strategy, num_ranks))
    for place in run.strategies:
        if place.is_dir():
            return open_strategy(place)
    raise CoverageError(
        f"{run.root} has no {records.STRATEGY}/ folder, so the part of a tensor that each rank "
        "holds is unknown. Put the strategy files there."
    )


def _kept_strategy(run: RunDirectory, kept: str, num_ranks: int) -> Folder:
    """Return the strategy files of a step, intact.

    They are stored by content, so damage is detected; those of the newest layout are in
    ``strategy/`` too. Foreign files in both folders are ignored.
    """
    for place in (run.root / kept, run.root / records.STRATEGY):
        try:
            names = [p for p in place.iterdir() if is_strategy_file(p.name) and p.is_file()]
            held = {path.name: path.read_bytes() for path in names}
        except OSError:
            continue
        files = kept_strategy(held, kept, num_ranks)
        if files is not None:
            return MemoryFolder(files, str(place))
    raise FormatError(
        f"the strategy files of {kept} are missing or damaged, so the part of a tensor that each "
        "rank holds is unknown. Restore another step."
    )


def _open_complete(format: Format, folder: LocalFolder) -> Catalog:
    """Return the weights of a complete checkpoint, and the rest of the state."""
    listed = folder.files()
    below = [p for p in listed if p.startswith(f"{STATE_FOLDER}/")]
    found: Catalog | None = None
    top = FolderSubset(folder, [p for p in listed if "/" not in p])
    if format.recognise(top, top.files()):
        found = format.read(top)
    if not below:
        if found is None:
            raise NotFoundError(f"{folder.root} has no weight files.")
        return found
    inner = LocalFolder(Path(folder.root) / STATE_FOLDER)
    try:
        rest = format.read(inner)
    finally:
        inner.close()
    rest = replace(
        rest, files=tuple(replace(f, path=f"{STATE_FOLDER}/{f.path}") for f in rest.files)
    )
    if found is None:
        return replace(rest, root=folder.root)
    return _together(found, rest)


def _together(a: Catalog, b: Catalog) -> Catalog:
    """Combine two catalogs below one root."""
    twice = a.tensors.keys() & b.tensors.keys()
    if twice:
        raise CoverageError(f"{min(twice)} of {a.root} is stored as a weight and as state.")
    shift = len(a.files)
    moved = {
        t.name: replace(t, shards=tuple(replace(p, file=p.file + shift) for p in t.shards))
        for t in b.tensors.values()
    }
    return replace(
        a, files=(*a.files, *b.files), tensors={**a.tensors, **moved}, scalars=a.scalars | b.scalars
    )


# --- Examination: the headers of a step, and optionally all bytes


def examine(
    run: RunDirectory,
    step: RunStep,
    *,
    deep: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> RunStep:
    """Return ``step`` with its state by headers, and with ``deep`` by all bytes.

    Raises:
        LayoutError: no installed package computes its checksums.
    """
    if step.state != "complete":
        return step
    try:
        if deep and step.record:
            check_files(run.root, step.record.checksums, workers=workers, progress=progress)
        open_step(run, step.record, step.format, step.paths)
    except (CoverageError, NotFoundError) as error:
        return replace(step, state="incomplete", reason=str(error))
    except (FormatError, StorageError) as error:
        return replace(step, state="corrupt", reason=str(error))
    return step


def examine_all(
    run: RunDirectory,
    steps: Iterable[RunStep],
    *,
    deep: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[RunStep]:
    """Examine ``steps``, without those that were removed meanwhile.

    Raises:
        LayoutError: no installed package computes the checksums.
        StorageError: the directory cannot be listed.
    """
    before = list(steps)
    after = [examine(run, step, deep=deep, workers=workers, progress=progress) for step in before]
    if all(a.state == b.state for a, b in zip(after, before, strict=True)):
        return after
    there = {step.identity for step in find_steps(run)}
    pairs = zip(after, before, strict=True)
    return [a for a, b in pairs if a.state == b.state or b.identity in there]


def newest_good(run: RunDirectory, prefix: str = "") -> RunStep | None:
    """Return the step that the job of ``prefix`` continues, by headers; None if no step is good.

    The directory is listed again after each bad step, because retention may have removed it.

    Raises:
        LayoutError: there are steps of several other jobs.
        StorageError: the directory cannot be listed.
    """
    tried: set[object] = set()
    while True:
        steps = of_one_job(find_steps(run), prefix)
        step = next((s for s in reversed(steps) if s.identity not in tried), None)
        if step is None or (found := examine(run, step)).state == "complete":
            return found if step else None
        tried.add(step.identity)


# --- Resuming from the newest good step below a path

_BAD = (FormatError, CoverageError, StorageError, NotFoundError)


@dataclass(frozen=True)
class _ResumableSave:
    """Save that a run may resume from: its name in notes, and a function that opens it."""

    label: str
    open: Callable[[], Catalog]


def open_newest(
    path: Path, *, strategy: Path | None = None, prefix: str = "", kind: str | None = None
) -> Catalog | None:
    """Open the newest good save below ``path``, with a note for each that is passed over.

    Args:
        path: a run's directory, or its folder of steps.
        strategy: the strategy files of the steps, if not their own.
        prefix: the job whose steps count, if several jobs share the folder.
        kind: of rank files, if the folder has both: ``"ckpt"`` or ``"safetensors"``.

    Returns:
        None if no names of steps are found, or those of several jobs or kinds: then the formats
        recognise the checkpoint.

    Raises:
        JaxshardError: the error of the newest save, if no save is good.
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
    """Return ``catalog`` after a check of the checksums in its files."""
    files = open_source(catalog)
    try:
        files.check_checksums()
    finally:
        files.close()
    return catalog


def _saves(
    path: Path, strategy: Path | None, prefix: str, kind: str | None
) -> Iterator[_ResumableSave]:
    """Yield the saves below ``path``, the newest first."""
    if not path.is_dir():
        return
    run = RunDirectory.of(path)
    steps = [s for s in find_steps(run) if not s.format or format_of(s.format).is_by_rank]
    if kind is not None and len(_kinds(steps)) > 1:
        steps = [step for step in steps if _kinds([step]) <= {kind}]
    if not any(step.format for step in steps):
        yield from _unnamed(path, strategy)
        return
    jobs = {step.prefix for step in steps if step.prefix}
    if len(_kinds(steps)) > 1 or (len(jobs) > 1 and prefix not in jobs):
        return
    for step in reversed(of_one_job(steps, prefix)):
        yield _save_of(run, step, strategy)


def _kinds(steps: Iterable[RunStep]) -> set[str]:
    """Return the kinds of the rank files of ``steps``."""
    paths = [
        path for step in steps for path in _paths(step) if format_of(step.format).steps_in_names
    ]
    return {path.rpartition(".")[2] for path in paths}


def _paths(step: RunStep) -> tuple[str, ...]:
    """Return the files or the folder of a step, relative to the folder of steps."""
    if step.record is None:
        return step.paths
    head = f"{records.CHECKPOINT}/"
    return tuple(u.removeprefix(head) for u in step.record.units if u.startswith(head))


def _save_of(run: RunDirectory, step: RunStep, strategy: Path | None) -> _ResumableSave:
    def opened() -> Catalog:
        if step.state != "complete":
            error = CoverageError if step.state == "incomplete" else FormatError
            raise error(f"it is {step.state}: {step.reason}")
        paths = _paths(step)
        if format_of(step.format).own_step_folder:
            return open_checkpoint(run.steps / paths[0], src_strategy=strategy)
        if step.record and strategy is None:
            return open_step(run, step.record, step.format)
        return open_some(run.steps, paths, src_strategy=strategy)

    return _ResumableSave(str(step.name), opened)


def _unnamed(path: Path, strategy: Path | None) -> Iterator[_ResumableSave]:
    """Yield saves of rank files whose names do not have MindFormers' form."""
    for place in (path, path / records.CHECKPOINT):
        left = set(LocalFolder(place).files()) if place.is_dir() else set[str]()
        while any(map(rank_names.is_rank_file, left)):
            try:
                names = tuple(rank_names.choose(left).paths.values())
            except CoverageError:
                return  # the formats report why
            left -= {*names}
            yield _named(place, names, strategy)


def _named(place: Path, names: tuple[str, ...], strategy: Path | None) -> _ResumableSave:
    return _ResumableSave(names[0], lambda: open_some(place, names, src_strategy=strategy))
