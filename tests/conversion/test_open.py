"""Opening: whatever lies there is recognised, or told to be what it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import checkpoints
import pytest

import jaxshard as js
from jaxshard.conversion.open import open_checkpoint, open_strategy
from jaxshard.core.layout import Placement
from jaxshard.errors import CoverageError, FormatError, LayoutError, NotFoundError
from jaxshard.formats import strategy_layouts
from jaxshard.formats.rank_names import LAYOUT_FILE

QUICK = {"fsync": False}


@pytest.fixture
def base(tmp_path):
    checkpoints.write_llama(tmp_path / "llama")
    js.slice(tmp_path / "llama", tmp_path / "cut", "dp2mp2", **QUICK)
    return tmp_path


def test_a_folder_and_a_file_of_it_are_opened(base):
    folder, alone = (open_checkpoint(base / p) for p in ("llama", "llama/model.safetensors"))
    assert folder.tensors == alone.tensors
    assert (folder.extras, alone.extras) == (("config.json", "tokenizer.json"), ())


@pytest.mark.parametrize("path", [Path, str, lambda p: f"{p}/"])
def test_paths_come_as_one_likes(base, path):
    assert len(open_checkpoint(path(base / "llama")).tensors) == 21


def test_rank_files_are_opened_with_the_strategy_inside_beside_or_given(base, tmp_path):
    inside = open_checkpoint(base / "cut")
    strategy = base / "cut" / "strategy"
    strategy.rename(base / "strategy")
    assert open_checkpoint(base / "cut").tensors == inside.tensors
    (base / "strategy").rename(base / "elsewhere")
    assert open_checkpoint(base / "cut", src_strategy=base / "elsewhere").tensors == inside.tensors
    one = base / "elsewhere" / "ckpt_strategy_rank_0.ckpt"
    assert open_checkpoint(base / "cut", src_strategy=one).tensors == inside.tensors
    with pytest.raises(LayoutError, match="--src-strategy PATH"):
        open_checkpoint(base / "cut")


@pytest.mark.parametrize(
    "use",
    [
        lambda catalog, path: js.load(catalog, "mp2", src_strategy=path),
        lambda catalog, path: js.plan(catalog, src_strategy=path),
        lambda catalog, path: js.plan(catalog, suffix="1_10"),
        lambda catalog, path: js.merge_lora(catalog, path / "out", suffix="1_10"),
    ],
)
def test_how_to_open_what_is_open_already_is_no_question(base, use):
    with pytest.raises(LayoutError, match=r"is open already. Pass them to open\(\)"):
        use(js.open(base / "cut"), base)


def test_the_layout_of_rank_files_is_as_it_was_asked_for(base):
    catalog = open_checkpoint(base / "cut")
    asked = js.plan(base / "llama", "dp2mp2").outputs.layout
    for tensor in catalog.tensors.values():
        for rank in range(4):
            box = asked.box_of(tensor.name, tensor.shape, rank)
            assert catalog.layout.box_of(tensor.name, tensor.shape, rank) == box


def test_a_layout_of_our_own_goes_before_strategy_files(base):
    own = js.Layout(2, {"w": (Placement((("mp", 2),), (("mp",),)),)})
    place = base / "cut" / "strategy" / LAYOUT_FILE
    place.write_bytes(strategy_layouts.layout_file_bytes(own, own.placements))
    assert open_strategy(base / "cut" / "strategy") == open_strategy(place) == own


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"jaxshard_layout": ', b"\xff\xfe"])
def test_a_json_file_that_is_no_layout_is_refused(tmp_path, data):
    (tmp_path / "layout.json").write_bytes(data)
    with pytest.raises((FormatError, NotFoundError)):
        open_strategy(tmp_path / "layout.json")


def test_what_is_elsewhere_is_told(tmp_path):
    checkpoints.write_llama(tmp_path / "models" / "llama")
    with pytest.raises(
        NotFoundError, match=r"only below it: llama/model.safetensors. Pass that folder"
    ):
        open_checkpoint(tmp_path / "models")


def test_an_empty_folder_and_a_stray_file_hold_no_checkpoint(tmp_path):
    (tmp_path / "readme.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "readme.txt"):
        with pytest.raises(NotFoundError, match="holds no checkpoint that jaxshard can read"):
            open_checkpoint(path)


def test_no_handles_stay_open(base):
    before = len(os.listdir("/proc/self/fd"))
    catalogs = [open_checkpoint(base / p) for p in ("llama", "cut") for _ in range(5)]
    assert len(catalogs) == 10
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_rank_more_than_the_strategy_knows_is_refused(base):
    (base / "cut" / "rank_0").rename(base / "cut" / "rank_4")
    (base / "cut" / "rank_4" / "checkpoint_rank_0-1_1.safetensors").rename(
        base / "cut" / "rank_4" / "checkpoint_rank_4-1_1.safetensors"
    )
    with pytest.raises(CoverageError, match="its strategy has 4 ranks"):
        open_checkpoint(base / "cut")


def test_an_orbax_item_in_a_folder_of_a_checkpoint_is_not_taken_for_it(base, tmp_path):
    js.convert(base / "llama", tmp_path / "llama" / "backup", format="orbax", overwrite=True)
    catalog = js.open(tmp_path / "llama")
    assert (catalog.format, len(catalog.tensors)) == ("huggingface", 21)
    assert js.open(tmp_path / "llama" / "backup").format == "orbax"


def test_an_index_tells_of_the_files_beside_it(base):
    js.merge(base / "llama", base / "several", max_shard_size=5000)
    index = base / "several" / "model.safetensors.index.json"
    assert js.open(index).tensors == js.open(base / "several").tensors
    other = index.rename(index.with_name("model.fp16.safetensors.index.json"))
    with pytest.raises(CoverageError):  # of files that lie elsewhere, as far as its name tells
        js.open(other)


def test_an_empty_path_is_not_the_folder_one_is_in(base, monkeypatch):
    monkeypatch.chdir(base / "llama")
    with pytest.raises(NotFoundError, match="the path of the checkpoint is empty"):
        js.open("")


# --- config=, for checkpoints without a config.json


def test_a_config_is_taken_from_where_the_caller_says(tmp_path):
    checkpoints.write_llama(tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "llama" / "config.json").rename(tmp_path / "elsewhere" / "config.json")
    path = tmp_path / "llama"
    assert js.open(path).model.type is None
    for given in (config, tmp_path / "elsewhere", tmp_path / "elsewhere" / "config.json"):
        opened = js.open(path, config=given)
        assert opened.model.type == "llama"
        assert opened.notes == ()
    assert js.open(js.open(path).root, config=config).model.config == config
    js.convert(path, tmp_path / "out", "mp2", config=config)
    js.merge(path, tmp_path / "whole", config=tmp_path / "elsewhere")
    assert json.loads((tmp_path / "whole" / "config.json").read_text()) == config
    assert checkpoints.run("plan", path, "--to", "mp2", "--config", tmp_path / "elsewhere") == 0


def test_a_config_that_replaces_another_is_noted(tmp_path):
    checkpoints.write_llama(tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    changed = js.open(tmp_path / "llama", config={**config, "vocab_size": 7})
    assert "config.json of" in changed.notes[-1]
    assert "is replaced by config=" in changed.notes[-1]
    js.merge(changed, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**config, "vocab_size": 7}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, js.NotFoundError, "does not exist"),
        ("{", js.FormatError, "it is not JSON"),
        ("[]", js.FormatError, "it is not an object"),
    ],
)
def test_a_config_that_cannot_be_read_is_an_error(tmp_path, text, error, message):
    checkpoints.write_llama(tmp_path / "llama")
    if text is not None:
        (tmp_path / "my.json").write_text(text)
    with pytest.raises(error, match=message):
        js.open(tmp_path / "llama", config=tmp_path / "my.json")
