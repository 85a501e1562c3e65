"""Loading: from a checkpoint to arrays on devices."""

from __future__ import annotations

from typing import Any

import jax

from ..conversion import default_budget
from ..opening import open_checkpoint
from ..storage.engine import fit_budget
from ..storage.reading import SourceFiles
from .. import devices as dv
from ..strategy import Strategy
from ..targets import lay_out_for
from ..elements import numpy_dtype
from .carrying import Source, carry
from .wanted import Want, jobs


def load(source, target, *, host_bytes=None, workers=2) -> dict[str, jax.Array]:
    catalog = open_checkpoint(source)
    layout = lay_out_for(catalog, Strategy.parse(target))
    sh = dv.shardings(layout)
    wants = [Want(t, numpy_dtype(t.dtype), sh[t.name]) for t in catalog.tensors.values()]
    todo = jobs(wants)
    files = SourceFiles(catalog)
    arrays, counts = carry(
        [j for j, _ in todo], Source(files.read), budget=fit_budget(default_budget(), workers)
    )
    out = [None] * len(wants)
    for (job, places), made in zip(todo, arrays):
        for p, a in zip(places, made):
            out[p] = a
    load.counts = counts
    return dict(zip(catalog.tensors, out))
