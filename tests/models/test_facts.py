"""Expressions of the numbers in config.json."""

from __future__ import annotations

import pytest

from jaxshard.errors import FormatError, LayoutError
from jaxshard.models.facts import evaluate, number

CONFIG = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "rope_scaling": {"rope_type": "llama3"},
    "use_mla": False,
    "head_dim": None,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("hidden_size / num_attention_heads", 8),
        ("head_dim or hidden_size / num_attention_heads", 8),
        ("hidden_size + 2 * num_attention_heads", 40),
        ("missing", None),
        ("missing + 1", None),
        ("min(hidden_size, 5)", 5),
        ("sqrt(num_attention_heads)", 2.0),
        ("rope_scaling.rope_type == 'llama3' and not use_mla", True),
        ("'llama3' in (missing, rope_scaling.rope_type)", True),
        ("hidden_size > 'text'", False),
    ],
)
def test_the_value_of_an_expression(text, value):
    assert evaluate(text, CONFIG) == value


def test_other_names_are_looked_up():
    assert number("heads * 2", CONFIG, {"heads": 4}.get) == 8


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("hidden_size / 5", FormatError, "32 is not divisible by 5"),
        ("hidden_size // 0", FormatError, "divides by 0"),
        ("0 - hidden_size", FormatError, "not a number of 0 or more"),
        ("rope_scaling.rope_type + 1", FormatError, "'llama3', not a number"),
        ("hidden_size.__class__()", LayoutError, "not supported"),
        ("[x for x in y]", LayoutError, "not supported"),
        ("a b", LayoutError, "not an expression"),
        ("(" * 400, LayoutError, "not an expression"),
    ],
)
def test_a_wrong_expression_or_value_is_refused(text, error, message):
    with pytest.raises(error, match=message):
        number(text, CONFIG)
