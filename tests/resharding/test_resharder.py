"""Prepared resharding: what is planned, how much is compiled, and what bounds it."""

import threading
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxshard.core.layout import Layout, Placement, Strategy
from jaxshard.devices.mesh import shardings
from jaxshard.errors import LayoutError
from jaxshard.resharding import Resharder, cpu_route, gather, prepare_reshard, reshard
from jaxshard.resharding.compiled import (
    CompiledProgram,
    Executable,
    compile_program,
    largest_array_bytes,
    largest_made_of,
    program,
)
from jaxshard.resharding.geometry import ShardingChange
from jaxshard.resharding.resharder import _Execution, _rounds
from jaxshard.resharding.routes import Route, RouteLeg

P = PartitionSpec


def mesh(sizes, names, numbers=range(8)):
    return Mesh(np.array(jax.devices(), dtype=object)[list(numbers)].reshape(sizes), names)


def on(m, *spec, **kwargs):
    return NamedSharding(m, P(*spec), **kwargs)


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

    monkeypatch.setattr("jaxshard.resharding.compiled.compile_program", recording)
    monkeypatch.setattr("jaxshard.resharding.piecewise.compile_program", recording)
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


def test_hundreds_of_shapes_in_any_numbers_cost_an_eighth_as_many_compilations(monkeypatch):
    source, target = row_and_col()
    prepare_reshard(described({"w": (8, 48)}, source), target, route="device")  # the route
    counted = []

    def counting(function, inputs, **_):  # to compile them all would take a minute
        counted.append(len(inputs))
        return Executable(None, None, 0, {}, 0)

    monkeypatch.setattr("jaxshard.resharding.compiled.compile_program", counting)
    rng = np.random.default_rng(0)
    shapes = {
        f"w{n}.{number}": (8 * n, 48)
        for n in range(2, 210)
        for number in range(int(rng.integers(1, 13)))
    }
    tree = described(shapes, source)
    plan = prepare_reshard(tree, target, route="device").plan
    assert plan.num_programs == len(counted) <= 208 // 8
    assert max(counted) == 32


@pytest.mark.parametrize(
    ("numbers", "most"),
    [(range(1, 65), 16), ([1, 1, 2, 3, 5, 8, 13, 21, 34, 55], 10), ([7] * 40, 2), ([3, 9], 2)],
)
def test_every_leaf_is_in_one_group_and_groups_are_alike(numbers, most):
    first = np.cumsum([0, *numbers])
    geometries = [list(range(a, a + n)) for a, n in zip(first, numbers, strict=False)]
    of_leaf = {leaf: g for g, leaves in enumerate(geometries) for leaf in leaves}
    move = ShardingChange((8, 8), np.dtype(np.int8), *row_and_col())
    ways = [Route((RouteLeg("pieces", move),))] * len(of_leaf)
    groups = list(_rounds(geometries, ways))
    assert sorted(leaf for group in groups for leaf in group) == list(of_leaf)
    alike = {tuple(of_leaf[leaf] for leaf in group) for group in groups}
    assert all(len(set(group)) == len(group) for group in alike)
    assert len(alike) <= most, "one program for each"


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


def assert_the_number_told_is_the_least(source, target):
    """What the refusal of one byte asks for suffices, and a byte less does not."""
    tree = described({"w": (64, 64)}, source)
    with pytest.raises(LayoutError, match=r"w: moving float32 \(64, 64\) needs") as caught:
        prepare_reshard(tree, target, route="device", device_bytes=1)
    least = int(str(caught.value).split("Raise device_bytes to ")[1].split()[0].replace(",", ""))
    bounded = prepare_reshard(tree, target, route="device", device_bytes=least)
    assert bounded.plan.in_flight_bytes <= least
    moving, values = arrays({"w": (64, 64)}, source)
    assert np.array_equal(gather(bounded(moving), host=True)["w"], values["w"])
    with pytest.raises(LayoutError):
        prepare_reshard(tree, target, route="device", device_bytes=least - 1)


@pytest.mark.parametrize("ends", ["same devices", "disjoint"])
def test_device_bytes_is_kept_or_refused_with_the_number_that_would_do(ends):
    source, target = row_and_col()
    if ends == "disjoint":
        source = on(mesh((4,), ("x",), range(4)), "x")
        target = on(mesh((4,), ("x",), range(4, 8)), None, "x")
    assert_the_number_told_is_the_least(source, target)


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
    with pytest.raises(LayoutError, match="the tree has the structure"):
        resharder([tree["w"]])
    with pytest.raises(LayoutError, match=r"w: .*prepared for float32 \(16, 8\)"):
        resharder(resharder(tree))
    with pytest.raises(LayoutError, match="w: a ShapeDtypeStruct has no data"):
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
    call = CompiledProgram.__call__

    def watched(program, given):
        overlaps.extend(x for x in (*running, *given) if not x.is_ready())
        running[:] = call(program, given)
        return running

    monkeypatch.setattr(CompiledProgram, "__call__", watched)
    tree, _ = arrays({f"w{n}": (512, 512) for n in range(20)}, source)
    prepared = prepare_reshard(tree, target, route="device")
    prepared(tree)
    assert not overlaps
    for batch in prepared._batches:  # the twin: without a barrier they overlap, and are seen to
        running[:] = batch.legs[0].run([tree[f"w{n}"] for n in batch.leaves])
    assert overlaps


@pytest.mark.parametrize("route", ["auto", "device"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4", "key"])
@pytest.mark.parametrize("ends", ["same devices", "disjoint"])
def test_calls_compile_nothing(ends, dtype, route):
    source, target = on(mesh((2, 4), ("dp", "mp")), "mp"), on(mesh((8,), ("mp",)), "mp")
    if ends == "disjoint":
        source = on(mesh((4,), ("x",), range(4)), "x")
        target = on(mesh((2,), ("x",), (5, 6)), "x")
    shapes = {"w": (16, 56), "v": (32, 8), "empty": (0, 8)}
    if dtype == "key":
        tree = {n: jax.random.split(jax.random.key(1), s) for n, s in shapes.items() if n != "w"}
    else:
        tree = {n: np.zeros(s).astype(jnp.dtype(dtype)) for n, s in shapes.items()}
    tree = jax.block_until_ready(jax.device_put(tree, source))
    prepared = prepare_reshard(tree, target, route=route)
    with counting_compilations() as compiled:
        for _ in range(3):
            jax.block_until_ready(prepared(tree))
    assert not compiled
    with counting_compilations() as compiled:  # the twin
        jax.jit(lambda x: x + 1)(np.ones(7))
    assert compiled


@contextmanager
def counting_compilations():
    """What any backend compiles while it is open."""
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(listen)


def test_keys_of_another_number_or_kind_are_refused():
    source, target = on(mesh((8,), ("x",)), "x"), on(mesh((4,), ("x",), range(4)), "x")
    keys = jax.device_put(jax.random.split(jax.random.key(1), 16), source)
    prepared = prepare_reshard({"keys": keys}, target)
    moved = prepared({"keys": keys})["keys"]
    assert np.array_equal(jax.random.key_data(moved), jax.random.key_data(keys))
    with pytest.raises(LayoutError, match=r"keys: .* \(8,\) on .*prepared for key<fry> \(16,\)"):
        prepared({"keys": jax.device_put(keys[:8], source)})
    others = jax.device_put(jax.random.split(jax.random.key(1, impl="rbg"), 16), source)
    with pytest.raises(LayoutError, match=r"keys: key<rbg> \(16,\)"):
        prepared({"keys": others})


def test_keys_can_be_described():
    source, target = on(mesh((8,), ("x",)), "x"), on(mesh((4,), ("x",), range(4)), "x")
    keys = jax.device_put(jax.random.split(jax.random.key(1), 16), source)
    prepared = prepare_reshard(jax.ShapeDtypeStruct((16,), keys.dtype, sharding=source), target)
    assert np.array_equal(jax.random.key_data(prepared(keys)), jax.random.key_data(keys))


@pytest.mark.parametrize("route", ["auto", "device"])
@pytest.mark.parametrize("donate", [False, True])
def test_arrays_that_come_out_of_a_step_are_taken_whatever_words_it_has_for_their_sharding(
    donate, route
):
    source, target = row_and_col()
    tree, values = arrays({"w": (16, 8), "b": (16,)}, source)
    tree["b"] = jax.device_put(values["b"], source)
    targets = {"w": target, "b": on(mesh((8,), ("mp",)))}
    prepared = prepare_reshard(tree, targets, route=route, donate=donate)
    step = jax.jit(lambda t: {"w": t["w"].reshape(4, 4, 8).reshape(16, 8) + 1, "b": t["b"] + 1})
    stepped = step(tree)
    same = {
        "w": jax.device_put(np.asarray(stepped["w"]), on(mesh((2, 4), ("dp", "mp")), "mp", None)),
        "b": jax.device_put(np.asarray(stepped["b"]), on(mesh((1, 2, 4), ("a", "b", "c")), ("c",))),
    }
    for given in (stepped, same):
        for name, x in given.items():
            assert x.sharding.is_equivalent_to(source, x.ndim), name
        moved = prepared(given)
        assert moved["w"].sharding == target
        whole = gather(moved, host=True)
        assert all(np.array_equal(whole[n], values[n] + 1) for n in values)
        assert all(x.is_deleted() == donate for x in given.values())


def test_the_bytes_on_each_link_are_those_of_all_legs():
    cube = mesh((2, 2, 2), ("a", "b", "c"))
    source, target = on(cube, "b", "a"), on(cube, ("b", "c", "a"))
    tree = described({"w": (64, 64)}, source)
    leaf = prepare_reshard(tree, target, route="device").plan.leaves[0]
    assert leaf.between
    size = 64 * 64 * 4
    # (b|a) → (b,c|a): each device keeps half of its quarter. (b,c|a) → (b,c,a|): half of an eighth
    # is there, the other half comes from the neighbour along a
    assert leaf.same_device_bytes == size + size // 2
    assert leaf.cross_device_bytes == size // 2


MEMORY = {
    "into host memory": lambda: (
        on(mesh((2, 4), ("dp", "mp")), "mp"),
        on(mesh((8,), ("mp",)), None, "mp", memory_kind="pinned_host"),
    ),
    "out of it": lambda: (
        on(mesh((2, 4), ("dp", "mp")), "mp", memory_kind="pinned_host"),
        on(mesh((8,), ("mp",)), None, "mp"),
    ),
    "within it, to other devices": lambda: (
        on(mesh((4,), ("x",), range(4)), "x", memory_kind="pinned_host"),
        on(mesh((4,), ("x",), range(4, 8)), None, "x", memory_kind="pinned_host"),
    ),
}


@pytest.mark.parametrize("ends", MEMORY)
def test_device_bytes_counts_what_stops_on_the_device_between_two_memories(ends):
    source, target = MEMORY[ends]()
    tree = described({"w": (64, 64)}, source)
    free = prepare_reshard(tree, target, route="device").plan.in_flight_bytes
    ends_on_device = [s for s in (source, target) if s.memory_kind != "pinned_host"]
    stops = 2 - len(ends_on_device)
    assert free >= stops * 64 * 64 * 4 // 8
    assert_the_number_told_is_the_least(source, target)


@pytest.mark.parametrize(("at_once", "barriers"), [(1, 10), (2, 5), (4, 3), (None, 1)])
def test_device_bytes_bounds_what_many_leaves_have_in_flight(at_once, barriers, monkeypatch):
    source = on(mesh((4,), ("x",), range(4)), "x")
    target = on(mesh((4,), ("x",), range(4, 8)), None, "x")
    shapes = {f"w{n}": (64, 64) for n in range(10)}
    tree = described(shapes, source)
    each = prepare_reshard(tree, target, route="device").plan.leaves[0].in_flight_bytes
    limit = None if at_once is None else at_once * each
    prepared = prepare_reshard(tree, target, route="device", device_bytes=limit)
    assert {leaf.in_flight_bytes for leaf in prepared.plan.leaves} == {each}
    in_flight, barrier = [], _Execution._barrier

    def watched(run):
        in_flight.append(len(run.in_flight))
        barrier(run)
        assert not run.in_flight_bytes

    monkeypatch.setattr(_Execution, "_barrier", watched)
    moving, values = arrays(shapes, source)
    moved = gather(prepared(moving), host=True)
    assert all(np.array_equal(moved[n], values[n]) for n in values)
    assert len(in_flight) == barriers
    assert sum(in_flight) == 10
    assert max(in_flight) == (at_once or 10)


@pytest.mark.parametrize("named", [True, False])
def test_each_tensor_of_a_program_is_held_to_its_own_bound(named):
    """Arrays of a program count for the arguments that they are made of."""
    large, small = (
        ShardingChange(shape, np.dtype(np.float32), *row_and_col())
        for shape in ((512, 512), (64, 64))
    )
    text = """
ENTRY %main (a: f32[128,512], b: f32[16,64]) -> (f32[512,64], f32[64,8]) {
  %a = f32[128,512]{1,0} parameter(0)
  %b = f32[16,64]{1,0} parameter(1)
  %whole = f32[64,64]{1,0} all-gather(%WHICH), dimensions={0}
  ROOT %both = (f32[512,64]{1,0}, f32[64,8]{1,0}) tuple(%a, %whole)
}"""
    text = text.replace("WHICH", "b" if named else "a")
    executable = Executable(None, None, largest_array_bytes(text), largest_made_of(text), 0)
    assert CompiledProgram((large, small), executable).fits == (not named)


def test_programs_for_several_tensors_name_the_arguments_of_their_arrays():
    source, target = row_and_col()
    moves = [ShardingChange((8 * n, 16), np.dtype(np.float32), source, target) for n in (1, 2, 3)]
    found = program(tuple(moves)).executable.largest_made_of
    for n, move in enumerate(moves):
        assert found[frozenset([n])] >= move.source_shard_bytes
        assert found[frozenset([n])] <= 1.25 * move.shard_bytes


def test_what_is_not_copied_is_labelled_while_threads_copy(monkeypatch):
    """A thread that copies cannot end before all that needs no copy has its new label."""
    source = on(mesh((2, 4), ("dp", "mp")), "mp")
    turned, halved = on(mesh((8,), ("mp",)), None, "mp"), on(mesh((8,), ("mp",)), "mp")
    shapes = {"copied": (512, 1024), "viewed": (64, 1024), "stays": (16, 16)}
    tree, values = arrays(shapes, source)
    tree = jax.block_until_ready(jax.tree.map(lambda x: x + 0, tree))  # XLA aligns
    resharder = prepare_reshard(tree, {"copied": turned, "viewed": halved, "stays": source})
    labelled, copying = threading.Event(), threading.Event()
    finish, copy, finished = _Execution._finish, cpu_route._copy, []

    def watched(run, n, array):
        finish(run, n, array)
        finished.append(run.leaves[n].name)
        if {"viewed", "stays"} <= set(finished):
            labelled.set()

    def slow(copies):
        copying.set()
        assert labelled.wait(20), finished
        copy(copies)

    monkeypatch.setattr(_Execution, "_finish", watched)
    monkeypatch.setattr(cpu_route, "_copy", slow)
    moved = resharder(tree)
    assert copying.is_set()
    assert finished[-1] == "copied"
    for name, value in values.items():
        assert np.array_equal(np.asarray(moved[name]), value)
