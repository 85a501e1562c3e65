"""Expressions of the numbers in config.json."""

from __future__ import annotations

import pytest

from jaxshard.errors import FormatError, LayoutError
from jaxshard.models import Sizes, family_of
from jaxshard.models.facts import evaluate, number, text_config

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


@pytest.mark.parametrize(
    "path",
    [
        ("text_config",),
        ("llm_config",),
        ("language_config",),
        ("thinker_config", "text_config"),
        ("vlm_config", "text_config"),
    ],
)
def test_the_text_models_part_of_a_configuration_is_found(path):
    text = {"model_type": "qwen2", "hidden_size": 8}
    config = text
    for key in reversed(path):
        config = {"model_type": "other", key: config}
    assert text_config(config) == text
    assert Sizes(family_of(config), config)["embed"] == 8
