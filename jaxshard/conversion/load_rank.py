"""Loading one rank's share into NumPy arrays.

This is ``convert`` whose outputs are arrays. NumPy holds them; no device is asked.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from ..core.catalog import Catalog
from ..core.layout import Layout
from ..core.notes import log_notes
from ..core.strategy import Strategy
from ..errors import LayoutError
from ..storage.engine import HostArrays, run
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
    share = HostArrays((e.tensor.name, e.tensor.dtype, e.shape) for e in entries)
    files = open_source(plan.source)
    try:
        files.check_checksums()
        run(plan.moves(), files, share, budget=budget_of(options, plan.source))
        files.check_unchanged()
    finally:
        files.close()
    return share.arrays()
