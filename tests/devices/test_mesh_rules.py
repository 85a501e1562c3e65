"""A mesh of the caller's own: its axes are found by their names, FSDP's among them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rules_models import llama, moe
from safetensors.numpy import save_file

import jaxshard as js
from jaxshard.errors import LayoutError

Axes = dict[str, int]


def folder(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    arrays = {n: random.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
    path.mkdir()
    save_file(arrays, path / "model.safetensors")
    kind = "mixtral" if any(".experts." in n for n in shapes) else "llama"
    (path / "config.json").write_text(json.dumps({"model_type": kind, "num_hidden_layers": 2}))
    return arrays


def mesh_of(axes: Axes) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes))


def splitting(mesh: jax.sharding.Mesh, array: jax.Array) -> set[str]:
    """The axes of more than one device along which neighbours hold different boxes."""
    at = array.sharding.devices_indices_map(array.shape)
    boxes = np.empty(mesh.devices.shape, object)
    for place in np.ndindex(*mesh.devices.shape):
        boxes[place] = str(at[mesh.devices[place]])
    found = set()
    for number, axis in enumerate(mesh.axis_names):
        if np.any(boxes != np.take(boxes, [0] * boxes.shape[number], number)):
            found.add(axis)
    return found


@pytest.mark.parametrize(
    ("axes", "split"),
    [
        ({"fsdp": 2, "tp": 4}, {"fsdp", "tp"}),
        ({"tp": 4, "fsdp": 2}, {"fsdp", "tp"}),
        ({"data": 1, "fsdp": 2, "tensor": 4}, {"fsdp", "tensor"}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp", "tensor"}),
        ({"fsdp": 2, "data": 2, "model": 2}, {"fsdp", "model"}),
        ({"FSDP": 8}, {"FSDP"}),
        ({"data": 2, "fsdp": 4}, {"fsdp"}),
        ({"data": 2, "model": 4}, {"model"}),
        ({"fsdp": 2, "context": 2, "tp": 2}, {"fsdp", "tp"}),
        ({"data": 2, "fsdp_transpose": 1, "sequence": 1, "fsdp": 4, "tensor": 1}, {"fsdp"}),
    ],
)
def test_weights_are_split_over_the_axes_that_split_them_and_no_others(
    tmp_path: Path, axes: Axes, split: set[str]
) -> None:
    arrays = folder(tmp_path / "a", llama(2))
    mesh = mesh_of(axes)
    made = js.load(tmp_path / "a", mesh)
    for name, array in made.items():
        assert array.sharding.mesh == mesh
        assert splitting(mesh, array) == (
            split - {"tp", "tensor", "model"} if "norm" in name else split
        )
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), arrays[name][shard.index])


def test_experts_are_split_over_fsdp_as_well(tmp_path: Path) -> None:
    arrays = folder(tmp_path / "a", moe(2, 4))
    mesh = mesh_of({"expert": 2, "fsdp": 2, "tensor": 2})
    made = js.load(tmp_path / "a", mesh)
    for name, array in made.items():
        expert = ".experts." in name
        assert len(array.sharding.device_set) == (4 if expert else 8), name
        if name.endswith("up_proj.weight"):
            assert len({str(s.index) for s in array.addressable_shards}) == 4
        np.testing.assert_array_equal(np.asarray(array), arrays[name])
    router = made["model.layers.0.mlp.gate.weight"]
    assert splitting(mesh, router) == {"fsdp"}


def test_what_does_not_divide_keeps_its_replicas_with_a_note(tmp_path: Path, caplog) -> None:
    folder(tmp_path / "a", llama(2) | {"model.layers.0.self_attn.q_norm.weight": (7,)})
    mesh = mesh_of({"fsdp": 8})
    made = js.load(tmp_path / "a", mesh)
    assert made["model.layers.0.self_attn.q_norm.weight"].sharding.is_fully_replicated
    assert "not split over fsdp=8, which does not divide dim 0: model" in caplog.text


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"zero": 2, "tp": 4}, "axis 'zero' of the mesh"),
        ({"data": 2, "replica": 2, "tp": 2}, "axis 'replica' of the mesh .* is dp like 'data'"),
    ],
)
def test_axes_that_rules_do_not_know_are_refused_without_a_guess(
    tmp_path: Path, axes: Axes, said: str
) -> None:
    folder(tmp_path / "a", llama(2))
    with pytest.raises(LayoutError, match=said) as caught:
        js.load(tmp_path / "a", mesh_of(axes))
    assert "Did you mean" not in str(caught.value)
    assert "or give a sharding for each name" in str(caught.value)


def test_blocks_that_share_a_factor_stay_together_over_fsdp(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    (tmp_path / "a").mkdir()
    random = np.random.default_rng(0)
    arrays = {}
    for layer, rows in enumerate((512, 384)):
        weight = name.replace("0", str(layer))
        arrays[weight] = random.integers(-9, 9, (rows, 128)).astype(np.int8)
        arrays[f"{weight}_scale_inv"] = random.random((rows // 128, 1), dtype=np.float32)
    save_file(arrays, tmp_path / "a" / "model.safetensors")
    mesh = mesh_of({"fsdp": 2, "data": 4})
    made = js.load(tmp_path / "a", mesh)
    assert [splitting(mesh, made[n]) for n in sorted(arrays)] == [{"fsdp"}, {"fsdp"}, set(), set()]


def test_a_rule_that_splits_over_replicas_splits_over_fsdp_too(tmp_path: Path) -> None:
    folder(tmp_path / "a", llama(2))
    mesh = mesh_of({"data": 2, "fsdp": 2, "tp": 2})
    rules = js.read_rules('[specs]\n"*up_proj.weight" = "mp,dp"')
    made = js.load(tmp_path / "a", mesh, rules=rules)
    array = made["model.layers.0.mlp.up_proj.weight"]
    assert array.sharding.spec == jax.sharding.PartitionSpec("tp", ("data", "fsdp"))
