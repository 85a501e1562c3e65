from dataclasses import dataclass

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxshard.core.layout import Layout, Placement, Strategy
from jaxshard.devices.mesh import (
    layout_devices,
    mesh,
    partition_spec,
    placement_of,
    rank_devices,
    sharding,
    shardings,
    stage_meshes,
)
from jaxshard.errors import LayoutError, NotFoundError


@st.composite
def placements(draw):
    """A placement on some of eight ranks, of a tensor with dims of 8."""
    sizes = draw(st.sampled_from([(8,), (2, 4), (4, 2), (2, 2, 2), (4,), (2, 2), (2,), ()]))
    names = "abc"[: len(sizes)]
    num_dims = draw(st.integers(1, 3))
    spec = [[] for _ in range(num_dims)]
    for name in draw(st.permutations(names)):
        dim = draw(st.integers(-1, num_dims - 1))
        if dim >= 0:
            spec[dim].append(name)
    first = draw(st.integers(0, 8 - int(np.prod(sizes, dtype=int))))
    placed = Placement(tuple(zip(names, sizes, strict=True)), tuple(map(tuple, spec)), first)
    return placed, (8,) * num_dims


@given(placements())
def test_a_placement_and_its_sharding_give_every_rank_the_same_box(case):
    placement, shape = case
    found = sharding(placement).devices_indices_map(shape)
    for rank, box in zip(placement.ranks, placement.boxes(shape), strict=True):
        index = found[jax.devices()[rank]]
        ranges = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
        assert ranges == list(zip(box.start, box.stop, strict=True))


@given(placements())
def test_a_sharding_says_the_placement_it_was_made_from(case):
    placement, shape = case
    assert placement_of(sharding(placement)).boxes(shape) == placement.boxes(shape)


def test_stages_are_meshes_that_share_no_device():
    stages = stage_meshes(Strategy(dp=2, mp=2, pp=2))
    assert stages == stage_meshes("dp2mp2pp2")
    assert [m.axis_names for m in stages] == [("dp", "mp")] * 2
    assert [[d.id for d in m.devices.flat] for m in stages] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_one_mesh_cannot_be_made_of_several_stages():
    with pytest.raises(LayoutError, match="2 pipeline stages are 2 meshes"):
        mesh(Strategy(mp=2, pp=2))


def test_a_strategy_takes_the_devices_given_in_their_order():
    backwards = jax.devices()[::-1]
    assert list(mesh(Strategy(mp=4), backwards).devices.flat) == backwards[:4]
    assert rank_devices(Strategy(dp=2)) == tuple(jax.devices()[:2])


@dataclass(frozen=True)
class Gpu:
    """What is known of a device before anything is put on it."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"


def test_gpus_are_taken_in_the_order_that_jax_makes_meshes_of(monkeypatch):
    by_process = [Gpu(n, n % 2) for n in (0, 2, 4, 6, 1, 3, 5, 7)]  # not the order of the links
    monkeypatch.setattr(jax, "devices", lambda: by_process)
    ranks = rank_devices(Strategy(dp=2, mp=2, pp=2))
    assert [gpu.id for gpu in ranks] == list(range(8))
    assert list(ranks) == list(mesh_utils.create_device_mesh((2, 2, 2), by_process).flat)
    given = by_process[::-1]
    assert rank_devices(Strategy(mp=8), given) == tuple(given)


def test_a_layout_of_a_strategy_has_its_ranks_where_the_strategy_has_them(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Gpu(n, n % 2) for n in (0, 2, 4, 6, 1, 3, 5, 7)])
    placements = {"w": (Placement((("mp", 2),), (("mp",),), first_rank=6),)}
    strategy = Strategy(dp=2, mp=2, pp=2)
    staged = Layout(8, placements, stage_axes=strategy.stage_axes)
    assert layout_devices(staged) == rank_devices(strategy)
    by_hand = Layout(8, placements)
    assert [gpu.id for gpu in layout_devices(by_hand)] == [0, 2, 4, 6, 1, 3, 5, 7]
    monkeypatch.setattr(
        "jaxshard.devices.mesh.sharding", lambda placed, ranks: ranks[placed[0].first_rank]
    )
    assert shardings(staged)["w"].id == 6
    assert shardings(by_hand)["w"].id == 5


def test_too_few_devices_are_said_with_both_numbers():
    with pytest.raises(LayoutError, match="dp4mp4 needs 16 devices; there are 8"):
        mesh(Strategy(dp=4, mp=4))
    with pytest.raises(LayoutError, match="needs 9 devices"):
        sharding(Placement((("mp", 8),), (), first_rank=1))


def test_a_tensor_in_two_stages_is_one_array_replicated_over_them():
    two = [Placement((("mp", 2),), (("mp",),), first_rank=r) for r in (0, 6)]
    found = sharding(two)
    assert found.spec == PartitionSpec("mp")
    assert dict(found.mesh.shape) == {"stage": 2, "mp": 2}
    rows = {d.id: index[0].start or 0 for d, index in found.devices_indices_map((4,)).items()}
    assert rows == {0: 0, 1: 2, 6: 0, 7: 2}


def test_a_tensor_that_stages_hold_differently_is_refused():
    two = [Placement((("mp", 2),), (("mp",),)), Placement((("mp", 2),), (), first_rank=2)]
    with pytest.raises(LayoutError, match="held in different ways"):
        sharding(two)


def test_a_layout_gives_the_sharding_of_each_name_and_asks_for_those_it_lacks():
    layout = Layout(4, {"a.weight": (Placement((("mp", 4),), (("mp",),)),)})
    assert shardings(layout)["a.weight"].mesh.devices.size == 4
    with pytest.raises(NotFoundError, match=r"no tensor a.wieght. Did you mean a.weight\?"):
        shardings(layout, names=["a.wieght"])


def test_a_dim_left_to_the_compiler_has_no_placement():
    undecided = NamedSharding(
        Mesh(np.array(jax.devices()), ("a",)), PartitionSpec(PartitionSpec.UNCONSTRAINED)
    )
    with pytest.raises(LayoutError, match="every dim must be decided"):
        placement_of(undecided)


def test_a_spec_names_whole_dims_as_none():
    assert partition_spec(Placement((("a", 2),), ((), ("a",)))) == PartitionSpec(None, ("a",))


def test_a_device_has_one_rank():
    first = jax.devices()[0]
    with pytest.raises(LayoutError, match="is given for several ranks"):
        rank_devices(Strategy.parse("mp2"), [first, first])
