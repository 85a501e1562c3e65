"""Stacked experts: the sizes of the model tell inputs from outputs, or a rule has to."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rules_models import FAMILIES, mine

from jaxshard.core.catalog import Model
from jaxshard.core.layout import Strategy
from jaxshard.errors import LayoutError
from jaxshard.rules import layout, rules_for
from jaxshard.rules.table import parse_spec

pytestmark = pytest.mark.filterwarnings("ignore")  # of the oracles, among themselves

Shape = tuple[int, ...]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "num_local_experts": 4,
    "num_experts": 4,
}
#: The shapes of one rank of two, of (4, 64, 96) and (4, 48, 64), or turned.
IN_OUT = {"gate_up_proj": (4, 64, 48), "down_proj": (4, 24, 64)}
OUT_IN = {"gate_up_proj": (4, 48, 64), "down_proj": (4, 64, 24)}


def experts(hidden: int, inner: int, number: int, *, turned: bool) -> dict[str, Shape]:
    up, down = (number, 2 * inner, hidden), (number, hidden, inner)
    shapes = {"gate_up_proj": up, "down_proj": down}
    return {
        f"model.layers.0.mlp.experts.{n}": (s[0], s[2], s[1]) if turned else s
        for n, s in shapes.items()
    }


def cut_dims(made: Any, shapes: dict[str, Shape]) -> dict[str, int | None]:
    found = {}
    for name in shapes:
        spec = made.placements[name][0].spec
        found[name.rpartition(".")[2]] = next((d for d, a in enumerate(spec) if "mp" in a), None)
    return found


@pytest.mark.parametrize(
    ("kind", "local"),
    [("gpt_oss", IN_OUT), ("llama4_text", IN_OUT), ("mixtral", OUT_IN), ("qwen3_moe", OUT_IN)],
)
def test_experts_of_transformers_are_cut_along_what_their_ranks_share(kind, local) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    changes = {"interleave_moe_layer_step": 1} if kind == "llama4_text" else {}
    config = transformers.AutoConfig.for_model(kind, **SMALL, **changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    facts = Model(kind, 2, config=config.to_dict())
    made = layout(shapes, Strategy("mp2"), rules_for(facts, shapes), facts)
    compared = 0
    for name, shape in shapes.items():
        if (end := name.rpartition(".")[2]) in local:
            assert made.placements[name][0].local_shape(shape) == local[end], name
            compared += 1
    assert compared == 4


@given(
    st.sampled_from([8, 16, 24, 32, 48, 64]),
    st.sampled_from([8, 12, 16, 24, 32, 48]),
    st.booleans(),
    st.sampled_from(["both", "hidden", "embedding", "nothing"]),
)
def test_the_order_is_the_true_one_where_the_hidden_size_is_known(
    hidden, inner, turned, known
) -> None:
    shapes = experts(hidden, inner, 4, turned=turned)
    config: dict[str, Any] = {}
    if known in ("both", "hidden"):
        config["hidden_size"] = hidden
    if known == "both":
        config |= {"moe_intermediate_size": inner, "num_experts": 4}
    more = {"model.embed_tokens.weight": (128, hidden)} if known == "embedding" else {}
    model = Model(config={"text_config": config})
    table = FAMILIES["decoder"]
    if known == "nothing":
        with pytest.raises(LayoutError, match="the order of the dims of 2 tensors is unknown"):
            layout(shapes, Strategy("mp2"), table, model)
        return
    made = layout(shapes | more, Strategy("mp2"), table, model)
    true = {"gate_up_proj": 2, "down_proj": 1} if turned else {"gate_up_proj": 1, "down_proj": 2}
    assert cut_dims(made, shapes) == true


@pytest.mark.parametrize("turned", [False, True])
def test_mindformers_experts_are_cut_by_the_sizes_too(turned: bool) -> None:
    shapes: dict[str, Shape] = {"model.tok_embeddings.embedding_weight": (128, 64)}
    base = "model.layers.0.feed_forward.experts."
    for name, shape in {"w1": (4, 64, 96), "w2": (4, 96, 64), "w3": (4, 64, 96)}.items():
        shapes[base + name] = (shape[0], shape[2], shape[1]) if turned else shape
    made = layout(shapes, Strategy("mp2"), FAMILIES["mindformers"])
    found = cut_dims(made, {n: s for n, s in shapes.items() if ".experts." in n})
    assert found == ({"w1": 1, "w2": 2, "w3": 1} if turned else {"w1": 2, "w2": 1, "w3": 2})


def test_a_square_matrix_is_as_the_others_of_its_module() -> None:
    shapes = experts(2880, 2880, 32, turned=True)  # gpt-oss-20b
    config = {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32}
    made = layout(shapes, Strategy("mp2"), FAMILIES["decoder"], Model(config=config))
    assert cut_dims(made, shapes) == {"gate_up_proj": 2, "down_proj": 1}


@pytest.mark.parametrize(
    ("config", "shape", "said"),
    [
        ({"hidden_size": 64}, (4, 64, 64), "is either of (expert, out, in) and (expert, in, out)"),
        ({}, (4, 96, 64), "hidden size unknown"),
        ({"hidden_size": 32}, (4, 96, 64), "is neither of"),
        ({"hidden_size": 64, "num_experts": 8}, (4, 96, 64), "with 8 experts"),
        ({"hidden_size": 64, "moe_intermediate_size": 40}, (4, 96, 64), "inner size 40 is neither"),
    ],
)
def test_ambiguous_sizes_need_a_rule(config, shape, said) -> None:
    shapes = {"model.layers.0.mlp.experts.gate_up_proj": shape}
    rules, model = FAMILIES["decoder"], Model(config=config)
    with pytest.raises(LayoutError, match=re.escape(said)) as caught:
        layout(shapes, Strategy("mp2"), rules, model)
    assert "ep,mp,- or ep,-,mp" in str(caught.value)
    layout(shapes, Strategy("dp2ep2"), rules, model)  # no rank shares inputs or outputs
    own = rules.override(mine(**{"*.experts.gate_up_proj": "ep,-,mp"}))
    made = layout(shapes, Strategy("mp2"), own, model)
    assert cut_dims(made, shapes) == {"gate_up_proj": 2}


def test_factors_and_states_of_stacked_experts_are_placed_like_their_weights() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shapes: dict[str, Shape] = {name: (4, 512, 256), f"{name}_scale_inv": (4, 4, 2)}
    shapes[f"adam_m.{name}"] = (4, 512, 256)
    model = Model(config={"hidden_size": 512})
    made = layout(shapes, Strategy("mp2"), FAMILIES["decoder"], model)
    assert {p.spec for (p,) in made.placements.values()} == {((), (), ("mp",))}


def test_mxfp4_experts_are_cut_between_their_groups() -> None:
    base = "model.layers.0.mlp.experts."
    shapes: dict[str, Shape] = {
        f"{base}gate_up_proj_blocks": (4, 96, 2, 16),
        f"{base}gate_up_proj_scales": (4, 96, 2),
        f"{base}gate_up_proj_bias": (4, 96),
        f"{base}down_proj_blocks": (4, 64, 6, 16),
        f"{base}down_proj_scales": (4, 64, 6),
        f"{base}down_proj_bias": (4, 64),
    }
    made = layout(shapes, Strategy("mp2"), FAMILIES["decoder"])
    rows, groups = ((), ("mp",)), ((), (), ("mp",))
    assert [p.spec for (p,) in made.placements.values()] == [rows, rows, rows, groups, groups, ()]


@pytest.mark.parametrize("text", ["ep,mp,- or ep,mp,-", "mp,- or -,mp", "ep,mp,- or ep,-,-"])
def test_the_two_specs_of_a_rule_exchange_the_last_two_of_three_dims(text: str) -> None:
    with pytest.raises(LayoutError, match="with the last two exchanged"):
        parse_spec(text, "here")
    assert str(parse_spec("ep,mp,- or ep,-,mp", "here")) == "ep,mp,- or ep,-,mp"
