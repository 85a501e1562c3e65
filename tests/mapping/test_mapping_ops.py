"""Names decide: numbers in rules, prediction layers, regular expressions, and few questions."""

from __future__ import annotations

import re

import numpy as np
import pytest
from mapping_random import Sizes, config_of, random_model
from mapping_worlds import Memory, read_all, same

from jaxshard.core.catalog import Model
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.mapping import (
    Drop,
    Expect,
    Mapping,
    Rename,
    Stack,
    Substitute,
    Transpose,
    Unstack,
    read_mapping,
    table,
    write_mapping,
)


def arrays(*names: str) -> dict[str, np.ndarray]:
    return {n: np.arange(6, dtype=np.int16).reshape(2, 3) + i for i, n in enumerate(names)}


LAYERS = arrays("h.0.w", "h.1.w", "h.2.w", "h.10.w")


def test_a_rule_with_a_number_is_about_that_number() -> None:
    made = Mapping((Rename((("h.1.w", "x"),)),)).apply_arrays(LAYERS)
    assert list(made) == ["h.0.w", "x", "h.2.w", "h.10.w"]
    assert made["x"] is LAYERS["h.1.w"]
    general = Mapping((Rename((("h.1.w", "x"), ("h.{layer}.w", "y.{layer}"))),))
    assert list(general.apply_arrays(LAYERS)) == ["y.0", "x", "y.2", "y.10"]
    assert same(general.inverse().apply_arrays(general.apply_arrays(LAYERS)), LAYERS)


def test_an_operation_on_one_layer_leaves_the_others() -> None:
    made = Mapping((Transpose(("h.10.w",)),)).apply_arrays(LAYERS)
    assert [x.shape for x in made.values()] == [(2, 3), (2, 3), (2, 3), (3, 2)]
    assert list(Mapping((Drop(("h.0.w",)),)).apply_arrays(LAYERS)) == ["h.1.w", "h.2.w", "h.10.w"]
    with pytest.raises(NotFoundError, match=r"no rule for 3 of 4 names: h\.0\.w, h\.2\.w"):
        Mapping((Expect(("h.1.{x}",)),)).apply_arrays(LAYERS)


DEEPSEEK = Sizes(layers=11, dense=3, mtp=1)
MODEL = Model("deepseek_v3", 11, False, config_of("deepseek_v3", DEEPSEEK))


@pytest.mark.parametrize("form", ["mcore", "mcore-fused", "nnx", "nnx-scan", "linen-scan"])
def test_a_model_with_a_prediction_layer_goes_there_and_back(form) -> None:
    source = random_model("deepseek_v3", DEEPSEEK)
    there = table("hf", form, MODEL)
    made = there.apply_arrays(dict(sorted(source.items())))  # layer 10 before layer 2
    assert same(there.inverse().apply_arrays(made), source)
    memory = Memory(source)
    assert same(read_all(memory, there.apply(memory.catalog)), made)


def test_the_prediction_layer_takes_its_own_rules() -> None:
    source = random_model("deepseek_v3", DEEPSEEK)
    made = table("hf", "mcore", MODEL).apply_arrays(source)
    assert made["decoder.eh_proj.weight"] is source["model.layers.11.eh_proj.weight"]
    router = source["model.layers.11.mlp.gate.weight"]
    assert made["decoder.transformer.mlp.router.weight"] is router
    assert not any(".layers.11." in n for n in made)


def test_layers_of_three_kinds_are_stacked_apart() -> None:
    source = random_model("deepseek_v3", DEEPSEEK)
    made = table("hf", "nnx-scan", MODEL).apply_arrays(dict(sorted(source.items())))
    dense = [source[f"model.layers.{i}.mlp.up_proj.weight"].T for i in range(3)]
    np.testing.assert_array_equal(made["model.dense_layers.mlp.up_proj.kernel"], np.stack(dense))
    gates = [source[f"model.layers.{i}.mlp.gate.weight"].T for i in range(3, 11)]
    np.testing.assert_array_equal(made["model.layers.mlp.gate.kernel"], np.stack(gates))
    names = [f"model.layers.11.mlp.experts.{e}.up_proj.weight" for e in range(4)]
    np.testing.assert_array_equal(
        made["model.mtp_layers.0.mlp.experts.up_proj.kernel"],
        np.stack([source[n].T for n in names]),
    )


def test_a_model_without_its_prediction_layer_gets_no_copies() -> None:
    source = random_model("deepseek_v3", Sizes(layers=11, dense=3, mtp=0))
    there = table("hf", "mcore", MODEL)  # transformers keeps the number and not the layer
    assert same(there.inverse().apply_arrays(there.apply_arrays(source)), source)
    with pytest.raises(NotFoundError, match=r"copy of model\.embed_tokens\.weight, which is miss"):
        there.apply_arrays({"model.layers.11.embed_tokens.weight": source["lm_head.weight"]})


# --- stacks of layers that are not as they should be ----------------------------------------


def test_a_stack_of_some_layers_leaves_the_others() -> None:
    op = Stack("h.{layer}.w", "first.w", count=2)
    made = Mapping((op,)).apply_arrays(LAYERS)
    assert {n: x.shape for n, x in made.items()} == {
        "first.w": (2, 2, 3),
        "h.2.w": (2, 3),
        "h.10.w": (2, 3),
    }
    assert same(Mapping((op,)).inverse().apply_arrays(made), LAYERS)


@pytest.mark.parametrize(
    ("names", "how", "said"),
    [
        (["h.0.w", "h.900000000.w"], {}, "layer 1, 2, 3, 4, 5 and 899999994 more of 0 to 9000000"),
        (["h.0.w", "h.99999999999999.w"], {}, "not a number of a layer"),
        (["h.1.w"], {}, "layer 0 of 0 to 1 is missing"),
        (["h.1.w", "h.2.w"], {"first": 2}, "h.1.w precedes the first, layer 2"),
        (["h.0.w"], {"count": 2}, "layer 1 of 0 to 1 is missing"),
        (["h.1.w", "h.01.w"], {"first": 1}, "both become layer 1"),
    ],
)
def test_gaps_between_layers_are_refused(names, how, said) -> None:
    with pytest.raises((NotFoundError, LayoutError), match=said):
        Mapping((Stack("h.{layer}.w", "w", **how),)).apply_arrays(arrays(*names))


def test_a_stack_of_another_number_of_layers_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"dim 0 of shape .* has 2 elements, expected 3"):
        Mapping((Unstack("w", "h.{layer}.w", count=3),)).apply_arrays(arrays("w"))
    with pytest.raises(LayoutError, match="not a number of a layer or an expert"):
        Mapping((Stack("h.{block}.w", "w", index="block"),)).apply_arrays(arrays("h.a.w"))


# --- regular expressions ----------------------------------------------------------------------


NAMES = (
    "model.layers.3.self_attn.q_proj.weight",
    "model.layers.10.self_attn.v_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize(
    ("rules", "back", "made"),
    [
        (
            ((r"\.self_attn\.(q|k|v)_proj\.", r".attention.w\1."),),
            ((r"\.attention\.w(q|k|v)\.", r".self_attn.\1_proj."),),
            "model.layers.3.attention.wq.w",
        ),
        (
            ((r"^model\.layers\.(\d+)\.", r"h_\1."),),
            ((r"^h_(\d+)\.", r"model.layers.\1."),),
            "h_3.self_attn.q_proj.weight",
        ),
        (
            ((r"^model\.layers", "layers"), (r"^(layers)\.(\d+)", r"\2.\g<1>")),
            ((r"^(\d+)\.layers", r"layers.\1"), (r"^layers", "model.layers")),
            "3.layers.self_attn.q_p",
        ),
        (((r"weight$", "kernel"),), ((r"kernel$", "weight"),), "model.layers.3.self_attn.q_proj.k"),
    ],
)
def test_regular_expressions_rename_and_their_back_rules_restore(rules, back, made) -> None:
    there = Mapping((Substitute(rules, back),))
    found = there.apply_arrays(arrays(*NAMES))
    assert any(n.startswith(made) for n in found)
    assert list(found) == [_plainly(n, rules) for n in NAMES]
    assert list(there.inverse().apply_arrays(found)) == list(NAMES)
    again = there.inverse().inverse()
    assert list(again.apply_arrays(arrays(*NAMES))) == list(found)
    assert read_mapping(write_mapping(there.inverse())) == there.inverse()


def _plainly(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for expression, replacement in rules:
        name = re.sub(expression, replacement, name)
    return name


def test_back_rules_are_used_and_checked() -> None:
    op = Substitute(((r"q_pr.j", "wq"),), back=((r"wq", "q_proj"),))
    assert list(Mapping((op,)).apply_arrays(arrays(NAMES[0]))) == [
        "model.layers.3.self_attn.wq.weight"
    ]
    assert op.inverse() == Substitute(op.back, op.rules)
    wrong = Substitute(((r"q_pr.j", "wq"),), back=((r"wq", "k_proj"),))
    with pytest.raises(LayoutError, match=r"back= turns that into .*k_proj\.weight"):
        Mapping((wrong,)).apply_arrays(arrays(NAMES[0]))


def test_rules_without_back_have_no_inverse() -> None:
    with pytest.raises(LayoutError, match=r"substitute has no inverse: back= is missing"):
        Substitute(((r"\.w(\d)\.", r".linear_\1."),)).inverse()


def test_the_inverse_refuses_a_name_that_back_does_not_restore() -> None:
    back = Mapping((Substitute(((r"\.q_proj\.", ".wq."),), ((r"\.wq\.", ".q_proj."),)),)).inverse()
    with pytest.raises(LayoutError, match=r"a\.q_proj\.w becomes a\.q_proj\.w, but back= turns"):
        back.apply_arrays(arrays("a.q_proj.w"))


@pytest.mark.parametrize("rule", [("(", "x"), ("a", r"\1"), ("(?P<n>a)", r"\g<m>")])
def test_an_invalid_regular_expression_is_refused(rule) -> None:
    with pytest.raises(LayoutError, match="invalid regular expression"):
        Substitute((rule,))


def test_two_names_made_one_by_an_expression_are_refused() -> None:
    with pytest.raises(LayoutError, match="two sources for one target"):
        Mapping((Substitute(((r"\d+", "N"),)),)).apply_arrays(LAYERS)
