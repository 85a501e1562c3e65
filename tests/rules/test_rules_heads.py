"""Key and value heads that are fewer than the tensor parallel ranks: repeated, or noted."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapping_worlds import Memory, read_box
from safetensors.numpy import load_file, save_file

import jaxshard as js
from jaxshard.api import convert
from jaxshard.core.catalog import Model
from jaxshard.core.layout import Placement, Strategy
from jaxshard.errors import LayoutError
from jaxshard.mapping import Fuse, Mapping, Repeat
from jaxshard.rules import layout, rules_for
from jaxshard.storage.engine import Budget

QUICK = {"workers": 1, "fsync": False}
LAYER = "model.layers.{layer}.self_attn."


def repeat(kv_heads: int, times: int) -> Mapping:
    names = tuple(f"{LAYER}{x}_proj.{y}" for x in "kv" for y in ("weight", "bias"))
    return Mapping((Repeat(names, kv_heads, times),))


def attention(heads: int, kv_heads: int, head_dim: int, hidden: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    made = {}
    for x, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        for end, shape in (("weight", (n * head_dim, hidden)), ("bias", (n * head_dim,))):
            name = LAYER.format(layer=0) + f"{x}_proj.{end}"
            made[name] = random.standard_normal(shape, dtype=np.float32)
    return made


def folder(path: Path, arrays: dict[str, np.ndarray], **config: int) -> Path:
    path.mkdir()
    save_file(arrays, path / "model.safetensors")
    settings = {"model_type": "llama", "num_hidden_layers": 1, **config}
    (path / "config.json").write_text(json.dumps(settings))
    return path


@given(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]),
)
def test_repeated_heads_are_shared_whole_by_as_many_ranks_as_there_are(
    kv_heads: int, times: int, head_dim: int, ways: int
) -> None:
    array = np.arange(kv_heads * head_dim * 2).reshape(-1, 2)
    name = LAYER.format(layer=0) + "k_proj.weight"
    memory = Memory({name: array})
    tensor = repeat(kv_heads, times).apply(memory.catalog)[name]
    placement = Placement((("mp", ways),), (("mp",),))
    if tensor.shape[0] % ways:
        return  # refused before, as no rank count divides it
    if kv_heads * times % ways:
        if len((tensor.factors or ((),))[0]) > 1:
            with pytest.raises(LayoutError, match="which mp="):
                tensor.check_groups(placement)
        return
    tensor.check_groups(placement)
    whole = np.repeat(array.reshape(kv_heads, head_dim, 2), times, 0).reshape(-1, 2)
    is_box = kv_heads % ways == 0 or ways % kv_heads == 0  # else copies of two heads, cut apart
    for shard in placement.shards(tensor.shape):
        if not is_box:
            continue
        made, _ = read_box(memory, tensor, shard.box, Budget(1, 64, 128))
        np.testing.assert_array_equal(made, whole[shard.box.slices])


@pytest.mark.parametrize("to", ["mp2", "mp4", "mp8", "dp2mp4optall"])
def test_repeating_and_cutting_at_once_equals_two_steps(tmp_path: Path, to: str) -> None:
    arrays = attention(8, 2, 8, 64)
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
    source = folder(tmp_path / "source", arrays, **sizes)
    mapping = repeat(2, 4)
    report = convert(source, tmp_path / "once", to, names=mapping, **QUICK)
    assert not any("head" in note for note in report.notes)
    convert(source, tmp_path / "whole", names=mapping, **QUICK)
    convert(tmp_path / "whole", tmp_path / "twice", to, **QUICK)
    files = sorted(p.relative_to(tmp_path / "once") for p in (tmp_path / "once").rglob("*.safe*"))
    assert len(files) == Strategy(to).num_ranks
    for path in files:
        once, twice = load_file(tmp_path / "once" / path), load_file(tmp_path / "twice" / path)
        assert once.keys() == twice.keys()
        for name, x in once.items():
            np.testing.assert_array_equal(x, twice[name])
            if to == "mp8" and "k_proj.weight" in name:
                rank = int(path.parts[0].removeprefix("rank_"))
                head = slice(8 * (rank // 4), 8 * (rank // 4) + 8)
                np.testing.assert_array_equal(x, arrays[name][head])


def test_repeated_heads_are_loaded_onto_more_devices_than_there_were(tmp_path: Path) -> None:
    arrays = attention(8, 2, 8, 64)
    source = folder(tmp_path / "source", arrays)
    made = js.load(source, f"mp{min(8, len(jax.devices()))}", names=repeat(2, 4))
    name = LAYER.format(layer=0) + "v_proj.weight"
    heads = np.repeat(arrays[name].reshape(2, 8, 64), 4, 0).reshape(64, 64)
    np.testing.assert_array_equal(np.asarray(made[name]), heads)


def test_heads_that_are_repeated_and_fused_are_whole_groups() -> None:
    arrays = attention(8, 2, 4, 8)
    base = LAYER.format(layer=0)
    memory = Memory({n: x for n, x in arrays.items() if n.endswith("weight")})
    sources = tuple(f"{LAYER}{x}_proj.weight" for x in "qkv")
    fuse = Fuse(sources, f"{LAYER}qkv.weight", (1, 1, 1), groups=8)
    tensor = repeat(2, 4).then(Mapping((fuse,))).apply(memory.catalog)[f"{base}qkv.weight"]
    placement = Placement((("mp", 8),), (("mp",),))
    tensor.check_groups(placement)
    for rank, shard in enumerate(placement.shards(tensor.shape)):
        made, _ = read_box(memory, tensor, shard.box, Budget(1, 64, 128))
        parts = [arrays[f"{base}{x}_proj.weight"].reshape(-1, 4, 8) for x in "qkv"]
        q, k, v = parts[0][rank], parts[1][rank // 4], parts[2][rank // 4]
        np.testing.assert_array_equal(made, np.concatenate([q, k, v]))


@pytest.mark.parametrize(
    ("strategy", "config", "noted"),
    [
        ("mp2", {"hidden_size": 64, "num_attention_heads": 8}, set()),
        ("mp8", {"hidden_size": 64, "num_attention_heads": 8}, {"k"}),
        ("mp8", {"head_dim": 16}, {"q", "k"}),
        ("mp8", {}, set()),  # nothing gives the length of a head
        ("dp4mp2optall", {"head_dim": 8}, set()),  # gathered before they are used
        ("mp8", {"text_config": {"head_dim": 8}}, {"k"}),
    ],
)
def test_heads_that_ranks_share_are_noted(strategy: str, config: dict, noted: set[str]) -> None:
    shapes = {
        f"model.layers.0.self_attn.{x}_proj.weight": (n, 64) for x, n in (("q", 64), ("k", 16))
    }
    model = Model("llama", config=config)
    made = layout(shapes, Strategy(strategy), rules_for(model, shapes), model)
    notes = [n for n in made.notes if n.startswith("cut within what ranks need whole")]
    assert len(notes) == bool(noted)
    for x in noted:
        assert f"{x}_proj.weight {'2 kv_heads of 8' if len(noted) == 1 else ''}" in notes[0]


def test_ranks_that_compute_are_refused_parts_of_heads(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
    source = folder(tmp_path / "source", attention(8, 2, 8, 64), **sizes)
    said = "k_proj.weight 2 kv_heads of 8 over mp=4; use mp 1 or 2, or repeat the kv heads"
    with pytest.raises(LayoutError, match=said) as caught:
        js.load(source, "mp4")
    assert '"model.layers.*.self_attn.k_proj.bias" = "-"' in str(caught.value)  # the first
    with pytest.raises(LayoutError, match="over tensor=4; use tensor 1 or 2"):
        js.load(source, jax.make_mesh((4,), ("tensor",)))
    assert any(said in note for note in js.plan(source, to="mp4").notes)  # ranks that store
    specs = {"*.k_proj.*": "-", "*.v_proj.weight": "mp,-", "*.v_proj.bias": "mp"}
    own = js.read_rules("[specs]\n" + "\n".join(f'"{p}" = "{s}"' for p, s in specs.items()))
    made = js.load(source, "mp4", rules=own)
    name = LAYER.format(layer=0)
    assert made[f"{name}k_proj.weight"].sharding.is_fully_replicated
    assert made[f"{name}v_proj.weight"].sharding.shard_shape((16, 64)) == (4, 64)
    assert js.load(source, "mp2")  # whole heads
