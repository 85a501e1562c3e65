"""``auto_trans_ckpt: False``: every rank gets what its own file has, whatever the configuration."""

from __future__ import annotations

from collections.abc import Callable
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
from jaxshard.errors import LayoutError
from jaxshard.layout import Layout, Placement
from jaxshard.strategy import Strategy

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
        "model.norm_out.weight": (Placement((("all", 4),)),),
    },
)
JOBS = {
    "as the configuration": (_of_job(lambda n: n // 2), {"mp": 2, "pp": 2}),
    "interleaved": (_of_job(lambda n: n % 2), {"mp": 2, "pp": 2}),
    "uneven": (_of_job(lambda n: n // 3), {"mp": 2, "pp": 2}),
    "by columns": (_of_job(lambda n: n // 2, ((), ("mp",))), {"mp": 2, "pp": 2}),
    "of two axes": (TWO_AXES, {"dp": 2, "mp": 2}),
}


def _written(folder: Path, layout: Layout) -> Path:
    arrays = _arrays(layout)
    write_strategy(folder / "strategy", layout, arrays)
    return write_ranks(folder / "checkpoint", lambda r: held_by(r, arrays, layout))


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
    notes = [n for n in mindformers.from_config(told).open().notes if "lie otherwise" in n]
    assert len(notes) == (job != "as the configuration")
    assert all(
        "each rank has what its own file has, as auto_trans_ckpt is False" in n for n in notes
    )


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
        (None, "parallel_config counts; auto_trans_ckpt: False keeps what each rank has"),
    ],
)
def test_otherwise_the_configuration_says_how_ranks_are_cut(
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
    notes = [n for n in mindformers.from_config(told).open().notes if "lie otherwise" in n]
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]
    assert all(n.startswith("2 of 7 weights lie otherwise") for n in notes)


def test_another_number_of_ranks_is_laid_out_by_the_configuration(tmp_path: Path) -> None:
    source = _written(tmp_path, JOBS["interleaved"][0])
    asked = mindformers.from_config(_config(source, parallel_config={"model_parallel": 2}))
    catalog = asked.open()
    assert asked.target(catalog) == Strategy.parse("mp2vocabdp")
    assert "the checkpoint is one of 4 ranks and the job has 2" in " ".join(catalog.notes)


def test_names_without_rules_are_loaded_as_they_lie_and_not_compared(tmp_path: Path) -> None:
    layout = Layout(2, {"odd.thing": (Placement((("mp", 2),), ((), ("mp",))),)})
    arrays = {"odd.thing": np.arange(16, dtype=np.float32).reshape(4, 4)}
    write_strategy(tmp_path / "strategy", layout, arrays)
    source = write_ranks(tmp_path / "c", lambda r: held_by(r, arrays, layout), ranks=range(2))
    told = _config(source, parallel_config={"model_parallel": 2})
    assert np.array_equal(mindformers.load_rank(told, 1)["odd.thing"], arrays["odd.thing"][:, 2:])
    (note,) = [n for n in mindformers.from_config(told).open().notes if "not compared" in n]
    assert note.startswith("parallel_config is not compared with the ranks' own parts:")


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
    js.merge(source, tmp_path / "whole", options=QUICK)
    with pytest.raises(LayoutError, match=r"same is as the ranks .*whole is complete"):
        js.load(tmp_path / "whole", "same")
