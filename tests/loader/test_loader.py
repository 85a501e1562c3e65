"""Loading: whatever the target, every shard of every array is what the file holds there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxshard.api import plan
from jaxshard.conversion.open import open_checkpoint
from jaxshard.conversion.targets import lay_out_for
from jaxshard.core.layout import Strategy
from jaxshard.devices import mesh as devices
from jaxshard.devices.host_memory import aligned_empty, is_aligned
from jaxshard.errors import CoverageError, FormatError, LayoutError, NotFoundError
from jaxshard.loader import load
from jaxshard.loader.memory_budget import MemoryNeed, load_budget, share_out
from jaxshard.rules import read_rules
from jaxshard.saver import save
from jaxshard.storage.readers import SourceFiles
from jaxshard.storage.resources import LEAST_BYTES, Counts

P = PartitionSpec


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, checkpoints.write_llama(folder, layers=4, num_files=3)


@pytest.fixture
def unseen(monkeypatch):
    """Devices whose memory the host does not see: what they hold is copied there."""
    monkeypatch.setattr("jaxshard.loader.make_arrays.adopts", lambda devices: False)
    monkeypatch.setattr("jaxshard.loader.requests.adopts", lambda devices: False)
    monkeypatch.setattr("jaxshard.loader.make_arrays.adopts", lambda devices: False)


def mesh_of(*axes: tuple[str, int]) -> Mesh:
    sizes, names = tuple(n for _, n in axes), tuple(a for a, _ in axes)
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(axes))


def check(arrays: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    """Every shard equals what NumPy says it is, bit by bit."""
    assert set(arrays) == set(expected)
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype, name
        for shard in array.addressable_shards:
            stored = expected[name][shard.index]
            assert np.asarray(shard.data).tobytes() == stored.tobytes(), (name, shard.device)


# --- targets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy", ["dp2mp4", "mp8", "dp8", "dp2mp2optall", "pp2mp2dp2", "pp4mp2"]
)
def test_a_strategy_puts_every_tensor_where_its_family_wants_it(llama, strategy):
    folder, expected = llama
    arrays = load(folder, strategy)
    check(arrays, expected)
    layout = lay_out_for(open_checkpoint(folder), Strategy.parse(strategy))
    for name, array in arrays.items():
        assert array.sharding == devices.sharding(layout.placements[name]), name


def test_stages_lie_on_meshes_of_their_own(llama):
    folder, _ = llama
    arrays = load(folder, "pp2mp4")
    first, last = (set(m.devices.flat) for m in devices.stage_meshes(Strategy(pp=2, mp=4)))
    assert arrays["model.layers.0.self_attn.q_proj.weight"].sharding.device_set == first
    assert arrays["model.layers.3.self_attn.q_proj.weight"].sharding.device_set == last
    assert not first & last


def test_a_tied_embedding_is_one_array_in_both_stages(tmp_path):
    expected = checkpoints.write_llama(tmp_path, tied=True)
    arrays = load(tmp_path, "pp2mp2dp2")
    check(arrays, expected)
    assert len(arrays["model.embed_tokens.weight"].sharding.device_set) == 8


def test_a_mesh_is_used_as_it_is_whatever_its_axes_are_called(llama):
    folder, expected = llama
    mesh = mesh_of(("data", 2), ("model", 4))
    arrays = load(folder, mesh)
    check(arrays, expected)
    spec = {name: (array.sharding.mesh, array.sharding.spec) for name, array in arrays.items()}
    assert spec["model.layers.0.self_attn.q_proj.weight"] == (mesh, P("model"))
    assert spec["model.layers.0.self_attn.o_proj.weight"] == (mesh, P(None, "model"))


def test_a_mesh_axis_that_the_rules_do_not_know_is_refused(llama):
    with pytest.raises(LayoutError, match="'rows' of the mesh"):
        load(llama[0], mesh_of(("rows", 8)))


def test_rules_of_ones_own_go_first(llama):
    folder, expected = llama
    rules = read_rules('[specs]\n"*.q_proj.weight" = "-,mp"\n')
    arrays = load(folder, "mp8", rules=rules)
    check(arrays, expected)
    assert arrays["model.layers.0.self_attn.q_proj.weight"].sharding.spec == P(None, "mp")


def test_rules_of_ones_own_go_with_a_mesh_of_ones_own(llama):
    folder, expected = llama
    mesh = mesh_of(("data", 2), ("model", 4))
    rules = read_rules('[specs]\n"*.q_proj.weight" = "-,mp"\n"*norm.weight" = "mp"\n')
    arrays = load(folder, mesh, rules=rules)
    check(arrays, expected)
    assert arrays["model.layers.0.self_attn.q_proj.weight"].sharding == NamedSharding(
        mesh, P(None, "model")
    )
    assert arrays["model.norm.weight"].sharding == NamedSharding(mesh, P("model"))


def test_a_mapping_of_names_to_specs_is_a_target(llama):
    folder, expected = llama
    mesh = mesh_of(("a", 4), ("b", 2))
    specs = {n: P("b") if "norm" in n else P("a", "b") for n in expected}
    arrays = load(folder, specs, devices=mesh)
    check(arrays, expected)
    assert {n: a.sharding for n, a in arrays.items()} == {
        n: NamedSharding(mesh, spec) for n, spec in specs.items()
    }


def test_a_function_of_the_name_is_a_target(llama):
    folder, expected = llama
    mesh = mesh_of(("a", 4), ("b", 2))
    arrays = load(folder, lambda name: P("b") if "norm" in name else P("a", "b"), devices=mesh)
    check(arrays, expected)
    assert arrays["model.norm.weight"].sharding == NamedSharding(mesh, P("b"))


def test_specs_are_about_the_mesh_in_use(llama):
    folder, expected = llama
    with jax.set_mesh(mesh_of(("a", 8))):
        arrays = load(folder, lambda name: P("a"))
    check(arrays, expected)


def test_specs_without_a_mesh_are_refused(llama):
    with pytest.raises(LayoutError, match="needs a mesh"):
        load(llama[0], lambda name: P("a"))


@pytest.mark.parametrize("kind", ["device", "sharding"])
def test_one_device_takes_everything(llama, kind):
    folder, expected = llama
    device = jax.devices()[3]
    arrays = load(folder, device if kind == "device" else SingleDeviceSharding(device))
    check(arrays, expected)
    assert all(array.devices() == {device} for array in arrays.values())


def test_strategy_files_are_a_target(llama, tmp_path):
    folder, expected = llama
    save(load(folder, "dp1mp4"), tmp_path / "ranks", format="ranks")
    arrays = load(folder, tmp_path / "ranks" / "strategy")
    check(arrays, expected)
    assert arrays["lm_head.weight"].sharding.shard_shape((32, 16)) == (8, 16)


def test_a_tree_is_filled_and_keeps_its_shape(tmp_path):
    expected = {"layers.0.w": np.arange(32, dtype=np.float32).reshape(8, 4), "b": np.ones(4, "f4")}
    checkpoints.write_folder(tmp_path, expected)
    mesh = mesh_of(("mp", 4))
    tree = {
        "layers": [
            {"w": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=NamedSharding(mesh, P("mp")))}
        ],
        "b": NamedSharding(mesh, P()),
        "activation": jax.nn.relu,
    }
    filled = load(tmp_path, tree)
    assert filled["activation"] is jax.nn.relu
    check({"layers.0.w": filled["layers"][0]["w"], "b": filled["b"]}, expected)


def test_leaves_find_their_tensors_by_a_function(tmp_path):
    checkpoints.write_folder(tmp_path, {"model.w.weight": np.ones((4, 4), np.float32)})
    here = SingleDeviceSharding(jax.devices()[0])
    tree = {"params": {"w": {"kernel": here}}}
    filled = load(
        tmp_path,
        tree,
        name_of=lambda p: f"model.{p.removeprefix('params.').removesuffix('.kernel')}.weight",
    )
    assert filled["params"]["w"]["kernel"].shape == (4, 4)


def test_two_leaves_of_one_tensor_are_two_arrays_read_once(tmp_path):
    checkpoints.write_folder(tmp_path, {"embed": np.ones((64, 8), np.float32)})
    here = NamedSharding(mesh_of(("mp", 8)), P("mp"))
    counts: list[Counts] = []
    filled = load(
        tmp_path, {"in": here, "out": here}, name_of=lambda p: "embed", counted=counts.append
    )
    assert counts[0].bytes_read == 64 * 8 * 4
    assert filled["in"] is not filled["out"]
    jax.block_until_ready(jax.jit(lambda t: t, donate_argnums=0)(filled))  # no buffer twice


def test_flax_and_equinox_trees_are_filled(tmp_path):
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")
    here = SingleDeviceSharding(jax.devices()[1])
    expected = {
        "kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "bias": np.arange(3, dtype=np.float32),
    }
    checkpoints.write_folder(tmp_path / "nnx", expected)
    abstract = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    _, state = nnx.split(abstract, nnx.Param)
    filled = load(tmp_path / "nnx", _placed(state, here))
    assert np.array_equal(filled["kernel"].get_value(), expected["kernel"])
    checkpoints.write_folder(
        tmp_path / "eqx",
        {"layers.0.weight": expected["kernel"].T.copy(), "layers.0.bias": expected["bias"]},
    )
    model = eqx.filter_eval_shape(lambda: eqx.nn.MLP(2, 3, 4, 0, key=jax.random.PRNGKey(0)))
    made = load(tmp_path / "eqx", _placed(model, here))
    assert np.allclose(made(np.ones(2, np.float32)), expected["kernel"].sum(0) + expected["bias"])


def _placed(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            if isinstance(leaf, jax.ShapeDtypeStruct)
            else leaf
        ),
        tree,
    )


def test_linen_boxes_are_filled(tmp_path):
    nn = pytest.importorskip("flax.linen", reason="flax is not installed")
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    checkpoints.write_folder(tmp_path, {"params.kernel": expected, "params.bias": np.ones(3, "f4")})
    init = nn.with_partitioning(nn.initializers.ones, (None, "mp"))
    variables = jax.eval_shape(
        nn.Dense(3, kernel_init=init).init, jax.random.PRNGKey(0), np.ones((1, 2), np.float32)
    )
    filled = load(tmp_path, _placed(variables, SingleDeviceSharding(jax.devices()[0])))
    assert np.array_equal(filled["params"]["kernel"].value, expected)


_AXES = ("a", "b", "c")


@given(
    st.tuples(*[st.integers(0, 3)] * 3),
    st.permutations(_AXES),
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
    st.sampled_from(["float32", "bfloat16", "int8", "float64"]),
)
def test_any_sharding_of_any_shape_is_what_numpy_cuts(tmp_path_factory, sizes, order, dims, dtype):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), _AXES, axis_types=(AxisType.Auto,) * 3)
    spec: list[tuple[str, ...]] = [(), (), ()]
    for axis, dim in zip(order, dims, strict=True):
        if dim < 3:
            spec[dim] = (*spec[dim], axis)
    shape = tuple(n * 2 ** len(axes) for n, axes in zip(sizes, spec, strict=True))
    values = np.random.default_rng(0).integers(0, 100, shape).astype(np.dtype(dtype))
    folder = tmp_path_factory.mktemp("any")
    checkpoints.write_folder(folder, {"x": values})
    arrays = load(folder, {"x": NamedSharding(mesh, P(*(a or None for a in spec)))})
    check(arrays, {"x": values})


# --- sources ----------------------------------------------------------------------------


@pytest.mark.parametrize("remove_redundancy", [False, True])
def test_files_of_another_strategys_ranks_are_loaded_without_merging(
    llama, tmp_path, remove_redundancy
):
    folder, expected = llama
    there = tmp_path / "ranks"
    save(load(folder, "pp2mp2dp2"), there, format="ranks", remove_redundancy=remove_redundancy)
    counts: list[Counts] = []
    arrays = load(there, "dp2mp4", rules=None, counted=counts.append)
    check(arrays, expected)
    assert counts[0].bytes_read == sum(a.nbytes for a in expected.values())


def test_a_rank_that_is_missing_is_named_with_what_it_held(llama, tmp_path):
    save(load(llama[0], "mp4"), tmp_path / "ranks", format="ranks")
    (tmp_path / "ranks" / "rank_2" / "checkpoint_rank_2-1_1.safetensors").unlink()
    with pytest.raises(CoverageError, match=r"weight"):
        load(tmp_path / "ranks", "mp2")


# --- bytes, memory and life -------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["dp2mp4", "mp8", "pp2mp2dp2"])
def test_every_distinct_byte_is_read_once(llama, strategy):
    folder, expected = llama
    counts: list[Counts] = []
    load(folder, strategy, counted=counts.append)
    distinct = sum(a.nbytes for a in expected.values())
    assert counts[0].bytes_needed == counts[0].bytes_read == distinct


def test_replicas_share_the_memory_that_was_read_into(llama):
    arrays = load(llama[0], "dp2mp4")
    shards = arrays["model.layers.0.mlp.down_proj.weight"].addressable_shards
    by_box: dict[str, set[int]] = {}
    for shard in shards:
        by_box.setdefault(str(shard.index), set()).add(shard.data.unsafe_buffer_pointer())
    assert [len(pointers) for pointers in by_box.values()] == [1, 1, 1, 1]


def test_memory_is_aligned_as_the_backend_wants_it():
    assert all(is_aligned(aligned_empty(n)) for n in (1, 63, 64, 4097))
    assert not is_aligned(aligned_empty(65)[1:])  # the twin


def test_arrays_outlive_the_files(tmp_path):
    expected = checkpoints.write_llama(tmp_path)
    arrays = load(tmp_path, "dp2mp4")
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)
        path.unlink()
    check(arrays, expected)


def test_a_loaded_tree_is_donated_and_then_updated_in_place(llama):
    folder, expected = llama
    tree = load(folder, "mp8")
    step = jax.jit(lambda t: jax.tree.map(lambda x: -x, t), donate_argnums=0)
    once = jax.block_until_ready(step(tree))  # a donation warning would be an error
    assert all(array.is_deleted() for array in tree.values())
    check(once, {name: -array for name, array in expected.items()})
    where = {n: _pointers(a) for n, a in once.items()}
    twice = jax.block_until_ready(step(once))
    assert {n: _pointers(a) for n, a in twice.items()} == where
    check(twice, expected)


def test_a_tree_that_owns_its_memory_is_updated_in_place_by_the_first_step(llama):
    folder, expected = llama
    tree = load(folder, "dp2mp4", copy=True)
    check(tree, expected)
    where = {n: _pointers(a) for n, a in tree.items()}
    together = [p for pointers in where.values() for p in pointers]
    assert len(set(together)) == len(together)  # replicas too have memory of their own
    step = jax.jit(lambda t: jax.tree.map(lambda x: -x, t), donate_argnums=0)
    once = jax.block_until_ready(step(tree))
    assert {n: _pointers(a) for n, a in once.items()} == where
    check(once, {name: -array for name, array in expected.items()})


def test_memory_of_ones_own_and_that_of_the_file_exclude_each_other(llama):
    with pytest.raises(LayoutError, match="Pass only one"):
        load(llama[0], "mp2", mmap=True, copy=True)


def _pointers(array: jax.Array) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def test_donating_one_replica_leaves_its_twin_alone(llama):
    tree = load(llama[0], "dp8")
    name = "model.norm.weight"
    kept = [np.array(s.data) for s in tree[name].addressable_shards]
    out = jax.jit(lambda x: x + x, donate_argnums=0)(tree[name])
    assert all(
        np.array_equal(s.data, 2 * k) for s, k in zip(out.addressable_shards, kept, strict=True)
    )


@pytest.mark.parametrize("strategy", ["dp2mp4", "mp8"])
def test_mapped_files_give_the_same_arrays(llama, tmp_path, strategy):
    folder, expected = llama
    save(load(folder, "mp2"), tmp_path / "aligned", extras=folder)
    counts: list[Counts] = []
    arrays = load(tmp_path / "aligned", strategy, mmap=True, counted=counts.append)
    check(arrays, expected)
    assert counts[0].bytes_read < sum(a.nbytes for a in expected.values()) / 2


def test_mapped_tensors_lie_in_the_file_until_it_is_replaced(tmp_path):
    there = tmp_path / "aligned"
    save({"x": np.arange(1024, dtype=np.float32)}, there)
    here = {"x": SingleDeviceSharding(jax.devices()[0])}
    mapped, copied = load(there, here, mmap=True)["x"], load(there, here)["x"]
    path = there / "model.safetensors"
    with open(path, "r+b") as file:  # in place: what the documentation warns of
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(-1).tobytes())
    assert (float(mapped[-1]), float(copied[-1])) == (-1, 1023)


@pytest.mark.parametrize("in_flight", [1, 1 << 30])
def test_staging_through_the_host_gives_the_same_arrays(llama, monkeypatch, unseen, in_flight):
    folder, expected = llama
    budget = load_budget(64 << 20, workers=4)
    monkeypatch.setattr("jaxshard.loader.share_out", lambda *_: (budget, in_flight))
    check(load(folder, "dp2mp4"), expected)


# --- dtypes -----------------------------------------------------------------------------


def test_floats_are_cast_on_the_way_and_nothing_else_is(tmp_path):
    values = {
        "w": np.linspace(-3, 3, 4096, dtype=np.float32).reshape(64, 64),
        "steps": np.arange(8, dtype=np.int32),
    }
    checkpoints.write_folder(tmp_path, values)
    mesh = mesh_of(("mp", 8))
    arrays = load(
        tmp_path,
        lambda n: NamedSharding(mesh, P(None, "mp") if n == "w" else P()),
        dtype="bfloat16",
    )
    check(arrays, {"w": values["w"].astype(ml_dtypes.bfloat16), "steps": values["steps"]})


def test_a_leafs_dtype_casts_floats_and_refuses_the_rest(tmp_path):
    checkpoints.write_folder(tmp_path, {"w": np.ones(8, np.float32), "i": np.ones(8, np.int32)})
    here = SingleDeviceSharding(jax.devices()[0])
    half = jax.ShapeDtypeStruct((8,), np.float16, sharding=here)
    assert load(tmp_path, {"w": half, "i": here})["w"].dtype == np.float16
    with pytest.raises(LayoutError, match="i: stored as I32, requested as float16"):
        load(tmp_path, {"w": half, "i": half})


def test_64_bits_keep_their_values(tmp_path):
    values = {"i": 2**40 + np.arange(16), "f": np.float64(1) / np.arange(1, 17)}
    checkpoints.write_folder(tmp_path, values)
    arrays = load(tmp_path, NamedSharding(mesh_of(("mp", 8)), P("mp")))
    check(arrays, values)


def test_narrow_floats_are_loaded_and_four_bit_ones_unpacked(tmp_path):
    from jaxshard.core.dtypes import dtype  # noqa: PLC0415
    from jaxshard.formats.safetensors import layout_file  # noqa: PLC0415

    packed, eighths = np.arange(32, dtype=np.uint8), np.arange(64, dtype=np.uint8)
    layout = layout_file([("f4", dtype("F4"), (8, 8)), ("f8", dtype("F8_E4M3"), (8, 8))], {})
    data = {"f4": packed, "f8": eighths}
    body = b"".join(
        data[n].tobytes() for n in sorted(layout.offsets, key=layout.offsets.__getitem__)
    )
    (tmp_path / "model.safetensors").write_bytes(layout.segments[0][1] + body)
    arrays = load(tmp_path, NamedSharding(mesh_of(("mp", 8)), P("mp")))
    halves = np.stack([packed & 15, packed >> 4], -1).reshape(8, 8)
    check(
        arrays,
        {
            "f4": halves.view(ml_dtypes.float4_e2m1fn),
            "f8": eighths.view(ml_dtypes.float8_e4m3fn).reshape(8, 8),
        },
    )


def test_a_dtype_that_jax_has_not_is_refused_by_name(tmp_path):
    header = json.dumps({"f6": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"abc"
    )
    with pytest.raises(LayoutError, match=r"f6: F6_E2M3 has no JAX dtype.*exclude="):
        load(tmp_path, jax.devices()[0])


def test_a_dtype_that_the_device_lacks_is_refused_before_reading(llama, monkeypatch):
    real = jax.device_put

    def lacking(x: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(x, "dtype", None) == ml_dtypes.bfloat16:
            raise RuntimeError("bf16 is not for this chip")
        return real(x, *args, **kwargs)

    monkeypatch.setattr(jax, "device_put", lacking)
    with pytest.raises(LayoutError, match=r"does not support bfloat16.*not for this chip.*dtype="):
        load(llama[0], "mp2")


# --- refusals ---------------------------------------------------------------------------


def test_all_that_does_not_fit_is_said_in_one_report(tmp_path):
    checkpoints.write_folder(
        tmp_path, {n: np.ones((6, 4), np.float32) for n in ("a.weight", "b.weight", "extra")}
    )
    mesh = mesh_of(("mp", 4))
    rows = NamedSharding(mesh, P("mp"))
    tree = {
        "a": {"wieght": rows},
        "b": {"weight": jax.ShapeDtypeStruct((4, 6), np.float32, sharding=rows)},
        "extra": rows,
    }
    with pytest.raises(NotFoundError) as caught:
        load(tmp_path, tree)
    said = str(caught.value)
    assert "1 names of the target are not among" in said
    assert "a.wieght" in said
    assert "1 tensors of" in said
    assert "are not in the target: a.weight." in said
    assert "Did you mean a.weight?" in said
    assert "b.weight: the target has shape (4, 6), the checkpoint (6, 4)" in said
    assert "Pad it to 8" in said


def test_a_tree_need_not_be_complete_where_that_is_said(tmp_path):
    checkpoints.write_folder(tmp_path, {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)})
    here = SingleDeviceSharding(jax.devices()[0])
    filled = load(tmp_path, {"a": here, "c": here}, strict=False)
    assert filled["c"] is here
    assert filled["a"].shape == (4,)
    with pytest.raises(NotFoundError):
        load(tmp_path, {"a": here, "c": here})


def test_a_missing_head_that_is_tied_is_explained(tmp_path):
    checkpoints.write_llama(tmp_path, tied=True)
    here = SingleDeviceSharding(jax.devices()[0])
    names = [*open_checkpoint(tmp_path).tensors, "lm_head.weight"]
    with pytest.raises(NotFoundError, match="ties the head to the embedding"):
        load(tmp_path, dict.fromkeys(names, here))
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    filled = load(tmp_path, dict.fromkeys(names, here), name_of=lambda n: tied.get(n, n))
    assert np.array_equal(filled["lm_head.weight"], filled["model.embed_tokens.weight"])


@pytest.mark.parametrize("target", [{}, {"x": None}, 7, {"x": 3}])
def test_a_target_that_says_nowhere_is_refused(llama, target):
    with pytest.raises(LayoutError, match="Pass a strategy"):
        load(llama[0], target)


def test_a_leaf_without_a_sharding_is_refused_where_there_are_several_devices(tmp_path):
    checkpoints.write_folder(tmp_path, {"a": np.ones(4, np.float32)})
    tree = {"a": jax.ShapeDtypeStruct((4,), np.float32)}
    with pytest.raises(LayoutError, match=r"no sharding .* 8 devices"):
        load(tmp_path, tree)
    assert load(tmp_path, tree, devices=jax.devices()[:1])["a"].shape == (4,)


def test_too_few_devices_are_counted(llama):
    with pytest.raises(LayoutError, match="dp1mp16 needs 16 devices; there are 8"):
        load(llama[0], "mp16")


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_crash(tmp_path, monkeypatch):
    checkpoints.write_folder(tmp_path, {"x": np.zeros((1024, 1024), np.float32)})
    from jaxshard.storage import readers  # noqa: PLC0415

    real = readers.SourceFiles.read

    def shrinking(self: Any, *args: Any) -> None:
        os.truncate(tmp_path / "model.safetensors", 4096)
        real(self, *args)

    monkeypatch.setattr(readers.SourceFiles, "read", shrinking)
    with pytest.raises(FormatError, match="ends at byte 4096"):
        load(tmp_path, jax.devices()[0])


def test_a_file_that_is_rewritten_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    checkpoints.write_folder(tmp_path, {"x": np.zeros((16, 16), np.float32)})
    from jaxshard.storage import readers  # noqa: PLC0415

    real = readers.SourceFiles.read

    def rewriting(self: Any, *args: Any) -> None:
        real(self, *args)
        os.utime(tmp_path / "model.safetensors", ns=(1, 1))

    monkeypatch.setattr(readers.SourceFiles, "read", rewriting)
    with pytest.raises(FormatError, match="changed while being read"):
        load(tmp_path, jax.devices()[0])


def test_too_little_memory_is_refused_before_reading(llama, monkeypatch):
    monkeypatch.setattr("jaxshard.loader.memory_budget.available_bytes", lambda: 1000)
    monkeypatch.setattr("jaxshard.loader.carry", lambda *a, **k: pytest.fail("it began"))
    with pytest.raises(LayoutError, match=r"needs \d+ bytes of host memory.*1000 are available"):
        load(llama[0], "mp2")


def test_a_budget_that_no_thread_fits_is_refused(llama):
    with pytest.raises(LayoutError, match="too few"):
        load(llama[0], "mp2", host_bytes=1000)


def test_a_tensor_larger_than_the_budget_in_flight_is_refused_with_a_number_that_works(
    llama, unseen
):
    folder, expected = llama
    with pytest.raises(LayoutError, match="for their transfer") as caught:
        load(folder, "mp2", host_bytes=64 * 8 << 10)
    told = re.findall(r"Pass host_bytes=(\d+) or more", str(caught.value))
    check(load(folder, "mp2", host_bytes=int(told[0])), expected)
    with pytest.raises(LayoutError, match="for their transfer"):
        load(folder, "mp2", host_bytes=int(told[0]) - 1)


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
def test_what_is_in_flight_and_what_is_read_into_are_within_the_budget(workers):
    default = 256 << 20
    for largest in (1, 30 << 20, default - LEAST_BYTES):
        budget, in_flight = share_out(MemoryNeed(0, largest, 1 << 40), default, workers)
        assert in_flight is not None
        assert in_flight >= largest
        assert budget.host_bytes + in_flight <= default
    assert share_out(MemoryNeed(1 << 40, 0, 0), default, workers)[1] is None


def test_no_budget_at_all_is_not_the_default(llama):
    with pytest.raises(LayoutError, match=r"too few|not a size"):
        load(llama[0], "mp2", host_bytes=0)


def test_names_are_chosen_by_expressions(llama):
    folder, _ = llama
    arrays = load(folder, "mp2", include=["norm"], exclude=["layers.0"])
    assert arrays
    assert all("norm" in name and "layers.0" not in name for name in arrays)


def test_an_axis_that_the_mesh_lacks_is_said_with_the_tensor(tmp_path):
    checkpoints.write_llama(tmp_path / "llama")
    mesh = jax.make_mesh((2, 4), ("dp", "mp"))
    with pytest.raises(
        LayoutError, match=r"lm_head.weight: .*does not fit a mesh of .*'mp': 4.*foo"
    ):
        load(tmp_path / "llama", lambda name: PartitionSpec("foo"), devices=mesh)


@pytest.mark.parametrize("use", [load, plan])
def test_rules_are_no_path(tmp_path, use):
    checkpoints.write_llama(tmp_path / "llama")
    with pytest.raises(LayoutError, match=r"'rules.toml' is a str, expected Rules.*read_rules"):
        use(tmp_path / "llama", "mp2", rules="rules.toml")


def test_verify_reads_a_ckpt_file_once_where_checksums_json_covers_it(tmp_path, monkeypatch):
    arrays = {"w": np.arange(64, dtype=np.float32)}
    save(arrays, tmp_path / "c", format="ckpt", checksums=True, fsync=False)
    calls: list[list[int]] = []
    plain = SourceFiles.check_checksums

    def counted(self: Any, only: Any = None) -> tuple[str, ...]:
        calls.append(sorted(only))
        return plain(self, calls[-1])

    monkeypatch.setattr(SourceFiles, "check_checksums", counted)
    assert np.array_equal(load(tmp_path / "c", jax.devices()[0], verify=True)["w"], arrays["w"])
    assert calls == [[]]
    load(tmp_path / "c", jax.devices()[0])
    assert calls == [[], [0]]
