"""Adapters that stay adapters: PEFT's in the forms of other programs, and back."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
nnx = pytest.importorskip("flax.nnx")

import jax  # noqa: E402
import tunix_oracle  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from tiny_models import MODELS, tiny  # noqa: E402

import jaxshard as js  # noqa: E402
from jaxshard.devices.pytree import named_leaves  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

RANK, ALPHA = 3, 12.0
IDS = np.array([[1, 5, 9, 33, 2, 7]])
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module", params=[THETA, {"rope_parameters": SCALED}], ids=["", "scaled"])
def adapted(tmp_path_factory, request):
    """A tiny llama and its trained adapter, as PEFT saves them, and the model."""
    folder = tmp_path_factory.mktemp("adapted")
    model, config, others = MODELS["llama"]
    MODELS["made"] = model, config, {**others, "attention_bias": False, **request.param}
    base = tiny("made")
    base.save_pretrained(folder / "base")
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    made = peft.get_peft_model(base, settings)
    torch.manual_seed(1)
    for name, x in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(x, std=0.2)
    made.save_pretrained(folder / "adapter")
    return folder, made


def arrays(path):
    return load_file(path / "adapter_model.safetensors")


def test_peft_finds_its_own_adapter_again(adapted, tmp_path):
    folder, _ = adapted
    config = folder / "base"
    for form in ("tunix", "maxtext", "maxtext-unscanned", "mindformers", "mcore"):
        there = js.load(folder / "adapter", jax.devices()[0], names=f"hf:{form}", config=config)
        back = tmp_path / form
        text = json.loads((config / "config.json").read_text())
        js.save(there, back, names=f"{form}:hf", config=text, extras=folder / "adapter")
        before, after = arrays(folder / "adapter"), arrays(back)
        assert before.keys() == after.keys()
        for name, x in before.items():
            if "maxtext" in form and "q_proj.lora_B" in name:  # divided by a root, and multiplied
                np.testing.assert_allclose(after[name], x, rtol=3e-7)
            else:
                np.testing.assert_array_equal(after[name], x, err_msg=name)
    base = transformers.AutoModelForCausalLM.from_pretrained(config)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "tunix")
    with torch.no_grad():
        ids = torch.tensor(IDS)
        got, want = again(ids).logits, adapted[1].eval()(ids).logits
    assert (got - want).abs().max() < 1e-4 * want.std()


@pytest.mark.parametrize("form", ["maxtext", "maxtext-unscanned", "tunix"])
def test_merged_before_or_after_is_the_same(adapted, tmp_path, form):
    folder, model = adapted
    device = jax.devices()[0]
    names, config = f"hf:{form}", folder / "base"
    base = js.load(config, device, names=names)
    adapter = js.load(folder / "adapter", device, names=names, config=config)
    js.merge_lora(config, tmp_path / "merged", adapter=folder / "adapter")
    want = js.load(tmp_path / "merged", device, names=names)
    touched = 0
    for name, x in base.items():
        if f"{name}_lora_a" not in adapter:
            assert np.array_equal(x, want[name]), name
            continue
        touched += 1
        a, b = (np.asarray(adapter[f"{name}_lora_{half}"], np.float64) for half in "ab")
        if form == "maxtext":  # layers are dim 1 of each
            layers = [a[:, i] @ b[:, i] for i in range(a.shape[1])]
            one = (x.shape[0], *x.shape[2:])
            product = np.stack([layer.reshape(one) for layer in layers], axis=1)
        else:
            product = np.tensordot(a, b, 1).reshape(x.shape)
        np.testing.assert_allclose(x + product * ALPHA / RANK, want[name], atol=2e-6, err_msg=name)
    assert touched == 7 * (1 if form == "maxtext" else model.config.num_hidden_layers)


@pytest.mark.skipif(not tunix_oracle.is_installed(), reason="needs google-tunix")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tunix_computes_with_the_adapter_what_peft_computes(adapted):
    qwix = pytest.importorskip("qwix")
    folder, model = adapted
    if model.config.rope_parameters["rope_type"] != "default":
        pytest.skip("Tunix ignores the scaling of rotary frequencies")
    config = folder / "base"
    graph, abstract = nnx.get_abstract_model(
        lambda: tunix_oracle.model("llama", model.config),
        jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2),
    )
    base = nnx.merge(graph, js.load(config, abstract, names="hf:tunix"))
    provider = qwix.LoraProvider(
        module_path=".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        rank=RANK,
        alpha=ALPHA,
    )
    inputs = base.get_model_input()
    lora = qwix.apply_lora_to_model(base, provider, **inputs, rngs=nnx.Rngs(0))
    adapter = js.load(folder / "adapter", jax.devices()[0], names="hf:tunix", config=config)
    state = nnx.state(lora)
    leaves, structure = named_leaves(state)
    known = [name for name, _ in leaves if "_lora_" in name]
    assert sorted(known) == sorted(adapter)
    values = [adapter.get(name, x) for name, x in leaves]
    nnx.update(lora, jax.tree.unflatten(structure, values))
    with torch.no_grad():
        want = model.eval()(torch.tensor(IDS)).logits.numpy()
    got = np.asarray(tunix_oracle.logits(lora, IDS))
    assert np.abs(got - want).max() < 1e-5 * want.std()
    plain = np.asarray(tunix_oracle.logits(base, IDS))
    assert np.abs(plain - want).max() > 0.01 * want.std()  # the adapter matters
