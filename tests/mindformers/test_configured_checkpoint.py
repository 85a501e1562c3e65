"""``auto_trans_ckpt: False``: every rank gets what its own file has, whatever the configuration."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import mindspore_files as ms
import numpy as np
import pytest
from golden_files import LAYOUTS, golden, manifest
from mindspore_ranks import QUICK, held_by, write_ranks, write_strategy

import jaxshard as js
from jaxshard import mindformers
from jaxshard.core.layout import Layout, Placement, Strategy
from jaxshard.errors import CoverageError, LayoutError

STAGE = (("dp", 1), ("mp", 2))
LAYER = "model.layers.{}.attention.wq.weight"
SIZES = {"dp": "data_parallel", "mp": "model_parallel", "pp": "pipeline_stage"}
SIZES |= {"cp": "context_parallel", "ep": "expert_parallel"}


def _config(source: Path, **values: Any) -> dict[str, Any]:
    return {
        "load_checkpoint": str(source),
        "use_parallel": True,
        "auto_trans_ckpt": False,
        "resume_training": True,
        **values,
    }


def _of_job(home: Callable[[int], int], spec: Any = (("mp",), ())) -> Layout:
    """Four layers on two stages of two ranks: layer n on stage ``home(n)``."""
    layers = {LAYER.format(n): (Placement(STAGE, spec, 2 * home(n)),) for n in range(4)}
    ends = {
        "model.tok_embeddings.embedding_weight": (Placement(STAGE, (), 0),),
        "model.norm_out.weight": (Placement(STAGE, (), 2),),
        "lm_head.weight": (Placement(STAGE, (("mp",),), 2),),
    }
    return Layout(4, {**layers, **ends})


def _arrays(layout: Layout) -> dict[str, Any]:
    shapes = {n: (6,) if "norm" in n else (8, 6) for n in layout.placements}
    return {
        n: np.arange(np.prod(s), dtype=np.float32).reshape(s) + 100 * i
        for i, (n, s) in enumerate(shapes.items())
    }


TWO_AXES = Layout(
    4,
    {
        LAYER.format(0): (Placement((("a", 2), ("b", 2)), (("b", "a"), ())),),  # b is the slower
        LAYER.format(1): (Placement((("a", 2), ("b", 2)), (("a",), ("b",))),),
        **dict.fromkeys(
            ("model.tok_embeddings.embedding_weight", "model.norm_out.weight"),
            (Placement((("all", 4),)),),
        ),
    },
)
JOBS = {
    "as the configuration": (_of_job(lambda n: n // 2), {"mp": 2, "pp": 2}),
    "interleaved": (_of_job(lambda n: n % 2), {"mp": 2, "pp": 2}),
    "uneven": (_of_job(lambda n: n // 3), {"mp": 2, "pp": 2}),
    "by columns": (_of_job(lambda n: n // 2, ((), ("mp",))), {"mp": 2, "pp": 2}),
    "of two axes": (TWO_AXES, {"dp": 2, "mp": 2}),
}


def _written(folder: Path, layout: Layout, ranks: Iterable[int] = range(4)) -> Path:
    arrays = _arrays(layout)
    write_strategy(folder / "strategy", layout, arrays)
    return write_ranks(folder / "checkpoint", lambda r: held_by(r, arrays, layout), ranks=ranks)


@pytest.mark.parametrize("job", JOBS)
def test_a_rank_gets_what_its_own_file_has(job: str, tmp_path: Path) -> None:
    layout, sizes = JOBS[job]
    source = _written(tmp_path, layout)
    parallel = {SIZES[n]: size for n, size in sizes.items()} | {"vocab_emb_dp": True}
    told = _config(source, parallel_config=parallel)
    files = ms.rank_weights_of(source)
    for rank in range(4):
        share = mindformers.load_rank(told, rank)
        assert {n: (a.shape, a.tobytes()) for n, a in share.items()} == {
            n: (shape, data) for n, (_, shape, data) in files[rank].items()
        }
    arrays = mindformers.load(told)
    for rank, device in enumerate(jax.devices()[:4]):
        shards = {
            n: s.data for n, a in arrays.items() for s in a.addressable_shards if s.device == device
        }
        assert {n: np.asarray(a).tobytes() for n, a in shards.items()} == {
            n: data for n, (_, _, data) in files[rank].items()
        }
    notes = [n for n in mindformers.from_config(told).open().notes if "are sliced differently" in n]
    assert len(notes) == (job != "as the configuration")
    assert all(
        "each rank keeps the part in its own file, because auto_trans_ckpt is False" in n
        for n in notes
    )


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("folder", ["checkpoint", "."])
@pytest.mark.parametrize("resume", [True, False, "net_rank_0-1_10.safetensors"])
def test_a_rank_gets_its_own_file_also_without_strategy_files(
    job: str,
    folder: str,
    resume: bool | str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    layout, sizes = JOBS[job]
    source = _written(tmp_path, layout)
    shutil.rmtree(tmp_path / "strategy")
    held = {r: held_by(r, _arrays(layout), layout) for r in range(4)}
    older = {r: {n: a + 1 for n, a in arrays.items()} for r, arrays in held.items()}
    write_ranks(source, older.__getitem__, "net_rank_{r}-1_9.safetensors")
    parallel = {SIZES[n]: size for n, size in sizes.items()}
    told = _config(
        tmp_path / folder,
        parallel_config=parallel,
        resume_training=resume,
    )
    for rank, wanted in held.items():
        share = mindformers.load_rank(told, rank)
        assert {n: a.tobytes() for n, a in share.items()} == {
            n: a.tobytes() for n, a in wanted.items()
        }
    assert "is the file of one rank; its tensors are read as whole" in caplog.text
    with pytest.raises(LayoutError, match="has 4 ranks but no strategy files"):
        mindformers.load_rank({**told, "auto_trans_ckpt": True}, 0)
    with pytest.raises(LayoutError, match="has 4 ranks but no strategy files"):
        mindformers.load(told)
    shutil.rmtree(source / "rank_3")
    with pytest.raises(LayoutError, match="has 3 ranks but no strategy files"):
        mindformers.load_rank(told, 0)


def test_of_both_kinds_of_files_without_strategy_that_counts_which_is_named(tmp_path: Path) -> None:
    layout, sizes = JOBS["interleaved"]
    source = _written(tmp_path, layout)
    shutil.rmtree(tmp_path / "strategy")
    other = {n: a + 1 for n, a in _arrays(layout).items()}
    write_ranks(source, lambda r: held_by(r, other, layout), "net_rank_{r}-1_10.ckpt")
    told = _config(source, parallel_config={SIZES[n]: size for n, size in sizes.items()})
    with pytest.raises(CoverageError, match="expected one file type"):
        mindformers.load_rank(told, 0)
    share = mindformers.load_rank({**told, "load_ckpt_format": "ckpt"}, 0)
    assert share[LAYER.format(0)].tobytes() == held_by(0, other, layout)[LAYER.format(0)].tobytes()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_of_a_real_job_gets_what_its_own_file_has(name: str) -> None:
    source = golden(name, "src_safetensors")
    told_of = manifest(name)["layout"]
    parallel = {theirs: told_of.get(ours, 1) for ours, theirs in SIZES.items()}
    told = _config(
        source,
        parallel_config=parallel,
        src_strategy_path_or_dir=str(golden(name, "strategy")),
        parallel={"enable_parallel_optimizer": bool(told_of.get("opt"))},
    )
    files = ms.rank_weights_of(source)
    for rank, held in files.items():
        share = mindformers.load_rank(told, rank)
        assert {n: a.tobytes() for n, a in share.items()} == {
            n: data for n, (_, _, data) in held.items() if not n.startswith("accu_grads.")
        }


@pytest.mark.parametrize(
    ("switch", "note"),
    [
        (True, None),
        (None, "parallel_config is used; auto_trans_ckpt: False keeps the part of each rank"),
    ],
)
def test_otherwise_the_configuration_decides_the_slicing(
    switch: bool | None, note: str | None, tmp_path: Path
) -> None:
    layout, _ = JOBS["interleaved"]
    source = _written(tmp_path, layout)
    told = _config(
        source,
        auto_trans_ckpt=switch,
        parallel_config={"model_parallel": 2, "pipeline_stage": 2},
    )
    share = mindformers.load_rank(told, 0)
    assert sorted(share) == sorted(js.load_rank(source, "mp2pp2vocabdp", 0))
    assert LAYER.format(1) in share  # by the files on the second stage
    notes = [n for n in mindformers.from_config(told).open().notes if "are sliced differently" in n]
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]
    assert all(n.startswith("2 of 7 weights are sliced differently") for n in notes)


def test_another_number_of_ranks_is_laid_out_by_the_configuration(tmp_path: Path) -> None:
    source = _written(tmp_path, JOBS["interleaved"][0])
    asked = mindformers.from_config(_config(source, parallel_config={"model_parallel": 2}))
    catalog = asked.open()
    assert asked.target(catalog) == Strategy.parse("mp2vocabdp")
    assert "the checkpoint has 4 ranks and the job has 2" in " ".join(catalog.notes)


def test_names_without_rules_keep_their_slicing_and_are_not_compared(tmp_path: Path) -> None:
    layout = Layout(2, {"odd.thing": (Placement((("mp", 2),), ((), ("mp",))),)})
    arrays = {"odd.thing": np.arange(16, dtype=np.float32).reshape(4, 4)}
    write_strategy(tmp_path / "strategy", layout, arrays)
    source = write_ranks(tmp_path / "c", lambda r: held_by(r, arrays, layout), ranks=range(2))
    told = _config(source, parallel_config={"model_parallel": 2})
    assert np.array_equal(mindformers.load_rank(told, 1)["odd.thing"], arrays["odd.thing"][:, 2:])
    (note,) = [n for n in mindformers.from_config(told).open().notes if "not compared" in n]
    assert note.startswith("parallel_config is not compared with the ranks' own parts:")


# --- half a model --------------------------------------------------------------------------

LLAMA = "dp2mp2pp2"  # a real job, of which the first stage alone looks like one without stages
RULES_OF_ODD = '[specs]\n"odd.*" = "-,mp"\n[stages]\nlayers = "odd.{layer}."\n'
PARALLEL = {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2}


def _first_stage(out: Path, rename: Callable[[str], str] = str) -> Path:
    """The ranks and strategy files of the first of two stages."""
    (out / "strategy").mkdir(parents=True)
    for rank in range(4):
        shutil.copytree(
            golden(LLAMA, "src_safetensors", f"rank_{rank}"), out / "checkpoint" / f"rank_{rank}"
        )
        shutil.copy(golden(LLAMA, "strategy", f"ckpt_strategy_rank_{rank}.ckpt"), out / "strategy")
    return out / "checkpoint"


VERBS: list[Callable[[Any], Any]] = [
    mindformers.load,
    lambda told: mindformers.load_rank(told, 0),
    lambda told: mindformers.load_rank(told, 3),
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("switch", [True, False, None])
@pytest.mark.parametrize("resume", [True, False])
def test_the_first_stage_of_a_job_is_not_taken_for_all_of_it(
    verb: Callable[[Any], Any], switch: bool | None, resume: bool, tmp_path: Path
) -> None:
    source = _first_stage(tmp_path)
    told = _config(source, auto_trans_ckpt=switch, resume_training=resume, parallel_config=PARALLEL)
    with pytest.raises(CoverageError, match=r"is a part of a model: it has layers|as many as 1 of"):
        verb(told)


@pytest.mark.parametrize("verb", VERBS)
def test_the_first_stage_is_refused_for_a_job_of_its_size_too(
    verb: Callable[[Any], Any], tmp_path: Path
) -> None:
    told = _config(
        _first_stage(tmp_path), parallel_config={"data_parallel": 2, "model_parallel": 2}
    )
    with pytest.raises(CoverageError, match="is a part of a model: it has layers"):
        verb(told)


@pytest.mark.parametrize("key", ["num_layers", "num_hidden_layers"])
@pytest.mark.parametrize("verb", VERBS)
def test_layers_at_the_end_are_missed_by_the_number_of_the_configuration(
    verb: Callable[[Any], Any], key: str, tmp_path: Path
) -> None:
    """A tied head and no norm: nothing lies after the last layer, or before the first."""
    names = [LAYER.format(n) for n in range(2)]
    layout = Layout(2, {n: (Placement(STAGE, (("mp",), ())),) for n in names})
    source = _written(tmp_path, layout, ranks=range(2))
    told = _config(source, auto_trans_ckpt=True, parallel_config={"model_parallel": 4})
    assert sorted(mindformers.load_rank(told, 0)) == names
    told["model"] = {"model_config": {key: 4}}
    with pytest.raises(CoverageError, match=r"layers 2, 3 of 4 are missing"):
        verb(told)
    told["model"] = {"model_config": {key: 2}}
    assert verb(told).keys() == set(names)


@pytest.mark.parametrize(("switch", "refused"), [(False, True), (None, True), (True, False)])
def test_names_of_no_family_are_held_against_the_number_of_ranks(
    switch: bool | None, refused: bool, tmp_path: Path
) -> None:
    placed = (Placement((("mp", 2),), ((), ("mp",))),)
    layout = Layout(2, dict.fromkeys(("odd.0.thing", "odd.1.thing"), placed))
    source = _written(tmp_path, layout, ranks=range(2))
    parallel = {"model_parallel": 2, "pipeline_stage": 2}
    told = _config(source, auto_trans_ckpt=switch, parallel_config=parallel)
    text = "the strategy files have 2 ranks, as many as 1 of the 2 pipeline stages"
    assert text in " ".join(mindformers.from_config(told).open().notes)
    rules = js.read_rules(RULES_OF_ODD)
    if refused:
        with pytest.raises(CoverageError, match=text):
            mindformers.load_rank(told, 0, rules=rules)
    else:
        assert mindformers.load_rank(told, 2, rules=rules)["odd.1.thing"].shape == (8, 3)


def test_selected_tensors_of_a_part_are_loaded(tmp_path: Path) -> None:
    told = _config(_first_stage(tmp_path), auto_trans_ckpt=True, parallel_config=PARALLEL)
    share = mindformers.load_rank(told, 0, include=r"^model.*attention\.wq\.")
    assert sorted(share) == [LAYER.format(0)]


@pytest.mark.parametrize("form", ["huggingface", "unified", "ckpt"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_merged_half_lacks_layers_of_the_configuration(
    form: str, verb: Callable[[Any], Any], tmp_path: Path
) -> None:
    """MindSpore makes such ones of one stage, and returns as if all was well."""
    source = _first_stage(tmp_path)
    js.merge(source, tmp_path / "half", format=form, include=".", **QUICK)
    told = _config(tmp_path / "half", parallel_config={"model_parallel": 4})
    told["model"] = {"model_config": {"num_layers": 4}}
    with pytest.raises(CoverageError, match=r"half is a part of a model: layers 2, 3 of 4 are mis"):
        verb(told)
    told["model"] = {"model_config": {"num_layers": 2}}
    assert verb(told)


def test_the_config_of_the_checkpoint_counts_and_the_contradiction_is_noted(tmp_path: Path) -> None:
    source = golden(LLAMA, "full", "full.safetensors")
    shutil.copy(source, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    told = _config(tmp_path, parallel_config={}, model={"model_config": {"num_layers": 4}})
    notes = mindformers.from_config(told).open().notes
    assert any("4 layers, but config.json of the checkpoint has 2" in note for note in notes)


def test_a_smaller_job_is_loaded_by_a_larger_one() -> None:
    """Its four ranks are as many as a stage has, and its names those of a whole model."""
    told = _config(
        golden("dp1mp4", "src_safetensors"),
        auto_trans_ckpt=True,
        src_strategy_path_or_dir=str(golden("dp1mp4", "strategy")),
        parallel_config=PARALLEL,
    )
    held = [set(mindformers.load_rank(told, rank)) for rank in (0, 4)]
    weights = {n for n in manifest("dp1mp4")["tensors"] if not n.startswith("accu_grads.")}
    assert weights <= held[0] | held[1]
    assert "lm_head.weight" in held[1] - held[0]


# --- what contradicts it ---------------------------------------------------------------------


def test_rules_contradict_the_original_slicing(tmp_path: Path) -> None:
    source = _written(tmp_path, JOBS["interleaved"][0])
    told = _config(source, parallel_config={"model_parallel": 2, "pipeline_stage": 2})
    rules = js.read_rules('[specs]\n"*" = "-"\n')
    for verb in (mindformers.load, mindformers.load_rank):
        with pytest.raises(LayoutError, match="auto_trans_ckpt: False keeps each rank's own part"):
            verb(told, rules=rules)


def test_a_load_may_keep_the_layout_of_its_source(tmp_path: Path) -> None:
    layout, _ = JOBS["interleaved"]
    source = _written(tmp_path, layout)
    arrays, wanted = js.load(source, "same"), js.load(source, layout)
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        assert array.sharding.is_equivalent_to(wanted[name].sharding, array.ndim), name
    js.merge(source, tmp_path / "whole", **QUICK)
    with pytest.raises(LayoutError, match=r"'same' is the layout .*whole is complete"):
        js.load(tmp_path / "whole", "same")


def test_what_was_trained_alone_is_no_half_of_a_model(tmp_path: Path) -> None:
    layout = Layout(2, {LAYER.format(3): (Placement(STAGE, (("mp",), ())),)})
    arrays = _arrays(layout)
    write_strategy(tmp_path / "strategy", layout, arrays)
    source = write_ranks(
        tmp_path / "checkpoint_trainable",
        lambda r: held_by(r, arrays, layout),
        "net_rank_{r}-trainable_params-1_10.safetensors",
        ranks=range(2),
    )
    told = _config(source, auto_trans_ckpt=True, parallel_config={"model_parallel": 2})
    told["model"] = {"model_config": {"num_layers": 4}}
    assert set(mindformers.load_rank(told, 0)) == {LAYER.format(3)}
