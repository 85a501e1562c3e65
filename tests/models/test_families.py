"""The tables of families against transformers' own models: names, shapes, meanings of axes."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from permuted_models import Computed, Permutation  # noqa: E402
from tiny_models import MODELS, saved, tiny  # noqa: E402

from jaxshard.models import Sizes, family_of  # noqa: E402

KINDS = list(MODELS)
#: Without a rotary embedding, a bias of k adds the same to a query's scores of all keys.
WITHOUT_EFFECT = {
    (kind, "k.bias") for kind in ("opt", "opt_350m", "bert", "roberta", "xlm-roberta", "camembert")
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return a function that saves a tiny model: its folder, config.json, and tensors."""

    @functools.cache
    def one(kind):
        folder = tmp_path_factory.mktemp(kind)
        tiny(kind).save_pretrained(folder)
        return (folder, *saved(folder))

    return one


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_a_row_and_its_axes_are_its_shape(models, kind):
    _, config, tensors = models(kind)
    family = family_of(config)
    weights = {n: family.find("hf", n) for n in tensors}
    assert [n for n, weight in weights.items() if weight is None] == []
    sizes = Sizes(family, config)
    for name, tensor in tensors.items():
        axes = family.form("hf")[weights[name]].axes
        assert tuple(map(sizes.length, axes.dims)) == tuple(tensor.shape), (name, str(axes))


def form_in_memory(family, names):
    """The form whose names are those of the model in memory."""
    return next(f for f in family.listed if all(family.find(f, n) for n in names))


@pytest.mark.parametrize("kind", KINDS)
def test_axes_mean_what_they_are_called(kind, monkeypatch):
    model = tiny(kind)
    config = model.config.to_dict()
    family = family_of(config)
    computed = Computed(model, config["vocab_size"], "type_vocab_size" in config)
    form, sizes = form_in_memory(family, computed.tensors), Sizes(family, config)
    permutation = Permutation(family, form, sizes, computed.tensors)
    before, want = computed.arrays(), computed.logits({})
    after = permutation.applied(before, before)
    computed.put(after)
    axes = {a for found in permutation.axes_of.values() for a in found}
    if "half" in axes:
        computed.turn(permutation.order("half"))
    if "rope" in axes:
        computed.turn(permutation.order("rope")[::2] // 2)
    first_axes = {n: permutation.rows[n].axes.dims[0].names[0] for n in computed.looked_up}
    permute_alibi(monkeypatch, model, permutation.order("kv_heads"))
    lookups = {n: permutation.order(axis) for n, axis in first_axes.items()}
    outputs = permutation.order(output_axis(family, form, permutation))
    want = want[..., outputs]
    assert differs(computed.logits(lookups), want) < 1e-4
    for row, its_axes in permutation.axes_of.items():
        for axis in its_axes:
            names = [n for n, r in permutation.rows.items() if r == row]
            computed.put(permutation.applied(before, names, left_out=axis))
            left = differs(computed.logits(lookups), want)
            computed.put({n: after[n] for n in names})
            no_effect = (kind, family.find(form, names[0])) in WITHOUT_EFFECT
            assert (left < 1e-4) == no_effect, (row.name, axis, left)


def permute_alibi(monkeypatch, model, heads):
    """Permute what each head adds to its scores by distance, if the model has this."""
    module = sys.modules[type(model).__module__]
    for name in ("_get_alibi_slopes", "build_alibi_tensor"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, by_heads(getattr(module, name), heads))
            return


def by_heads(function, heads):
    """The function with the heads of its result, its first dim, permuted."""

    def permuted(*args, **kwargs):
        return function(*args, **kwargs).unflatten(0, (-1, heads.size))[:, heads].flatten(0, 1)

    return permuted


def differs(got, want):
    """The largest difference of outputs, in standard deviations."""
    return float(np.abs(got - want).max() / want.std())


def output_axis(family, form, permutation):
    """The axis of the model's outputs: of the head, or of the embedding that is the head too."""
    weights = {family.find(form, n) for n in permutation.rows}
    row = family.form(form)["head" if "head" in weights else "embed"]
    return row.axes.dims[0].names[0]
