"""Convert: from any checkpoint file to any other, without a device.

Merging is converting to one complete checkpoint, slicing to many ranks. Memory is
bounded by a budget, not by the model; the result appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import one_file
from . import rules as family_rules
from .catalog import Catalog
from .errors import CoverageError, LayoutError, StorageError, some
from .fingerprint import fingerprint
from .layout import Layout
from .multiprocess.environment import part_of
from .multiprocess.splitting import Part, split_outputs
from .opening import PathLike, open_checkpoint, open_strategy
from .planning import BLOCK_BYTES, Plan, block_bytes_for, make_plan
from .selection import missed, refuse_absent, select, texts
from .storage import carrying, streams
from .storage.budget import Budget, Counts, fit_budget
from .storage.parts import PartStaging
from .storage.sources import OpenSource, open_source
from .storage.staging import Staging
from .storage.writing import OutputFiles
from .strategy import Strategy
from .targets import Request, Result, check_request, lay_out_for, make_result, same_layout

if TYPE_CHECKING:
    from .mapping import Mapping

Progress = Callable[[int], None]
_DEFAULT_BUDGET = 256 << 20


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


_DEFAULT = Options()


@dataclass(frozen=True)
class Prepared:
    """A conversion that is decided and not begun: print it, or run it."""

    plan: Plan
    result: Result

    @property
    def request(self) -> str:
        """What a resumed run must share; half a second for 90,000 tensors, so not asked idly."""
        return fingerprint(self.plan.source, self.result, self.plan.only)


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    destination: str
    counts: Counts
    num_files: int
    skipped_files: int
    notes: tuple[str, ...] = ()
    part: Part | None = None
    is_published: bool = True  # False: other parts are still to be made


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
    ranks: Iterable[int] | None = None,
    drop_prefixes: Iterable[str] = (),
    keep_accu_grads: bool = False,
    max_shard_bytes: int | None = None,
    prefix: str = "checkpoint_",
    remove_redundancy: bool = False,
    format: str | None = None,
    crc: bool = False,
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
        ranks: write the files of these ranks only.
        drop_prefixes: tensors whose names begin with one of these are left out (``adam_``).
        keep_accu_grads: take accumulated gradients too, which are otherwise left out.
        max_shard_bytes: the most tensor bytes in one file of a complete checkpoint; by
            default what is usual for the format.
        prefix: the first part of rank files' names.
        remove_redundancy: store each shard once, not on every replica.
        format: what to write (``ckpt``, ``unified``, ``orbax`` …); by default as ``to``
            implies. For Orbax, whose library wants tensors whole, one at a time is in memory.
        crc: end every ``.ckpt`` with a checksum.
        destination: where the result is to be, as far as its name matters: that of one
            weight file (``out.safetensors``) asks for one file and no folder.

    Raises:
        NotFoundError: no checkpoint there, or nothing matches.
        FormatError: a file is not what it claims to be.
        CoverageError: the source lacks part of a tensor, or weights that the target tells of.
        LayoutError: the target does not fit the tensors, or a request means nothing for it.
    """
    include, exclude, drop_prefixes = map(texts, (include, exclude, drop_prefixes))
    catalog = (
        source
        if isinstance(source, Catalog)
        else open_checkpoint(source, strategy=src_strategy, suffix=suffix)
    )
    tensors, notes = select(
        catalog, include, exclude, drop_prefixes, keep_accu_grads=keep_accu_grads
    )
    chosen = replace(catalog, tensors={t.name: t for t in tensors}, notes=(*catalog.notes, *notes))
    config: dict[str, bytes] = {}
    if names is not None:
        from .mapping import find_mapping, true_config  # noqa: PLC0415 - seldom needed, and not small

        chosen = find_mapping(names, chosen).apply(chosen)
        tensors, config = list(chosen.tensors.values()), true_config(chosen)
    extras, notes = carrying.carried(chosen)
    chosen = replace(chosen, extras=extras, notes=(*chosen.notes, *notes))
    lay_out = partial(lay_out_for, chosen, rules=rules, unmatched=unmatched, uneven=uneven)
    layout = same_layout(chosen) if to == "same" else _target_layout(to, lay_out)
    if layout is not None:
        refuse_absent(chosen, layout, missed(names, include, exclude, drop_prefixes))
    numbers = _job_values(chosen) if format == "iteration" else {}
    request = Request(layout, max_shard_bytes, prefix, remove_redundancy, format, crc, numbers)
    check_request(request)
    request = one_file.implied(request, destination)
    result = make_result(chosen, tensors, request)
    one_file.name_of(result, destination)  # refuses what is no one file
    if config:
        result = replace(result, side_files={**config, **result.side_files})
    only = _files_of(_check_ranks(ranks, layout), layout, result.files_per_rank)
    plan = make_plan(chosen, result.outputs, only=only, block_bytes=block_bytes_for(chosen))
    return Prepared(plan, result)


def convert(
    source: Catalog | PathLike,
    destination: PathLike,
    to: str | PathLike | Strategy | Layout = "full",
    *,
    options: Options = _DEFAULT,
    progress: Callable[[int], Progress] | None = None,
    **how: object,
) -> Report:
    """Make ``destination`` from ``source``, laid out as ``to`` says.

    ``how`` is as for ``prepare``. ``progress`` is given the bytes to write and returns a
    function that is told of those written.

    Raises:
        StorageError: the disk is full or refuses; what was finished can be resumed.
        JaxshardError: as ``prepare``, before a byte is written.
    """
    prepared = prepare(source, to, destination=destination, **how)  # type: ignore[arg-type]
    return execute(prepared, destination, options=options, progress=progress)


def execute(
    prepared: Prepared,
    destination: PathLike,
    *,
    options: Options = _DEFAULT,
    progress: Callable[[int], Progress] | None = None,
) -> Report:
    """Carry out a prepared conversion (errors as ``convert``)."""
    part = chosen_part(options)
    if part and prepared.result.format == "orbax":
        raise LayoutError("Orbax's own format is written here by one process, not in parts.")
    catalog = prepared.plan.source
    prepared, budget = fitted(prepared, options), budget_of(options, catalog)
    plan = prepared.plan
    place, only = Path(destination), one_file.name_of(prepared.result, destination)
    refuse_inside(catalog, place)
    if options.check_replicas:
        _refuse_differing(catalog, budget)
    plan = part_plan(plan, part)
    staging = _staging(place, prepared.request, options, only, part)
    left = one_file.notes(catalog, prepared.result, only)
    notes = (*catalog.notes, *plan.outputs.layout.notes, *left)
    if staging.published:
        return Report(str(destination), Counts(), 0, plan.totals.num_files, notes, part)
    try:
        plan, skipped = _without_finished(plan, staging)
        _check_room(plan, staging.files)
        tell = progress(plan.totals.bytes_written) if progress else None
        source = open_source(catalog)
        source.check_checksums()
        try:
            counts = _write(plan, prepared.result, source, staging, budget, tell)
        finally:
            source.close()
        source.check_unchanged()
        is_published = staging.publish(
            None if only else partial(_write_side_files, prepared, staging, place)
        )
    except BaseException:
        staging.abandon()
        raise
    num_files = plan.totals.num_files
    return Report(str(destination), counts, num_files, skipped, notes, part, is_published)


def _write(
    plan: Plan,
    result: Result,
    source: OpenSource,
    staging: Staging | PartStaging,
    budget: Budget,
    tell: Progress | None,
) -> Counts:
    """Write the weight files of ``plan``; what that took."""
    if result.format == "orbax":
        from .orbax_writing import write_orbax  # noqa: PLC0415 - NumPy, and then JAX, seldom needed

        counts = write_orbax(plan, source, staging.files, budget, tell)
        for path in sorted(p for p in staging.files.rglob("*") if p.is_file()):
            staging.sync(path)
        return counts
    files = OutputFiles(plan, staging, result.lay_file, result.seal)
    try:
        return streams.run(plan.moves(), source, files, budget=budget, progress=tell)
    finally:
        files.close()


def _staging(
    destination: Path, request: str, options: Options, only: str | None, part: Part | None
) -> Staging | PartStaging:
    overwrite, durable = options.overwrite, options.durable
    if part is None:
        return Staging(
            destination,
            request,
            resume=options.resume,
            overwrite=overwrite,
            durable=durable,
            only=only,
        )
    if only:
        raise LayoutError(
            f"{destination} is one file, which is one process's work. Leave out --process-count, "
            "or name a folder."
        )
    return PartStaging(
        destination, request, part.index, part.count, overwrite=overwrite, durable=durable
    )


def _refuse_differing(catalog: Catalog, budget: Budget) -> None:
    """Refuse a source whose replicas are not equal."""
    from .verification import differing_replicas  # noqa: PLC0415 - NumPy, seldom needed

    problems = differing_replicas(catalog, budget=budget).problems
    if problems:
        more = f" {len(problems) - 1} more tensors have such." if len(problems) > 1 else ""
        raise CoverageError(f"{problems[0]}{more}")


def chosen_part(options: Options) -> Part | None:
    """The part that ``options`` mean (errors as ``part_of``)."""
    if options.part == "auto":
        return part_of("auto", "auto", os.environ)
    return options.part


def part_plan(plan: Plan, part: Part | None) -> Plan:
    """``plan`` for the files that ``part`` makes; all of it where that is None."""
    if part is None:
        return plan
    ranks = range(len(plan.outputs.paths)) if plan.only is None else plan.only
    return plan.of(split_outputs(plan.outputs, ranks, part.count)[part.index])


def budget_of(options: Options, source: Catalog | None = None) -> Budget:
    """Threads, and the blocks that suit ``source``, as ``options`` allow.

    Raises:
        LayoutError: as ``fit_budget``.
    """
    host_bytes = default_budget() if options.host_bytes is None else options.host_bytes
    workers = _cores() if options.workers is None else options.workers
    return fit_budget(host_bytes, workers, block_bytes_for(source) if source else BLOCK_BYTES)


def fitted(prepared: Prepared, options: Options) -> Prepared:
    """``prepared`` with the numbers of the blocks and the memory that ``options`` allow."""
    plan, budget = prepared.plan, budget_of(options, prepared.plan.source)
    if (plan.block_bytes, plan.tile_bytes) != (budget.block_bytes, budget.tile_bytes):
        plan = make_plan(
            plan.source,
            plan.outputs,
            only=plan.only,
            block_bytes=budget.block_bytes,
            tile_bytes=budget.tile_bytes,
        )
    return replace(prepared, plan=replace(plan, host_bytes=budget.host_bytes))


def default_budget() -> int:
    """The default of ``host_bytes``: 256 MiB, or a sixteenth of a smaller machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(_DEFAULT_BUDGET, memory // 16)


def _cores() -> int:
    return min(8, len(os.sched_getaffinity(0)))


def _target_layout(
    to: str | PathLike | Strategy | Layout, lay_out: Callable[[Strategy], Layout]
) -> Layout | None:
    if isinstance(to, Layout):
        return to
    if isinstance(to, Strategy):
        return lay_out(to)
    text = os.fspath(to)
    if text in ("full", "same"):  # the same as a source that is complete
        return None
    try:
        strategy = Strategy.parse(text)  # before files: a result called mp4 may lie here too
    except LayoutError as error:
        if os.path.exists(text):
            return open_strategy(text)
        raise LayoutError(
            f"the target (--to) is neither full, nor an existing strategy file or folder; {error}"
        ) from None
    return lay_out(strategy)


def _job_values(catalog: Catalog) -> dict[str, Any]:
    from .job_values import job_values  # noqa: PLC0415 - the dtypes of JAX, seldom needed

    return job_values(catalog)


def _check_ranks(ranks: Iterable[int] | None, layout: Layout | None) -> frozenset[int] | None:
    if ranks is None:
        return None
    only = frozenset(ranks)
    num_ranks = layout.num_ranks if layout else 1
    wrong = sorted(r for r in only if not 0 <= r < num_ranks)
    if wrong or not only or layout is None:
        raise LayoutError(
            f"rank (--rank) {some(map(str, wrong or only))}: the target has "
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


def refuse_inside(catalog: Catalog, destination: Path) -> None:
    """Refuse a destination whose replacement would take the source, or a file of it, away."""
    source, place = Path(os.path.realpath(catalog.root)), Path(os.path.realpath(destination))
    linked = (Path(os.path.realpath(source / f.path)) for f in catalog.files)
    if any(p == place or place in p.parents for p in (source, *linked)):
        raise LayoutError(
            f"{destination} is the source, or holds it or files that it links to. Choose another "
            "destination; the source is never changed."
        )


def _without_finished(plan: Plan, staging: Staging | PartStaging) -> tuple[Plan, int]:
    """``plan`` less the files that an earlier run finished."""
    paths = plan.outputs.paths
    wanted = set(range(len(paths))) if plan.only is None else set(plan.only)
    done = {rank for rank in wanted if paths[rank] in staging.finished}
    return (plan.of(frozenset(wanted - done)), len(done)) if done else (plan, 0)


def _check_room(plan: Plan, place: Path) -> None:
    free = shutil.disk_usage(place).free
    need = plan.totals.bytes_written
    if need > free:
        raise StorageError(
            f"{place} has {free} bytes free, and the result needs {need}. Make room, or choose "
            "another disk."
        )


def _write_side_files(
    prepared: Prepared, staging: Staging | PartStaging, destination: Path
) -> None:
    source, inside = prepared.plan.source, destination.resolve()

    def is_an_earlier_result(path: Path) -> bool:
        return inside in path.resolve().parents

    carrying.copy_extras(
        Path(source.root),
        source.extras,
        staging.files / prepared.result.extras_to,
        leave_out=is_an_earlier_result,
        sync=staging.sync,
    )
    carrying.write_files(prepared.result.side_files.items(), staging.files, staging.sync)
