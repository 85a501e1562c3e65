"""Models of several modalities: the text model by its table, the rest whole on the first stage."""

from __future__ import annotations

from typing import Any

import pytest
from rules_models import llama, mine

from jaxshard.core.catalog import Model
from jaxshard.core.layout import Strategy
from jaxshard.formats.huggingface import model_of
from jaxshard.models.facts import text_config
from jaxshard.rules import layout, rules_for
from jaxshard.rules.families import missing_parts
from jaxshard.rules.match import text_root, towers

pytestmark = pytest.mark.filterwarnings("ignore")  # of the oracles, among themselves

Shape = tuple[int, ...]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 48,
    "intermediate_size_mlp": 128,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,  # more than the text model has
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {"depth": 8, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
LLAVA = {"model_type": "clip_vision_model", "projection_dim": 32}
LLAMA4 = {"vision_output_dim": 64, "projector_input_dim": 32, "projector_output_dim": 64}
OMNI = {
    "audio_config": {
        "encoder_layers": 8,
        "d_model": 32,
        "encoder_attention_heads": 2,
        "num_mel_bins": 16,
        "output_dim": 64,
    },
    "vision_config": {**QWEN, "out_hidden_size": 64},
    "text_config": TEXT,
}
#: Kind, class, settings, the beginnings of the text model's names, and of the others.
REAL: list[tuple[str, str, dict[str, Any], set[str]]] = [
    (
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": TEXT,
            "vision_config": {**QWEN, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
        },
        {"model.visual.*"},
    ),
    (
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": TEXT,
            "vision_config": {**QWEN, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
        },
        {"model.visual.*"},
    ),
    (
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": TEXT, "vision_config": {**QWEN, "out_hidden_size": 64}},
        {"model.visual.*"},
    ),
    (
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {"text_config": TEXT, "vision_config": VISION},
        {"model.vision_tower.*", "model.multi_modal_projector.*"},
    ),
    (
        "llava",
        "LlavaForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": {**VISION, **LLAVA}},
        {"model.vision_tower.*", "model.multi_modal_projector.*"},
    ),
    (
        "llama4",
        "Llama4ForConditionalGeneration",
        {"text_config": TEXT, "vision_config": {**VISION, **LLAMA4}},
        {"vision_model.*", "multi_modal_projector.*"},
    ),
    (
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "mistral"},
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
        },
        {"model.vision_tower.*", "model.multi_modal_projector.*"},
    ),
    (
        "internvl",
        "InternVLForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        },
        {"model.vision_tower.*", "model.multi_modal_projector.*"},
    ),
    (
        "qwen2_5_omni_thinker",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        OMNI,
        {"model.visual.*", "model.audio_tower.*"},
    ),
    (
        "idefics3",
        "Idefics3ForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": VISION},
        {"model.vision_model.*", "model.connector.*"},
    ),
]


def real(kind: str, name: str, settings: dict[str, Any]) -> tuple[dict[str, Shape], Model]:
    """The shapes of a tiny model of transformers, without memory, and what its config says."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    config = mapping[kind](**settings)
    with torch.device("meta"):
        made = getattr(transformers, name)(config)
    return {n: tuple(t.shape) for n, t in made.state_dict().items()}, model_of(config.to_dict())


@pytest.mark.parametrize(("kind", "name", "settings", "apart"), REAL, ids=[r[0] for r in REAL])
@pytest.mark.parametrize("prefix", ["", "thinker."])
def test_the_text_model_takes_its_table_and_towers_are_whole_on_the_first_stage(
    kind, name, settings, apart, prefix
) -> None:
    shapes, model = real(kind, name, settings)
    shapes = {prefix + n: s for n, s in shapes.items()}
    rules = rules_for(model, shapes)
    assert set(rules.apart) == {prefix + p for p in apart}
    strategy = Strategy("dp2mp2pp2optall")
    made = layout(shapes, strategy, rules, model)
    text = {n for n in shapes if not any(n.startswith(p[:-1]) for p in rules.apart)}
    assert 0 < len(text) < len(shapes)
    assert made.notes[0].startswith(
        "not of the text model, whole on the ranks of the first stage: "
        f"{len(shapes) - len(text)} tensors: {prefix}"
    )
    for n in shapes.keys() - text:
        (placement,) = made.placements[n]
        assert (placement.first_rank, placement.num_ranks, placement.spec) == (0, 4, ()), n
    for n in text:
        layer = n.partition(".layers.")[2].partition(".")[0]
        if layer:
            assert [p.first_rank for p in made.placements[n]] == [4 * (int(layer) >= 2)], n
        if n.endswith(("q_proj.weight", "up_proj.weight", "embed_tokens.weight")):
            assert made.placements[n][0].spec[0][0] == "mp", n
        if n.endswith(("o_proj.weight", "shared_expert.down_proj.weight")):
            assert made.placements[n][0].spec[1] == ("mp",), n


OLD_NAMES = [
    (
        "qwen2_vl",
        "model.",
        ["visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.weight"],
        ("visual.*",),
    ),
    (
        "gemma3",
        "language_model.model.",
        [
            "vision_tower.vision_model.encoder.layers.9.self_attn.q_proj.weight",
            "multi_modal_projector.mm_input_projection_weight",
        ],
        ("vision_tower.*", "multi_modal_projector.*"),
    ),
    (
        "internvl_chat",
        "language_model.model.",
        ["vision_model.encoder.layers.9.mlp.fc1.weight", "mlp1.0.weight"],
        ("vision_model.*", "mlp1.*"),
    ),
    (
        "qwen2_5_omni",
        "thinker.model.",
        [
            "thinker.visual.blocks.0.mlp.gate_proj.weight",
            "thinker.audio_tower.layers.9.self_attn.q_proj.weight",
            "talker.model.layers.9.self_attn.q_proj.weight",
            "talker.model.embed_tokens.weight",
            "talker.codec_head.weight",
            "token2wav.code2wav_dit_model.transformer_blocks.9.attn.to_q.weight",
        ],
        ("thinker.visual.*", "thinker.audio_tower.*", "talker.*", "token2wav.*"),
    ),
    (
        "llava_next",
        "language_model.model.",
        ["image_newline", "vision_tower.vision_model.encoder.layers.9.mlp.fc1.weight"],
        ("image_newline", "vision_tower.*"),
    ),
    (
        "of words that nobody listed",
        "language_model.model.",
        ["sam.layers.9.mlp.up_proj.weight", "sam.layers.10.mlp.up_proj.weight", "glue.weight"],
        ("sam.*", "glue.*"),
    ),
]


@pytest.mark.parametrize(("kind", "root", "others", "apart"), OLD_NAMES)
def test_names_of_text_and_towers_are_distinguished(kind, root, others, apart) -> None:
    head = root.removesuffix("model.")
    text = {n.replace("model.", root, 1): s for n, s in llama(4, head=False).items()}
    text[f"{head}lm_head.weight"] = (64, 16)
    shapes: dict[str, Shape] = text | dict.fromkeys(others, (2, 2))
    model = Model(kind, 4, config={"text_config": {"model_type": "qwen2"}})
    rules = rules_for(model, shapes)
    assert rules.name.startswith("qwen2")
    assert sorted(rules.apart) == sorted(apart)
    made = layout(shapes, Strategy("mp2pp2"), rules, model)
    assert all(made.placements[n][0].first_rank == 0 for n in others)
    assert not any(made.placements[n][0].spec for n in others)
    alone = layout(text, Strategy("mp2pp2"), rules_for(model, text), model)
    assert {n: made.placements[n] for n in text} == dict(alone.placements)


def test_a_rule_of_the_users_own_cuts_a_tower() -> None:
    shapes = llama(2) | {"visual.blocks.0.q_proj.weight": (4, 4), "visual.norm.weight": (4,)}
    rules = rules_for(Model("x"), shapes).override(mine(**{"visual.*q_proj.weight": "mp,-"}))
    made = layout(shapes, Strategy("mp2pp2"), rules, Model("x", 2))
    assert made.placements["visual.blocks.0.q_proj.weight"][0].spec == (("mp",),)
    (note,) = made.notes
    assert note.endswith("1 tensor: visual.*.")


def test_a_text_model_alone_has_no_towers() -> None:
    names = [*llama(2), "model.layers.0.mlp.experts.0.vitality.weight"]
    assert towers(names, {"model_type": "llama"}) == ()
    assert text_root(names) == "model."
    assert rules_for(Model("llama"), names).apart == ()


def test_experts_for_images_in_a_layer_of_the_text_model_stay_in_their_layer() -> None:
    shapes = llama(4) | {"visual.norm.weight": (4,)}
    for i in range(4):
        shapes[f"model.layers.{i}.mlp.vision_moe.experts.0.up_proj.weight"] = (8, 4)
    rules = rules_for(Model("ernie4_5_vl_moe", 4), shapes)
    assert rules.apart == ("visual.*",)
    made = layout(shapes, Strategy("mp2pp2"), rules, Model("x", 4))
    for i in range(4):
        (placement,) = made.placements[f"model.layers.{i}.mlp.vision_moe.experts.0.up_proj.weight"]
        assert (placement.first_rank, placement.spec) == (2 * (i >= 2), (("mp",),))


def test_only_the_tensors_of_a_tower_can_be_laid_out() -> None:
    shapes = {"visual.blocks.0.q_proj.weight": (4, 4)}
    model = Model("qwen2_5_vl", config={"text_config": {"model_type": "qwen2_5_vl_text"}})
    made = layout(shapes, Strategy("mp2"), rules_for(model, shapes), model)
    assert made.placements["visual.blocks.0.q_proj.weight"][0].spec == ()


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": {"num_hidden_layers": 3}},
        {"llm_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 7}},
        {"language_config": {"num_hidden_layers": 3}},
        {"thinker_config": {"text_config": {"num_hidden_layers": 3}}, "talker_config": {}},
        {"num_hidden_layers": 3, "vision_config": {"depth": 7}},
        {"num_hidden_layers": 3, "text_config": "broken", "thinker_config": [1]},
    ],
)
def test_the_text_part_of_a_config_is_found(config) -> None:
    assert text_config(config)["num_hidden_layers"] == 3
    assert model_of(config).num_layers == 3


def test_layers_of_towers_and_names_of_other_frameworks_are_no_missing_layers() -> None:
    text = [n.replace("model.", "model.language_model.") for n in llama(4)]
    tower = [f"model.vision_tower.encoder.layers.{i}.q_proj.weight" for i in range(0, 9, 2)]
    model = Model("llava", 4, config={"text_config": {"model_type": "llama"}})
    assert missing_parts(model, text + tower) == ""
    assert missing_parts(model, [n for n in text if ".2." not in n] + tower) != ""
    other = [f"blocks.{i}.attn.q_proj.w" for i in range(4)] + ["final_norm.w", "lm_head.weight"]
    assert missing_parts(Model("llama", 4), other) == ""
