"""Logical axis rules: the specs that Flax and MaxText give the same axes, and what is noted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rules_models import llama

from jaxshard.core.catalog import Model
from jaxshard.core.layout import MeshAxes, Strategy
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.rules import Rules, layout, read_rules, with_axis_rules
from jaxshard.rules.families import table_for
from jaxshard.rules.logical_axes import assign, read_axis_rules

QWEN3_MOE = Model("qwen3_moe", config={"model_type": "qwen3_moe"})


def specs_of(shapes, axes, given, model=None, rules=None, **how):
    """The specs of ``shapes`` on a mesh of ``axes``, and the notes."""
    mesh = MeshAxes(tuple(axes.items()), {}, "the mesh")
    table = table_for(model, shapes, mesh, with_axis_rules(rules, given), "error")
    made = layout(shapes, mesh, table, model, **how)
    return {name: placed[0].spec for name, placed in made.placements.items()}, made.notes


# --- Flax

logical, physical = st.sampled_from("abcd"), st.sampled_from("xyz")
over = st.none() | physical | st.lists(physical, unique=True, max_size=3).map(tuple)


@given(
    st.lists(logical | st.none(), max_size=4).filter(
        lambda names: len([n for n in names if n]) == len({n for n in names if n})
    ),
    st.lists(st.tuples(logical, over), max_size=6),
)
def test_mesh_axes_are_assigned_as_flax_assigns_them(names, rules) -> None:
    linen = pytest.importorskip("flax.linen")
    theirs = linen.logical_to_mesh_axes(tuple(names), rules) or ()
    wanted = tuple((a,) if isinstance(a, str) else tuple(a or ()) for a in theirs)
    assert assign(names, read_axis_rules(rules, "rules")) == wanted


def test_a_rule_whose_mesh_axes_are_taken_is_passed_over_for_the_next() -> None:
    rules = read_axis_rules([("a", ("x", "y")), ("b", ["y", "z"]), ("b", "z")], "rules")
    assert assign(("b", "a"), rules) == (("z",), ("x", "y"))
    assert assign(("b",), rules) == (("y", "z"),)


def test_a_mesh_axis_that_is_absent_is_one_of_size_one() -> None:
    given = [("mlp", "absent"), ("mlp", "x"), ("embed", ("absent", "x"))]
    specs, notes = specs_of(llama(1), {"x": 2}, given)
    assert specs["model.layers.0.mlp.up_proj.weight"] == ()  # the first rule of mlp takes both
    assert specs["model.layers.0.self_attn.q_proj.weight"] == ((), ("x",))
    with_it, _ = specs_of(llama(1), {"absent": 1, "x": 2}, given)
    assert with_it == specs
    assert notes == (
        "logical_axis_rules: the mesh has no axes absent, so they split nothing (axes: x).",
    )


# --- MaxText 0.2.5: the rules of weights in configs/base.yml, and the logical axes that its layers
# give their parameters (attentions, linears, moe, embeddings, normalizations, nnx_decoders)

MAXTEXT_RULES = [
    ["activation_heads", ["tensor", "tensor_sequence", "autoregressive"]],
    ["vocab", ["tensor", "tensor_sequence", "autoregressive"]],
    ["embed_vocab", ["fsdp", "fsdp_transpose", "context", "context_usp_ulysses", "expert"]],
    ["heads", ["tensor", "tensor_sequence", "autoregressive"]],
    ["q_heads", ["tensor", "tensor_sequence", "autoregressive"]],
    ["kv_heads", ["tensor", "tensor_sequence", "autoregressive"]],
    ["qkv", []],
    ["kv", []],
    ["kv_head_dim", []],
    ["embed_attn", ["fsdp", "fsdp_transpose", "context", "context_usp_ulysses", "expert"]],
    ["exp", "expert"],
    ["mlp_moe", ["fsdp_transpose", "tensor", "tensor_sequence", "autoregressive"]],
    ["embed_moe", ["fsdp", "fsdp_transpose", "context", "context_usp_ulysses"]],
    ["embed_moe", ["fsdp", "context", "context_usp_ulysses"]],
    ["embed_router", ["fsdp", "fsdp_transpose", "context", "context_usp_ulysses"]],
    ["embed_router", ["fsdp", "context", "context_usp_ulysses"]],
    ["mlp", ["fsdp_transpose", "tensor", "tensor_sequence", "autoregressive"]],
    ["embed", ["fsdp", "fsdp_transpose", "context", "context_usp_ulysses", "expert"]],
    ["embed", ["fsdp", "context", "context_usp_ulysses", "expert"]],
    ["norm", ["tensor"]],
    ["layers", "stage"],
]
LAYERS = "params.decoder.layers."
MAXTEXT = {  # scanned: the layers are dim 1
    "params.token_embedder.embedding": ((64, 16), ("vocab", "embed_vocab")),
    "params.decoder.decoder_norm.scale": ((16,), ("norm",)),
    "params.decoder.logits_dense.kernel": ((16, 64), ("embed_vocab", "vocab")),
    f"{LAYERS}self_attention.query.kernel": (
        (16, 4, 8, 8),
        ("embed_attn", "layers", "q_heads", "kv"),
    ),
    f"{LAYERS}self_attention.key.kernel": (
        (16, 4, 4, 8),
        ("embed_attn", "layers", "kv_heads", "kv_head_dim"),
    ),
    f"{LAYERS}self_attention.out.kernel": ((8, 4, 8, 16), ("heads", "layers", "kv", "embed_attn")),
    f"{LAYERS}self_attention.query_norm.scale": ((8, 4), ("norm", "layers")),
    f"{LAYERS}pre_self_attention_layer_norm.scale": ((16, 4), ("norm", "layers")),
    f"{LAYERS}moe_block.gate.kernel": ((16, 4, 8), ("embed_router", "layers", None)),
    f"{LAYERS}moe_block.wi_0": ((8, 4, 16, 32), ("exp", "layers", "embed_moe", "mlp_moe")),
    f"{LAYERS}moe_block.wo": ((8, 4, 32, 16), ("exp", "layers", "mlp_moe", "embed_moe")),
}


@pytest.mark.parametrize(
    "axes",
    [
        {"fsdp": 4, "tensor": 2},
        {"data": 2, "fsdp": 2, "fsdp_transpose": 2, "tensor": 2},
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"stage": 2, "fsdp": 2, "tensor": 2},
        {"context": 2, "tensor": 2, "tensor_sequence": 2},
        {"autoregressive": 2, "fsdp_transpose": 4},
        {"x": 8},
    ],
)
def test_maxtexts_own_rules_give_the_specs_of_maxtext(axes) -> None:
    linen = pytest.importorskip("flax.linen")
    shapes = {name: shape for name, (shape, _) in MAXTEXT.items()}
    specs, notes = specs_of(shapes, axes, MAXTEXT_RULES, QWEN3_MOE)
    for name, (_, logical_axes) in MAXTEXT.items():
        theirs = linen.logical_to_mesh_axes(logical_axes, MAXTEXT_RULES)
        wanted = [
            tuple(a for a in ((d,) if isinstance(d, str) else d or ()) if axes.get(a, 1) > 1)
            for d in theirs
        ]
        while wanted and not wanted[-1]:
            wanted.pop()
        assert specs[name] == tuple(wanted), name
    assert [n for n in notes if "no weight" in n] == [
        "logical_axis_rules: no weight has the axes qkv (axes: embed, expert, head_dim, heads, "
        "kv_heads, layer, mlp, moe_mlp, route, token, vocab)."
    ]


# --- What else may be written


def test_a_family_is_found_by_its_names_without_a_config() -> None:
    specs, notes = specs_of(llama(1), {"x": 2, "y": 2}, [("embed", "x"), ("mlp", "y")])
    assert specs["model.layers.0.mlp.down_proj.weight"] == (("x",), ("y",))
    assert specs["model.norm.weight"] == (("x",),)
    assert notes == ()


def test_logical_axis_rules_name_the_axes_of_a_strategy_too() -> None:
    rules = with_axis_rules(None, [("embed", ("dp", "mp"))])
    strategy = Strategy("dp2mp2")
    made = layout(llama(1), strategy, table_for(None, llama(1), strategy, rules, "error"))
    assert made.placements["model.norm.weight"][0].spec == (("dp", "mp"),)
    assert made.placements["model.layers.0.mlp.up_proj.weight"][0].spec == ((), ("dp", "mp"))


def test_layers_in_names_are_on_the_stages_that_a_rule_for_layers_names() -> None:
    rules = with_axis_rules(None, [("layers", "pp"), ("embed", "dp")])
    strategy = Strategy("dp2pp2")
    made = layout(llama(2), strategy, table_for(None, llama(2), strategy, rules, "error"))
    up = [made.placements[f"model.layers.{n}.mlp.up_proj.weight"][0] for n in range(2)]
    assert [(p.spec, p.first_rank) for p in up] == [(((), ("dp",)), 0), (((), ("dp",)), 2)]


def test_rules_in_toml_have_axes_too_and_specs_precede_them() -> None:
    rules = read_rules('[axes]\nembed = "x + y"\nmlp = "-"\n[specs]\n"lm_head.*" = "mp,-"')
    assert rules.axes == (("embed", ("x", "y")), ("mlp", ()))
    mesh = MeshAxes((("x", 2), ("y", 2)), {"y": "mp"}, "the mesh")
    made = layout(llama(1), mesh, table_for(None, llama(1), mesh, rules, "error"))
    assert made.placements["lm_head.weight"][0].spec == (("y",),)
    assert made.placements["model.norm.weight"][0].spec == (("x", "y"),)


def test_a_dim_that_does_not_divide_is_an_error_or_whole() -> None:
    shapes = llama(1) | {"lm_head.weight": (63, 16)}
    given = [("vocab", "x"), ("embed", "y")]
    with pytest.raises(LayoutError, match=r"lm_head.weight dim 0 of \(63, 16\) .* x=2"):
        specs_of(shapes, {"x": 2, "y": 2}, given)
    specs, notes = specs_of(shapes, {"x": 2, "y": 2}, given, uneven="replicate")
    assert specs["lm_head.weight"] == ((), ("y",))
    assert "left whole" in notes[0]


@pytest.mark.parametrize("given", ["embed", [("embed",)], [("embed", 1)], [(1, "x")], [("a", [2])]])
def test_what_is_no_pair_of_names_is_refused_with_examples(given) -> None:
    with pytest.raises(LayoutError, match=r'is not a rule. Write .*\("embed", "fsdp"\)'):
        with_axis_rules(None, given)


def test_names_that_no_table_has_are_refused_before_anything_is_laid_out() -> None:
    with pytest.raises(NotFoundError, match=r"unknown tensor names \(tower.kernel\).*--models"):
        specs_of({"tower.kernel": (4, 4)}, {"x": 2}, [("embed", "x")])
    with pytest.raises(LayoutError, match="mesh axis 'a b'"):
        specs_of(llama(1), {"a b": 2}, [("embed", "a b")])


def test_a_split_inside_a_head_is_found_on_mesh_axes_of_any_name() -> None:
    config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}
    model = Model("llama", config=config)
    _, notes = specs_of(llama(1), {"x": 4}, [("heads", "x"), ("mlp", "x")], model)
    assert len(notes) == 1
    assert "q_proj.weight 2 heads of 8 over x=4; use x 1 or 2" in notes[0]
    assert specs_of(llama(1), {"x": 2}, [("heads", "x")], model)[1] == ()


def test_names_that_no_table_has_are_split_by_shape_on_request_over_all_axes() -> None:
    mesh = MeshAxes((("x", 2), ("data", 2)), {"data": "dp"}, "the mesh")
    shapes = {"tower.kernel": (256, 512)}
    rules = with_axis_rules(None, [("embed", "x")])
    table = table_for(None, shapes, mesh, rules, "largest")
    made = layout(shapes, mesh, table, unmatched="largest")
    assert made.placements["tower.kernel"][0].spec == ((), ("x",))
    assert "no rule matches 1 tensor, split by their shapes alone" in made.notes[0]


def test_rules_without_axes_of_their_own_keep_the_meaning_of_the_family() -> None:
    assert table_for(None, llama(1), Strategy(), Rules("mine"), "error").axes is None
    assert table_for(None, llama(1), Strategy(), read_rules("[axes]"), "error").axes == ()
