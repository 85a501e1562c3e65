"""Rank files as they are written: names and places that MindSpore and MindFormers read.

Their rules are written again here. MindFormers takes what follows the rank in the name of
rank 0's newest file (all of the name where there is no rank), and in every rank's folder the
file that ends so; the strategy from the folder ``strategy`` beside ``load_checkpoint``.
"""

from __future__ import annotations

import re
from pathlib import Path

import jax
import mindspore_files as ms
import numpy as np
import pytest
from golden_files import golden, manifest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from mindspore_ranks import ARRAYS, LAYOUT, NUMBERS, QUICK, held_by, ranks, write_ranks
from test_mindspore_golden import cut, full

import jaxshard as js
from jaxshard.cli import main
from jaxshard.conversion.open import open_strategy
from jaxshard.errors import LayoutError
from jaxshard.formats.registry import FORMATS

__all__ = ["ranks"]  # a fixture

JOB = "dp2mp2pp2"


def what_mindformers_reads(load_checkpoint: Path, kind: str) -> dict[int, ms.Tensors]:
    """The tensors of each rank's file, found as MindFormers finds them."""
    newest = max((load_checkpoint / "rank_0").glob(f"*.{kind}"), key=lambda p: p.stat().st_mtime)
    named = re.fullmatch(r".*_rank_\d+((?:_\d+)?-\d+_\d+)", newest.stem)
    suffix = named[1] if named else newest.stem
    found = {}
    for folder in load_checkpoint.glob("rank_[0-9]*"):
        (path,) = folder.glob(f"*{suffix}.{kind}")
        found[int(folder.name.rpartition("_")[2])] = ms.weights(path)
    return found


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], "checkpoint_rank_{r}-{e}_{s}"),
        (["--prefix", "llama2_7b"], "llama2_7b_rank_{r}-{e}_{s}"),
        (["--prefix", "net_"], "net_rank_{r}-{e}_{s}"),
        (["--prefix", "net", "--step", "3_7"], "net_rank_{r}-3_7"),
        (["--prefix", "net", "--step", "none"], "net"),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_mindformers_slices_again_what_is_written(flags, names, kind, tmp_path):
    place = tmp_path / "output" / "checkpoint"
    how = ["--format", "ckpt"] if kind == "ckpt" else []
    source = golden(JOB, "src_safetensors")
    step = re.search(r"-(\d+)_(\d+)\.", next((source / "rank_0").iterdir()).name)
    command = ["convert", str(source), str(place), "--to", "dp2mp2", "--no-fsync", *flags, *how]
    assert main(command) == 0
    held = what_mindformers_reads(place, kind)
    layout = open_strategy(place.parent / "strategy")  # beside load_checkpoint
    assert held.keys() == set(range(4))
    for rank, tensors in held.items():
        assert tensors == cut(full(JOB), layout, rank, manifest(JOB)["hyper"])
        name = names.format(r=rank, e=step[1], s=step[2])
        assert (place / f"rank_{rank}" / f"{name}.{kind}").exists()
    assert js.verify(place, source).problems == ()


def test_names_have_the_step_that_the_source_has(ranks, tmp_path):
    def name(folder):
        return next((folder / "rank_1").iterdir()).name

    js.convert(ranks, tmp_path / "a", "same", **QUICK)
    assert name(tmp_path / "a") == "checkpoint_rank_1-1_10.safetensors"  # of its names
    write_ranks(ranks, name="net_rank_{r}-2_5.safetensors")
    js.convert(ranks, tmp_path / "b", "same", **QUICK, suffix="1_10")
    assert name(tmp_path / "b") == "checkpoint_rank_1-1_10.safetensors"
    write_ranks(tmp_path / "c", lambda r: {**held_by(r), **NUMBERS}, "net.safetensors")
    js.convert(tmp_path / "c", tmp_path / "d", "same", **QUICK, src_strategy=tmp_path / "strategy")
    assert name(tmp_path / "d") == "checkpoint_rank_1-1_10.safetensors"  # of its numbers
    js.merge(ranks, tmp_path / "whole", **QUICK)
    js.convert(tmp_path / "whole", tmp_path / "e", LAYOUT, **QUICK)
    assert name(tmp_path / "e") == "checkpoint_rank_1-1_1.safetensors"


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"step": "10"}, "expected epoch_step, such as 1_10, or none"),
        ({"prefix": "__"}, "cannot begin a file's name"),
        ({"prefix": "a/b"}, "cannot begin a file's name"),
        ({"step": "1_10", "format": "iteration"}, "is for the names of rank files"),
    ],
)
def test_names_that_cannot_be_are_refused(how, match, ranks, tmp_path):
    with pytest.raises(LayoutError, match=match):
        js.convert(ranks, tmp_path / "o", "same", **QUICK, **how)
    with pytest.raises(LayoutError, match="is for the names of rank files"):
        js.convert(ranks, tmp_path / "o", "full", **QUICK, step="1_10")


def test_the_strategy_beside_a_result_is_never_another_jobs(ranks, tmp_path):
    place = tmp_path / "out" / "checkpoint"
    js.convert(ranks, place, "same", **QUICK)
    first = {p.name: p.read_bytes() for p in (place.parent / "strategy").iterdir()}
    assert len(first) == 4
    js.convert(
        ranks,
        place,
        "mp1",
        **QUICK,
        overwrite=True,
        rules=js.read_rules('[specs]\n"*" = "-"'),
    )
    assert [p.name for p in (place.parent / "strategy").iterdir()] == ["ckpt_strategy_rank_0.ckpt"]
    foreign = golden(JOB, "strategy", "ckpt_strategy_rank_0.ckpt").read_bytes()
    (place.parent / "strategy" / "ckpt_strategy_rank_0.ckpt").write_bytes(foreign)
    report = js.convert(ranks, place, "same", **QUICK, overwrite=True)
    assert f"src_strategy_path_or_dir: {place / 'strategy'}." in report.notes[-1]
    (kept,) = (place.parent / "strategy").iterdir()
    assert kept.read_bytes() == foreign
    js.convert(ranks, tmp_path / "other" / "cut", "same", **QUICK)  # no job's name
    assert not (tmp_path / "other" / "strategy").exists()


# --- from arrays -------------------------------------------------------------------------------


def stages() -> dict[str, jax.Array]:
    """Arrays of two pipeline stages of four devices, and a job's numbers."""
    found = {}
    for stage in (0, 1):
        mesh = Mesh(np.array(jax.devices()[4 * stage : 4 * stage + 4]).reshape(2, 2), ("dp", "mp"))
        for name, spec in (("wq", P("mp", None)), ("wo", P(None, "mp")), ("norm", P())):
            array = jax.device_put(ARRAYS[name] + stage, NamedSharding(mesh, spec))
            found[f"layers.{stage}.{name}"] = array
    return found


NUMBERED = {**NUMBERS, "epoch_num": np.int64(2), "learning_rate": np.float32(0.1)}


@pytest.mark.parametrize("format", ["ranks", "ckpt", "iteration"])
@pytest.mark.parametrize("redundancy", [False, True])
def test_stages_are_saved_with_the_jobs_numbers(format, redundancy, tmp_path):
    arrays = stages() | NUMBERED | {"count": jax.numpy.zeros(())}
    place = tmp_path / "checkpoint"
    js.save(
        arrays, place, format=format, strategy="same", remove_redundancy=redundancy, fsync=False
    )
    if format != "iteration":
        files = {p.name for p in (place / "strategy").iterdir()}
        assert files == {f"ckpt_strategy_rank_{r}.ckpt" for r in range(8)}
        kind = "ckpt" if format == "ckpt" else "safetensors"
        held = what_mindformers_reads(place, kind)
        assert all(NUMBERED.keys() <= tensors.keys() for tensors in held.values())
        assert (place / "rank_5" / f"checkpoint_rank_5-1_10.{kind}").exists()
        strategy = open_strategy(tmp_path / "strategy")
        assert strategy.placements.keys() == {n for n in arrays if n not in NUMBERED}
    else:
        assert (place / "iteration_00000010" / "common.json").exists()
        assert (place / "latest_checkpointed_iteration.txt").read_text() == "10"
    back = js.load(place, jax.devices()[0])
    assert arrays.keys() == back.keys()
    for name, array in arrays.items():
        assert np.array_equal(np.asarray(back[name]), np.asarray(array)), name


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_written_from_files_and_from_arrays_and_read(format, ranks, tmp_path):
    """The README's table."""
    known = FORMATS[format]
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "mp"))
    arrays = js.load(ranks, {n: NamedSharding(mesh, P()) for n in ARRAYS})
    if known.is_complete:
        js.convert(ranks, tmp_path / "a", "full", format=format, **QUICK)
        js.save(
            {n: np.asarray(a) for n, a in arrays.items()},
            tmp_path / "b",
            format=format,
            fsync=False,
        )
    if known.is_by_rank:
        js.convert(ranks, tmp_path / "c", "same", format=format, **QUICK)
        js.save(arrays, tmp_path / "d", format=format, strategy=LAYOUT, fsync=False)
        assert js.open(tmp_path / "d").layout or format == "iteration"
    else:
        with pytest.raises(LayoutError):
            js.convert(ranks, tmp_path / "c", "same", format=format, **QUICK)
        with pytest.raises(LayoutError):
            js.save(arrays, tmp_path / "d", format=format, strategy=LAYOUT)
    for made in tmp_path.glob("[abcd]"):
        back = js.load(made, jax.devices()[0])
        assert all(np.array_equal(np.asarray(back[n]), a) for n, a in ARRAYS.items()), made.name
