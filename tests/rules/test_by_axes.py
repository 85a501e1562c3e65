"""Rules derived from axes, against the tables that were written by hand before."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_rules_families import MCORE, MINDFORMERS, TEXT, build, facts, in_memory, on_disk
from written_rules import FAMILIES, MODEL_TYPES

from jaxshard.core.catalog import Model
from jaxshard.core.layout import Layout, Strategy
from jaxshard.core.patterns import template
from jaxshard.models.axes import parse
from jaxshard.rules import layout, rules_for
from jaxshard.rules.by_axes import split_dims

pytestmark = pytest.mark.filterwarnings("ignore")  # of the oracles, among themselves

Shapes = dict[str, tuple[int, ...]]
STRATEGIES = (
    *("dp2mp2", "mp2pp2", "dp2mp4", "pp3", "dp2mp2optall", "dp2mp2vocabdp"),
    *("dp4mp2ep2", "dp2pp2ep2", "dp4mp4ep2opt2"),
)


def like_a_checkpoint(shapes: Shapes) -> Shapes:
    """The tensors with their moments, and adapters of the layers' matrices."""
    made = shapes | {f"adam_m.{n}": s for n, s in shapes.items()}
    for name, shape in shapes.items():
        if name.endswith("weight") and len(shape) == 2 and template(name) != name:
            turned = ".c_" in name  # gpt2's are (in, out)
            out, into = shape[::-1] if turned else shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            made |= {f"{module}.lora_A.weight": (3, into), f"{module}.lora_B.weight": (out, 3)}
    return made


def assert_equal(shapes: Shapes, table: str, model: Model, known: bool = True) -> None:
    rules = rules_for(model if known else None, shapes)
    for text in STRATEGIES:
        strategy = Strategy(text)
        ours = layout(shapes, strategy, rules, model, uneven="replicate")
        theirs = layout(shapes, strategy, FAMILIES[table], model, uneven="replicate")
        for name in shapes:
            # bert's decoder.bias repeats predictions.bias: a buffer, which opt leaves whole
            if not ("opt" in text and name.endswith("predictions.decoder.bias")):
                assert ours.placements[name] == theirs.placements[name], (text, name)
        assert kinds_of_notes(ours) == kinds_of_notes(theirs)


def kinds_of_notes(made: Layout) -> list[str]:
    return [n.split(":")[0] for n in made.notes if not n.startswith("cut within")]


@pytest.mark.parametrize("kind", TEXT)
def test_derived_rules_equal_the_written_ones(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    for shapes in (in_memory(model), on_disk(model, tmp_path)):
        every = like_a_checkpoint(shapes)
        assert_equal(every, MODEL_TYPES[kind], facts(model))
        assert_equal(every, MODEL_TYPES[kind], facts(model), known=False)


def test_layers_of_multi_token_prediction_equal_the_written_ones(tmp_path: Path) -> None:
    shapes = on_disk(build("deepseek_v3", num_hidden_layers=4), tmp_path)
    more: Shapes = {
        n.replace("layers.3.", "layers.4."): s for n, s in shapes.items() if "layers.3." in n
    }
    more |= {
        "model.layers.4.eh_proj.weight": (64, 128),
        "model.layers.4.enorm.weight": (64,),
        "model.layers.4.shared_head.norm.weight": (64,),
        "model.layers.4.shared_head.head.weight": (128, 64),
        "model.layers.4.embed_tokens.weight": (128, 64),
    }
    config = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1, "n_routed_experts": 4}
    model = Model("deepseek_v3", 4, config=config)
    assert_equal(like_a_checkpoint(shapes | more), "deepseek", model)


@pytest.mark.parametrize(
    ("shapes", "table"), [(MINDFORMERS, "mindformers"), (MCORE, "mindformers_mcore")]
)
def test_names_of_mindformers_equal_the_written_ones(shapes: Shapes, table: str) -> None:
    every = {n: s for n, s in shapes.items() if "experts.3." not in n}
    assert_equal(like_a_checkpoint(every), table, Model("x", 3), known=False)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ("(heads head_dim) embed", "mp,-"),
        ("head_dim heads", "-,mp"),
        ("embed (half two)", "-,-"),
        ("(head_dim heads) embed", "-,-"),  # heads are not outermost: parts would not be boxes
        ("expert embed (mlp (gate + up))", "ep,-,mp"),
        ("(gate:mlp + up:mlp) embed", "mp,-"),
        ("(k + v) kv_heads embed head_dim", "-,mp,-,-"),
        ("expert embed mlp/32 16", "ep,-,mp,-"),
        ("(expert mlp) embed", "ep,-"),
        ("(expert embed) (gate:mlp + up:mlp)", "ep,-"),
        ("mlp heads", "-,mp"),  # the first rule for one of them decides
    ],
)
def test_a_dim_is_split_along_its_outermost_axis(axes: str, spec: str) -> None:
    found = split_dims(parse(axes))
    assert ",".join("+".join(split) or "-" for split in found) == spec
