"""Batches of leaves that one program moves, and their memory.

A program is compiled for a tuple of geometries. Where a tree has few geometries, each
has its own program, called once per leaf. Where it has hundreds, a program takes a group of
them along, so that the number of compilations follows the bytes and not the shapes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from ..core.catalog import group_by_bytes
from ..errors import LayoutError
from . import compiled, exchange, piecewise
from .geometry import Move, all_device_boxes, device_boxes, senders
from .leaves import Leaf
from .routes import Kind, Route, Step, Way, choose, dominant, piece_limit
from .shards import data_of, gathered_from, relabelled

Run = Callable[[Sequence[jax.Array]], list[jax.Array]]

_FEW_GEOMETRIES = 8
_MAX_TOGETHER = 32  # geometries in one program: compiling takes about 10 ms more for each
_TOGETHER_BYTES = 256 << 20  # their shards, together


@dataclass(frozen=True)
class Stage:
    """One leg for all leaves of a unit."""

    run: Run
    kind: Kind
    largest_bytes: int = 0
    in_flight_bytes: int = 0
    num_compiled: int = 0
    program: object = None  # what two units that share it have in common


@dataclass(frozen=True)
class Unit:
    """Leaves (by number) that go together, leg by leg, and the way that each of them goes."""

    leaves: tuple[int, ...]
    ways: tuple[Way, ...]
    stages: tuple[Stage, ...]

    @property
    def kind(self) -> Kind:
        """The kind of its work."""
        return dominant(s.kind for s in self.stages)

    @property
    def largest_bytes(self) -> int:
        """The largest intermediate of any leg."""
        return max((s.largest_bytes for s in self.stages), default=0)

    @property
    def in_flight_bytes(self) -> int:
        """Bytes in flight on the fullest device, beyond the source and the target."""
        return max((s.in_flight_bytes for s in self.stages), default=0)

    @property
    def has_collectives(self) -> bool:
        """Whether devices wait for each other inside its programs."""
        return any(s.kind in ("compiled", "exchange") for s in self.stages)


def units_of(leaves: Sequence[Leaf], route: Route, device_bytes: int | None) -> list[Unit]:
    """All units, in the order of their first leaves; programs are compiled here.

    Raises:
        LayoutError: a leaf cannot be moved within ``device_bytes``, or not by ``route``.
    """
    ways = []
    for leaf in leaves:
        try:
            ways.append(choose(leaf.move, route))
        except LayoutError as e:
            raise LayoutError(f"{leaf.name}: {e}") from e
    units = []
    for group in _groups(ways):
        units += _compile(leaves, [(n, ways[n]) for n in group], device_bytes)
    return sorted(units, key=lambda u: u.leaves)


def _groups(ways: Sequence[Way]) -> Iterator[tuple[int, ...]]:
    """Leaves that share a program; groups alike in their geometries come out alike."""
    alone: list[int] = []
    similar: dict[object, dict[Way, list[int]]] = defaultdict(lambda: defaultdict(list))
    for n, way in enumerate(ways):
        if way.kind in ("compiled", "pieces"):
            key = tuple((s.kind, *_devices(s.move)) for s in way.steps)
            similar[key][way].append(n)
        else:
            alone.append(n)
    yield from ((n,) for n in alone)
    for geometries in similar.values():
        yield from _rounds(list(geometries.values()), ways)


def _devices(move: Move) -> tuple[tuple[jax.Device, ...], ...]:
    """The devices of the source and of the target; all processes group by the same."""
    ends = (move.source, move.target)
    return tuple(tuple(all_device_boxes(sharding, move.shape)) for sharding in ends)


def _rounds(geometries: list[list[int]], ways: Sequence[Way]) -> Iterator[tuple[int, ...]]:
    """Groups of leaves, at most one of each geometry in a group.

    A chunk of geometries goes as often as the rarest of them is there, by one program; what is
    left of the others is put into chunks anew. So no chunk falls apart into a program for every
    number of leaves that a geometry may have.
    """
    size = 1 if len(geometries) <= _FEW_GEOMETRIES else _MAX_TOGETHER
    while geometries:
        left = []
        sized = (
            (numbers, 2 * ways[numbers[0]].steps[0].move.shard_bytes)
            for numbers in sorted(geometries, key=len)
        )
        for chunk in group_by_bytes(sized, _TOGETHER_BYTES, max_items=size):
            times = len(chunk[0])
            for nth in range(times):
                yield tuple(numbers[nth] for numbers in chunk)
            left += [numbers[times:] for numbers in chunk if len(numbers) > times]
        geometries = left


def _compile(
    leaves: Sequence[Leaf], group: Sequence[tuple[int, Way]], device_bytes: int | None
) -> list[Unit]:
    """One unit for the group, or several where together they are over the bounds."""
    numbers, ways = zip(*group, strict=True)
    stages = _stages(ways, device_bytes)
    if stages is not None:
        return [Unit(numbers, ways, stages)]
    if len(group) > 1:
        halves = group[: len(group) // 2], group[len(group) // 2 :]
        return [unit for half in halves for unit in _compile(leaves, half, device_bytes)]
    if any(step.kind == "compiled" for step in ways[0].steps):
        return _compile(leaves, [(numbers[0], _in_pieces(ways[0]))], device_bytes)
    raise _too_much(leaves[numbers[0]], ways[0], device_bytes)


def _stages(ways: Sequence[Way], device_bytes: int | None) -> tuple[Stage, ...] | None:
    """The legs of ways alike in their kinds, compiled; None where one is over the bounds."""
    stages = []
    for n, steps in enumerate(zip(*(way.steps for way in ways), strict=True)):
        between_bytes = sum(_between_bytes(way, n) for way in ways)
        left_bytes = None if device_bytes is None else device_bytes - between_bytes
        stage = _stage(steps, left_bytes)
        if stage is None or (left_bytes is not None and stage.in_flight_bytes > left_bytes):
            return None
        in_flight_bytes = stage.in_flight_bytes + between_bytes
        stages.append(replace(stage, in_flight_bytes=in_flight_bytes))
    return tuple(stages)


def _between_bytes(way: Way, leg: int) -> int:
    """What a device holds before and after a leg that is neither the source nor the target."""
    move = way.steps[leg].move
    before = move.source_shard_bytes if leg else 0
    return before + (move.target_shard_bytes if leg + 1 < len(way.steps) else 0)


def _in_pieces(way: Way) -> Way:
    """The same way with its programs replaced by one step of pieces."""
    legs = [s for s in way.steps if s.kind == "compiled"]
    first = way.steps.index(legs[0])
    ends = Move(legs[0].move.shape, legs[0].move.dtype, legs[0].move.source, legs[-1].move.target)
    rest = way.steps[first + len(legs) :]
    kind: Kind = "exchange" if len(ends.processes) > 1 else "pieces"
    return Way((*way.steps[:first], Step(kind, ends), *rest))


def _stage(steps: Sequence[Step], device_bytes: int | None) -> Stage | None:
    """The leg, compiled; None where it is over the bounds."""
    kind, moves = steps[0].kind, tuple(s.move for s in steps)
    if kind == "compiled":
        return _compiled_stage(moves, device_bytes)
    if kind == "pieces":
        return _pieces_stage(moves, device_bytes)
    if kind == "exchange":
        return _exchange_stage(moves[0], device_bytes)
    one = {
        "stay": _stay,
        "copy": _copy,
        "empty": _empty,
        "views": _stay,
        "elsewhere": _elsewhere,
    }[kind]
    return Stage(lambda arrays: [one(m, x) for m, x in zip(moves, arrays, strict=True)], kind)


def _compiled_stage(moves: tuple[Move, ...], device_bytes: int | None) -> Stage | None:
    found = compiled.program(moves)
    in_flight = found.executable.temporary_bytes
    if not found.fits or (device_bytes is not None and in_flight > device_bytes):
        return None

    def run(arrays: Sequence[jax.Array]) -> list[jax.Array]:
        return found([relabelled(x, m.source) for x, m in zip(arrays, moves, strict=True)])

    return Stage(run, "compiled", found.executable.largest_bytes, in_flight, 1, found)


def _pieces_stage(moves: tuple[Move, ...], device_bytes: int | None) -> Stage | None:
    limits = [piece_limit(m) for m in moves]
    found = piecewise.program(moves, tuple(limits))
    if device_bytes is not None and found.peak_bytes > device_bytes:  # as many waves as there are
        found = piecewise.program(moves, (0,) * len(moves))
        if found.peak_bytes > device_bytes:
            return None
    return Stage(found, "pieces", found.peak_bytes, found.peak_bytes, found.num_compiled, found)


def _exchange_stage(move: Move, device_bytes: int | None) -> Stage | None:
    found = exchange.program(move)
    peak = exchange.blank_bytes(move) + found.executable.temporary_bytes
    if device_bytes is not None and peak > device_bytes:
        return None
    largest = found.executable.largest_bytes
    return Stage(lambda arrays: [found(x) for x in arrays], "exchange", largest, peak, 1, found)


def _elsewhere(move: Move, array: jax.Array) -> jax.Array:
    return jax.make_array_from_single_device_arrays(move.shape, move.target, [], dtype=move.dtype)


def _stay(move: Move, array: jax.Array) -> jax.Array:
    held = dict(zip(move.source_devices, data_of(array), strict=True))
    return jax.make_array_from_single_device_arrays(
        move.shape, move.target, [held[d] for d in move.target_devices], dtype=move.dtype
    )


def _copy(move: Move, array: jax.Array) -> jax.Array:
    data = data_of(array)
    return gathered_from([data[n] for n in senders(move)], move.target, move.shape)


def _empty(move: Move, array: jax.Array) -> jax.Array:
    devices = device_boxes(move.target, move.shape)
    places = [SingleDeviceSharding(d, memory_kind=move.target.memory_kind) for d in devices]
    nothing = np.empty(move.target.shard_shape(move.shape), move.dtype)  # jnp.zeros would compile
    shards = jax.device_put([nothing] * len(places), places)
    return jax.make_array_from_single_device_arrays(
        move.shape, move.target, shards, dtype=move.dtype
    )


def _too_much(leaf: Leaf, way: Way, device_bytes: int | None) -> LayoutError:
    needed = max(_between_bytes(way, n) + _least_bytes(step) for n, step in enumerate(way.steps))
    move = leaf.move
    return LayoutError(
        f"{leaf.name}: moving {move.dtype} {move.shape} takes {needed:,} bytes in flight on one "
        f"device, and device_bytes is {device_bytes:,}. Raise it to {needed:,} or more."
    )


def _least_bytes(step: Step) -> int:
    """In flight on the fullest device during a leg, in as many waves as there can be."""
    if step.kind == "exchange":
        program = exchange.program(step.move)
        return exchange.blank_bytes(step.move) + program.executable.temporary_bytes
    if step.kind == "pieces":
        return piecewise.program((step.move,), (0,)).peak_bytes
    return 0
