"""Output files of Checkpoint 2.0 folders: weights and optimizer states of a rank in separate
files.

A layout's ranks are files. So the files here are a layout of twice as many ranks: states
lie as their weights do, that many ranks further on. This module touches no disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from ..core.catalog import Catalog, Tensor
from ..core.layout import Layout, Placement, Shard
from ..errors import LayoutError
from ..formats.folder import COMMON, ITERATION_METADATA, TRACKER
from ..formats.iteration import Stores, metadata_json
from ..planning.outputs import Outputs, arrange
from ..rules.match import weight_name
from .rank_results import placed
from .results import Request, Result, as_safetensors

_COMMON = ("epoch_num", "step_num", "global_step", "loss_scale", "global_batch_size")


def iteration(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """``iteration_{step}/`` and the tracker that names it.

    Raises:
        LayoutError: a tensor is not in the layout, or has a dtype that MindSpore has not.
    """
    everything = Layout(1, {t.name: (Placement(()),) for t in tensors})
    layout = everything if request.to is None else placed(source, tensors, request)
    step = int(request.numbers.get("global_step", request.numbers.get("step_num", 0)))
    if step < 0:
        raise LayoutError(f"global_step is {step}; an iteration is numbered from 0.")
    folder = f"iteration_{step:08d}"
    states = {t.name for t in tensors if _is_state(t.name, source)}
    files = _Files(layout.num_ranks, folder, request.prefix, bool(states))
    lying = {
        t.name: files.placements(t.name, layout, t.name in states, t.name in source.hyper)
        for t in tensors
    }
    outputs = arrange(
        tensors,
        Layout(files.num_files, lying, notes=layout.notes),
        files.paths,
        remove_redundancy=request.remove_redundancy,
    )
    told = [(t, None if t.name in source.hyper else _cut(layout, t)) for t in tensors]
    side = {
        f"{folder}/{ITERATION_METADATA}": metadata_json(told, files.stores(outputs)),
        f"{folder}/{COMMON}": _common(request.numbers),
        TRACKER: str(step).encode(),
    }
    return Result(
        "iteration",
        outputs,
        as_safetensors({"format": "ms"}),
        side,
        extras_to=folder,
        files_per_rank=files.num_files // layout.num_ranks,
    )


def _is_state(name: str, source: Catalog) -> bool:
    return name in source.hyper or weight_name(name) != name


def _cut(layout: Layout, tensor: Tensor) -> Placement | None:
    """Where the tensor lies; of several stages that hold it, the first."""
    placement = layout.placements[tensor.name][0]
    return placement if layout.num_ranks > 1 else None


def _common(numbers: Mapping[str, Any]) -> bytes:
    """``common.json``: what MindFormers resumes with. What is not known is null.

    Raises:
        LayoutError: a number is infinite or not a number.
    """
    known = {name: numbers.get(name) for name in (*_COMMON, "consumed_samples")}
    more = {k: v for k, v in numbers.items() if k not in known and k != "ckpt_status"}
    said = {**known, **more, "ckpt_status": numbers.get("ckpt_status")}
    for name, value in said.items():
        if isinstance(value, float) and not isfinite(value):
            raise LayoutError(
                f"{name} is {value}, and {COMMON} can hold finite numbers only. Leave it out with "
                "exclude= (--exclude)."
            )
    return json.dumps(said, indent=4).encode()


class _Files:
    """Which file is which: those of weights by rank, then those of states."""

    def __init__(self, num_ranks: int, folder: str, prefix: str, has_states: bool) -> None:
        self._num_ranks, self._folder = num_ranks, folder
        kinds = ("model", "opt") if has_states else ("model",)
        named = prefix.rstrip("-_") + "-" if prefix.rstrip("-_") else ""
        self.names = tuple(
            f"{named}{kind}-{rank:07d}-{num_ranks:07d}.safetensors"
            for kind in kinds
            for rank in range(num_ranks)
        )
        self.num_files = len(self.names)
        self.paths = [f"{folder}/{name}" for name in self.names]

    def placements(
        self, name: str, layout: Layout, is_state: bool, is_number: bool
    ) -> tuple[Placement, ...]:
        """Where tensor ``name`` lies among the files; a number of the job in one of them."""
        shift = self._num_ranks if is_state else 0
        if is_number:
            return (Placement((), (), shift),)
        return tuple(replace(p, first_rank=p.first_rank + shift) for p in layout.placements[name])

    def stores(self, outputs: Outputs) -> Stores:
        """Which files store a shard, as the metadata is to say it."""

        def stores(name: str, placement: Placement, shard: Shard) -> list[tuple[int, str]]:
            mine = next(
                p
                for p in outputs.layout.placements[name]
                if p.first_rank % self._num_ranks == placement.first_rank
            )  # of several stages that hold it the first: one layout is all that can be said
            return [
                (file % self._num_ranks, self.names[file])
                for file in outputs.holders(name, mine, shard)
            ]

        return stores
