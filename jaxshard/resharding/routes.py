"""Choice of a route for each geometry.

    stay       every device already holds its shard: another sharding of the same memory
    copy       every target shard equals some source shard: copied device to device
    compiled   same devices: an XLA program with bounded intermediates
    pieces     anything else: cut, copy device to device, join
    views      CPU backend: assembled from zero-copy views of the shards
    empty      no elements
    exchange   several processes: all run a program in which devices send to each other
    elsewhere  all devices belong to other processes: no work in this one

Arrays in another memory kind than the device's own are copied into that first, and out of it last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import jax
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from ..core.runtime import cached
from ..errors import LayoutError, format_list
from . import compiled
from .exchange import exchange_traffic
from .geometry import (
    ShardingChange,
    Traffic,
    bits_of,
    default_memory_kind,
    is_relabelling,
    memory_kind_of,
    stays,
    traffic,
)

Kind = Literal["stay", "copy", "compiled", "pieces", "views", "empty", "exchange", "elsewhere"]
RoutePolicy = Literal["auto", "device", "views"]


def dominant(kinds: Iterable[Kind]) -> Kind:
    """Return the kind that describes a route of several legs.

    >>> dominant(["copy", "compiled", "copy"])
    'compiled'
    """
    return max(kinds, key=get_args(Kind).index)


@dataclass(frozen=True, slots=True)
class RouteLeg:
    """One leg of a route: a change of sharding of one kind."""

    kind: Kind
    move: ShardingChange


@dataclass(frozen=True, slots=True)
class Route:
    """All legs of a change, first to last."""

    legs: tuple[RouteLeg, ...]

    @property
    def kind(self) -> Kind:
        """The kind of the leg that does the work."""
        return dominant(s.kind for s in self.legs)

    @property
    def between(self) -> tuple[Sharding, ...]:
        """The intermediate shardings."""
        return tuple(s.move.target for s in self.legs[:-1])

    @property
    def traffic(self) -> Traffic:
        """Bytes delivered on all legs."""
        return sum((traffic_of(s.move) for s in self.legs), Traffic())


@cached(8192)
def choose(move: ShardingChange, policy: RoutePolicy = "auto") -> Route:
    """Choose the route of ``move``.

    Raises:
        LayoutError: ``policy`` is unknown, or cannot move this array.
    """
    if policy not in get_args(RoutePolicy):
        raise LayoutError(
            f"route={policy!r}: unknown (expected one of {', '.join(get_args(RoutePolicy))})."
        )
    if move.processes != {jax.process_index()}:
        return _over_processes(move, policy)
    if move.is_empty:
        return Route((RouteLeg("empty", move),))
    same_memory = memory_kind_of(move.source) == memory_kind_of(move.target)
    if same_memory and stays(move):
        return Route((RouteLeg("stay", move),))
    reason = _no_views(move)
    if policy == "views" and reason:
        raise LayoutError(f'route="views" needs arrays in host memory; {reason}.')
    if policy != "device" and not reason:
        return Route((RouteLeg("views", move),))
    if is_relabelling(move):
        return Route((RouteLeg("copy", move),))
    return _staged(move)


def traffic_of(move: ShardingChange) -> Traffic:
    """Return the bytes that ``move`` delivers in all its processes."""
    if len(move.processes) > 1 and not move.is_empty:
        return exchange_traffic(move)
    return traffic(move)


def _over_processes(move: ShardingChange, policy: RoutePolicy) -> Route:
    """Choose the route of a move of several processes; all of them choose the same.

    Raises:
        LayoutError: JAX cannot move it between processes, or not by ``policy``.
    """
    _refuse_between(move, policy)
    if jax.process_index() not in move.processes:  # after the errors that all processes raise
        return Route((RouteLeg("elsewhere", move),))
    if move.is_empty:
        return Route((RouteLeg("empty", move),))
    if stays(move):
        return Route((RouteLeg("stay", move),))
    if move.source.device_set == move.target.device_set:
        found = compiled.route(move)
        if found is not None:
            return Route(tuple(RouteLeg("compiled", m) for m in found))
    return Route((RouteLeg("exchange", move),))


def _refuse_between(move: ShardingChange, policy: RoutePolicy) -> None:
    """Raise if the processes cannot move the array, in those without devices of it too.

    Raises:
        LayoutError: JAX cannot move it between processes, or not by ``policy``.
    """
    several = len(move.processes) > 1
    if policy == "views" and (several or _no_views(move)):
        raise LayoutError('route="views" works inside one process. Use "auto".')
    ends = {memory_kind_of(move.source), memory_kind_of(move.target)}
    if not several or (len(ends) == 1 and stays(move)):
        return  # another sharding of the same memory, of any kind
    between = f"between processes {format_list(map(str, sorted(move.processes)))}"
    if ends != {default_memory_kind(next(iter(move.source.device_set)))}:
        raise LayoutError(
            f"{between}: arrays in {format_list(sorted(ends))} memory cannot be moved. Move them "
            "to device memory first."
        )
    if bits_of(move.dtype) < 8:
        raise LayoutError(
            f"{move.dtype} elements are narrower than a byte; {between} they cannot be moved. "
            "View them as uint8."
        )


def _staged(move: ShardingChange) -> Route:
    """Route between the devices' own memories, with a copy into and out of others."""
    source, target = _in_default_memory(move.source), _in_default_memory(move.target)
    legs = []
    if source != move.source:
        legs.append(RouteLeg("copy", ShardingChange(move.shape, move.dtype, move.source, source)))
    inner = ShardingChange(move.shape, move.dtype, source, target)
    legs += _inner(inner)
    if target != move.target:
        legs.append(RouteLeg("copy", ShardingChange(move.shape, move.dtype, target, move.target)))
    return Route(tuple(legs))


def _inner(move: ShardingChange) -> list[RouteLeg]:
    found = compiled.route(move)
    if found is None:
        return [RouteLeg("pieces", move)]
    return [RouteLeg("compiled", m) for m in found]


_SCALARS_BYTES = 64  # offsets in a cut or a join, for a tensor of any size


def piece_limit(move: ShardingChange) -> int:
    """Return the bytes that pieces may need on a device: the bound of a compiled program."""
    return max(int(compiled.MAX_RATIO * move.shard_bytes) - _SCALARS_BYTES, move.shard_bytes)


def _no_views(move: ShardingChange) -> str:
    """Return why the views route cannot move the array; empty if it can."""
    devices = (*move.source.device_set, *move.target.device_set)
    other = next((d for d in devices if d.platform != "cpu"), None)
    if other is not None:
        return f"{other} is not of the CPU backend"
    if bits_of(move.dtype) < 8:
        return f"{move.dtype} elements are narrower than a byte and have no such view"
    return ""


def _in_default_memory(sharding: Sharding) -> Sharding:
    kind = default_memory_kind(next(iter(sharding.device_set)))
    if memory_kind_of(sharding) == kind:
        return sharding
    if not isinstance(sharding, NamedSharding | SingleDeviceSharding):
        raise LayoutError(
            f"{type(sharding).__name__} in {sharding.memory_kind} memory cannot be moved. "
            "Use a NamedSharding."
        )
    return sharding.with_memory_kind(kind)


# --- The plan of a prepared reshard: routes and numbers


@dataclass(frozen=True, slots=True)
class LeafPlan:
    """One array: its route, intermediate shardings, and the bytes per kind of link.

    Attributes:
        largest_bytes: the largest intermediate on a device: the largest array of a program, or
            all pieces that are in flight together.
        in_flight_bytes: all intermediates on the fullest device, beyond source and target.
            Leaves of one program have both numbers in common.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    between: tuple[str, ...]
    same_device_bytes: int
    cross_device_bytes: int
    largest_bytes: int
    in_flight_bytes: int


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """All leaves, and the number of compiled programs."""

    leaves: tuple[LeafPlan, ...]
    num_programs: int
    device_bytes: int | None = None

    @property
    def traffic(self) -> Traffic:
        """Bytes delivered per kind of link."""
        return Traffic(
            sum(leaf.same_device_bytes for leaf in self.leaves),
            sum(leaf.cross_device_bytes for leaf in self.leaves),
        )

    @property
    def in_flight_bytes(self) -> int:
        """The most bytes that any program has in flight on one device."""
        return max((leaf.in_flight_bytes for leaf in self.leaves), default=0)

    def __str__(self) -> str:
        by_kind: dict[str, list[LeafPlan]] = defaultdict(list)
        for leaf in self.leaves:
            by_kind[leaf.kind].append(leaf)
        rows: list[tuple[str, ...]] = [
            ("route", "arrays", "same device", "device to device", "largest", "in flight")
        ]
        rows += [_row(kind, leaves) for kind, leaves in by_kind.items()]
        rows.append(_row("all", self.leaves))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                f"{cell:<{w}}" if n == 0 else f"{cell:>{w}}"
                for n, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines += [
            f"{leaf.name}: by way of {', '.join(leaf.between)}"
            for leaf in self.leaves
            if leaf.between
        ]
        bound = "" if self.device_bytes is None else f", at most {self.device_bytes:,} in flight"
        lines.append(f"{self.num_programs} compiled programs{bound}")
        return "\n".join(lines)


def _row(kind: str, leaves: Sequence[LeafPlan]) -> tuple[str, ...]:
    return (
        kind,
        str(len(leaves)),
        f"{sum(leaf.same_device_bytes for leaf in leaves):,}",
        f"{sum(leaf.cross_device_bytes for leaf in leaves):,}",
        f"{max((leaf.largest_bytes for leaf in leaves), default=0):,}",
        f"{max((leaf.in_flight_bytes for leaf in leaves), default=0):,}",
    )
