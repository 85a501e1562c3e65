"""Loading one rank's share into NumPy arrays.

This is ``convert`` whose outputs are arrays. NumPy holds them; no device is asked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.catalog import Catalog
from ..core.layout import Layout
from ..core.notes import log_notes
from ..core.numpy_dtypes import Conversion, numpy_dtype
from ..core.strategy import Strategy
from ..errors import LayoutError
from ..planning.copies import TensorCopy
from ..planning.outputs import Entry
from ..storage.engine import run
from ..storage.readers import open_source
from .open import PathLike
from .options import Options, budget_of, with_given
from .prepare import prepare

_DEFAULT = Options()


def load_rank(
    source: Catalog | PathLike,
    to: str | PathLike | Strategy | Layout,
    rank: int = 0,
    *,
    options: Options = _DEFAULT,
    **how: Any,
) -> dict[str, NDArray[Any]]:
    """What ``rank`` holds of ``source`` laid out as ``to`` says: ``{name: array}``.

    Args:
        source: a checkpoint, or its path.
        to: as for ``convert``; of ``"full"`` there is rank 0 only.
        rank: which.
        options: threads and memory.
        how: as for ``prepare``: include, exclude, rules, names …; or an option by its name.

    Raises:
        JaxshardError: as ``prepare``.
    """
    whole = isinstance(to, str) and to == "full"
    if whole and rank:
        raise LayoutError(f"rank {rank} of a complete checkpoint: there is rank 0 only.")
    one: dict[str, Any] = {} if whole else {"ranks": [rank]}
    options, how = with_given(options, how)
    plan = prepare(source, to, **one, **how).plan
    log_notes(plan.source.root, plan.notes, plan.source.logged)
    wanted = range(len(plan.outputs.paths)) if plan.only is None else plan.only
    entries = [e for r in wanted for e in plan.outputs.contents[plan.outputs.content_of[r]]]
    share = {e.tensor.name: _Memory(e) for e in entries}

    def write(move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        share[move.name].fill(offset, buffer)
        return 1

    files = open_source(plan.source)
    try:
        files.check_checksums()
        run(
            plan.moves(),
            files.read,
            write,
            budget=budget_of(options, plan.source),
            rows=files.read_rows,
        )
        files.check_unchanged()
    finally:
        files.close()
    return {name: memory.array for name, memory in share.items()}


class _Memory:
    """The memory of one tensor's share."""

    def __init__(self, entry: Entry) -> None:
        stored = entry.tensor.dtype
        self._conversion = Conversion(stored, numpy_dtype(stored))
        self._bytes = np.empty(self._conversion.num_bytes(entry.shape), np.uint8)
        self.array = self._bytes.view(self._conversion.dtype).reshape(entry.shape)

    def fill(self, offset: int, buffer: memoryview) -> None:
        """Put the stored bytes of ``buffer`` where they belong."""
        self._conversion.fill(self._bytes, offset, np.frombuffer(buffer, np.uint8))
