"""Rules by name: matching, cutting, stages, experts, and what is said when they do not fit."""

from __future__ import annotations

import pytest
from rules_models import FAMILIES, LLAMA, H, V, llama, mine, moe

from jaxshard.core.catalog import Model
from jaxshard.core.layout import Placement, Strategy
from jaxshard.core.patterns import template
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.rules import Rules, describe, layout, read_rules, rules_for
from jaxshard.rules.match import OPTIMIZER_PREFIXES, Matcher

# ---------------------------------------------------------------------------- matching


def test_the_first_pattern_that_matches_decides() -> None:
    rules = Rules("mine", specs=(("*.weight", "mp,-"), ("a.weight", "-,mp"), ("a.*", "-")))
    made = layout({"a.weight": (4, 4), "a.bias": (4,)}, Strategy(mp=2), rules)
    assert made.placements["a.weight"][0].spec == (("mp",),)
    assert made.placements["a.bias"][0].spec == ()


def test_a_rule_for_one_layer_is_for_that_layer_only() -> None:
    rules = LLAMA.override(mine(**{"model.layers.1.mlp.up_proj.weight": "-,-"}))
    made = layout(llama(12), Strategy(mp=2), rules)
    whole = [n for n, (p,) in made.placements.items() if "up_proj" in n and not p.spec]
    assert whole == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("num_layers", [4, 400])
def test_patterns_are_compared_once_with_each_kind_of_name(num_layers: int) -> None:
    matcher = Matcher(FAMILIES["decoder"])
    names = moe(num_layers, 64)
    for name in names:
        assert matcher.find(name, template(name)) is not None
    kinds = len({template(n) for n in names})
    assert kinds == 13
    assert 0 < matcher.patterns.num_compared <= kinds * len(FAMILIES["decoder"].specs)


def test_a_big_model_shares_its_placements() -> None:
    strategy = Strategy.parse("dp8mp2pp4ep8")
    made = layout(moe(60, 64), strategy, FAMILIES["decoder"])
    # per stage: split by rows, by columns, whole; and experts by rows and columns in 8 slots
    assert len({id(p) for placed in made.placements.values() for p in placed}) <= 4 * (3 + 2 * 8)


@pytest.mark.parametrize("prefix", OPTIMIZER_PREFIXES)
def test_an_optimizer_state_is_placed_like_its_weight(prefix: str) -> None:
    shapes = llama(4)
    strategy = Strategy.parse("dp2mp2pp2optall")
    made = layout(shapes | {prefix + n: s for n, s in shapes.items()}, strategy, LLAMA)
    assert all(made.placements[prefix + n] == made.placements[n] for n in shapes)


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("self_attn.q_proj.lora_A.weight", (4, H), ()),
        ("self_attn.q_proj.lora_B.weight", (H, 4), (("mp",),)),
        ("self_attn.o_proj.lora_A.default.weight", (4, H), ((), ("mp",))),
        ("self_attn.o_proj.lora_B.default.weight", (H, 4), ()),
        ("self_attn.o_proj.mindpet_delta_lora_a", (4, H), ((), ("mp",))),
        ("self_attn.q_proj.mindpet_delta_lora_b", (H, 4), (("mp",),)),
        ("self_attn.q_proj.lora_a", (4, H), ()),
        ("self_attn.q_proj.lora_b", (H, 4), (("mp",),)),
        ("self_attn.q_proj.base_layer.weight", (H, H), (("mp",),)),
        ("self_attn.q_proj.lora_magnitude_vector", (H,), ()),
        ("self_attn.q_proj.weight_scale_inv", (2, 2), (("mp",),)),
        ("self_attn.o_proj.weight_scale_inv", (2, 2), ((), ("mp",))),
    ],
)
def test_adapters_and_scales_follow_their_weight(
    name: str, shape: tuple[int, ...], spec: tuple[tuple[str, ...], ...]
) -> None:
    full = f"base_model.model.model.layers.0.{name}"
    assert layout({full: shape}, Strategy(mp=2), LLAMA).placements[full][0].spec == spec


def test_an_adapter_of_an_embedding_is_cut_on_the_side_its_weight_is() -> None:
    shapes = {"embed_tokens.lora_embedding_A": (4, V), "embed_tokens.lora_embedding_B": (H, 4)}
    made = layout(shapes, Strategy(mp=2), LLAMA)
    assert [p.spec for (p,) in made.placements.values()] == [((), ("mp",)), ()]


# ---------------------------------------------------------------------------- cutting


@pytest.mark.parametrize(
    ("strategy", "text", "spec"),
    [
        ("dp2mp2", "mp,-", (("mp",),)),
        ("dp2mp2", "-,tp", ((), ("mp",))),
        ("dp2mp2", "dp+mp,-", (("dp", "mp"),)),
        ("dp2mp2", "mp+dp,-", (("mp", "dp"),)),
        ("dp2", "mp,-", ()),
        ("mp2", "ep,-,mp", ((), (), ("mp",))),
        ("dp4mp2ep2", "ep,-,mp", (("ep",), (), ("mp",))),
        ("dp4mp2ep2", "dp,-", (("ep", "edp"),)),
        ("dp4mp2ep4", "edp,-", ()),
        ("dp4mp2", "edp,-", (("dp",),)),
        ("dp2cp2mp2", "cp+mp,-", (("cp", "mp"),)),
        ("dp2mp2", "-", ()),
        ("dp2mp2", "vocab,-", (("mp",),)),
    ],
)
def test_a_spec_names_the_axes_that_the_strategy_has(
    strategy: str, text: str, spec: tuple[tuple[str, ...], ...]
) -> None:
    shape = (8,) * (text.count(",") + 1)
    (placement,) = layout({"w": shape}, Strategy.parse(strategy), mine(w=text)).placements["w"]
    assert placement.spec == spec


def test_vocab_is_no_axis_when_the_embedding_stays_whole() -> None:
    made = layout(llama(), Strategy(mp=2, vocab_emb_dp=True), LLAMA)
    assert made.placements["model.embed_tokens.weight"][0].spec == ()
    assert made.placements["lm_head.weight"][0].spec == (("mp",),)


def test_one_axis_does_not_split_two_dims() -> None:
    with pytest.raises(LayoutError, match="names the axis mp twice"):
        mine(w="mp,mp")
    with pytest.raises(LayoutError, match="uses an axis twice for dp2mp2"):
        layout({"w": (4, 4)}, Strategy.parse("dp2mp2"), mine(w="vocab,mp"))
    with pytest.raises(LayoutError, match="uses an axis twice for dp2mp1ep2"):
        layout({"w": (4, 4)}, Strategy.parse("dp2ep2"), mine(w="ep,dp"))


def test_names_without_a_rule_are_one_error() -> None:
    shapes = llama(3) | {f"model.layers.{i}.novel.weight": (3, 5) for i in range(3)}
    shapes |= {"odd.table": (4, 4, 4)}
    with pytest.raises(LayoutError) as caught:
        layout(shapes, Strategy(mp=2), LLAMA)
    message = str(caught.value)
    assert message.startswith("none of the rules llama matches 4 tensors: ")
    assert "model.layers.0.novel.weight (3, 5) (and 2 like it), odd.table (4, 4, 4)" in message
    assert '"model.layers.*.novel.weight" = "-,-"' in message
    assert 'unmatched="replicate"' in message
    fixed = LLAMA.override(mine(**{"model.layers.*.novel.weight": "-,-", "odd.*": "-"}))
    assert layout(shapes, Strategy(mp=2), fixed).notes == ()


def test_a_slip_in_a_name_is_shown_the_rule_that_nearly_fits() -> None:
    with pytest.raises(LayoutError, match=r'The rule "lm_head.wieght" is close'):
        layout({"lm_head.weight": (4, 4)}, Strategy(mp=2), mine(**{"lm_head.wieght": "-"}))


def test_unmatched_names_are_replicated_on_request_with_a_note() -> None:
    shapes = llama(4) | {"model.layers.3.novel.weight": (3, 5)}
    strategy = Strategy.parse("mp2pp2")
    made = layout(shapes, strategy, LLAMA, unmatched="replicate")
    assert made.placements["model.layers.3.novel.weight"] == (
        Placement(strategy.stage_axes, (), first_rank=2),
    )
    (note,) = made.notes
    assert note.startswith("no rule matches 1 tensor, ")
    assert "model.layers.3.novel.weight" in note


def test_dims_that_do_not_divide_are_one_error() -> None:
    shapes = llama(3) | {"lm_head.weight": (V + 1, H), "model.embed_tokens.weight": (V + 1, H)}
    with pytest.raises(LayoutError) as caught:
        layout(shapes, Strategy(mp=4), LLAMA)
    message = str(caught.value)
    assert message.startswith("dp1mp4 does not divide 2 dims: model.embed_tokens.weight dim 0")
    assert "dim 0 of (65, 16) has 65, not divided by mp=4 (pad to 68)" in message
    assert '"model.embed_tokens.weight" = "-"' in message
    assert 'uneven="replicate"' in message


def test_uneven_dims_are_left_whole_on_request_with_a_note() -> None:
    shapes = llama() | {"lm_head.weight": (V + 1, H)}
    made = layout(shapes, Strategy(mp=4), LLAMA, uneven="replicate")
    assert made.placements["lm_head.weight"][0].spec == ()
    assert made.placements["model.embed_tokens.weight"][0].spec == (("mp",),)
    (note,) = made.notes
    assert note.startswith("left whole, because it does not divide: 1 dim: lm_head.weight dim 0")


def test_a_rule_must_have_the_dims_of_its_tensor() -> None:
    with pytest.raises(LayoutError, match=r'w has shape \(2, 4, 4\), its rule is "mp,-"'):
        layout({"w": (2, 4, 4)}, Strategy(mp=2), mine(w="mp,-"))
    with pytest.raises(LayoutError, match=r"the rule does not have the dims of 1 tensor"):
        layout({"w": ()}, Strategy(mp=2), mine(w="mp"))
    assert layout({"w": (2, 4, 4)}, Strategy(mp=2), mine(w="-")).placements["w"][0].spec == ()


@pytest.mark.parametrize("policy", ["unmatched", "uneven"])
def test_a_policy_is_one_of_two(policy: str) -> None:
    with pytest.raises(LayoutError, match=f"{policy}='pad'"):
        layout({}, Strategy(), LLAMA, **{policy: "pad"})  # type: ignore[arg-type]


def test_a_user_rule_that_matches_nothing_is_noted() -> None:
    user = read_rules('[specs]\n"lm_head.wieght" = "-,-"\n"model.norm.*" = "-"')
    made = layout(llama(), Strategy(mp=2), LLAMA.override(user))
    assert made.notes == ('the rules for "lm_head.wieght" match no tensor.',)


# ---------------------------------------------------------------------------- optimizer shard


def test_the_optimizer_shard_is_mindspores() -> None:
    # what MindSpore itself gave rank 5 of dp4 mp2 with an optimizer shard of 2
    shapes = {
        "model.layers.0.attention.wq.weight": (32, 32),
        "model.layers.0.attention.wo.weight": (32, 32),
        "model.layers.0.attention_norm.weight": (32,),
        "model.layers.0.attention.odd_bias": (7, 5),
    }
    made = layout(shapes, Strategy.parse("dp4mp2opt2"), FAMILIES["mindformers"])
    boxes = [str(made.box_of(name, shape, 5)) for name, shape in shapes.items()]
    assert boxes == ["[16:24, 0:32]", "[0:16, 16:32]", "[16:32]", "[0:7, 0:5]"]
    assert len(made.notes) == 1
    assert "odd_bias dim 0 has 7, not divided by 2" in made.notes[0]


def test_an_optimizer_shard_that_fits_nothing_is_refused() -> None:
    with pytest.raises(LayoutError, match="the optimizer shard fits no tensor"):
        layout(llama(), Strategy.parse("dp2mp2opt3"), LLAMA)


def test_experts_with_too_few_replicas_stay_unsharded_with_a_note() -> None:
    made = layout(moe(), Strategy.parse("dp4mp2ep2opt4"), FAMILIES["decoder"])
    expert = made.placements["model.layers.0.mlp.experts.0.up_proj.weight"][0]
    assert expert.spec == (("mp",),)
    assert made.placements["lm_head.weight"][0].spec == (("mp", "ep", "edp"),)
    assert "experts.0.gate_proj.weight has 2 replicas (and 7 like it)" in made.notes[0]


# ---------------------------------------------------------------------------- which rules


def test_the_models_type_finds_its_rules() -> None:
    for kind, names, rules in [
        ("llama", llama(), "llama"),
        ("qwen2", [], "qwen2"),
        ("qwen3_moe", moe(), "qwen3_moe"),
        (None, llama(), "llama"),
        (None, moe(), "llama"),  # all families with these names
        ("a-new-llama", llama(), "llama"),
        (None, ["wte.weight", "h.0.ln_1.weight"], "gpt2"),
    ]:
        assert rules_for(Model(kind), names).name == rules


def test_names_of_another_framework_beside_a_config_are_seen() -> None:
    legacy = ["model.tok_embeddings.embedding_weight", "model.layers.0.attention.wq.weight"]
    mcore = [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
    ]
    assert rules_for(Model("llama"), legacy).name == "llama-mindformers"
    assert rules_for(Model("qwen3"), mcore).name == "qwen3-mcore-fused"
    assert rules_for(None, ["adam_m." + n for n in legacy]).name == "mindformers"


def test_an_unknown_model_needs_rules() -> None:
    with pytest.raises(NotFoundError) as caught:
        rules_for(Model("qwen2_mo"), ["a.b", "c.d"])
    assert "unknown model_type 'qwen2_mo' and tensor names (a.b, c.d)" in str(caught.value)
    assert "Did you mean" not in str(caught.value)  # a type of that name is another architecture
    assert "[specs]" in str(caught.value)
    with pytest.raises(NotFoundError, match="no model_type, and unknown tensor names"):
        rules_for(None, ["a.b"])


def test_rules_print_as_a_table() -> None:
    text = describe(LLAMA)
    assert "*.q_proj.weight" in text
    assert "layers: *model.layers.{layer}." in text
