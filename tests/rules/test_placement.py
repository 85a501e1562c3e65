"""Where tensors live: stages, experts, and laws that hold for every strategy."""

from __future__ import annotations

from collections import Counter
from math import prod

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rules_models import FAMILIES, LLAMA, F, H, V, llama, mine, moe, stages_of

from jaxshard.core.catalog import Model
from jaxshard.core.layout import Placement, Strategy
from jaxshard.errors import LayoutError
from jaxshard.rules import Rules, layout, read_rules, rules_for, split_layers

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


def test_a_user_sets_the_layers_of_each_stage() -> None:
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
    with pytest.raises(LayoutError, match="4 pipeline stages, but the names have 3 layers"):
        layout(llama(3), Strategy(pp=4), LLAMA)
    with pytest.raises(LayoutError, match="have no layer patterns"):
        layout({"w": (4,)}, Strategy(pp=2), mine(w="-"))
    wrong = Rules("wrong", specs=LLAMA.specs, layers=("blocks.{layer}.",))
    with pytest.raises(LayoutError, match=r"but the names have 0 layers \(blocks"):
        layout(llama(3), Strategy(pp=2), wrong, Model("llama", num_layers=3))


def test_a_hostile_layer_number_costs_nothing() -> None:
    shapes = llama(2) | {f"model.layers.{'9' * n}.mlp.up_proj.weight": (F, H) for n in (9, 5000)}
    made = layout(shapes, Strategy(pp=2), LLAMA, unmatched="replicate")
    assert set(made.placements) == set(shapes)


def test_tables_that_are_no_weights_are_on_every_rank() -> None:
    strategy = Strategy.parse("dp2mp2pp2optall")
    shapes = llama(2) | {"model.rotary_emb.inv_freq": (8,), "global_step": (1,)}
    made = layout(shapes, strategy, LLAMA, scalars=frozenset({"global_step"}))
    everywhere = (Placement((("all", 8),)),)
    assert made.placements["model.rotary_emb.inv_freq"] == everywhere
    assert made.placements["global_step"] == everywhere
    assert made.notes == ()


def test_a_table_that_is_no_weight_is_not_cut_by_the_optimizer_shard() -> None:
    shapes = llama(2) | {"model.rotary_emb.inv_freq": (8,)}
    made = layout(shapes, Strategy.parse("dp2mp2optall"), LLAMA)
    assert made.placements["model.rotary_emb.inv_freq"][0].spec == ()
    assert made.placements["model.norm.weight"][0].spec == (("dp", "mp"),)


def test_a_weight_without_a_stage_is_noted_and_held_by_every_stage() -> None:
    rules = LLAMA.override(mine(novel="mp,-", other="-"))
    made = layout(llama(2) | {"novel": (4, 4), "other": (3,)}, Strategy.parse("mp2pp2"), rules)
    assert [str(p) for p in made.placements["novel"]] == [
        "[mp] over dp1 mp2 from rank 0",
        "[mp] over dp1 mp2 from rank 2",
    ]
    assert made.placements["other"] == (Placement((("all", 4),)),)
    assert made.notes == ("without a stage, so held by every stage: 2 tensors: novel, other.",)


# ---------------------------------------------------------------------------- experts


def test_an_expert_lives_on_the_ranks_of_its_slot() -> None:
    strategy = Strategy.parse("dp4mp2ep2pp2")
    made = layout(moe(), strategy, FAMILIES["decoder"])
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
    made = layout(moe(), Strategy.parse("dp4ep4"), FAMILIES["decoder"], Model(config=config))
    names = [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(4)]
    assert [made.placements[n][0].first_rank for n in names] == [0, 0, 1, 1]
    with pytest.raises(LayoutError, match=r"config\.json has 2 experts"):
        layout(
            moe(), Strategy.parse("dp2ep2"), FAMILIES["decoder"], Model(config={"num_experts": 2})
        )


def test_experts_must_divide() -> None:
    with pytest.raises(LayoutError, match=r"ep=4 does not divide the 6 experts.*such as 3"):
        layout(moe(num_experts=6), Strategy.parse("dp4ep4"), FAMILIES["decoder"])


def test_stacked_experts_are_cut_by_their_spec() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    model = Model(config={"hidden_size": H})
    made = layout({name: (4, 2 * F, H)}, Strategy.parse("dp4mp2ep2"), FAMILIES["decoder"], model)
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
    made = layout(shapes, strategy, FAMILIES["decoder"])
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
    made = layout(shapes, strategy, FAMILIES["decoder"])
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


# ---------------------------------------------------------------------------- fully sharded


@pytest.mark.parametrize(
    ("text", "shape", "spec"),
    [
        ("mp,fsdp", (8, 8), (("mp",), ("fsdp",))),
        ("fsdp,mp", (8, 8), (("fsdp",), ("mp",))),
        ("mp,-", (8, 8), (("mp",), ("fsdp",))),  # the dim that is not split
        ("cp,-", (16, 8), ((), ("fsdp",))),  # the dim that the rule never splits
        ("-,-", (4, 8), ((), ("fsdp",))),  # the larger one
        ("-", (8, 8), (("fsdp",),)),  # the first of equal ones
        ("mp,fsdp", (8, 6), (("mp", "fsdp"),)),  # 6 columns do not divide
        ("mp,fsdp", (4, 6), (("mp",),)),  # neither do 2 rows of each rank
        ("fsdp,-", (4, 8), (("fsdp",),)),
        ("fsdp,-", (6, 8), ((), ("fsdp",))),
        ("-", (16,), (("fsdp",),)),
        ("-", (), ()),
        ("whole", (8, 8), ()),
        ("mp,dp", (8, 8), (("mp",), ("dp", "fsdp"))),  # a rule that splits over all replicas
    ],
)
def test_every_tensor_is_split_over_fsdp_along_a_dim_that_divides(text, shape, spec) -> None:
    made = layout({"w": shape}, Strategy("dp2fsdp4mp2"), mine(w=text))
    assert made.placements["w"][0].spec == spec
    is_left = not any("fsdp" in axes for axes in spec) and shape and text != "whole"
    assert made.notes == (
        (f"not split over fsdp, which divides no dim: 1 tensor: w {shape} over fsdp=4.",)
        if is_left
        else ()
    )


def test_states_and_adapters_are_split_over_fsdp_as_their_weight() -> None:
    shapes = {"w.weight": (8, 16), "adam_m.w.weight": (8, 16)}
    shapes |= {"w.lora_A.weight": (2, 16), "w.lora_B.weight": (8, 2)}
    made = layout(shapes, Strategy("fsdp4mp2"), mine(**{"w.weight": "mp,fsdp"}))
    specs = {n: p[0].spec for n, p in made.placements.items()}
    assert specs["adam_m.w.weight"] == specs["w.weight"] == (("mp",), ("fsdp",))
    assert specs["w.lora_A.weight"] == ((), ("fsdp",))
    assert specs["w.lora_B.weight"] == (("mp", "fsdp"),)


def test_towers_are_split_over_fsdp_although_their_rule_is_whole() -> None:
    shapes = llama(1) | {"visual.blocks.0.attn.weight": (8, 16)}
    made = layout(shapes, Strategy("fsdp4mp2"), rules_for(None, shapes))
    assert made.placements["visual.blocks.0.attn.weight"][0].spec == ((), ("fsdp",))


def test_fsdp_goes_with_stages_experts_and_the_optimizer_shard() -> None:
    strategy = Strategy("dp4fsdp2mp2pp2ep2optall")
    made = layout(moe(2, 4), strategy, FAMILIES["decoder"])
    expert = made.placements["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert [(p.axes, p.spec, p.first_rank) for p in expert] == [
        ((("edp", 2), ("fsdp", 2), ("mp", 2)), (("mp", "edp"), ("fsdp",)), 24)
    ]
    query = made.placements["model.layers.0.self_attn.q_proj.weight"]
    assert [(p.spec, p.first_rank) for p in query] == [((("mp", "ep", "edp"), ("fsdp",)), 0)]


# ---------------------------------------------------------------------------- by shape alone


@pytest.mark.parametrize(
    ("shape", "strategy", "spec"),
    [
        ((256, 512), "dp2mp4", ((), ("mp",))),
        ((512, 256), "fsdp4mp2", (("mp",), ("fsdp",))),
        ((514, 256), "mp4", ((), ("mp",))),  # 4 does not divide the larger one
        ((257, 511), "mp4", ()),
        ((1 << 16,), "fsdp8", (("fsdp",),)),
        (((1 << 16) - 8,), "fsdp8", ()),  # small
    ],
)
def test_names_without_a_rule_are_split_by_shape_on_request(shape, strategy, spec) -> None:
    shapes = {"w": (4, 4), "new.0.x": shape, "new.1.x": shape}
    made = layout(shapes, Strategy(strategy), mine(w="whole"), unmatched="largest")
    assert [made.placements[n][0].spec for n in shapes] == [(), spec, spec]
    said = ",".join("+".join(axes) or "-" for axes in spec) or "-"
    assert made.notes == (
        "no rule matches 2 tensors, split by their shapes alone: "
        f"new.0.x {shape} as {said} (and 1 like it).",
    )


def test_a_policy_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(LayoutError, match='"error" or "replicate" or "largest"'):
        layout({}, Strategy(), LLAMA, unmatched="x")  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match=r'must be "error" or "replicate"\.'):
        layout({}, Strategy(), LLAMA, uneven="largest")  # type: ignore[arg-type]


def test_stages_split_the_dim_of_layers_where_tensors_have_one() -> None:
    rules = mine(**{"layers.w": "pp,mp,-", "head": "mp,-"})
    shapes = {"layers.w": (4, 8, 8), "head": (8, 8)}
    made = layout(shapes, Strategy("dp2mp2pp2"), rules)
    axes = (("pp", 2), ("dp", 2), ("mp", 2))
    assert made.num_ranks == 8
    assert made.placements == {
        "layers.w": (Placement(axes, (("pp",), ("mp",))),),
        "head": (Placement(axes, (("mp",),)),),  # whole on both stages
    }
    with pytest.raises(LayoutError, match="no layer patterns, so they define no stages"):
        layout(shapes, Strategy("pp2"), mine(**{"layers.w": "-,mp,-", "head": "-"}))
