"""Writing Orbax checkpoints, one tensor in memory at a time.

One tensor at a time is in memory, whatever the model's size; no device is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..core.catalog import Tensor
from ..core.numpy_dtypes import numpy_dtype
from ..planning.copies import TensorCopy
from ..planning.plan import Plan
from ..storage.engine import HostArrays, run
from ..storage.io import Source
from ..storage.resources import Budget, Counts


def write_orbax(
    plan: Plan,
    source: Source,
    place: Path,
    budget: Budget,
    progress: Callable[[int], None] | None = None,
) -> Counts:
    """Write the tensors of ``plan`` as an Orbax item at ``place``, which is replaced.

    Raises:
        LayoutError: a tensor's dtype is none that arrays have.
        StorageError: Orbax cannot write it.
    """
    from ..formats.orbax_items import (  # noqa: PLC0415 - JAX and a second to import
        LazyArray,
        write_streaming,
    )

    reader = _Reader(source, budget, progress)
    later = {}
    for move in plan.moves():
        tensor = plan.source.tensors[move.name]
        read = partial(reader.read, move, tensor)
        later[move.name] = LazyArray(tensor.shape, numpy_dtype(tensor.dtype), read)
    write_streaming(place, later)
    return reader.counts


class _Array(HostArrays):
    is_memory = False  # the counts are those of the plan, which is of files


@dataclass
class _Reader:
    """Reads tensors whole, and counts."""

    source: Source
    budget: Budget
    progress: Callable[[int], None] | None
    counts: Counts = field(default_factory=Counts)

    def read(self, move: TensorCopy, tensor: Tensor) -> NDArray[Any]:
        into = _Array([(tensor.name, tensor.dtype, tensor.shape)])
        self.counts += run([move], self.source, into, budget=self.budget, progress=self.progress)
        return into.arrays()[tensor.name]
