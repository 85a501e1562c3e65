"""Preparation of a conversion: its options, and a plan from headers alone.

It selects and renames tensors, lays them out, plans the files, and divides the work into blocks.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict, TypeVar, cast

from .. import rules as family_rules
from ..core.box import Box
from ..core.catalog import Catalog, StoredShard
from ..core.layout import Layout, Strategy
from ..core.runtime import paused
from ..distributed.processes import Part, split_outputs
from ..errors import LayoutError, format_list
from ..formats import rank_names
from ..formats.huggingface import CONFIG
from ..formats.output_files import Request, Result
from ..formats.registry import find_format, format_of
from ..planning.copies import firsts
from ..planning.plan import Plan, block_bytes_for, make_plan
from ..storage import writers
from ..storage.remote import downloaded, is_fetched, is_remote, url_of_cached
from ..storage.resources import Budget, budget_for, parse_size
from . import targets
from .open import Config, PathLike, opened, read_scalars
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
    """Return a fingerprint of the conversion to the files ``only`` (None: all) of ``result``."""
    digest = hashlib.sha256()
    shards = _Shards()
    numbers: dict[int, int] = {}  # thousands of contents share their entries
    for content in result.outputs.contents:
        texts = []
        for entry in content:
            if id(entry) in numbers:
                continue
            numbers[id(entry)] = len(numbers)
            tensor = entry.tensor
            texts.append(f"{tensor.name} {tensor.dtype.name} {entry.shape}\n")
            texts.append(shards.text(firsts(tensor.shards)))
        digest.update("".join(texts).encode())
        digest.update(repr([numbers[id(entry)] for entry in content]).encode())
    digest.update(shards.boxes().encode())
    digest.update(repr((result.outputs.paths, result.outputs.content_of)).encode())
    hashes: dict[int, bytes] = {}  # the ranks of a stage share one strategy
    for name, data in sorted(result.side_files.items()):
        if id(data) not in hashes:
            hashes[id(data)] = hashlib.sha256(data).digest()
        digest.update(name.encode() + hashes[id(data)])
    root, files = catalog.root, catalog.files
    url = root if is_remote(root) else url_of_cached(root)
    return json.dumps(
        {
            "source": url or str(Path(root).absolute()),
            "files": [[f.path, f.num_bytes, f.version or (not url and f.mtime_ns)] for f in files],
            "format": [result.format, result.container.crc],
            "ranks": sorted(only) if only is not None else None,
            "result": digest.hexdigest(),
        },
        indent=1,
    )


class _Shards:
    """Stored shards as text; boxes by number, because there are few of them."""

    def __init__(self) -> None:
        self._boxes: dict[Box, int] = {}

    def text(self, shards: tuple[StoredShard, ...]) -> str:
        """Return file, offset, box and view of each of ``shards``."""
        return ";".join(map(self._text, shards))

    def _text(self, shard: StoredShard) -> str:
        box = self._boxes.setdefault(shard.box, len(self._boxes))
        view = "" if shard.view is None else repr(shard.view)
        return f"{shard.file} {shard.offset} {box} {view}"

    def boxes(self) -> str:
        """Return the boxes in the order of their numbers."""
        return repr([(box.start, box.stop) for box in self._boxes])


# --- Preparation


@dataclass(frozen=True)
class Prepared:
    """A planned conversion, to print or to execute.

    Attributes:
        budget: threads and memory, which the blocks of ``plan`` fit.
    """

    plan: Plan
    result: Result
    budget: Budget

    @property
    def request(self) -> str:
        """The fingerprint that a resumed run must have; half a second for 90,000 tensors."""
        return fingerprint(self.plan.source, self.result, self.plan.only)


def with_requests(
    prepared: Prepared, destination: PathLike | None, part: Part | None, *, stream: bool
) -> Plan:
    """Return the plan of ``part``; its totals have the requests to the store, if it is fetched.

    This takes a second for some 10,000 requests.
    """
    plan = part_plan(prepared.plan, part)
    if not is_fetched(plan.source.root, stream=stream):
        return plan
    from ..storage import engine, upload  # noqa: PLC0415 - NumPy

    if destination is not None and is_remote(destination):
        found = upload.planned_requests(plan, prepared.result.container, prepared.budget)
    else:
        found = engine.planned_requests(plan.journeys(), budget=prepared.budget)
    requests = {"num_requests": found.num_requests, "bytes_fetched": found.bytes_fetched}
    return replace(plan, totals=replace(plan.totals, **requests))


def downloaded_first(prepared: Prepared, part: Part | None = None) -> Prepared:
    """Return ``prepared`` with the files that ``part`` reads in the Hub's cache, if it has them.

    Raises:
        NotFoundError, StorageError: they cannot be downloaded.
    """
    plan = prepared.plan
    if not is_remote(plan.source.root):
        return prepared
    used = (n for n, reads in enumerate(part_plan(plan, part).reads) if reads)
    return replace(prepared, plan=replace(plan, source=downloaded(plan.source, used)))


@paused()
def prepare(
    source: Catalog | PathLike,
    to: str | PathLike | Strategy | Layout = "full",
    *,
    src_strategy: PathLike | None = None,
    suffix: str | None = None,
    config: Config | None = None,
    rules: family_rules.Rules | None = None,
    names: Mapping | str | None = None,
    unmatched: family_rules.Unmatched = "error",
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
    """Plan a conversion from headers alone; nothing is written.

    Args:
        source: a checkpoint, or its path.
        to: ``"full"``, a strategy, the path of strategy files, or ``"same"`` as the source.
        src_strategy: the strategy files of a source that is cut by rank.
        suffix: which of several files per rank the source has.
        config: the model's ``config.json``, or its path, for a source without one; the result
            gets it too.
        rules: layout rules that precede those of the model's family.
        names: a mapping to other names and shapes, or what ``mapping.find_mapping`` takes:
            ``"llama-hf:llama-mindformers"``, a table's path.
        unmatched: names without a rule are an error, or ``"replicate"``, or ``"largest"``: split by
            their shapes.
        uneven: dims that do not divide are an error, or ``"replicate"``.
        include: regular expressions; only tensors that match one of them are converted.
        exclude: regular expressions; tensors that match one of them are left out.
        rank: write only the files of this rank, or of these ranks.
        drop_prefix: tensors whose names start with one of these are left out (``adam_``).
        keep_accu_grads: convert accumulated gradients too, which are left out by default.
        max_shard_size: maximum tensor bytes per file of a complete checkpoint, such as
            ``"5GB"``; the default depends on the format.
        prefix: the first part of the names of rank files.
        step: the epoch and step in these names, ``"1_10"``; by default those in the source's
            names or training scalars, or ``1_1``; ``"none"``: the prefix only, as MindSpore slices.
        remove_redundancy: store each shard once, not on every replica.
        format: the format to write (``ckpt``, ``unified``, ``orbax`` …); the default depends on
            ``to``. Orbax's library needs whole tensors, so one tensor at a time is in memory.
        crc: end every ``.ckpt`` with a checksum.
        checksums: add ``checksums.json`` for ``verify`` and ``load(verify=True)``; other readers
            ignore it.
        workers: number of threads; by default one per core, at most 8.
        host_bytes: memory limit for data in flight, such as ``"1GiB"``; by default 256 MiB, or
            a sixteenth of the machine's memory if that is less.
        destination: the path of the result. A weight file (``out.safetensors``) implies its
            format, and one file instead of a directory.

    Raises:
        NotFoundError: the source is not a checkpoint, or nothing matches.
        FormatError: a file is damaged.
        CoverageError: the source lacks part of a tensor, or weights of the target's layout.
        LayoutError: the target does not fit the tensors, or an option would have no effect.
    """
    include, exclude, drop_prefixes = map(texts, (include, exclude, drop_prefix))
    catalog = opened(source, src_strategy=src_strategy, suffix=suffix, config=config)
    chosen, side_files = _chosen(
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
    request = targets.with_file_format(request, destination)
    check_request(request, step)
    if layout is not None and kind.steps_in_names:
        request = replace(request, step=_step_in_names(step, catalog, chosen))
    result = make_result(chosen, list(chosen.tensors.values()), request)
    targets.single_file(result, destination)  # refuses a result that is not one file
    if catalog.config_is_given and CONFIG not in side_files:
        side_files[CONFIG] = json.dumps(catalog.model.config, indent=2).encode()
    if side_files:
        result = replace(result, side_files={**side_files, **result.side_files})
    plan = make_plan(
        chosen,
        result.outputs,
        only=_files_of(only, layout, result.files_per_rank),
        block_bytes=budget.block_bytes,
        tile_bytes=budget.tile_bytes,
        # such a library is passed tensors one by one, and a store files in order
        is_bundled=not (kind.own_library or (destination is not None and is_remote(destination))),
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
    """Return the selected tensors of ``catalog`` under their new names, and config files."""
    tensors, notes = select(
        catalog, include, exclude, drop_prefixes, keep_accu_grads=keep_accu_grads
    )
    chosen = replace(catalog, tensors={t.name: t for t in tensors}, notes=(*catalog.notes, *notes))
    config: dict[str, bytes] = {}
    if names is not None:
        from ..mapping import find_mapping, true_config  # noqa: PLC0415 - rarely needed, and large

        chosen = find_mapping(names, chosen).apply(chosen)
        config = true_config(chosen)
    chosen = replace(chosen, notes=(*chosen.notes, *_of_keys(chosen)))
    extras, notes = writers.carried(chosen)
    return replace(chosen, extras=extras, notes=(*chosen.notes, *notes)), config


def _of_keys(catalog: Catalog) -> tuple[str, ...]:
    """Return a note on the PRNG keys of ``catalog``, of which only the data are written."""
    found = [f"{n} ({generator})" for n, generator in catalog.keys.items() if n in catalog.tensors]
    if not found:
        return ()
    return (
        f"{len(found)} PRNG keys are written as integers, without their generator: "
        f"{format_list(found)}.",
    )


def _step_in_names(step: str | None, catalog: Catalog, chosen: Catalog) -> tuple[int, int] | None:
    """Return the epoch and step for rank files' names: as given, or those of the source."""
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
                else "no ranks, because it is complete. Leave rank= out."
            )
        )
    return only


def _files_of(
    ranks: frozenset[int] | None, layout: Layout | None, files_per_rank: int
) -> frozenset[int] | None:
    """Return the numbers of the files of ``ranks``; second files follow all first ones."""
    if ranks is None or layout is None:
        return None
    return frozenset(r + i * layout.num_ranks for r in ranks for i in range(files_per_rank))


def files_to_check(plan: Plan) -> list[int] | None:
    """Return the source's files whose checksums are compared: all, or in a store those read."""
    if not is_remote(plan.source.root):
        return None
    return [n for n, reads in enumerate(plan.reads) if reads]


def part_plan(plan: Plan, part: Part | None) -> Plan:
    """Return the part of ``plan`` that ``part`` writes; all of it if that is None."""
    if part is None:
        return plan
    ranks = range(len(plan.outputs.paths)) if plan.only is None else plan.only
    return plan.of(split_outputs(plan.outputs, ranks, part.count)[part.index])


# --- Keyword arguments of a conversion: what they may be, and functions that pass them on

if TYPE_CHECKING:
    from ..mapping import Mapping
    from ..rules import Policy, Rules, Unmatched
    from .open import Config, PathLike

_P = ParamSpec("_P")
_R = TypeVar("_R")


class ResultOptions(TypedDict, total=False):
    """Options that decide a conversion's result and its plan; ``prepare`` documents them."""

    src_strategy: PathLike | None
    suffix: str | None
    config: Config | None
    rules: Rules | None
    names: Mapping | str | None
    unmatched: Unmatched
    uneven: Policy
    include: Iterable[str]
    exclude: Iterable[str]
    drop_prefix: Iterable[str]
    keep_accu_grads: bool
    rank: int | Iterable[int] | None
    max_shard_size: int | str | None
    prefix: str
    step: str | None
    remove_redundancy: bool
    format: str | None
    crc: bool
    checksums: bool
    workers: int | None
    host_bytes: int | str | None


class RunOptions(TypedDict, total=False):
    """Options that decide how a plan is carried out; ``execute`` documents them."""

    resume: bool
    overwrite: bool
    fsync: bool
    process_index: int | str | None
    process_count: int | str | None
    check_replicas: bool
    stream: bool


class ConvertOptions(ResultOptions, RunOptions, total=False):
    """All options of a conversion."""


def split(options: ConvertOptions) -> tuple[ResultOptions, RunOptions]:
    """Divide ``options`` into those of ``prepare`` and those of ``execute``.

    >>> split({"overwrite": True, "exclude": "lora"})
    ({'exclude': 'lora'}, {'overwrite': True})
    """
    result = {n: v for n, v in options.items() if n in ResultOptions.__optional_keys__}
    run = {n: v for n, v in options.items() if n in RunOptions.__optional_keys__}
    return cast("ResultOptions", result), cast("RunOptions", run)


def takes_options(
    *documented: Callable[..., object],
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a function's ``**options`` be ``ConvertOptions``, whose defaults ``documented`` have.

    ``help`` and editors then show every option with its default, and an unknown one is a TypeError
    with the name of the function that the caller typed, not of one that it calls.
    """
    known = {n: p for f in documented for n, p in inspect.signature(f).parameters.items()}
    options = {n: known[n] for n in known if n in ConvertOptions.__optional_keys__}

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        bare = inspect.signature(function)
        own = {n: p for n, p in bare.parameters.items() if p.kind is not p.VAR_KEYWORD}
        signature = bare.replace(parameters=[*own.values(), *options.values()])

        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for name in kwargs:
                if name not in signature.parameters:
                    raise TypeError(
                        f"{function.__name__}() got an unexpected keyword argument {name!r}"
                    )
            return function(*args, **kwargs)

        cast("Any", checked).__signature__ = signature
        return checked

    return decorate
