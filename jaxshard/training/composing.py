"""Composing: what a step is made of, from a state and what the manager was told.

Which leaves, in which layout, with which numbers beside them, and in which copies; where it
goes and when is the manager's. Nothing is written here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import rules as family_rules
from ..array_layouts import layout_of
from ..catalog import Catalog, Tensor
from ..elements import stored_as
from ..layout import Layout
from ..strategy import Strategy
from ..targets.folders import refuse_empty
from . import naming
from .laying import lay_out
from .layouts import Wish
from .lineage import Line
from .naming import StepName
from .places import Places
from .saving_steps import Job, Keeping
from .snapshots import How, Snapshot
from .states import Array, Leaf, Roles, as_array, is_number, take_apart


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How all steps of a run are made; see ``CheckpointManager`` for what each of it means.

    Attributes:
        trained: which weights are trained; all are, if there is none.
        config: the contents of ``config.json``.
    """

    prefix: str
    format: str
    steps_per_epoch: int | None
    global_batch_size: int | None
    strategy: str | Strategy | Layout | None
    rules: family_rules.Rules | None
    remove_redundancy: bool
    save_optimizer: bool
    save_network_only: bool
    save_trainable_only: bool
    trained: tuple[re.Pattern[str], ...]
    snapshot: How
    roles: Roles
    rename: Callable[[str], str] | None
    config: bytes | None
    keeping: Keeping
    durable: bool
    workers: int | None
    host_bytes: int | None

    def step_name(self, step: int) -> StepName:
        """The name of step number ``step`` of the whole run."""
        # Checkpoint-2.0 folders are named by the step of the whole run
        epochs = None if self.format == "iteration" else self.steps_per_epoch
        return naming.step_name(step, epochs)

    def job(
        self,
        places: Places,
        step: int,
        state: Any,
        extras: Mapping[str, Any],
        loss_scale: float | None,
        after: Line | None,
    ) -> Job:
        """What it takes to save ``state`` as ``step`` in ``places``, all of it held still.

        Raises:
            LayoutError: the state cannot be saved in this way.
        """
        leaves = self._leaves(state)
        arrays = {leaf.name: as_array(leaf.value) for leaf in leaves}
        weights = frozenset(leaf.name for leaf in leaves if leaf.role == "weights")
        if self.format == "orbax":
            refuse_empty({name: array.shape for name, array in arrays.items()})
        numbers = self._numbers(step, loss_scale)
        like = self._likes(leaves, arrays)
        told = weights | like.keys()
        hyper = {n for n, a in arrays.items() if n not in told and is_number(a)}
        if self.format != "iteration":  # which keeps them in common.json
            added = {n: a for n, a in _number_tensors(numbers).items() if n not in arrays}
            arrays |= added
            hyper |= added.keys()
        layout = self._layout(arrays, frozenset(hyper), like)
        name = self.step_name(step)
        wish = Wish(self.prefix, name, step, layout, self.remove_redundancy, numbers, self.config)
        return Job(
            places,
            self.format,
            wish,
            Snapshot(arrays, how=self.snapshot),
            weights,
            frozenset(hyper),
            self._copies(weights),
            extras,
            self.keeping,
            self.durable,
            self.workers,
            self.host_bytes,
            after,
        )

    def _leaves(self, state: Any) -> list[Leaf]:
        found = take_apart(state, self.roles, self.rename).leaves
        return [leaf for leaf in found if self.save_optimizer or leaf.role != "optimizer"]

    def _numbers(self, step: int, loss_scale: float | None) -> dict[str, Any]:
        return {
            "epoch_num": naming.step_name(step, self.steps_per_epoch).epoch,
            "step_num": step,
            "global_step": step,
            "loss_scale": loss_scale,
            "global_batch_size": self.global_batch_size,
        }

    def _likes(self, leaves: Iterable[Leaf], arrays: Mapping[str, Array]) -> dict[str, str]:
        """What is kept for a weight and shaped as it, with the weight: both lie alike."""
        known = self.strategy.placements if isinstance(self.strategy, Layout) else arrays
        return {
            leaf.name: leaf.like
            for leaf in leaves
            if leaf.like and leaf.name in known
            if arrays[leaf.name].shape == arrays[leaf.like].shape
        }

    def _layout(
        self, arrays: Mapping[str, Array], hyper: frozenset[str], like: Mapping[str, str]
    ) -> Layout:
        if self.strategy is None:
            return layout_of(arrays)
        if isinstance(self.strategy, Layout):
            return self.strategy
        strategy = self.strategy
        strategy = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
        return lay_out(_described(arrays, hyper), like, strategy, self.rules)

    def _copies(self, weights: frozenset[str]) -> dict[str, tuple[str, ...]]:
        ordered = sorted(weights)
        if self.save_trainable_only:
            names = [n for n in ordered if not self.trained or self._is_trained(n)]
            return {naming.TRAINABLE: tuple(names)}
        return {naming.NETWORK: tuple(ordered)} if self.save_network_only else {}

    def _is_trained(self, name: str) -> bool:
        return any(pattern.search(name) for pattern in self.trained)


def _described(arrays: Mapping[str, Array], hyper: frozenset[str]) -> Catalog:
    """Arrays as a catalog of names and shapes, which is what rules ask for."""
    tensors = {n: Tensor(n, stored_as(a.dtype), a.shape, ()) for n, a in arrays.items()}
    return Catalog("memory", "arrays", (), tensors, hyper=hyper)


def _number_tensors(numbers: Mapping[str, Any]) -> dict[str, Array]:
    """The job's numbers as MindFormers stores them."""
    kinds = {
        "epoch_num": (np.int64, ()),
        "step_num": (np.int64, ()),
        "global_step": (np.int32, (1,)),
        "loss_scale": (np.float32, ()),
        "global_batch_size": (np.int64, ()),
    }
    return {
        name: np.full(shape, numbers[name], dtype)
        for name, (dtype, shape) in kinds.items()
        if numbers.get(name) is not None
    }
