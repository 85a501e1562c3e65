"""Mappings derived from the tables of families."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from mapping_random import Sizes as Model
from mapping_random import config_of, random_model

from jaxshard.mapping.deriving import derive
from jaxshard.models import Sizes, family_of

#: Names, shapes and bytes of the random models in each form, by the tables that were written by
#: hand, family by family, before mappings were derived.
BY_HAND = json.loads((Path(__file__).parent / "derived_forms.json").read_text())
#: These tables were wrong: MaxText scales the queries of llama and mistral; Gemma's names in
#: MaxText and Tunix are not llama's, and MindFormers does not have it; nor has Tunix mistral.
WRONG = {
    "mistral: tunix",
    *(f"{kind}: maxtext" for kind in ("llama", "llama+biases", "mistral", "gemma")),
    *(f"gemma: {form}" for form in ("tunix", "mindformers", "mindformers-concat")),
    *(f"gemma: {form}" for form in ("mcore", "mcore-fused", "mcore-fused-blocks")),
}


def model_of(label):
    """The config, the tensors and the sizes of a model of ``BY_HAND``."""
    kind = label.split("+")[0].split(" ")[0]
    table = "llama" if kind == "mistral" else kind
    model = Model(biases="+biases" in label, mtp=int("+mtp" in label))
    arrays = random_model(table, model)
    if "bare" in label:
        prefix = "transformer." if kind == "gpt2" else "bert."
        arrays = {n.removeprefix(prefix): x for n, x in arrays.items()}
    return {**config_of(table, model), "model_type": kind}, arrays


def digest(arrays):
    found = hashlib.sha256()
    for name in sorted(arrays):
        x = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {x.shape} {x.dtype}\n".encode())
        found.update(x.tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("case", sorted(set(BY_HAND) - WRONG))
def test_derived_is_what_was_written_by_hand(case):
    label, form = case.split(": ")
    config, arrays = model_of(label)
    family = family_of(config, names=arrays)
    sizes = Sizes(family, config).seeing("hf", {n: x.shape for n, x in arrays.items()})
    mapping = derive(family, "hf", form, sizes)
    made = mapping.apply_arrays(arrays)
    assert digest(made) == BY_HAND[case]
    for back in (mapping.inverse(), derive(family, form, "hf", sizes)):
        assert digest(back.apply_arrays(made)) == digest(arrays)


@pytest.mark.parametrize("form", ["tunix", "maxtext", "mcore-fused", "mindformers-concat"])
@pytest.mark.parametrize(("heads", "kv"), [(4, 1), (1, 1), (4, 4)])
def test_one_kv_head_or_as_many_as_heads(form, heads, kv):
    model = Model(heads=heads, kv=kv)
    arrays = random_model("qwen2", model)
    config = config_of("qwen2", model)
    family = family_of(config, "qwen2")
    sizes = Sizes(family, config).seeing("hf", {n: x.shape for n, x in arrays.items()})
    mapping = derive(family, "hf", form, sizes)
    made = mapping.apply_arrays(arrays)
    if form == "tunix":
        assert made["layers.0.attn.k_proj.w"].shape == (8, kv, 4)
    assert digest(mapping.inverse().apply_arrays(made)) == digest(arrays)


@pytest.mark.parametrize("form", ["hf", "mcore-fused", "maxtext"])
def test_longer_vocabularies_and_repeated_heads_are_undone(form):
    """The form has 4 kv heads for the model's 2, and 32 tokens for 24."""
    model = Model()
    arrays = random_model("qwen3", model)
    config = config_of("qwen3", model)
    family = family_of(config)
    sizes = Sizes(family, config).seeing("hf", {n: x.shape for n, x in arrays.items()})
    more = {"kv_heads": 4, "token": 32, "vocab": 32}
    there = derive(family, "hf", form, sizes, more)
    made = there.apply_arrays(arrays)
    assert digest(derive(family, form, form, sizes).apply_arrays(made)) == digest(made)
    back = derive(family, form, "hf", sizes.having(more), {axis: sizes[axis] for axis in more})
    assert digest(back.apply_arrays(made)) == digest(there.inverse().apply_arrays(made))
    assert digest(back.apply_arrays(made)) == digest(arrays)
    plain = derive(family, form, "hf", sizes.having(more)).apply_arrays(made)
    k = "model.layers.1.self_attn.k_proj.weight"
    heads = arrays[k].reshape(2, 1, model.head, -1).repeat(2, axis=1)
    assert np.array_equal(plain[k], heads.reshape(4 * model.head, -1))
    assert not plain["lm_head.weight"][24:].any()
