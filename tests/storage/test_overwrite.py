"""Replacing: --overwrite takes a checkpoint away, and nothing that a mistyped path may hit."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest

import jaxshard as js
from jaxshard.errors import LayoutError
from jaxshard.storage.overwrite import refuse_foreign

QUICK = {"fsync": False}
OVERWRITE = {"fsync": False, "overwrite": True}


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["model.safetensors"],
        ["model.safetensors", "config.json", "code/modeling.py", ".gitattributes", ".cache/x"],
        ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
        ["param_name_map.json", "part0.safetensors"],
        ["model.ckpt", "config.json"],
        ["rank_3/checkpoint_3.safetensors", "strategy/ckpt_strategy_rank_3.ckpt"],
        ["rank_0/net_rank_0-1_10.ckpt"],
        ["ckpt_strategy_rank_0.ckpt", "ckpt_strategy_rank_1.ckpt"],
        [
            "iteration_00000007/metadata.json",
            "iteration_00000007/model-0000000-0000001.safetensors",
            "latest_checkpointed_iteration.txt",
        ],
        ["_METADATA", "manifest.ocdbt", "d/0f"],
        ["default/_METADATA", "default/d/0f", "_CHECKPOINT_METADATA"],
    ],
    ids=str,
)
def test_what_results_look_like_may_be_replaced(tmp_path, names):
    refuse_foreign(make(tmp_path, *names))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["thesis.tex"], "thesis.tex"),
        (["a/model.safetensors", "b/model.safetensors"], "holds a, b, and no checkpoint"),
        (["model.safetensors", ".ssh/id"], ".ssh, which no checkpoint does"),
        (["model.safetensors", ".git/config"], ".git"),
        (
            ["model.safetensors", "optimizer.pt", "rng_state.pth"],
            "it contains optimizer.pt, rng_state.pth",
        ),
        (
            ["rank_0/checkpoint_0.safetensors", "rank_0/optimizer.pt"],
            "contains rank_0/optimizer.pt",
        ),
        (
            ["model.safetensors", "pytorch_model.bin"],
            "it contains pytorch_model.bin",
        ),
        (
            ["model.safetensors", "llama/model.safetensors"],
            "llama/model.safetensors, which belongs to",
        ),
        (["rank_0/checkpoint_0.ckpt", "old/rank_0/checkpoint_0.ckpt"], "old/rank_0"),
        (["rank_0/net-1_1.ckpt", "rank_0/net-1_2.ckpt"], "no checkpoint"),
        ([".jaxshard/1_1.json", "rank_0/net-1_1.ckpt"], ".jaxshard"),
        (["1/_METADATA", "2/_METADATA"], "no checkpoint"),
        (["rank_0/notes.txt"], "no checkpoint"),
        (["strategy/ckpt_strategy_rank_0.ckpt"], "no checkpoint"),
        (["ckpt_strategy_rank_0.ckpt", "thesis.tex"], "thesis.tex"),
    ],
    ids=str,
)
def test_anything_else_is_kept(tmp_path, names, told):
    """Other people's files, several checkpoints, the history of a training run."""
    with pytest.raises(LayoutError, match="is not replaced") as caught:
        refuse_foreign(make(tmp_path, *names))
    assert told in str(caught.value)
    assert "remove this one yourself" in str(caught.value)


@pytest.mark.parametrize(
    "how",
    [
        {"to": "dp2mp2"},
        {"to": "dp2mp2", "remove_redundancy": True, "rank": [3]},
        {"to": "dp2mp2", "format": "ckpt"},
        {"to": "mp2", "format": "iteration"},
        {"to": "full"},
        {"to": "full", "max_shard_size": 2000},
        {"to": "full", "format": "unified"},
        {"to": "full", "format": "ckpt"},
        {"to": "full", "format": "iteration"},
    ],
    ids=str,
)
def test_every_result_of_ours_can_be_replaced_by_another(tmp_path, how):
    checkpoints.write_llama(tmp_path / "llama")
    for options in (QUICK, OVERWRITE):
        js.convert(tmp_path / "llama", tmp_path / "out", **options, **how)
    js.convert(tmp_path / "llama", tmp_path / "out", **OVERWRITE)
    assert js.verify(tmp_path / "out", tmp_path / "llama").problems == ()


def test_a_home_directory_outlives_a_mistyped_path(tmp_path):
    checkpoints.write_llama(tmp_path / "llama")
    home = make(tmp_path / "home", ".bashrc", "thesis.tex")
    before = checkpoints.files_of(home)
    with pytest.raises(LayoutError, match="is not replaced"):
        js.merge(tmp_path / "llama", home, **OVERWRITE)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LayoutError, match=r"thesis\.tex is not replaced: it is not a folder"):
        js.merge(tmp_path / "llama", tmp_path / "thesis.tex", **OVERWRITE)
    assert checkpoints.files_of(home) == before
    assert not list(tmp_path.glob(".*.partial"))


def test_links_in_a_result_are_not_walked(tmp_path):
    make(tmp_path / "elsewhere", "model.safetensors")
    make(tmp_path / "out", "model.safetensors")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    refuse_foreign(tmp_path / "out")
