"""The tables of families against transformers' own models: names, shapes, meanings of axes."""

from __future__ import annotations

import functools
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from permuted_models import Computed, Permutation  # noqa: E402
from tiny_models import MODELS, MULTIMODAL, saved, tiny  # noqa: E402

from jaxshard.core.patterns import Patterns, template  # noqa: E402
from jaxshard.models import Sizes, family_of  # noqa: E402
from jaxshard.rules.match import towers  # noqa: E402

KINDS = list(MODELS)
#: Without a rotary embedding, a bias of k adds the same to a query's scores of all keys.
WITHOUT_EFFECT = {
    (kind, "k.bias")
    for kind in KINDS
    if kind.startswith(("opt", "bert", "roberta", "xlm-roberta", "camembert"))
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


def text_family(config, names):
    """The family of the text model, and the names that are not of its encoders of images."""
    apart = Patterns(towers(names, config))
    text = [n for n in names if apart.find(n, template(n)) is None]
    return family_of(config, names=text), text


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_a_row_and_its_axes_are_its_shape(models, kind):
    _, config, tensors = models(kind)
    family, text = text_family(config, tensors)
    assert len(text) == len(tensors) - number_of_others(kind)
    shapes = {n: tuple(tensors[n].shape) for n in text}
    form, left = Sizes(family, config).form_of(shapes)
    assert left == ()
    assert form == ("hf-stacked" if kind == "qwen3_vl_moe" else "hf")
    sizes = Sizes(family, config).seeing(form, shapes)
    for name, shape in shapes.items():
        axes = family.form(form)[family.find(form, name)].axes
        assert tuple(map(sizes.length, axes.dims)) == shape, name


def number_of_others(kind):
    """The number of tensors that are not of the text model."""
    if kind not in MULTIMODAL:
        return 0
    names = dict(tiny(kind).named_parameters())
    return sum(".language_model." not in f".{n}" and not n.startswith("lm_head") for n in names)


def computed_and_permutation(kind):
    """A model, and the permutations of the tensors of its text model."""
    model = tiny(kind)
    config = model.config.to_dict()
    computed = Computed(model, "type_vocab_size" in config)
    family, text = text_family(config, list(computed.tensors))
    sizes, shapes = Sizes(family, config), {n: tuple(computed.tensors[n].shape) for n in text}
    form, left = sizes.form_of(shapes)
    assert left == ()
    return computed, Permutation(family, form, sizes.seeing(form, shapes), text)


@pytest.mark.parametrize("kind", KINDS)
def test_axes_mean_what_they_are_called(kind, monkeypatch):
    computed, permutation = computed_and_permutation(kind)
    before, want = computed.arrays(), computed.logits({})
    after = permutation.applied(before, permutation.rows)
    computed.put(after)
    axes = {a for found in permutation.axes_of.values() for a in found}
    if "half" in axes:
        computed.turn(permutation.order("half"))
    if "rope" in axes:
        computed.turn(permutation.order("rope")[::2] // 2)
    permute_alibi(monkeypatch, computed.model, permutation.order("kv_heads"))
    looked_up = [n for n in computed.looked_up if n in permutation.rows]
    first_axes = {n: permutation.rows[n].axes.dims[0].names[0] for n in looked_up}
    lookups = {n: permutation.order(axis) for n, axis in first_axes.items()}
    outputs = (permutation.row(weight) for weight in ("label", "head", "embed"))
    head = next(row for row in outputs if row)
    want = want[..., permutation.order(head.axes.dims[0].names[0])]
    assert differs(computed.logits(lookups), want) < 1e-4
    for row, its_axes in permutation.axes_of.items():
        for axis in its_axes:
            names = [n for n, r in permutation.rows.items() if r == row]
            computed.put(permutation.applied(before, names, left_out=axis))
            left = differs(computed.logits(lookups), want)
            computed.put({n: after[n] for n in names})
            no_effect = (kind, permutation.weight(names[0])) in WITHOUT_EFFECT
            assert (left < 1e-4) == no_effect, (row.name, axis, left)


def computed_with(computed, arrays, before):
    """What a model computes with some other tensors."""
    computed.put(arrays)
    got = computed.logits({})
    computed.put(before)
    return got


#: The output is linear in the first weight, but not in the second, before the third.
LINEAR = [
    ("v", None, "o"),
    ("up", "gate", "down"),
    ("e.up", "e.gate", "e.down"),
    ("s.up", "s.gate", "s.down"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_share_a_tensor_are_in_this_order(kind):
    """Permutations do not tell gate from up, nor k from v."""
    computed, permutation = computed_and_permutation(kind)
    before, want = computed.arrays(), computed.logits({})

    def difference(steps):
        got = computed_with(computed, permutation.changed(before, steps), before)
        return differs(got, want)

    for linear, other, output in LINEAR:
        if not permutation.has(linear) or not (other is None or permutation.has(other)):
            continue
        if kind == "gpt_oss" and linear == "up":  # gate (up + 1)
            none = {"gate": (0, 0), "gate.bias": (0, 0)}
            want, plain = computed_with(computed, permutation.changed(before, none), before), want
            assert difference({**none, "down": (2, 0)}) < 1e-4
            want = plain
            continue
        twice = {linear: (2, 0), f"{linear}.bias": (2, 0), output: (0.5, 0)}
        assert difference(twice) < 1e-4, linear
        if other:
            assert difference({other: (2, 0), f"{other}.bias": (2, 0), output: (0.5, 0)}) > 1e-3
    if kind.startswith("qwen3_next"):
        none = {"l.decay": (0, -50)}  # then l.a has no effect
        want = computed_with(computed, permutation.changed(before, none), before)
        assert difference({**none, "l.a": (2, 0)}) < 1e-4
        assert difference({**none, "l.b": (2, 0)}) > 1e-3
        want = computed.logits({})
        assert difference({"q": (2, 0)}) < 1e-4  # it is normalized, its gate is not
        assert difference({"q.gate": (2, 0)}) > 1e-3
    if permutation.has("k.bias") and not (permutation.has("k_norm") or permutation.has("sinks")):
        computed.still()
        want = computed.logits({})
        assert difference({"k.bias": (1, 1)}) < 1e-4
        assert difference({"q.bias": (1, 1)}) > 1e-3


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
