"""The prepared resharder: planned and compiled once, called every step.

    planned = prepare_reshard(params, serving_shardings)   # routes chosen, programs compiled
    print(planned.plan)
    serving = planned(params)                              # every step

Units run in groups with a barrier: no more than ``device_bytes`` is in flight on a device,
and on the CPU backend programs in which devices wait for each other run one at a time,
because XLA:CPU can deadlock when several do.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..devices.pytree import named_leaves
from ..errors import LayoutError
from . import cpu_route
from .batches import Unit, units_of
from .geometry import Move, all_device_boxes
from .leaves import Leaf, Target, check_alive, leaves_of
from .programs import own_context
from .report import LeafPlan, ReshardPlan
from .routes import Route
from .shards import apart, data_of, memory_kind_of, relabelled, shared_shards

_Memory = tuple[jax.Device, int]


class Donated:
    """The donated shards that are still held."""

    def __init__(self, arrays: Sequence[jax.Array]) -> None:
        self._shards = [[(_memory(shard), shard) for shard in data_of(x)] for x in arrays]
        self._needed: dict[_Memory, list[jax.Array]] = defaultdict(list)
        for shards in self._shards:
            for memory, shard in shards:
                self._needed[memory].append(shard)
        self._num_moved: dict[_Memory, int] = defaultdict(int)
        self._kept: set[_Memory] = set()

    def moved(self, n: int, move: Move) -> None:
        """Free what array ``n`` holds, except what another still needs or its target may share."""
        for (memory, _), is_shared in zip(self._shards[n], shared_shards(move), strict=True):
            self._num_moved[memory] += 1
            if is_shared:
                self._kept.add(memory)
            holders = self._needed[memory]
            if self._num_moved[memory] == len(holders) and memory not in self._kept:
                for holder in holders:
                    holder.delete()
        self._shards[n] = []


def _memory(shard: jax.Array) -> _Memory:
    (device,) = shard.devices()
    return device, shard.unsafe_buffer_pointer()


# --- Resharding prepared once and carried out many times

_IN_FLIGHT_BYTES = 512 << 20  # per device, where the caller gives no bound
_ALONE = threading.Lock()  # for programs that must not meet others, whatever thread calls them


class Resharder:
    """Takes trees of one structure and sharding to their target. Made by `prepare_reshard`."""

    def __init__(
        self,
        leaves: Sequence[Leaf],
        structure: Any,
        units: Sequence[Unit],
        *,
        donate: bool,
        copy: bool,
        device_bytes: int | None,
    ) -> None:
        self._leaves = leaves
        self._structure = structure
        self._units = _copies_first(units, leaves)
        self._donate = donate
        self._copy = copy
        self._in_flight_bytes = _IN_FLIGHT_BYTES if device_bytes is None else device_bytes
        self.plan = _plan(leaves, units, device_bytes)

    def __call__(self, tree: Any) -> Any:
        """The arrays of ``tree`` at their target.

        Raises:
            LayoutError: the tree is not the kind that was prepared for, or an array was deleted.
        """
        arrays, structure = jax.tree_util.tree_flatten(tree)
        if structure != self._structure:
            raise LayoutError(
                f"this resharder is for {self._structure}, and was given {structure}. "
                "Prepare one for it."
            )
        with own_context():
            data = [_data(leaf, x) for leaf, x in zip(self._leaves, arrays, strict=True)]
            donated = Donated(data) if self._donate else None
            run = _Run(self._leaves, data, donated, copy=self._copy)
            moved = run.all(self._units, self._in_flight_bytes)
            found = [
                x if leaf.key_impl is None else jax.random.wrap_key_data(x, impl=leaf.key_impl)
                for x, leaf in zip(moved, self._leaves, strict=True)
            ]
        return jax.tree_util.tree_unflatten(self._structure, found)


def _data(leaf: Leaf, array: Any) -> jax.Array:
    """What is moved of ``array``, under the sharding that was planned for."""
    if not isinstance(array, jax.Array):
        raise LayoutError(f"{leaf.name}: a {type(array).__name__} holds nothing. Give the array.")
    check_alive(leaf.name, array)
    move = leaf.move
    if (array.shape, array.dtype) == (leaf.shape, leaf.dtype):
        data = array if leaf.key_impl is None else jax.random.key_data(array)
        if data.sharding == move.source:
            return data
        if _lies_as_planned(data, move):  # the same in other words, as P("x", None) is P("x")
            return relabelled(data, move.source)
    raise LayoutError(
        f"{leaf.name}: prepared for {leaf.dtype} {leaf.shape} on {move.source}; this is "
        f"{array.dtype} {array.shape} on {array.sharding}. Prepare a resharder for it."
    )


def _lies_as_planned(array: jax.Array, move: Move) -> bool:
    held, planned = (all_device_boxes(s, move.shape) for s in (array.sharding, move.source))
    return held == planned and memory_kind_of(array.sharding) == memory_kind_of(move.source)


class _Run:
    """One call: what is in flight, and which sources may be freed."""

    def __init__(
        self,
        leaves: Sequence[Leaf],
        data: list[jax.Array],
        donated: Donated | None,
        *,
        copy: bool,
    ) -> None:
        self.leaves = leaves
        self.data: list[jax.Array | None] = list(data)
        self.found: list[jax.Array | None] = [None] * len(data)
        self.donated = donated
        self.copy = copy
        self.in_flight: list[jax.Array] = []
        self.in_flight_bytes = 0

    def all(self, units: Sequence[Unit], limit_bytes: int) -> list[jax.Array]:
        def stay() -> None:
            for unit in units:
                if unit.kind == "stay":
                    self._unit(unit, limit_bytes)

        self._views([u.leaves[0] for u in units if u.kind == "views"], meanwhile=stay)
        for unit in units:
            if unit.kind not in ("views", "stay"):
                self._unit(unit, limit_bytes)
        if self.in_flight and _is_cpu(self.in_flight[0]):
            self._barrier()  # the caller's own programs must not meet ours either
        return [x for x in self.found if x is not None]

    def _views(self, numbers: Sequence[int], *, meanwhile: Callable[[], None]) -> None:
        def done(n: int, array: jax.Array) -> None:
            self._finish(numbers[n], array)

        arrays = (self._source(n) for n in numbers)
        moves = [self.leaves[n].move for n in numbers]
        cpu_route.run(arrays, moves, done, share=not self.copy, meanwhile=meanwhile)

    def _unit(self, unit: Unit, limit_bytes: int) -> None:
        arrays = [self._source(n) for n in unit.leaves]
        if self.copy and unit.kind in ("stay", "copy", "pieces"):  # the others share nothing
            moves = [self.leaves[n].move for n in unit.leaves]
            arrays = [apart(x, move) for x, move in zip(arrays, moves, strict=True)]
        if unit.has_collectives and _is_cpu(arrays[0]):
            arrays = self._alone(unit, arrays)
        else:
            if self.in_flight_bytes + unit.in_flight_bytes > limit_bytes:
                self._barrier()
            for stage in unit.stages:
                arrays = stage.run(arrays)
            self.in_flight += arrays
            self.in_flight_bytes += unit.in_flight_bytes
        for n, array in zip(unit.leaves, arrays, strict=True):
            self._finish(n, relabelled(array, self.leaves[n].move.target))

    def _alone(self, unit: Unit, arrays: list[jax.Array]) -> list[jax.Array]:
        """The unit's arrays, moved while nothing else is under way."""
        self._barrier()
        jax.block_until_ready(arrays)
        with _ALONE:
            for stage in unit.stages:
                arrays = jax.block_until_ready(stage.run(arrays))
        return arrays

    def _barrier(self) -> None:
        jax.block_until_ready(self.in_flight)
        self.in_flight, self.in_flight_bytes = [], 0

    def _source(self, n: int) -> jax.Array:
        array = self.data[n]
        assert array is not None, "every leaf is used once"
        return array

    def _finish(self, n: int, array: jax.Array) -> None:
        self.found[n], self.data[n] = array, None
        if self.donated is not None:
            self.donated.moved(n, self.leaves[n].move)


def prepare_reshard(
    tree: Any,
    target: Target,
    *,
    donate: bool = False,
    copy: bool = False,
    device_bytes: int | None = None,
    route: Route = "auto",
) -> Resharder:
    """A `Resharder` for trees like ``tree``: routes chosen, programs compiled, nothing moved.

    Args:
        tree: arrays, or ``jax.ShapeDtypeStruct``s that carry a sharding.
        target: as for `reshard`, like all that follows.
        donate: see `reshard`.
        copy: see `reshard`. Ask for it where a step donates the arrays that it was given:
            what was made of them lives on.
        device_bytes: see `reshard`.
        route: see `reshard`.

    Raises:
        LayoutError: as `reshard`.
        NotFoundError: as `reshard`.
    """
    if donate and copy:
        raise LayoutError(
            "donate gives the sources up, copy is for those that live on. Choose one of them."
        )
    leaves, structure = leaves_of(tree, target)
    with own_context():
        units = units_of(leaves, route, device_bytes)
    return Resharder(leaves, structure, units, donate=donate, copy=copy, device_bytes=device_bytes)


def reshard(
    tree: Any,
    target: Target,
    *,
    donate: bool = False,
    copy: bool = False,
    device_bytes: int | None = None,
    route: Route = "auto",
) -> Any:
    """The arrays of ``tree`` under other shardings, moved from device to device.

    A shard that already is where it should be is not copied: the result shares its memory,
    as with ``jax.device_put``, and whoever deletes or donates the one array deletes the other.

    Args:
        tree: a pytree of ``jax.Array``.
        target: one sharding for all; a tree of them of the same structure; ``{name: sharding}``,
            the name of a nested leaf being its keys joined by dots; a function of that name; or
            a `Layout`, whose ranks are the devices that `devices.shardings` gives them. In place
            of a sharding, a ``PartitionSpec`` means the array's own mesh, and an array or
            ``ShapeDtypeStruct`` its sharding.
        donate: free each source array as soon as it has been moved.
        copy: share no memory with the sources, so that both live on whatever becomes of the
            other.
        device_bytes: a bound on what is in flight on each device beyond sources and targets.
        route: ``"auto"``; ``"device"`` to use what an accelerator would, also on the CPU
            backend; ``"views"`` to insist on the CPU backend's own.

    Raises:
        LayoutError: a target cannot hold its array, is not on this process's devices, cannot be
            reached within ``device_bytes``, or an array was donated before.
        NotFoundError: the target does not name some arrays.
    """
    for name, x in named_leaves(tree, unique=False)[0]:
        check_alive(name, x)
    prepared = prepare_reshard(
        tree, target, donate=donate, copy=copy, device_bytes=device_bytes, route=route
    )
    return prepared(tree)


def _copies_first(units: Sequence[Unit], leaves: Sequence[Leaf]) -> list[Unit]:
    """What the host copies before what only gets a new label: threads copy meanwhile."""

    def copies_nothing(unit: Unit) -> bool:
        return unit.kind == "views" and not cpu_route.num_copied(leaves[unit.leaves[0]].move)

    return sorted(units, key=copies_nothing)


def _is_cpu(array: jax.Array) -> bool:
    return bool(next(iter(array.devices())).platform == "cpu")


def _plan(leaves: Sequence[Leaf], units: Sequence[Unit], device_bytes: int | None) -> ReshardPlan:
    rows: dict[int, LeafPlan] = {}
    programs = {}
    for unit in units:
        for stage in unit.stages:
            if stage.num_compiled:
                programs[id(stage.program)] = stage.num_compiled
        for n, way in zip(unit.leaves, unit.ways, strict=True):
            move, moved = leaves[n].move, way.traffic
            rows[n] = LeafPlan(
                leaves[n].name,
                move.shape,
                str(move.dtype),
                unit.kind,
                tuple(str(getattr(s, "spec", s)) for s in way.between),
                moved.same_device_bytes,
                moved.cross_device_bytes,
                unit.largest_bytes,
                unit.in_flight_bytes,
            )
    ordered = tuple(rows[n] for n in sorted(rows))
    return ReshardPlan(ordered, sum(programs.values()), device_bytes)
