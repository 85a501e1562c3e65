"""Requests to save a step, and the files they make.

    manager's options, state, step  ──►  SaveRequest  ──►  StepParts  ──►  files, checksums

The checksum of a block is computed while the block is in the cache of the core that copies it.
This module decides nothing about other steps of the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import rules as family_rules
from ..conversion.targets import make_result
from ..core.catalog import Catalog, Tensor, log_once
from ..core.layout import Layout, Strategy
from ..core.numpy_dtypes import stored_as
from ..devices.host_shards import Snapshot, SnapshotMode
from ..devices.mesh import layout_of
from ..errors import StorageError
from ..formats.output_files import Request, Result
from ..formats.rank_folder import STRATEGY_FOLDER
from ..formats.registry import Format
from ..planning.copies import TensorCopy
from ..planning.plan import Plan, make_plan
from ..storage.checksums import FileSums, Gathered
from ..storage.engine import run
from ..storage.fs import check_free_space
from ..storage.io import Sink, Source
from ..storage.resources import Budget
from ..storage.transaction import Transaction
from ..storage.writers import OutputFiles, write_files
from . import records
from .commit_step import Claim
from .open_step import STATE_FOLDER
from .policy import Lineage, RetentionPolicy
from .records import StepName
from .restore_state import lay_out
from .run_directory import RunDirectory
from .state import Array, Roles, StateLeaf, as_array, is_number, take_apart


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """Options that all steps of a manager share; ``CheckpointManager`` documents them.

    Attributes:
        trainable: patterns of the names of trainable weights; empty if all weights are.
        config: contents of ``config.json``.
    """

    prefix: str
    format: Format
    steps_per_epoch: int | None
    global_batch_size: int | None
    strategy: str | Strategy | Layout | None
    rules: family_rules.Rules | None
    remove_redundancy: bool
    save_optimizer: bool
    save_network_only: bool
    save_trainable_only: bool
    trainable: tuple[re.Pattern[str], ...]
    snapshot: SnapshotMode
    roles: Roles
    rename: Callable[[str], str] | None
    config: bytes | None
    retention: RetentionPolicy
    durable: bool
    workers: int | None
    host_bytes: int | None

    def copies(self, weights: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the folders of further copies, each with the names of its tensors."""
        ordered = sorted(weights)
        if self.save_trainable_only:
            names = [n for n in ordered if not self.trainable or self._is_trainable(n)]
            return {records.TRAINABLE: tuple(names)}
        return {records.NETWORK: tuple(ordered)} if self.save_network_only else {}

    def _is_trainable(self, name: str) -> bool:
        return any(pattern.search(name) for pattern in self.trainable)


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """One step to save, independent of the training loop.

    Attributes:
        layout: of all tensors, for formats with a file for each rank.
        weights: names of the tensors that are the model's.
        scalars: names of small tensors that no strategy splits.
        numbers: the job's training scalars, for formats that keep them in JSON.
        copies: further copies: a folder, and the names of the tensors in it.
        extras: values of the training loop that JSON can hold.
        after: lineage of the step that this one continues, if the manager knows it.
        claim: which existing files the step may replace.
    """

    directory: RunDirectory
    options: SaveOptions
    step: StepName
    global_step: int
    layout: Layout
    snapshot: Snapshot
    weights: frozenset[str]
    scalars: frozenset[str]
    numbers: Mapping[str, Any]
    copies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    after: Lineage | None = None
    claim: Claim = Claim()  # noqa: RUF009 - frozen

    @property
    def folder(self) -> str:
        """Folder of the step, if it is one folder named by prefix and step."""
        return f"{records.CHECKPOINT}/{records.step_folder(self.options.prefix, self.step)}"


def compose_request(
    directory: RunDirectory,
    options: SaveOptions,
    step: int,
    state: Any,
    *,
    extras: Mapping[str, Any],
    loss_scale: float | None,
    after: Lineage | None,
) -> SaveRequest:
    """Take a snapshot of ``state`` and describe how it is saved as number ``step`` of the run.

    Raises:
        LayoutError: the format cannot store the state.
    """
    leaves = [
        leaf
        for leaf in take_apart(state, options.roles, options.rename).leaves
        if options.save_optimizer or leaf.role != "optimizer"
    ]
    arrays = {leaf.name: as_array(leaf.value) for leaf in leaves}
    weights = frozenset(leaf.name for leaf in leaves if leaf.role == "weights")
    options.format.check_shapes({name: array.shape for name, array in arrays.items()})
    numbers = {
        "epoch_num": records.step_name(step, options.steps_per_epoch).epoch,
        "step_num": step,
        "global_step": step,
        "loss_scale": loss_scale,
        "global_batch_size": options.global_batch_size,
    }
    like = _laid_out_like(options, leaves, arrays)
    known = weights | like.keys()
    scalars = {n for n, a in arrays.items() if n not in known and is_number(a)}
    if not options.format.scalars_in_json:
        added = {n: a for n, a in _number_tensors(numbers).items() if n not in arrays}
        arrays |= added
        scalars |= added.keys()
    # Checkpoint-2.0 folders are named by the step of the whole run
    epochs = None if options.format.own_step_folder else options.steps_per_epoch
    return SaveRequest(
        directory=directory,
        options=options,
        step=records.step_name(step, epochs),
        global_step=step,
        layout=_layout(options, arrays, frozenset(scalars), like),
        snapshot=Snapshot(arrays, mode=options.snapshot),  # last: it copies
        weights=weights,
        scalars=frozenset(scalars),
        numbers=numbers,
        copies=options.copies(weights),
        extras=extras,
        after=after,
    )


def _laid_out_like(
    options: SaveOptions, leaves: Iterable[StateLeaf], arrays: Mapping[str, Array]
) -> dict[str, str]:
    """Return optimizer tensors with their weights of the same shape: both are split alike."""
    known = options.strategy.placements if isinstance(options.strategy, Layout) else arrays
    return {
        leaf.name: leaf.like
        for leaf in leaves
        if leaf.like and leaf.name in known
        if arrays[leaf.name].shape == arrays[leaf.like].shape
    }


def _layout(
    options: SaveOptions,
    arrays: Mapping[str, Array],
    scalars: frozenset[str],
    like: Mapping[str, str],
) -> Layout:
    strategy = options.strategy
    if strategy is None:
        return layout_of(arrays)
    if isinstance(strategy, Layout):
        return strategy
    strategy = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    # rules need names and shapes only
    tensors = {n: Tensor(n, stored_as(a.dtype), a.shape, ()) for n, a in arrays.items()}
    described = Catalog("memory", "arrays", (), tensors, scalars=scalars)
    return lay_out(described, like, strategy, options.rules)


def _number_tensors(numbers: Mapping[str, Any]) -> dict[str, Array]:
    """Return the job's training scalars as the tensors that MindFormers stores."""
    kinds = {
        "epoch_num": (np.int64, ()),
        "step_num": (np.int64, ()),
        "global_step": (np.int32, (1,)),
        "loss_scale": (np.float32, ()),
        "global_batch_size": (np.int64, ()),
    }
    return {
        name: np.full(shape, numbers[name], dtype)
        for name, (dtype, shape) in kinds.items()
        if numbers.get(name) is not None
    }


# --- Parts: the files of a step


@dataclass(frozen=True)
class StepPart:
    """Files that one plan writes, from some of the tensors.

    Attributes:
        result: the files, with paths relative to the run's directory.
        catalog: the tensors.
        units: files or folders that are renamed into place.
        strategy: the strategy files by name, if it has any; they are kept by content.
    """

    result: Result
    catalog: Catalog
    units: tuple[str, ...]
    strategy: Mapping[str, bytes] = field(default_factory=dict)


def parts_of(request: SaveRequest) -> list[StepPart]:
    """Return the files of a step and of its further copies.

    If the format has an own library, which writes the step, these are the copies only.

    Raises:
        LayoutError: the layout does not fit the tensors.
    """
    format = request.options.format
    catalog = replace(request.snapshot.catalog, scalars=request.scalars)
    if format.own_library:
        found = []
    elif format.steps_in_names:
        found = [_rank_part(request, catalog, records.CHECKPOINT)]
    elif format.own_step_folder:
        found = [_own_folder(request, catalog)]
    else:
        found = _complete(request, catalog)
    found += [_copy(request, catalog, folder, names) for folder, names in request.copies.items()]
    for part in found:
        for note in part.result.outputs.layout.notes:
            log_once(str(request.directory.root), note)
    return found


def units_of(parts: Iterable[StepPart]) -> tuple[str, ...]:
    """Return the files and folders of ``parts`` that are renamed into place."""
    return tuple(dict.fromkeys(unit for part in parts for unit in part.units))


def _copy(request: SaveRequest, catalog: Catalog, folder: str, names: Sequence[str]) -> StepPart:
    """Return the files of a further copy: by rank if the step is, else complete."""
    format, chosen = request.options.format, _only(catalog, names)
    if format.is_by_rank:
        # the layout contains training scalars, which are not weights
        return _rank_part(request, replace(chosen, scalars=catalog.scalars), folder)
    suffix = folder.removeprefix(f"{records.CHECKPOINT}_")
    place = f"{folder}/{request.options.prefix}-{suffix}-{request.step}"
    name = None if format.own_library else format.name
    return _complete_part(name, chosen, request.options.config, place)


def _rank_part(request: SaveRequest, catalog: Catalog, folder: str) -> StepPart:
    options, layout = request.options, request.layout
    how = Request(layout, remove_redundancy=options.remove_redundancy)
    result = make_result(catalog, list(catalog.tensors.values()), how)
    paths = tuple(
        f"{folder}/{records.rank_file(options.prefix, rank, request.step, folder)}"
        for rank in range(layout.num_ranks)
    )
    head = f"{STRATEGY_FOLDER}/"
    strategy = {
        path.removeprefix(head): data
        for path, data in result.side_files.items()
        if path.startswith(head)
    }
    outputs = replace(result.outputs, paths=paths)
    return StepPart(replace(result, outputs=outputs, side_files={}), catalog, paths, strategy)


def _own_folder(request: SaveRequest, catalog: Catalog) -> StepPart:
    options = request.options
    how = Request(
        request.layout,
        prefix=options.prefix,
        remove_redundancy=options.remove_redundancy,
        format=options.format.name,
        numbers=request.numbers,
    )
    result = make_result(catalog, list(catalog.tensors.values()), how)
    result = _below(result, records.CHECKPOINT, but=records.TRACKER)
    folder = f"{records.CHECKPOINT}/{records.iteration_folder(request.global_step)}"
    return StepPart(result, catalog, (folder,))


def _complete(request: SaveRequest, catalog: Catalog) -> list[StepPart]:
    folder, weights, name = request.folder, request.weights, request.options.format.name
    found = []
    if weights:
        config = request.options.config
        found.append(_complete_part(name, _only(catalog, weights), config, folder))
    rest = _only(catalog, [n for n in catalog.tensors if n not in weights])
    if rest.tensors:
        found.append(_complete_part(name, rest, None, f"{folder}/{STATE_FOLDER}"))
    return [replace(part, units=(folder,)) for part in found]


def _complete_part(
    format: str | None, catalog: Catalog, config: bytes | None, folder: str
) -> StepPart:
    every = replace(catalog, scalars=frozenset())  # all tensors go into one kind of file
    result = make_result(every, list(catalog.tensors.values()), Request(format=format))
    if config is not None:
        result = replace(result, side_files={**result.side_files, "config.json": config})
    return StepPart(_below(result, folder), every, (folder,))


def _below(result: Result, folder: str, but: str = "") -> Result:
    """Return ``result`` with paths below ``folder``, without the side file ``but``."""
    outputs = replace(result.outputs, paths=tuple(f"{folder}/{p}" for p in result.outputs.paths))
    side = {f"{folder}/{p}": data for p, data in result.side_files.items() if p != but}
    return replace(result, outputs=outputs, side_files=side)


def _only(catalog: Catalog, names: Iterable[str]) -> Catalog:
    wanted = set(names)
    # in the order of the catalog: the order of a set differs between processes
    tensors: dict[str, Tensor] = {n: t for n, t in catalog.tensors.items() if n in wanted}
    return replace(catalog, tensors=tensors, scalars=catalog.scalars & tensors.keys())


# --- Writing the parts of a step, with checksums


def write_parts(
    parts: Sequence[StepPart], staging: Transaction, source: Source, budget: Budget
) -> tuple[dict[str, FileSums], str]:
    """Write the files of ``parts`` into ``staging``; return their checksums and the algorithm.

    Raises:
        StorageError: the disk is full or refuses.
    """
    plans = [make_plan(part.catalog, part.result.outputs) for part in parts]
    check_room(staging.files, sum(plan.totals.bytes_written for plan in plans))
    gathered = Gathered()
    found: dict[str, FileSums] = {}
    for part, plan in zip(parts, plans, strict=True):
        files = OutputFiles(plan, staging, part.result.container)
        try:
            summed = _Summed(files, plan, part, gathered)
            run(plan.moves(), source, summed, budget=budget)
        finally:
            files.close()
        found |= summed.sums()
    return found | write_side_files(parts, staging, gathered), gathered.algorithm


def write_side_files(
    parts: Iterable[StepPart], staging: Transaction, gathered: Gathered
) -> dict[str, FileSums]:
    """Write the files of ``parts`` that hold no tensors; return their checksums.

    Raises:
        StorageError: the disk is full or refuses.
    """
    found = {}
    for part in parts:
        side_files = part.result.side_files
        write_files(side_files.items(), staging.files, staging.sync)
        for path, data in side_files.items():
            gathered.add(path, 0, data)
            found[path] = gathered.of(path, len(data))
    return found


def sums_of(root: Path, paths: Iterable[str]) -> tuple[dict[str, FileSums], str]:
    """Return the checksums of finished files, by reading them again, and the algorithm.

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
    """Check that a step of ``num_bytes`` fits at ``place`` (errors as ``check_free_space``)."""
    check_free_space(place, num_bytes, "step", "Make room, keep fewer steps, or save elsewhere.")


class _Summed(Sink):
    """Sink that computes the checksums of a plan's files."""

    def __init__(self, files: OutputFiles, plan: Plan, part: StepPart, gathered: Gathered) -> None:
        outputs = plan.outputs
        self._files = files
        self._paths, self._content_of, self._gathered = outputs.paths, outputs.content_of, gathered
        self._layouts = [part.result.container.layout(c) for c in outputs.contents]
        for path, content in zip(self._paths, self._content_of, strict=True):
            for offset, data in self._layouts[content].segments:
                gathered.add(path, offset, data)

    def write(self, move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        """Write ``buffer`` to the file of every rank that holds the box, with checksums."""
        total = self._gathered.compute(buffer)  # replicas share it
        for rank in move.targets[target].ranks:
            spans = self._layouts[self._content_of[rank]].spans(move.name, offset, len(buffer))
            done = 0
            for at, length in spans:
                whole = length == len(buffer)
                value = total if whole else self._gathered.compute(buffer[done : done + length])
                self._gathered.add_sum(self._paths[rank], at, length, value)
                done += length
        return self._files.write(move, target, offset, buffer)

    def sums(self) -> dict[str, FileSums]:
        """Return the checksums of every file."""
        return {
            path: self._gathered.of(path, self._layouts[content].num_bytes)
            for path, content in zip(self._paths, self._content_of, strict=True)
        }
