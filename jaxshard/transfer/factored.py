"""One mesh on which both ends of a move can be written, its axes as small as they go.

A program runs over one order of devices. ``(dp2, mp4)`` and ``(mp8)`` in the same order
are both made of three axes of 2; a permuted order is too, as long as it permutes the digits of the
device numbers. Where there is no such mesh (a reversed order; 2×3 against 3×2) there is
no program, and the pieces are sent one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from math import prod

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..devices import placement_of
from ..layout import Spec
from ..strategy import Axes


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


@lru_cache(maxsize=4096)
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


@lru_cache(maxsize=256)
def _mesh(devices: tuple[jax.Device, ...], axes: Axes) -> Mesh:
    sizes = [n for _, n in axes]
    grid = np.array(devices, dtype=object).reshape(sizes)
    assert grid.size == prod(sizes)
    return Mesh(grid, tuple(a for a, _ in axes), axis_types=(AxisType.Auto,) * len(axes))
