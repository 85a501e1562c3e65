"""The public functions: each composes the packages of the earlier rings."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from .conversion.execute import Report, execute, progress_of
from .conversion.open import Config, PathLike, open_checkpoint, opened
from .conversion.prepare import ConvertOptions, prepare, split, takes_options, with_requests
from .conversion.verify import Verdict, verify_against
from .conversion.verify import verify as verify_alone
from .core.catalog import Catalog, log_done, log_notes, with_notes_logged
from .core.layout import Layout, Strategy
from .core.runtime import clear_caches
from .distributed.processes import part_of
from .planning.plan import Plan
from .rules import LogicalAxisRules, Rules, Unmatched
from .storage.resources import budget_for, parse_size

if TYPE_CHECKING:
    from .conversion.load_rank import load_rank
    from .devices.mesh import mesh, stage_meshes
    from .devices.pytree import show
    from .loader import load
    from .lora import merge_lora
    from .models import register_models
    from .rules import read_rules
    from .saver import save

__all__ = [
    "clear_caches",
    "convert",
    "gather",
    "load",
    "load_rank",
    "merge",
    "merge_lora",
    "mesh",
    "open",
    "plan",
    "prepare_reshard",
    "read_rules",
    "register_models",
    "reshard",
    "save",
    "show",
    "slice",
    "stage_meshes",
    "verify",
]

To = str | PathLike | Strategy | Layout

if not TYPE_CHECKING:  # these need JAX, or a package that the functions below do not need
    __getattr__ = partial(getattr, sys.modules[__package__])


def open(
    path: PathLike,
    *,
    src_strategy: PathLike | None = None,
    suffix: str | None = None,
    config: Config | None = None,
) -> Catalog:
    """Return the contents of the checkpoint at ``path``, from headers only.

    Arguments and errors as ``open_checkpoint``.
    """
    catalog = open_checkpoint(path, src_strategy=src_strategy, suffix=suffix, config=config)
    return with_notes_logged(catalog)


@takes_options(prepare, execute)
def plan(
    source: Catalog | PathLike,
    to: To = "full",
    *,
    destination: PathLike | None = None,
    **options: Unpack[ConvertOptions],
) -> Plan:
    """Return what ``convert`` with the same arguments would read, copy and write.

    Nothing is written. ``print`` shows the plan as a table; its ``totals`` are the numbers.
    ``workers`` and ``host_bytes`` matter, because blocks are as large as they allow.
    """
    result, run = split(options)
    prepared = prepare(source, to, destination=destination, **result)
    part = part_of(run.get("process_index"), run.get("process_count"), os.environ)
    made = with_requests(prepared, destination, part, stream=run.get("stream", False))
    log_notes(made.source.root, made.notes, made.source.logged)
    return made


@takes_options(prepare, execute)
def convert(
    source: Catalog | PathLike,
    destination: PathLike,
    to: To = "full",
    *,
    progress: bool | Callable[[int], Callable[[int], None]] | None = None,
    **options: Unpack[ConvertOptions],
) -> Report:
    """Write ``source`` to ``destination`` in the layout ``to``.

    Args:
        source: a checkpoint, or its path.
        destination: a directory, or one file if the name is that of a weight file
            (``out.safetensors``). It is published atomically, but not at the URL of an object
            store, where readers of jaxshard refuse it until it is complete.
        to: ``"full"``, a strategy (``"dp2mp4pp2"``), strategy files, ``"same"``, or a ``Layout``.
        progress: True for a bar on a terminal or in a notebook; or a function that is called with
            the total byte count and returns a callback that receives bytes written.
        options: those of ``prepare`` decide the plan (include, exclude, rank, rules,
            remove_redundancy, workers, host_bytes …), those of ``execute`` how it is executed
            (overwrite, resume, fsync …). Each is also a flag of ``jaxshard convert``.

    Raises:
        JaxshardError: one of five kinds, each with a remedy; see ``errors``.
    """
    return _convert("convert", source, destination, to, progress=progress, **options)


def _convert(
    verb: str,
    source: Catalog | PathLike,
    destination: PathLike,
    to: To,
    *,
    progress: bool | Callable[[int], Callable[[int], None]] | None,
    **options: Unpack[ConvertOptions],
) -> Report:
    began = time.monotonic()
    result, run = split(options)
    prepared = prepare(source, to, destination=destination, **result)
    with progress_of(progress, verb) as start:
        report = execute(prepared, destination, progress=start, **run)
    log_notes(str(destination), report.notes, prepared.plan.source.logged)
    log_done(verb, destination, report.counts.bytes_written, time.monotonic() - began)
    return report


@takes_options(prepare, execute)
def merge(
    source: Catalog | PathLike,
    destination: PathLike,
    *,
    progress: bool | Callable[[int], Callable[[int], None]] | None = None,
    **options: Unpack[ConvertOptions],
) -> Report:
    """``convert`` to one complete checkpoint."""
    return _convert("merge", source, destination, "full", progress=progress, **options)


@takes_options(prepare, execute)
def slice(
    source: Catalog | PathLike,
    destination: PathLike,
    to: To,
    *,
    progress: bool | Callable[[int], Callable[[int], None]] | None = None,
    **options: Unpack[ConvertOptions],
) -> Report:
    """``convert`` to one file per rank."""
    return _convert("slice", source, destination, to, progress=progress, **options)


def verify(
    source: Catalog | PathLike,
    against: Catalog | PathLike | None = None,
    *,
    src_strategy: PathLike | None = None,
    suffix: str | None = None,
    against_strategy: PathLike | None = None,
    workers: int | None = None,
    host_bytes: int | str | None = None,
    progress: bool | Callable[[int], None] | None = None,
) -> Verdict:
    """Check that a checkpoint is complete, its replicas agree, and it equals ``against``.

    Args:
        source: a checkpoint, or its path.
        against: another checkpoint, of any layout, to compare bit for bit.
        src_strategy: strategy files of ``source``.
        suffix: which of several files per rank ``source`` has.
        against_strategy: strategy files of ``against``.
        workers: number of threads; by default one per core, at most 8.
        host_bytes: memory limit for data in flight, such as ``"1GiB"``; by default 256 MiB.
        progress: True for a bar as in ``convert``, or a callback that receives bytes read.
    """
    began = time.monotonic()
    budget = budget_for(host_bytes, workers)
    catalog = with_notes_logged(opened(source, src_strategy=src_strategy, suffix=suffix))
    with progress_of(progress is True, "verify") as start:
        tell = None if isinstance(progress, bool) else progress
        verdict = verify_alone(catalog, budget=budget, progress=start(0) if start else tell)
        if against is not None and not verdict.problems:
            other = with_notes_logged(opened(against, src_strategy=against_strategy))
            tell = start(catalog.num_bytes) if start else tell
            verdict = verify_against(catalog, other, budget=budget, progress=tell)
    log_done("verify", catalog.root, verdict.bytes_compared, time.monotonic() - began)
    return verdict


def reshard(
    tree: Any,
    target: Any,
    *,
    devices: Sequence[Any] | None = None,
    rules: Rules | None = None,
    logical_axis_rules: LogicalAxisRules | None = None,
    unmatched: Unmatched = "error",
    config: Config | None = None,
    donate: bool = False,
    copy: bool = False,
    device_bytes: int | str | None = None,
) -> Any:
    """Move the arrays of ``tree`` to other shardings, from device to device.

    Args:
        tree: a pytree of ``jax.Array``.
        target: a strategy (``"dp4mp2"``) or a ``Mesh``, resolved by the rules of the names'
            family; or shardings, in any form that ``resharding.reshard`` accepts.
        devices: the device of each rank of a strategy; by default all devices.
        rules: rules for a strategy or mesh that precede the family's rules.
        logical_axis_rules: which mesh axes split each logical axis, as for ``load``.
        unmatched: names without a rule are an error, or ``"replicate"``, or ``"largest"``: split by
            their shapes.
        config: the model's ``config.json``, or its path, for names that several families have
            (those of MaxText, Tunix and Flax) and for the lengths of heads.
        donate: free each source array as soon as it has been moved.
        copy: share no memory with the sources. By default a shard that stays on its device is
            aliased, so donating the source in a later step deletes it.
        device_bytes: memory limit per device for data in flight, besides sources and targets.

    Raises:
        LayoutError: the target cannot hold an array, or names a missing device.
        NotFoundError: the target lacks some arrays.
    """
    from . import resharding  # noqa: PLC0415 - JAX, only where devices are used
    from .devices import pytree  # noqa: PLC0415 - JAX, only where devices are used

    wanted = pytree.target_of(
        tree,
        target,
        devices=devices,
        rules=rules,
        logical_axis_rules=logical_axis_rules,
        unmatched=unmatched,
        config=config,
    )
    limit = None if device_bytes is None else parse_size(device_bytes, "device_bytes")
    return resharding.reshard(tree, wanted, donate=donate, copy=copy, device_bytes=limit)


def prepare_reshard(
    tree: Any,
    target: Any,
    *,
    devices: Sequence[Any] | None = None,
    rules: Rules | None = None,
    logical_axis_rules: LogicalAxisRules | None = None,
    unmatched: Unmatched = "error",
    config: Config | None = None,
    donate: bool = False,
    copy: bool = False,
    device_bytes: int | str | None = None,
) -> Any:
    """Plan and compile once; return a ``resharding.Resharder`` for trees like ``tree``.

    Call it in every step, and print its ``plan``. Arguments and errors as ``reshard``.
    Pass ``copy=True`` if the step donates its arrays, as training steps do.
    """
    from . import resharding  # noqa: PLC0415 - JAX, only where devices are used
    from .devices import pytree  # noqa: PLC0415 - JAX, only where devices are used

    wanted = pytree.target_of(
        tree,
        target,
        devices=devices,
        rules=rules,
        logical_axis_rules=logical_axis_rules,
        unmatched=unmatched,
        config=config,
    )
    limit = None if device_bytes is None else parse_size(device_bytes, "device_bytes")
    return resharding.prepare_reshard(tree, wanted, donate=donate, copy=copy, device_bytes=limit)


def gather(
    tree: Any, device: Any = None, *, host: bool = False, from_processes: bool = False
) -> Any:
    """Gather whole arrays: on one device, on each of their own devices, or as NumPy arrays.

    With ``from_processes``, ``host`` also fetches shards that only other processes hold.

    Raises:
        LayoutError: ``device`` and ``host`` are both given.
    """
    from . import resharding  # noqa: PLC0415 - JAX, only where devices are used

    return resharding.gather(tree, device, host=host, from_processes=from_processes)
