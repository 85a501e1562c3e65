"""Tensors of a checkpoint as NumPy arrays in host memory: a rank's share, or one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..core.catalog import Catalog, Tensor, log_notes
from ..core.layout import Layout, Strategy
from ..core.numpy_dtypes import numpy_dtype
from ..errors import LayoutError
from ..formats.output_files import LazyArray
from ..planning.copies import TensorCopy
from ..planning.plan import Plan
from ..rules import Policy, Rules, Unmatched
from ..storage.engine import HostArrays, run
from ..storage.io import Source
from ..storage.readers import open_source
from ..storage.resources import Budget, Counts
from .open import Config, PathLike
from .prepare import downloaded_first, files_to_check, prepare
from .targets import FULL

if TYPE_CHECKING:
    from ..mapping import Mapping


def load_rank(
    source: Catalog | PathLike,
    to: str | PathLike | Strategy | Layout,
    rank: int = 0,
    *,
    src_strategy: PathLike | None = None,
    suffix: str | None = None,
    config: Config | None = None,
    rules: Rules | None = None,
    names: Mapping | str | None = None,
    unmatched: Unmatched = "error",
    uneven: Policy = "error",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    drop_prefix: Iterable[str] = (),
    keep_accu_grads: bool = False,
    workers: int | None = None,
    host_bytes: int | str | None = None,
    stream: bool = False,
) -> dict[str, NDArray[Any]]:
    """Return the shards of ``rank`` of ``source`` in the layout ``to``: ``{name: array}``.

    Args:
        source: a checkpoint, or its path.
        to: the layout, as for ``convert``; ``"full"`` has rank 0 only.
        rank: the rank whose shards are loaded.
        src_strategy: as for ``convert``, like the options after it.
        suffix: which of several files per rank the source has.
        config: the model's ``config.json``, or its path, for a source without one.
        rules: layout rules that precede the family's own.
        names: a mapping to other names and shapes.
        unmatched: names without a rule are an error, or ``"replicate"``, or ``"largest"``: split by
            their shapes.
        uneven: dims that do not divide are an error, or ``"replicate"``.
        include: regular expressions; only tensors that match one of them are loaded.
        exclude: regular expressions; tensors that match one of them are left out.
        drop_prefix: tensors whose names start with one of these are left out.
        keep_accu_grads: load accumulated gradients too.
        workers: number of threads; by default one per core, at most 8.
        host_bytes: memory limit for data in flight, without the arrays themselves.
        stream: read a repository of the Hub by ranges, and write nothing to its local cache.

    Raises:
        JaxshardError: as ``prepare``.
    """
    whole = to == FULL
    if whole and rank:
        raise LayoutError(f"rank {rank} of a complete checkpoint: there is rank 0 only.")
    prepared = prepare(
        source,
        to,
        src_strategy=src_strategy,
        suffix=suffix,
        config=config,
        rules=rules,
        names=names,
        unmatched=unmatched,
        uneven=uneven,
        include=include,
        exclude=exclude,
        drop_prefix=drop_prefix,
        keep_accu_grads=keep_accu_grads,
        rank=None if whole else rank,
        workers=workers,
        host_bytes=host_bytes,
    )
    prepared = prepared if stream else downloaded_first(prepared)
    plan = prepared.plan
    log_notes(plan.source.root, plan.notes, plan.source.logged)
    wanted = range(len(plan.outputs.paths)) if plan.only is None else plan.only
    entries = [e for r in wanted for e in plan.outputs.contents[plan.outputs.content_of[r]]]
    share = HostArrays((e.tensor.name, e.tensor.dtype, e.shape) for e in entries)
    with open_source(plan.source) as files:
        files.check_checksums(files_to_check(plan))
        run(plan.moves(), files, share, budget=prepared.budget, ahead=plan.moves())
    return share.arrays()


# --- Whole tensors, read one at a time by the library that writes them


class _WholeTensor(HostArrays):
    is_memory = False  # count as the plan does, which is for files


@dataclass
class LazyTensors:
    """Whole tensors of a plan, each read when it is needed, and the counts of all reads."""

    source: Source
    budget: Budget
    progress: Callable[[int], None] | None = None
    counts: Counts = field(default_factory=Counts)

    def of(self, plan: Plan) -> dict[str, LazyArray]:
        """Return the tensors of ``plan`` by name.

        Raises:
            LayoutError: arrays do not have a tensor's dtype.
        """
        found = {}
        for copy in plan.moves():
            tensor = plan.source.tensors[copy.name]
            dtype = numpy_dtype(tensor.dtype)
            found[copy.name] = LazyArray(tensor.shape, dtype, partial(self.read, copy, tensor))
        return found

    def read(self, copy: TensorCopy, tensor: Tensor) -> NDArray[Any]:
        """Read the whole ``tensor``."""
        into = _WholeTensor([(tensor.name, tensor.dtype, tensor.shape)])
        self.counts += run([copy], self.source, into, budget=self.budget, progress=self.progress)
        return into.arrays()[tensor.name]
