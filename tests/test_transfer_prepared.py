"""Prepared resharding: what is planned, how much is compiled, and what bounds it."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxshard.devices import shardings
from jaxshard.errors import LayoutError
from jaxshard.layout import Layout, Placement
from jaxshard.strategy import Strategy
from jaxshard.transfer import Resharder, gather, prepare_reshard, reshard
from jaxshard.transfer.compiled import Program
from jaxshard.transfer.programs import compile_program

P = PartitionSpec


def mesh(sizes, names, numbers=range(8)):
    return Mesh(np.array(jax.devices(), dtype=object)[list(numbers)].reshape(sizes), names)


def on(m, *spec):
    return NamedSharding(m, P(*spec))


def row_and_col():
    return on(mesh((2, 4), ("dp", "mp")), "mp"), on(mesh((8,), ("mp",)), None, "mp")


def described(shapes, sharding, dtype=np.float32):
    return {n: jax.ShapeDtypeStruct(s, dtype, sharding=sharding) for n, s in shapes.items()}


def arrays(shapes, sharding):
    made = {n: np.arange(np.prod(s), dtype=np.float32).reshape(s) for n, s in shapes.items()}
    return jax.device_put(made, sharding), made


@pytest.fixture
def compilations(monkeypatch):
    """Every program compiled while the test runs."""
    found = []

    def recording(*args, **kwargs):
        found.append(compile_program(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr("jaxshard.transfer.compiled.compile_program", recording)
    monkeypatch.setattr("jaxshard.transfer.piecewise.compile_program", recording)
    return found


@pytest.mark.parametrize("route", ["auto", "device"])
def test_a_resharder_is_made_from_descriptions_and_called_again_and_again(route):
    source, target = row_and_col()
    shapes = {f"w{n}": (16, 8 * n) for n in range(1, 4)}
    resharder = prepare_reshard(described(shapes, source), target, route=route)
    assert isinstance(resharder, Resharder)
    for _ in range(3):
        tree, values = arrays(shapes, source)
        moved = resharder(tree)
        assert all(np.array_equal(gather(moved, host=True)[n], values[n]) for n in values)
        assert {x.sharding for x in moved.values()} == {target}


def test_arrays_of_one_geometry_share_one_program(compilations):
    source, target = row_and_col()
    shapes = {f"w{n}": (24, 40) for n in range(50)}
    plan = prepare_reshard(described(shapes, source), target, route="device").plan
    assert plan.num_programs == 1
    assert len(compilations) <= 2, "one to choose the route on a small tensor, and the program"


def test_many_shapes_do_not_cost_as_many_compilations(compilations):
    source, target = row_and_col()
    shapes = {f"w{n}": (8 * n, 16) for n in range(1, 41)}
    resharder = prepare_reshard(described(shapes, source), target, route="device")
    assert len(compilations) <= 4, "three groups, and a small tensor to choose the route"
    tree, values = arrays(shapes, source)
    moved = gather(resharder(tree), host=True)
    assert all(np.array_equal(moved[n], values[n]) for n in values)


def test_many_shapes_between_other_devices_share_programs_too(compilations):
    source, target = (
        on(mesh((4,), ("x",), range(4)), "x"),
        on(mesh((4,), ("x",), range(4, 8)), None, "x"),
    )
    shapes = {f"w{n}": (8 * n, 16) for n in range(1, 33)}
    resharder = prepare_reshard(described(shapes, source), target, route="device")
    assert len(compilations) <= 6, "cuts and joins of two groups"
    tree, values = arrays(shapes, source)
    moved = gather(resharder(tree), host=True)
    assert all(np.array_equal(moved[n], values[n]) for n in values)


def test_a_second_preparation_compiles_nothing(compilations):
    source, target = row_and_col()
    for expected in (True, False):
        compilations.clear()
        prepare_reshard(described({"w": (56, 72)}, source), target, route="device")
        assert bool(compilations) == expected


def test_the_plan_counts_the_bytes_on_each_link():
    eight = mesh((8,), ("x",))
    four = mesh((4,), ("x",), range(4))
    tree = described({"w": (8, 4)}, on(four, "x"), np.int8)
    leaf = prepare_reshard(tree, on(eight, "x"), route="device").plan.leaves[0]
    # devices 0 to 3 hold rows 01 23 45 67 and want 0 1 2 3: only row 0 is there already
    assert (leaf.same_device_bytes, leaf.cross_device_bytes) == (4, 28)
    assert leaf.kind == "pieces"
    whole = prepare_reshard(tree, on(eight), route="device").plan
    links = (whole.traffic.same_device_bytes, whole.traffic.cross_device_bytes)
    assert links == (4 * 8, 4 * 24 + 4 * 32)


def test_a_plan_prints_its_routes_ways_and_programs():
    cube = mesh((2, 2, 2), ("a", "b", "c"))
    tree = {
        "stays": jax.ShapeDtypeStruct((64, 64), np.float32, sharding=on(cube, ("b", "c", "a"))),
        "w": jax.ShapeDtypeStruct((64, 64), np.float32, sharding=on(cube, "b", "a")),
    }
    plan = prepare_reshard(tree, on(cube, ("b", "c", "a")), route="device").plan
    lines = str(plan).splitlines()
    heads = "route arrays same device device to device largest in flight"
    assert lines[0].split() == heads.split()
    assert [line.split()[0] for line in lines[1:4]] == ["stay", "compiled", "all"]
    assert lines[4] == "w: by way of P(('f1', 'f2'), 'f0')"
    assert lines[5] == "2 compiled programs"
    assert str(prepare_reshard(tree, on(cube)).plan).endswith("0 compiled programs")


@pytest.mark.parametrize("ends", ["same devices", "disjoint"])
def test_device_bytes_is_kept_or_refused_with_the_number_that_would_do(ends):
    source, target = row_and_col()
    if ends == "disjoint":
        source = on(mesh((4,), ("x",), range(4)), "x")
        target = on(mesh((4,), ("x",), range(4, 8)), None, "x")
    tree = described({"w": (64, 64)}, source)
    least = None
    with pytest.raises(LayoutError, match=r"w: moving float32 \(64, 64\) takes") as caught:
        prepare_reshard(tree, target, route="device", device_bytes=1)
    least = int(str(caught.value).split("Raise it to ")[1].split()[0].replace(",", ""))
    bounded = prepare_reshard(tree, target, route="device", device_bytes=least)
    assert bounded.plan.in_flight_bytes <= least
    moving, values = arrays({"w": (64, 64)}, source)
    assert np.array_equal(gather(bounded(moving), host=True)["w"], values["w"])
    with pytest.raises(LayoutError):
        prepare_reshard(tree, target, route="device", device_bytes=least - 1)


def test_a_bound_below_a_program_is_met_by_pieces():
    source, target = row_and_col()
    tree = described({"w": (64, 64)}, source)
    free = prepare_reshard(tree, target, route="device").plan
    tight = prepare_reshard(
        tree, target, route="device", device_bytes=free.in_flight_bytes - 1
    ).plan
    assert (free.leaves[0].kind, tight.leaves[0].kind) == ("compiled", "pieces")


def test_a_resharder_refuses_what_it_was_not_prepared_for():
    source, target = row_and_col()
    resharder = prepare_reshard(described({"w": (16, 8)}, source), target)
    tree, _ = arrays({"w": (16, 8)}, source)
    with pytest.raises(LayoutError, match="this resharder is for"):
        resharder([tree["w"]])
    with pytest.raises(LayoutError, match=r"w: prepared for float32 \(16, 8\)"):
        resharder(resharder(tree))
    with pytest.raises(LayoutError, match="w: a ShapeDtypeStruct holds nothing"):
        resharder(described({"w": (16, 8)}, source))
    tree["w"].delete()
    with pytest.raises(LayoutError, match="w: it was donated or deleted"):
        resharder(tree)


def strategies(rng, number):
    found = []
    while len(found) < number:
        dp, mp, pp = (int(2 ** rng.integers(0, 4)) for _ in range(3))
        if dp * mp * pp <= 8:
            found.append(Strategy(dp=dp, mp=mp, pp=pp))
    return found


def layout(strategy, names):
    """Rows, columns or neither split over ``mp``; each stage holds its share of the names."""
    placed = {}
    for n, name in enumerate(names):
        stage = n * strategy.pp // len(names)
        spec = [(("mp",),), ((), ("mp",)), ()][n % 3]
        first = stage * strategy.stage_ranks
        placed[name] = (Placement(strategy.stage_axes, spec, first),)
    return Layout(strategy.num_ranks, placed)


@pytest.mark.parametrize("route", ["auto", "device"])
def test_twenty_random_strategies_in_a_row_return_the_same_bits(route):
    rng = np.random.default_rng(3)
    names = [f"layers.{n}.w" for n in range(9)]
    bits = {n: rng.integers(0, 1 << 16, (16, 24), dtype=np.uint16).view("bfloat16") for n in names}
    first, *rest = strategies(rng, 21)
    start = shardings(layout(first, names))
    tree = jax.device_put(bits, start)
    for strategy in rest:
        target = shardings(layout(strategy, names))
        tree = reshard(tree, target, route=route, donate=True)
        assert all(tree[n].sharding == target[n] for n in names)
    back = gather(reshard(tree, start, route=route), host=True)
    assert all(back[n].tobytes() == bits[n].tobytes() for n in names)


def test_programs_in_which_devices_wait_for_each_other_run_one_at_a_time(monkeypatch):
    source, target = row_and_col()
    running, overlaps = [], []
    call = Program.__call__

    def watched(program, given):
        overlaps.extend(x for x in (*running, *given) if not x.is_ready())
        running[:] = call(program, given)
        return running

    monkeypatch.setattr(Program, "__call__", watched)
    tree, _ = arrays({f"w{n}": (512, 512) for n in range(20)}, source)
    prepared = prepare_reshard(tree, target, route="device")
    prepared(tree)
    assert not overlaps
    for unit in prepared._units:  # the twin: without a barrier they overlap, and are seen to
        running[:] = unit.stages[0].run([tree[f"w{n}"] for n in unit.leaves])
    assert overlaps
