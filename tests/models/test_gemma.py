"""The form ``gemma`` against the models of DeepMind's package: their logits are transformers'."""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("flax")

import gemma_oracle  # noqa: E402
import jax  # noqa: E402
from tiny_models import MODELS, saved, tiny  # noqa: E402

import jaxshard as js  # noqa: E402

HAVE_GEMMA = gemma_oracle.is_installed()
pytestmark = pytest.mark.skipif(not HAVE_GEMMA, reason="needs gemma and einops")

#: by model: a kind of transformers' models, and settings
CASES = {
    "Gemma2_2B": ("gemma2", {"query_pre_attn_scalar": 10, "hidden_size": 2304}),
    "Gemma2_9B": ("gemma2", {"query_pre_attn_scalar": 10}),
    "Gemma3_1B": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 10,
            "num_hidden_layers": 7,
            "sliding_window": 16,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            },
        },
    ),
}
IDS = np.array([[1, 5, 9, 33, 2, 7]])


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return a function that saves a tiny model: its folder, configuration and logits."""

    @functools.cache
    def one(case):
        folder, (kind, settings) = tmp_path_factory.mktemp(case), CASES[case]
        model, config, others = MODELS[kind]
        MODELS["made"] = model, config, {**others, **settings}
        made = tiny("made")
        made.save_pretrained(folder)
        with torch.no_grad():
            return folder, made.config, made(torch.tensor(IDS)).logits.numpy()

    return one


@pytest.mark.parametrize("case", CASES)
def test_a_filled_model_computes_what_transformers_computes(models, case):
    folder, config, want = models(case)
    model, inputs = gemma_oracle.model(case, config), gemma_oracle.inputs(IDS)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs)),
    )
    variables = js.load(folder, abstract, names="hf:gemma")
    got = np.asarray(model.apply(variables, **inputs).logits)
    assert np.abs(got - want).max() < 1e-5 * want.std()


@pytest.mark.parametrize("source", ["gemma:hf", "auto:hf"])
@pytest.mark.parametrize("case", CASES)
def test_a_models_weights_return(models, tmp_path, case, source):
    folder, *_ = models(case)
    variables = {"params": js.load(folder, jax.devices()[0], names="hf:gemma")}
    js.save(variables, tmp_path / "gemma", extras=folder)
    back = js.load(tmp_path / "gemma", jax.devices()[0], names=source)
    _, tensors = saved(folder)
    assert sorted(back) == sorted(tensors)
    assert all(np.array_equal(x, tensors[n].numpy()) for n, x in back.items())
