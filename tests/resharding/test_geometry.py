"""What resharding decides before anything moves: pieces, waves, ways round, common meshes."""

from itertools import pairwise, product
from math import prod

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxshard.core.box import Box
from jaxshard.resharding.compiled import common_mesh, paths
from jaxshard.resharding.geometry import (
    ShardingChange,
    device_boxes,
    is_contiguous,
    stays,
    traffic,
    transfers,
)
from jaxshard.resharding.piecewise import WHOLE, positions, waves
from jaxshard.resharding.routes import choose

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


@given(shardings(), shardings())
def test_every_wanted_element_is_delivered_once_from_a_device_that_has_it(source, target):
    move = move_of(source, target)
    delivered = [np.zeros((SIDE, SIDE), int) for _ in move.target_boxes]
    for piece in transfers(move):
        assert move.source_boxes[piece.source].contains(piece.box)
        for t in piece.targets:
            delivered[t][piece.box.slices] += 1
    for counts, box in zip(delivered, move.target_boxes, strict=True):
        wanted = np.zeros((SIDE, SIDE), int)
        wanted[box.slices] = 1
        assert np.array_equal(counts, wanted)


@given(shardings(), shardings())
def test_traffic_is_all_that_targets_hold_and_what_is_there_already_does_not_travel(source, target):
    move = move_of(source, target)
    found = traffic(move)
    assert found.same_device_bytes + found.cross_device_bytes == sum(
        b.size for b in move.target_boxes
    )
    held = device_boxes(source, move.shape)
    there = 0
    for device, box in device_boxes(target, move.shape).items():
        shared = held[device].intersect(box) if device in held else None
        there += shared.size if shared else 0
    assert found.same_device_bytes == there


@given(shardings(), shardings(), st.sampled_from([0, 60, 200, 10**6]))
def test_waves_fill_every_shard_with_its_elements_and_keep_to_the_limit(source, target, limit):
    move = move_of(source, target)
    array = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    filled = {}
    for wave in waves(move, limit):
        boxes = set()
        for join in wave.joins:
            shape = tuple(map(sum, join.segments))
            for nth, t in enumerate(join.devices):
                assert t not in filled
                filled[t] = np.full(shape, -1)
                boxes.add(move.target_boxes[t])
                sizes = list(product(*join.segments))
                for slot, start, size in zip(
                    join.slots, positions(join.segments), sizes, strict=True
                ):
                    piece = cut_out(move, wave, slot[nth], array)
                    assert piece.shape == size
                    filled[t][tuple(map(slice, start, np.add(start, size)))] = piece
        assert wave.peak_bytes <= limit or len(boxes) == 1
        assert wave.peak_bytes <= 1.0 * move.shard_bytes or len(boxes) > 1
    for t, box in enumerate(move.target_boxes):
        assert np.array_equal(filled[t], array[box.slices])


def cut_out(move, wave, origin, array):
    shard = array[move.source_boxes[origin.source].slices]
    if origin.cut == WHOLE:
        return shard
    cut = wave.cuts[origin.cut]
    start = cut.starts[cut.devices.index(origin.source)]
    return shard[tuple(map(slice, start, np.add(start, cut.shape)))]


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


@given(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(1, 4))] * 3))
def test_a_box_is_contiguous_where_numpy_says_so(ranges):
    start = tuple(a for a, _ in ranges)
    stop = tuple(min(a + n, 4) for a, n in ranges)
    part = np.zeros((4, 4, 4), np.int8)[Box(start, stop).slices]
    assert is_contiguous(Box(start, stop), (4, 4, 4)) == part.flags.c_contiguous


@pytest.mark.parametrize(
    ("target", "route", "kind"),
    [
        (lambda m: NamedSharding(m, P("b")), "device", "stay"),
        (lambda m: NamedSharding(mesh((4,), ("x",), [5, 4, 7, 6]), P("x")), "device", "copy"),
        (lambda m: NamedSharding(m, P(None, "b")), "device", "compiled"),
        (lambda m: NamedSharding(mesh((3,), ("x",), [0, 1, 2]), P("x")), "device", "pieces"),
        (lambda m: NamedSharding(m, P(None, "b")), "auto", "views"),
        (lambda m: SingleDeviceSharding(jax.devices()[0]), "auto", "views"),
        (lambda m: SingleDeviceSharding(jax.devices()[0]), "device", "pieces"),
    ],
)
def test_the_route_follows_from_the_geometry(target, route, kind):
    cube = mesh((2, 4), ("a", "b"), range(8))
    move = move_of(NamedSharding(cube, P("b")), target(cube))
    assert choose(move, route).kind == kind
    assert stays(move) == (kind == "stay")
