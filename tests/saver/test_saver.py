"""Saving: arrays with any sharding become files that other programs read as those arrays."""

from __future__ import annotations

import json
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

from jaxshard.api import convert, verify
from jaxshard.conversion.open import open_checkpoint
from jaxshard.devices.host_shards import HostShards
from jaxshard.devices.host_transfer import ChunkBudget
from jaxshard.errors import LayoutError, StorageError
from jaxshard.loader import load
from jaxshard.saver import save
from jaxshard.storage.resources import fit_budget
from jaxshard.storage.transaction import Transaction
from jaxshard.storage.writers import OutputFiles

P = PartitionSpec
_AXES = ("a", "b", "c")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, checkpoints.write_llama(folder, layers=4, num_files=2)


def the_bytes(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (_, _, data) in checkpoints.stored(folder).items()}


def expected_bytes(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


# --- formats ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["dp2mp4", "mp8", "dp8", "pp2mp2dp2", "dp2mp2optall"])
def test_a_sharded_tree_becomes_a_hugging_face_folder(llama, tmp_path, strategy):
    folder, arrays = llama
    report = save(load(folder, strategy), tmp_path / "out", max_shard_size="4KB", extras=folder)
    assert the_bytes(tmp_path / "out") == expected_bytes(arrays)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(arrays)
    assert len(set(index["weight_map"].values())) == report.num_files > 2
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_each_distinct_byte_is_written_once(llama, tmp_path):
    folder, arrays = llama
    report = save(load(folder, "dp2mp4"), tmp_path / "out")
    distinct = sum(array.nbytes for array in arrays.values())
    assert (report.counts.bytes_read, report.counts.bytes_written) == (distinct, distinct)


@pytest.mark.parametrize("remove_redundancy", [False, True])
@pytest.mark.parametrize("strategy", ["dp2mp4", "pp2mp2dp2"])
def test_ranks_are_saved_as_the_arrays_lie(llama, tmp_path, strategy, remove_redundancy):
    folder, arrays = llama
    there = tmp_path / "out"
    tree = load(folder, strategy)
    report = save(tree, there, format="ranks", remove_redundancy=remove_redundancy)
    assert report.num_files == 8
    assert not verify(there, against=folder).problems
    sizes = [f.stat().st_size for f in there.glob("rank_*/*.safetensors")]
    copies = sum(the_size(open_checkpoint(there))) / sum(a.nbytes for a in arrays.values())
    assert copies == 1 if remove_redundancy else copies > 1.5
    assert max(sizes) < 2 * min(sizes)
    again = load(there, strategy)
    for name, array in again.items():
        assert array.sharding == tree[name].sharding, name


def the_size(catalog: Any) -> list[int]:
    return [p.box.size * t.dtype.bits // 8 for t in catalog.tensors.values() for p in t.shards]


def test_ranks_may_be_of_another_strategy_than_the_arrays(llama, tmp_path):
    folder, arrays = llama
    save(load(folder, "dp2mp4"), tmp_path / "out", format="ranks", strategy="mp2pp2")
    assert len(list((tmp_path / "out").glob("rank_*/*.safetensors"))) == 4
    assert not verify(tmp_path / "out", against=folder).problems
    back = load(tmp_path / "out", "mp8")
    assert {n: np.asarray(a).tobytes() for n, a in back.items()} == expected_bytes(arrays)


@pytest.mark.parametrize("format", ["ckpt", "unified"])
def test_mindspores_files_are_written_too(llama, tmp_path, format):
    folder, _ = llama
    save(load(folder, "dp2mp4"), tmp_path / "out", format=format)
    assert not verify(tmp_path / "out", against=folder).problems


def test_transformers_reads_what_is_saved(tmp_path):
    if not checkpoints.HAVE_TRANSFORMERS:
        pytest.skip("transformers or torch is not installed")
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    model = checkpoints.save_model("llama_gqa", tmp_path / "in")
    save(
        load(tmp_path / "in", "dp2mp4"),
        tmp_path / "out",
        extras=tmp_path / "in",
        max_shard_size="20KB",
    )
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ours, theirs = again.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- trees and shardings ----------------------------------------------------------------


@given(
    st.tuples(*[st.integers(0, 3)] * 3),
    st.permutations(_AXES),
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
    st.sampled_from(["float32", "bfloat16", "bool", "float64"]),
)
def test_any_sharding_is_saved_as_the_whole_array(tmp_path_factory, sizes, order, dims, dtype):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), _AXES, axis_types=(AxisType.Auto,) * 3)
    spec: list[tuple[str, ...]] = [(), (), ()]
    for axis, dim in zip(order, dims, strict=True):
        if dim < 3:
            spec[dim] = (*spec[dim], axis)
    shape = tuple(n * 2 ** len(axes) for n, axes in zip(sizes, spec, strict=True))
    values = np.random.default_rng(0).integers(0, 100, shape).astype(np.dtype(dtype))
    with jax.enable_x64(True):
        array = jax.device_put(values, NamedSharding(mesh, P(*(a or None for a in spec))))
    place = tmp_path_factory.mktemp("any") / "out"
    save({"x": array}, place, fsync=False)
    assert the_bytes(place) == {"x": values.tobytes()}


def test_a_trees_paths_are_the_names(tmp_path):
    tree = {"layers": [{"w": np.ones((2, 2), np.float32)}], "f": jax.nn.relu}
    report = save(tree, tmp_path / "out")
    assert set(the_bytes(tmp_path / "out")) == {"layers.0.w"}
    assert report.notes == ("1 leaves are not arrays and are not saved: f.",)
    save(tree, tmp_path / "renamed", name_of=lambda path: f"model.{path}")
    assert set(the_bytes(tmp_path / "renamed")) == {"model.layers.0.w"}


def test_arrays_of_a_mesh_and_of_one_device_and_of_numpy_go_together(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("mp",))
    values = {n: np.arange(16, dtype=np.float32) + i for i, n in enumerate("abc")}
    tree = {
        "a": jax.device_put(values["a"], NamedSharding(mesh, P("mp"))),
        "b": jax.device_put(values["b"], jax.devices()[2]),
        "c": values["c"][::1],
    }
    save(tree, tmp_path / "out")
    assert the_bytes(tmp_path / "out") == expected_bytes(values)
    save(tree, tmp_path / "ranks", format="ranks")
    check = load(tmp_path / "ranks", SingleDeviceSharding(jax.devices()[0]))
    assert {n: np.asarray(a).tobytes() for n, a in check.items()} == expected_bytes(values)


def test_numpys_numbers_are_arrays_without_dims(tmp_path):
    save({"step": np.int64(7), "rate": np.float32(0.5), "plain": 3}, tmp_path / "out")
    assert the_bytes(tmp_path / "out") == expected_bytes(
        {"step": np.array(7), "rate": np.array(0.5, np.float32)}
    )


def test_strided_numpy_arrays_are_saved_as_they_look(tmp_path):
    whole = np.arange(64, dtype=np.float32).reshape(8, 8)
    save({"t": whole.T, "s": whole[::2, 1::3]}, tmp_path / "out")
    assert the_bytes(tmp_path / "out") == {
        "t": whole.T.tobytes(),
        "s": whole[::2, 1::3].tobytes(),
    }


def test_four_bit_floats_are_packed_and_come_back(tmp_path):
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) & 15
    array = values.view(ml_dtypes.float4_e2m1fn)
    save({"f4": array}, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tensors["f4"].num_bytes == 32
    back = load(tmp_path / "out", NamedSharding(Mesh(np.array(jax.devices()[:4]), "m"), P("m")))
    assert np.asarray(back["f4"]).view(np.uint8).tolist() == values.tolist()


def test_an_array_can_be_donated_after_it_was_saved(tmp_path):
    x = jax.jit(lambda: jax.numpy.ones((1024,)))()
    save({"x": x}, tmp_path / "out")
    where = x.unsafe_buffer_pointer()
    y = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert y.unsafe_buffer_pointer() == where


# --- from devices that the host does not see -----------------------------------------------


@pytest.mark.parametrize(
    "room", [ChunkBudget(1, 64), ChunkBudget(16, 64), ChunkBudget(1, 1 << 20), ChunkBudget()]
)
def test_parts_come_from_devices_that_the_host_does_not_see(llama, tmp_path, monkeypatch, room):
    folder, arrays = llama
    monkeypatch.setattr("jaxshard.devices.host_shards.is_on_host", lambda shard: False)
    monkeypatch.setattr("jaxshard.saver.share_out", lambda *_: (fit_budget(64 << 20, 2), room))
    save(load(folder, "dp2mp4"), tmp_path / "out")
    assert the_bytes(tmp_path / "out") == expected_bytes(arrays)


def test_a_budget_too_small_for_one_thread_is_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxshard.devices.host_shards.is_on_host", lambda shard: False)
    with pytest.raises(LayoutError, match="Pass host_bytes=1048576 or more"):
        save(load(llama[0], "dp2mp4"), tmp_path / "out", host_bytes=1024)


@pytest.mark.parametrize("host_bytes", [0, 1])
def test_no_budget_at_all_is_not_the_default(tmp_path, host_bytes):
    with pytest.raises(LayoutError, match=r"too few|not a size"):
        save({"x": np.ones(4, np.float32)}, tmp_path / "out", host_bytes=host_bytes)


# --- committing and refusals ----------------------------------------------------------------


def test_an_existing_result_is_kept_unless_it_may_be_replaced(tmp_path):
    save({"x": np.zeros(4, np.float32)}, tmp_path / "out")
    with pytest.raises(LayoutError, match="exists"):
        save({"x": np.ones(4, np.float32)}, tmp_path / "out")
    assert the_bytes(tmp_path / "out") == {"x": bytes(16)}
    save({"y": np.ones(4, np.float32)}, tmp_path / "out", overwrite=True)
    assert set(the_bytes(tmp_path / "out")) == {"y"}


@pytest.mark.parametrize("format", ["huggingface", "orbax"])
def test_a_failed_save_leaves_nothing_and_does_not_stand_in_the_way(tmp_path, monkeypatch, format):
    def full(*args: Any) -> int:
        raise StorageError("the disk is full")

    save({"x": np.zeros(4, np.float32)}, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(OutputFiles, "write", full)
        patched.setattr("jaxshard.formats.orbax.write", full)
        with pytest.raises(StorageError):
            save({"x": np.ones(4, np.float32)}, tmp_path / "out", overwrite=True, format=format)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert the_bytes(tmp_path / "out") == {"x": bytes(16)}
    save({"x": np.ones(4, np.float32)}, tmp_path / "out", overwrite=True, format=format)


@pytest.mark.parametrize("again", ["save", "convert"])
def test_what_a_killed_save_left_behind_is_cleared_away(llama, tmp_path, monkeypatch, again):
    left = tmp_path / ".out.partial"
    with monkeypatch.context() as patched:
        patched.setattr(
            "jaxshard.storage.transaction.Transaction.abandon", lambda self: self._release()
        )
        patched.setattr("jaxshard.saver.publish.Publication._add_files", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save({"old": np.zeros(4, np.float32)}, tmp_path / "out")
    assert (left / "finished").exists()
    if again == "save":
        save({"x": np.zeros(4, np.float32)}, tmp_path / "out")
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.safetensors"]
    else:
        convert(llama[0], tmp_path / "out", "mp2")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_conversion_left_behind_is_not_touched(tmp_path):
    left = tmp_path / ".out.partial"
    conversion = Transaction(tmp_path / "out", "a conversion")
    (conversion.files / "a").write_bytes(b"finished")
    conversion.finish("a", 8)
    conversion.abandon()
    before = checkpoints.files_of(left)
    with pytest.raises(LayoutError, match=r"interrupted conversion left .* Finish that"):
        save({"x": np.zeros(4, np.float32)}, tmp_path / "out")
    assert checkpoints.files_of(left) == before


def test_the_checkpoint_that_extras_come_from_is_not_replaced(llama, tmp_path):
    folder = tmp_path / "in"
    checkpoints.write_llama(folder)
    with pytest.raises(LayoutError, match="the source of extras="):
        save(load(folder, "mp2"), folder, extras=folder, overwrite=True)
    load(folder, "mp2")


def test_a_config_of_ones_own_goes_before_the_one_carried_along(llama, tmp_path):
    folder, _ = llama
    save(load(folder, "mp2"), tmp_path / "out", extras=folder, config={"model_type": "mistral"})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "mistral"}


@pytest.mark.parametrize(
    ("tree", "how", "said"),
    [
        ({}, {}, "no arrays"),
        ({"f": jax.nn.relu}, {}, "no arrays"),
        ({"x": np.ones(3, np.complex128)}, {}, "x: files have no dtype for complex128"),
        ({"x": np.ones(3, ml_dtypes.int4)}, {}, "x: files have no dtype for int4"),
        ({"x": jax.ShapeDtypeStruct((2,), np.float32)}, {}, "has no values to save"),
        ({"x": np.ones(2)}, {"format": "safetensor"}, "no such format .expected one of ranks"),
        ({"x": np.ones(2)}, {"strategy": "mp2"}, "expected one of ranks"),
        ({"x": np.ones(2)}, {"max_shard_size": "many"}, "is not a size"),
        ({"a.b": np.ones(2), "a": {"b": np.ones(2)}}, {}, "several leaves"),
        ({"a": np.ones(2), "b": np.ones(2)}, {"name_of": lambda p: "x"}, "duplicate tensor name x"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, tree, how, said):
    with pytest.raises(LayoutError, match=said):
        save(tree, tmp_path / "out", **how)
    assert not list(tmp_path.iterdir())


def test_a_donated_array_is_refused_by_name(tmp_path):
    x = jax.numpy.ones(8)
    x.delete()
    with pytest.raises(LayoutError, match="x: the array was donated or deleted"):
        save({"x": x}, tmp_path / "out")


def test_a_shard_held_twice_is_catalogued_once():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("dp", "mp"))
    array = jax.device_put(np.zeros((8, 8), np.float32), NamedSharding(mesh, P("mp")))
    assert len(HostShards({"x": array}).catalog["x"].shards) == 4


@pytest.mark.parametrize("name", ["out.safetensors", "out.ckpt"])
def test_no_folder_gets_the_name_of_a_weight_file(tmp_path, name):
    with pytest.raises(LayoutError, match=f"{name} names one file, and save writes a directory"):
        save({"x": np.ones(4, np.float32)}, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [[1], {"a": object()}])
def test_an_invalid_config_is_refused_before_any_write(tmp_path, config):
    with pytest.raises(LayoutError, match=r"must be an object for config\.json"):
        save({"w": jax.device_put(np.ones(2))}, tmp_path / "out", config=config)
    assert not list(tmp_path.iterdir())


def test_random_keys_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(LayoutError, match=r"keys of a random generator.*key_data"):
        save({"k": jax.random.key(0)}, tmp_path / "out")
