"""PEFT's adapters of parameters, stacked experts, tied heads and multimodal models.

PEFT is the oracle: what its ``merge_and_unload`` makes of real models of transformers.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import checkpoints
import jax
import numpy as np
import pytest
from test_lora import QUICK
from test_lora_merge import adapted, peft, torch, transformers, weights

import jaxshard
from jaxshard.api import convert
from jaxshard.errors import FormatError, LayoutError, NotFoundError
from jaxshard.lora import merge_lora, with_adapter
from jaxshard.rules import read_rules

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
TEXT = {**SMALL, "head_dim": 8}
SQUARE = {**TEXT, "intermediate_size": 32}  # down_proj (32, 32), and where it is (in, out) as well
TOP2 = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 32,
}
TOKENS = {"boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FORWARD = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
SECTIONS = {"mrope_section": [2, 1, 1]}

#: name: (model class, its config, what PEFT is asked for)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a router": (
        "MixtralForCausalLM",
        {**TEXT, **TOP2},
        {"target_modules": ["q_proj", "gate"], "alpha_pattern": {"gate.weight": 5}},
    ),
    "experts that files have apart": (
        "MixtralForCausalLM",
        {**TEXT, **TOP2},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "experts by the names of older versions": (
        "MixtralForCausalLM",
        {**SQUARE, **TOP2},
        {"target_modules": ["w1", "w2", "w3"]},
    ),
    "every linear of a mixture": (
        "Qwen2MoeForCausalLM",
        {**SMALL, **MANY},
        {"target_modules": "all-linear"},
    ),
    "ranks and strengths of parameters": (
        "Qwen3MoeForCausalLM",
        {**TEXT, **MANY},
        {
            "target_parameters": [*EXPERTS, "mlp.gate.weight"],
            "target_modules": ["q_proj"],
            "rank_pattern": {r".*\.gate_up_proj": 2},
            "alpha_pattern": {"experts.down_proj": 3, "layers.1.mlp.gate.weight": 5},
            "use_rslora": True,
        },
    ),
    "some layers without experts": (
        "DeepseekV3ForCausalLM",
        {
            **SMALL,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        {"target_modules": ["o_proj"], "target_parameters": [*EXPERTS, "gate.weight"]},
    ),
    "stacks of (in, out)": (
        "GptOssForCausalLM",
        {**TEXT, **TOP2},
        {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "mlp.router.weight"]},
    ),
    "square stacks of (in, out)": (
        "GptOssForCausalLM",
        {**SQUARE, **TOP2},
        {"target_modules": [], "target_parameters": EXPERTS},
    ),
    "one parameter of several, and a bias": (
        "GptOssForCausalLM",
        {**TEXT, **TOP2},
        {
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj_bias", "experts.down_proj"],
        },
    ),
    "stacks that PEFT takes as (out, in)": (
        "Llama4ForCausalLM",
        {
            **SQUARE,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "moe_layers": [0, 1],
        },
        {"target_modules": ["q_proj"], "target_parameters": FORWARD},
    ),
    "stacks by other names": (
        "GraniteMoeForCausalLM",
        {**SMALL, **TOP2},
        {
            "target_modules": [],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"],
        },
    ),
    "a single expert": (
        "MixtralForCausalLM",
        {**TEXT, "num_local_experts": 1, "num_experts_per_tok": 1},
        {"target_modules": [], "target_parameters": EXPERTS},
    ),
    "a tied head": (
        "LlamaForCausalLM",
        {**TEXT, "tie_word_embeddings": True},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "a tied head that was trained whole": (
        "LlamaForCausalLM",
        {**TEXT, "tie_word_embeddings": True},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "Gemma 3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**SMALL, "head_dim": 16},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            **TOKENS,
        },
        {"target_modules": "all-linear"},
    ),
    "Gemma 3 with a tied head": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**SMALL, "head_dim": 16},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            **TOKENS,
        },
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "LLaVA": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
        {"target_modules": "all-linear", "modules_to_save": ["lm_head", "linear_2"]},
    ),
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**SMALL, "rope_scaling": {"type": "default", **SECTIONS}},
            "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [1]},
        },
        {"target_modules": "all-linear"},
    ),
    "Qwen3-VL with experts, turned in files": (
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                **MANY,
                "moe_intermediate_size": 32,
                "rope_scaling": {"rope_type": "default", **SECTIONS},
            },
            "vision_config": {
                **QWEN_VISION,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        },
        {"target_modules": ["q_proj", "qkv"], "target_parameters": EXPERTS},
    ),
}


@cache
def _model(case: str, dtype: str) -> Any:
    name, config, _ = CASES[case]
    model_class = getattr(transformers, name)
    return model_class, model_class.config_class(**config)


def make(where: Path, case: str, dtype: str = "float32") -> dict[str, Any]:
    """Folders base/ and adapter/, and what PEFT makes of them when it loads them."""
    model_class, config = _model(case, dtype)
    torch.manual_seed(0)
    model = model_class(config).to(getattr(torch, dtype))
    model.save_pretrained(where / "base")
    wrapped = adapted(model, {"r": 4, "lora_alpha": 6, **CASES[case][2]})
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(where / "adapter")
    base = model_class.from_pretrained(where / "base", dtype=getattr(torch, dtype))
    again = peft.PeftModel.from_pretrained(base, where / "adapter")
    again.merge_and_unload().save_pretrained(where / "expected")
    return weights(where / "expected")


def test_the_oracle_changes_every_kind_of_model(tmp_path) -> None:
    """A twin: a merge that did nothing would not pass."""
    expected = make(tmp_path, "experts that files have apart")
    before = weights(tmp_path / "base")
    changed = {n for n, x in expected.items() if not torch.equal(x, before[n])}
    assert len(changed) == 2 * (4 * 3 + 1)


@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_what_peft_makes_of_it(tmp_path, case) -> None:
    expected = make(tmp_path, case)
    merge_lora(tmp_path / "base", tmp_path / "m", adapter=tmp_path / "adapter", **QUICK)
    made = weights(tmp_path / "m")
    assert made.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(made[name], x, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "case",
    ["experts that files have apart", "stacks of (in, out)", "ranks and strengths of parameters"],
)
def test_a_merge_of_bfloat16_is_rounded_once(tmp_path, case) -> None:
    expected = make(tmp_path, case, "bfloat16")
    how = {"adapter": tmp_path / "adapter", **QUICK}
    merge_lora(tmp_path / "base", tmp_path / "m", **how)
    made, before = weights(tmp_path / "m"), weights(tmp_path / "base")
    for name, x in expected.items():
        assert made[name].dtype == x.dtype == torch.bfloat16
        torch.testing.assert_close(made[name], x, rtol=2**-7, atol=2**-8, msg=name)
    changed = {n for n, x in expected.items() if not torch.equal(x, before[n])}
    assert changed == {n for n, x in made.items() if not torch.equal(x, before[n])}


STACKED = '[specs]\n"*.gate_up_proj" = "ep,-,mp"\n"*.down_proj" = "ep,mp,-"\n'


@pytest.mark.parametrize(
    ("case", "to", "rules"),
    [
        ("experts that files have apart", "mp2", None),
        ("experts that files have apart", "dp2mp2ep2", None),
        ("stacks of (in, out)", "dp2mp2ep2", read_rules(STACKED, "test")),
    ],
)
def test_experts_merge_on_the_way_to_any_layout(tmp_path, case, to, rules) -> None:
    expected = make(tmp_path, case)
    source = with_adapter(tmp_path / "base", tmp_path / "adapter")
    how = {"unmatched": "replicate", "rules": rules, **QUICK}
    convert(source, tmp_path / "cut", to, **how)
    convert(tmp_path / "cut", tmp_path / "whole", **QUICK)
    made, loaded = weights(tmp_path / "whole"), jaxshard.load(source, jax.devices()[0])
    for name, x in expected.items():
        torch.testing.assert_close(made[name], x, rtol=1e-6, atol=1e-7, msg=name)
        np.testing.assert_allclose(np.asarray(loaded[name]), x.numpy(), rtol=1e-6, atol=1e-7)


def test_experts_merge_reproducibly_in_small_blocks_and_are_taken_back(tmp_path) -> None:
    make(tmp_path, "stacks of (in, out)")
    how = {"adapter": tmp_path / "adapter"}
    merge_lora(tmp_path / "base", tmp_path / "m", **how, reproducible=True)
    merge_lora(
        tmp_path / "base", tmp_path / "n", **how, reproducible=True, workers=3, host_bytes=3 << 20
    )
    one, other = weights(tmp_path / "m"), weights(tmp_path / "n")
    assert all(torch.equal(x, other[n]) for n, x in one.items())
    merge_lora(tmp_path / "m", tmp_path / "u", **how, unmerge=True)
    for name, x in weights(tmp_path / "base").items():
        torch.testing.assert_close(weights(tmp_path / "u")[name], x, atol=1e-6, rtol=1e-5)


def test_a_tied_head_is_noted_and_what_was_trained_is_one_conversion_away(tmp_path) -> None:
    """PEFT adds the one adapter for the embedding and for the head, which are one tensor."""
    expected = make(tmp_path, "a tied head")
    how = {**QUICK}
    report = merge_lora(tmp_path / "base", tmp_path / "m", adapter=tmp_path / "adapter", **how)
    assert any("added twice, once for each, as in PEFT" in note for note in report.notes)
    args = ("convert", tmp_path / "adapter", tmp_path / "once", "--exclude", "lm_head", "--quiet")
    assert checkpoints.run(*args) == 0
    merge_lora(tmp_path / "base", tmp_path / "t", adapter=tmp_path / "once", **how)
    name = "model.embed_tokens.weight"
    before, once = weights(tmp_path / "base")[name], weights(tmp_path / "t")[name]
    torch.testing.assert_close(once - before, (expected[name] - before) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "is adapted, but the head of .* is tied"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            "which is tied to it, was not trained with it",
        ),
    ],
)
def test_a_tied_head_of_a_multimodal_model_is_known(tmp_path, monkeypatch, config, told) -> None:
    name, of_model, _ = CASES["Gemma 3 with a tied head"]
    monkeypatch.setitem(CASES, "own", (name, of_model, config))
    make(tmp_path, "own")
    with pytest.raises(LayoutError, match=told):
        with_adapter(tmp_path / "base", tmp_path / "adapter")


def test_merged_experts_take_other_names_and_shapes(tmp_path) -> None:
    """Stacked by a mapping after the merge, as the merged model is by the same mapping."""
    expected = make(tmp_path, "experts that files have apart")
    source = with_adapter(tmp_path / "base", tmp_path / "adapter")
    names = "mixtral-hf:mixtral-nnx-scan"
    convert(source, tmp_path / "one", names=names, **QUICK)
    convert(tmp_path / "expected", tmp_path / "other", names=names, **QUICK)
    assert expected
    for name, x in weights(tmp_path / "other").items():
        torch.testing.assert_close(weights(tmp_path / "one")[name], x, rtol=1e-6, atol=1e-7)


def test_experts_of_a_base_in_ranks_are_merged(tmp_path) -> None:
    expected = make(tmp_path, "stacks of (in, out)")
    how = {"unmatched": "replicate", "rules": read_rules(STACKED, "test"), **QUICK}
    convert(tmp_path / "base", tmp_path / "cut", "dp2mp2ep2", **how)
    how = {"adapter": tmp_path / "adapter", **QUICK}
    merge_lora(tmp_path / "cut", tmp_path / "same", "same", **how)
    convert(tmp_path / "same", tmp_path / "m", **QUICK)
    for name, x in weights(tmp_path / "m").items():
        torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-7, msg=name)


# --- names that differ ------------------------------------------------------------------------


def renamed(folder: Path, out: Path, old: str, new: str) -> Path:
    """``folder`` with ``old`` in its tensors' names replaced."""
    tensors = {n.replace(old, new): x for n, x in weights(folder).items()}
    out.mkdir()
    transformers.utils.logging.disable_progress_bar()
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


def test_names_found_by_a_renaming_of_transformers_are_noted(tmp_path) -> None:
    make(tmp_path, "Qwen2.5-VL")
    report = merge_lora(tmp_path / "base", tmp_path / "m", adapter=tmp_path / "adapter", **QUICK)
    (note,) = [n for n in report.notes if "names of the adapter" in n]
    assert "are those of transformers in memory" in note
    assert "(model.language_model.layers.0." in note


@pytest.mark.parametrize("kind", ["dict", "text", "file", "mapping", "command line"])
def test_other_names_are_passed_as_in_the_message(tmp_path, kind) -> None:
    expected = make(tmp_path, "experts that files have apart")
    stem = "layers.0.block_sparse_moe"
    base = renamed(tmp_path / "base", tmp_path / "own", "block_sparse_moe", "mixture")
    with pytest.raises(NotFoundError) as caught:
        with_adapter(base, tmp_path / "adapter")
    assert "but " + str(base) + " has no such tensor among its" in str(caught.value)
    assert "Did you mean model.layers.0.mixture.experts." in str(caught.value)
    rule = ("model.layers.{layer}.mlp.{x*}", "model.layers.{layer}.mixture.{x*}")
    assert f'adapter_names={{"{rule[0]}": "{rule[1]}"}}' in str(caught.value)
    assert f'(--adapter-names "{rule[0]}={rule[1]}")' in str(caught.value)
    out = tmp_path / "m"
    if kind == "command line":
        args = ("lora", base, out, "--adapter", tmp_path / "adapter", "--quiet")
        assert checkpoints.run(*args, "--adapter-names", "=".join(rule)) == 0
    else:
        from jaxshard.mapping import Mapping, Rename, write_mapping  # noqa: PLC0415

        mapping = Mapping((Rename((rule,)),))
        (tmp_path / "own.toml").write_text(write_mapping(mapping))
        given = {
            "dict": dict([rule]),
            "text": "=".join(rule),
            "file": tmp_path / "own.toml",
            "mapping": mapping,
        }[kind]
        how = {"adapter": tmp_path / "adapter", "adapter_names": given, **QUICK}
        merge_lora(base, out, **how)
    made = weights(out)
    for name, x in expected.items():
        own = name.replace("block_sparse_moe", "mixture")
        torch.testing.assert_close(made[own], x, rtol=1e-6, atol=1e-7, msg=stem)


def test_two_renamings_that_lead_somewhere_are_not_chosen_between(tmp_path) -> None:
    make(tmp_path, "LLaVA")
    tensors = weights(tmp_path / "base")
    twice = {n.replace("language_model.model.", "language_model."): x for n, x in tensors.items()}
    (tmp_path / "both").mkdir()
    from safetensors.torch import save_file  # noqa: PLC0415

    both = {n: x.clone() for n, x in (tensors | twice).items()}
    save_file(both, tmp_path / "both" / "model.safetensors", {"format": "pt"})
    with pytest.raises(LayoutError, match=r"may be any of language_model.*adapter_names="):
        with_adapter(tmp_path / "both", tmp_path / "adapter")
    given = {"model.language_model.{x*}": "language_model.model.{x*}"}
    made = with_adapter(tmp_path / "both", tmp_path / "adapter", adapter_names=given)
    assert made.has_merged_adapters


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("nonsense", "is neither FROM=TO nor a TOML file"),
        ({"a.{x}": "b.{y}"}, "placeholders differ"),
    ],
)
def test_invalid_names_are_refused(tmp_path, given, told) -> None:
    make(tmp_path, "a router")
    with pytest.raises(LayoutError, match=told):
        with_adapter(tmp_path / "base", tmp_path / "adapter", adapter_names=given)


def test_a_mapping_that_does_more_than_rename_is_refused(tmp_path) -> None:
    from jaxshard.mapping import Mapping, Transpose  # noqa: PLC0415

    make(tmp_path, "a router")
    given = Mapping((Transpose(("{x*}.weight",)),))
    with pytest.raises(LayoutError, match="adapters can only be renamed"):
        with_adapter(tmp_path / "base", tmp_path / "adapter", adapter_names=given)


# --- configs and shapes that do not fit -------------------------------------------------------


def changed_config(folder: Path, **config: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize(
    ("config", "kind", "told"),
    [
        ({"target_parameters": []}, LayoutError, "does not list it in target_parameters"),
        ({"target_parameters": "experts"}, FormatError, "target_parameters is not a list of names"),
        ({"r": 8}, FormatError, "has rank 4 for each of 4 experts, but .* has 8"),
        (
            {"target_parameters": ["experts.left", "experts.right"]},
            NotFoundError,
            "adapts model.layers.0.mlp.experts.left, but",
        ),
        (
            {"target_parameters": ["experts.down_proj"]},
            LayoutError,
            "no pair of the adapter .* fits the parameters in its config",
        ),
    ],
)
def test_configs_that_do_not_fit_their_adapter_are_refused(tmp_path, config, kind, told) -> None:
    make(tmp_path, "experts that files have apart")
    changed_config(tmp_path / "adapter", **config)
    with pytest.raises(kind, match=told):
        with_adapter(tmp_path / "base", tmp_path / "adapter")


def test_a_base_with_other_experts_is_refused(tmp_path) -> None:
    make(tmp_path, "experts that files have apart")
    make(tmp_path / "other", "a single expert")
    with pytest.raises(FormatError, match="has rank 16, but"):
        with_adapter(tmp_path / "other" / "base", tmp_path / "adapter")


def test_square_stacks_of_an_unknown_family_are_noted_and_turned_on_request(tmp_path) -> None:
    expected = make(tmp_path, "square stacks of (in, out)")
    (tmp_path / "base" / "config.json").unlink()
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    assert any("its matrices are square" in n for n in with_adapter(base, adapter).notes)
    how = {"adapter": adapter, "fan_in_fan_out": True, **QUICK}
    merge_lora(base, tmp_path / "m", **how)
    made = weights(tmp_path / "m")
    for name, x in expected.items():
        torch.testing.assert_close(made[name], x, rtol=1e-6, atol=1e-7, msg=name)
