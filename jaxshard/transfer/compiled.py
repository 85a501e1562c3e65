"""The compiled route: XLA moves the shards of arrays that stay on one set of devices.

The program is the identity with other shardings on its way out. XLA is free to
rebuild a whole tensor on every device to get there, and for some pairs does; so
every program's intermediates are read after compiling, and a pair that fails is taken round by
one or two shardings of the same mesh. What cannot be done within the bound is
not done here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, pairwise

import jax
import numpy as np
from jax.sharding import NamedSharding

from ..layout import Spec
from .bits import as_bits, from_bits
from .factored import Common, common
from .geometry import Move
from .hops import paths
from .programs import Executable, compile_program

#: The largest intermediate, as a multiple of the larger shard.
MAX_RATIO = 1.25

_MAX_WAYS = 12  # ways round that are compiled before giving up; the first has sufficed so far


@lru_cache(maxsize=4096)
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


@lru_cache(maxsize=4096)
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


@lru_cache(maxsize=4096)
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


@lru_cache(maxsize=4096)
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
