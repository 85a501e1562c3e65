"""The compiled route: XLA moves the shards of arrays that stay on one set of devices.

The program is the identity with other shardings on its way out. XLA is free to
rebuild a whole tensor on every device to get there, and for some pairs does; so
every program's intermediates are read after compiling, and a pair that fails is taken round by
one or two shardings of the same mesh. What cannot be done within the bound is
not done here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from math import prod

import jax
import numpy as np
from jax.sharding import NamedSharding

from ..layout import Spec
from .bits import as_bits, from_bits
from .factored import Common, common
from .geometry import Move
from .hops import paths

#: The largest intermediate, as a multiple of the larger shard.
MAX_RATIO = 1.25

_MAX_WAYS = 12  # ways round that are compiled before giving up; the first has sufficed so far
_INDEX_BYTES = 1024  # tables of device numbers and offsets, which do not grow with the tensor
_DIGITS = re.compile(r"\d+")
_BUFFER = re.compile(r"\b(pred|[subfc]\d+|bf16|f8e\w+|f4e\w+)\[([\d,]*)\]")


@dataclass(frozen=True, slots=True)
class Peak:
    """What one program needs on each device beyond its arguments and results."""

    largest_bytes: int
    temporary_bytes: int


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
    ways: list[Sequence[Spec]] = [()]
    ways += islice(paths(ends.axes, ends.source, ends.target), _MAX_WAYS)
    shape = _small_shape(len(ends.devices), len(ends.source))
    for way in ways:
        stops = [ends.sharding(s) for s in (ends.source, *way, ends.target)]
        limit = _limit([Move(shape, dtype, stops[0], stops[-1])])
        steps = pairwise(stops)
        if all(_peak(Move(shape, dtype, a, b)).largest_bytes <= limit for a, b in steps):
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
def _peak(move: Move) -> Peak:
    return program((move,)).peak


@dataclass(frozen=True)
class Program:
    """One compiled program that takes several arrays along, each on its own way."""

    moves: tuple[Move, ...]
    compiled: jax.stages.Compiled
    peak: Peak

    @property
    def fits(self) -> bool:
        """Whether its intermediates are within the bound."""
        return self.peak.largest_bytes <= _limit(self.moves)

    def __call__(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """The arrays, each at its move's target. They must be at its source."""
        return list(self.compiled(*arrays))


@lru_cache(maxsize=4096)
def program(moves: tuple[Move, ...]) -> Program:
    """The program for ``moves``, compiled once for each tuple of them."""
    identity = jax.jit(
        lambda *arrays: [_take(m, x) for m, x in zip(moves, arrays, strict=True)],
        in_shardings=tuple(m.source for m in moves),
        out_shardings=[m.target for m in moves],
    )
    with jax.enable_x64(True):
        described = [jax.ShapeDtypeStruct(m.shape, m.dtype) for m in moves]
        compiled = identity.lower(*described).compile()
    memory = compiled.memory_analysis()
    temporary = int(memory.temp_size_in_bytes) if memory is not None else 0
    return Program(moves, compiled, Peak(_largest_buffer(compiled.as_text() or ""), temporary))


def _take(move: Move, array: jax.Array) -> jax.Array:
    bits = as_bits(array)
    if bits is array:
        return array
    for sharding in (move.source, move.target):
        bits = jax.lax.with_sharding_constraint(bits, sharding)
    return from_bits(bits, move.dtype)


def _largest_buffer(text: str) -> int:
    """Bytes of the largest array that is mentioned in a compiled program.

    >>> _largest_buffer("%p = bf16[8,4]{1,0} parameter(0), %t = s32[8]{0} constant(...)")
    64
    """
    largest = 0
    for kind, dims in _BUFFER.findall(text):
        bits = 8 if kind == "pred" else int(_DIGITS.search(kind)[0])  # type: ignore[index]
        size = prod(map(int, filter(None, dims.split(",")))) * max(bits // 8, 1)
        if size > _INDEX_BYTES or kind not in ("s32", "u32", "pred"):
            largest = max(largest, size)
    return largest
