"""The families that the package has tables for."""

from __future__ import annotations

import pytest

import jaxshard as js
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.models import Sizes, family_of, model_types, reading

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


MINE = """
name = "mine"
types = ["mine"]
like = "llama"
[forms.hf]
rows = "down $layer.mlp.out.weight embed mlp"
"""


@pytest.fixture
def _registered(monkeypatch):
    monkeypatch.setattr(reading, "_registered", {})


@pytest.mark.usefixtures("_registered")
def test_a_registered_family_is_found_by_its_type():
    with pytest.raises(NotFoundError):
        family_of({"model_type": "mine"})
    assert js.register_models(MINE) == ("mine",)
    assert model_types()[0] == "mine"
    family = family_of({"model_type": "mine"})
    assert family.form("hf")["down"].name == "model.layers.{layer}.mlp.out.weight"


@pytest.mark.usefixtures("_registered")
def test_a_table_whose_values_depend_on_the_config_is_registered_without_one():
    js.register_models(MINE.replace("embed mlp", "embed mlp | / sqrt(embed)"))
    family = family_of({"model_type": "mine", "hidden_size": 16})
    assert Sizes(family, {"hidden_size": 16}).value(family.form("hf")["down"]).times == 0.25


@pytest.mark.usefixtures("_registered")
def test_a_wrong_table_is_not_registered():
    with pytest.raises(LayoutError, match="types is missing"):
        js.register_models(MINE.replace('types = ["mine"]', ""))
    with pytest.raises(LayoutError, match=r"my.toml.*"):
        js.register_models(MINE.replace("types = [", "types = "), "my.toml")
    with pytest.raises(LayoutError, match="write WEIGHT NAME AXES"):
        js.register_models(MINE.replace(" embed mlp", ""))
    assert "mine" not in model_types()
