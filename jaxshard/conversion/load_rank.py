"""Loading the share of one rank into NumPy arrays: a conversion whose outputs are arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..core.catalog import Catalog
from ..core.layout import Layout
from ..core.notes import log_notes
from ..core.strategy import Strategy
from ..errors import LayoutError
from ..planning.plan import block_bytes_for
from ..rules import Policy, Rules
from ..storage.engine import HostArrays, run
from ..storage.readers import open_source
from ..storage.resources import budget_for
from .open import PathLike
from .prepare import prepare

if TYPE_CHECKING:
    from ..mapping import Mapping


def load_rank(
    source: Catalog | PathLike,
    to: str | PathLike | Strategy | Layout,
    rank: int = 0,
    *,
    src_strategy: PathLike | None = None,
    suffix: str | None = None,
    rules: Rules | None = None,
    names: Mapping | str | None = None,
    unmatched: Policy = "error",
    uneven: Policy = "error",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    drop_prefix: Iterable[str] = (),
    keep_accu_grads: bool = False,
    workers: int | None = None,
    host_bytes: int | str | None = None,
) -> dict[str, NDArray[Any]]:
    """What ``rank`` holds of ``source`` laid out as ``to`` says: ``{name: array}``.

    Args:
        source: a checkpoint, or its path.
        to: the layout, as for ``convert``; ``"full"`` has rank 0 only.
        rank: the rank whose shards are loaded.
        src_strategy: as for ``convert``, like the options after it.
        suffix: which of several files per rank the source has.
        rules: layout rules that precede the family's own.
        names: a mapping to other names and shapes.
        unmatched: names without a rule are an error, or ``"replicate"``.
        uneven: dims that do not divide are an error, or ``"replicate"``.
        include: regular expressions; only tensors that match one of them are loaded.
        exclude: regular expressions; tensors that match one of them are left out.
        drop_prefix: tensors whose names start with one of these are left out.
        keep_accu_grads: load accumulated gradients too.
        workers: number of threads; by default one per core, at most 8.
        host_bytes: memory limit for data in flight, beside the arrays themselves.

    Raises:
        JaxshardError: as ``prepare``.
    """
    whole = isinstance(to, str) and to == "full"
    if whole and rank:
        raise LayoutError(f"rank {rank} of a complete checkpoint: there is rank 0 only.")
    plan = prepare(
        source,
        to,
        src_strategy=src_strategy,
        suffix=suffix,
        rules=rules,
        names=names,
        unmatched=unmatched,
        uneven=uneven,
        include=include,
        exclude=exclude,
        drop_prefix=drop_prefix,
        keep_accu_grads=keep_accu_grads,
        rank=None if whole else rank,
    ).plan
    log_notes(plan.source.root, plan.notes, plan.source.logged)
    wanted = range(len(plan.outputs.paths)) if plan.only is None else plan.only
    entries = [e for r in wanted for e in plan.outputs.contents[plan.outputs.content_of[r]]]
    share = HostArrays((e.tensor.name, e.tensor.dtype, e.shape) for e in entries)
    files = open_source(plan.source)
    try:
        files.check_checksums()
        budget = budget_for(host_bytes, workers, block_bytes_for(plan.source))
        run(plan.moves(), files, share, budget=budget)
        files.check_unchanged()
    finally:
        files.close()
    return share.arrays()
