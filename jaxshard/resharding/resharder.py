"""The prepared resharder: planned and compiled once, called every step.

    planned = prepare_reshard(params, serving_shardings)   # routes chosen, programs compiled
    print(planned.plan)
    serving = planned(params)                              # every step

A program is compiled for a tuple of geometries. If a tree has few geometries, each has its own
program, called once per leaf. If it has hundreds, a program moves a batch of leaves, so that the
number of compilations depends on the bytes and not on the number of shapes.

Barriers between batches bound the bytes in flight on a device by ``device_bytes``. On the CPU
backend, programs with collectives run one at a time, because XLA:CPU can deadlock if several do.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from ..core.catalog import group_by_bytes
from ..errors import LayoutError, size_text
from . import compiled, cpu_route, exchange, piecewise
from .compiled import own_context
from .geometry import (
    DonatedShards,
    Leaf,
    ShardingChange,
    all_device_boxes,
    as_unshared,
    check_alive,
    data_of,
    device_boxes,
    from_shards,
    memory_kind_of,
    relabelled,
    senders,
)
from .routes import (
    Kind,
    LeafPlan,
    ReshardPlan,
    Route,
    RouteLeg,
    RoutePolicy,
    choose,
    dominant,
    piece_limit,
)

# --- Batches: leaves that one program moves, and their memory

Run = Callable[[Sequence[jax.Array]], list[jax.Array]]

_FEW_GEOMETRIES = 8  # up to here, a program for each compiles fast enough
_MAX_TOGETHER = 32  # geometries in one program: compiling takes about 10 ms more for each
_TOGETHER_BYTES = 256 << 20  # source and target shards of one program


@dataclass(frozen=True)
class BatchLeg:
    """One leg for all leaves of a batch."""

    run: Run
    kind: Kind
    largest_bytes: int = 0
    in_flight_bytes: int = 0
    num_compiled: int = 0
    program: object = None  # batches that share it count it once


@dataclass(frozen=True)
class LeafBatch:
    """Leaves (by number) that are moved together, leg by leg, and the route of each."""

    leaves: tuple[int, ...]
    routes: tuple[Route, ...]
    legs: tuple[BatchLeg, ...]

    @property
    def kind(self) -> Kind:
        """The kind of the leg that does the work."""
        return dominant(s.kind for s in self.legs)

    @property
    def largest_bytes(self) -> int:
        """The largest intermediate of any leg."""
        return max((s.largest_bytes for s in self.legs), default=0)

    @property
    def in_flight_bytes(self) -> int:
        """Bytes in flight on the fullest device, beyond source and target."""
        return max((s.in_flight_bytes for s in self.legs), default=0)

    @property
    def has_collectives(self) -> bool:
        """Whether devices wait for each other in its programs."""
        return any(s.kind in ("compiled", "exchange") for s in self.legs)


def batches_of(
    leaves: Sequence[Leaf], policy: RoutePolicy, device_bytes: int | None
) -> list[LeafBatch]:
    """Return all batches, in the order of their first leaves; compiles their programs.

    Raises:
        LayoutError: a leaf cannot be moved within ``device_bytes``, or not by ``policy``.
    """
    routes = []
    for leaf in leaves:
        try:
            routes.append(choose(leaf.move, policy))
        except LayoutError as e:
            raise LayoutError(f"{leaf.name}: {e}") from e
    batches = []
    for group in _groups(routes):
        batches += _compile(leaves, [(n, routes[n]) for n in group], device_bytes)
    return sorted(batches, key=lambda u: u.leaves)


def _groups(routes: Sequence[Route]) -> Iterator[tuple[int, ...]]:
    """Yield the leaves of each program; equal tuples of geometries share a compilation."""
    alone: list[int] = []
    similar: dict[object, dict[Route, list[int]]] = defaultdict(lambda: defaultdict(list))
    for n, route in enumerate(routes):
        if route.kind in ("compiled", "pieces"):
            key = tuple((s.kind, *_devices(s.move)) for s in route.legs)
            similar[key][route].append(n)
        else:
            alone.append(n)
    yield from ((n,) for n in alone)
    for geometries in similar.values():
        yield from _rounds(list(geometries.values()), routes)


def _devices(move: ShardingChange) -> tuple[tuple[jax.Device, ...], ...]:
    """Devices of source and target, those of other processes too, which must group alike."""
    ends = (move.source, move.target)
    return tuple(tuple(all_device_boxes(sharding, move.shape)) for sharding in ends)


def _rounds(geometries: list[list[int]], routes: Sequence[Route]) -> Iterator[tuple[int, ...]]:
    """Yield groups of leaves, at most one of each geometry in a group.

    One program moves a chunk of geometries as often as the rarest of them occurs; the remaining
    leaves are put into new chunks. So a chunk never needs a program for each number of leaves.
    """
    size = 1 if len(geometries) <= _FEW_GEOMETRIES else _MAX_TOGETHER
    while geometries:
        left = []
        sized = (
            (leaves, 2 * routes[leaves[0]].legs[0].move.shard_bytes)
            for leaves in sorted(geometries, key=len)
        )
        for chunk in group_by_bytes(sized, _TOGETHER_BYTES, max_items=size):
            times = len(chunk[0])
            for nth in range(times):
                yield tuple(leaves[nth] for leaves in chunk)
            left += [leaves[times:] for leaves in chunk if len(leaves) > times]
        geometries = left


def _compile(
    leaves: Sequence[Leaf], group: Sequence[tuple[int, Route]], device_bytes: int | None
) -> list[LeafBatch]:
    """Return one batch for the group, or several if one would exceed the bounds."""
    numbers, routes = zip(*group, strict=True)
    legs = _legs(routes, device_bytes)
    if legs is not None:
        return [LeafBatch(numbers, routes, legs)]
    if len(group) > 1:
        halves = group[: len(group) // 2], group[len(group) // 2 :]
        return [batch for half in halves for batch in _compile(leaves, half, device_bytes)]
    if any(leg.kind == "compiled" for leg in routes[0].legs):
        return _compile(leaves, [(numbers[0], _in_pieces(routes[0]))], device_bytes)
    raise _too_much(leaves[numbers[0]], routes[0], device_bytes)


def _legs(routes: Sequence[Route], device_bytes: int | None) -> tuple[BatchLeg, ...] | None:
    """Compile the legs of routes of equal kinds; None if one leg exceeds the bounds."""
    legs = []
    for n, one in enumerate(zip(*(route.legs for route in routes), strict=True)):
        between_bytes = sum(_between_bytes(route, n) for route in routes)
        left_bytes = None if device_bytes is None else device_bytes - between_bytes
        leg = _leg(one, left_bytes)
        if leg is None or (left_bytes is not None and leg.in_flight_bytes > left_bytes):
            return None
        legs.append(replace(leg, in_flight_bytes=leg.in_flight_bytes + between_bytes))
    return tuple(legs)


def _between_bytes(route: Route, leg: int) -> int:
    """Bytes before and after a leg on a device that are neither source nor target."""
    move = route.legs[leg].move
    before = move.source_shard_bytes if leg else 0
    return before + (move.target_shard_bytes if leg + 1 < len(route.legs) else 0)


def _in_pieces(route: Route) -> Route:
    """Return ``route`` with its programs replaced by one leg of pieces."""
    legs = [s for s in route.legs if s.kind == "compiled"]
    first = route.legs.index(legs[0])
    ends = ShardingChange(
        legs[0].move.shape, legs[0].move.dtype, legs[0].move.source, legs[-1].move.target
    )
    rest = route.legs[first + len(legs) :]
    kind: Kind = "exchange" if len(ends.processes) > 1 else "pieces"
    return Route((*route.legs[:first], RouteLeg(kind, ends), *rest))


def _leg(legs: Sequence[RouteLeg], device_bytes: int | None) -> BatchLeg | None:
    """Compile one leg of a batch; None if it exceeds the bounds."""
    kind, moves = legs[0].kind, tuple(s.move for s in legs)
    if kind == "compiled":
        return _compiled_leg(moves, device_bytes)
    if kind == "pieces":
        return _pieces_leg(moves, device_bytes)
    if kind == "exchange":
        return _exchange_leg(moves[0], device_bytes)
    one = {
        "stay": _stay,
        "copy": _copy,
        "empty": _empty,
        "views": _stay,
        "elsewhere": _elsewhere,
    }[kind]
    return BatchLeg(lambda arrays: [one(m, x) for m, x in zip(moves, arrays, strict=True)], kind)


def _compiled_leg(moves: tuple[ShardingChange, ...], device_bytes: int | None) -> BatchLeg | None:
    found = compiled.program(moves)
    in_flight = found.executable.temporary_bytes
    if not found.fits or (device_bytes is not None and in_flight > device_bytes):
        return None

    def run(arrays: Sequence[jax.Array]) -> list[jax.Array]:
        return found([relabelled(x, m.source) for x, m in zip(arrays, moves, strict=True)])

    return BatchLeg(run, "compiled", found.executable.largest_bytes, in_flight, 1, found)


def _pieces_leg(moves: tuple[ShardingChange, ...], device_bytes: int | None) -> BatchLeg | None:
    limits = [piece_limit(m) for m in moves]
    found = piecewise.program(moves, tuple(limits))
    if (
        device_bytes is not None and found.peak_bytes > device_bytes
    ):  # then in as many waves as possible
        found = piecewise.program(moves, (0,) * len(moves))
        if found.peak_bytes > device_bytes:
            return None
    return BatchLeg(found, "pieces", found.peak_bytes, found.peak_bytes, found.num_compiled, found)


def _exchange_leg(move: ShardingChange, device_bytes: int | None) -> BatchLeg | None:
    found = exchange.program(move)
    peak = exchange.blank_bytes(move) + found.executable.temporary_bytes
    if device_bytes is not None and peak > device_bytes:
        return None
    largest = found.executable.largest_bytes
    return BatchLeg(lambda arrays: [found(x) for x in arrays], "exchange", largest, peak, 1, found)


def _elsewhere(move: ShardingChange, array: jax.Array) -> jax.Array:
    return jax.make_array_from_single_device_arrays(move.shape, move.target, [], dtype=move.dtype)


def _stay(move: ShardingChange, array: jax.Array) -> jax.Array:
    held = dict(zip(move.source_devices, data_of(array), strict=True))
    return jax.make_array_from_single_device_arrays(
        move.shape, move.target, [held[d] for d in move.target_devices], dtype=move.dtype
    )


def _copy(move: ShardingChange, array: jax.Array) -> jax.Array:
    data = data_of(array)
    return from_shards([data[n] for n in senders(move)], move.target, move.shape)


def _empty(move: ShardingChange, array: jax.Array) -> jax.Array:
    devices = device_boxes(move.target, move.shape)
    places = [SingleDeviceSharding(d, memory_kind=move.target.memory_kind) for d in devices]
    nothing = np.empty(move.target.shard_shape(move.shape), move.dtype)  # jnp.zeros would compile
    shards = jax.device_put([nothing] * len(places), places)
    return jax.make_array_from_single_device_arrays(
        move.shape, move.target, shards, dtype=move.dtype
    )


def _too_much(leaf: Leaf, route: Route, device_bytes: int | None) -> LayoutError:
    needed = max(_between_bytes(route, n) + _least_bytes(leg) for n, leg in enumerate(route.legs))
    move = leaf.move
    return LayoutError(
        f"{leaf.name}: moving {move.dtype} {move.shape} needs {needed:,} bytes in flight on one "
        f"device (device_bytes={device_bytes:,}). Raise device_bytes to {needed:,} or more."
    )


def _least_bytes(leg: RouteLeg) -> int:
    """Bytes in flight on the fullest device during a leg in as many waves as possible."""
    if leg.kind == "exchange":
        program = exchange.program(leg.move)
        return exchange.blank_bytes(leg.move) + program.executable.temporary_bytes
    if leg.kind == "pieces":
        return piecewise.program((leg.move,), (0,)).peak_bytes
    return 0


# --- The resharder: prepared once, called many times

_IN_FLIGHT_BYTES = 512 << 20  # per device, unless the caller sets device_bytes
_ALONE = threading.Lock()  # held by collectives on the CPU backend, in all threads


class Resharder:
    """Moves trees of one structure and sharding to their target. Made by `prepare_reshard`."""

    def __init__(
        self,
        leaves: Sequence[Leaf],
        structure: Any,
        batches: Sequence[LeafBatch],
        *,
        donate: bool,
        copy: bool,
        device_bytes: int | None,
    ) -> None:
        self._leaves = leaves
        self._structure = structure
        self._batches = _copies_first(batches, leaves)
        self._donate = donate
        self._copy = copy
        self._in_flight_bytes = _IN_FLIGHT_BYTES if device_bytes is None else device_bytes
        self.plan = _plan(leaves, batches, device_bytes)

    def __repr__(self) -> str:
        num_bytes = sum(x.same_device_bytes + x.cross_device_bytes for x in self.plan.leaves)
        return (
            f"Resharder({len(self._leaves):,} arrays, {size_text(num_bytes)} moved, "
            f"{self.plan.num_programs} compiled programs)"
        )

    def __call__(self, tree: Any) -> Any:
        """Return the arrays of ``tree`` at their target.

        Raises:
            LayoutError: the tree differs from the prepared one, or an array was deleted.
        """
        arrays, structure = jax.tree_util.tree_flatten(tree)
        if structure != self._structure:
            raise LayoutError(
                f"the tree has the structure {structure} (expected {self._structure}). "
                "Prepare a resharder for it."
            )
        return self.move(arrays)

    def move(self, arrays: Sequence[Any]) -> Any:
        """Return the tree whose leaves, in order, are ``arrays`` at their target.

        Raises:
            LayoutError: an array differs from the prepared one, or was deleted.
        """
        with own_context():
            data = [_data(leaf, x) for leaf, x in zip(self._leaves, arrays, strict=True)]
            donated = DonatedShards(data) if self._donate else None
            run = _Execution(self._leaves, data, donated, copy=self._copy)
            moved = run.all(self._batches, self._in_flight_bytes)
            found = [
                x if leaf.key_impl is None else jax.random.wrap_key_data(x, impl=leaf.key_impl)
                for x, leaf in zip(moved, self._leaves, strict=True)
            ]
        return jax.tree_util.tree_unflatten(self._structure, found)


def _data(leaf: Leaf, array: Any) -> jax.Array:
    """Return the data of ``array`` to move, under the planned sharding."""
    if not isinstance(array, jax.Array):
        raise LayoutError(f"{leaf.name}: a {type(array).__name__} has no data. Give the array.")
    check_alive(leaf.name, array)
    move = leaf.move
    if (array.shape, array.dtype) == (leaf.shape, leaf.dtype):
        data = array if leaf.key_impl is None else jax.random.key_data(array)
        if data.sharding == move.source:
            return data
        if _has_planned_boxes(data, move):  # another spelling of it, as P("x", None) of P("x")
            return relabelled(data, move.source)
    raise LayoutError(
        f"{leaf.name}: {array.dtype} {array.shape} on {array.sharding} (prepared for "
        f"{leaf.dtype} {leaf.shape} on {move.source}). Prepare a resharder for it."
    )


def _has_planned_boxes(array: jax.Array, move: ShardingChange) -> bool:
    held, planned = (all_device_boxes(s, move.shape) for s in (array.sharding, move.source))
    return held == planned and memory_kind_of(array.sharding) == memory_kind_of(move.source)


class _Execution:
    """One call: results in flight, and sources that may be freed."""

    def __init__(
        self,
        leaves: Sequence[Leaf],
        data: list[jax.Array],
        donated: DonatedShards | None,
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

    def all(self, batches: Sequence[LeafBatch], limit_bytes: int) -> list[jax.Array]:
        def stay() -> None:
            for batch in batches:
                if batch.kind == "stay":
                    self._batch(batch, limit_bytes)

        self._views([u.leaves[0] for u in batches if u.kind == "views"], meanwhile=stay)
        for batch in batches:
            if batch.kind not in ("views", "stay"):
                self._batch(batch, limit_bytes)
        if self.in_flight and _is_cpu(self.in_flight[0]):
            self._barrier()  # our collectives end before the caller starts its own
        return [x for x in self.found if x is not None]

    def _views(self, numbers: Sequence[int], *, meanwhile: Callable[[], None]) -> None:
        def done(n: int, array: jax.Array) -> None:
            self._finish(numbers[n], array)

        arrays = (self._source(n) for n in numbers)
        moves = [self.leaves[n].move for n in numbers]
        cpu_route.run(arrays, moves, done, share=not self.copy, meanwhile=meanwhile)

    def _batch(self, batch: LeafBatch, limit_bytes: int) -> None:
        arrays = [self._source(n) for n in batch.leaves]
        if self.copy and batch.kind in (
            "stay",
            "copy",
            "pieces",
        ):  # other routes never share memory
            moves = [self.leaves[n].move for n in batch.leaves]
            arrays = [as_unshared(x, move) for x, move in zip(arrays, moves, strict=True)]
        if batch.has_collectives and _is_cpu(arrays[0]):
            arrays = self._alone(batch, arrays)
        else:
            if self.in_flight_bytes + batch.in_flight_bytes > limit_bytes:
                self._barrier()
            for leg in batch.legs:
                arrays = leg.run(arrays)
            self.in_flight += arrays
            self.in_flight_bytes += batch.in_flight_bytes
        for n, array in zip(batch.leaves, arrays, strict=True):
            self._finish(n, relabelled(array, self.leaves[n].move.target))

    def _alone(self, batch: LeafBatch, arrays: list[jax.Array]) -> list[jax.Array]:
        """Move the batch while no other program of ours runs."""
        self._barrier()
        jax.block_until_ready(arrays)
        with _ALONE:
            for leg in batch.legs:
                arrays = jax.block_until_ready(leg.run(arrays))
        return arrays

    def _barrier(self) -> None:
        jax.block_until_ready(self.in_flight)
        self.in_flight, self.in_flight_bytes = [], 0

    def _source(self, n: int) -> jax.Array:
        array = self.data[n]
        assert array is not None, "every leaf is moved once"
        return array

    def _finish(self, n: int, array: jax.Array) -> None:
        self.found[n], self.data[n] = array, None
        if self.donated is not None:
            self.donated.moved(n, self.leaves[n].move)


def _copies_first(batches: Sequence[LeafBatch], leaves: Sequence[Leaf]) -> list[LeafBatch]:
    """Order ``batches``: those that threads copy come first, relabelling runs meanwhile."""

    def copies_nothing(batch: LeafBatch) -> bool:
        return batch.kind == "views" and not cpu_route.num_copied(leaves[batch.leaves[0]].move)

    return sorted(batches, key=copies_nothing)


def _is_cpu(array: jax.Array) -> bool:
    return bool(next(iter(array.devices())).platform == "cpu")


def _plan(
    leaves: Sequence[Leaf], batches: Sequence[LeafBatch], device_bytes: int | None
) -> ReshardPlan:
    rows: dict[int, LeafPlan] = {}
    programs = {}
    for batch in batches:
        for leg in batch.legs:
            if leg.num_compiled:
                programs[id(leg.program)] = leg.num_compiled
        for n, route in zip(batch.leaves, batch.routes, strict=True):
            move, moved = leaves[n].move, route.traffic
            rows[n] = LeafPlan(
                leaves[n].name,
                move.shape,
                str(move.dtype),
                batch.kind,
                tuple(str(getattr(s, "spec", s)) for s in route.between),
                moved.same_device_bytes,
                moved.cross_device_bytes,
                batch.largest_bytes,
                batch.in_flight_bytes,
            )
    ordered = tuple(rows[n] for n in sorted(rows))
    return ReshardPlan(ordered, sum(programs.values()), device_bytes)
