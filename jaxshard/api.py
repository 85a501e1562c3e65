"""The verbs as functions: each a few lines that compose the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from .conversion.execute import Report, execute
from .conversion.open import PathLike, open_checkpoint, opened
from .conversion.options import Options, budget_of, with_given
from .conversion.prepare import fitted, prepare
from .conversion.verify import Verdict, verify_against
from .conversion.verify import verify as verify_alone
from .core.catalog import Catalog
from .core.layout import Layout
from .core.notes import log_notes, with_notes_logged
from .core.strategy import Strategy
from .planning.plan import Plan
from .rules import Rules

To = str | PathLike | Strategy | Layout
_DEFAULT = Options()


def open(path: PathLike, *, strategy: PathLike | None = None, suffix: str | None = None) -> Catalog:
    """The contents of the checkpoint at ``path``, from headers only; see ``open_checkpoint``."""
    return with_notes_logged(open_checkpoint(path, strategy=strategy, suffix=suffix))


def plan(
    source: Catalog | PathLike, to: To = "full", *, options: Options = _DEFAULT, **how: Any
) -> Plan:
    """What ``convert`` with the same arguments would read, copy and write; nothing is done.

    ``print`` shows it as a person reads it; its ``totals`` are the numbers. Of the options, the
    threads and the memory matter (``host_bytes=`` …): blocks are as large as they allow.
    """
    options, how = with_given(options, how)
    made = fitted(prepare(source, to, **how), options).plan
    log_notes(made.source.root, made.notes, made.source.logged)
    return made


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
        destination: a folder, or one file where the name is that of a weight file
            (``out.safetensors``); it appears whole or not at all.
        to: ``"full"``, a strategy (``"dp2mp4pp2"``), strategy files, or a ``Layout``.
        options: threads, memory, resuming, overwriting, durability.
        progress: given the bytes to write, returns a function told of those written.
        how: as for ``prepare``: include, exclude, ranks, rules, remove_redundancy …; or one of
            the options by its name (``overwrite=True``).

    Raises:
        JaxshardError: its five kinds say what to do; see ``errors``.
    """
    options, how = with_given(options, how)
    prepared = prepare(source, to, destination=destination, **how)
    report = execute(prepared, destination, options=options, progress=progress)
    log_notes(str(destination), report.notes, prepared.plan.source.logged)
    return report


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
    catalog = with_notes_logged(opened(checkpoint))
    verdict = verify_alone(catalog, budget=budget, progress=progress)
    if against is None or verdict.problems:
        return verdict
    other = with_notes_logged(opened(against))
    return verify_against(catalog, other, budget=budget, progress=progress)


def reshard(
    tree: Any,
    target: Any,
    *,
    devices: Sequence[Any] | None = None,
    rules: Rules | None = None,
    donate: bool = False,
    copy: bool = False,
    device_bytes: int | None = None,
    route: Literal["auto", "device", "views"] = "auto",
) -> Any:
    """The arrays of ``tree`` laid out as ``target`` says, moved from device to device.

    Args:
        tree: a pytree of ``jax.Array``.
        target: a strategy (``"dp4mp2"``), by the rules of the names' family; or shardings, in
            any of the forms that ``transfer.reshard`` takes.
        devices: for a strategy, the device of each rank; by default all there are.
        rules: for a strategy, rules that go before the family's.
        donate: free each source array as soon as it has been moved.
        copy: share no memory with the sources; by default a shard that stays where it is is shared,
            and is gone when a later step donates its source.
        device_bytes: a bound on what is in flight on each device beyond sources and targets.
        route: see ``transfer.reshard``.

    Raises:
        LayoutError: the target cannot hold an array, or a device is not there.
        NotFoundError: the target does not name some arrays.
    """
    from . import resharding  # noqa: PLC0415 - JAX, only where devices are used
    from .devices import rule_shardings  # noqa: PLC0415 - JAX, only where devices are used

    wanted = rule_shardings.target_of(tree, target, devices=devices, rules=rules)
    return resharding.reshard(
        tree, wanted, donate=donate, copy=copy, device_bytes=device_bytes, route=route
    )


def prepare_reshard(
    tree: Any,
    target: Any,
    *,
    devices: Sequence[Any] | None = None,
    rules: Rules | None = None,
    donate: bool = False,
    copy: bool = False,
    device_bytes: int | None = None,
    route: Literal["auto", "device", "views"] = "auto",
) -> Any:
    """A ``transfer.Resharder`` for trees like ``tree``, planned and compiled once.

    Call it every step with such a tree; print its ``plan``. Arguments and errors as ``reshard``.
    Where the step donates what it was given, as training steps do, ask for ``copy=True``.
    """
    from . import resharding  # noqa: PLC0415 - JAX, only where devices are used
    from .devices import rule_shardings  # noqa: PLC0415 - JAX, only where devices are used

    wanted = rule_shardings.target_of(tree, target, devices=devices, rules=rules)
    return resharding.prepare_reshard(
        tree, wanted, donate=donate, copy=copy, device_bytes=device_bytes, route=route
    )


def gather(
    tree: Any, device: Any = None, *, host: bool = False, from_processes: bool = False
) -> Any:
    """The arrays of ``tree`` whole: on one device, on each of their own, or as NumPy.

    With ``from_processes``, ``host`` gives every process also what only others hold.

    Raises:
        LayoutError: both a device and the host are asked for.
    """
    from . import resharding  # noqa: PLC0415 - JAX, only where devices are used

    return resharding.gather(tree, device, host=host, from_processes=from_processes)
