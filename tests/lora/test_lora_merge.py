"""PEFT is the oracle: what its merge_and_unload makes, from the folders it saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mapping_models import DECODER, MODELS

from jaxshard.errors import LayoutError
from jaxshard.lora import merge_lora

torch = pytest.importorskip("torch", reason="PEFT needs torch")
peft = pytest.importorskip("peft", reason="PEFT is the oracle")
transformers = pytest.importorskip("transformers", reason="the models are transformers'")
load_file = pytest.importorskip("safetensors.torch", reason="it needs torch").load_file

QUICK = {"workers": 1, "fsync": False}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "every linear": ("qwen2", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "rslora": (
        "llama",
        {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "down_proj"], "use_rslora": True},
    ),
    "patterns": (
        "qwen3",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "o_proj"],
            "rank_pattern": {"q_proj": 2, "model.layers.1.self_attn.k_proj": 3},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, "o_proj": 3},
        },
    ),
    "modules_to_save": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head", "norm"],
        },
    ),
    "embedding": (
        "llama",
        {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]},
    ),
    "fan_in_fan_out": (
        "gpt2",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "fan_in_fan_out": True,
        },
    ),
    "every bias": (
        "gpt2",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["c_attn"],
            "fan_in_fan_out": True,
            "bias": "all",
        },
    ),
    "bias of the adapted": (
        "qwen2",
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "lora_only"},
    ),
    "experts' attention": (
        "deepseek_v3",
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_a_proj", "kv_b_proj", "o_proj"]},
    ),
}


def fresh(family: str, dtype: str) -> Any:
    config_class, model_class, config = MODELS[family]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    return model.to(getattr(torch, dtype))


def adapted(model: Any, config: dict[str, Any]) -> Any:
    """A PEFT model whose adapters and saved modules are all random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return wrapped


def make(where: Path, family: str, dtype: str, config: dict[str, Any]) -> dict[str, Any]:
    """Folders base/ and adapter/, and what PEFT makes of them."""
    model = fresh(family, dtype)
    model.save_pretrained(where / "base")
    wrapped = adapted(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(where / "adapter")
        wrapped.merge_and_unload().save_pretrained(where / "expected")
    return weights(where / "expected")


def weights(folder: Path) -> dict[str, Any]:
    return {n: x for f in sorted(folder.glob("*.safetensors")) for n, x in load_file(f).items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_is_what_peft_makes_of_it(tmp_path, case, dtype) -> None:
    family, config = CASES[case]
    expected = make(tmp_path, family, dtype, config)
    before = weights(tmp_path / "base")
    merge_lora(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter", **QUICK)
    made = weights(tmp_path / "merged")
    assert made.keys() == expected.keys()
    changed = 0
    for name, x in expected.items():
        changed += not torch.equal(x, before[name])
        assert made[name].dtype == x.dtype
        if dtype == "float32":
            torch.testing.assert_close(made[name], x, rtol=1e-6, atol=1e-6)
        elif torch.equal(x, before[name]):
            assert torch.equal(made[name], x)
        else:
            _equal_after_rounding(tmp_path, name, before[name], made[name])
            torch.testing.assert_close(made[name], x, rtol=2**-7, atol=2**-8)
    assert changed
    assert (tmp_path / "merged" / "config.json").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def _equal_after_rounding(where: Path, name: str, base: Any, made: Any) -> None:
    """PEFT adds in the weight's own dtype; here the sum is in float32 and rounded once."""
    adapter = weights(where / "adapter")
    config = peft.LoraConfig.from_pretrained(where / "adapter")
    module = name.removesuffix(".weight")
    saved = adapter.get(f"base_model.model.{name}")
    if saved is None and name.endswith(".bias"):
        saved = adapter.get(f"base_model.model.{module.removesuffix('.bias')}.base_layer.bias")
    if saved is not None:
        assert torch.equal(made, saved)
        return
    prefix = f"base_model.model.{module}.lora_"
    embedding = f"{prefix}embedding_A" in adapter
    a, b = (
        adapter[f"{prefix}embedding_{x}" if embedding else f"{prefix}{x}.weight"].float()
        for x in "AB"
    )
    alpha = peft.utils.other.get_pattern_key(config.alpha_pattern.keys(), module)
    strength = config.alpha_pattern.get(alpha, config.lora_alpha)
    scaling = strength / (a.shape[0] ** 0.5 if config.use_rslora else a.shape[0])
    delta = (b @ a) * scaling
    if embedding or config.fan_in_fan_out:
        delta = delta.T
    assert torch.equal(made, (base.float() + delta).to(base.dtype))


@pytest.mark.filterwarnings("ignore")
def test_the_merged_model_computes_what_the_adapted_one_does(tmp_path) -> None:
    model = fresh("llama", "float32")
    model.save_pretrained(tmp_path / "base")
    wrapped = adapted(model, CASES["patterns"][1]).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(10)[None] % DECODER["vocab_size"]
    with torch.no_grad():
        expected = wrapped(ids).logits
    merge_lora(tmp_path / "base", tmp_path / "m", adapter=tmp_path / "adapter", **QUICK)
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        np.testing.assert_allclose(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_can_and_we_cannot_is_refused(tmp_path) -> None:
    model = fresh("qwen3_moe", "float32")
    model.save_pretrained(tmp_path / "base")
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "use_dora": True}
    adapted(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(LayoutError, match=r"DoRA|use_dora"):
        merge_lora(tmp_path / "base", tmp_path / "m", adapter=tmp_path / "adapter")
