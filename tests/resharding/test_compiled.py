"""Intermediate shardings and common meshes of the compiled route."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from sharding_changes import SIDE, P, mesh, shardings

from jaxshard.resharding.compiled import common_mesh, paths
from jaxshard.resharding.geometry import device_boxes

AXES = (("a", 2), ("b", 2), ("c", 2))


@st.composite
def specs(draw):
    split = [[], []]
    for name in draw(st.permutations("abc")):
        dim = draw(st.integers(-1, 1))
        if dim >= 0:
            split[dim].append(name)
    return tuple(map(tuple, split))


@given(specs(), specs())
def test_no_way_round_has_larger_shards_than_its_ends_and_the_shortest_comes_first(source, target):
    found = []
    for way in paths(AXES, source, target):
        found.append(way)
        if len(found) == 20:
            break
    if source != target:
        assert found
    parts = [2 ** sum(map(len, spec)) for spec in (source, target)]
    for way in found:
        assert 1 <= len(way) <= 2
        assert len({source, *way, target}) == len(way) + 2 - (source == target)
        assert all(2 ** sum(map(len, spec)) >= min(parts) for spec in way)
    assert all(len(a) <= len(b) for a, b in pairwise(found))


@given(shardings(), shardings())
def test_a_common_mesh_says_both_shardings_in_other_words(source, target):
    found = common_mesh(source, target, 2)
    if found is None:
        return
    for named, spec in ((source, found.source), (target, found.target)):
        assert device_boxes(found.sharding(spec), (SIDE, SIDE)) == device_boxes(named, (SIDE, SIDE))
    assert all(size in (2, 3) for _, size in found.axes)


@pytest.mark.parametrize(
    ("sizes", "numbers", "exists"),
    [
        ((8,), [0, 1, 2, 3, 4, 5, 6, 7], True),
        ((2, 4), [0, 4, 1, 5, 2, 6, 3, 7], True),  # digits permuted
        ((8,), [7, 6, 5, 4, 3, 2, 1, 0], False),
        ((8,), [0, 1, 2, 3, 4, 5, 7, 6], False),
        ((4,), [0, 1, 2, 3], False),
    ],
)
def test_a_common_mesh_exists_where_the_order_permutes_digits(sizes, numbers, exists):
    source = NamedSharding(mesh((2, 4), ("a", "b"), range(8)), P("a"))
    target = NamedSharding(mesh(sizes, ("x", "y")[: len(sizes)], numbers), P("x"))
    assert (common_mesh(source, target, 2) is not None) == exists


def test_two_by_three_and_three_by_two_have_no_common_mesh():
    source = NamedSharding(mesh((2, 3), ("a", "b"), range(6)), P("a"))
    assert common_mesh(source, NamedSharding(mesh((3, 2), ("x", "y"), range(6)), P("x")), 2) is None
    assert common_mesh(source, NamedSharding(mesh((6,), ("x",), range(6)), P("x")), 2) is not None
