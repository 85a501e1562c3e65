"""Layouts: JAX's own shardings say the same of every rank."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from random_layouts import models

from jaxshard.core import layout as layout_module
from jaxshard.core.box import Box
from jaxshard.core.layout import Layout, Placement, Strategy, check_divides, shard_dim_over_replicas
from jaxshard.errors import LayoutError

DP4_MP2 = (("dp", 4), ("mp", 2))


def by_jax(placement: Placement, shape: tuple[int, ...]) -> list[Box]:
    """What JAX says each rank holds, on as many CPU devices."""
    jax = pytest.importorskip("jax")
    from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: PLC0415

    sizes = [n for _, n in placement.axes] or [1]
    names = [a for a, _ in placement.axes] or ["one"]
    devices = jax.devices()[: prod(sizes)]
    mesh = Mesh(np.array(devices).reshape(sizes), names)
    spec = PartitionSpec(*(axes if axes else None for axes in placement.spec))
    indices = NamedSharding(mesh, spec).devices_indices_map(shape)
    found = []
    for device in devices:
        bounds = [s.indices(n)[:2] for s, n in zip(indices[device], shape, strict=True)]
        found.append(Box(tuple(a for a, _ in bounds), tuple(b for _, b in bounds)))
    return found


@given(models(num_layouts=1))
def test_every_rank_holds_what_jax_says(model):
    for tensor in model.tensors:
        for placement in model.layouts[0].placements[tensor.name]:
            assert list(placement.boxes(tensor.shape)) == by_jax(placement, tensor.shape)


@pytest.mark.parametrize("spec", [(("mp", "dp"),), (("dp", "mp"),), (("mp",), ("dp",))])
def test_the_first_axis_named_is_the_slowest(spec):
    placement = Placement(DP4_MP2, spec)
    shape = (8, 8)[: len(spec)]
    assert list(placement.boxes(shape)) == by_jax(placement, shape)


def test_the_order_of_axes_matters():
    """The twin: the oracle tells such specs apart."""
    one, other = Placement(DP4_MP2, (("mp", "dp"),)), Placement(DP4_MP2, (("dp", "mp"),))
    assert list(one.boxes((8,))) != by_jax(other, (8,))


@given(models(num_layouts=1))
def test_shards_are_the_distinct_boxes_and_all_their_holders(model):
    for tensor in model.tensors:
        for placement in model.layouts[0].placements[tensor.name]:
            boxes, shards = placement.boxes(tensor.shape), placement.shards(tensor.shape)
            assert len({s.box for s in shards}) == len(shards)
            assert {r: s.box for s in shards for r in s.holders} == dict(enumerate(boxes))
            assert len({len(s.holders) for s in shards}) == 1
            assert {b.shape for b in boxes} == {placement.local_shape(tensor.shape)}


@given(models(num_layouts=1))
def test_the_box_of_one_rank_needs_not_those_of_all(model):
    for tensor in model.tensors:
        for placement in model.layouts[0].placements[tensor.name]:
            alone = tuple(placement.box(tensor.shape, rank) for rank in placement.ranks)
            assert alone == placement.boxes(tensor.shape)


def test_boxes_of_many_ranks_are_not_kept_for_ever():
    """A strategy file may tell of thousands of ways to cut, each over as many ranks."""
    ranks = layout_module._MAX_CACHED_RANKS // 8
    for number in range(10):
        placement = Placement((("a", ranks // 2), ("b", 2)), (("b",),))
        assert len(placement.boxes((2 + 2 * number,))) == ranks
        assert layout_module._BOX_CACHE.weight <= layout_module._MAX_CACHED_RANKS


def test_a_layout_knows_the_box_of_a_rank_in_any_stage():
    mp2 = (("mp", 2),)
    tied = (Placement(mp2, (("mp",),), 0), Placement(mp2, (("mp",),), 4))
    layout = Layout(6, {"embed": tied})
    assert layout.box_of("embed", (8,), 5) == Box((4,), (8,))
    assert layout.box_of("embed", (8,), 2) is None
    assert layout.box_of("other", (8,), 0) is None


def test_a_dim_that_does_not_divide_is_refused_with_both_ways_out():
    with pytest.raises(LayoutError, match=r"w: dim 1 of shape \(4, 9\).*mp=2 does not divide"):
        check_divides(Placement(DP4_MP2, ((), ("mp",))), (4, 9), "w")
    with pytest.raises(LayoutError, match=r'Pad it to 10, or leave it whole.*"w" = "-,-"'):
        check_divides(Placement(DP4_MP2, ((), ("mp",))), (4, 9), "w")
    with pytest.raises(LayoutError, match="has 1 dims, but the tensor has 0"):
        Placement(DP4_MP2, ((),)).boxes(())


@pytest.mark.parametrize(
    ("dp", "cp", "mp", "ways"), list(product([2, 4], [1, 2], [1, 2], [1, 2, 4, -1]))
)
def test_the_optimizer_shard_splits_further_and_moves_nothing_else(dp, cp, mp, ways):
    plain = Placement(Strategy(dp=dp, cp=cp, mp=mp).stage_axes, (("mp",),))
    replicas, wanted = dp * cp, dp * cp if ways == -1 else ways
    if replicas % wanted:
        with pytest.raises(LayoutError, match="do not fit"):
            shard_dim_over_replicas(plain, ways)
        return
    shape = (16, 3)
    sharded = shard_dim_over_replicas(plain, ways)
    assert sharded.num_ranks == plain.num_ranks
    pairs = list(zip(plain.boxes(shape), sharded.boxes(shape), strict=True))
    assert all(outer.contains(inner) for outer, inner in pairs)
    assert all(outer.size == wanted * inner.size for outer, inner in pairs)
    assert len({inner for _, inner in pairs}) == mp * wanted


def test_a_placement_prints_itself():
    assert str(Placement(DP4_MP2, (("mp", "dp"), ()), 8)) == "[mp+dp,-] over dp4 mp2 from rank 8"
    assert str(Placement(())) == "[-] over one rank from rank 0"


def test_sixteen_thousand_ranks_need_no_devices():
    ranks = 16384
    placement = Placement((("dp", ranks // 8), ("mp", 8)), (("mp",),))
    shards = placement.shards((64, 3))
    assert (len(shards), len(shards[0].holders)) == (8, ranks // 8)
