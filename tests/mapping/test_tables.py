"""Tables hold for models that transformers wrote: there, over layouts, and back bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mapping_models import MODELS, save
from mapping_random import forms_of
from mapping_worlds import same
from safetensors.numpy import load_file, save_file

from jaxshard.api import convert, plan
from jaxshard.conversion.execute import execute
from jaxshard.conversion.open import open_checkpoint
from jaxshard.conversion.prepare import prepare
from jaxshard.errors import LayoutError, NotFoundError
from jaxshard.mapping import find_mapping, form_of, read_mapping, table, write_mapping

QUICK = {"workers": 1, "fsync": False}
FORMS_OF = {family: forms_of(family) for family in MODELS}
EVERY = [(family, form) for family, forms in FORMS_OF.items() for form in forms]
# what each family's ranks share must survive the mapping; experts stay whole in mcore's form
LAYOUTS = {
    "llama": ("dp2mp2", "mp2pp3"),
    "qwen2": ("dp1mp2pp3",),
    "qwen3": ("dp2mp2pp3",),
    "gemma": ("mp2",),
    "qwen3_moe": ("dp2mp2ep2",),
    "mixtral": ("mp2pp3",),
    "deepseek_v3": ("mp2",),
    "gpt2": ("mp2pp2",),
    "bert": ("dp2mp2",),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {n: x for f in sorted(folder.rglob("*.safetensors")) for n, x in load_file(f).items()}


@pytest.mark.parametrize(("family", "form"), EVERY)
def test_a_real_model_goes_to_a_form_and_back(folders, tmp_path, family, form) -> None:
    source = folders(family)
    before = weights(source)
    convert(source, tmp_path / "there", names=f"hf:{form}", **QUICK)
    there = weights(tmp_path / "there")
    mapping = find_mapping(f"{family}-hf:{form}", open_checkpoint(source))
    assert same(there, mapping.apply_arrays(before))
    convert(tmp_path / "there", tmp_path / "back", names=f"{form}:hf", **QUICK)
    assert same(weights(tmp_path / "back"), before)


@pytest.mark.parametrize(("family", "form"), EVERY)
def test_the_form_is_found_by_the_names(folders, family, form) -> None:
    catalog = open_checkpoint(folders(family))
    mapped = find_mapping(f"auto:{form}", catalog).apply(catalog)
    found = form_of({n: t.shape for n, t in mapped.tensors.items()}, mapped.model)[1]
    assert found == form.replace("-blocks", "")  # names cannot tell how rows are interleaved


@pytest.mark.parametrize(
    ("family", "form", "layout"),
    [(f, form, layout) for f, form in EVERY for layout in LAYOUTS[f]],
)
def test_over_ranks_and_back_is_the_identity(folders, tmp_path, family, form, layout) -> None:
    source = folders(family)
    mapping = find_mapping(f"{family}-hf:{form}", open_checkpoint(source))
    prepared = prepare(source, layout, names=mapping)
    report = execute(prepared, tmp_path / "ranks", fsync=False)
    totals = prepared.plan.totals
    assert report.counts.bytes_needed == totals.bytes_needed
    assert report.counts.bytes_read == totals.bytes_read
    assert report.counts.num_reads == totals.num_reads
    assert report.counts.num_writes == totals.num_writes
    assert report.counts.num_copies == totals.num_copies
    convert(tmp_path / "ranks", tmp_path / "back", names=mapping.inverse(), **QUICK)
    assert same(weights(tmp_path / "back"), weights(source))


def test_what_is_read_is_what_the_source_holds_once(folders) -> None:
    source = folders("llama")
    total = open_checkpoint(source).num_bytes
    for form in ("mindformers-concat", "nnx-scan", "maxtext"):
        assert plan(source, "dp2mp2", names=f"hf:{form}").totals.bytes_needed == total


def test_more_ranks_than_kv_heads_cannot_cut_what_is_fused(folders) -> None:
    with pytest.raises(LayoutError, match=r"linear_qkv.*2 groups of 32 .*mp=4 does not divide"):
        plan(folders("llama"), "mp4", names="hf:mcore-fused")


@pytest.mark.parametrize("form", FORMS_OF["llama"])
def test_a_mapping_is_saved_as_toml_and_read_back(folders, form) -> None:
    mapping = find_mapping(f"hf:{form}", open_checkpoint(folders("llama")))
    assert read_mapping(write_mapping(mapping)) == mapping
    assert read_mapping(write_mapping(mapping.inverse())) == mapping.inverse()


def test_a_users_own_table_is_a_file(folders, tmp_path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        'name = "hf:own"\n[[op]]\nop = "transpose"\nnames = ["lm_head.weight"]\n'
        '[[op]]\nop = "rename"\nrules = [["lm_head.weight", "head.kernel"]]\n'
    )
    convert(folders("llama"), tmp_path / "made", names=str(own), **QUICK)
    before, made = weights(folders("llama")), weights(tmp_path / "made")
    assert np.array_equal(made["head.kernel"], before["lm_head.weight"].T)
    assert len(made) == len(before)


@pytest.mark.parametrize(
    ("names", "kind", "said"),
    [
        ("hf:mindformer", NotFoundError, "Did you mean mindformers?"),
        ("llama-hf:gpt2-nnx", LayoutError, "must belong to the same model family"),
        ("llama", NotFoundError, "neither a file nor a table"),
        ("mindformers:hf", NotFoundError, "llama-mindformers has no rule for 29 of 30 names"),
    ],
)
def test_an_unknown_table_is_refused(folders, names, kind, said) -> None:
    with pytest.raises(kind, match=said):
        plan(folders("llama"), names=names)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = ", "not TOML"),
        ('[[op]]\nop = "fuze"', "Did you mean fuse?"),
        ('[[op]]\nop = "stack"\nsource = "a.{layer}"', "needs target"),
        ('[[op]]\nop = "cast"\nnames = ["a"]\ndtype = 3', "dtype = 3 is not str"),
        ('[[op]]\nop = "drop"\nnames = "a"', "not a list of names"),
        ('[[op]]\nop = "drop"\nnames = ["a"]\nx = 1', "drop has no x"),
        ("op = 3", r"Write \[\[op\]\] above each"),
        ('[[op]]\nop = "rename"\nrules = [["a.{x}", "b"]]', "placeholders differ"),
    ],
)
def test_an_invalid_table_is_refused_with_its_place(text, said) -> None:
    with pytest.raises(LayoutError, match=said):
        read_mapping(text, "own.toml")


def test_a_table_needs_the_numbers_of_the_model() -> None:
    class Model:
        type, num_layers, tied_embeddings, config = "llama", 2, False, {}

    with pytest.raises(
        NotFoundError, match="num_attention_heads or num_key_value_heads is missing"
    ):
        table("hf", "mcore-fused", Model())
    assert table("hf", "mcore", Model()).ops


def test_every_family_has_a_model_here() -> None:
    assert set(FORMS_OF) == set(MODELS) == set(LAYOUTS)


def test_optimizer_states_and_numbers_of_the_job_go_along(folders, tmp_path) -> None:
    tensors = dict(weights(folders("llama")))
    tensors |= {f"adam_m.{n}": x + 1 for n, x in weights(folders("llama")).items()}
    tensors["global_step"] = np.array([10], np.int32)
    (tmp_path / "src").mkdir()
    save_file(tensors, tmp_path / "src" / "model.safetensors")
    config = (folders("llama") / "config.json").read_text()
    (tmp_path / "src" / "config.json").write_text(config)
    prepared = prepare(tmp_path / "src", "dp2mp2", names="hf:mcore-fused")
    execute(prepared, tmp_path / "ranks", fsync=False)
    mapping = find_mapping("llama-hf:mcore-fused", open_checkpoint(tmp_path / "src"))
    convert(tmp_path / "ranks", tmp_path / "back", names=mapping.inverse(), **QUICK)
    assert same(weights(tmp_path / "back"), tensors)


def test_the_family_may_be_stated_on_either_side(folders, tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(
        (folders("llama") / "model.safetensors").read_bytes()
    )
    catalog = open_checkpoint(tmp_path)
    assert catalog.model.type is None
    ours, theirs = (find_mapping(n, catalog) for n in ("llama-hf:mcore", "hf:llama-mcore"))
    assert ours == theirs
