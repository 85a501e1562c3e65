"""Hugging Face folders: which file serves a name, refused folders, and copied extras."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.core.box import Box
from jaxshard.core.catalog import Catalog, Model
from jaxshard.core.dtypes import BY_NAME
from jaxshard.errors import CoverageError, FormatError, JaxshardError, NotFoundError
from jaxshard.formats import huggingface
from jaxshard.formats.folder import MemoryFolder
from jaxshard.formats.huggingface import file_names, model_of, plan_files, recognise
from jaxshard.formats.safetensors import layout_file

F32 = BY_NAME["F32"]
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def weights(*names: str, **metadata: str) -> bytes:
    """A file with a (2, 3) tensor for each name."""
    layout = layout_file([(n, F32, (2, 3)) for n in names], metadata)
    return layout.segments[0][1] + bytes(layout.num_bytes - len(layout.segments[0][1]))


def index_of(**serves: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": serves}).encode()


def read(**contents: bytes) -> Catalog:
    return huggingface.read(MemoryFolder(contents, "folder"))


def where(catalog: Catalog) -> dict[str, str]:
    """Name to the file that serves it."""
    return {t.name: catalog.files[t.shards[0].file].path for t in catalog.tensors.values()}


# Which file serves a name ----------------------------------------------------


def test_a_single_file_is_a_checkpoint():
    content = weights("a", "b", format="pt")
    catalog = read(**{"model.safetensors": content})
    assert (catalog.root, catalog.format, catalog.metadata) == (
        "folder",
        "huggingface",
        {"format": "pt"},
    )
    assert [(f.path, f.num_bytes) for f in catalog.files] == [("model.safetensors", len(content))]
    piece = catalog["b"].shards[0]
    assert (catalog["b"].dtype, catalog["b"].shape) == (F32, (2, 3))
    assert (piece.file, piece.offset, piece.box) == (0, len(content) - 24, Box.whole((2, 3)))


@pytest.mark.parametrize("name", ["model.safetensors", "part0.safetensors", "épais.safetensors"])
def test_one_file_alone_may_have_any_name(name):
    assert where(read(**{name: weights("a")})) == {"a": name}


def test_the_index_decides_which_file_serves_a_name():
    catalog = read(
        **{INDEX: index_of(a=ONE, b=TWO), ONE: weights("a", "b", "c"), TWO: weights("b", "a")}
    )
    assert where(catalog) == {"a": ONE, "b": TWO}
    assert f"{INDEX} does not list c: left out." in catalog.notes


def test_hostile_names_stay_on_one_line():
    name = "\x1b[2J\n"
    catalog = read(**{INDEX: index_of(a=ONE), ONE: weights("a", name), f"{name}.bin": b""})
    assert all(note.isprintable() for note in catalog.notes)
    for serves in ({name: ONE}, {"a": f"{name}.safetensors"}, {"a": f"../{name}"}):
        with pytest.raises(JaxshardError) as caught:
            read(**{INDEX: index_of(**serves), ONE: weights("a")})
        assert str(caught.value).isprintable()


def test_without_an_index_all_files_at_the_top_are_read():
    catalog = read(**{ONE: weights("a"), TWO: weights("b"), "sub/x.safetensors": weights("c")})
    assert where(catalog) == {"a": ONE, "b": TWO}
    assert "Weight files neither read nor copied: sub/x.safetensors." in catalog.notes


def test_an_index_may_name_a_file_in_a_folder_below():
    contents = {INDEX: index_of(a="sub/x.safetensors"), "sub/x.safetensors": weights("a")}
    assert where(read(**contents)) == {"a": "sub/x.safetensors"}


def test_of_several_indexes_that_of_the_model_decides():
    catalog = read(
        **{
            "consolidated.safetensors.index.json": index_of(x="consolidated.safetensors"),
            "consolidated.safetensors": weights("x"),
            INDEX: index_of(a=ONE),
            ONE: weights("a"),
        }
    )
    assert where(catalog) == {"a": ONE}
    assert f"{INDEX} is followed, not consolidated.safetensors.index.json." in catalog.notes
    assert "Weight files neither read nor copied: consolidated.safetensors." in catalog.notes


@pytest.mark.parametrize("others", [{TWO: weights("b")}, {}], ids=["whole", "cut"])
def test_a_single_file_counts_more_than_the_index_of_an_older_save(others):
    contents = {INDEX: index_of(b=TWO), "model.safetensors": weights("a"), **others}
    catalog = read(**contents)
    assert where(catalog) == {"a": "model.safetensors"}
    assert f"model.safetensors is read, not the files of {INDEX}." in catalog.notes


def test_an_index_that_names_the_single_file_still_decides():
    contents = {INDEX: index_of(a="model.safetensors"), "model.safetensors": weights("a", "b")}
    assert where(read(**contents)) == {"a": "model.safetensors"}


@pytest.mark.parametrize("flat", [True, False])
def test_the_map_of_a_unified_mindspore_folder_is_an_index(flat):
    serves = {"a": "part0.safetensors", "b": "part1.safetensors"}
    catalog = read(
        **{
            "param_name_map.json": json.dumps(
                serves if flat else {"metadata": {"total_size": 48}, "weight_map": serves}
            ).encode(),
            "part0.safetensors": weights("a", format="ms", remove_redundancy="False"),
            "part1.safetensors": weights("b", format="ms", remove_redundancy="False"),
            "hyper_param.safetensors": weights("global_step", format="ms"),
        }
    )
    assert where(catalog) == {**serves, "global_step": "hyper_param.safetensors"}
    assert catalog.scalars == {"global_step"}
    assert catalog.extras == ()
    assert catalog.metadata == {"format": "ms", "remove_redundancy": "False"}


GOLDEN = sorted(Path(os.environ.get("JAXSHARD_GOLDEN") or "/nowhere").glob("*/ms_unified"))


@pytest.mark.skipif(not GOLDEN, reason="JAXSHARD_GOLDEN names no golden files")
@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.parent.name)
def test_a_folder_that_mindspore_unified_is_read(folder):
    catalog = huggingface.read(
        MemoryFolder({p.name: p.read_bytes() for p in folder.iterdir()}, str(folder))
    )
    told = json.loads((folder / "param_name_map.json").read_text())
    of_weights = {n: p for n, p in where(catalog).items() if n not in catalog.scalars}
    assert of_weights == told["weight_map"]
    assert sum(catalog[n].num_bytes for n in of_weights) == told["metadata"]["total_size"]
    assert {"global_step", "epoch_num", "step_num"} <= catalog.scalars


def test_metadata_that_files_disagree_on_is_dropped():
    catalog = read(
        **{ONE: weights("a", format="pt", x="1", y="1"), TWO: weights("b", format="pt", x="2")}
    )
    assert catalog.metadata == {"format": "pt", "y": "1"}


@pytest.mark.parametrize(
    ("contents", "error", "says"),
    [
        (
            {INDEX: index_of(a=ONE, b=TWO), ONE: weights("a")},
            CoverageError,
            f"1 of which folder .*{TWO}",
        ),
        (
            {INDEX: index_of(a=ONE, b=ONE), ONE: weights("a")},
            FormatError,
            f"{ONE} does not contain b, which",
        ),
        (
            {INDEX: index_of(a=ONE, b=TWO), ONE: weights("a", "b"), TWO: weights("x")},
            FormatError,
            f"{TWO} does not contain b, which",
        ),
        (
            {ONE: weights("a", "b"), TWO: weights("b")},
            FormatError,
            f"b is in both {ONE} and {TWO}",
        ),
        ({ONE: weights("a"), "config.json": b"{}"}, CoverageError, "1 of the 2 files"),
        ({INDEX: b"[]", ONE: weights("a")}, FormatError, "a JSON list .expected an object"),
        ({INDEX: b"{", ONE: weights("a")}, FormatError, "not JSON"),
        ({INDEX: b"{}", ONE: weights("a")}, FormatError, "weight_map is missing or not an object"),
        (
            {INDEX: b'{"weight_map":["a"]}', ONE: weights("a")},
            FormatError,
            "weight_map is missing or not an object",
        ),
        (
            {INDEX: b'{"weight_map":{"a":["x"]}}', ONE: weights("a")},
            FormatError,
            r"the file of a is \['x'\] .expected a name",
        ),
        (
            {INDEX: f'{{"weight_map":{{"a":"{ONE}","a":"{TWO}"}}}}'.encode()},
            FormatError,
            "duplicate key a in",
        ),
        (
            {INDEX: b'{"weight_map":' + b'{"a":' * 9999 + b"1" + b"}" * 10000},
            FormatError,
            "too deep",
        ),
        ({INDEX: index_of(a="config.json"), "config.json": b"{}"}, FormatError, "2 bytes"),
        ({ONE: weights("a")[:-1], TWO: weights("b")}, FormatError, "is truncated"),
        (
            {"pytorch_model.bin": b"PK", "config.json": b"{}"},
            NotFoundError,
            "folder has pytorch_model.bin, but only safetensors files are supported",
        ),
        ({"config.json": b"{}"}, NotFoundError, "no safetensors weights \\(1 other files\\)"),
        ({}, NotFoundError, "no safetensors weights"),
        (
            {"sub/model.safetensors": weights("a")},
            NotFoundError,
            "only below it: sub/model.safetensors",
        ),
    ],
)
def test_a_folder_that_does_not_add_up_is_refused_in_one_line(contents, error, says):
    with pytest.raises(error, match=says) as caught:
        read(**contents)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "target",
    [
        "../secret.safetensors",
        "sub/../../secret.safetensors",
        "..",
        "/etc/passwd",
        "//host/share",
        "C:/secret.safetensors",
        "C:secret.safetensors",
        "..\\secret.safetensors",
        "\\\\host\\share",
        "a\0.safetensors",
        "sub/",
        "",
    ],
)
def test_an_index_cannot_lead_out_of_the_folder(target):
    class Guarded(MemoryFolder):
        def read(self, path, offset, length):
            assert path == INDEX
            return super().read(path, offset, length)

    guarded = Guarded({INDEX: index_of(a=target), ONE: weights("a"), target: weights("a")})
    with pytest.raises(FormatError, match="outside the folder"):
        huggingface.read(guarded)


def test_the_guard_of_that_test_sees_a_path_that_is_followed():
    with pytest.raises(FormatError, match="does not contain a, which"):
        read(**{INDEX: index_of(a="./x.safetensors"), "x.safetensors": weights("b")})


def test_an_index_over_the_limit_is_refused_unread():
    class Huge(MemoryFolder):
        def files(self):
            real = super().files()
            return {**real, INDEX: type(real[INDEX])(INDEX, 100_000_001)}

        def read(self, path, offset, length):
            raise AssertionError

    with pytest.raises(FormatError, match=r"has 100000001 bytes .expected at most 100000000"):
        huggingface.read(Huge({INDEX: b""}))


@pytest.mark.parametrize(
    ("paths", "ours"),
    [
        (["model.safetensors"], True),
        (["x.safetensors", "config.json"], True),
        ([INDEX], True),
        (["param_name_map.json"], True),
        (["pytorch_model.bin", "config.json"], False),
        (["rank_0/net.safetensors"], False),
        ([], False),
    ],
)
def test_a_folder_with_safetensors_at_its_top_is_recognised(paths, ours):
    assert recognise(MemoryFolder(dict.fromkeys(paths, b"")).files()) is ours


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    json_values
    | st.fixed_dictionaries({"weight_map": json_values})
    | st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.sampled_from("abc"), st.text() | st.just(ONE))}
    ),
    st.sampled_from([INDEX, "param_name_map.json", "config.json"]),
    st.integers(0, 3),
)
def test_whatever_stands_in_the_json_files_only_our_errors_are_raised(value, path, cut):
    text = json.dumps(value).encode()
    contents = {ONE: weights("a"), path: text[: len(text) - cut]}
    with suppress(JaxshardError):
        assert where(huggingface.read(MemoryFolder(contents))) in ({}, {"a": ONE})


# The model, and the extras that are copied ----------------------------------------


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ({}, Model()),
        ({"model_type": "gpt2", "n_layer": 3}, Model("gpt2", 3, True)),
        (
            {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False},
            Model("llama", 2, False),
        ),
        (
            {"model_type": "gemma3", "text_config": {"num_hidden_layers": 4}},
            Model("gemma3", 4, True),
        ),
        ({"model_type": 3, "num_layers": True}, Model()),
        ({"num_layers": -1, "tie_word_embeddings": True}, Model(None, None, True)),
    ],
)
def test_the_config_says_what_the_model_is(config, model):
    assert model_of(config) == model
    catalog = read(
        **{"model.safetensors": weights("a"), "config.json": json.dumps(config).encode()}
    )
    assert (catalog.model, catalog.model.config, catalog.notes) == (model, config, ())


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (None, "config.json is missing"),
        (b"{", "config.json is not read: it is not JSON"),
        (b"\xff", "config.json is not read: it is not JSON"),
        (b"[" * 100_000, "config.json is not read: it is not JSON"),
        (b"9" * 10_000, "config.json is not read: it is not JSON"),
        (b"[]", "config.json is not read: it is not an object"),
        (b" " * 16_000_001, "config.json is not read: it has 16000001 bytes"),
    ],
)
def test_a_config_that_says_nothing_is_a_note_and_no_error(config, note):
    contents = {"model.safetensors": weights("a")}
    catalog = read(**contents, **({} if config is None else {"config.json": config}))
    assert catalog.model == Model()
    assert any(n.startswith(note) for n in catalog.notes)


def test_a_config_may_hold_what_only_python_writes():
    contents = {
        "model.safetensors": weights("a"),
        "config.json": b'{"model_type":"x","y":Infinity}',
    }
    assert read(**contents).model.type == "x"


def test_other_files_are_carried_along_but_no_weights_and_nothing_hidden():
    carried = [
        "1_Pooling/config.json",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "tokenizer.json",
        "tokenizer.model",
    ]
    left = [
        "2_Dense/model.safetensors",
        "flax_model.msgpack",
        "model-q4.gguf",
        "model.ckpt",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "rust_model.ot",
        "tf_model.h5",
        "training_args.bin",
        "weights.npz",
        "x.pt",
    ]
    never = [
        ".git/config",
        "sub/.hidden",
        "__pycache__/modeling_x.pyc",
        "pytorch_model.bin.index.json",
        "sub/x.safetensors.index.json",
        INDEX,
    ]
    contents = dict.fromkeys([*carried, *left, *never], b"{}")
    contents |= {ONE: weights("a"), INDEX: index_of(a=ONE)}
    catalog = read(**contents)
    assert list(catalog.extras) == carried
    note = next(n for n in catalog.notes if n.startswith("Weight files neither read nor copied"))
    assert "2_Dense/model.safetensors, flax_model.msgpack" in note
    assert f"and {len(left) - 5} more" in note


# What is written -------------------------------------------------------------


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(1, 40))
def test_files_are_planned_as_the_hub_plans_them(sizes, limit):
    hub = pytest.importorskip("huggingface_hub")
    tensors = [(f"t{i}", size) for i, size in enumerate(sizes)]
    theirs = hub.split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    groups = plan_files(tensors, limit)
    assert dict(zip(file_names(len(groups)), groups, strict=True)) == theirs.filename_to_tensors


def test_no_tensors_make_one_empty_file():
    assert plan_files([], 10) == [[]]
    assert file_names(1) == ["model.safetensors"]


def test_the_index_of_an_older_save_is_named_where_the_files_are_a_complete_set():
    serves = {f"{n}": f"model-0000{i}-of-00004.safetensors" for i, n in enumerate("abcd", start=1)}
    contents = {ONE: weights("a", "b"), TWO: weights("c", "d"), INDEX: index_of(**serves)}
    with pytest.raises(CoverageError) as caught:
        read(**contents)
    assert "names 4 files, 4 of which folder does not have" in str(caught.value)
    assert "model-*-of-00002.safetensors (2 files) is complete, so" in str(caught.value)
    assert "remove it" in str(caught.value)
    del contents[TWO]  # neither set is complete
    with pytest.raises(CoverageError, match="Fetch the missing files"):
        read(**contents)
    assert set(read(**{ONE: weights("a"), TWO: weights("b")}).tensors) == {"a", "b"}


@pytest.mark.parametrize("other", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_another_form_of_the_model_in_one_folder_is_left_out_with_a_note(other):
    catalog = read(**{ONE: weights("a"), TWO: weights("b"), other: weights("x")})
    assert set(catalog.tensors) == {"a", "b"}
    assert any(other in note and "is not read" in note for note in catalog.notes)
    alone = read(**{other: weights("x")})
    assert set(alone.tensors) == {"x"}


def test_files_of_no_numbered_set_are_read_as_one_model_with_a_note():
    catalog = read(**{"part_a.safetensors": weights("a"), "part_b.safetensors": weights("b")})
    assert set(catalog.tensors) == {"a", "b"}
    assert any("all 2 weight files are read as one model" in note for note in catalog.notes)
    numbered = read(**{ONE: weights("a"), TWO: weights("b")})
    assert not any("one model" in note for note in numbered.notes)
