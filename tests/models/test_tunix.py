"""The form ``tunix`` against Tunix's own models: their logits are those of transformers'."""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
nnx = pytest.importorskip("flax.nnx")

import jax  # noqa: E402
import tunix_oracle  # noqa: E402
from tiny_models import MODELS, saved, tiny  # noqa: E402

import jaxshard as js  # noqa: E402
from jaxshard.devices.pytree import named_leaves  # noqa: E402
from jaxshard.loader import load  # noqa: E402

HAVE_TUNIX = tunix_oracle.is_installed()
pytestmark = [
    pytest.mark.skipif(not HAVE_TUNIX, reason="needs google-tunix, jaxtyping and einops"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Tunix uses older names of JAX
]

#: Tunix has these numbers in its code
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}
SLIDING = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
#: by case: a model's kind, and settings
CASES = {
    "llama": ("llama", {"attention_bias": False, **THETA}),
    "qwen2": ("qwen2", THETA),
    "qwen3": ("qwen3", THETA),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True, **THETA}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": True, **THETA}),
    "gemma": ("gemma", {}),
    "gemma_without_groups": ("gemma", {"num_key_value_heads": 12}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 10}),
    "gemma3": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 10,
            "num_hidden_layers": 7,
            "sliding_window": 16,
            "rope_parameters": SLIDING,
        },
    ),
}
IDS = np.array([[1, 5, 9, 33, 2, 7]])


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return a function that saves a tiny model: its folder, kind, configuration and logits."""

    @functools.cache
    def one(case):
        folder, (kind, settings) = tmp_path_factory.mktemp(case), CASES[case]
        model, config, others = MODELS[kind]
        MODELS["made"] = model, config, {**others, **settings}
        made = tiny("made")
        made.save_pretrained(folder)
        with torch.no_grad():
            return folder, kind, made.config, made(torch.tensor(IDS)).logits.numpy()

    return one


def mesh_of(fsdp, tp):
    """Return a mesh as Tunix's users make it."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[: fsdp * tp]
    return jax.make_mesh((fsdp, tp), ("fsdp", "tp"), axis_types=auto, devices=devices)


@pytest.mark.parametrize("case", CASES)
def test_a_filled_model_computes_what_transformers_computes(models, case):
    folder, kind, config, want = models(case)
    graph, abstract = nnx.get_abstract_model(
        lambda: tunix_oracle.model(kind, config), mesh_of(1, 1)
    )
    state = js.load(folder, abstract, names="hf:tunix")
    assert isinstance(state, nnx.State)
    got = np.asarray(tunix_oracle.logits(nnx.merge(graph, state), IDS))
    assert np.abs(got - want).max() < 1e-5 * want.std()


@pytest.mark.parametrize("case", CASES)
def test_a_models_weights_return(models, tmp_path, case):
    folder, *_ = models(case)
    js.save(js.load(folder, jax.devices()[0], names="hf:tunix"), tmp_path / "tunix", extras=folder)
    back = js.load(tmp_path / "tunix", jax.devices()[0], names="tunix:hf")
    _, tensors = saved(folder)
    assert sorted(back) == sorted(tensors)
    assert all(np.array_equal(x, tensors[n].numpy()) for n, x in back.items())


@pytest.mark.parametrize("case", ["llama", "qwen3_moe"])
def test_all_devices_together_read_every_byte_once(models, case):
    folder, kind, config, _ = models(case)
    counts = []
    _, abstract = nnx.get_abstract_model(lambda: tunix_oracle.model(kind, config), mesh_of(4, 2))
    state = load(folder, abstract, names="hf:tunix", counted=counts.append)
    whole = js.load(folder, jax.devices()[0], names="hf:tunix")
    for name, array in named_leaves(state)[0]:
        assert np.array_equal(array, whole[name]), name
    assert counts[0].bytes_read == counts[0].bytes_needed == sum(x.nbytes for x in whole.values())


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_a_model_that_tunix_does_not_have_is_refused(tmp_path, kind):
    tiny(kind).save_pretrained(tmp_path)
    with pytest.raises(js.NotFoundError, match=f"{kind} has no form 'tunix'"):
        js.load(tmp_path, jax.devices()[0], names="hf:tunix")
