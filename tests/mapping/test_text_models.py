"""Tables for the text part of a larger model: its sizes and its names are found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mapping_models import save
from safetensors.numpy import load_file, save_file

from jaxshard.api import convert
from jaxshard.core.catalog import Model
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.mapping import table

QUICK = {"workers": 1, "fsync": False}
VISION = {
    "vision_tower.encoder.layers.0.self_attn.q_proj.weight": np.ones((4, 4), np.float32),
    "multi_modal_projector.linear.weight": np.ones((4, 4), np.float32),
}


def nested(path: Path, root: str, kind: str, key: str, vision: bool = False) -> tuple[Path, Path]:
    """A text model as it is alone, and as a part of a larger one."""
    alone = save("llama", path / "alone")
    arrays = load_file(alone / "model.safetensors")
    config = json.loads((alone / "config.json").read_text())
    larger = path / "larger"
    larger.mkdir()
    head = root.removesuffix("model.") if root.endswith("language_model.model.") else ""
    renamed = {
        root + n.removeprefix("model.") if n.startswith("model.") else head + n: x
        for n, x in arrays.items()
    }
    save_file(renamed | (VISION if vision else {}), larger / "model.safetensors")
    inner: dict = config
    for part in reversed(key.split(".")):
        inner = {part: inner}
    (larger / "config.json").write_text(json.dumps({"model_type": kind, **inner}))
    return alone, larger


@pytest.mark.parametrize(
    ("root", "kind", "key"),
    [
        ("model.language_model.", "llava", "text_config"),
        ("language_model.model.", "internvl_chat", "llm_config"),
        ("model.text_model.", "idefics3", "text_config"),
        ("thinker.model.", "an_omni", "thinker_config.text_config"),
    ],
)
@pytest.mark.parametrize("form", ["tunix", "mindformers", "linen-scan"])
@pytest.mark.parametrize("source", ["hf", "auto", "llama-hf"])
def test_a_text_part_is_mapped_as_the_model_alone(tmp_path, root, kind, key, form, source) -> None:
    alone, larger = nested(tmp_path, root, kind, key)
    target = f"llama-{form}" if source == "llama-hf" else form
    convert(alone, tmp_path / "a", names=f"hf:{form}", **QUICK)
    convert(larger, tmp_path / "b", names=f"{source}:{target}", **QUICK)
    expected = load_file(tmp_path / "a" / "model.safetensors")
    made = load_file(tmp_path / "b" / "model.safetensors")
    assert made.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(made[name], x)


def test_tensors_of_other_modalities_must_be_left_out(tmp_path: Path) -> None:
    _, larger = nested(tmp_path, "model.language_model.", "llava", "text_config", vision=True)
    with pytest.raises(LayoutError, match=r"2 of .* tensors are not of the text model") as caught:
        convert(larger, tmp_path / "b", names="hf:tunix", **QUICK)
    assert "Did you mean" not in str(caught.value)
    pattern = str(caught.value).split("'")[1]  # the remedy, as it is written
    convert(larger, tmp_path / "b", names="hf:tunix", exclude=pattern, **QUICK)
    assert not any("vision" in n for n in load_file(tmp_path / "b" / "model.safetensors"))


@pytest.mark.parametrize("kind", ["gemma3n", "mixtrall"])
def test_a_model_without_tables_is_no_other_architecture(kind: str) -> None:
    model = Model(kind, config={"model_type": kind, "text_config": {"model_type": f"{kind}_text"}})
    with pytest.raises(NotFoundError) as caught:
        table("hf", "tunix", model)
    said = str(caught.value)
    assert f"no table for model_type '{kind}' with '{kind}_text'" in said
    assert "Did you mean" not in said


def test_a_larger_model_whose_text_part_has_tables_takes_them() -> None:
    text = {"model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 2}
    text |= {"num_key_value_heads": 2, "hidden_size": 16, "head_dim": 4}
    model = Model("gemma3", config={"model_type": "gemma3", "text_config": text})
    alone = Model("gemma3_text", config=text)
    assert table("hf", "nnx-scan", model).ops == table("hf", "nnx-scan", alone).ops
