"""Files of a step, with their checksums.

The engine hands over blocks while they are in the cache of the core that carries them; the
checksum is taken there, so that it costs no second look at memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..conversion.targets import make_result
from ..core.catalog import Catalog, Tensor
from ..core.layout import Layout
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
from ..storage.resources import LENT_BLOCK_BYTES, budget_for
from ..storage.transaction import Staging
from ..storage.writers import OutputFiles
from . import records
from .open_step import STATE_FOLDER
from .records import StepName


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be saved, apart from the arrays.

    Attributes:
        layout: who holds what, for formats that are cut into ranks.
        numbers: the job's numbers, for formats that keep them in JSON.
        config: what the model is, for ``config.json``.
    """

    prefix: str
    step: StepName
    global_step: int
    layout: Layout
    remove_redundancy: bool = False
    numbers: Mapping[str, Any] = field(default_factory=dict)
    config: bytes | None = None


@dataclass(frozen=True)
class Part:
    """Files made at one go, from some of the tensors.

    Attributes:
        result: the files, with paths relative to the run's directory.
        catalog: the tensors.
        units: what of it is put in place at once.
        strategy: the strategy files by name, if it has any: they are kept by content.
    """

    result: Result
    catalog: Catalog
    units: tuple[str, ...]
    strategy: Mapping[str, bytes] = field(default_factory=dict)


def parts_of(format: Format, catalog: Catalog, weights: frozenset[str], wish: Wish) -> list[Part]:
    """The files of a step in ``format``.

    Raises:
        LayoutError: the layout does not fit the tensors.
    """
    if format.steps_in_names:
        return [_rank_part(catalog, wish, records.CHECKPOINT)]
    if format.own_step_folder:
        return [_own_folder(format, catalog, wish)]
    return _complete(format, catalog, weights, wish)


def copies_of(
    format: Format, catalog: Catalog, names: Iterable[str], wish: Wish, folder: str
) -> list[Part]:
    """The tensors ``names`` again in ``folder``: by rank where the step is, else complete.

    Raises:
        LayoutError: the layout does not fit the tensors.
    """
    chosen = _only(catalog, names)
    if format.is_by_rank:
        # the job's numbers are no weights here either, though the layout has them
        return [_rank_part(replace(chosen, scalars=catalog.scalars), wish, folder)]
    suffix = folder.removeprefix(f"{records.CHECKPOINT}_")
    name = None if format.own_library else format.name
    return [_complete_part(name, chosen, wish, f"{folder}/{wish.prefix}-{suffix}-{wish.step}")]


def _rank_part(catalog: Catalog, wish: Wish, folder: str) -> Part:
    request = Request(wish.layout, remove_redundancy=wish.remove_redundancy)
    result = make_result(catalog, list(catalog.tensors.values()), request)
    paths = [
        f"{folder}/{records.rank_file(wish.prefix, rank, wish.step, folder)}"
        for rank in range(wish.layout.num_ranks)
    ]
    head = f"{STRATEGY_FOLDER}/"
    strategy = {
        path.removeprefix(head): data
        for path, data in result.side_files.items()
        if path.startswith(head)
    }
    outputs = replace(result.outputs, paths=tuple(paths))
    return Part(replace(result, outputs=outputs, side_files={}), catalog, tuple(paths), strategy)


def _own_folder(format: Format, catalog: Catalog, wish: Wish) -> Part:
    request = Request(
        wish.layout,
        prefix=wish.prefix,
        remove_redundancy=wish.remove_redundancy,
        format=format.name,
        numbers=wish.numbers,
    )
    result = make_result(catalog, list(catalog.tensors.values()), request)
    result = _below(result, records.CHECKPOINT, but=records.TRACKER)
    folder = f"{records.CHECKPOINT}/{records.iteration_folder(wish.global_step)}"
    return Part(result, catalog, (folder,))


def _complete(format: Format, catalog: Catalog, weights: frozenset[str], wish: Wish) -> list[Part]:
    folder = f"{records.CHECKPOINT}/{records.step_folder(wish.prefix, wish.step)}"
    found = []
    if weights:
        found.append(_complete_part(format.name, _only(catalog, weights), wish, folder))
    rest = _only(catalog, [n for n in catalog.tensors if n not in weights])
    if rest.tensors:
        inner = replace(wish, config=None)
        found.append(_complete_part(format.name, rest, inner, f"{folder}/{STATE_FOLDER}"))
    return [replace(part, units=(folder,)) for part in found]


def _complete_part(format: str | None, catalog: Catalog, wish: Wish, folder: str) -> Part:
    every = replace(catalog, scalars=frozenset())  # one kind of file, whatever is in it
    result = make_result(every, list(catalog.tensors.values()), Request(format=format))
    if wish.config is not None:
        result = replace(result, side_files={**result.side_files, "config.json": wish.config})
    return Part(_below(result, folder), every, (folder,))


def _below(result: Result, folder: str, but: str = "") -> Result:
    """``result`` with its paths below ``folder``, and without the side file ``but``."""
    outputs = replace(result.outputs, paths=tuple(f"{folder}/{p}" for p in result.outputs.paths))
    side = {f"{folder}/{p}": data for p, data in result.side_files.items() if p != but}
    return replace(result, outputs=outputs, side_files=side)


def _only(catalog: Catalog, names: Iterable[str]) -> Catalog:
    wanted = set(names)
    # in the catalog's order: that of a set differs between processes, and so would the files
    tensors: dict[str, Tensor] = {n: t for n, t in catalog.tensors.items() if n in wanted}
    return replace(catalog, tensors=tensors, scalars=catalog.scalars & tensors.keys())


# --- Writing: a snapshot becomes the files of a step, and each byte is summed on its way


def write_parts(
    parts: Sequence[Part],
    staging: Staging,
    source: Source,
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
        files = OutputFiles(plan, staging, part.result.container)
        try:
            summed = _Summed(files, plan, part, gathered)
            run(plan.moves(), source, summed, budget=budget)
        finally:
            files.close()
        found |= summed.sums()
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
    """Check that a step of ``num_bytes`` fits at ``place`` (errors as ``check_free_space``)."""
    remedy = "Make room, keep fewer steps, or save elsewhere."
    check_free_space(place, num_bytes, "step", remedy)


class _Summed(Sink):
    """Files of a plan, and the checksums of all that is written to them."""

    def __init__(self, files: OutputFiles, plan: Plan, part: Part, gathered: Gathered) -> None:
        outputs = plan.outputs
        self._files = files
        self._paths, self._content_of, self._gathered = outputs.paths, outputs.content_of, gathered
        self._layouts = [part.result.container.layout(c) for c in outputs.contents]
        for path, content in zip(self._paths, self._content_of, strict=True):
            for offset, data in self._layouts[content].segments:
                gathered.add(path, offset, data)

    def write(self, move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        """Sum ``buffer`` and write it to the file of every rank that holds the box."""
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
        """The checksums of every file."""
        return {
            path: self._gathered.of(path, self._layouts[content].num_bytes)
            for path, content in zip(self._paths, self._content_of, strict=True)
        }
