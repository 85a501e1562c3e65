"""A mesh of the caller's own: its axes are found by their names, FSDP's among them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from rules_models import llama, moe
from safetensors.numpy import load_file, save_file

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
    assert "not split over fsdp, which divides no dim: 1 tensor: model" in caplog.text
    assert "q_norm.weight (7,) over fsdp=8" in caplog.text


def test_axes_that_rules_do_not_know_are_refused_without_a_guess(tmp_path: Path) -> None:
    folder(tmp_path / "a", llama(2))
    with pytest.raises(LayoutError, match="axis 'zero' of the mesh") as caught:
        js.load(tmp_path / "a", mesh_of({"zero": 2, "tp": 4}))
    assert "Did you mean" not in str(caught.value)
    assert "replicas (dp, data, replica" in str(caught.value)
    assert "or give a sharding for each name" in str(caught.value)


def test_blocks_that_share_a_factor_stay_together_over_fsdp(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    (tmp_path / "a").mkdir()
    random = np.random.default_rng(0)
    arrays = {}
    for layer, rows in enumerate((512, 384)):
        weight = name.replace("0", str(layer))
        arrays[weight] = random.integers(-9, 9, (rows, 192)).astype(np.int8)
        arrays[f"{weight}_scale_inv"] = random.random((rows // 128, 2), dtype=np.float32)
    save_file(arrays, tmp_path / "a" / "model.safetensors")
    mesh = mesh_of({"fsdp": 2, "data": 4})
    made = js.load(tmp_path / "a", mesh)
    # 1.5 blocks of columns do not divide, nor do 3 blocks of rows; 4 blocks of rows do
    assert [splitting(mesh, made[n]) for n in sorted(arrays)] == [{"fsdp"}, {"fsdp"}, set(), set()]
    assert made[name].sharding.spec == P("fsdp")


def test_a_rule_that_splits_over_replicas_splits_over_fsdp_too(tmp_path: Path) -> None:
    folder(tmp_path / "a", llama(2))
    mesh = mesh_of({"data": 2, "fsdp": 2, "tp": 2})
    rules = js.read_rules('[specs]\n"*up_proj.weight" = "mp,dp"')
    made = js.load(tmp_path / "a", mesh, rules=rules)
    array = made["model.layers.0.mlp.up_proj.weight"]
    assert array.sharding.spec == jax.sharding.PartitionSpec("tp", ("data", "fsdp"))


# --- What JAX itself makes of the same specs

Q, EMBED, DOWN, NORM = "q_proj.weight", "embed_tokens.weight", "down_proj.weight", "norm.weight"


def is_as_jax_places(made: jax.Array, value: np.ndarray, mesh: jax.sharding.Mesh, spec: P) -> None:
    wanted = jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))
    for ours, theirs in zip(made.addressable_shards, wanted.addressable_shards, strict=True):
        assert (ours.device, ours.index) == (theirs.device, theirs.index)
        assert np.asarray(ours.data).tobytes() == np.asarray(theirs.data).tobytes()


@pytest.mark.parametrize(
    ("axes", "specs"),
    [
        ({"fsdp": 4, "tp": 2}, {Q: P("tp", "fsdp"), DOWN: P("fsdp", "tp"), NORM: P("fsdp")}),
        ({"tensor": 2, "data": 4}, {Q: P("tensor"), DOWN: P(None, "tensor"), NORM: P()}),
        ({"replica": 2, "data": 2, "model": 2}, {Q: P("model"), EMBED: P("model"), NORM: P()}),
        (
            {"fsdp": 2, "tensor_transpose": 2, "tensor": 2},
            {
                Q: P(("tensor_transpose", "tensor"), "fsdp"),
                DOWN: P("fsdp", ("tensor_transpose", "tensor")),
            },
        ),
        (
            {"fsdp_transpose": 2, "fsdp": 4},
            {Q: P(None, ("fsdp_transpose", "fsdp")), NORM: P(("fsdp_transpose", "fsdp"))},
        ),
        (
            {"fsdp": 8},
            {"up_proj.weight": P(None, "fsdp"), EMBED: P(None, "fsdp"), DOWN: P("fsdp")},
        ),
        ({"context": 2, "sequence": 2, "autoregressive": 2}, {Q: P(), DOWN: P(), NORM: P()}),
        ({"data": 2, "sp": 2, "mp": 2}, {Q: P("mp"), DOWN: P(None, "mp"), NORM: P()}),
    ],
)
def test_a_mesh_of_usual_names_loads_what_jax_places(
    tmp_path: Path, axes: Axes, specs: dict[str, P]
) -> None:
    arrays = folder(tmp_path / "a", llama(2))
    mesh = mesh_of(axes)
    counts = []
    made = js.load(tmp_path / "a", mesh, counted=counts.append)
    checked = 0
    for name, array in made.items():
        for end, spec in specs.items():
            if name.endswith(end):
                is_as_jax_places(array, arrays[name], mesh, spec)
                checked += 1
    assert checked >= len(specs)
    assert counts[0].bytes_read == sum(a.nbytes for a in arrays.values())  # replicas once
    moved = js.reshard(jax.device_put(arrays, jax.devices()[0]), mesh)
    assert {n: a.sharding for n, a in moved.items()} == {n: a.sharding for n, a in made.items()}


def test_each_stage_of_a_mesh_is_a_sub_mesh(tmp_path: Path) -> None:
    arrays = folder(tmp_path / "a", llama(2))
    mesh = mesh_of({"fsdp": 2, "stage": 2, "tensor": 2})
    made = js.load(tmp_path / "a", mesh)
    for stage in range(2):
        part = jax.sharding.Mesh(mesh.devices[:, stage], ("fsdp", "tensor"))
        name = f"model.layers.{stage}.mlp.up_proj.weight"
        is_as_jax_places(made[name], arrays[name], part, P("tensor", "fsdp"))


def test_a_fully_sharded_strategy_is_that_mesh(tmp_path: Path) -> None:
    arrays = folder(tmp_path / "a", llama(2))
    mesh = js.mesh("fsdp4mp2")
    assert dict(mesh.shape) == {"dp": 1, "fsdp": 4, "mp": 2}
    by_mesh, made = js.load(tmp_path / "a", mesh), js.load(tmp_path / "a", "fsdp4mp2")
    moved = js.reshard(jax.device_put(arrays, jax.devices()[0]), "fsdp4mp2")
    for name, array in made.items():
        assert array.sharding == by_mesh[name].sharding == moved[name].sharding
        is_as_jax_places(array, arrays[name], mesh, array.sharding.spec)
        is_as_jax_places(moved[name], arrays[name], mesh, array.sharding.spec)


def test_rank_files_of_a_fully_sharded_strategy_hold_what_its_devices_hold(tmp_path: Path) -> None:
    arrays = folder(tmp_path / "a", llama(2) | {"adam_m.lm_head.weight": (64, 16)})
    on_devices = js.load(tmp_path / "a", "fsdp4mp2")
    js.slice(tmp_path / "a", tmp_path / "cut", "fsdp4mp2")
    for rank in range(8):
        share = js.load_rank(tmp_path / "a", "fsdp4mp2", rank)
        stored = load_file(next((tmp_path / "cut" / f"rank_{rank}").glob("*.safetensors")))
        plan = js.plan(tmp_path / "a", "fsdp4mp2", rank=rank)
        assert plan.totals.bytes_needed == sum(a.nbytes for a in share.values())
        for name, array in on_devices.items():
            shard = next(s for s in array.addressable_shards if s.device.id == rank)
            assert np.asarray(shard.data).tobytes() == share[name].tobytes()
            assert share[name].tobytes() == stored[name].tobytes()
    js.merge(tmp_path / "cut", tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(np.array_equal(whole[n], a) for n, a in arrays.items())
    back = js.load(tmp_path / "cut", "same")
    for name, array in on_devices.items():
        assert back[name].sharding.is_equivalent_to(array.sharding, array.ndim)


def test_names_that_no_table_has_load_by_their_shapes_on_request(tmp_path: Path, caplog) -> None:
    arrays = folder(tmp_path / "a", {"tower.kernel": (256, 512), "tower.scale": (512,)})
    (tmp_path / "a" / "config.json").write_text('{"model_type": "new"}')
    mesh = mesh_of({"fsdp": 2, "tensor": 4})
    with pytest.raises(js.NotFoundError, match='unmatched="largest"'):
        js.load(tmp_path / "a", mesh)
    made = js.load(tmp_path / "a", mesh, unmatched="largest")
    is_as_jax_places(made["tower.kernel"], arrays["tower.kernel"], mesh, P("fsdp", "tensor"))
    is_as_jax_places(made["tower.scale"], arrays["tower.scale"], mesh, P())
    assert "split by their shapes alone: tower.kernel (256, 512) as fsdp,tensor" in caplog.text
    moved = js.reshard(jax.device_put(arrays, jax.devices()[0]), mesh, unmatched="largest")
    assert moved["tower.kernel"].sharding == made["tower.kernel"].sharding
    js.slice(tmp_path / "a", tmp_path / "cut", "fsdp2mp4", unmatched="largest")
    assert js.open(tmp_path / "cut").layout is not None


def test_scanned_layers_are_split_over_stages_and_all_weights_over_fsdp(tmp_path: Path) -> None:
    at = "params.decoder.layers.self_attention"
    shapes = {
        f"{at}.query.kernel": (16, 4, 8, 8),  # embed, layer, heads, head_dim
        f"{at}.out.kernel": (8, 4, 8, 16),
        "params.token_embedder.embedding": (64, 16),
        "params.decoder.decoder_norm.scale": (16,),
    }
    arrays = folder(tmp_path / "a", shapes)
    mesh = mesh_of({"fsdp": 2, "stage": 2, "tensor": 2})
    made = js.load(tmp_path / "a", mesh)
    specs = (P("fsdp", "stage", "tensor"), P("tensor", "stage", None, "fsdp"), P("tensor", "fsdp"))
    tree = jax.device_put(arrays, jax.devices()[0])
    moved = js.reshard(tree, mesh, config={"model_type": "llama"})
    for (name, value), spec in zip(arrays.items(), (*specs, P("fsdp")), strict=True):
        is_as_jax_places(made[name], value, mesh, spec)
        is_as_jax_places(moved[name], value, mesh, spec)
    with pytest.raises(js.NotFoundError):
        js.reshard(tree, mesh)


# --- Logical axis rules, on a mesh whose axes may have any names

LOGICAL = (
    ("vocab", "y"),
    ("heads", "y"),
    ("kv_heads", "y"),
    ("mlp", ("y",)),
    ("expert", "z"),
    ("embed", ("x", "z")),
    ("embed", "x"),
)


def test_logical_axis_rules_load_what_jax_places(tmp_path: Path) -> None:
    linen = pytest.importorskip("flax.linen")
    arrays = folder(tmp_path / "a", llama(2))
    mesh = mesh_of({"x": 2, "y": 2, "z": 2})
    axes = {
        "embed_tokens.weight": ("vocab", "embed"),
        "q_proj.weight": ("heads", "embed"),
        "k_proj.weight": ("kv_heads", "embed"),
        "o_proj.weight": ("embed", "heads"),
        "up_proj.weight": ("mlp", "embed"),
        "down_proj.weight": ("embed", "mlp"),
        "norm.weight": ("embed",),
        "lm_head.weight": ("vocab", "embed"),
    }
    counts = []
    made = js.load(tmp_path / "a", mesh, logical_axis_rules=LOGICAL, counted=counts.append)
    moved = js.reshard(jax.device_put(arrays, jax.devices()[0]), mesh, logical_axis_rules=LOGICAL)
    checked = 0
    for name, array in made.items():
        for end, logical in axes.items():
            if name.endswith(end):
                spec = linen.logical_to_mesh_axes(logical, LOGICAL)
                is_as_jax_places(array, arrays[name], mesh, spec)
                is_as_jax_places(moved[name], arrays[name], mesh, spec)
                checked += 1
    assert checked == 1 + 2 * 7 + 2
    assert counts[0].bytes_read == sum(a.nbytes for a in arrays.values())


def test_experts_of_names_of_their_own_are_on_the_part_of_the_mesh_that_a_rule_names(
    tmp_path: Path,
) -> None:
    arrays = folder(tmp_path / "a", moe(1, 4))
    mesh = mesh_of({"x": 2, "y": 2, "z": 2})
    made = js.load(tmp_path / "a", mesh, logical_axis_rules=LOGICAL)
    devices = mesh.devices  # z is the last axis
    for number in range(4):
        name = f"model.layers.0.mlp.experts.{number}.up_proj.weight"
        part = jax.sharding.Mesh(devices[..., number // 2], ("x", "y"))
        is_as_jax_places(made[name], arrays[name], part, P("y", "x"))
    name = "model.layers.0.self_attn.q_proj.weight"
    is_as_jax_places(made[name], arrays[name], mesh, P("y", ("x", "z")))


def test_logical_axis_rules_are_for_meshes_and_strategies(tmp_path: Path) -> None:
    folder(tmp_path / "a", llama(1))
    whole = jax.sharding.NamedSharding(mesh_of({"x": 8}), P())
    with pytest.raises(LayoutError, match="logical_axis_rules= are for a mesh or a strategy"):
        js.load(tmp_path / "a", whole, logical_axis_rules=LOGICAL)
    with pytest.raises(LayoutError, match=r"logical_axis_rules=.* only valid with a strategy or"):
        js.reshard({"w": jax.numpy.zeros(8)}, whole, logical_axis_rules=LOGICAL)
    made = js.load(tmp_path / "a", "fsdp4mp2", logical_axis_rules=[("embed", ("fsdp", "mp"))])
    assert made["model.norm.weight"].sharding.spec == P(("fsdp", "mp"))


def test_a_load_refuses_splits_inside_heads_and_a_slice_notes_them(tmp_path: Path, caplog) -> None:
    folder(tmp_path / "a", llama(1))
    config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    said = r"q_proj.weight 2 heads of 8 over {}=4; use {} 1 or 2"
    with pytest.raises(LayoutError, match=said.format("x", "x")):
        js.load(tmp_path / "a", mesh_of({"x": 4, "y": 2}), logical_axis_rules=[("heads", "x")])
    with pytest.raises(LayoutError, match=said.format("tensor", "tensor")):
        js.load(tmp_path / "a", mesh_of({"tensor": 4, "fsdp": 2}))
    tree = {"model.layers.0.self_attn.q_proj.weight": jax.numpy.zeros((16, 16))}
    with pytest.raises(LayoutError, match=said.format("tensor", "tensor")):
        js.reshard(tree, mesh_of({"tensor": 4, "fsdp": 2}), config=tmp_path / "a")
    with pytest.raises(LayoutError, match=said.format("mp", "mp")):
        js.load(tmp_path / "a", "fsdp2mp4")
    whole = js.load(tmp_path / "a", mesh_of({"fsdp": 4, "tensor": 2}))  # fsdp gathers before use
    assert whole["model.layers.0.self_attn.q_proj.weight"].sharding.spec == P("tensor", "fsdp")
    js.slice(tmp_path / "a", tmp_path / "cut", "fsdp2mp4")
    assert "2 heads of 8 over mp=4" in caplog.text


def test_rule_files_have_logical_axes_for_conversions(tmp_path: Path) -> None:
    folder(tmp_path / "a", llama(1))
    rules = js.read_rules('[axes]\nembed = "fsdp+mp"')
    js.slice(tmp_path / "a", tmp_path / "cut", "fsdp4mp2", rules=rules)
    on_devices = js.load(tmp_path / "a", "fsdp4mp2", rules=rules)
    for name, array in js.load_rank(tmp_path / "cut", "same", 3).items():
        shard = next(s for s in on_devices[name].addressable_shards if s.device.id == 3)
        assert np.asarray(shard.data).tobytes() == array.tobytes()
    assert on_devices["model.layers.0.mlp.up_proj.weight"].sharding.spec == P(None, ("fsdp", "mp"))


def test_the_code_of_the_documentation_prints_what_its_comments_say(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "loading.md").read_text()
    part = text.partition("## Meshes of your own")[2].partition("## Errors and notes")[0]
    blocks = [block.partition("```")[0] for block in part.split("```python\n")[1:]]
    folder(tmp_path / "llama", llama(2))
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {})
    said = [line.split("# ")[1] for line in "\n".join(blocks).splitlines() if "print(" in line]
    assert len(blocks) == 2
    assert capsys.readouterr().out.replace("PartitionSpec(", "P(").splitlines() == said
