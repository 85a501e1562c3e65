"""Rules against the strategy files that MindSpore wrote for the same jobs."""

from __future__ import annotations

import pytest
from golden_files import golden
from golden_files import shapes as full_shapes
from rules_models import FAMILIES

from jaxshard.core.layout import Layout, Strategy
from jaxshard.errors import LayoutError
from jaxshard.formats import strategy_files
from jaxshard.formats.folder import MemoryFolder
from jaxshard.rules import layout, read_rules, rules_for

JOBS = {
    "dp1mp4": "dp1mp4",
    "dp2mp1": "dp2",
    "dp4mp2": "dp4mp2",
    "dp1mp2pp2": "mp2pp2",
    "dp2mp2pp2": "dp2mp2pp2",
    "dp4mp2_opt2": "dp4mp2opt2",
    "dp2mp2_optall": "dp2mp2optall",
    "dp2mp2pp2_optall": "dp2mp2pp2optall",
    "dp4mp2ep2_moe": "dp4mp2ep2",
}
TWO_AXES = """
[specs]
"*.wo.weight" = "-,cp+mp"
"*.w2.weight" = "-,cp+mp"
"*.w3.weight" = "mp,cp"
"*.w?.weight" = "cp+mp,-"
"*.tok_embeddings.embedding_weight" = "-"
"*.wq.weight" = "cp+mp,-"
"*.wk.weight" = "cp+mp,-"
"*.wv.weight" = "cp+mp,-"
"*.w1.weight" = "cp+mp,-"
"lm_head.weight" = "cp+mp,-"
"""


def job(name: str) -> tuple[Layout, dict[str, tuple[int, ...]]]:
    """The layout that MindSpore compiled, and the full shapes of its weights."""
    files = sorted(golden(name, "strategy").glob("*.ckpt"))
    folder = MemoryFolder({f"strategy/{f.name}": f.read_bytes() for f in files})
    return strategy_files.layout(strategy_files.read(folder, ["strategy"])), full_shapes(name)


def states(theirs: Layout, weights: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the job, optimizer states included, with its full shape."""
    return {
        name: next(shape for weight, shape in weights.items() if name.endswith(weight))
        for name in theirs.placements
    }


def assert_same_boxes(ours: Layout, theirs: Layout, shapes: dict[str, tuple[int, ...]]) -> None:
    assert ours.num_ranks == theirs.num_ranks
    for name, shape in shapes.items():
        for rank in range(theirs.num_ranks):
            assert ours.box_of(name, shape, rank) == theirs.box_of(name, shape, rank), (name, rank)


@pytest.mark.parametrize("name", JOBS)
def test_rules_cut_as_mindspore_does(name: str) -> None:
    theirs, weights = job(name)
    shapes = states(theirs, weights)
    rules = rules_for(None, shapes)
    assert rules.name == "mindformers"
    ours = layout(shapes, Strategy.parse(JOBS[name]), rules)
    assert_same_boxes(ours, theirs, shapes)


def test_another_strategy_cuts_otherwise() -> None:
    theirs, weights = job("dp4mp2")
    shapes = states(theirs, weights)
    ours = layout(shapes, Strategy.parse("dp2mp4"), FAMILIES["mindformers"])
    with pytest.raises(AssertionError):
        assert_same_boxes(ours, theirs, shapes)


def test_a_users_rules_say_what_no_family_does() -> None:
    theirs, weights = job("dp2cp2mp2_2axis")
    shapes = states(theirs, weights)
    rules = FAMILIES["mindformers"].override(read_rules(TWO_AXES))
    ours = layout(shapes, Strategy.parse("dp2cp2mp2"), rules)
    assert_same_boxes(ours, theirs, shapes)


def test_what_mindspore_leaves_whole_has_a_rule_of_its_own() -> None:
    _, weights = job("dp4mp2")
    specs = tuple(s for s in FAMILIES["mindformers"].specs if "odd_bias" not in s[0])
    rules = type(FAMILIES["mindformers"])("less", specs=specs)
    shapes = {n: s for n, s in weights.items() if n.startswith("model.")}
    with pytest.raises(LayoutError, match="none of the rules less matches"):
        layout(shapes, Strategy.parse("dp4mp2"), rules)
