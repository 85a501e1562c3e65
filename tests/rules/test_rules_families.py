"""Rules of known families against the models themselves: transformers and peft are the oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rules_models import FAMILIES
from written_rules import MODEL_TYPES

from jaxshard.core.catalog import Model
from jaxshard.core.layout import Layout, Strategy
from jaxshard.core.patterns import template
from jaxshard.rules import layout, rules_for

# what these libraries warn of among themselves is not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore")

Shapes = dict[str, tuple[int, ...]]

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 8, "vocab_size": 127, "n_positions": 32},
    "bert": {**SMALL, "vocab_size": 122},
    "opt": {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 32},
    "falcon": {n: v for n, v in SMALL.items() if n != "head_dim"},
    "deepseek_v2": {**SMALL, "num_key_value_heads": 8, "head_dim": 8},
    "deepseek_v3": {**SMALL, "num_key_value_heads": 8, "head_dim": 8},
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert")
NO_PLAN = (*ENCODERS, "gpt2", "opt", "falcon", "bloom")  # transformers has none for these
TEXT = sorted(set(MODEL_TYPES) - {"gemma3"})  # the text half of gemma3 is gemma3_text


def build(kind: str, **changes: Any) -> Any:
    """A tiny model of the kind, with random weights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    config = transformers.AutoConfig.for_model(kind, **{**SPECIAL.get(kind, SMALL), **changes})
    auto = "AutoModelForMaskedLM" if kind in ENCODERS else "AutoModelForCausalLM"
    return getattr(transformers, auto).from_config(config)


def in_memory(model: Any) -> Shapes:
    return {n: tuple(t.shape) for n, t in model.state_dict().items()}


def on_disk(model: Any, folder: Path) -> Shapes:
    """Names and shapes as transformers writes them: experts one by one, tied heads left out."""
    safetensors = pytest.importorskip("safetensors")
    model.save_pretrained(folder)
    with safetensors.safe_open(folder / "model.safetensors", "np") as f:
        return {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}  # noqa: SIM118 - no mapping


def facts(model: Any) -> Model:
    config = model.config
    return Model(
        config.model_type, config.num_hidden_layers, config.tie_word_embeddings, config.to_dict()
    )


def check_fits(shapes: Shapes, model: Model) -> None:
    """Every name has a rule, every dim divides, every tensor has a stage."""
    rules = rules_for(model, shapes)
    for strategy in ("mp2", "mp4", "dp2mp2pp3", "dp4mp2ep4", "dp2mp2pp2ep2"):
        made = layout(shapes, Strategy.parse(strategy), rules, model)
        assert made.notes == (), strategy
        assert set(made.placements) == set(shapes)


@pytest.mark.parametrize("kind", TEXT)
def test_every_tensor_of_a_family_has_a_rule_that_fits(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    memory, disk, said = in_memory(model), on_disk(model, tmp_path), facts(model)
    assert len(memory) > 20
    check_fits(memory, said)
    check_fits(disk, said)


@pytest.mark.parametrize("kind", TEXT)
def test_names_alone_find_rules_that_cut_the_same(kind: str, tmp_path: Path) -> None:
    shapes = on_disk(build(kind), tmp_path)
    by_type, by_name = rules_for(Model(kind), shapes), rules_for(None, shapes)
    strategy = Strategy.parse("dp2mp2")
    assert layout(shapes, strategy, by_type) == layout(shapes, strategy, by_name)


def dim_of(made: Layout, name: str) -> int | None:
    """The dim that the tensor parallel ranks split."""
    spec = made.placements[name][0].spec
    return next((dim for dim, axes in enumerate(spec) if "mp" in axes), None)


@pytest.mark.parametrize("kind", [kind for kind in TEXT if kind not in NO_PLAN])
def test_the_rules_equal_the_tensor_parallel_plan_of_transformers(kind: str) -> None:
    model = build(kind)
    plan = model._tp_plan
    shapes = in_memory(model)
    made = layout(shapes, Strategy(mp=2), rules_for(Model(kind), shapes))
    compared = 0
    for name, shape in shapes.items():
        pattern = template(name).replace("#", "*")
        how = plan.get(pattern) or plan.get(pattern.removesuffix(".weight"))  # stacked: no .weight
        if how is None:
            continue
        compared += 1
        if "replicated" in how or how == "mla_kv_a_proj":  # the latent, whole on every rank
            assert dim_of(made, name) is None, name
        elif "colwise" in how or how == "embedding_rowwise":  # of (out, in): the rows
            assert dim_of(made, name) == len(shape) - 2, name
        else:
            assert "rowwise" in how
            assert dim_of(made, name) == len(shape) - 1, name
    assert compared >= 10


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_peft_fit(kind: str, dora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    safetensors = pytest.importorskip("safetensors")
    gpt2 = kind == "gpt2"
    columns, rows = ("c_attn", "c_proj") if gpt2 else ("q_proj", "o_proj")
    config = peft.LoraConfig(
        r=4, target_modules=[columns, rows], use_dora=dora, fan_in_fan_out=gpt2
    )
    model = build(kind)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "np") as f:
        disk = {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}  # noqa: SIM118
    rules = rules_for(Model(kind), disk)
    for shapes in (disk, in_memory(adapted)):
        made = layout(shapes, Strategy(mp=4), rules)
        for name in shapes:
            if "lora_A" in name:
                assert dim_of(made, name) == (1 if rows in name else None), name
            if "lora_B" in name:
                assert dim_of(made, name) == (0 if columns in name else None), name


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model."])
def test_a_prefix_of_a_larger_model_changes_nothing(prefix: str) -> None:
    shapes = {
        f"{prefix}embed_tokens.weight": (64, 32),
        **{f"{prefix}layers.{i}.self_attn.q_proj.weight": (32, 32) for i in range(4)},
        f"{prefix}norm.weight": (32,),
    }
    strategy = Strategy.parse("mp2pp2")
    made = layout(shapes, strategy, rules_for(None, shapes))
    assert made.notes == ()
    assert [made.placements[n][0].first_rank for n in shapes] == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_is_known_with_and_without_its_prefix(prefix: str) -> None:
    shapes = {f"{prefix}wte.weight": (50257, 64), f"{prefix}wpe.weight": (32, 64)}
    for i in range(2):
        shapes |= {
            f"{prefix}h.{i}.ln_1.weight": (64,),
            f"{prefix}h.{i}.attn.bias": (1, 1, 32, 32),
            f"{prefix}h.{i}.attn.c_attn.weight": (64, 192),
            f"{prefix}h.{i}.attn.c_attn.bias": (192,),
        }
    shapes[f"{prefix}ln_f.weight"] = (64,)
    tied = Model("gpt2", 2, tied_embeddings=True)
    assert rules_for(None, shapes).name == "gpt2"
    made = layout(shapes, Strategy.parse("mp4pp2"), rules_for(None, shapes), tied)
    assert made.notes == ()
    assert [p.first_rank for p in made.placements[f"{prefix}wte.weight"]] == [0, 4]
    assert dim_of(made, f"{prefix}h.0.attn.c_attn.weight") == 1
    assert made.placements[f"{prefix}ln_f.weight"][0].first_rank == 4


@pytest.mark.parametrize("prefix", ["", "bert.", "0.auto_model.", "roberta."])
def test_a_sentence_transformer_is_a_bert(prefix: str) -> None:
    layer = f"{prefix}encoder.layer.0."
    shapes = {
        f"{prefix}embeddings.word_embeddings.weight": (30522, 384),
        f"{prefix}embeddings.position_ids": (1, 512),
        f"{prefix}embeddings.position_embeddings.weight": (512, 384),
        f"{prefix}embeddings.LayerNorm.weight": (384,),
        f"{layer}attention.self.query.weight": (384, 384),
        f"{layer}attention.self.query.bias": (384,),
        f"{layer}attention.output.dense.weight": (384, 384),
        f"{layer}output.dense.bias": (384,),
        f"{prefix}pooler.dense.weight": (384, 384),
        f"{prefix}pooler.dense.bias": (384,),
    }
    assert rules_for(None, shapes).name == "bert"
    made = layout(shapes, Strategy(mp=8), rules_for(None, shapes))
    assert dim_of(made, f"{layer}attention.self.query.weight") == 0
    assert dim_of(made, f"{layer}attention.output.dense.weight") == 1
    assert dim_of(made, f"{prefix}pooler.dense.weight") is None


MINDFORMERS: Shapes = {
    "model.tok_embeddings.embedding_weight": (64, 32),
    "model.layers.0.attention.wq.weight": (32, 32),
    "model.layers.0.attention.w_qkv.weight": (64, 32),
    "model.layers.0.attention.w_qkv.bias": (64,),
    "model.layers.0.attention.wo.weight": (32, 32),
    "model.layers.0.feed_forward.w_gate_hidden.weight": (96, 32),
    "model.layers.1.feed_forward.w1.weight": (48, 32),
    "model.layers.1.feed_forward.w2.weight": (32, 48),
    "model.layers.1.attention_norm.weight": (32,),
    "model.norm_out.weight": (32,),
    "lm_head.weight": (64, 32),
}
MCORE: Shapes = {
    "embedding.word_embeddings.weight": (64, 32),
    "decoder.layers.0.input_layernorm.weight": (32,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (64, 32),
    "decoder.layers.0.self_attention.linear_proj.weight": (32, 32),
    "decoder.layers.0.self_attention.q_layernorm.weight": (8,),
    "decoder.layers.0.mlp.linear_fc1.weight": (96, 32),
    "decoder.layers.0.mlp.linear_fc2.weight": (32, 48),
    "decoder.layers.1.self_attention.linear_q.weight": (32, 32),
    "decoder.layers.1.self_attention.linear_q_down_proj.weight": (24, 32),
    "decoder.layers.1.self_attention.linear_kv_up_proj.weight": (64, 8),
    "decoder.layers.1.mlp.gating.weight": (48, 32),
    "decoder.layers.1.mlp.hidden.weight": (48, 32),
    "decoder.layers.1.pre_mlp_layernorm.weight": (32,),
    "decoder.layers.1.mlp.router.weight": (4, 32),
    "decoder.layers.1.mlp.router.expert_bias": (4,),
    "decoder.layers.1.mlp.experts.weight1": (4 * 32, 96),
    "decoder.layers.1.mlp.experts.weight2": (4 * 48, 32),
    "decoder.layers.1.mlp.shared_experts.linear_fc1.weight": (96, 32),
    "decoder.layers.1.mlp.experts.3.linear_fc2.weight": (32, 48),
    "decoder.final_layernorm.weight": (32,),
    "output_layer.weight": (64, 32),
    "mtp.layers.0.eh_proj.weight": (32, 64),
}


@pytest.mark.parametrize(("name", "shapes"), [("mindformers", MINDFORMERS), ("mcore", MCORE)])
def test_mindformers_names_are_known(name: str, shapes: Shapes) -> None:
    assert rules_for(None, shapes).name == name
    check_fits({n: s for n, s in shapes.items() if "experts.3." not in n}, Model("x", 3))


def test_stacked_experts_of_mindformers_are_cut_between_experts() -> None:
    made = layout(MCORE, Strategy.parse("dp2mp2ep2"), FAMILIES["mcore"])
    name = "decoder.layers.1.mlp.experts.weight1"
    assert [str(s.box) for s in made.placements[name][0].shards(MCORE[name])] == [
        "[0:64, 0:96]",
        "[64:128, 0:96]",
    ]
    assert made.placements["decoder.layers.1.mlp.experts.3.linear_fc2.weight"][0].first_rank == 2


def test_deepseeks_extra_tensors_have_homes() -> None:
    """Multi-token prediction and block scales, which transformers does not build."""
    shapes: Shapes = {f"model.layers.{i}.self_attn.o_proj.weight": (64, 64) for i in range(4)}
    extra: Shapes = {
        "model.layers.4.eh_proj.weight": (64, 128),
        "model.layers.4.enorm.weight": (64,),
        "model.layers.4.shared_head.norm.weight": (64,),
        "model.layers.4.shared_head.head.weight": (128, 64),
        "model.layers.4.embed_tokens.weight": (128, 64),
        "model.layers.4.mlp.experts.1.down_proj.weight_scale_inv": (2, 4),
        "model.layers.4.self_attn.kv_b_proj.weight_scale_inv": (4, 1),
    }
    strategy = Strategy.parse("dp2mp2pp2ep2")
    model = Model("deepseek_v3", 4, config={"n_routed_experts": 2})
    made = layout(shapes | extra, strategy, rules_for(model, shapes | extra), model)
    assert made.notes == ()
    assert {p.first_rank // 4 for n in extra for p in made.placements[n]} == {1}
    scale = made.placements["model.layers.4.mlp.experts.1.down_proj.weight_scale_inv"][0]
    assert str(scale) == "[-,mp] over edp1 mp2 from rank 6"


def _heads(hidden: int, heads: int, kv: int) -> dict[str, int]:
    return {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {**_heads(4096, 32, 32), "intermediate_size": 11008, "vocab_size": 32000}),
        ("llama", {**_heads(4096, 32, 8), "intermediate_size": 14336, "vocab_size": 128256}),
        ("qwen2", {**_heads(896, 14, 2), "intermediate_size": 4864, "vocab_size": 151936}),
        ("qwen2", {**_heads(3584, 28, 4), "intermediate_size": 18944, "vocab_size": 152064}),
        ("phi3", {**_heads(3072, 32, 32), "intermediate_size": 8192, "vocab_size": 32064}),
        ("gemma3_text", {**_heads(640, 4, 1), "intermediate_size": 2048, "vocab_size": 262144}),
        ("gpt2", {"n_embd": 1600, "n_head": 25, "vocab_size": 50257}),
        ("bert", {"hidden_size": 384, "intermediate_size": 1536, "vocab_size": 30522}),
        ("roberta", {"vocab_size": 50265}),
        ("opt", {"vocab_size": 50272}),
        ("gpt_neox", {"hidden_size": 512, "num_attention_heads": 8, "vocab_size": 50304}),
        ("falcon", {"hidden_size": 4544, "num_attention_heads": 71, "vocab_size": 65024}),
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("deepseek_v3", {"first_k_dense_replace": 1}),
    ],
)
def test_models_of_real_size_divide(kind: str, sizes: dict[str, int]) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    layers = {"n_layer" if kind == "gpt2" else "num_hidden_layers": 2}
    config = transformers.AutoConfig.for_model(kind, **sizes, **layers)
    auto = "AutoModelForMaskedLM" if kind in ENCODERS else "AutoModelForCausalLM"
    with torch.device("meta"):  # shapes, no memory
        shapes = in_memory(getattr(transformers, auto).from_config(config))
    for mp in (2, 4, 8):
        assert layout(shapes, Strategy(mp=mp), rules_for(Model(kind), shapes)).notes == ()
