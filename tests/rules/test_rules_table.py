"""Rules that a user wrote: what they say, and where they are wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxshard.core.catalog import Model
from jaxshard.core.layout import Strategy
from jaxshard.errors import LayoutError
from jaxshard.rules import Rules, layout, read_rules, table_for
from jaxshard.rules.table import AXES

FULL = """
name = "my model"

[specs]
"*.q_proj.weight" = "mp,-"
"*.experts" = "ep, -, cp+mp"
"lm_head.weight" = "-,-"

[stages]
layers = "model.layers.{layer}."
first = ["model.embed_tokens.*"]
last = ["model.norm.*", "lm_head.*"]
layers_per_stage = [7, 9]
embedding = "model.embed_tokens.weight"
head = "lm_head.weight"

[experts]
names = "*.experts.{expert}."
"""


def test_a_full_table_is_read() -> None:
    assert read_rules(FULL, "mine.toml") == Rules(
        name="my model",
        specs=(
            ("*.q_proj.weight", "mp,-"),
            ("*.experts", "ep, -, cp+mp"),
            ("lm_head.weight", "-,-"),
        ),
        layers=("model.layers.{layer}.",),
        first=("model.embed_tokens.*",),
        last=("model.norm.*", "lm_head.*"),
        layers_per_stage=(7, 9),
        experts=("*.experts.{expert}.",),
        embedding=("model.embed_tokens.weight",),
        head=("lm_head.weight",),
        written=("*.q_proj.weight", "*.experts", "lm_head.weight"),
    )


def test_rules_without_a_name_are_called_after_their_place() -> None:
    assert read_rules("", "mine.toml").name == "mine.toml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[specs]\n*.weight = 1", "mine.toml: not TOML: .*line 2.*in quotes"),
        ('[specs]\n"a" = "mp"\n"b" = "mq,-"', r"line 3: \"b\" = \"mq,-\": unknown axis 'mq'.*mp"),
        ('[specs]\n"a" = "mp,mp"', "line 2: .*names the axis mp twice"),
        ('[specs]\n"a" = ["mp"]', "line 2: a = .'mp'. must be a text in quotes"),
        ("[specs]\n# why\nlm_head.weight = '-'", "line 3: lm_head is parsed as a table"),
        ('"*.weight" = "mp,-"', r"line 1: unknown key '\*.weight' in rules.*under \[specs\]"),
        ("\n[stage]\nfirst = []", r"line 2: unknown key 'stage' in rules. Did you mean stages\?"),
        ("[stages]\nlayer = 'x.{layer}.'", r"line 2: unknown key 'layer' in \[stages\].*layers"),
        ("[stages]\nlayers = 'x.#.'", "line 2: layers = .*Write {layer} once"),
        ("[stages]\nfirst = 3", "line 2: first = 3 must be a pattern"),
        ("[stages]\nfirst = [3]", "line 2: first = .3. must be a pattern"),
        ("[stages]\nlayers_per_stage = [1, true]", "line 2: layers_per_stage"),
        ("[stages]\nlayers_per_stage = []", "line 2: layers_per_stage"),
        ("[stages]\nlayers_per_stage = [-1, 3]", "line 2: layers_per_stage"),
        ("[experts]\nnames = 'experts.*.'", "line 2: names = .*Write {expert} once"),
        ("specs = 3", "line 1: specs must be a table"),
        ("name = 3", "line 1: name = 3"),
    ],
)
def test_a_mistake_is_reported_with_its_line_and_a_remedy(text: str, said: str) -> None:
    with pytest.raises(LayoutError, match=said) as caught:
        read_rules(text, "mine.toml")
    assert str(caught.value).startswith("mine.toml")


def test_user_rules_precede_and_complete_the_others() -> None:
    base = Rules("base", specs=(("*", "-"),), layers=("h.{layer}.",), first=("wte.*",))
    both = base.override(read_rules('[specs]\n"a" = "mp"\n[stages]\nlast = "a"', "mine.toml"))
    assert both.specs == (("a", "mp"), ("*", "-"))
    assert (both.layers, both.first, both.last) == (("h.{layer}.",), ("wte.*",), ("a",))
    assert both.name == "mine.toml + base"


def test_the_example_of_the_documentation_is_right() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rules.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    rules = read_rules(example)
    assert rules.layers_per_stage == (7, 9)
    assert [str(spec) for spec in rules.parsed] == ["mp,-", "ep,-,mp", "whole", "-,-"]


def test_the_documentation_names_every_axis() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rules.md").read_text()
    missing = [n for n in AXES if not re.search(rf"\b{n}\b", text)]
    assert missing == []


@pytest.mark.parametrize("axis", ["mp", "tp"])
def test_axes_in_rules_name_the_axes_of_a_strategy(axis: str) -> None:
    rules = read_rules(f'[axes]\nheads = "{axis}"\nembed = "fsdp"\nmlp = "-"')
    layer = "model.layers.0."
    shapes = {f"{layer}self_attn.q_proj.weight": (8, 8), f"{layer}mlp.up_proj.weight": (8, 8)}
    strategy = Strategy("fsdp2mp2")
    table = table_for(Model("llama"), shapes, strategy, rules, "error")
    made = layout(shapes, strategy, table)
    assert [p.spec for (p,) in made.placements.values()] == [(("mp",), ("fsdp",)), ((), ("fsdp",))]
    assert made.notes == ()
