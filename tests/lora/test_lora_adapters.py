"""Who says how strongly adapters act, what contradicts it, and what no config may do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_lora import QUICK, save, small, weights

from jaxshard.api import convert
from jaxshard.errors import FormatError, LayoutError, NotFoundError
from jaxshard.lora import merge_lora, with_adapter


def scaling_of(catalog, name: str = "l.0.q.weight") -> float:
    (piece,) = catalog[name].shards
    return piece.view.steps[0].scaling


def test_a_missing_alpha_is_reported_with_every_searched_place(tmp_path) -> None:
    place = save(small(), tmp_path / "a" / "b" / "c")
    with pytest.raises(NotFoundError) as caught:
        with_adapter(place)
    said = str(caught.value)
    for folder in (place, tmp_path / "a" / "b", tmp_path / "a", tmp_path):
        for name in ("adapter_config.json", "mindformers_adapter_config.json"):
            assert str(folder / name) in said
    assert "alpha= of the training (--alpha)" in said
    (tmp_path / "a" / "adapter_config.json").write_text('{"r": 2}')  # found, and says nothing
    with pytest.raises(NotFoundError) as caught:
        with_adapter(place)
    said = str(caught.value)
    assert str(tmp_path / "a" / "adapter_config.json") in said
    assert str(place / "adapter_config.json") in said
    assert str(tmp_path / "adapter_config.json") not in said


def test_mindformers_own_config_is_read_too(tmp_path) -> None:
    place = save(small(), tmp_path / "a")
    told = {"format": "mindformers_pynative_lora_adapter_v1", "lora_config": {"lora_alpha": 6}}
    (tmp_path / "mindformers_adapter_config.json").write_text(json.dumps(told))
    assert scaling_of(with_adapter(place)) == 3


def test_a_given_alpha_goes_before_the_config_and_not_against_its_patterns(tmp_path) -> None:
    plain = save(small(), tmp_path / "plain", lora_alpha=8, r=2)
    assert scaling_of(with_adapter(plain, alpha=2)) == 1
    assert not any("Alpha comes from" in n for n in with_adapter(plain, alpha=2).notes)
    assert any("Alpha comes from" in n for n in with_adapter(plain).notes)
    patterns = save(small(), tmp_path / "p", lora_alpha=8, alpha_pattern={"0.q": 6})
    assert scaling_of(with_adapter(patterns)) == 3
    assert scaling_of(with_adapter(patterns, alpha=8)) == 3  # says the same
    assert scaling_of(with_adapter(patterns, scaling=0.5)) == 0.5
    with pytest.raises(LayoutError, match=r"alpha=2 was passed, but .*config.json has 8.* has 1"):
        with_adapter(patterns, alpha=2)
    only = save(small(), tmp_path / "only", alpha_pattern={"k": 6})
    assert scaling_of(with_adapter(only, alpha=2)) == 1


def test_a_different_rank_is_reported_with_its_origin(tmp_path) -> None:
    place = save(small(), tmp_path / "a", lora_alpha=8, r=8)
    for how in ({}, {"alpha": 4}, {"scaling": 1.0}):
        with pytest.raises(FormatError, match=r"has rank 2, but /.*adapter_config\.json has 8"):
            with_adapter(place, **how)
    with pytest.raises(LayoutError, match=r"has rank 2, but adapter_rank= .* is 4"):
        with_adapter(place, adapter_rank=4)
    assert scaling_of(with_adapter(place, adapter_rank=2)) == 4


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"lora_alpha": 1e400}', "1e400 exceeds a 64-bit float"),
        ('{"lora_alpha": 1%s}' % ("0" * 400), "lora_alpha is 1000.*, expected a finite number"),
        ('{"lora_alpha": true}', "not a number"),
        ('{"lora_alpha": 4, "r": 1e400}', "1e400 exceeds a 64-bit float"),
        ('{"lora_alpha": 4, "r": 0}', "r is 0, not a rank of 1 or more"),
        ('{"lora_alpha": 4, "r": 2.5}', "not a rank of 1 or more"),
        (
            '{"lora_alpha": 4, "rank_pattern": {"q": 1e400}}',
            "1e400 exceeds a 64-bit float",
        ),
        ('{"lora_alpha": 4, "rank_pattern": {"q": 0}}', "q is 0, not a rank"),
        ('{"lora_alpha": 4, "rank_pattern": ["q"]}', "not a table of names and numbers"),
        ('{"lora_alpha": 4, "alpha_pattern": {"q": null}}', "not a number"),
        ('{"lora_alpha": 4, "alpha_pattern": {"q{99999999999}": 1}}', "not a regular expression"),
        ('{"lora_alpha": 4, "alpha_pattern": {"(?i)q": 1}}', "not a regular expression"),
    ],
)
def test_an_untrusted_config_is_refused_without_a_crash(tmp_path, config, said) -> None:
    place = save(small(), tmp_path / "a")
    (place / "adapter_config.json").write_text(config)
    with pytest.raises(FormatError, match=said):
        with_adapter(place)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_alpha_is_a_number(tmp_path, number) -> None:
    save(small(), tmp_path / "a")
    for how in ({"alpha": number}, {"scaling": number}):
        with pytest.raises(LayoutError, match="expected a finite number"):
            with_adapter(tmp_path / "a", **how)


# --- what lies where, and fits what -----------------------------------------------------------


def test_adapters_inside_the_base_and_beside_it_are_not_chosen_between(tmp_path) -> None:
    save(small(), tmp_path / "base")
    pair = {n: x for n, x in small().items() if "lora" in n}
    save(pair, tmp_path / "pair", lora_alpha=4)
    with pytest.raises(LayoutError, match=r"has 2 tensors of adapters itself \(l\.0\.q\.lora"):
        with_adapter(tmp_path / "base", tmp_path / "pair")
    save({n: x for n, x in small().items() if "lora" not in n}, tmp_path / "bare")
    assert scaling_of(with_adapter(tmp_path / "bare", tmp_path / "pair")) == 2


def embedding(tokens: int = 10, dim: int = 4) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "embed.weight": random.normal(size=(tokens, dim)).astype(np.float32),
        "embed.lora_embedding_A": random.normal(size=(2, 10)).astype(np.float32),
        "embed.lora_embedding_B": random.normal(size=(4, 2)).astype(np.float32),
    }


def test_an_adapter_of_an_embedding_fits_one_way_only(tmp_path) -> None:
    tensors = embedding()
    save(tensors, tmp_path / "src")
    merge_lora(tmp_path / "src", tmp_path / "m", alpha=2, **QUICK)
    delta = (tensors["embed.lora_embedding_B"] @ tensors["embed.lora_embedding_A"]).T
    made = weights(tmp_path / "m")["embed.weight"]
    np.testing.assert_allclose(made, tensors["embed.weight"] + delta, rtol=1e-6, atol=1e-6)
    save(embedding() | {"embed.weight": tensors["embed.weight"].T.copy()}, tmp_path / "turned")
    with pytest.raises(LayoutError, match=r"\(4, 10\) does not fit B @ A, which is 10 x 4"):
        with_adapter(tmp_path / "turned", alpha=2)
    save(embedding(tokens=12), tmp_path / "resized")
    with pytest.raises(LayoutError, match=r"\(12, 4\) does not fit"):
        with_adapter(tmp_path / "resized", alpha=2)


def test_a_module_saved_with_the_adapter_has_the_shape_that_it_replaces(tmp_path) -> None:
    base = {n: x for n, x in small().items() if "lora" not in n}
    save(base, tmp_path / "base")
    pair = {n: x for n, x in small().items() if "lora" in n}
    saved = "base_model.model.l.0.norm.modules_to_save.default.weight"
    save(pair | {saved: np.ones(6, np.float32)}, tmp_path / "right", lora_alpha=4)
    merge_lora(tmp_path / "base", tmp_path / "m", adapter=tmp_path / "right", **QUICK)
    np.testing.assert_array_equal(weights(tmp_path / "m")["l.0.norm.weight"], np.ones(6))
    save(pair | {saved: np.ones(7, np.float32)}, tmp_path / "wrong", lora_alpha=4)
    with pytest.raises(LayoutError, match=r"shape \(7,\) was saved with the adapter .*\(6,\)"):
        with_adapter(tmp_path / "base", tmp_path / "wrong")


def test_an_adapter_of_rank_zero_is_no_pair(tmp_path) -> None:
    tensors = small() | {
        "l.0.q.lora_a": np.zeros((0, 6), np.float32),
        "l.0.q.lora_b": np.zeros((8, 0), np.float32),
    }
    save(tensors, tmp_path / "src")
    with pytest.raises(LayoutError, match=r"are not a pair: .* of rank 1 or more"):
        with_adapter(tmp_path / "src", alpha=1)


def test_a_quantized_base_is_merged_after_the_remedy_of_the_error(tmp_path) -> None:
    import ml_dtypes  # noqa: PLC0415
    from mapping_random import Sizes, config_of, random_model, write_model  # noqa: PLC0415

    from jaxshard.api import convert  # noqa: PLC0415

    sizes = Sizes(layers=1)
    tensors = random_model("llama", sizes)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    factors = {f"{name}_scale_inv": np.full((1, 1), 2, np.float32)}
    base = write_model(
        tmp_path / "base", config_of("llama", sizes) | {"dtype": "float32"}, tensors | factors
    )
    random = np.random.default_rng(0)
    at = name.removesuffix("weight")
    pair = {f"{at}lora_A.weight": (2, 8), f"{at}lora_B.weight": (16, 2)}
    pair = {n: random.normal(size=s).astype(np.float32) for n, s in pair.items()}
    save(pair, tmp_path / "pair", lora_alpha=2)
    with pytest.raises(LayoutError, match=r'names="auto" \(--names auto\)'):
        with_adapter(base, tmp_path / "pair")
    convert(base, tmp_path / "true", names="auto", **QUICK)
    merge_lora(tmp_path / "true", tmp_path / "m", adapter=tmp_path / "pair", **QUICK)
    a, b = pair.values()
    expected = tensors[name].astype(np.float32) * 2 + b @ a
    np.testing.assert_allclose(weights(tmp_path / "m")[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"trainable_token_indices": [1, 5]}, "only a product B @ A can be added"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "only a product B @ A can be added"),
        ({"init_lora_weights": "pissa"}, "weights were changed at the start of its training"),
        ({"init_lora_weights": "pissa_niter_16"}, "weights were changed"),
        ({"init_lora_weights": "olora"}, "weights were changed"),
        ({"modules_to_save": "lm_head"}, "not a list of names"),
        ({"alora_invocation_tokens": [1, 2]}, "only a product B @ A can be added"),
    ],
)
def test_what_is_more_than_a_product_on_the_models_own_weights_is_refused(tmp_path, said, told):
    place = save(small(), tmp_path / "a", peft_type="LORA", lora_alpha=4, **said)
    with pytest.raises((LayoutError, FormatError), match=told):
        with_adapter(place)


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "eva"])
def test_other_first_values_leave_the_base_as_it_was(tmp_path, start):
    place = save(small(), tmp_path / "a", peft_type="LORA", lora_alpha=4, init_lora_weights=start)
    assert scaling_of(with_adapter(place)) == 2


def test_an_unknown_tensor_is_not_added_to_the_model(tmp_path):
    pair = {n: x for n, x in small().items() if "lora" in n}
    base = save({n: x for n, x in small().items() if n not in pair}, tmp_path / "base")
    stray = {**pair, "l.0.norm.foo": np.ones(2, np.float32), "score.weight": np.ones(2, np.float32)}
    config = {"peft_type": "LORA", "lora_alpha": 4}
    adapter = save(stray, tmp_path / "a", **config, modules_to_save=["score"])
    with pytest.raises(
        LayoutError, match=r"l\.0\.norm\.foo is stored with the adapter but is not part of LoRA"
    ):
        with_adapter(base, adapter)
    del stray["l.0.norm.foo"]
    adapter = save(stray, tmp_path / "b", **config, modules_to_save=["score"])
    assert "score.weight" in with_adapter(base, adapter).tensors


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SAVED = {"modules_to_save": ["embed_tokens"]}


def tied(tmp_path, *, more: dict[str, np.ndarray], **config: object):
    """A base whose head is its embedding, merged with an adapter that has ``more``."""
    base = {n: x for n, x in small().items() if "lora" not in n}
    save({**base, EMBEDDING: np.ones((8, 6), np.float32)}, tmp_path / "base")
    told = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({**told, "tie_word_embeddings": True})
    )
    pair = {n: x for n, x in small().items() if "lora" in n}
    adapter = save({**pair, **more}, tmp_path / "a", peft_type="LORA", lora_alpha=4, **config)
    return with_adapter(tmp_path / "base", adapter)


def test_a_head_is_not_changed_by_an_embedding_that_it_is_tied_to(tmp_path):
    new = np.full((8, 6), 2, np.float32)
    with pytest.raises(LayoutError, match=r"head of .*, which is tied to it, was not trained"):
        tied(tmp_path, more={EMBEDDING: new}, **SAVED)


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": None},  # save_pretrained(save_embedding_layers=True)
    ],
)
def test_a_head_saved_with_its_embedding_is_used_with_a_note(tmp_path, config):
    new = np.full((8, 6), 2, np.float32)
    made = tied(tmp_path, more={EMBEDDING: new, HEAD: new + 1}, **config)
    assert any("set tie_word_embeddings to false" in note for note in made.notes)
    convert(made, tmp_path / "out")
    found = weights(tmp_path / "out")
    np.testing.assert_array_equal(found[EMBEDDING], new)
    np.testing.assert_array_equal(found[HEAD], new + 1)


def test_a_head_that_was_trained_as_its_embedding_stays_tied(tmp_path):
    new = np.full((8, 6), 2, np.float32)
    config = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    convert(tied(tmp_path, more={EMBEDDING: new, HEAD: new}, **config), tmp_path / "out")
    found = weights(tmp_path / "out")
    np.testing.assert_array_equal(found[EMBEDDING], new)
    assert HEAD not in found


def test_an_adapted_tied_embedding_changes_the_head_as_in_peft(tmp_path):
    stem = "base_model.model.model.embed_tokens."
    more = {
        stem + "base_layer.weight": np.ones((8, 6), np.float32),
        stem + "lora_embedding_A": np.ones((2, 8), np.float32),
        stem + "lora_embedding_B": np.ones((6, 2), np.float32),
    }
    made = tied(tmp_path, more=more)
    assert any("is also the head" in note for note in made.notes)
    convert(made, tmp_path / "out")
    np.testing.assert_array_equal(weights(tmp_path / "out")[EMBEDDING], np.full((8, 6), 5.0))


def test_a_tied_head_that_is_adapted_would_change_the_embedding(tmp_path):
    stem = "base_model.model.lm_head."
    more = {
        stem + "base_layer.weight": np.ones((8, 6), np.float32),
        stem + "lora_A.weight": np.ones((2, 6), np.float32),
        stem + "lora_B.weight": np.ones((8, 2), np.float32),
    }
    with pytest.raises(LayoutError, match=r"lm_head.weight is adapted, but the head of .* is tied"):
        tied(tmp_path, more=more)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_head_of_a_classifier_is_its_own_though_an_older_config_is_silent(tmp_path, task):
    pair = {**{n: x for n, x in small().items() if "lora" in n}, "score.weight": np.ones((2, 6))}
    base = save({n: x for n, x in small().items() if n not in pair}, tmp_path / "base")
    config = {"peft_type": "LORA", "lora_alpha": 4, "modules_to_save": None}
    with pytest.raises(LayoutError, match=r"score.weight is stored with the adapter"):
        with_adapter(base, save(pair, tmp_path / "silent", **config))
    made = with_adapter(base, save(pair, tmp_path / "a", task_type=task, **config))
    assert "score.weight" in made.tensors


# --- wrong requests, and what to do about each ------------------------------------------------

PAIR = {n: x for n, x in small().items() if "lora" in n}
BARE = {n: x for n, x in small().items() if n not in PAIR}
LATER = {n.replace("l.0", "l.3"): x for n, x in PAIR.items()}
TWO = {
    f"l.0.q.lora_{half}.{name}.weight": PAIR[f"l.0.q.lora_{half.lower()}"]
    for half in "AB"
    for name in ("x", "y")
}
SPELT_TWICE = {**PAIR, "l.0.q.mindpet_delta_lora_a": PAIR["l.0.q.lora_a"]}


@pytest.mark.parametrize(
    ("base", "adapter", "how", "kind", "told"),
    [
        (BARE, None, {}, NotFoundError, r"base has no adapters.* as adapter= \(--adapter\)"),
        (BARE, BARE, {}, NotFoundError, "folder of the adapters, not of a model"),
        (PAIR, BARE, {}, NotFoundError, "base has some: pass the base model first"),
        (BARE, LATER, {}, NotFoundError, "It has l.0.q.weight, so .* with more layers"),
        (BARE, TWO, {}, LayoutError, r"several adapters \(x, y\). Save the one to merge"),
        (BARE, SPELT_TWICE, {}, LayoutError, "two adapters of l.0.q.weight, in two spellings"),
        (
            {n.replace("l.0", "model.l.0"): x for n, x in BARE.items()},
            PAIR | {f"model.{n}": x for n, x in PAIR.items()},
            {},
            LayoutError,
            r"two sources for one target: l\.0\.q\.lora_a and model\.l\.0\.q\.lora_a both adapt",
        ),
        (
            {n.replace("l.0", "model.l.0"): x for n, x in BARE.items()},
            {**PAIR, "l.0.norm.weight": np.ones(6), "model.l.0.norm.weight": np.ones(6)},
            {},
            LayoutError,
            "were both saved for model.l.0.norm.weight",
        ),
        (
            BARE,
            {n: x.astype(np.int8) for n, x in PAIR.items()},
            {},
            LayoutError,
            "lora_a is I8, expected F16",
        ),
        (BARE, PAIR, {"adapter_names": {"a.{x*}": "b.{x*}"}}, LayoutError, "matches none of the"),
        (BARE, PAIR, {"adapter_names": "l.0.q"}, LayoutError, "neither FROM=TO nor"),
        (
            BARE,
            {n.replace("l.0", "h.0"): x for n, x in PAIR.items()},
            {},
            NotFoundError,
            r'adapter_names=\{"h.\{x\*\}": "l.\{x\*\}"\} \(--adapter-names "h.\{x\*\}=l',
        ),
        (BARE, PAIR, {"alpha": 1, "scaling": 2}, LayoutError, "exclude each other. Pass one"),
        (
            BARE,
            PAIR,
            {"adapter_rank": 16},
            LayoutError,
            r"--adapter-rank\) is 16. Remove it",
        ),
    ],
)
def test_invalid_requests_get_a_remedy(tmp_path, base, adapter, how, kind, told) -> None:
    place = save(base, tmp_path / "base")
    beside = save(adapter, tmp_path / "a", lora_alpha=4) if adapter else None
    with pytest.raises(kind, match=told):
        with_adapter(place, beside, **how)


def test_a_scaling_of_zero_is_noted(tmp_path) -> None:
    base, pair = save(BARE, tmp_path / "base"), save(PAIR, tmp_path / "a")
    assert any("adapters is 0" in n for n in with_adapter(base, pair, scaling=0).notes)


@pytest.mark.parametrize(
    ("names", "kind", "told"),
    [
        (
            [f"l.0.q.p{i}" for i in range(5000)],
            FormatError,
            "has 5000 names, expected at most 4096",
        ),
        (["x" * 2000], FormatError, "at most 4096 of 1024 characters"),
        ([f"q.p{i}" for i in range(20)], LayoutError, r"l\.0\.q: 20 of its parameters"),
    ],
)
def test_lists_of_an_untrusted_config_are_bounded(tmp_path, names, kind, told) -> None:
    base = save(BARE, tmp_path / "base")
    config = {"lora_alpha": 4, "target_parameters": names}
    with pytest.raises(kind, match=told):
        with_adapter(base, save(PAIR, tmp_path / "a", **config))
