"""Mappings between the forms of each family, of models that transformers saves and holds."""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import MODELS, MULTIMODAL, saved, tiny  # noqa: E402

from jaxshard.mapping.deriving import derive  # noqa: E402
from jaxshard.models import Sizes, family_of  # noqa: E402

KINDS = [kind for kind in MODELS if kind not in MULTIMODAL]
#: Forms of other programs do not have these weights, and no form stacks layers that differ.
ONLY_PLAIN = {"llama_bias", "llama_labels", "qwen3_moe_mixed"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function that saves a tiny model: it, its family, sizes, form and arrays."""

    @functools.cache
    def one(kind):
        folder, model = tmp_path_factory.mktemp(kind), tiny(kind)
        model.save_pretrained(folder)
        config, tensors = saved(folder)
        arrays = {n: x.numpy() for n, x in tensors.items()}
        family = family_of(config, names=arrays)
        shapes = {n: x.shape for n, x in arrays.items()}
        return model, family, Sizes(family, config).seeing("hf", shapes), arrays

    return one


def equal(a, b):
    """Compare by bytes."""
    assert sorted(a) == sorted(b)
    for name in a:
        x, y = np.asarray(a[name]), np.asarray(b[name])
        assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes()), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_leads_back_to_the_same_bytes(models, kind):
    _, family, sizes, arrays = models(kind)
    for form in family.listed:
        if any(row.steps for row in family.form(form).values()) or form in ("hf", "hf-mxfp4"):
            continue
        if kind in ONLY_PLAIN and form not in ("hf-stacked", "nnx", "linen"):
            continue
        there = derive(family, "hf", form, sizes)
        made = there.apply_arrays(arrays)
        equal(derive(family, form, "hf", sizes).apply_arrays(made), arrays)
        equal(there.inverse().apply_arrays(made), arrays)


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k.endswith(("moe", "mixed", "next", "mixtral")) or "deepseek" in k]
)
def test_stacked_experts_are_those_of_the_model_in_memory(models, kind):
    model, family, sizes, arrays = models(kind)
    made = derive(family, "hf", "hf-stacked", sizes).apply_arrays(arrays)
    equal(made, {n: x.numpy() for n, x in model.state_dict().items()})


@pytest.mark.parametrize("kind", KINDS)
def test_nnx_has_kernels_of_inputs_by_outputs(models, kind):
    """The matrices of torch's linear layers are (out, in); what it looks up has rows."""
    model, family, sizes, arrays = models(kind)
    if "nnx" not in family.listed:
        return
    made = derive(family, "hf", "nnx", sizes).apply_arrays(arrays)
    compared = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if f"{name}.weight" not in arrays:
            continue  # tied, or an expert of a stack
        values, linear = weight.detach().numpy(), isinstance(module, torch.nn.Linear)
        kind_of = "scale" if values.ndim == 1 else "kernel"
        kind_of = "embedding" if isinstance(module, torch.nn.Embedding) else kind_of
        router = name.endswith(".gate") and values.ndim == 2
        want = values.T if linear or router else values
        equal({name: made[f"{name}.{kind_of}"]}, {name: want})
        compared += 1
    assert compared > 5
