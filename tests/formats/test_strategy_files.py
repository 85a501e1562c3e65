"""Strategy files against MindSpore's own, and their algebra against a plain reading of its rule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from golden_files import HERE, LAYOUTS, golden, shapes

from jaxshard.core.layout import Layout, Placement
from jaxshard.errors import CoverageError, FormatError, LayoutError, NotFoundError
from jaxshard.formats import strategy_codec as messages
from jaxshard.formats import strategy_files as sf
from jaxshard.formats.folder import MemoryFolder
from jaxshard.formats.strategy_codec import Operator, ParamLayout, StrategyFile
from jaxshard.formats.strategy_layouts import full_shape
from jaxshard.formats.strategy_layouts import placement as placement_of

GOLDEN_FILES = sorted(
    str(p.relative_to(HERE)) for p in HERE.glob("dp*/**/*strategy*.ckpt") if p.is_file()
)


def folder_of(where: Path) -> MemoryFolder:
    files = [where] if where.is_file() else sorted(p for p in where.rglob("*") if p.is_file())
    base = where.parent if where.is_file() else where
    return MemoryFolder({str(p.relative_to(base)): p.read_bytes() for p in files}, str(base))


def read(where: Path) -> sf.Strategies:
    return sf.read(folder_of(where))


# ------------------------------------------------------------------ MindSpore's own files


@pytest.mark.parametrize("path", GOLDEN_FILES)
def test_what_mindspore_wrote_is_written_back_byte_for_byte(path: str) -> None:
    data = (HERE / path).read_bytes()
    assert messages.to_bytes(sf.read_file(MemoryFolder({path: data}), path)) == data


def test_golden_files_are_there() -> None:
    assert len(GOLDEN_FILES) > 80


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_folder_of_raw_files_says_what_the_merged_file_says(name: str) -> None:
    raw, merged = read(golden(name, "strategy")), read(golden(name, "merged_strategy.ckpt"))
    assert {s: v.params for s, v in raw.stages.items()} == {
        s: v.params for s, v in merged.stages.items()
    }
    assert sf.layout(raw) == sf.layout(merged)


@pytest.mark.parametrize("name", LAYOUTS)
def test_we_merge_as_mindspore_does(name: str) -> None:
    """As sets: MindSpore takes the files in the order in which the directory lists them."""
    ours = sf.merged_file(read(golden(name, "strategy")))
    folder = MemoryFolder({"o": ours, "t": golden(name, "merged_strategy.ckpt").read_bytes()})
    assert messages.items(folder, "o") == messages.items(folder, "t")
    assert ours[:2] == b"\x08\x01"


def rank_tensors(name: str) -> Iterator[tuple[int, str, object]]:
    safetensors = pytest.importorskip("safetensors.numpy")
    for path in sorted(golden(name, "src_safetensors").glob("rank_*/*.safetensors")):
        rank = int(path.parent.name.removeprefix("rank_"))
        for tensor, array in safetensors.load_file(path).items():
            yield rank, tensor, array


def full_tensors(name: str) -> dict[str, object]:
    safetensors = pytest.importorskip("safetensors.numpy")
    return dict(safetensors.load_file(golden(name, "full", "full.safetensors")))


def check_ranks_hold_our_boxes(name: str, layout: Layout) -> int:
    full, count = full_tensors(name), 0
    for rank, tensor, array in rank_tensors(name):
        if tensor not in layout.placements:  # global_step and the like are on no strategy
            continue
        whole = full[tensor]
        box = layout.box_of(tensor, whole.shape, rank)
        assert box is not None
        assert array.shape == box.shape, (rank, tensor)
        assert array.tobytes() == whole[box.slices].tobytes(), (rank, tensor)
        local = next(p for p in layout.placements[tensor] if rank in p.ranks)
        assert full_shape(local, array.shape) == whole.shape
        count += 1
    return count


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_holds_the_boxes_we_read_from_its_strategy(name: str) -> None:
    pytest.importorskip("ml_dtypes")
    assert check_ranks_hold_our_boxes(name, sf.layout(read(golden(name, "strategy")))) > 80


def test_the_same_check_fails_with_another_strategy() -> None:
    wrong = sf.layout(read(golden("dp4mp2", "strategy")))  # the same net without optimizer shard
    with pytest.raises(AssertionError):
        check_ranks_hold_our_boxes("dp4mp2_opt2", wrong)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_written_say_what_the_golden_ones_say(name: str) -> None:
    given_ = read(golden(name, "strategy"))
    layout = sf.layout(given_)
    full = {n: s for n, s in shapes(name).items() if n in layout.placements}
    shards = "opt" in name
    ours = sf.from_layout(layout, full, optimizer_shard=shards)
    again = sf.layout(ours)
    for tensor, shape in full.items():
        assert [p.boxes(shape) for p in again.placements[tensor]] == [
            p.boxes(shape) for p in layout.placements[tensor]
        ]
    if name != "dp2cp2mp2_2axis":  # there we join the two axes, which MindSpore reads more safely
        for number, stage in ours.stages.items():
            theirs = given_.stages[number].params
            assert stage.params == {n: theirs[n] for n in stage.params}


# ------------------------------------------------------------------ what folders may hold

W = ParamLayout((2,), ((0, -1),))
N = ParamLayout((2,), ((-1,),))


def raw(stage: int, current_stage: int = 2, **params: ParamLayout) -> bytes:
    return messages.to_bytes(
        StrategyFile("x", {stage: params}, (Operator("op", stage),), False, current_stage)
    )


def test_the_stage_is_told_by_the_operators_and_not_by_name_or_count() -> None:
    folder = MemoryFolder(
        {"ckpt_strategy_rank_7.ckpt": raw(0, w=W), "ckpt_strategy_rank_0.ckpt": raw(1, v=W)}
    )
    strategies = sf.read(folder)
    assert {s: list(v.params) for s, v in strategies.stages.items()} == {0: ["w"], 1: ["v"]}
    assert (strategies.num_stages, strategies.stage_ranks, strategies.num_ranks) == (2, 2, 4)


def test_files_are_found_by_number_beside_what_is_no_strategy() -> None:
    folder = MemoryFolder(
        {
            "s/ckpt_strategy_rank_10.ckpt": raw(0, w=W),
            "s/ckpt_strategy_rank_9.ckpt": raw(0, w=W),
            "s/weights.ckpt": b"\x0a\x00",
            "s/notes.json": b"{}",
            "s/deeper/x.ckpt": raw(5, w=W),
            "t/x.ckpt": raw(6, w=W),
        }
    )
    assert sf.find(folder, "s") == (
        "s/ckpt_strategy_rank_9.ckpt",
        "s/ckpt_strategy_rank_10.ckpt",
    )
    assert list(sf.read(folder, ["s"]).stages) == [0]


def test_files_of_one_stage_may_differ_in_order_but_not_in_meaning() -> None:
    same = {"a.ckpt": raw(0, w=W, n=N), "b.ckpt": raw(0, 9, n=N, w=W)}
    assert sf.read(MemoryFolder(same)).stages[0].path == "a.ckpt"
    with pytest.raises(
        FormatError, match=r"a.ckpt and b.ckpt contradict each other in stage 0: w\."
    ):
        sf.read(MemoryFolder({"a.ckpt": raw(0, w=W, n=N), "b.ckpt": raw(0, w=N, n=N)}))
    with pytest.raises(FormatError, match=r"a.ckpt and b.ckpt .*: n\."):
        sf.read(MemoryFolder({"a.ckpt": raw(0, w=W), "b.ckpt": raw(0, w=W, n=N)}))


def test_past_a_budget_one_file_a_stage_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sf, "_COMPARED_BYTES", 1)
    files = {f"r_{r}.ckpt": raw(r // 4, **{f"w{r // 4}": W}) for r in range(8)}
    files["r_3.ckpt"] = raw(0, other=W)  # not noticed, by design
    assert {s: list(v.params) for s, v in sf.read(MemoryFolder(files)).stages.items()} == {
        0: ["w0"],
        1: ["w1"],
    }


def test_ranks_of_a_stage_must_be_one_number() -> None:
    with pytest.raises(FormatError, match=r"v is on 4 ranks .* expected 2 like w in a.ckpt"):
        sf.read(
            MemoryFolder({"a.ckpt": raw(0, w=W), "b.ckpt": raw(1, v=ParamLayout((4,), ((0,),)))})
        )


def test_a_missing_stage_is_named() -> None:
    alone = sf.read(MemoryFolder({"a.ckpt": raw(1, w=W)}))
    with pytest.raises(
        CoverageError, match=r"got the strategy of stage 1 \(2 ranks each\).* missing: 0\."
    ):
        sf.layout(alone)
    first = sf.read(MemoryFolder({"a.ckpt": raw(0, w=W)}))
    assert sf.layout(first).num_ranks == 2
    assert sf.layout(alone, partial=True).unknown == (0, 1)


def test_a_tied_parameter_lies_in_both_stages() -> None:
    layout = sf.layout(sf.read(MemoryFolder({"a.ckpt": raw(0, e=W), "b.ckpt": raw(1, e=N)})))
    assert [p.first_rank for p in layout.placements["e"]] == [0, 2]


def test_names_with_dashes_are_read_and_written() -> None:
    names = {"a-b": W, "0-c": W, "-": N}
    (params,) = (
        s.params for s in sf.read(MemoryFolder({"a.ckpt": raw(0, **names)})).stages.values()
    )
    assert params == names
    strategies = sf.Strategies({s: sf.Stage(s, "x", names) for s in (0, 1)})
    merged = sf.read(MemoryFolder({"m.ckpt": sf.merged_file(strategies)}))
    assert {s: v.params for s, v in merged.stages.items()} == {0: names, 1: names}


def test_a_raw_file_whose_names_all_look_merged_is_raw_if_its_stage_says_so() -> None:
    (stage,) = sf.read(MemoryFolder({"a.ckpt": raw(3, **{"0-w": W, "1-w": W})})).stages.values()
    assert (stage.number, list(stage.params)) == (3, ["0-w", "1-w"])


@pytest.mark.parametrize(
    ("files", "error", "why"),
    [
        (
            {"w.ckpt": b"\x0a\x10\x0a\x01w"},
            FormatError,
            "is a MindSpore weight checkpoint, not a str",
        ),
        (
            {"w.ckpt": bytes.fromhex("d85e3a7f")},
            FormatError,
            "encrypted with AES-GCM, not a strategy",
        ),
        ({"w.pt": b"PK\x03\x04"}, FormatError, "a PyTorch checkpoint"),
        ({"w.ckpt": b""}, FormatError, "w.ckpt is empty"),
        ({"a.txt": b"", "b": b""}, NotFoundError, "no strategy file at memory .found a.txt, b"),
        ({"s.json": b'{"a": 1}'}, FormatError, "not a JSON strategy file: current_stage"),
        ({"s.json": b'{"parallel_strategy_item": []}'}, FormatError, "not a JSON strategy file"),
        ({"s.ckpt": b"\x08\x02"}, FormatError, "a strategy file without parameters"),
        ({"s.ckpt": raw(0, w=W)[:-1]}, FormatError, "s.ckpt, byte .* left in its message"),
    ],
)
def test_other_files_are_recognised_and_said_plainly(
    files: dict[str, bytes], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        sf.read(MemoryFolder(files))


@pytest.mark.parametrize(
    "param",
    [
        ParamLayout((0,), ((-1,),)),  # no ranks
        ParamLayout((2,), ((1,),)),  # no such axis
        ParamLayout((2,), ((-2,),)),
        ParamLayout((2, 2), ((0, 0),)),  # one axis, two dims
        ParamLayout((2, 2), ((-1, 0), (-1,))),  # unsplit and split
        ParamLayout((2,), ((-1,),), -1, 2),
        ParamLayout((2,), ((-1,),), 1, -2),
        ParamLayout((1 << 18,), ((-1,),)),  # more ranks than there are
    ],
)
def test_numbers_that_cannot_be_are_refused(param: ParamLayout) -> None:
    with pytest.raises(FormatError):
        sf.read(MemoryFolder({"a.ckpt": raw(0, w=param)}))


@pytest.mark.parametrize(
    ("param", "why"),
    [
        (ParamLayout((4,), ((-1,),), 2, 2), "has step 2 .expected 1, the distance"),
        (ParamLayout((4,), ((-1,),), 1, 3), "3 ways do not fit the 4 replicas"),
        (
            ParamLayout((4,), ((0,),), param_split_shape=((3, 1),)),
            "uneven splits are not supported",
        ),
    ],
)
def test_what_is_no_even_split_is_refused_by_name(param: ParamLayout, why: str) -> None:
    strategies = sf.read(MemoryFolder({"a.ckpt": raw(0, w=param)}))
    with pytest.raises(LayoutError, match=f"a.ckpt, parameter w: .*{why}"):
        sf.layout(strategies)


def test_a_strategy_of_more_dims_than_the_tensor_is_refused() -> None:
    with pytest.raises(FormatError, match="has 2 dims, but the stored tensor has shape"):
        full_shape(placement_of(W), (4,))


@pytest.mark.parametrize(
    ("matrix", "stages", "why"),
    [((2**9, 2**9), 1, "a stage of 262144 ranks"), ((2**16,), 40, "a job of 2621440 ranks")],
)
def test_more_ranks_than_there_are_machines_for_are_refused(
    matrix: tuple[int, ...], stages: int, why: str
) -> None:
    """A file of a few hundred bytes: whoever lists its ranks would need gigabytes."""
    param = ParamLayout(matrix, ((-1,),))
    made = sf.Strategies({n: sf.Stage(n, "x", {"w": param}) for n in range(stages)})
    with pytest.raises(FormatError, match=f"{why} .expected at most "):
        sf.read(MemoryFolder({"merged.ckpt": sf.merged_file(made)}))


# ------------------------------------------------------------------ what is written


def test_bytes_have_what_proto2_and_mindspore_require() -> None:
    layout = Layout(2, {"w": (Placement((("mp", 2),), (("mp",), ())),)})
    files = sf.raw_files(sf.from_layout(layout, {"w": (4, 4)}))
    assert list(files) == ["ckpt_strategy_rank_0.ckpt", "ckpt_strategy_rank_1.ckpt"]
    operator = b"\x0a\x10jaxshard_stage_0" + b"\x12\x06" + b"\x08\x00" + b"\x12\x02\x08\x01"
    param = (
        b"\x0a\x02\x08\x02"  # dev_matrix {2}
        + b"\x12\x0d\x08\x00\x08"  # tensor_map {0, -1}: unpacked, -1 in ten bytes
        + b"\xff" * 9
        + b"\x01"
        + b"\x1a\x00\x22\x00"  # one empty split shape, one empty offset
        + b"\x28\x00\x30\x00\x38\x00"  # field, step, size: required, so there though 0
    )
    item = b"\x0a\x01w" + b"\x12" + bytes([len(param)]) + param
    wanted = b"\x08\x02" + b"\x12" + bytes([len(operator)]) + operator
    wanted += b"\x1a" + bytes([len(item)]) + item
    assert files["ckpt_strategy_rank_0.ckpt"] == wanted


def test_every_stage_has_an_operator_that_tells_it() -> None:
    half = (("mp", 1),)
    layout = Layout(2, {"a": (Placement(half),), "b": (Placement(half, (), 1),)})
    strategies = sf.from_layout(layout, {"a": (2,), "b": (2,)})
    for rank, data in enumerate(sf.raw_files(strategies).values()):
        file = sf.read_file(MemoryFolder({"f": data}), "f")
        assert [o.stage for o in file.operators] == [rank] == list(file.stages)
    merged = sf.read_file(MemoryFolder({"f": sf.merged_file(strategies)}), "f")
    assert merged.merged
    assert [o.stage for o in merged.operators] == [0, 1]


def test_layouts_that_are_no_stages_cannot_be_written() -> None:
    two = (("mp", 2),)
    with pytest.raises(LayoutError, match="strategy files need equal stages"):
        sf.from_layout(
            Layout(4, {"a": (Placement(two),), "b": (Placement((("mp", 4),)),)}),
            {"a": (2,), "b": (2,)},
        )
    with pytest.raises(LayoutError, match="a: the placement starts at rank 1"):
        sf.from_layout(Layout(4, {"a": (Placement(two, (), 1),)}), {"a": (2,)})
    with pytest.raises(LayoutError, match="a: dim 0 of shape"):
        sf.from_layout(Layout(2, {"a": (Placement(two, (("mp",),)),)}), {"a": (3,)})
    with pytest.raises(LayoutError, match="stage 1 holds no tensor"):
        sf.raw_files(sf.from_layout(Layout(4, {"a": (Placement(two),)}), {"a": (2,)}))
