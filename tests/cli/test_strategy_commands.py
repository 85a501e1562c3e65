"""``jaxshard strategy``: showing, merging and writing strategy files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mindspore_files as ms
import numpy as np
import pytest
import safetensors.numpy
from golden_files import golden
from mindspore_ranks import ARRAYS, QUICK, check_equal, merged, write_ranks

import jaxshard as js
from jaxshard.cli import main
from jaxshard.conversion.open import open_strategy
from jaxshard.core.layout import Layout, Placement
from jaxshard.errors import FormatError, LayoutError
from jaxshard.formats import strategy_files, strategy_layouts

Capture = pytest.CaptureFixture[str]


def shown(capsys: Capture, *arguments: object) -> str:
    assert main(["strategy", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_table_shows_the_layout_of_each_kind_of_tensor(capsys: Capture) -> None:
    text = shown(capsys, "show", golden("dp4mp2_opt2", "strategy"), "--include", "^model")
    lines = [line.split() for line in text.splitlines()]
    assert text.splitlines()[0].endswith(": 8 ranks, 8 in each of 1 stages")
    assert [
        "0",
        "4",
        "model.layers.#.attention.wq.weight",
        "4×2",
        "0,-1",
        "2",
        "ways",
        "4×1",
    ] in lines
    assert [
        "0",
        "4",
        "model.layers.#.attention.wo.weight",
        "4×2",
        "-1,0",
        "2",
        "ways",
        "2×2",
    ] in lines


def test_a_drawing_shows_the_ranks_of_each_shard(capsys: Capture) -> None:
    text = shown(capsys, "show", golden("dp2mp2pp2", "merged_strategy.ckpt"), "--include", "wo")
    assert "│ 0, 2 │ 1, 3 │" in text  # columns, over mp, in the first stage
    assert "│ 4, 6 │ 5, 7 │" in text  # and in the second


def test_every_tensor_is_listed_on_request(capsys: Capture) -> None:
    text = shown(
        capsys, "show", golden("dp2mp2pp2", "strategy"), "--all", "--include", "wq.weight$"
    )
    assert text.count("attention.wq.weight  ") == 16  # four layers: weight, two states, gradients


def test_json_output_has_the_same_content(capsys: Capture) -> None:
    told = json.loads(shown(capsys, "show", golden("dp1mp4", "strategy"), "--json"))
    assert (told["num_ranks"], told["num_stages"]) == (4, 1)
    one = next(t for t in told["tensors"] if t["name"] == "lm_head.weight")
    assert (one["dev_matrix"], one["tensor_maps"], one["parts"]) == ([4], [[0, -1]], "4×1")


def test_a_missing_stage_is_reported(capsys: Capture) -> None:
    text = shown(capsys, "show", golden("dp2mp2pp2", "strategy", "ckpt_strategy_rank_4.ckpt"))
    assert "note: the strategy of stage 0 is missing." in text


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["show", "NOWHERE"], 2, "NotFoundError: NOWHERE does not exist"),
        (["show", "STRATEGY", "--include", "nobody"], 2, "matches no tensor"),
        (["show", "STRATEGY", "--include", "("], 2, "not a regular expression"),
        (["show", "WEIGHTS"], 3, "is a MindSpore weight checkpoint, not a strategy file"),
        (["merge", "ONE_STAGE", "OUT"], 3, "got the strategy of stage 1"),
        (["make", "MODEL", "OUT", "--to", "dp3xp3"], 2, "is not a strategy"),
    ],
)
def test_an_error_is_one_line(
    arguments: list[str], status: int, why: str, tmp_path: Path, capsys: Capture
) -> None:
    places = {
        "NOWHERE": "NOWHERE",
        "STRATEGY": golden("dp1mp4", "strategy"),
        "WEIGHTS": golden("ckpt_formats", "all_dtypes.ckpt"),
        "ONE_STAGE": golden("dp2mp2pp2", "strategy", "ckpt_strategy_rank_4.ckpt"),
        "MODEL": golden("dp2mp2pp2", "full", "full.safetensors"),
        "OUT": tmp_path / "out",
    }
    assert main(["strategy", *(str(places.get(a, a)) for a in arguments)]) == status
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- merge ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["merged.ckpt", "merged.json"])
def test_a_merged_file_has_the_same_layout_as_the_folder(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    folder = golden("dp2mp2pp2", "strategy")
    shown(capsys, "merge", folder, tmp_path / name)
    assert open_strategy(tmp_path / name) == open_strategy(folder)


@pytest.mark.parametrize("name", ["merged.ckpt", "merged.json"])
@pytest.mark.parametrize("verb", ["merge", "make"])
def test_only_a_strategy_file_is_replaced_and_only_on_request(
    verb: str, name: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / name
    if verb == "merge":
        command = ["strategy", "merge", str(golden("dp1mp4", "strategy")), str(out)]
    else:
        model = golden("dp2mp2pp2", "full", "full.safetensors")
        command = ["strategy", "make", str(model), str(out), "--to", "dp1mp4", "--merged"]
    for mine in (b"mine", b"{}", b'{"name": "package"}', b"\n\x03w\n", b"\x08\x96"):
        out.write_bytes(mine)
        for flag in ([], ["--overwrite"]):
            assert main([*command, *flag]) == 2, mine
            assert out.read_bytes() == mine
    out.unlink()
    assert main(command) == 0
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 0
    assert open_strategy(out).num_ranks == 4
    assert [p.name for p in tmp_path.iterdir()] == [name]
    capsys.readouterr()


def test_names_with_a_hyphen_are_merged_and_read(tmp_path: Path, capsys: Capture) -> None:
    """MindSpore splits ``0-my-weight`` at every hyphen and gives up."""
    names = {"my-weight": "wq", "norm-1": "norm"}
    arrays = {new: ARRAYS[old] for new, old in names.items()}
    rows = Placement((("mp", 2),), (("mp",),), 2)  # all of it in the second of two stages
    first = Placement((("mp", 2),), (("mp",),))
    layout = Layout(4, {"my-weight": (rows,), "norm-1": (first,)})
    shapes = {n: a.shape for n, a in arrays.items()}
    (tmp_path / "strategy").mkdir()
    for name, data in strategy_files.raw_files(strategy_files.from_layout(layout, shapes)).items():
        (tmp_path / "strategy" / name).write_bytes(data)
    shown(capsys, "merge", tmp_path / "strategy", tmp_path / "merged.ckpt")
    read = open_strategy(tmp_path / "merged.ckpt")
    assert read.placements.keys() == names.keys()

    def held(rank: int) -> dict[str, np.ndarray]:
        mine = "my-weight" if rank >= 2 else "norm-1"
        return {mine: np.ascontiguousarray(np.split(arrays[mine], 2)[rank % 2])}

    source = write_ranks(tmp_path / "c" / "d", held)
    check_equal(merged(source, tmp_path / "o", src_strategy=tmp_path / "merged.ckpt"), arrays)
    assert "my-weight" in shown(capsys, "show", tmp_path / "merged.ckpt")


def test_the_merged_file_never_replaces_its_inputs(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "strategy"
    shutil.copytree(golden("dp2mp2pp2", "strategy"), folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    one = folder / "ckpt_strategy_rank_0.ckpt"
    assert main(["strategy", "merge", str(folder), str(one), "--overwrite"]) == 2
    assert "is one of the input files" in capsys.readouterr().err
    assert main(["strategy", "merge", str(folder), str(folder), "--overwrite"]) == 2
    assert "is a folder (expected a file). Name the file" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    for _ in range(2):  # an earlier merged file is not an input and may be replaced
        shown(capsys, "merge", folder, folder / "merged.ckpt", "--overwrite")
    assert open_strategy(folder) == open_strategy(golden("dp2mp2pp2", "strategy"))


def test_an_older_merged_file_is_not_used_if_there_are_raw_files(
    tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "strategy"
    shutil.copytree(golden("dp1mp4", "strategy"), folder)
    shutil.copy(golden("dp1mp4", "merged_strategy.ckpt"), folder / "merged.ckpt")
    raw = open_strategy(golden("dp1mp4", "strategy"))
    assert open_strategy(folder) == raw  # identical files need no note
    old = golden("dp2mp2pp2", "targets", "dp4mp2_strategy.ckpt")
    shutil.copy(old, folder / "merged_ckpt_strategy.ckpt")
    (folder / "merged.ckpt").unlink()
    found = open_strategy(folder)
    assert (found.num_ranks, found.placements) == (4, raw.placements)
    (note,) = found.notes
    assert note.startswith("merged_ckpt_strategy.ckpt is ignored: in stage 0 it contradicts the r")
    assert open_strategy(folder / "merged_ckpt_strategy.ckpt").num_ranks == 8  # if it is named
    job = tmp_path / "job"
    shutil.copytree(golden("dp1mp4", "src_safetensors"), job)
    shutil.copytree(folder, job / "strategy")
    for number, words in enumerate(
        (
            ["strategy", "show", folder],
            ["strategy", "merge", folder, tmp_path / "merged.ckpt"],
            ["inspect", job],
            ["plan", job, "--to", "same"],
            ["convert", job, tmp_path / "whole"],
            ["convert", tmp_path / "whole", tmp_path / "cut", "--to", folder],
        )
    ):
        assert main([str(word) for word in words]) == 0
        said = capsys.readouterr().out
        assert said.count("merged_ckpt_strategy.ckpt is ignored") == 1, number


def test_a_merged_file_supplies_the_stages_that_raw_files_lack(tmp_path: Path) -> None:
    folder = tmp_path / "strategy"
    folder.mkdir()
    for rank in range(4):  # of the first of two stages
        name = f"ckpt_strategy_rank_{rank}.ckpt"
        shutil.copy(golden("dp2mp2pp2", "strategy", name), folder / name)
    shutil.copy(golden("dp2mp2pp2", "merged_strategy.ckpt"), folder / "merged_strategy.ckpt")
    assert open_strategy(folder) == open_strategy(golden("dp2mp2pp2", "strategy"))


def test_merged_files_alone_must_agree(tmp_path: Path) -> None:
    shutil.copy(golden("dp1mp4", "merged_strategy.ckpt"), tmp_path / "a.ckpt")
    old = golden("dp2mp2pp2", "targets", "dp4mp2_strategy.ckpt")
    shutil.copy(old, tmp_path / "b.ckpt")
    with pytest.raises(FormatError, match="contradict each other in stage 0"):
        open_strategy(tmp_path)


# --- make ----------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["model", ".", "model/../model"])
def test_a_strategy_never_replaces_its_checkpoint(
    out: str, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    shutil.copy(golden("dp2mp1", "full", "full.safetensors"), weights)
    for source in (tmp_path / "model", weights):
        command = ["strategy", "make", str(source), str(tmp_path / out), "--to", "mp2"]
        assert main([*command, "--overwrite"]) == 2
        assert "is the source, or holds it" in capsys.readouterr().err
    command = ["strategy", "make", str(weights), str(weights), "--to", "mp2", "--merged"]
    assert main([*command, "--overwrite"]) == 2
    assert js.open(weights).tensors
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    capsys.readouterr()


def test_a_strategy_never_replaces_another_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    source, other = golden("dp2mp1", "full", "full.safetensors"), tmp_path / "other"
    shutil.copytree(golden("dp1mp4", "src_ckpt"), other)
    before = ms.rank_weights_of(other)
    file = other / "rank_0" / "net_rank_0-1_10.ckpt"
    assert file.exists()
    for out, *flags in ((other,), (file, "--merged")):
        command = ["strategy", "make", str(source), str(out), "--to", "mp2", *flags]
        assert main([*command, "--overwrite"]) == 2
        assert "strategy files never replace" in capsys.readouterr().err
    assert ms.rank_weights_of(other) == before


def test_the_strategy_of_the_source_is_never_replaced(ranks: Path, capsys: Capture) -> None:
    own = ranks.parent / "strategy"
    for flags in ([], ["--src-strategy", str(own)]):
        command = ["strategy", "make", str(ranks), str(own), "--to", "mp2", *flags]
        assert main([*command, "--overwrite"]) == 2
        assert "is or contains the strategy of the source" in capsys.readouterr().err
    assert js.verify(ranks).problems == ()


def test_a_strategy_is_replaced_completely(tmp_path: Path, capsys: Capture) -> None:
    source, out = golden("dp2mp1", "full", "full.safetensors"), tmp_path / "out"
    shown(capsys, "make", source, out, "--to", "dp2mp2")
    command = ["strategy", "make", str(source), str(out)]
    assert main([*command, "--to", "mp2"]) == 2  # it exists
    shown(capsys, "make", source, out, "--to", "mp2", "--overwrite")
    assert sorted(p.name for p in out.iterdir()) == [f"ckpt_strategy_rank_{r}.ckpt" for r in (0, 1)]
    file = tmp_path / "file"
    file.write_text("mine")
    assert main(["strategy", "make", str(source), str(file), "--to", "mp2", "--overwrite"]) == 2
    assert file.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]  # and no partial files
    capsys.readouterr()


def test_a_merged_file_is_json_if_its_suffix_is_json(tmp_path: Path, capsys: Capture) -> None:
    source = golden("dp2mp1", "full", "full.safetensors")
    for name in ("made.json", "made.ckpt"):
        shown(capsys, "make", source, tmp_path / name, "--to", "dp2mp2", "--merged")
    assert json.loads((tmp_path / "made.json").read_text())["parallel_layout_item"]
    assert open_strategy(tmp_path / "made.json") == open_strategy(tmp_path / "made.ckpt")


def test_a_layout_file_of_jaxshard_is_shown_too(tmp_path: Path, capsys: Capture) -> None:
    split = Placement((("mp", 2),), (("mp",), ()), 2)  # on half of the stage
    layout = Layout(
        4, {"experts.0.w": (split,), "experts.1.w": (split,), "norm": (Placement((("all", 4),)),)}
    )
    (tmp_path / "layout.json").write_bytes(
        strategy_layouts.layout_file_bytes(layout, layout.placements)
    )
    for path in (tmp_path, tmp_path / "layout.json"):
        text = shown(capsys, "show", path)
        assert "2  experts.#.w  [mp,-] over mp2 from rank 2" in text
        assert "experts.0.w" in shown(capsys, "show", path, "--all")
        told = json.loads(shown(capsys, "show", path, "--json", "--include", "^norm"))
        assert (told["num_ranks"], [t["name"] for t in told["tensors"]]) == (4, ["norm"])
        assert main(["strategy", "merge", str(path), str(tmp_path / "o.ckpt")]) == 2
        assert "there is nothing to merge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("strategy", "theirs"),
    [
        ("dp2mp2pp2", ("dp2mp2pp2", "strategy")),
        ("dp1mp4", ("dp2mp2pp2", "targets", "dp1mp4_strategy.ckpt")),
        ("dp4mp2", ("dp2mp2pp2", "targets", "dp4mp2_strategy.ckpt")),
        ("dp4mp2opt2", ("dp2mp2pp2", "targets", "dp4mp2_opt2_strategy.ckpt")),
    ],
)
@pytest.mark.parametrize("merged_file", [False, True])
def test_generated_strategies_match_those_of_a_real_job(
    strategy: str, theirs: tuple[str, ...], merged_file: bool, tmp_path: Path, capsys: Capture
) -> None:
    source = golden("dp2mp2pp2", "full", "full.safetensors")
    flags = ["--merged"] if merged_file else []
    shown(capsys, "make", source, tmp_path / "made", "--to", strategy, *flags)
    ours, real = open_strategy(tmp_path / "made"), open_strategy(golden(*theirs))
    assert ours.num_ranks == real.num_ranks
    shapes = {
        t.name: t.shape for t in js.open(source).tensors.values() if t.name in real.placements
    }
    assert len(shapes) > 80
    for name, shape in shapes.items():
        for rank in range(real.num_ranks):
            assert ours.box_of(name, shape, rank) == real.box_of(name, shape, rank), name


def test_ranks_written_for_a_generated_strategy_open_with_it(
    tmp_path: Path, capsys: Capture
) -> None:
    source = golden("dp2mp2pp2", "full", "full.safetensors")
    shown(capsys, "make", source, tmp_path / "dst", "--to", "dp1mp2pp2")
    js.convert(source, tmp_path / "o", tmp_path / "dst", **QUICK)
    assert js.verify(tmp_path / "o", source).problems == ()


def test_the_embedding_may_be_replicated_over_mp(tmp_path: Path, capsys: Capture) -> None:
    """MindFormers' ``vocab_emb_dp``; golden jobs disable it."""
    source = golden("dp2mp2pp2", "full", "full.safetensors")
    name = "model.tok_embeddings.embedding_weight"
    shape = js.open(source)[name].shape
    for text, ways in (("dp2mp2", 2), ("dp2mp2vocabdp", 1)):
        shown(capsys, "make", source, tmp_path / text, "--to", text)
        (placement,) = open_strategy(tmp_path / text).placements[name]
        assert placement.local_shape(shape)[0] == shape[0] // ways
        js.slice(source, tmp_path / f"cut_{text}", text, **QUICK)
        (path,) = (tmp_path / f"cut_{text}" / "rank_1").iterdir()
        held = safetensors.numpy.load_file(path)
        assert held[name].shape[0] == shape[0] // ways
    assert str(js.Strategy.parse("mp2vocabdpdp4")) == "dp4mp2vocabdp"
    with pytest.raises(LayoutError, match="is not a strategy"):
        js.Strategy.parse("mp2vocabdpvocabdp")
