"""What resharding promises for one array or a tree of them; the grid of layouts is elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxshard.core.layout import Layout, Placement
from jaxshard.devices.mesh import shardings
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.resharding import gather, prepare_reshard, reshard
from jaxshard.resharding.geometry import bits_of

P = PartitionSpec
ROUTES = ("auto", "device")


def mesh(sizes, names, numbers=range(8), **kwargs):
    grid = np.array(jax.devices(), dtype=object)[list(numbers)].reshape(sizes)
    return Mesh(grid, names, **kwargs)


def dp2mp4():
    return mesh((2, 4), ("dp", "mp"))


def mp8():
    return mesh((8,), ("mp",))


def on(m, *spec, **kwargs):
    return NamedSharding(m, P(*spec), **kwargs)


def put(value, sharding):
    with jax.enable_x64(True):
        return jax.block_until_ready(jax.device_put(value, sharding))


def numbers(shape, dtype=np.float32):
    return np.arange(np.prod(shape, dtype=int), dtype=dtype).reshape(shape)


def raw(array):
    """Every bit of a sharded array, as bytes."""
    return np.ascontiguousarray(gather(array, host=True)).tobytes()


ENDS = {
    "same devices": lambda: (on(dp2mp4(), "mp", "dp"), on(mp8(), None, "mp")),
    "a way round": lambda: (
        on(mesh((2, 2, 2), ("a", "b", "c")), "b", "a"),
        on(mesh((2, 2, 2), ("a", "b", "c")), ("b", "c", "a")),
    ),
    "other order": lambda: (
        on(dp2mp4(), "mp"),
        on(mesh((8,), ("x",), [*range(7, -1, -1)]), None, "x"),
    ),
    "grow": lambda: (on(mesh((4,), ("x",), range(4)), "x"), on(dp2mp4(), "dp", "mp")),
    "one device": lambda: (on(dp2mp4(), "mp", "dp"), SingleDeviceSharding(jax.devices()[5])),
    "from one device": lambda: (SingleDeviceSharding(jax.devices()[5]), on(dp2mp4(), "mp", "dp")),
    "replicate": lambda: (on(dp2mp4(), "mp"), on(mp8())),
}  # fmt: skip
DTYPES = [
    "bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32",
    "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3fn", "float8_e4m3fnuz",
    "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float16", "bfloat16",
    "float32", "int64", "uint64", "float64", "complex64", "complex128",
]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", ["same devices", "grow", "one device"])
def test_every_dtype_arrives_bit_for_bit_also_outside_enable_x64(dtype, ends, route):
    kind = np.dtype(dtype) if dtype in np.sctypeDict else jnp.dtype(dtype)
    bits = np.random.default_rng(1).integers(0, 256, (16, 32 * kind.itemsize), dtype=np.uint8)
    if bits_of(kind) < 8 or dtype == "bool":
        bits &= (1 << min(bits_of(kind), 8)) - 1 if dtype != "bool" else 1
    value = bits.view(kind)
    source, target = ENDS[ends]()
    array = put(value, source)
    assert array.dtype == kind
    moved = reshard(array, target, route=route)
    assert moved.dtype == kind
    assert moved.sharding == target
    assert raw(moved) == raw(array) == value.tobytes()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ends", ENDS)
def test_donated_arrays_arrive_and_are_gone(ends, route):
    source, target = ENDS[ends]()
    value = numbers((16, 32))
    array = put(value, source)
    moved = reshard(array, target, donate=True, route=route)
    assert raw(moved) == value.tobytes()
    assert array.is_deleted()
    with pytest.raises(LayoutError, match=r"donated or deleted.*Use the result"):
        reshard(array, target)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ends", ENDS)
def test_arrays_not_donated_stay_and_can_still_be_donated_to_a_program(ends, route):
    source, target = ENDS[ends]()
    value = numbers((16, 32))
    array = jax.jit(lambda x: x + 1, out_shardings=source)(value)
    moved = reshard(array, target, route=route)
    assert raw(array) == raw(moved)
    before = raw(moved)
    following = jax.jit(lambda x: x * 2, donate_argnums=0)(array)
    jax.block_until_ready(following)
    assert raw(moved) == before, "the source's program must not write into the moved array"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ends", ENDS)
def test_a_moved_array_can_be_donated_to_a_program_and_the_source_stays(ends, route):
    source, target = ENDS[ends]()
    array = jax.jit(lambda x: x + 1, out_shardings=source)(numbers((16, 32)))
    moved = reshard(array, target, route=route)
    before = raw(array)
    following = jax.block_until_ready(jax.jit(lambda x: x * 2, donate_argnums=0)(moved))
    assert moved.is_deleted()
    assert raw(array) == before == (numbers((16, 32)) + 1).tobytes()
    assert raw(following) == (2 * (numbers((16, 32)) + 1)).tobytes()


@pytest.mark.parametrize("route", ROUTES)
def test_an_array_that_is_in_the_tree_twice_is_donated_once(route):
    array = put(numbers((8, 8)), on(dp2mp4(), "mp"))
    moved = reshard({"a": array, "b": array}, on(mp8(), None, "mp"), donate=True, route=route)
    assert raw(moved["a"]) == raw(moved["b"]) == numbers((8, 8)).tobytes()


@pytest.mark.parametrize("route", ROUTES)
def test_what_one_use_of_a_donated_array_shares_is_not_freed_by_another(route):
    array = put(numbers((8, 8)), on(dp2mp4(), "mp"))
    key = jax.device_put(jax.random.key(5), on(dp2mp4()))
    tree = {"stays": array, "goes": array, "key": key, "same key": key}
    target = {"stays": on(mesh((2, 4), ("x", "y")), "y"), "goes": on(mp8(), None, "mp")}
    target |= {"key": on(mp8()), "same key": on(mesh((2,), ("x",), (3, 4)))}
    moved = reshard(tree, target, donate=True, route=route)
    assert raw(moved["stays"]) == raw(moved["goes"]) == numbers((8, 8)).tobytes()
    for name in ("key", "same key"):
        assert jax.random.key_data(moved[name]).tolist() == [0, 5]


@pytest.mark.parametrize("route", ROUTES)
def test_an_array_that_is_there_already_shares_its_memory_and_survives_donation(route):
    array = put(numbers((8, 8)), on(dp2mp4(), "mp"))
    other = on(mesh((2, 4), ("x", "y")), "y")
    moved = reshard(array, other, donate=True, route=route)
    pointers = [
        [s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for x in (array, moved)
    ]
    assert pointers[0] == pointers[1]
    assert moved.sharding == other
    assert raw(moved) == raw(array)


@pytest.mark.parametrize("route", ROUTES)
def test_shards_that_stay_are_kept_when_the_rest_is_donated(route):
    array = put(numbers((8, 8)), on(mesh((4,), ("x",), range(4)), "x"))
    target = on(mesh((2, 4), ("r", "x")), "x")  # the same rows on devices 0 to 3, and replicas
    assert raw(reshard(array, target, donate=True, route=route)) == numbers((8, 8)).tobytes()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("shape", "before", "after"),
    [((), (), ()), ((0, 8), (None, "mp"), ("mp",)), ((8, 0), ("mp",), ()), ((8,), (), ("mp",))],
)
def test_scalars_and_empty_and_replicated_arrays_arrive(shape, before, after, route):
    array = put(numbers(shape), on(dp2mp4(), *before))
    array = reshard(array, on(mesh((4,), ("mp",), range(4)), *before), route=route)
    for target in (on(mp8(), *after), on(mesh((2,), ("mp",), (6, 7)), *after)):
        moved = reshard(array, target, route=route)
        assert (moved.shape, moved.sharding) == (shape, target)
        assert raw(moved) == raw(array)


@pytest.mark.parametrize("route", ROUTES)
def test_keys_arrive_as_keys(route):
    keys = jax.device_put(jax.random.split(jax.random.key(7), 16), on(dp2mp4(), "mp"))
    target = on(mesh((4,), ("x",), range(4, 8)), "x")
    moved = reshard({"keys": keys}, {"keys": target}, route=route, donate=True)["keys"]
    assert moved.sharding.is_equivalent_to(target, 1)
    assert moved.dtype == keys.dtype
    want = jax.random.key_data(jax.random.split(jax.random.key(7), 16))
    assert np.array_equal(jax.random.key_data(moved), want)
    prepared = prepare_reshard(moved, on(mp8(), "mp"), route=route)
    assert np.array_equal(jax.random.key_data(prepared(moved)), want)


@pytest.mark.parametrize("route", ROUTES)
def test_meshes_with_explicit_axes_are_left_and_entered(route):
    explicit = mesh((2, 4), ("dp", "mp"), axis_types=(AxisType.Explicit,) * 2)
    line = mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    value = numbers((16, 32))
    array = put(value, on(explicit, "mp"))
    for target in (on(explicit, None, "mp"), on(line, "x"), on(dp2mp4(), "dp", "mp")):
        moved = reshard(array, target, route=route)
        assert moved.sharding == target
        assert raw(moved) == value.tobytes()
    assert jax.typeof(reshard(array, on(line, "x"), route=route)).sharding.spec == P("x", None)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "kinds", [("device", "pinned_host"), ("pinned_host", "device"), ("pinned_host",) * 2]
)
@pytest.mark.parametrize("after", [("mp",), (None, "mp")])
def test_memory_kinds_are_left_and_entered(kinds, after, route):
    value = numbers((16, 32))
    array = put(value, on(dp2mp4(), "mp", memory_kind=kinds[0]))
    target = on(mesh((2, 4), ("x", "mp")), *after, memory_kind=kinds[1])
    moved = reshard(array, target, route=route)
    assert {s.data.sharding.memory_kind for s in moved.addressable_shards} == {kinds[1]}
    assert moved.sharding == target
    assert raw(moved) == value.tobytes()
    if kinds[0] != kinds[1]:
        assert raw(reshard(array, target, route=route, donate=True)) == value.tobytes()
        assert array.is_deleted()


@pytest.mark.parametrize("route", ROUTES)
def test_a_vocabulary_that_does_not_divide_says_what_would(route):
    rows = put(numbers((32001, 4)), on(mesh((3,), ("x",), range(3)), "x"))  # 32001 = 3 × 10667
    with pytest.raises(LayoutError, match=r"embed: dim 0 of shape \(32001, 4\).*Pad it to 32004"):
        reshard({"embed": rows}, on(mesh((4,), ("mp",), range(4)), "mp"), route=route)
    moved = reshard(rows, on(mesh((4,), ("mp",), range(4)), None, "mp"), route=route)
    assert raw(moved) == numbers((32001, 4)).tobytes()


NAMES = ("a.w", "a.b", "c.0")


def tree_of_arrays():
    return {
        "a": {
            "w": put(numbers((16, 8)), on(dp2mp4(), "mp")),
            "b": put(numbers((8,)), on(dp2mp4())),
        },
        "c": [put(numbers((8, 8)), on(dp2mp4(), None, "mp"))],
    }


TARGETS = {
    "one sharding": lambda: on(mp8(), "mp"),
    "a tree": lambda: {"a": {"w": on(mp8(), "mp"), "b": on(mp8(), "mp")}, "c": [on(mp8(), "mp")]},
    "by name": lambda: dict.fromkeys([*NAMES, "another"], on(mp8(), "mp")),
    "a function": lambda: lambda name: on(mp8(), "mp") if name != "?" else None,
    "described": lambda: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on(mp8(), "mp")), tree_of_arrays()
    ),
    "a layout": lambda: Layout(8, dict.fromkeys(NAMES, (Placement((("mp", 8),), (("mp",),)),))),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_can_be_said_in_many_ways(target):
    tree = tree_of_arrays()
    moved = reshard(tree, TARGETS[target]())
    assert jax.tree.structure(moved) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(tree), strict=True):
        assert x.sharding.is_equivalent_to(on(mp8(), "mp"), x.ndim)
        assert raw(x) == raw(y)


def test_a_spec_alone_means_the_mesh_the_array_has():
    array = put(numbers((8, 8)), on(dp2mp4(), "mp"))
    assert reshard(array, P(None, "dp")).sharding == on(dp2mp4(), None, "dp")
    with pytest.raises(LayoutError, match="needs a mesh, and the array has none"):
        reshard(jnp.ones(8), P("dp"))


def test_stages_change_by_moving_each_name_to_its_sub_mesh():
    names = [f"layers.{n}.w" for n in range(4)]

    def in_stages(pp):
        per = 8 // pp
        placed = {
            name: (Placement((("mp", per),), (("mp",),), first_rank=n * pp // 4 * per),)
            for n, name in enumerate(names)
        }
        return shardings(Layout(8, placed))

    of_stages = {pp: in_stages(pp) for pp in (1, 2, 4)}
    tree = {name: put(numbers((16, 4)) + n, of_stages[4][name]) for n, name in enumerate(names)}
    for route in ROUTES:
        for pp in (2, 1, 4):
            moved = reshard(tree, of_stages[pp], route=route)
            for n, name in enumerate(names):
                assert moved[name].sharding == of_stages[pp][name]
                assert raw(moved[name]) == (numbers((16, 4)) + n).tobytes()


@pytest.mark.parametrize(
    ("tree", "target", "error", "words"),
    [
        (lambda: {"w": np.ones(8)}, lambda: on(mp8()), LayoutError, "w: a ndarray is on no device"),
        (lambda: {"w": jnp.ones(8)}, lambda: {"v": on(mp8())}, NotFoundError, "no sharding for w"),
        (lambda: {"w": jnp.ones(8)}, lambda: [on(mp8())] * 2, LayoutError, "tree of 2 leaves"),
        (lambda: {"w": jnp.ones(8)}, lambda: lambda name: "mp", LayoutError, "the target is a str"),
        (lambda: {"w": jnp.ones(8)}, lambda: on(mp8(), None, "mp"), LayoutError, "has 2 dims, but"),
        (lambda: [jnp.ones(8)], lambda: on(mp8().abstract_mesh), LayoutError, "has no devices"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_a_byte_moves(tree, target, error, words):
    with pytest.raises(error, match=words):
        reshard(tree(), target())


def test_devices_that_are_not_here_are_named(monkeypatch):
    array = put(numbers((8,)), on(mp8(), "mp"))
    here = jax.devices()[:6]
    monkeypatch.setattr("jaxshard.resharding.present", lambda platform: frozenset(here))
    with pytest.raises(LayoutError, match=r"2 of 8 devices are not here: .*jax.devices"):
        reshard(array, on(mp8()))


def test_a_route_that_is_none_or_cannot_do_it_is_refused():
    array = put(numbers((8, 8), "int4"), on(mp8(), "mp"))
    with pytest.raises(LayoutError, match=r"'fast': unknown .*auto, device, views"):
        reshard(array, on(mp8()), route="fast")
    with pytest.raises(LayoutError, match="int4 elements are narrower than a byte"):
        reshard({"w": array}, on(mp8(), None, "mp"), route="views")


def test_gathering_reaches_one_device_all_of_them_or_the_host():
    tree = tree_of_arrays()
    one, all_, host = gather(tree, jax.devices()[3]), gather(tree), gather(tree, host=True)
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        found = [one, all_, host]
        for k in path:
            found = [t[getattr(k, "key", getattr(k, "idx", None))] for t in found]
        assert found[0].devices() == {jax.devices()[3]}
        assert found[1].sharding.is_fully_replicated
        assert found[1].sharding.device_set == x.sharding.device_set
        assert type(found[2]) is np.ndarray
        assert found[2].tobytes() == raw(found[0]) == raw(found[1]) == raw(x)
    with pytest.raises(LayoutError, match="Choose one"):
        gather(tree, jax.devices()[0], host=True)
    with pytest.raises(LayoutError, match="keys have no NumPy dtype"):
        gather(jax.random.key(0), host=True)


def test_gathering_to_the_host_leaves_no_copy_with_the_source():
    array = put(numbers((64, 64)), on(dp2mp4(), "mp"))
    gather(array, host=True)
    assert array._npy_value is None
    assert all(s.data._npy_value is None for s in array.addressable_shards)


def test_what_gather_and_reshard_cannot_take_is_said():
    mesh = jax.make_mesh((2, 4), ("dp", "mp"))
    with pytest.raises(LayoutError, match="a: a ndarray is on no device"):
        gather({"a": np.ones(3)})
    with pytest.raises(LayoutError, match="'cpu:0' is a str"):
        gather({"a": jnp.ones(3)}, "cpu:0")
    with pytest.raises(LayoutError, match=r"the target is a mesh, .*'dp': 2"):
        reshard({"a": jnp.ones(3)}, mesh)
