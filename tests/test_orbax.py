"""Orbax checkpoints are read and written through Orbax, and convert like any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxshard.api import convert, verify
from jaxshard.errors import FormatError, LayoutError
from jaxshard.formats.orbax_names import item_folder, recognise
from jaxshard.loading import load
from jaxshard.opening import open_checkpoint
from jaxshard.saving import save

ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is not installed")
P = PartitionSpec


def the_tree() -> dict[str, Any]:
    mesh = jax.make_mesh((2, 4), ("dp", "mp"), axis_types=(AxisType.Auto,) * 2)
    values = np.arange(128, dtype=np.float32).reshape(8, 16)
    with jax.enable_x64(True):
        return {
            "w": jax.device_put(values, NamedSharding(mesh, P("mp", "dp"))),
            "layers": [
                {"b": jax.device_put(values[0].astype("bfloat16"), NamedSharding(mesh, P()))},
                {"b": jax.device_put(np.arange(4) + 2**40, jax.devices()[0])},
            ],
            "step": jax.device_put(np.int32(7), jax.devices()[0]),
        }


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def check(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        assert np.asarray(array).tobytes() == expected[name].tobytes(), name


def by_checkpointer(place: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as saver:
        saver.save(place, tree)
    return place


def by_manager(place: Path, tree: Any) -> Path:
    with ocp.CheckpointManager(place) as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
    return place / "3"


def by_v1(place: Path, tree: Any) -> Path:
    from orbax.checkpoint.experimental import v1  # noqa: PLC0415

    v1.save(place, tree)
    return place


@pytest.mark.parametrize("write", [by_checkpointer, by_manager, by_v1])
def test_what_orbax_wrote_is_opened_and_loaded(tmp_path, write):
    tree = the_tree()
    place = write(tmp_path / "there", tree)
    catalog = open_checkpoint(place)
    assert catalog.format == "orbax"
    expected = flat(tree)
    assert {n: t.shape for n, t in catalog.tensors.items()} == {
        n: a.shape for n, a in expected.items()
    }
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    target = {n: NamedSharding(mesh, P("x") if n == "w" else P()) for n in expected}
    found = load(catalog, target)
    check(found, expected)
    assert found["w"].sharding == target["w"]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # as a plain restore does
@pytest.mark.parametrize("nested", [False, True])
def test_orbax_reads_what_is_saved(tmp_path, nested):
    tree = the_tree() if nested else dict(flat(the_tree()))
    save(tree, tmp_path / "out", format="orbax")
    with jax.enable_x64(True), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        back = reader.restore(tmp_path / "out")
    check(flat(back), flat(tree))
    assert isinstance(back.get("layers"), list) == nested


def test_a_cast_and_a_tree_are_filled_from_orbax(tmp_path):
    tree = the_tree()
    by_checkpointer(tmp_path / "there", tree)
    here = SingleDeviceSharding(jax.devices()[5])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
    like["w"] = jax.ShapeDtypeStruct((8, 16), np.float16, sharding=here)
    found = load(tmp_path / "there", like)
    expected = flat(tree)
    check(flat(found), {**expected, "w": expected["w"].astype(np.float16)})


def test_two_leaves_may_name_one_tensor_of_orbax(tmp_path):
    by_checkpointer(tmp_path / "there", {"w": np.ones((4, 4), np.float32)})
    here = SingleDeviceSharding(jax.devices()[0])
    found = load(tmp_path / "there", {"a": here, "b": here}, name_of=lambda p: "w")
    assert np.array_equal(found["a"], found["b"])


@pytest.mark.parametrize("to", ["full", "dp1mp2pp2"])
def test_a_model_goes_from_files_to_orbax_and_back_to_files(tmp_path, to):
    checkpoints.write_llama(tmp_path / "in")
    save(
        load(tmp_path / "in", "dp2mp4"), tmp_path / "orbax", format="orbax", extras=tmp_path / "in"
    )
    assert open_checkpoint(tmp_path / "orbax").model.type == "llama"
    convert(tmp_path / "orbax", tmp_path / "out", to)
    assert not verify(tmp_path / "out", against=tmp_path / "in").problems
    if to == "full":
        assert (tmp_path / "out" / "tokenizer.json").exists()


def test_numbers_and_texts_in_the_tree_are_left_out_and_said(tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
        saver.save(tmp_path / "there", {"w": np.ones(4, np.float32), "note": "hello"})
    catalog = open_checkpoint(tmp_path / "there")
    assert list(catalog.tensors) == ["w"]
    assert "note" in catalog.notes[0]


def test_damaged_metadata_is_an_error_with_the_path(tmp_path):
    by_checkpointer(tmp_path / "there", {"w": np.ones(4, np.float32)})
    (tmp_path / "there" / "_METADATA").write_text("{")
    with pytest.raises(FormatError, match="there: Orbax finds no arrays for its metadata"):
        open_checkpoint(tmp_path / "there")


def test_missing_data_is_an_error_before_and_after_opening(tmp_path):
    by_checkpointer(tmp_path / "there", {"w": np.ones((256, 256), np.float32)})
    catalog = open_checkpoint(tmp_path / "there")
    for path in (tmp_path / "there").rglob("d/*"):
        path.unlink()
    with pytest.raises(FormatError, match="there: Orbax finds no arrays"):
        open_checkpoint(tmp_path / "there")
    with pytest.raises(FormatError, match="there: Orbax finds no arrays"):
        load(catalog, jax.devices()[0])


def test_damaged_data_is_an_error_with_the_name(tmp_path):
    values = np.random.default_rng(0).random((256, 256), np.float32)  # not to be compressed away
    by_checkpointer(tmp_path / "there", {"w": values})
    catalog = open_checkpoint(tmp_path / "there")
    largest = max((tmp_path / "there").rglob("d/*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(b"\0" * largest.stat().st_size)
    with pytest.raises(FormatError, match="Orbax cannot read w"):
        load(catalog, jax.devices()[0])
    with pytest.raises(FormatError, match="Orbax cannot read w"):
        convert(catalog, tmp_path / "out")


def test_several_steps_are_not_one_checkpoint():
    steps = ["1/default/_METADATA", "2/default/_METADATA"]
    assert recognise(steps)
    with pytest.raises(FormatError, match="2 items or steps"):
        item_folder(steps)
    assert not recognise(["model.safetensors", "a/b/c/_METADATA"])


def test_an_existing_checkpoint_is_refused_like_any_other(tmp_path):
    save({"w": np.ones(4, np.float32)}, tmp_path / "out", format="orbax")
    with pytest.raises(LayoutError, match="exists"):
        save({"w": np.ones(4, np.float32)}, tmp_path / "out", format="orbax")
    save({"v": np.ones(4, np.float32)}, tmp_path / "out", format="orbax", overwrite=True)
    assert list(open_checkpoint(tmp_path / "out").tensors) == ["v"]


def test_orbax_is_imported_only_when_it_is_needed():
    program = (
        "import sys, jaxshard.loading, jaxshard.saving, jaxshard.opening; "
        "print([m for m in sys.modules if m.startswith('orbax')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
