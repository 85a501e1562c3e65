"""A target means the same in every verb, whatever the working directory holds."""

from __future__ import annotations

import checkpoints
import jax
import pytest

import jaxshard as js
from jaxshard.cli import main
from jaxshard.conversion.targets import FULL, SAME, parse_target
from jaxshard.core.layout import Strategy
from jaxshard.errors import LayoutError


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A model, and a folder called mp2 in the working directory with the files of dp2."""
    checkpoints.write_llama(tmp_path / "llama")
    js.convert(tmp_path / "llama", tmp_path / "mp2", "dp2", fsync=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _shard(arrays):
    return arrays["lm_head.weight"].addressable_shards[0].data.shape


def _saved(out, to):
    state = js.load("llama", jax.devices()[0])
    with js.CheckpointManager(out, strategy=to) as manager:
        manager.save(1, state)
    return sorted(p.name for p in (out / "checkpoint").iterdir())


VERBS = {
    "plan": lambda out, to: len(js.plan("llama", to).outputs.paths),
    "convert": lambda out, to: js.convert("llama", out, to, fsync=False).num_files,
    "load_rank": lambda out, to: js.load_rank("llama", to, 1)["lm_head.weight"].shape,
    "load": lambda out, to: _shard(js.load("llama", to, devices=jax.devices()[:2])),
    "save": lambda out, to: (
        js.save(
            js.load("llama", jax.devices()[0]), out, format="ranks", strategy=to, fsync=False
        ).num_files
    ),
    "reshard": lambda out, to: _shard(
        js.reshard(js.load("llama", jax.devices()[0]), to, devices=jax.devices()[:2])
    ),
    "manager": _saved,
    "strategy make": lambda out, to: main(["strategy", "make", "llama", str(out), "--to", to]),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_of_the_same_name_does_not_change_a_strategy(verb, beside, tmp_path):
    there = VERBS[verb](tmp_path / "there", "mp2")
    (beside / "mp2").rename(beside / "away")
    assert VERBS[verb](tmp_path / "gone", "mp2") == there


@pytest.mark.parametrize("verb", ["plan", "convert", "load_rank", "load", "save"])
def test_a_path_of_strategy_files_is_read(verb, beside, tmp_path):
    by_text = VERBS[verb](tmp_path / "text", "dp2")
    assert VERBS[verb](tmp_path / "path", "./mp2/strategy") == by_text


def test_words_strategies_and_layouts_are_targets(beside):
    layout = parse_target("mp2/strategy")
    assert layout.num_ranks == 2
    assert parse_target(layout) is layout
    assert parse_target("mp2") == Strategy(mp=2)
    assert (parse_target("full"), parse_target("same")) == (FULL, SAME)
    with pytest.raises(LayoutError, match="neither full, same, nor an existing strategy file"):
        parse_target("fast")
    with pytest.raises(LayoutError, match="not an existing strategy file"):
        parse_target("full", ())
