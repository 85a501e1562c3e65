"""Tables of families in TOML."""

from __future__ import annotations

import pathlib

import pytest

from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.models import read_family

MINE = """
name = "mine"
like = "llama"
listed = ["hf", "mine"]

[sizes]
mlp = "ffn"

[forms.hf]
rows = '''
q.bias  -
-       $layer.mlp.gate_up.weight  (gate:mlp + up:mlp) embed   # a comment
'''

[forms.mine]
like = "hf"
replace = [["model.", ""]]
prefix = "net."
stack = ["layer 0"]

[[when]]
config = "flavour == 'x'"
[when.forms.hf]
rows = "o $layer.other.weight embed (heads head_dim)"
"""


def test_a_users_family_is_laid_over_the_one_it_is_like():
    family = read_family(MINE, {})
    assert family.listed == ("hf", "mine")
    hf, mine = family.form("hf"), family.form("mine")
    assert hf["gate"] == hf["up"]
    assert hf["gate"].name == "model.layers.{layer}.mlp.gate_up.weight"
    assert "q.bias" not in hf
    assert hf["down"].name == "model.layers.{layer}.mlp.down_proj.weight"
    assert mine["k"].name == "net.layers.self_attn.k_proj.weight"
    assert str(mine["k"].axes) == "layer (kv_heads head_dim) embed"
    assert family.sizes["mlp"] == "ffn"
    other = read_family(MINE, {"flavour": "x"})
    assert other.form("hf")["o"].name == "model.layers.{layer}.other.weight"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[sizes]", "[size]", "unknown key 'size'"),
        ('like = "llama"', 'like = "lama"', "no such table"),
        ("(gate:mlp + up:mlp) embed ", "(gate:mlp + up:mlp", "ends too early"),
        ("q.bias  -", "q.bias", "write WEIGHT NAME AXES"),
        ("q.bias  -", "-  model.x.weight  embed", "several weights has no weight"),
        ("q.bias  -", "q  model.x.weight  embed | ^ 2", "steps '\\^ 2' are invalid"),
        ("q.bias  -", "q  $layer.q  layer embed", "in the name and in the axes"),
        ('listed = ["hf", "mine"]', 'listed = ["hf", "yours"]', "no \\[forms.yours\\]"),
        ('like = "hf"', 'like = "mine"', "like itself"),
        ('stack = ["layer 0"]', 'stack = ["layers"]', "stack must be"),
        ('replace = [["model.", ""]]', 'replace = ["model."]', "replace must be"),
        ("flavour == 'x'", "flavour ==", "not an expression"),
        ('mlp = "ffn"', "mlp = 3", "texts in quotes"),
    ],
)
def test_a_mistake_is_an_error_that_tells_it(old, new, message):
    assert old in MINE
    with pytest.raises((LayoutError, NotFoundError), match=message):
        read_family(MINE.replace(old, new), {})


def test_the_example_of_the_documentation_is_a_family():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    family = read_family(example, {"model_type": "mine", "use_bias": True})
    hf = family.form("hf")
    assert hf["v"].name == "model.blocks.{layer}.attn.qkv.weight"
    assert hf["k.bias"].axes.weights == ("q.bias", "k.bias", "v.bias")
    assert hf["embed"].name == "model.embed_tokens.weight"
    assert "q.bias" not in read_family(example, {"model_type": "mine"}).form("hf")
