"""The compiled route: XLA programs on one set of devices, with intermediate shardings.

The program is the identity with other shardings on its way out. XLA is free to
rebuild a whole tensor on every device to get there, and for some pairs does; so
every program's intermediates are read after compiling, and a pair that fails is taken round by
one or two shardings of the same mesh. What cannot be done within the bound is
not done here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise, permutations, product
from math import prod

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..core.cache import cached
from ..core.layout import Spec
from ..core.strategy import Axes
from ..devices.mesh import placement_of
from .geometry import Move, as_bits, from_bits
from .programs import Executable, compile_program

_MAX_ORDERS = 720  # all orders of six axes, 64 devices; of more axes only the first are tried


def paths(axes: Axes, source: Spec, target: Spec) -> Iterator[list[Spec]]:
    """The one or two specs between ``source`` and ``target``, found as they are asked for.

    Every move can be undone by one, so the last spec is looked for among the
    moves of the target. None has larger shards than the larger of the two ends.

    >>> axes = (("a", 2), ("b", 2), ("c", 2))
    >>> next(paths(axes, (("b",), ("a",)), (("b", "c", "a"), ())))
    [(('b', 'c'), ('a',))]
    """
    least_parts = min(_parts(axes, source), _parts(axes, target))
    last = {s for s in _moves(axes, target) if _parts(axes, s) >= least_parts} - {source}
    first = [s for s in _moves(axes, source) if _parts(axes, s) >= least_parts and s != target]
    for spec in first:
        if spec in last:
            yield [spec]
    for spec in first:
        for other in _moves(axes, spec):
            if other in last:
                yield [spec, other]


@cached(4096)
def _moves(axes: Axes, spec: Spec) -> tuple[Spec, ...]:
    used = {a for dim in spec for a in dim}
    found: dict[Spec, None] = {}
    for d, split in enumerate(spec):
        for moved in range(1, len(split) + 1):  # exchange
            for other in range(len(spec)):
                if other != d:
                    changed = list(spec)
                    changed[d] = split[:-moved]
                    changed[other] = spec[other] + split[-moved:]
                    found[tuple(changed)] = None
        if split:  # gather
            found[_with(spec, d, split[:-1])] = None
        for name, _ in axes:  # slice
            if name not in used:
                found[_with(spec, d, (*split, name))] = None
    for other_spec in _same_counts(axes, tuple(len(dim) for dim in spec)):  # permute
        if _counts(axes, other_spec) == _counts(axes, spec):
            found[other_spec] = None
    found.pop(spec, None)
    return tuple(found)


@cached(256)
def _same_counts(axes: Axes, lengths: tuple[int, ...]) -> tuple[Spec, ...]:
    """Every spec with that many axes per dim."""
    names = [a for a, _ in axes]
    specs = []
    for order in islice(permutations(names, sum(lengths)), _MAX_ORDERS):
        left = list(order)
        specs.append(tuple(tuple(left.pop(0) for _ in range(n)) for n in lengths))
    return tuple(specs)


def _with(spec: Spec, dim: int, split: tuple[str, ...]) -> Spec:
    return (*spec[:dim], split, *spec[dim + 1 :])


def _counts(axes: Axes, spec: Spec) -> tuple[int, ...]:
    size: Mapping[str, int] = dict(axes)
    return tuple(prod(size[a] for a in dim) for dim in spec)


def _parts(axes: Axes, spec: Spec) -> int:
    return prod(_counts(axes, spec))


# --- One mesh on which both ends of a move can be written, its axes as small as they go


@dataclass(frozen=True, slots=True)
class Common:
    """A factored mesh over ``devices``, and the specs of both ends on it, one entry per dim."""

    devices: tuple[jax.Device, ...]
    axes: Axes
    source: Spec
    target: Spec

    def sharding(self, spec: Spec) -> NamedSharding:
        """``spec`` on the mesh."""
        return NamedSharding(
            _mesh(self.devices, self.axes), PartitionSpec(*(d or None for d in spec))
        )


@cached(4096)
def common(source: NamedSharding, target: NamedSharding, num_dims: int) -> Common | None:
    """The factored mesh of two shardings of a tensor of ``num_dims``, or None where none exists."""
    devices = tuple(source.mesh.devices.flat)
    number = {device: n for n, device in enumerate(devices)}
    if set(target.mesh.devices.flat) != set(devices):
        return None
    source_axes = _factors(np.arange(len(devices)).reshape(source.mesh.devices.shape))
    numbers = np.array([number[d] for d in target.mesh.devices.flat], dtype=int)
    target_axes = _factors(numbers.reshape(target.mesh.devices.shape))
    if source_axes is None or target_axes is None:
        return None
    strides = sorted({f for axis in (*source_axes, *target_axes) for f in axis}, reverse=True)
    if any(a != b * size for (a, _), (b, size) in pairwise(strides)):
        return None  # 2×3 and 3×2: strides 3, 2 and 1 are no mesh
    names = {stride: f"f{n}" for n, (stride, _) in enumerate(strides)}
    return Common(
        devices,
        tuple((names[stride], size) for stride, size in strides),
        _spec(source, source_axes, names, num_dims),
        _spec(target, target_axes, names, num_dims),
    )


_Factor = tuple[int, int]  # stride in device numbers, size


def _factors(numbers: np.ndarray[tuple[int, ...], np.dtype[np.int_]]) -> list[list[_Factor]] | None:
    """For each mesh axis its prime factors, outer to inner; None if the numbers are not strided."""
    primes = [_primes(n) for n in numbers.shape]
    fine = numbers.reshape([p for axis in primes for p in axis])
    origin = (0,) * fine.ndim
    if fine[origin] != 0:
        return None
    strides = [int(fine[(*origin[:k], 1, *origin[k + 1 :])]) for k in range(fine.ndim)]
    for at in product(*map(range, fine.shape)):
        if fine[at] != sum(i * s for i, s in zip(at, strides, strict=True)):
            return None
    left = iter(zip(strides, fine.shape, strict=True))
    return [[next(left) for _ in axis] for axis in primes]


def _spec(
    named: NamedSharding, factors: list[list[_Factor]], names: dict[int, str], num_dims: int
) -> Spec:
    of = dict(zip(named.mesh.axis_names, factors, strict=True))
    spec = placement_of(named).spec
    split = tuple(tuple(names[s] for a in axes for s, _ in of[a]) for axes in spec)
    return split + ((),) * (num_dims - len(split))


def _primes(n: int) -> list[int]:
    """The prime factors of ``n``, smallest first.

    >>> _primes(12)
    [2, 2, 3]
    """
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found


@cached(256)
def _mesh(devices: tuple[jax.Device, ...], axes: Axes) -> Mesh:
    sizes = [n for _, n in axes]
    grid = np.array(devices, dtype=object).reshape(sizes)
    assert grid.size == prod(sizes)
    return Mesh(grid, tuple(a for a, _ in axes), axis_types=(AxisType.Auto,) * len(axes))


# --- The compiled route: XLA moves the shards of arrays that stay on one set of devices

#: The largest intermediate, as a multiple of the larger shard.
MAX_RATIO = 1.25

_MAX_WAYS = 12  # ways round that are compiled before giving up; the first has sufficed so far


@cached(4096)
def route(move: Move) -> tuple[Move, ...] | None:
    """The moves, one program each, that take ``move`` there within the bound; None if none do.

    The choice is made on a small tensor that is cut the same ways and holds for every shape.
    """
    if not isinstance(move.source, NamedSharding) or not isinstance(move.target, NamedSharding):
        return None
    ends = common(move.source, move.target, len(move.shape))
    if ends is None:
        return None
    between = _between(ends, move.dtype)
    if between is None:
        return None
    stops = [ends.sharding(s) for s in (ends.source, *between, ends.target)]
    if not all(_divides(s, move.shape) for s in stops):
        return None
    return tuple(Move(move.shape, move.dtype, a, b) for a, b in pairwise(stops))


@cached(4096)
def _between(ends: Common, dtype: np.dtype[np.generic]) -> tuple[Spec, ...] | None:
    round_about = islice(paths(ends.axes, ends.source, ends.target), _MAX_WAYS)
    ways: Iterator[Sequence[Spec]] = chain([()], round_about)
    shape = _small_shape(len(ends.devices), len(ends.source))
    for way in ways:
        stops = [ends.sharding(s) for s in (ends.source, *way, ends.target)]
        limit = _limit([Move(shape, dtype, stops[0], stops[-1])])
        steps = pairwise(stops)
        if all(_largest_bytes(Move(shape, dtype, a, b)) <= limit for a, b in steps):
            return tuple(way)
    return None


def _small_shape(num_devices: int, num_dims: int) -> tuple[int, ...]:
    """A tensor that any spec over those devices divides, larger than the tables in a program.

    >>> _small_shape(8, 2)
    (184, 184)
    """
    return (num_devices * -(-round(32768 ** (1 / num_dims)) // num_devices),) * num_dims


def _divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


def _limit(moves: Sequence[Move]) -> int:
    return int(MAX_RATIO * max(m.shard_bytes for m in moves))


@cached(4096)
def _largest_bytes(move: Move) -> int:
    return program((move,)).executable.largest_bytes


@dataclass(frozen=True)
class Program:
    """One compiled program that takes several arrays along, each on its own way."""

    moves: tuple[Move, ...]
    executable: Executable

    @property
    def fits(self) -> bool:
        """Whether its intermediates are within the bound, each for the arrays it is made of."""
        return self.executable.largest_bytes <= _limit(self.moves) and all(
            num_bytes <= _limit([self.moves[n] for n in numbers])
            for numbers, num_bytes in self.executable.largest_made_of.items()
            if numbers
        )

    def __call__(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """The arrays, each at its move's target. They must be at its source."""
        return list(self.executable.call(*arrays))


@cached(4096)
def program(moves: tuple[Move, ...]) -> Program:
    """The program for ``moves``, compiled once for each tuple of them."""
    executable = compile_program(
        lambda *arrays: [_take(m, x) for m, x in zip(moves, arrays, strict=True)],
        [jax.ShapeDtypeStruct(m.shape, m.dtype) for m in moves],
        in_shardings=tuple(m.source for m in moves),
        out_shardings=[m.target for m in moves],
    )
    return Program(moves, executable)


def _take(move: Move, array: jax.Array) -> jax.Array:
    bits = as_bits(array)
    if bits is array:
        return array
    for sharding in (move.source, move.target):
        bits = jax.lax.with_sharding_constraint(bits, sharding)
    return from_bits(bits, move.dtype)
