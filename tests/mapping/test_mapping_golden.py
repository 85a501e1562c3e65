"""MindFormers' own converters are the oracle: fused names and shapes, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from jaxshard.api import convert
from jaxshard.conversion.open import open_checkpoint
from jaxshard.mapping import find_mapping

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_convert"
QUICK = {"workers": 1, "fsync": False}
NOTES = {
    " (interleaved=True, default)": "mcore-fused",
    " (interleaved=False)": "mcore-fused-blocks",
}


def source(where: Path) -> Path:
    numbers = json.loads((GOLDEN / "manifest.json").read_text())["config"]
    where.mkdir()
    tensors = load_file(GOLDEN / "hf.safetensors")
    save_file(tensors, where / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "num_attention_heads": numbers["num_attention_heads"],
        "num_key_value_heads": numbers["num_query_groups"],
        "num_experts": numbers["experts"],
    }
    (where / "config.json").write_text(json.dumps(config))
    return where


def test_mindformers_fused_weights_are_reproduced_exactly(tmp_path: Path) -> None:
    folder, checked = source(tmp_path / "hf"), 0
    golden = load_file(GOLDEN / "mf.safetensors")
    for note, form in NOTES.items():
        convert(folder, tmp_path / form, names=f"hf:{form}", **QUICK)
        made = load_file(tmp_path / form / "model.safetensors")
        for name, expected in golden.items():
            plain = name.removesuffix(note)
            if plain in made:
                assert made[plain].dtype == expected.dtype
                assert np.array_equal(made[plain], expected), name
                checked += 1
    assert checked == 2 * 3 + 2  # qkv and both kinds of experts twice, each fc1 once


def test_mindformers_fused_weights_give_back_hugging_faces(tmp_path: Path) -> None:
    catalog = open_checkpoint(source(tmp_path / "hf"))
    golden = load_file(GOLDEN / "mf.safetensors")
    for note, form in NOTES.items():
        mapping = find_mapping(f"hf:{form}", catalog)
        fused = {n.removesuffix(note): x for n, x in golden.items() if "(" not in n or note in n}
        fused["decoder.layers.0.mlp.linear_fc2.weight"] = load_file(GOLDEN / "hf.safetensors")[
            "model.layers.0.mlp.down_proj.weight"
        ]
        back = mapping.inverse().apply_arrays(fused)
        expected = load_file(GOLDEN / "hf.safetensors")
        assert back.keys() == expected.keys()
        assert all(np.array_equal(back[n], expected[n]) for n in back)
