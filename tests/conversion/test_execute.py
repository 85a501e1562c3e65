"""Convert: options change how it runs and never the result; the source is never touched."""

from __future__ import annotations

import os
import tracemalloc

import checkpoints
import numpy as np
import pytest

import jaxshard as js
from jaxshard.conversion.execute import execute
from jaxshard.conversion.prepare import prepare
from jaxshard.core.layout import Layout, Placement
from jaxshard.errors import CoverageError, FormatError, LayoutError, NotFoundError
from jaxshard.mapping import read_mapping
from jaxshard.storage.readers import SourceFiles

QUICK = {"fsync": False}


@pytest.fixture
def llama(tmp_path):
    checkpoints.write_llama(tmp_path / "llama", num_files=2)
    return tmp_path / "llama"


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 1},
        {"workers": 7},
        {"host_bytes": 1 << 19},
        {"fsync": False},
        {"resume": True},
        {"overwrite": True},
    ],
    ids=str,
)
def test_options_do_not_change_a_byte(llama, tmp_path, options):
    js.slice(llama, tmp_path / "plain", "dp2mp2")
    js.slice(llama, tmp_path / "other", "dp2mp2", **options)
    assert checkpoints.files_of(tmp_path / "other") == checkpoints.files_of(tmp_path / "plain")


def test_what_to_do_may_be_said_as_text_strategy_layout_or_path(llama, tmp_path):
    places = [tmp_path / str(i) for i in range(4)]
    js.slice(llama, places[0], "dp2mp2", **QUICK)
    js.slice(llama, places[1], js.Strategy(dp=2, mp=2), **QUICK)
    js.slice(llama, places[2], places[0] / "strategy", **QUICK)
    js.slice(llama, places[3], js.open(places[0]).layout, **QUICK)
    for place in places[1:]:
        for rank in range(4):
            assert checkpoints.stored(place / f"rank_{rank}") == checkpoints.stored(
                places[0] / f"rank_{rank}"
            )


def test_only_the_tensors_asked_for_are_taken(llama, tmp_path):
    how = {"include": ["layers", "norm"], "exclude": [r"layers\.1"], **QUICK}
    js.convert(llama, tmp_path / "out", **how)
    names = set(checkpoints.stored(tmp_path / "out"))
    assert names == {
        n
        for n in checkpoints.stored(llama)
        if ("layers" in n or "norm" in n) and "layers.1" not in n
    }
    js.slice(llama, tmp_path / "cut", "mp2pp2", include="layers.0", **QUICK)
    assert js.verify(tmp_path / "cut").problems == ()
    with pytest.raises(
        NotFoundError, match=r"include= \(--include\) nothing matches none of the 21"
    ):
        prepare(llama, include=["lm_head", "nothing"])
    with pytest.raises(LayoutError, match="not a regular expression"):
        prepare(llama, exclude=["("])


def test_files_that_belong_to_the_model_come_along_and_others_do_not(llama, tmp_path):
    for name in ("tokenizer.json", "code/modeling.py", ".cache/x", "pytorch_model.bin"):
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_bytes(os.urandom(100))
    js.slice(llama, tmp_path / "cut", "mp2", **QUICK)
    js.merge(tmp_path / "cut", tmp_path / "out", **QUICK)
    found, source = checkpoints.files_of(tmp_path / "out"), checkpoints.files_of(llama)
    assert set(found) == {"config.json", "tokenizer.json", "code/modeling.py", "model.safetensors"}
    assert all(source[name] == found[name] for name in found if name != "model.safetensors")


def test_data_starts_where_it_can_be_used_in_place(llama, tmp_path):
    js.slice(llama, tmp_path / "cut", "dp2mp2", **QUICK)
    for path in (tmp_path / "cut").rglob("*.safetensors"):
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0


def test_the_same_request_gives_the_same_files(llama, tmp_path):
    for name in ("a", "b"):
        js.slice(llama, tmp_path / name, "dp2mp2", remove_redundancy=True, **QUICK)
    assert checkpoints.files_of(tmp_path / "a") == checkpoints.files_of(tmp_path / "b")


def test_a_source_that_changes_meanwhile_gives_no_result(llama, tmp_path, monkeypatch):
    prepared = prepare(llama, "mp2")
    real = SourceFiles.close

    def change(self):
        os.utime(llama / "model-00001-of-00002.safetensors")
        real(self)

    monkeypatch.setattr(SourceFiles, "close", change)
    with pytest.raises(FormatError, match="changed while being read"):
        execute(prepared, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranks_are_written_alone_as_they_are_together(llama, tmp_path):
    js.slice(llama, tmp_path / "all", "dp2mp2", **QUICK)
    report = js.slice(llama, tmp_path / "some", "dp2mp2", rank=[3, 1, 3], **QUICK)
    assert report.num_files == 2
    for rank in (1, 3):
        name = f"rank_{rank}/checkpoint_rank_{rank}-1_1.safetensors"
        assert (tmp_path / "some" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    assert not (tmp_path / "some" / "rank_0").exists()


def test_empty_tensors_scalars_and_ranks_with_nothing_are_files_too(tmp_path):
    arrays = {
        "a.weight": np.zeros((0, 8), np.float32),
        "b.weight": np.array(7, np.int64),
        **{f"c{i}.weight": np.zeros((0,), np.int8) for i in range(300)},
    }
    checkpoints.write_folder(tmp_path / "in", arrays)
    layout = Layout(4, {n: (Placement((("dp", 4),)),) for n in arrays})
    how = {**QUICK, "remove_redundancy": True}
    report = js.slice(tmp_path / "in", tmp_path / "cut", layout, **how)
    assert report.num_files == 4
    assert report.counts.bytes_written == 8
    js.merge(tmp_path / "cut", tmp_path / "out", **QUICK)
    assert checkpoints.stored(tmp_path / "out") == checkpoints.stored(tmp_path / "in")


def test_progress_is_told_of_every_byte(llama, tmp_path):
    totals, told = [], []

    def progress(total):
        totals.append(total)
        return told.append

    js.slice(llama, tmp_path / "out", "dp2mp2", progress=progress, **QUICK)
    assert totals == [sum(told)]


def test_replicas_are_compared_before_anything_is_written(llama, tmp_path):
    js.slice(llama, tmp_path / "cut", "dp2", **QUICK)
    checked = {"fsync": False, "check_replicas": True}
    js.merge(tmp_path / "cut", tmp_path / "out", **checked)
    path = tmp_path / "cut" / "rank_1" / "checkpoint_rank_1-1_1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xee")
    for how in ({}, {"names": "hf:linen"}):
        with pytest.raises(CoverageError, match=r"differs between rank_0/.* and rank_1/.*"):
            js.merge(tmp_path / "cut", tmp_path / "again", **checked, **how)
    assert not list(tmp_path.glob("*again*"))
    # of what is not taken nobody asks
    js.merge(tmp_path / "cut", tmp_path / "again", **checked, include=["layers.0"])


PADDED = """
[[op]]
op = "pad"
names = ["model.embed_tokens.weight", "lm_head.weight"]
dim = 0
length = 33
to = 34
"""


def test_a_dim_that_does_not_divide_is_padded_by_a_mapping_and_comes_back(tmp_path):
    arrays = checkpoints.write_llama(tmp_path / "llama", vocab=33)
    with pytest.raises(LayoutError, match="pad to 34"):
        prepare(tmp_path / "llama", "mp2")
    (tmp_path / "pad.toml").write_text(PADDED)
    names = str(tmp_path / "pad.toml")
    js.slice(tmp_path / "llama", tmp_path / "cut", "mp2", names=names, **QUICK)
    name = "lm_head.weight"
    held = checkpoints.stored(tmp_path / "cut" / "rank_1")[name]
    assert held == ("BF16", (17, 16), arrays[name][17:].tobytes() + bytes(2 * 16))
    back = read_mapping(PADDED).inverse()
    js.merge(tmp_path / "cut", tmp_path / "again", names=back, **QUICK)
    assert checkpoints.stored(tmp_path / "again") == checkpoints.stored(tmp_path / "llama")


@pytest.mark.parametrize("names", [None, "hf:linen"], ids=["as stored", "transposed"])
def test_no_more_memory_is_held_than_the_plan_says(tmp_path, names):
    checkpoints.write_llama(tmp_path / "llama", layers=1, hidden=512)
    budget = {"workers": 2, "host_bytes": 1 << 20}
    prepared = prepare(tmp_path / "llama", "mp2", names=names, **budget)
    execute(prepared, tmp_path / "imports all that is needed", fsync=False)
    tracemalloc.start()
    try:
        execute(prepared, tmp_path / "out", fsync=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held, written = prepared.plan.host_bytes, prepared.plan.totals.bytes_written
    assert peak <= held == 1 << 20
    assert written > 4 * held, "there is more to hold"


def test_options_may_be_given_by_their_names(llama, tmp_path):
    js.convert(llama, tmp_path / "out", fsync=False)
    with pytest.raises(LayoutError, match="exists"):
        js.convert(llama, tmp_path / "out")
    report = js.convert(llama, tmp_path / "out", "mp2", overwrite=True, workers=1, exclude="norm")
    assert report.num_files == 2
    assert js.plan(llama, host_bytes=16 << 20).host_bytes <= 16 << 20
    with pytest.raises(TypeError, match="overwritten"):
        js.convert(llama, tmp_path / "out", overwritten=True)
