"""Preparation of a conversion: a plan from headers alone, to print or to execute.

What is taken, under which names, laid out how, into which files, and in which blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import rules as family_rules
from ..core.box import Box
from ..core.catalog import Catalog, StoredShard
from ..core.garbage import paused
from ..core.layout import Layout
from ..core.strategy import Strategy
from ..distributed.partition import Part, split_outputs
from ..errors import LayoutError, format_list
from ..formats import rank_names
from ..formats.output_files import Request, Result
from ..formats.registry import find_format, format_of
from ..planning.copies import firsts
from ..planning.plan import Plan, block_bytes_for, make_plan
from ..storage import side_files
from ..storage.places import is_remote
from ..storage.resources import Budget, budget_for, parse_size
from . import targets
from .open import PathLike, opened, read_scalars
from .select import (
    chooser,
    missed,
    refuse_absent,
    refuse_half,
    refuse_lost,
    select,
    takes_whole,
    texts,
    without_merged,
    without_unplaced_states,
)
from .targets import (
    FULL,
    SAME,
    check_factors,
    check_request,
    lay_out_for,
    make_result,
    parse_target,
    same_layout,
    step_of_numbers,
)

if TYPE_CHECKING:
    from ..mapping import Mapping


@paused()
def fingerprint(catalog: Catalog, result: Result, only: frozenset[int] | None) -> str:
    """The fingerprint of making the files ``only`` (all, if None) of ``result``."""
    digest = hashlib.sha256()
    pieces = _Pieces()
    numbers: dict[int, int] = {}  # thousands of contents share their entries: each is told once
    for content in result.outputs.contents:
        texts = []
        for entry in content:
            if id(entry) in numbers:
                continue
            numbers[id(entry)] = len(numbers)
            tensor = entry.tensor
            texts.append(f"{tensor.name} {tensor.dtype.name} {entry.shape}\n")
            texts.append(pieces.told(firsts(tensor.shards)))
        digest.update("".join(texts).encode())
        digest.update(repr([numbers[id(entry)] for entry in content]).encode())
    digest.update(pieces.boxes_told().encode())
    digest.update(repr((result.outputs.paths, result.outputs.content_of)).encode())
    told: dict[int, bytes] = {}  # the ranks of a stage share one strategy
    for name, data in sorted(result.side_files.items()):
        if id(data) not in told:
            told[id(data)] = hashlib.sha256(data).digest()
        digest.update(name.encode() + told[id(data)])
    root = catalog.root
    return json.dumps(
        {
            "source": root if is_remote(root) else str(Path(root).absolute()),
            "files": [[f.path, f.num_bytes, f.version or f.mtime_ns] for f in catalog.files],
            "format": [result.format, result.container.crc],
            "ranks": sorted(only) if only is not None else None,
            "result": digest.hexdigest(),
        },
        indent=1,
    )


class _Pieces:
    """Pieces as text; their boxes, of which there are few, by number."""

    def __init__(self) -> None:
        self._boxes: dict[Box, int] = {}

    def told(self, pieces: tuple[StoredShard, ...]) -> str:
        """Where ``pieces`` lie, and how."""
        return ";".join(map(self._told, pieces))

    def _told(self, piece: StoredShard) -> str:
        box = self._boxes.setdefault(piece.box, len(self._boxes))
        view = "" if piece.view is None else repr(piece.view)
        return f"{piece.file} {piece.offset} {box} {view}"

    def boxes_told(self) -> str:
        """The boxes that the numbers mean."""
        return repr([(box.start, box.stop) for box in self._boxes])


# --- Preparing: a conversion decided from headers alone, to be printed or run


@dataclass(frozen=True)
class Prepared:
    """A conversion that is decided and not begun: print it, or run it."""

    plan: Plan
    result: Result
    budget: Budget

    @property
    def request(self) -> str:
        """What a resumed run must share; half a second for 90,000 tensors, so not asked idly."""
        return fingerprint(self.plan.source, self.result, self.plan.only)


@paused()
def prepare(
    source: Catalog | PathLike,
    to: str | PathLike | Strategy | Layout = "full",
    *,
    src_strategy: PathLike | None = None,
    suffix: str | None = None,
    rules: family_rules.Rules | None = None,
    names: Mapping | str | None = None,
    unmatched: family_rules.Policy = "error",
    uneven: family_rules.Policy = "error",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    rank: int | Iterable[int] | None = None,
    drop_prefix: Iterable[str] = (),
    keep_accu_grads: bool = False,
    max_shard_size: int | str | None = None,
    prefix: str = Request.prefix,
    step: str | None = None,
    remove_redundancy: bool = False,
    format: str | None = None,
    crc: bool = False,
    checksums: bool = False,
    workers: int | None = None,
    host_bytes: int | str | None = None,
    destination: PathLike | None = None,
) -> Prepared:
    """Decide a conversion from headers alone; nothing is written.

    Args:
        source: a checkpoint, or its path.
        to: ``"full"``, a strategy, the path of strategy files, or ``"same"`` as the source.
        src_strategy: the strategy files of a source cut into ranks.
        suffix: which of several files a rank the source has.
        rules: layout rules that go before the family's own.
        names: a mapping to other names and shapes, or what ``mapping.find_mapping`` takes:
            ``"llama-hf:llama-mindformers"``, a table's path.
        unmatched: what to do with names that no rule matches: refuse, or ``"replicate"``.
        uneven: what to do with dims that do not divide: refuse, or ``"replicate"``.
        include: regular expressions; only tensors that one of them is found in are taken.
        exclude: regular expressions; tensors that one of them is found in are left out.
        rank: write the files of this rank, or these ranks, only.
        drop_prefix: tensors whose names begin with one of these are left out (``adam_``).
        keep_accu_grads: take accumulated gradients too, which are otherwise left out.
        max_shard_size: the most tensor bytes in one file of a complete checkpoint, such as
            ``"5GB"``; by default what is usual for the format.
        prefix: the first part of rank files' names.
        step: the epoch and the step in them, ``"1_10"``: by default those of the source's names
            or numbers, or ``1_1``; ``"none"``: the prefix alone, as MindSpore slices.
        remove_redundancy: store each shard once, not on every replica.
        format: what to write (``ckpt``, ``unified``, ``orbax`` …); by default as ``to``
            implies. For Orbax, whose library wants tensors whole, one at a time is in memory.
        crc: end every ``.ckpt`` with a checksum.
        checksums: write ``checksums.json`` beside the files, for ``verify`` and
            ``load(verify=True)``; other readers pass over it.
        workers: number of threads; by default one per core, at most 8.
        host_bytes: memory limit for data in flight, such as ``"1GiB"``; by default 256 MiB, or
            a sixteenth of the machine's memory if that is less.
        destination: where the result is to be, as far as its name matters: that of one
            weight file (``out.safetensors``) asks for one file and no folder.

    Raises:
        NotFoundError: no checkpoint there, or nothing matches.
        FormatError: a file is not what it claims to be.
        CoverageError: the source lacks part of a tensor, or weights that the target tells of.
        LayoutError: the target does not fit the tensors, or a request means nothing for it.
    """
    include, exclude, drop_prefixes = map(texts, (include, exclude, drop_prefix))
    catalog = opened(source, src_strategy=src_strategy, suffix=suffix)
    chosen, config = _chosen(
        catalog, names, include, exclude, drop_prefixes, keep_accu_grads=keep_accu_grads
    )
    is_whole = takes_whole(catalog, include, exclude)
    target = parse_target(to)
    if is_whole and (target == FULL or isinstance(target, Strategy)):
        refuse_half(catalog)
    if isinstance(target, Strategy):
        target = lay_out_for(chosen, target, rules=rules, unmatched=unmatched, uneven=uneven)
    elif isinstance(target, Layout):
        check_factors(chosen, target)
    layout = target if isinstance(target, Layout) else None
    if target == SAME:
        layout = same_layout(chosen)  # None for a source that is complete
    only = _check_ranks(rank, layout)
    refuse_lost(catalog, chooser(include, exclude, drop_prefixes), layout, only)
    if layout is not None:
        layout = without_merged(chosen, layout)
        chosen = without_unplaced_states(chosen, layout)
        refuse_absent(chosen, layout, missed(names, include, exclude, drop_prefixes))
    budget = budget_for(host_bytes, workers, block_bytes_for(chosen))
    kind = find_format(format, is_complete=layout is None)
    numbers = read_scalars(chosen) if kind.scalars_in_json else {}
    request = Request(
        layout,
        None if max_shard_size is None else parse_size(max_shard_size, "max_shard_size"),
        prefix,
        remove_redundancy=remove_redundancy,
        format=format,
        crc=crc,
        numbers=numbers,
        checksums=checksums,
    )
    request = targets.implied(request, destination)
    check_request(request, step)
    if layout is not None and kind.steps_in_names:
        request = replace(request, step=_step_in_names(step, catalog, chosen))
    result = make_result(chosen, list(chosen.tensors.values()), request)
    targets.name_of(result, destination)  # refuses what is no one file
    if config:
        result = replace(result, side_files={**config, **result.side_files})
    plan = make_plan(
        chosen,
        result.outputs,
        only=_files_of(only, layout, result.files_per_rank),
        block_bytes=budget.block_bytes,
        tile_bytes=budget.tile_bytes,
        is_bundled=not kind.own_library,  # whose library is passed tensors one by one
    )
    return Prepared(replace(plan, host_bytes=budget.host_bytes), result, budget)


def _chosen(
    catalog: Catalog,
    names: Mapping | str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    drop_prefixes: Sequence[str],
    *,
    keep_accu_grads: bool,
) -> tuple[Catalog, dict[str, bytes]]:
    """What is asked for of ``catalog``, under its new names, and the config files to match."""
    tensors, notes = select(
        catalog, include, exclude, drop_prefixes, keep_accu_grads=keep_accu_grads
    )
    chosen = replace(catalog, tensors={t.name: t for t in tensors}, notes=(*catalog.notes, *notes))
    config: dict[str, bytes] = {}
    if names is not None:
        from ..mapping import find_mapping, true_config  # noqa: PLC0415 - seldom needed, not small

        chosen = find_mapping(names, chosen).apply(chosen)
        config = true_config(chosen)
    chosen = replace(chosen, notes=(*chosen.notes, *_of_keys(chosen)))
    extras, notes = side_files.carried(chosen)
    return replace(chosen, extras=extras, notes=(*chosen.notes, *notes)), config


def _of_keys(catalog: Catalog) -> tuple[str, ...]:
    """A note on the random keys of ``catalog``: what is written has their data only."""
    found = [f"{n} ({generator})" for n, generator in catalog.keys.items() if n in catalog.tensors]
    if not found:
        return ()
    return (
        f"{len(found)} random keys are written as their data, integers, without their generator: "
        f"{format_list(found)}.",
    )


def _step_in_names(step: str | None, catalog: Catalog, chosen: Catalog) -> tuple[int, int] | None:
    """The epoch and the step in rank files' names: as asked, or as the source has them."""
    if step is not None:
        return rank_names.read_step(step)
    named = rank_names.step_of(file.path for file in catalog.files)
    has_numbers = chosen.scalars or format_of(catalog.format).scalars_in_json
    return named or step_of_numbers(read_scalars(chosen) if has_numbers else {})


def _check_ranks(rank: int | Iterable[int] | None, layout: Layout | None) -> frozenset[int] | None:
    if rank is None:
        return None
    only = frozenset([rank] if isinstance(rank, int) else rank)
    num_ranks = layout.num_ranks if layout else 1
    wrong = sorted(r for r in only if not 0 <= r < num_ranks)
    if wrong or not only or layout is None:
        raise LayoutError(
            f"rank= (--rank) {format_list(map(str, wrong or only))}: the target has "
            + (
                f"ranks 0 to {num_ranks - 1}."
                if layout
                else "no ranks, it is one complete checkpoint."
            )
        )
    return only


def _files_of(
    ranks: frozenset[int] | None, layout: Layout | None, files_per_rank: int
) -> frozenset[int] | None:
    """The numbers of the files of ``ranks``: second files come after all first ones."""
    if ranks is None or layout is None:
        return None
    return frozenset(r + i * layout.num_ranks for r in ranks for i in range(files_per_rank))


def part_plan(plan: Plan, part: Part | None) -> Plan:
    """``plan`` for the files that ``part`` makes; all of it where that is None."""
    if part is None:
        return plan
    ranks = range(len(plan.outputs.paths)) if plan.only is None else plan.only
    return plan.of(split_outputs(plan.outputs, ranks, part.count)[part.index])
