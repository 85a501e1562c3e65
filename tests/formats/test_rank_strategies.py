"""Where strategies come from, wrong ones, and files that MindSpore's own reader takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import mindspore_files as ms
import numpy as np
import pytest
from golden_files import golden
from mindspore_ranks import (
    ARRAYS,
    LAYOUT,
    NUMBERS,
    QUICK,
    ROWS,
    STEP,
    Held,
    check_equal,
    merged,
    write_ranks,
    write_strategy,
)

import jaxshard as js
from jaxshard.core.layout import Layout, Placement
from jaxshard.errors import CoverageError, FormatError, LayoutError
from jaxshard.formats import strategy_files
from jaxshard.formats.strategy_codec import Operator, ParamLayout
from jaxshard.formats.strategy_files import Stage, Strategies

# --- strategies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "checkpoint/strategy",
        "strategy",
        "merged_strategy.ckpt",
        "checkpoint/merged_strategy.ckpt",
        "merged_strategy/dst_strategy.ckpt",
    ],
)
def test_the_strategy_is_found_where_jobs_put_it(place: str, tmp_path: Path) -> None:
    source = write_ranks(tmp_path / "checkpoint")
    if place.endswith(".ckpt"):
        shapes = {n: a.shape for n, a in ARRAYS.items()}
        data = strategy_files.merged_file(strategy_files.from_layout(LAYOUT, shapes))
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(data)
    else:
        write_strategy(tmp_path / place)
    check_equal(merged(source, tmp_path / "o"), ARRAYS)
    said = [n for n in js.open(source).notes if n.startswith("the layout is that of")]
    assert bool(said) == place.endswith(".ckpt")  # a guess is said, a custom is not


def test_the_output_folder_of_a_job_may_be_named_itself(ranks: Path, tmp_path: Path) -> None:
    assert js.open(ranks.parent).root == str(ranks)
    check_equal(merged(ranks.parent, tmp_path / "x" / "o"), ARRAYS)


def test_ranks_without_a_strategy_are_refused_and_one_alone_is_whole(
    tmp_path: Path, ranks: Path
) -> None:
    alone = write_ranks(tmp_path / "a" / "b", lambda _: {**ARRAYS, **NUMBERS}, ranks=[0])
    catalog = js.open(alone)
    assert catalog.scalars == NUMBERS.keys()
    assert any("are read as whole" in note for note in catalog.notes)
    several = write_ranks(tmp_path / "c" / "d")
    with pytest.raises(LayoutError, match=r"has 4 ranks but no strategy files.*--src-strategy"):
        js.open(several)
    check_equal(merged(several, tmp_path / "o", src_strategy=ranks.parent / "strategy"), ARRAYS)


def test_the_file_of_one_rank_is_said_to_be_that(ranks: Path) -> None:
    catalog = js.open(ranks / "rank_1" / STEP.format(r=1))
    assert "is the file of one rank; its tensors are read as whole" in catalog.notes[0]
    assert catalog["wq"].shape == (4, 6)


def test_the_wrong_thing_given_as_a_strategy_is_said_to_be_so(ranks: Path) -> None:
    weights = write_ranks(ranks.parent / "w", name="net_rank_{r}-1_1.ckpt")
    with pytest.raises(FormatError, match="is a MindSpore weight checkpoint, not a strategy file"):
        js.open(ranks, src_strategy=weights / "rank_0" / "net_rank_0-1_1.ckpt")
    with pytest.raises(CoverageError, match="the strategy lacks all 3 tensors of the files"):
        js.open(ranks, src_strategy=golden("dp1mp4", "strategy"))


@pytest.mark.parametrize(
    ("stage", "why"), [(0, "has rank 4, 5, 6, 7, but"), (4, "got the strategy of stage 1 only")]
)
def test_the_strategy_of_one_stage_is_not_enough(stage: int, why: str) -> None:
    """MindSpore writes half a model, or none, and returns."""
    path = golden("dp2mp2pp2", "strategy", f"ckpt_strategy_rank_{stage}.ckpt")
    with pytest.raises(CoverageError, match=why):
        js.open(golden("dp2mp2pp2", "src_safetensors"), src_strategy=path)


def test_a_damaged_rank_stops_all_and_leaves_nothing(ranks: Path, tmp_path: Path) -> None:
    """In MindSpore a process dies, and half-empty files are left as if they were good."""
    path = ranks / "rank_1" / STEP.format(r=1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=f"rank_1/{STEP.format(r=1)} is truncated"):
        js.merge(ranks, tmp_path / "o", **QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "strategy"]


def test_an_optimizer_shard_of_a_permuted_map_is_put_together_right(tmp_path: Path) -> None:
    """Device matrix (2, 2, 2), dim 0 on the fastest axis, dim 1 on the middle one, and dim 0
    once more on the slowest. MindSpore's offline tools swap the first two.
    """
    array = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    param = ParamLayout((2, 2, 2), ((0, 1),), 4, 2)
    stage = Stage(0, "made", {"w3": param}, (Operator("op", 0, ((1,),)),))
    (tmp_path / "strategy").mkdir()
    for name, data in strategy_files.raw_files(Strategies({0: stage})).items():
        (tmp_path / "strategy" / name).write_bytes(data)

    def held(rank: int) -> Held:
        slow, middle, fast = rank // 4, rank // 2 % 2, rank % 2
        rows = array[4 * fast : 4 * fast + 4][2 * slow : 2 * slow + 2]
        return {"w3": np.ascontiguousarray(rows[:, 3 * middle : 3 * middle + 3])}

    source = write_ranks(tmp_path / "checkpoint", held, ranks=range(8))
    check_equal(merged(source, tmp_path / "o"), {"w3": array})
    js.convert(source, tmp_path / "once", "same", **QUICK, remove_redundancy=True)
    check_equal(merged(tmp_path / "once", tmp_path / "again"), {"w3": array})


def test_column_splits_of_bfloat16_are_written_as_they_are(tmp_path: Path) -> None:
    """With a newer safetensors package MindSpore writes these wrong: it forgets the strides."""
    strategy = golden("dp2mp2pp2", "targets", "dp1mp4_strategy.ckpt")
    js.convert(
        golden("dp2mp2pp2", "src_safetensors"),
        tmp_path / "o",
        strategy,
        **QUICK,
        drop_prefix="adam_",
    )
    whole = ms.weights(golden("dp2mp2pp2", "full", "full.safetensors"))
    name = "model.layers.1.feed_forward.w2.weight"
    kind, shape, data = whole[name]
    assert kind == "BF16"
    columns = np.split(np.frombuffer(data, np.uint16).reshape(shape), 4, axis=1)
    for rank, held in ms.rank_weights_of(tmp_path / "o").items():
        assert held[name][2] == np.ascontiguousarray(columns[rank]).tobytes()


def test_a_vector_that_two_axes_split_is_one_dim_and_not_two(tmp_path: Path) -> None:
    """A tensor map of two numbers looks like two dims; only the tensor's shape tells."""
    array = np.arange(8, dtype=np.float32)
    param = ParamLayout((2, 2), ((0, 1),))  # the fast axis outside, so no two that are one
    stage = Stage(0, "made", {"bias": param}, (Operator("op", 0, ((1,),)),))
    strategy = tmp_path / "strategy"
    strategy.mkdir()
    for name, data in strategy_files.raw_files(Strategies({0: stage})).items():
        (strategy / name).write_bytes(data)

    def held(rank: int) -> Held:
        number = rank % 2 * 2 + rank // 2
        return {"bias": array[2 * number : 2 * number + 2]}

    source = write_ranks(tmp_path / "checkpoint", held)
    check_equal(merged(source, tmp_path / "o"), {"bias": array})
    js.convert(tmp_path / "o", tmp_path / "cut", strategy, **QUICK)  # and as a target
    js.convert(source, tmp_path / "again", "same", **QUICK)
    for made in ("cut", "again"):
        for rank, share in ms.rank_weights_of(tmp_path / made).items():
            assert share["bias"][2] == held(rank)["bias"].tobytes()


def test_weights_of_the_strategy_that_are_in_no_file_are_told_and_not_skipped(
    ranks: Path, tmp_path: Path
) -> None:
    """MindSpore skips them in silence, and the network keeps what it was initialised with."""
    head = {"head.weight": (ROWS,), "adam_m.wq": (ROWS,)}
    more = Layout(4, {**LAYOUT.placements, **head})
    arrays = {**ARRAYS, "head.weight": ARRAYS["wq"], "adam_m.wq": ARRAYS["wq"]}
    strategy = write_strategy(tmp_path / "more", more, arrays)
    whole = r"1 weights of the target's strategy are not in .*: head\.weight\. .*--exclude"
    for work in (
        lambda **how: js.convert(ranks, tmp_path / "o", strategy, **QUICK, **how),
        lambda **how: js.load_rank(ranks, strategy, 1, **how),
        lambda **how: js.load(ranks, strategy, **how),
    ):
        with pytest.raises(CoverageError, match=whole):
            work()
        work(exclude="head")
    held = ms.rank_weights_of(tmp_path / "o")[0]  # states need not be there
    assert held.keys() == ARRAYS.keys()
    js.load(ranks, strategy, include=["wq", "wo"])
    js.load(ranks, strategy, strict=False)
    shutil.rmtree(tmp_path / "o")
    js.convert(ranks, tmp_path / "o", strategy, **QUICK, include="^w")


def test_with_other_names_weights_are_missed_too_unless_some_were_left_out(
    ranks: Path, tmp_path: Path
) -> None:
    table = tmp_path / "names.toml"
    table.write_text('[[op]]\nop = "rename"\nrules = [["w{x}", "layer.{x}.weight"]]\n')
    names = {"layer.q.weight": "wq", "layer.o.weight": "wo", "norm": "norm"}
    target = Layout(4, {new: LAYOUT.placements[old] for new, old in names.items()})
    lacking = Layout(4, {**target.placements, "head": (ROWS,)})
    how = {"names": str(table), **QUICK}
    js.convert(ranks, tmp_path / "o", target, **how)
    with pytest.raises(CoverageError, match="1 weights of the target's strategy"):
        js.convert(ranks, tmp_path / "p", lacking, **how)
    js.convert(ranks, tmp_path / "p", target, exclude="^wo", **how)  # the source's name


def test_states_that_the_strategy_has_not_are_left_out_with_a_note(
    training: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for work in (js.load, js.load_rank):
        caplog.clear()
        assert work(training, LAYOUT).keys() == ARRAYS.keys() | NUMBERS.keys()
        assert re.search(r"[36] optimizer states are left out", caplog.text)


def test_ranks_are_opened_without_the_boxes_of_all_others(tmp_path: Path) -> None:
    """A few kilobytes of strategy may tell of many cuts over a hundred thousand ranks each."""
    params = {f"w{i}": ParamLayout((2**i, 2 ** (17 - i)), ((0, -1),)) for i in range(17)}
    stage = Stage(0, "made", params, (Operator("op", 0, ((1,),)),))
    (tmp_path / "merged_strategy.ckpt").write_bytes(
        strategy_files.merged_file(Strategies({0: stage}))
    )
    held = {name: np.zeros((1, 2), np.float32) for name in params}
    write_ranks(tmp_path / "checkpoint", lambda _: held, ranks=[0, 5])
    tracemalloc.start()
    try:
        catalog = js.open(tmp_path / "checkpoint")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert catalog["w3"].shape == (2**14, 2)
    assert peak < 30_000_000


# --- what MindSpore's reader demands, and ours does not ---------------------------------------


@pytest.mark.parametrize("format", ["ranks", "unified", "iteration", "huggingface"])
def test_every_safetensors_file_is_one_that_mindspore_reads(
    format: str, training: Path, tmp_path: Path
) -> None:
    to = "full" if format in ("unified", "huggingface") else "same"
    js.convert(training, tmp_path / "o", to, format=format, **QUICK)
    paths = sorted((tmp_path / "o").rglob("*.safetensors"))
    assert len(paths) == {"ranks": 4, "unified": 2, "iteration": 8, "huggingface": 2}[format]
    for path in paths:
        metadata = ms.check_mindspore_reads(path)
        assert metadata["format"] == ("pt" if format == "huggingface" else "ms")
        if format in ("ranks", "unified"):
            assert metadata["remove_redundancy"] == "False"  # as Python writes it


def test_the_checksum_of_a_source_is_not_claimed_for_the_result(tmp_path: Path) -> None:
    source = golden("ckpt_formats", "crc_nobf16.safetensors")
    assert "crc_num" in ms.check_mindspore_reads(source)
    js.convert(source, tmp_path / "o", **QUICK, exclude="f64")
    (written,) = (tmp_path / "o").glob("*.safetensors")
    assert ms.check_mindspore_reads(written).keys() == {"format"}


def test_that_check_refuses_a_header_in_another_order(tmp_path: Path) -> None:
    header = {
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"xy")
    with pytest.raises(AssertionError, match="b is not where"):
        ms.check_mindspore_reads(path)
    js.convert(tmp_path, tmp_path.parent / f"{tmp_path.name}_o", **QUICK)  # valid, so read
    (written,) = (tmp_path.parent / f"{tmp_path.name}_o").glob("*.safetensors")
    ms.check_mindspore_reads(written)


def test_float8_is_carried_through_ranks_and_refused_in_a_ckpt(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F8_E4M3", "shape": [4, 2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + bytes(range(8))
    )
    layout = Layout(2, {"w": (Placement((("mp", 2),), (("mp",),)),)})
    js.convert(tmp_path, tmp_path / "o", layout, **QUICK)
    assert ms.rank_weights_of(tmp_path / "o")[1]["w"] == ("F8_E4M3", (2, 2), bytes(range(4, 8)))
    with pytest.raises(LayoutError, match=r"MindSpore's .ckpt has no dtype F8_E4M3"):
        js.convert(tmp_path, tmp_path / "c", layout, format="ckpt", **QUICK)


def test_a_dim_that_does_not_divide_is_refused_with_what_to_pad_to(
    ranks: Path, tmp_path: Path
) -> None:
    target = Layout(5, {n: (Placement((("mp", 5),), (("mp",),)),) for n in ARRAYS})
    with pytest.raises(LayoutError, match=r"norm: dim 0 .* 6 elements.* Pad it to 10"):
        js.convert(ranks, tmp_path / "o", target, **QUICK)


def test_files_are_readable_by_others(ranks: Path, tmp_path: Path) -> None:
    """MindSpore leaves 0400, which nobody else can read."""
    js.convert(ranks, tmp_path / "o", "same", **QUICK)
    modes = {p.stat().st_mode & 0o444 for p in (tmp_path / "o").rglob("*.safetensors")}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o444 & ~mask}
