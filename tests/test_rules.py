"""Rules by name: matching, cutting, stages, experts, and what is said when they do not fit."""

from __future__ import annotations

import re
from collections import Counter
from math import prod

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxshard.catalog import Model
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.layout import Layout, Placement
from jaxshard.rules import Rules, describe, layout, read_rules, rules_for, split_layers
from jaxshard.rules.families import FAMILIES
from jaxshard.rules.match import OPTIMIZER_PREFIXES, Matcher, Patterns, template
from jaxshard.rules.table import Glob
from jaxshard.strategy import Strategy

H, F, V = 16, 32, 64

LAYER = {
    "self_attn.q_proj.weight": (H, H),
    "self_attn.k_proj.weight": (H, H),
    "self_attn.v_proj.weight": (H, H),
    "self_attn.o_proj.weight": (H, H),
    "mlp.gate_proj.weight": (F, H),
    "mlp.up_proj.weight": (F, H),
    "mlp.down_proj.weight": (H, F),
    "input_layernorm.weight": (H,),
    "post_attention_layernorm.weight": (H,),
}


def llama(num_layers: int = 2, head: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H)}
    for i in range(num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in LAYER.items()}
    shapes["model.norm.weight"] = (H,)
    if head:
        shapes["lm_head.weight"] = (V, H)
    return shapes


def moe(num_layers: int = 2, num_experts: int = 4) -> dict[str, tuple[int, ...]]:
    shapes = {n: s for n, s in llama(num_layers).items() if ".mlp." not in n}
    for i in range(num_layers):
        shapes[f"model.layers.{i}.mlp.gate.weight"] = (num_experts, H)
        for e in range(num_experts):
            for name, shape in LAYER.items():
                if name.startswith("mlp."):
                    shapes[f"model.layers.{i}.mlp.experts.{e}.{name[4:]}"] = shape
    return shapes


def stages_of(made: Layout, name: str, strategy: Strategy) -> list[int]:
    return [p.first_rank // strategy.stage_ranks for p in made.placements[name]]


def mine(**specs: str) -> Rules:
    return Rules("mine", specs=tuple(specs.items()))


LLAMA = FAMILIES["llama"]


# ---------------------------------------------------------------------------- matching


@given(
    st.lists(st.sampled_from(["a", "b", "ab", ".", "*"]), max_size=8).map("".join),
    st.lists(st.sampled_from(["a", "b", "."]), max_size=10).map("".join),
)
def test_a_star_is_any_characters(pattern: str, name: str) -> None:
    oracle = ".*".join(re.escape(part) for part in pattern.split("*"))
    assert Glob(pattern).matches(name) == bool(re.fullmatch(oracle, name, re.DOTALL))


_names = st.builds(
    "{}.{}.{}.{}".format,
    st.sampled_from(["layers", "x"]),
    st.integers(0, 12),
    st.sampled_from(["experts.3", "w1", "w2", "1"]),
    st.sampled_from(["weight", "bias"]),
)
_patterns = st.sampled_from(
    ["*", "layers.1.*", "*.1.*", "*.w1.weight", "*1.weight", "*.w*.bias", "x.*.weight", "*.12.*"]
)


@given(st.lists(_patterns, max_size=5), st.lists(_names, max_size=12))
def test_remembering_kinds_of_names_changes_no_answer(
    patterns: list[str], names: list[str]
) -> None:
    remembered = Patterns(patterns)
    for name in names:
        plain = next((i for i, p in enumerate(patterns) if Glob(p).matches(name)), None)
        assert remembered.find(name, template(name)) == plain


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
def test_patterns_are_asked_once_for_each_kind_of_name(num_layers: int) -> None:
    matcher = Matcher(FAMILIES["mixtral"])
    names = moe(num_layers, 64)
    for name in names:
        assert matcher.find(name, template(name)) is not None
    kinds = len({template(n) for n in names})
    assert kinds == 13
    assert 0 < matcher.patterns.num_asked <= kinds * len(FAMILIES["mixtral"].specs)


def test_a_big_model_shares_its_placements() -> None:
    strategy = Strategy.parse("dp8mp2pp4ep8")
    made = layout(moe(60, 64), strategy, FAMILIES["mixtral"])
    # per stage: split by rows, by columns, whole; and experts by rows and columns in 8 slots
    assert len({id(p) for placed in made.placements.values() for p in placed}) <= 4 * (3 + 2 * 8)


@pytest.mark.parametrize("prefix", OPTIMIZER_PREFIXES)
def test_an_optimizer_state_lies_as_its_weight_does(prefix: str) -> None:
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
    assert message.startswith("4 tensors match none of the rules llama: ")
    assert "model.layers.0.novel.weight (3, 5) (and 2 like it), odd.table (4, 4, 4)" in message
    assert '"model.layers.*.novel.weight" = "-,-"' in message
    assert 'unmatched="replicate"' in message
    fixed = LLAMA.override(mine(**{"model.layers.*.novel.weight": "-,-", "odd.*": "-"}))
    assert layout(shapes, Strategy(mp=2), fixed).notes == ()


def test_a_slip_in_a_name_is_shown_the_rule_that_nearly_fits() -> None:
    with pytest.raises(LayoutError, match=r'The rule "lm_head.wieght" nearly fits'):
        layout({"lm_head.weight": (4, 4)}, Strategy(mp=2), mine(**{"lm_head.wieght": "-"}))


def test_unmatched_names_are_replicated_when_asked_and_said() -> None:
    shapes = llama(4) | {"model.layers.3.novel.weight": (3, 5)}
    strategy = Strategy.parse("mp2pp2")
    made = layout(shapes, strategy, LLAMA, unmatched="replicate")
    assert made.placements["model.layers.3.novel.weight"] == (
        Placement(strategy.stage_axes, (), first_rank=2),
    )
    (note,) = made.notes
    assert note.startswith("1 tensors match no rule")
    assert "model.layers.3.novel.weight" in note


def test_dims_that_do_not_divide_are_one_error() -> None:
    shapes = llama(3) | {"lm_head.weight": (V + 1, H), "model.embed_tokens.weight": (V + 1, H)}
    with pytest.raises(LayoutError) as caught:
        layout(shapes, Strategy(mp=4), LLAMA)
    message = str(caught.value)
    assert message.startswith("2 dims do not divide for dp1mp4: model.embed_tokens.weight dim 0")
    assert "dim 0 of (65, 16) has 65, not divided by mp=4 (pad to 68)" in message
    assert '"model.embed_tokens.weight" = "-"' in message
    assert 'uneven="replicate"' in message


def test_uneven_dims_are_left_whole_when_asked_and_said() -> None:
    shapes = llama() | {"lm_head.weight": (V + 1, H)}
    made = layout(shapes, Strategy(mp=4), LLAMA, uneven="replicate")
    assert made.placements["lm_head.weight"][0].spec == ()
    assert made.placements["model.embed_tokens.weight"][0].spec == (("mp",),)
    (note,) = made.notes
    assert note.startswith("1 dims do not divide and are left whole: lm_head.weight dim 0")


def test_a_rule_must_have_the_dims_of_its_tensor() -> None:
    with pytest.raises(LayoutError, match=r'w has shape \(2, 4, 4\), its rule is "mp,-"'):
        layout({"w": (2, 4, 4)}, Strategy(mp=2), mine(w="mp,-"))
    with pytest.raises(LayoutError, match=r"1 tensors do not have the dims"):
        layout({"w": ()}, Strategy(mp=2), mine(w="mp"))
    assert layout({"w": (2, 4, 4)}, Strategy(mp=2), mine(w="-")).placements["w"][0].spec == ()


@pytest.mark.parametrize("policy", ["unmatched", "uneven"])
def test_a_policy_is_one_of_two(policy: str) -> None:
    with pytest.raises(LayoutError, match=f"{policy}='pad'"):
        layout({}, Strategy(), LLAMA, **{policy: "pad"})  # type: ignore[arg-type]


def test_a_users_rule_that_decides_nothing_is_said() -> None:
    user = read_rules('[specs]\n"lm_head.wieght" = "-,-"\n"model.norm.*" = "-"')
    made = layout(llama(), Strategy(mp=2), LLAMA.override(user))
    assert made.notes == ('no tensor follows the rules for "lm_head.wieght".',)


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


def test_experts_with_too_few_replicas_stay_unsharded_and_are_said() -> None:
    made = layout(moe(), Strategy.parse("dp4mp2ep2opt4"), FAMILIES["mixtral"])
    expert = made.placements["model.layers.0.mlp.experts.0.up_proj.weight"][0]
    assert expert.spec == (("mp",),)
    assert made.placements["lm_head.weight"][0].spec == (("mp", "ep", "edp"),)
    assert "experts.0.gate_proj.weight has 2 replicas (and 7 like it)" in made.notes[0]


# ---------------------------------------------------------------------------- stages


@given(st.integers(1, 40), st.integers(1, 12))
def test_layers_are_split_as_evenly_as_possible(num_layers: int, pp: int) -> None:
    each = split_layers(num_layers, pp)
    assert sum(each) == num_layers
    assert list(each) == sorted(each, reverse=True)
    assert max(each) - min(each) <= 1


def test_names_go_to_the_stage_of_their_layer() -> None:
    strategy = Strategy.parse("dp2mp2pp2")
    made = layout(llama(5), strategy, LLAMA)
    stages = {n: stages_of(made, n, strategy) for n in made.placements}
    assert stages["model.embed_tokens.weight"] == [0]
    assert [stages[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(5)] == [
        [0], [0], [0], [1], [1],
    ]  # fmt: skip
    assert stages["model.norm.weight"] == stages["lm_head.weight"] == [1]
    assert made.notes == ()


def test_a_user_says_how_many_layers_each_stage_has() -> None:
    rules = LLAMA.override(read_rules("[stages]\nlayers_per_stage = [1, 4]"))
    strategy = Strategy.parse("pp2")
    made = layout(llama(5), strategy, rules)
    assert stages_of(made, "model.layers.1.mlp.up_proj.weight", strategy) == [1]
    with pytest.raises(LayoutError, match=r"layers_per_stage = \[1, 4\] .* add up to 6"):
        layout(llama(6), strategy, rules)
    assert layout(llama(6), Strategy(mp=2), rules).num_ranks == 2  # one stage needs no split


def test_layers_past_the_models_own_go_to_the_last_stage() -> None:
    strategy = Strategy.parse("pp2")
    made = layout(llama(5), strategy, LLAMA, Model("deepseek_v3", num_layers=4))
    homes = [stages_of(made, f"model.layers.{i}.mlp.up_proj.weight", strategy) for i in range(5)]
    assert homes == [[0], [0], [1], [1], [1]]


def test_a_tied_embedding_lives_in_the_first_and_the_last_stage() -> None:
    strategy = Strategy.parse("mp2pp3")
    tied = Model("llama", num_layers=6, tied_embeddings=True)
    name = "model.embed_tokens.weight"
    states = {f"adam_m.{name}": (V, H)}
    made = layout(llama(6, head=False) | states, strategy, LLAMA, tied)
    assert stages_of(made, name, strategy) == [0, 2]
    assert stages_of(made, f"adam_m.{name}", strategy) == [0, 2]
    assert stages_of(layout(llama(6), strategy, LLAMA, tied), name, strategy) == [0]
    one = layout(llama(6, head=False), Strategy(mp=2), LLAMA, tied)
    assert len(one.placements[name]) == 1


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(LayoutError, match="4 pipeline stages, but 3 layers"):
        layout(llama(3), Strategy(pp=4), LLAMA)
    with pytest.raises(LayoutError, match="do not say which names have a layer"):
        layout({"w": (4,)}, Strategy(pp=2), mine(w="-"))
    wrong = Rules("wrong", specs=LLAMA.specs, layers=("blocks.{layer}.",))
    with pytest.raises(LayoutError, match=r"but 0 layers by the names \(blocks"):
        layout(llama(3), Strategy(pp=2), wrong, Model("llama", num_layers=3))


def test_a_hostile_layer_number_costs_nothing() -> None:
    shapes = llama(2) | {f"model.layers.{'9' * n}.mlp.up_proj.weight": (F, H) for n in (9, 5000)}
    made = layout(shapes, Strategy(pp=2), LLAMA, unmatched="replicate")
    assert set(made.placements) == set(shapes)


def test_tables_that_are_no_weights_are_on_every_rank() -> None:
    strategy = Strategy.parse("dp2mp2pp2optall")
    shapes = llama(2) | {"model.rotary_emb.inv_freq": (8,), "global_step": (1,)}
    made = layout(shapes, strategy, LLAMA, hyper=frozenset({"global_step"}))
    everywhere = (Placement((("all", 8),)),)
    assert made.placements["model.rotary_emb.inv_freq"] == everywhere
    assert made.placements["global_step"] == everywhere
    assert made.notes == ()


def test_a_weight_of_no_stage_is_held_by_every_stage_and_said() -> None:
    rules = LLAMA.override(mine(novel="mp,-", other="-"))
    made = layout(llama(2) | {"novel": (4, 4), "other": (3,)}, Strategy.parse("mp2pp2"), rules)
    assert [str(p) for p in made.placements["novel"]] == [
        "[mp] over dp1 mp2 from rank 0",
        "[mp] over dp1 mp2 from rank 2",
    ]
    assert made.placements["other"] == (Placement((("all", 4),)),)
    assert made.notes == (
        "2 tensors belong to no stage and are held by every stage: novel, other.",
    )


# ---------------------------------------------------------------------------- experts


def test_an_expert_lives_on_the_ranks_of_its_slot() -> None:
    strategy = Strategy.parse("dp4mp2ep2pp2")
    made = layout(moe(), strategy, FAMILIES["mixtral"])
    name = "model.layers.{}.mlp.experts.{}.down_proj.weight"
    assert [str(made.placements[name.format(1, e)][0]) for e in (0, 1, 2, 3)] == [
        "[-,mp] over edp2 mp2 from rank 8",
        "[-,mp] over edp2 mp2 from rank 8",
        "[-,mp] over edp2 mp2 from rank 12",
        "[-,mp] over edp2 mp2 from rank 12",
    ]
    held = Counter(
        rank
        for n, placed in made.placements.items()
        if ".experts." in n
        for p in placed
        for rank in p.ranks
    )
    assert held == dict.fromkeys(range(16), 2 * 3)  # two experts of one layer each


def test_the_number_of_experts_is_the_configs() -> None:
    config = {"num_experts": 8}
    made = layout(moe(), Strategy.parse("dp4ep4"), FAMILIES["mixtral"], Model(config=config))
    names = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(4)]
    assert [made.placements[n][0].first_rank for n in names] == [0, 0, 1, 1]
    with pytest.raises(LayoutError, match="there are 2 experts by the model's config"):
        layout(
            moe(), Strategy.parse("dp2ep2"), FAMILIES["mixtral"], Model(config={"num_experts": 2})
        )


def test_experts_must_divide() -> None:
    with pytest.raises(LayoutError, match=r"ep=4 does not divide the 6 experts.*such as 3"):
        layout(moe(num_experts=6), Strategy.parse("dp4ep4"), FAMILIES["mixtral"])


def test_stacked_experts_are_cut_by_their_spec() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    made = layout({name: (4, 2 * F, H)}, Strategy.parse("dp4mp2ep2"), FAMILIES["mixtral"])
    assert made.placements[name][0].spec == (("ep",), ("mp",))


# ---------------------------------------------------------------------------- laws


@st.composite
def _strategies(draw: st.DrawFn) -> Strategy:
    ep = draw(st.sampled_from([1, 2, 4]))
    return Strategy(
        dp=ep * draw(st.sampled_from([1, 2])),
        mp=draw(st.sampled_from([1, 2, 4])),
        pp=draw(st.integers(1, 3)),
        ep=ep,
        cp=draw(st.sampled_from([1, 2])),
        optimizer_shard=draw(st.sampled_from([1, 2, -1])),
        vocab_emb_dp=draw(st.booleans()),
    )


@given(_strategies())
def test_every_rank_of_a_tensors_stage_holds_a_box_and_the_boxes_tile(strategy: Strategy) -> None:
    assume(strategy.stage_ranks > 1 or strategy.optimizer_shard != 2)  # no replica to cut
    shapes = moe(3)
    made = layout(shapes, strategy, FAMILIES["mixtral"])
    assert set(made.placements) == set(shapes)
    for name, shape in shapes.items():
        (placement,) = made.placements[name]
        shards = placement.shards(shape)
        assert sum(s.box.size for s in shards) == prod(shape)
        assert len({s.box for s in shards}) == len(shards)
        assert sorted(h for s in shards for h in s.holders) == list(range(placement.num_ranks))
        ep = strategy.ep if ".experts." in name else 1
        assert placement.num_ranks == strategy.stage_ranks // ep


@given(_strategies())
def test_no_layout_replicates_silently(strategy: Strategy) -> None:
    assume(strategy.stage_ranks > 1 or strategy.optimizer_shard != 2)
    shapes = moe(3)
    made = layout(shapes, strategy, FAMILIES["mixtral"])
    for name, shape in shapes.items():
        (placement,) = made.placements[name]
        whole = len(shape) == 1 or ".mlp.gate." in name
        whole |= "embed_tokens" in name and strategy.vocab_emb_dp
        by_columns = "o_proj" in name or "down_proj" in name
        ways = 1 if whole else strategy.mp
        replicas = placement.num_ranks // ways
        more = replicas if strategy.optimizer_shard == -1 else strategy.optimizer_shard
        fits = replicas % more == 0 and shape[0] % (more if by_columns else ways * more) == 0
        assert fits or made.notes
        assert len(placement.shards(shape)) == (ways * more if fits else ways)


# ---------------------------------------------------------------------------- which rules


def test_the_models_type_finds_its_rules() -> None:
    for kind, names, rules in [
        ("llama", llama(), "llama"),
        ("qwen2", [], "llama"),
        ("qwen3_moe", moe(), "mixtral"),
        (None, llama(), "llama"),
        (None, moe(), "mixtral"),
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
    assert rules_for(Model("llama"), legacy).name == "mindformers"
    assert rules_for(Model("qwen3"), mcore).name == "mindformers_mcore"
    assert rules_for(None, ["adam_m." + n for n in legacy]).name == "mindformers"


def test_a_model_that_nobody_knows_asks_for_rules() -> None:
    with pytest.raises(NotFoundError) as caught:
        rules_for(Model("qwen2_mo"), ["a.b", "c.d"])
    assert "'qwen2_mo' is not known, nor are the names (a.b, c.d)" in str(caught.value)
    assert "Did you mean qwen2_moe?" in str(caught.value)
    assert "[specs]" in str(caught.value)
    with pytest.raises(NotFoundError, match="no model_type is given"):
        rules_for(None, ["a.b"])


def test_rules_print_as_a_table() -> None:
    text = describe(LLAMA)
    assert "*.q_proj.weight" in text
    assert "layers: layers.{layer}., *model.layers.{layer}." in text
