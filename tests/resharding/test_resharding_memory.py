"""Whose memory is whose: what results share with sources, what donation frees, and when."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxshard.errors import LayoutError
from jaxshard.resharding import cpu_route, gather, prepare_reshard, reshard
from jaxshard.resharding.resharder import DonatedShards

P = PartitionSpec
ROUTES = ("auto", "device")


def mesh(sizes, names, numbers=range(8)):
    return Mesh(np.array(jax.devices(), dtype=object)[list(numbers)].reshape(sizes), names)


def on(m, *spec, **kwargs):
    return NamedSharding(m, P(*spec), **kwargs)


def dp2mp4():
    return mesh((2, 4), ("dp", "mp"))


def values(shape=(16, 32)):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def made(sharding, shape=(16, 32)):
    """An array that XLA made, in memory of its own."""
    return jax.block_until_ready(jax.jit(lambda x: x + 0, out_shardings=sharding)(values(shape)))


def memory_of(array):
    """The addresses that its shards begin and end at."""
    shards = [shard.data for shard in array.addressable_shards]
    return {(x.unsafe_buffer_pointer(), x.unsafe_buffer_pointer() + x.nbytes) for x in shards}


def overlap(a, b):
    return any(
        start < other_stop and other_start < stop
        for start, stop in memory_of(a)
        for other_start, other_stop in memory_of(b)
    )


#: Moves that leave some shard, or some part of one, where it is.
SHARING = {
    "another label": lambda: (on(dp2mp4(), "mp"), on(mesh((2, 4), ("x", "y")), "y")),
    "another memory kind's name": lambda: (
        on(dp2mp4(), "mp"),
        on(mesh((2, 4), ("x", "y")), "y", memory_kind="device"),
    ),
    "fewer devices": lambda: (on(dp2mp4(), "mp"), on(mesh((4,), ("x",), range(4)), "x")),
    "more replicas": lambda: (
        on(mesh((4,), ("x",), range(4)), "x"),
        on(mesh((2, 4), ("r", "x")), "x"),
    ),
    "one of its devices": lambda: (on(dp2mp4()), SingleDeviceSharding(jax.devices()[5])),
    "some stay and some are cut": lambda: (
        on(mesh((2, 2), ("a", "b"), range(4)), "a"),
        on(mesh((2,), ("a",), (0, 3)), "a"),
    ),
}
MOVING = {
    "rows to columns": lambda: (on(dp2mp4(), "mp"), on(mesh((8,), ("mp",)), None, "mp")),
    "smaller rows": lambda: (on(dp2mp4(), "mp"), on(mesh((8,), ("mp",)), "mp")),
    "other devices": lambda: (
        on(mesh((4,), ("x",), range(4)), "x"),
        on(mesh((2,), ("x",), (6, 7)), "x"),
    ),
    "into host memory": lambda: (on(dp2mp4(), "mp"), on(dp2mp4(), "mp", memory_kind="pinned_host")),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ends", [*SHARING, *MOVING])
def test_a_copy_shares_no_memory_with_its_source(ends, route):
    source, target = (SHARING | MOVING)[ends]()
    array = made(source)
    moved = reshard(array, target, route=route, copy=True)
    assert moved.sharding == target
    assert not overlap(array, moved)
    array.delete()
    assert gather(moved, host=True).tobytes() == values().tobytes()


@pytest.mark.parametrize("route", ROUTES)
def test_without_copy_a_shard_that_stays_is_shared(route):
    source, target = SHARING["another label"]()
    array = made(source)
    assert overlap(array, reshard(array, target, route=route))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("copy", [True, False])
def test_serving_weights_live_through_a_step_that_donates_its_own_if_they_are_copies(copy, route):
    training = {"norm": on(dp2mp4()), "w": on(dp2mp4(), "mp")}
    serving = {"norm": on(mesh((4,), ("x",), range(4))), "w": on(mesh((8,), ("x",)), "x")}
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    weights = {name: made(sharding) for name, sharding in training.items()}
    prepared = prepare_reshard(weights, serving, route=route, copy=copy)
    for number in range(3):
        served = prepared(weights)
        weights = jax.block_until_ready(step(weights))
        if copy:
            for array in served.values():
                assert np.array_equal(gather(array, host=True), values() + number)
        else:
            assert served["norm"].is_deleted(), "its shards were the training step's own"


def test_sources_are_given_up_or_live_on_but_not_both():
    array = made(on(dp2mp4(), "mp"))
    with pytest.raises(LayoutError, match="Set one"):
        reshard(array, on(dp2mp4()), donate=True, copy=True)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ends", SHARING)
def test_what_the_target_holds_as_it_is_survives_donation(ends, route):
    source, target = SHARING[ends]()
    moved = reshard(made(source), target, route=route, donate=True)
    assert gather(moved, host=True).tobytes() == values().tobytes()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ends", ["rows to columns", "smaller rows", "into host memory"])
def test_two_arrays_with_the_same_memory_are_both_moved_before_it_is_freed(ends, route):
    _, target = MOVING[ends]()
    array = made(on(dp2mp4(), "mp"))
    twin = reshard(array, on(mesh((2, 4), ("x", "y")), "y"))
    assert overlap(array, twin)
    moved = reshard([array, twin], target, route=route, donate=True)
    assert array.is_deleted()
    assert twin.is_deleted()
    assert all(gather(x, host=True).tobytes() == values().tobytes() for x in moved)


@pytest.mark.parametrize("route", ROUTES)
def test_donation_frees_each_array_before_the_next_is_moved(route, monkeypatch):
    source, target = MOVING["other devices"]()
    tree = [made(source) for _ in range(6)]
    alive = []
    moved = DonatedShards.moved

    def watched(donated, *args):
        moved(donated, *args)
        alive.append(sum(not x.is_deleted() for x in tree))

    monkeypatch.setattr(DonatedShards, "moved", watched)
    monkeypatch.setattr(cpu_route, "_AHEAD_BYTES", 0)
    filling = []
    start = cpu_route._start

    def watched_start(*args, **kwargs):
        filling.append(sum(not x.is_deleted() for x in tree))
        return start(*args, **kwargs)

    monkeypatch.setattr(cpu_route, "_start", watched_start)
    reshard(tree, target, route=route, donate=True)
    assert alive == [5, 4, 3, 2, 1, 0]
    assert filling == ([6, 5, 4, 3, 2, 1] if route == "auto" else [])
