"""Saving by other names and shapes: from the shards where they lie, without gathering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from mapping_models import DECODER, build
from mapping_models import save as save_real
from mapping_random import Sizes, config_of, random_model, write_model
from mapping_worlds import same
from processes import answers, run_processes
from safetensors.numpy import load_file

from jaxshard.api import convert
from jaxshard.conversion.open import open_checkpoint
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.loader import load
from jaxshard.mapping import Fuse, Mapping, Pad, find_mapping
from jaxshard.saver import save

QUICK = {"workers": 1, "fsync": False}
SIZES = Sizes(layers=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            place = tmp_path_factory.mktemp(family) / "hf"
            made[family] = write_model(place, config_of(family, SIZES), random_model(family, SIZES))
        return made[family]

    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {n: x for f in sorted(folder.rglob("*.safetensors")) for n, x in load_file(f).items()}


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llama", "nnx-scan"),
        ("llama", "mindformers-concat"),
        ("qwen2", "mcore-fused"),
        ("qwen2", "maxtext"),
        ("qwen3_moe", "mcore-fused-blocks"),
        ("deepseek_v3", "linen-scan"),
    ],
)
@pytest.mark.parametrize("strategy", ["dp2mp2", "dp1mp2pp2"])
def test_a_model_of_another_form_is_saved_as_hugging_faces(
    folders, tmp_path, family, form, strategy
) -> None:
    source = folders(family)
    if "pp" in strategy and family == "deepseek_v3":
        pytest.skip("stages of dense and sparse layers are no equal parts of a stack")
    arrays = load(source, strategy, names=f"hf:{form}")
    names = f"{family}-{form}:{family}-hf"
    report = save(arrays, tmp_path / "out", names=names, extras=source, fsync=False)
    assert same(weights(tmp_path / "out"), weights(source))
    assert report.counts.bytes_needed == report.counts.bytes_written
    assert report.counts.bytes_needed == open_checkpoint(source).num_bytes
    config = (tmp_path / "out" / "config.json").read_text()
    assert config == (source / "config.json").read_text()


def test_hugging_faces_arrays_are_saved_as_another_programs_rank_files(folders, tmp_path) -> None:
    source = folders("qwen2")
    arrays = load(source, "dp2mp2")
    for name, how in {"own": {}, "other": {"strategy": "dp1mp2pp2"}}.items():
        save(
            arrays,
            tmp_path / name,
            format="ranks",
            names="hf:mcore-fused",
            extras=source,
            fsync=False,
            **how,
        )
        convert(tmp_path / name, tmp_path / f"{name} whole", **QUICK)
        mapping = find_mapping("hf:mcore-fused", open_checkpoint(source))
        expected = mapping.apply_arrays(weights(source))
        assert same(weights(tmp_path / f"{name} whole"), expected)
    cut = weights(tmp_path / "own" / "rank_0")["decoder.layers.0.mlp.linear_fc1.weight"]
    assert cut.shape[0] == SIZES.ffn  # half of gate and up


def test_numpys_arrays_padding_and_config_will_do(tmp_path) -> None:
    source = random_model("llama", SIZES)
    pad = Mapping((Pad(("lm_head.weight",), 0, SIZES.vocab, SIZES.vocab + 8),))
    save(source, tmp_path / "padded", names=pad, fsync=False)
    made = weights(tmp_path / "padded")
    np.testing.assert_array_equal(made["lm_head.weight"][:24], source["lm_head.weight"])
    assert not made["lm_head.weight"][24:].any()
    config = config_of("llama", SIZES)
    save(source, tmp_path / "m", names="hf:mcore-fused", config=config, fsync=False)
    assert "decoder.layers.3.mlp.linear_fc1.weight" in weights(tmp_path / "m")
    with pytest.raises(NotFoundError, match="for a save pass config= or extras="):
        save(source, tmp_path / "x", names="llama-hf:llama-mcore-fused", fsync=False)
    with pytest.raises(NotFoundError, match="has no rule for"):
        save(source, tmp_path / "x", names="llama-nnx:llama-hf", fsync=False)
    assert not (tmp_path / "x").exists()


def test_orbax_gets_the_other_form_too(folders, tmp_path) -> None:
    source = folders("llama")
    arrays = load(source, "dp2mp2")
    save(arrays, tmp_path / "out", format="orbax", names="hf:nnx-scan", extras=source)
    expected = find_mapping("hf:nnx-scan", open_checkpoint(source)).apply_arrays(weights(source))
    made = load(tmp_path / "out", jax.devices()[0])
    assert same({n: np.asarray(x) for n, x in made.items()}, expected)


def test_a_rank_that_holds_part_of_a_group_is_refused_before_anything_is_written(
    folders, tmp_path
) -> None:
    source = folders("llama")
    fuse = Fuse(
        tuple(f"model.layers.{{layer}}.self_attn.{x}_proj.weight" for x in "qkv"),
        "model.layers.{layer}.qkv",
        (2, 1, 1),
        SIZES.kv,
    )
    arrays = load(source, "mp4")
    with pytest.raises(LayoutError, match=r"mp=4 splits .* the 2 groups"):
        save(arrays, tmp_path / "x", format="ranks", names=Mapping((fuse,)), fsync=False)
    assert not (tmp_path / "x").exists()


def test_transformers_computes_the_same_from_what_was_saved(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = save_real("llama", tmp_path / "hf")
    arrays = load(source, "dp2mp2", names="hf:nnx-scan")
    save(arrays, tmp_path / "out", names="nnx-scan:hf", extras=source, fsync=False)
    ids = torch.arange(12)[None] % DECODER["vocab_size"]
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, build("llama")(ids).logits)


def test_two_processes_write_each_its_own(folders, tmp_path) -> None:
    source = folders("llama")
    done: list[Any] = answers(
        run_processes("mapping_processes:save_as_hugging_face", 2, 2, str(source), str(tmp_path))
    )
    assert same(weights(tmp_path / "hf"), weights(source))
    expected = find_mapping("hf:mcore-fused", open_checkpoint(source)).apply_arrays(weights(source))
    convert(tmp_path / "ranks", tmp_path / "whole", **QUICK)
    assert same(weights(tmp_path / "whole"), expected)
    assert sum(found["hf"] for found in done) == open_checkpoint(source).num_bytes
    assert all(found["hf"] > 0 for found in done)
