"""Layouts by the tables against transformers' own plans of tensor and expert parallelism."""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_models import MODELS, tiny

import jaxshard as js
from jaxshard.core.catalog import Model
from jaxshard.core.patterns import template
from jaxshard.models.facts import text_config
from jaxshard.rules import layout, rules_for

#: The dims, counted from the last, along which plans split a weight and its bias.
SPLITS = {
    "colwise": (-2, -1),
    "colwise_gather_output": (-2, -1),
    "rowwise": (-1, None),
    "rowwise_split_input": (-1, None),
    "packed_colwise": (-2, None),
    "packed_rowwise": (-1, None),
    "embedding_rowwise": (-2, None),
    "grouped_gemm": (0, 0),
    "replicated_with_grad_allreduce": (None, None),
    "mla_kv_a_proj": (None, None),
}
#: What plans say of modules that have no tensor of their own, and of encoders of images.
OTHERS = ("moe_tp_experts", "ep_dispatch_experts")
TOWERS = ("vision", "visual", "multi_modal_projector")
#: Linear attention is computed whole, so its matrices are split only to be stored.
WHOLE = "linear_attn"
CASES = [
    (kind, strategy)
    for kind in MODELS
    for strategy in ("mp2", "mp4", "dp2ep2")
    if not kind.startswith(("opt", "falcon", "bloom", "gpt2", "bert", "roberta", "xlm", "camem"))
]


@functools.cache
def facts_of(kind):
    """The shapes of a model's tensors, its config.json, and its two plans."""
    model = tiny(kind)
    shapes = {n: tuple(x.shape) for n, x in model.named_parameters()}
    return shapes, model.config.to_dict(), model.tp_plan, model.ep_plan


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_ranks_hold_what_transformers_plans_give_them(kind, strategy):
    ways = js.Strategy(strategy)
    shapes, config, *plans = facts_of(kind)
    plan = plans[ways.ep > 1]
    facts = Model(config["model_type"], text_config(config).get("num_hidden_layers"), False, config)
    found = layout(shapes, ways, rules_for(facts, shapes), facts)
    wanted = {n: split for n in shapes if (split := planned(plan, n)) and split not in OTHERS}
    for name, split in wanted.items():
        if any(word in name for word in TOWERS) or WHOLE in name:
            continue
        want = list(shapes[name])
        dim = SPLITS[split][name.endswith("bias")]
        if dim is not None:
            want[dim] //= ways.ep if ways.ep > 1 else ways.mp
        assert found.box_of(name, shapes[name], 0).shape == tuple(want), (name, split)
    assert wanted or ways.ep > 1


def planned(plan, name):
    """The split that a plan has for a parameter, or its module."""
    pattern = template(name).replace("#", "*")
    return plan.get(pattern, plan.get(pattern.rpartition(".")[0]))
