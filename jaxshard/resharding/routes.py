"""Choice of a route for each geometry.

    stay       every device already holds its shard: another label on the same memory
    copy       every target shard is some whole source shard: copied device to device
    compiled   one set of devices: an XLA program, its intermediates checked
    pieces     anything else: cut, copy device to device, join
    views      on the CPU backend: put together from zero-copy views of the shards
    empty      no elements
    exchange   over several processes: all run a program in which devices send to each other
    elsewhere  all devices are other processes': nothing to do here

Memory kinds other than the device's own are entered and left by a copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import jax
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from ..core.cache import cached
from ..errors import LayoutError, format_list
from . import compiled
from .exchange import exchange_traffic
from .geometry import Move, Traffic, bits_of, is_relabelling, stays, traffic
from .shards import default_memory_kind, memory_kind_of

Kind = Literal["stay", "copy", "compiled", "pieces", "views", "empty", "exchange", "elsewhere"]
Route = Literal["auto", "device", "views"]


def dominant(kinds: Iterable[Kind]) -> Kind:
    """The kind that names a way of several legs: the one that does the work.

    >>> dominant(["copy", "compiled", "copy"])
    'compiled'
    """
    return max(kinds, key=get_args(Kind).index)


@dataclass(frozen=True, slots=True)
class Step:
    """One leg of the way, and how it is done."""

    kind: Kind
    move: Move


@dataclass(frozen=True, slots=True)
class Way:
    """All legs of a move, first to last."""

    steps: tuple[Step, ...]

    @property
    def kind(self) -> Kind:
        """The kind of the leg that does the work."""
        return dominant(s.kind for s in self.steps)

    @property
    def between(self) -> tuple[Sharding, ...]:
        """The shardings the array has on its way."""
        return tuple(s.move.target for s in self.steps[:-1])

    @property
    def traffic(self) -> Traffic:
        """Bytes delivered on all legs."""
        return sum((traffic_of(s.move) for s in self.steps), Traffic())


@cached(8192)
def choose(move: Move, route: Route = "auto") -> Way:
    """The way for ``move``.

    Raises:
        LayoutError: ``route`` is not one, or cannot carry this move.
    """
    if route not in get_args(Route):
        raise LayoutError(f"route {route!r} is not one of {', '.join(get_args(Route))}.")
    if move.processes != {jax.process_index()}:
        return _over_processes(move, route)
    if move.is_empty:
        return Way((Step("empty", move),))
    same_memory = memory_kind_of(move.source) == memory_kind_of(move.target)
    if same_memory and stays(move):
        return Way((Step("stay", move),))
    reason = _no_views(move)
    if route == "views" and reason:
        raise LayoutError(f'route "views" works where host memory is device memory; {reason}.')
    if route != "device" and not reason:
        return Way((Step("views", move),))
    if is_relabelling(move):
        return Way((Step("copy", move),))
    return _staged(move)


def traffic_of(move: Move) -> Traffic:
    """Bytes delivered by ``move``, in all processes that have a part in it."""
    if len(move.processes) > 1 and not move.is_empty:
        return exchange_traffic(move)
    return traffic(move)


def _over_processes(move: Move, route: Route) -> Way:
    """The way of a move that others have a part in; all of them choose the same.

    Raises:
        LayoutError: JAX cannot move it between processes, or not by ``route``.
    """
    _refuse_between(move, route)
    if jax.process_index() not in move.processes:  # after what all refuse alike
        return Way((Step("elsewhere", move),))
    if move.is_empty:
        return Way((Step("empty", move),))
    if stays(move):
        return Way((Step("stay", move),))
    if move.source.device_set == move.target.device_set:
        found = compiled.route(move)
        if found is not None:
            return Way(tuple(Step("compiled", m) for m in found))
    return Way((Step("exchange", move),))


def _refuse_between(move: Move, route: Route) -> None:
    """Refuse what no process can have a part in; those that have none in it must refuse it too.

    Raises:
        LayoutError: JAX cannot move it between processes, or not by ``route``.
    """
    several = len(move.processes) > 1
    if route == "views" and (several or _no_views(move)):
        raise LayoutError('route "views" works inside one process; use "auto".')
    ends = {memory_kind_of(move.source), memory_kind_of(move.target)}
    if not several or (len(ends) == 1 and stays(move)):
        return  # another label on the same memory, whatever it holds
    between = f"between processes {format_list(map(str, sorted(move.processes)))}"
    if ends != {default_memory_kind(next(iter(move.source.device_set)))}:
        raise LayoutError(
            f"{between}: arrays in {format_list(sorted(ends))} memory are not moved. Move them to "
            "device memory first."
        )
    if bits_of(move.dtype) < 8:
        raise LayoutError(
            f"{move.dtype} elements are narrower than a byte; {between} they are not moved. View "
            "them as uint8."
        )


def _staged(move: Move) -> Way:
    """Between the devices' own memories, entered and left by a copy where need be."""
    source, target = _in_default_memory(move.source), _in_default_memory(move.target)
    steps = []
    if source != move.source:
        steps.append(Step("copy", Move(move.shape, move.dtype, move.source, source)))
    inner = Move(move.shape, move.dtype, source, target)
    steps += _inner(inner)
    if target != move.target:
        steps.append(Step("copy", Move(move.shape, move.dtype, target, move.target)))
    return Way(tuple(steps))


def _inner(move: Move) -> list[Step]:
    found = compiled.route(move)
    if found is None:
        return [Step("pieces", move)]
    return [Step("compiled", m) for m in found]


_SCALARS_BYTES = 64  # offsets that a cut or a join looks up, whatever the size of the tensor


def piece_limit(move: Move) -> int:
    """What the pieces of ``move`` may take on a device: within the same bound as a program."""
    return max(int(compiled.MAX_RATIO * move.shard_bytes) - _SCALARS_BYTES, move.shard_bytes)


def _no_views(move: Move) -> str:
    """Why the views route cannot take ``move``; empty where it can."""
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
