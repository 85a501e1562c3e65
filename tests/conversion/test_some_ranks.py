"""A folder with the ranks of one server only: what they hold is used, what they lack is refused.

Two servers without a shared disk, each with one pipeline stage of a real job.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import mindspore_files as ms
import numpy as np
import pytest
import safetensors.numpy
from golden_files import golden
from mindspore_ranks import QUICK
from processes import answers, run_processes

import jaxshard as js
from jaxshard import mindformers
from jaxshard.cli import main
from jaxshard.core.catalog import Model
from jaxshard.errors import CoverageError
from jaxshard.loader import target_shardings
from jaxshard.rules.families import missing_layers

JOB = "dp2mp2pp2"
STAGES = {0: range(4), 1: range(4, 8)}
OTHERS = {0: "rank 4, 5, 6, 7", 1: "rank 0, 1, 2, 3"}


def server(tmp_path: Path, stage: int, source: str = "src_safetensors", strategy=range(8)) -> Path:
    """The output folder of the server that has ``stage``."""
    out = tmp_path / f"server_{stage}"
    for rank in STAGES[stage]:
        shutil.copytree(golden(JOB, source) / f"rank_{rank}", out / "checkpoint" / f"rank_{rank}")
    (out / "strategy").mkdir()
    for rank in strategy:
        shutil.copy(golden(JOB, "strategy", f"ckpt_strategy_rank_{rank}.ckpt"), out / "strategy")
    return out / "checkpoint"


def targets() -> list:
    return ["same", "dp2mp2pp2vocabdp", golden(JOB, "strategy"), "dp1mp2pp2"]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("target", range(3))
@pytest.mark.parametrize("source", ["src_safetensors", "src_safetensors_dedup"])
def test_each_rank_of_a_server_is_loaded_from_its_own_files(stage, target, source, tmp_path):
    place, to = server(tmp_path, stage, source), targets()[target]
    whole = golden(JOB, source)
    for rank in range(8):
        if rank not in STAGES[stage]:
            with pytest.raises(CoverageError, match=f"has no files .{OTHERS[stage]}"):
                js.load_rank(place, to, rank)
            continue
        ours, wanted = js.load_rank(place, to, rank), js.load_rank(whole, to, rank)
        assert ours.keys() == wanted.keys()
        assert all(ours[n].tobytes() == a.tobytes() for n, a in wanted.items())


@pytest.mark.parametrize("stage", [0, 1])
def test_what_needs_the_other_server_says_which_ranks(stage, tmp_path, capsys):
    place = server(tmp_path, stage)
    assert any(f"({OTHERS[stage]})" in note for note in js.open(place).notes)
    for work in (
        lambda: js.merge(place, tmp_path / "o", **QUICK),
        lambda: js.convert(place, tmp_path / "o", "dp1mp2pp2", **QUICK),
        lambda: js.convert(place, tmp_path / "o", "same", **QUICK),
        lambda: js.load(place, "dp2mp2pp2"),
        lambda: js.load(place, golden(JOB, "strategy")),
        lambda: js.load(place, jax.devices()[0]),
        lambda: (
            js.load(place, {"lm_head.weight": jax.devices()[0]})
            if stage == 0
            else js.load(place, {"model.tok_embeddings.embedding_weight": jax.devices()[0]})
        ),
    ):
        with pytest.raises(CoverageError, match=f"has no files .{OTHERS[stage]}"):
            work()
    assert not (tmp_path / "o").exists()
    assert main(["merge", str(place), str(tmp_path / "o")]) == 3
    assert OTHERS[stage] in capsys.readouterr().err


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("words", [True, False])
def test_a_process_loads_what_its_own_devices_hold(stage, words, tmp_path, monkeypatch):
    place, whole = server(tmp_path, stage), golden(JOB, "src_safetensors")
    to = "dp2mp2pp2vocabdp" if words else golden(JOB, "strategy")
    wanted = js.load(whole, to)
    monkeypatch.setattr(target_shardings, "_own_ranks", lambda ranks: frozenset(STAGES[stage]))
    arrays = js.load(place, to)
    assert arrays.keys() == js.open(place).tensors.keys()
    for name, array in arrays.items():
        assert array.sharding == wanted[name].sharding, name
        assert np.array_equal(np.asarray(array), np.asarray(wanted[name])), name


def test_a_configuration_loads_the_rank_that_is_here(tmp_path):
    place = server(tmp_path, 1)
    config = {
        "load_checkpoint": str(place),
        "use_parallel": True,
        "parallel_config": {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2},
    }
    share = mindformers.load_rank(config, 5)
    wanted = mindformers.load_rank(
        {**config, "load_checkpoint": str(golden(JOB, "src_safetensors"))}, 5
    )
    assert share.keys() == wanted.keys()
    with pytest.raises(CoverageError, match=OTHERS[1]):
        mindformers.load_rank(config, 2)


def test_ranks_that_each_server_writes_are_one_checkpoint_together(tmp_path):
    for stage, ranks in STAGES.items():
        js.convert(server(tmp_path, stage), tmp_path / f"o{stage}", "same", **QUICK, rank=ranks)
    shutil.copytree(tmp_path / "o1", tmp_path / "o0", dirs_exist_ok=True)
    js.merge(tmp_path / "o0", tmp_path / "whole", **QUICK)
    assert ms.hashed(ms.folder_weights(tmp_path / "whole")) == ms.truth(JOB)


def test_a_server_with_its_own_strategy_files_only_has_its_own_ranks(tmp_path):
    place = server(tmp_path, 1, strategy=STAGES[1])
    assert any(
        "the strategy files of rank 0, 1, 2, 3 are missing" in note for note in js.open(place).notes
    )
    for rank in STAGES[1]:
        ours, wanted = (
            js.load_rank(p, "same", rank) for p in (place, golden(JOB, "src_safetensors"))
        )
        assert all(ours[n].tobytes() == a.tobytes() for n, a in wanted.items())
    config = {
        "load_checkpoint": str(place),
        "auto_trans_ckpt": False,
        "use_parallel": True,
        "parallel_config": {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2},
    }
    assert mindformers.load_rank(config, 6).keys() <= ours.keys()
    for work in (
        lambda: js.load_rank(place, "same", 0),
        lambda: js.convert(place, tmp_path / "o", "same", **QUICK),
        lambda: js.load(place, "same"),
        lambda: js.load(place, golden(JOB, "strategy")),
        lambda: js.load(place, jax.devices()[0]),
        lambda: js.merge(place, tmp_path / "o", **QUICK),
        lambda: js.convert(place, tmp_path / "o", "dp2mp2pp2", **QUICK, rank=[4]),
    ):
        with pytest.raises(CoverageError):
            work()
    assert not (tmp_path / "o").exists()


# --- half a model --------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["full", "dp1mp2", "dp1mp2pp2"])
def test_strategy_files_of_the_first_stage_alone_do_not_make_half_a_model(to, tmp_path):
    place = server(tmp_path, 0, strategy=STAGES[0])
    config = {
        "load_checkpoint": str(place),
        "use_parallel": True,
        "parallel_config": {"model_parallel": 2, "pipeline_stage": 2},
    }
    with pytest.raises(CoverageError, match=r"is a part of a model: it has layers 0 to .* after"):
        js.convert(place, tmp_path / "o", to, **QUICK)
    with pytest.raises(CoverageError, match="is a part of a model"):
        js.load(place, jax.devices()[0])
    for work in (lambda: mindformers.load_rank(config, 0), lambda: mindformers.load(config)):
        with pytest.raises(
            CoverageError, match="is a part of a model"
        ):  # though states are left out
            work()
    assert js.load_rank(place, "same", 0)  # what is here is as it was
    js.convert(place, tmp_path / "o", to if to == "full" else "dp1mp2", **QUICK, include=".")


@pytest.mark.parametrize(
    ("layers", "num_layers", "more", "lack"),
    [
        (range(4), 4, (), None),
        (range(4), None, (), None),
        ((0, 1, 3), None, (), "layers 2 of 4 are missing"),
        (range(4), 8, (), "layers 4, 5, 6, 7 of 8 are missing"),
        ((2, 3), None, ("lm_head.weight", "model.norm.weight"), "layers 0, 1 of 4 are missing"),
        (range(2), None, ("model.embed_tokens.weight",), "nothing after the last layer"),
        (range(2), None, ("model.norm.weight",), "nothing before the first layer"),
    ],
)
def test_layers_that_are_missing_are_seen(layers, num_layers, more, lack, tmp_path):
    names = more or ("model.embed_tokens.weight", "model.norm.weight")
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": np.ones((4, 2)) for i in layers}
    tensors |= {name: np.ones((2,)) for name in names}
    place = tmp_path / "c" / "rank_0"
    place.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, place / "net.safetensors")
    if num_layers:
        config = {"model_type": "llama", "num_hidden_layers": num_layers}
        (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    if lack is None:
        js.merge(tmp_path / "c", tmp_path / "o", **QUICK)
        return
    with pytest.raises(CoverageError, match=lack):
        js.merge(tmp_path / "c", tmp_path / "o", **QUICK)


def test_files_of_trained_parameters_need_not_be_all_layers(tmp_path):
    place = tmp_path / "c" / "rank_0"
    place.mkdir(parents=True)
    held = {f"model.layers.{i}.mlp.up_proj.weight": np.ones((4, 2)) for i in (6, 7)}
    safetensors.numpy.save_file(held, place / "llama_rank_0-trainable_params-1_10.safetensors")
    js.merge(tmp_path / "c", tmp_path / "o", **QUICK)


def test_two_servers_load_their_own_ranks_together(tmp_path):
    servers = [str(server(tmp_path, stage)) for stage in STAGES]
    whole, target = str(golden(JOB, "src_safetensors")), "multiprocess_files:own_ranks_only"
    found = answers(run_processes(target, 2, 4, servers, whole, "dp2mp2pp2vocabdp"))
    assert len(found) == 2
    for stage, answer in enumerate(found):
        assert answer["same"]
        assert answer["all here"]
        assert OTHERS[stage] in answer["other layout"]


@pytest.mark.parametrize("layers", [2**31, 2**63, 10**30])
def test_an_absurd_number_of_layers_takes_neither_time_nor_memory(layers):
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    lack = missing_layers(Model("llama", layers), names)
    assert lack.startswith("layers 2, 3, 4, 5 and ")
    assert f"{layers - 6} more of {layers}" in lack
