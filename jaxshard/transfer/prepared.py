"""Resharding prepared once and carried out many times.

    planned = prepare_reshard(params, serving_shardings)   # routes chosen, programs compiled
    print(planned.plan)
    serving = planned(params)                              # every step

Units run in groups with a barrier: no more than ``device_bytes`` is in flight on a device,
and on the CPU backend programs in which devices wait for each other run one at a time,
because XLA:CPU can deadlock when several do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ..box import Box
from ..errors import LayoutError
from ..trees import named_leaves
from . import host_views
from .geometry import Move, all_device_boxes, device_boxes
from .report import LeafPlan, ReshardPlan
from .routes import Route, traffic_of
from .shards import data_of, relabelled
from .targets import Leaf, Target, leaves_of, sharding_of
from .units import Unit, units_of

_IN_FLIGHT_BYTES = 512 << 20  # per device, where the caller gives no bound


class Resharder:
    """Takes trees of one structure and sharding to their target. Made by `prepare_reshard`."""

    def __init__(
        self,
        leaves: Sequence[Leaf],
        structure: Any,
        units: Sequence[Unit],
        *,
        donate: bool,
        device_bytes: int | None,
    ) -> None:
        self._leaves = leaves
        self._structure = structure
        self._units = units
        self._donate = donate
        self._in_flight_bytes = _IN_FLIGHT_BYTES if device_bytes is None else device_bytes
        self.plan = _plan(leaves, units, device_bytes)

    def __call__(self, tree: Any) -> Any:
        """The arrays of ``tree`` at their target.

        Raises:
            LayoutError: the tree is not the kind that was prepared for, or an array was deleted.
        """
        arrays = self._checked(tree)
        data = [
            x if leaf.key_impl is None else jax.random.key_data(x)
            for x, leaf in zip(arrays, self._leaves, strict=True)
        ]
        with jax.enable_x64(True):  # outside it, JAX cuts 64-bit values to 32 without a word
            run = _Run(self._leaves, data, _uses(arrays) if self._donate else None)
            moved = run.all(self._units, self._in_flight_bytes)
        found = [
            x if leaf.key_impl is None else jax.random.wrap_key_data(x, impl=leaf.key_impl)
            for x, leaf in zip(moved, self._leaves, strict=True)
        ]
        return jax.tree_util.tree_unflatten(self._structure, found)

    def _checked(self, tree: Any) -> list[jax.Array]:
        arrays, structure = jax.tree_util.tree_flatten(tree)
        if structure != self._structure:
            raise LayoutError(
                f"this resharder is for {self._structure}, and was given {structure}. "
                "Prepare one for it."
            )
        for x, leaf in zip(arrays, self._leaves, strict=True):
            _check_alive(leaf.name, x)
            _check_as_planned(leaf, x)
        return arrays


class _Run:
    """One call: what is in flight, and which sources may be freed."""

    def __init__(
        self, leaves: Sequence[Leaf], data: list[jax.Array], uses: list[list[int]] | None
    ) -> None:
        self.leaves = leaves
        self.data: list[jax.Array | None] = list(data)
        self.found: list[jax.Array | None] = [None] * len(data)
        self.uses = uses
        self.in_flight: list[jax.Array] = []
        self.in_flight_bytes = 0

    def all(self, units: Sequence[Unit], limit_bytes: int) -> list[jax.Array]:
        views = [u.leaves[0] for u in units if u.kind == "views"]
        self._views(views)
        for unit in units:
            if unit.kind != "views":
                self._unit(unit, limit_bytes)
        if self.in_flight and _is_cpu(self.in_flight[0]):
            self._barrier()  # the caller's own programs must not meet ours either
        return [x for x in self.found if x is not None]

    def _views(self, numbers: Sequence[int]) -> None:
        def done(n: int, array: jax.Array) -> None:
            self._finish(numbers[n], array)

        arrays = (self._source(n) for n in numbers)
        host_views.run(arrays, [self.leaves[n].move for n in numbers], done)

    def _unit(self, unit: Unit, limit_bytes: int) -> None:
        arrays = [self._source(n) for n in unit.leaves]
        alone = unit.has_collectives and _is_cpu(arrays[0])
        if alone or self.in_flight_bytes + unit.in_flight_bytes > limit_bytes:
            self._barrier()
        if alone:
            jax.block_until_ready(arrays)
        for stage in unit.stages:
            arrays = stage.run(arrays)
            if alone:
                jax.block_until_ready(arrays)
        arrays = [
            relabelled(x, self.leaves[n].move.target)
            for n, x in zip(unit.leaves, arrays, strict=True)
        ]
        self.in_flight += arrays
        self.in_flight_bytes += unit.in_flight_bytes
        for n, array in zip(unit.leaves, arrays, strict=True):
            self._finish(n, array)

    def _barrier(self) -> None:
        jax.block_until_ready(self.in_flight)
        self.in_flight, self.in_flight_bytes = [], 0

    def _source(self, n: int) -> jax.Array:
        array = self.data[n]
        assert array is not None, "every leaf is used once"
        return array

    def _finish(self, n: int, array: jax.Array) -> None:
        source = self._source(n)
        self.found[n], self.data[n] = array, None
        if self.uses is not None and all(self.data[other] is None for other in self.uses[n]):
            _free(source, [self.leaves[other].move for other in self.uses[n]])


def _uses(arrays: Sequence[jax.Array]) -> list[list[int]]:
    """For each leaf all leaves that are the same array: it is freed after the last of them."""
    same: dict[int, list[int]] = defaultdict(list)
    for n, array in enumerate(arrays):
        same[id(array)].append(n)
    return [same[id(array)] for array in arrays]


def _free(array: jax.Array, moves: Sequence[Move]) -> None:
    """Give up the source's shards, except those that a target may hold as they are."""
    kept = {
        shard
        for move in moves
        if move.source.memory_kind == move.target.memory_kind
        for shard in device_boxes(move.target, move.shape).items()
    }
    held = device_boxes(moves[0].source, moves[0].shape).items()
    for shard, data in zip(held, data_of(array), strict=True):
        if shard not in kept:
            data.delete()


def prepare_reshard(
    tree: Any,
    target: Target,
    *,
    donate: bool = False,
    device_bytes: int | None = None,
    route: Route = "auto",
) -> Resharder:
    """A `Resharder` for trees like ``tree``: routes chosen, programs compiled, nothing moved.

    Args:
        tree: arrays, or ``jax.ShapeDtypeStruct``s that carry a sharding.
        target: as for `reshard`, like all that follows.
        donate: see `reshard`.
        device_bytes: see `reshard`.
        route: see `reshard`.

    Raises:
        LayoutError: as `reshard`.
        NotFoundError: as `reshard`.
    """
    leaves, structure = leaves_of(tree, target)
    units = units_of(leaves, route, device_bytes)
    return Resharder(leaves, structure, units, donate=donate, device_bytes=device_bytes)


def reshard(
    tree: Any,
    target: Target,
    *,
    donate: bool = False,
    device_bytes: int | None = None,
    route: Route = "auto",
) -> Any:
    """The arrays of ``tree`` under other shardings, moved from device to device.

    An array that already is where it should be is not copied: the result shares its memory,
    as with ``jax.device_put``.

    Args:
        tree: a pytree of ``jax.Array``.
        target: one sharding for all; a tree of them of the same structure; ``{name: sharding}``,
            the name of a nested leaf being its keys joined by dots; a function of that name; or
            a `Layout`, whose rank r is ``jax.devices()[r]``. In place of a sharding, a
            ``PartitionSpec`` means the array's own mesh, and an array or ``ShapeDtypeStruct``
            its sharding.
        donate: free each source array as soon as it has been moved.
        device_bytes: a bound on what is in flight on each device beyond sources and targets.
        route: ``"auto"``; ``"device"`` to use what an accelerator would, also on the CPU
            backend; ``"views"`` to insist on the CPU backend's own.

    Raises:
        LayoutError: a target cannot hold its array, is not on this process's devices, cannot be
            reached within ``device_bytes``, or an array was donated before.
        NotFoundError: the target does not name some arrays.
    """
    for name, x in named_leaves(tree, unique=False)[0]:
        _check_alive(name, x)
    return prepare_reshard(tree, target, donate=donate, device_bytes=device_bytes, route=route)(
        tree
    )


def gather(
    tree: Any,
    device: jax.Device | None = None,
    *,
    host: bool = False,
    from_processes: bool = False,
) -> Any:
    """The arrays of ``tree`` whole: on one device, on each of their own, or on the host.

    Args:
        tree: a pytree of ``jax.Array``.
        device: put every array on this one; by default each becomes a replica on every device
            it is on.
        host: return NumPy arrays, put together shard by shard, so that no device ever
            holds more than it does now.
        from_processes: for ``host``, get what only other processes hold from them, one array at a
            time: each becomes whole on the devices first, and every process gets all of them.

    Raises:
        LayoutError: both are asked for, keys of a random generator are to go to the host, or
            another process holds what ``host`` needs.
    """
    if host and device is not None:
        raise LayoutError(f"gather: both {device} and the host were asked for. Choose one.")
    if host:
        named, structure = named_leaves(tree, unique=False)
        found = [_on_host(name, x, from_processes=from_processes) for name, x in named]
        return jax.tree_util.tree_unflatten(structure, found)
    if device is not None:
        return reshard(tree, SingleDeviceSharding(device))
    return reshard(tree, jax.tree.map(_replicated, tree))


def _replicated(array: jax.Array) -> NamedSharding:
    source = array.sharding
    if isinstance(source, NamedSharding):
        return NamedSharding(source.mesh, PartitionSpec())
    devices = np.array(sorted(source.device_set, key=attrgetter("id")), dtype=object)
    return NamedSharding(Mesh(devices, ("device",)), PartitionSpec())


def _on_host(name: str, array: jax.Array, *, from_processes: bool) -> np.ndarray[Any, Any]:
    sharding_of(name, array)  # refuses what is on no device
    _check_alive(name, array)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise LayoutError(f"{name}: keys have no NumPy dtype. Gather jax.random.key_data(keys).")
    if from_processes:
        if not _is_all_everywhere(array):  # said alike in all processes, which then all move it
            array = reshard(array, _everywhere(array))
    elif not _is_all_here(array):
        raise LayoutError(
            f"{name or 'the array'}: other processes hold parts of it. Save it, or give "
            "from_processes=True in all of them to have each get the whole."
        )
    whole = np.empty(array.shape, array.dtype)
    filled = set()
    for box, shard in zip(
        device_boxes(array.sharding, array.shape).values(), data_of(array), strict=True
    ):
        if box not in filled:
            filled.add(box)
            # a wrapper of its own, so that JAX does not keep the host copy with the source
            alone = jax.make_array_from_single_device_arrays(shard.shape, shard.sharding, [shard])
            whole[box.slices] = np.asarray(alone)
    assert sum(box.size for box in filled) == whole.size, f"{name}: not every element is here"
    return whole


def _everywhere(array: jax.Array) -> NamedSharding:
    """``array`` whole in every process: on all its devices, if it has some in each; or on one."""
    by_process: dict[int, jax.Device] = {}
    for device in (*sorted(array.sharding.device_set, key=attrgetter("id")), *jax.devices()):
        by_process.setdefault(device.process_index, device)
    if set(by_process.values()) <= array.sharding.device_set:
        return _replicated(array)
    ones = np.array([by_process[p] for p in sorted(by_process)], dtype=object)
    return NamedSharding(Mesh(ones, ("process",)), PartitionSpec())


def _is_all_here(array: jax.Array) -> bool:
    """Whether this process's devices hold every element."""
    here = set(device_boxes(array.sharding, array.shape).values())
    return here >= set(all_device_boxes(array.sharding, array.shape).values())


def _is_all_everywhere(array: jax.Array) -> bool:
    """Whether the devices of each process hold every element."""
    boxes = all_device_boxes(array.sharding, array.shape)
    held: dict[int, set[Box]] = {process: set() for process in range(jax.process_count())}
    for device, box in boxes.items():
        held[device.process_index].add(box)
    return all(found == set(boxes.values()) for found in held.values())


def _check_alive(name: str, array: Any) -> None:
    if isinstance(array, jax.Array) and array.is_deleted():
        raise LayoutError(
            f"{name or 'the array'}: it was donated or deleted, and holds nothing any more. Use "
            "what the earlier call returned, or call it with donate=False."
        )


def _check_as_planned(leaf: Leaf, array: Any) -> None:
    move = leaf.move
    if not isinstance(array, jax.Array):
        raise LayoutError(f"{leaf.name}: a {type(array).__name__} holds nothing. Give the array.")
    if sharding_of(leaf.name, array) == move.source and (
        leaf.key_impl is not None or (array.shape, array.dtype) == (move.shape, move.dtype)
    ):
        return
    raise LayoutError(
        f"{leaf.name}: prepared for {move.dtype} {move.shape} on {move.source}; this is "
        f"{array.dtype} {array.shape} on {array.sharding}. Prepare a resharder for it."
    )


def _is_cpu(array: jax.Array) -> bool:
    return bool(next(iter(array.devices())).platform == "cpu")


def _plan(leaves: Sequence[Leaf], units: Sequence[Unit], device_bytes: int | None) -> ReshardPlan:
    rows: dict[int, LeafPlan] = {}
    programs = {}
    for unit in units:
        for stage in unit.stages:
            if stage.num_compiled:
                programs[id(stage.program)] = stage.num_compiled
        for n, between in zip(unit.leaves, unit.between, strict=True):
            move = leaves[n].move
            moved = traffic_of(move)
            rows[n] = LeafPlan(
                leaves[n].name,
                move.shape,
                str(move.dtype),
                unit.kind,
                between,
                moved.same_device_bytes,
                moved.cross_device_bytes,
                unit.largest_bytes,
                unit.in_flight_bytes,
            )
    ordered = tuple(rows[n] for n in sorted(rows))
    return ReshardPlan(ordered, sum(programs.values()), device_bytes)
