"""Meshes and random shardings of a small array over the eight devices of tests."""

from math import prod

import jax
import numpy as np
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxshard.resharding.geometry import ShardingChange

P = PartitionSpec
SIDE = 24


def mesh(sizes, names, numbers):
    return Mesh(np.array(jax.devices(), dtype=object)[list(numbers)].reshape(sizes), names)


@st.composite
def shardings(draw, num_dims=2):
    """Any sharding of a 24 × 24 array over some devices in some order."""
    sizes = draw(
        st.sampled_from([(8,), (2, 4), (4, 2), (2, 2, 2), (3, 2), (2, 3), (4,), (3,), (1,)])
    )
    numbers = draw(st.permutations(range(8)))[: prod(sizes)]
    spec = [[] for _ in range(num_dims)]
    for name in draw(st.permutations("abc"[: len(sizes)])):
        dim = draw(st.integers(-1, num_dims - 1))
        if dim >= 0:
            spec[dim].append(name)
    return NamedSharding(mesh(sizes, tuple("abc"[: len(sizes)]), numbers), P(*map(tuple, spec)))


def move_of(source, target):
    return ShardingChange((SIDE, SIDE), np.dtype(np.int8), source, target)
