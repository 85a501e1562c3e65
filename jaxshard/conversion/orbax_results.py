"""Writing Orbax checkpoints, one tensor in memory at a time.

One tensor at a time is in memory, whatever the model's size; no device is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.numpy_dtypes import Conversion, numpy_dtype
from ..planning.copies import TensorCopy
from ..planning.plan import Plan
from ..storage.engine import run
from ..storage.readers import OpenSource
from ..storage.resources import Budget, Counts


def write_orbax(
    plan: Plan,
    source: OpenSource,
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
        conversion = Conversion(tensor.dtype, numpy_dtype(tensor.dtype))
        read = partial(reader.read, move, conversion, tensor.shape)
        later[move.name] = LazyArray(tensor.shape, conversion.dtype, read)
    write_streaming(place, later)
    return reader.counts


@dataclass
class _Reader:
    """Reads tensors whole, and counts."""

    source: OpenSource
    budget: Budget
    progress: Callable[[int], None] | None
    counts: Counts = field(default_factory=Counts)

    def read(
        self, move: TensorCopy, conversion: Conversion, shape: tuple[int, ...]
    ) -> NDArray[Any]:
        out = np.empty(conversion.num_bytes(shape), np.uint8)

        def fill(move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
            conversion.fill(out, offset, np.frombuffer(buffer, np.uint8))
            return 1

        self.counts += run(
            [move], self.source.read, fill, budget=self.budget, progress=self.progress
        )
        return out.view(conversion.dtype).reshape(shape)
