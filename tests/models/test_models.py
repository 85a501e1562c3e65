"""The families that the package has tables for."""

from __future__ import annotations

import pytest

from jaxshard.errors import NotFoundError
from jaxshard.models import Sizes, family_of, model_types

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("kind", model_types())
def test_every_form_of_every_family_is_valid(kind):
    family = family_of({**LLAMA, "model_type": kind})
    assert "hf" in family.listed
    for form in family.listed:
        names = [c.name for c in family.form(form).values()]
        assert names
        assert not [n for n in names if "$" in n]


def test_text_models_inside_others_are_read_where_they_are():
    inner = {**LLAMA, "model_type": "qwen3"}
    family = family_of({"model_type": "somebody's", "text_config": inner})
    assert family.name == "qwen3"
    assert Sizes(family, {"text_config": inner})["embed"] == 32


def test_an_unknown_model_is_refused_with_those_that_are_known():
    with pytest.raises(NotFoundError, match=r"'mamba'.*known: .*llama"):
        family_of({"model_type": "mamba"})
