"""Resharding under whatever the caller has set: a mesh, 64 bits or 32, other threads."""

import threading
from contextlib import nullcontext, suppress

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxshard.errors import LayoutError
from jaxshard.resharding import (
    compiled,
    gather,
    piecewise,
    prepare_reshard,
    reshard,
    resharder,
    routes,
)

P = PartitionSpec
ROUTES = ("auto", "device")
BOTH_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])


def mesh(sizes, names, numbers=range(8), axis_type=AxisType.Auto):
    grid = np.array(jax.devices(), dtype=object)[list(numbers)].reshape(sizes)
    return Mesh(grid, names, axis_types=(axis_type,) * len(sizes))


def square(*spec, axis_type=AxisType.Auto):
    return NamedSharding(mesh((2, 4), ("x", "y"), axis_type=axis_type), P(*spec))


def line(numbers, *spec):
    return NamedSharding(mesh((len(numbers),), ("z",), numbers), P(*spec))


def cube(*spec):
    return NamedSharding(mesh((2, 2, 2), ("a", "b", "c")), P(*spec))


ENDS = {
    "same devices": lambda: (square("y", "x"), line(range(8), None, "z")),
    "a way round": lambda: (cube("b", "a"), cube(("b", "c", "a"))),
    "grow": lambda: (line(range(4), "z"), square("x", "y")),
    "shrink": lambda: (square(None, "y"), line((2, 3, 5), None, "z")),
}


@pytest.fixture
def nothing_compiled_yet():
    """As in a new process: programs that were compiled elsewhere prove nothing here."""
    for cached in (
        routes.choose,
        compiled.route,
        compiled._between,
        compiled._largest_bytes,
        compiled.program,
        piecewise.program,
    ):
        cached.cache_clear()


@pytest.mark.usefixtures("nothing_compiled_yet")
@BOTH_TYPES
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("ends", ENDS)
def test_a_mesh_that_the_caller_has_set_has_no_say(ends, dtype, route, axis_type):
    source, target = ENDS[ends]()
    value = np.arange(8 * 24).reshape(8, 24).astype(jnp.dtype(dtype))
    array = jax.device_put(value, source)
    with jax.set_mesh(mesh((4, 2), ("x", "y"), axis_type=axis_type)):
        within = prepare_reshard(array, target, route=route)
        found = [reshard(array, target, route=route), within(array)]
        whole = [gather(x, host=True) for x in (array, *found)]
    found.append(within(array))
    assert all(x.sharding == target for x in found)
    assert all(x.tobytes() == value.tobytes() for x in (*whole, gather(found[-1], host=True)))


@pytest.mark.usefixtures("nothing_compiled_yet")
@BOTH_TYPES
@pytest.mark.parametrize("route", ROUTES)
def test_arrays_of_the_mesh_that_is_set_leave_it_and_enter_it(route, axis_type):
    inside, outside = square("y", "x", axis_type=axis_type), line(range(3, 8), None, "z")
    value = np.arange(8 * 40, dtype=np.float32).reshape(8, 40)
    keys = jax.random.split(jax.random.key(3), 40)
    with jax.set_mesh(inside.mesh):
        tree = {
            "w": jax.jit(lambda x: x + 1, out_shardings=inside)(value),
            "keys": jax.device_put(keys, NamedSharding(inside.mesh, P("y"))),
            "empty": jax.device_put(value[:0], NamedSharding(inside.mesh, P(None, "y"))),
        }
        there = {"w": outside, "keys": line(range(3, 8), "z"), "empty": outside}
        back = jax.tree.map(lambda x: x.sharding, tree)
        away = reshard(tree, there, route=route)
        again = reshard(away, back, route=route, donate=True)
        assert jax.typeof(again["w"]) == jax.typeof(tree["w"])
        assert np.array_equal(gather(again, jax.devices()[0])["w"], value + 1)
    assert away["w"].is_deleted()
    assert np.array_equal(jax.random.key_data(again["keys"]), jax.random.key_data(keys))


@BOTH_TYPES
def test_the_context_is_as_it_was_afterwards(axis_type):
    array = jax.device_put(np.ones((8, 8), np.float32), square("y"))
    with jax.set_mesh(square(axis_type=axis_type).mesh):
        before = jax.sharding.get_abstract_mesh()
        reshard(array, line(range(8), None, "z"), route="device")
        with pytest.raises(LayoutError):
            reshard(array, line(range(3), "z"))
        assert jax.sharding.get_abstract_mesh() == before
    assert not before.empty
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "complex128"])
def test_values_of_64_bits_reach_the_host_whole_outside_enable_x64(dtype):
    value = (np.arange(64) + 2**40).astype(dtype).reshape(8, 8)
    with jax.enable_x64(True):
        array = jax.block_until_ready(jax.device_put(value, square("y")))
    whole = gather(array, host=True)
    assert whole.dtype == value.dtype
    assert np.array_equal(whole, value)


def in_two_threads(function):
    threads = [threading.Thread(target=function) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("locked", [True, False])
def test_threads_take_turns_where_devices_wait_for_each_other(locked, monkeypatch):
    array = jax.device_put(np.ones((64, 64), np.float32), square("y"))
    planned = prepare_reshard(array, line(range(8), None, "z"), route="device")
    assert planned.plan.leaves[0].kind == "compiled"
    together, one_at_a_time, met = threading.Barrier(2), threading.Lock(), []
    call = compiled.CompiledProgram.__call__

    def watched(program, arrays):
        with suppress(threading.BrokenBarrierError):  # nobody else came in
            met.append(together.wait(0.3))
        with one_at_a_time:
            return jax.block_until_ready(call(program, arrays))

    monkeypatch.setattr(compiled.CompiledProgram, "__call__", watched)
    if not locked:  # the twin: both come in, and are seen to
        monkeypatch.setattr(resharder, "_ALONE", nullcontext())
    in_two_threads(lambda: planned(array))
    assert len(met) == (0 if locked else 2)
