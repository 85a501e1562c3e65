"""Rank folders as people have them: several steps, missing ranks, replicas, numbers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
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
    STEP,
    Held,
    check_equal,
    held_by,
    merged,
    with_states,
    write_ranks,
    write_strategy,
)

import jaxshard as js
from jaxshard.cli import main
from jaxshard.core.layout import Layout, Placement
from jaxshard.errors import CoverageError, NotFoundError
from jaxshard.formats import rank_names

# --- which file of a rank ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "suffix", "wanted"),
    [
        (["net_rank_0-9_2", "net_rank_0-10_1"], None, "net_rank_0-10_1"),  # not by letters
        (["net_rank_0-1_9", "net_rank_0-1_10"], None, "net_rank_0-1_10"),
        (["net_rank_0-2_1", "net_rank_0-1_10"], None, "net_rank_0-2_1"),  # the epoch first
        (["net_rank_0_1-1_10", "net_rank_0-2_5"], None, "net_rank_0-2_5"),
        (["net_rank_0-1_10", "net_rank_0_2-1_10", "net_rank_0_1-1_10"], None, "net_rank_0_2-1_10"),
        (["net_rank_0-1_10", "net_rank_0_2-1_10"], "1_10", "net_rank_0-1_10"),
        (["net_rank_0-1_10", "net_rank_0_2-1_10"], "-1_10", "net_rank_0-1_10"),
        (["net_rank_0-1_10", "net_rank_0_2-1_10"], "_2-1_10", "net_rank_0_2-1_10"),
        (["net_rank_0-1_10", "net_rank_0-1_110"], "1_10", "net_rank_0-1_10"),
        (["net_rank_0-1_10", "net_rank_0-1_110"], "10", "net_rank_0-1_10"),
        (["net_rank_0-1_100", "net_rank_0-1_1100"], "_100", "net_rank_0-1_100"),
        (["llama2_7b_rank_0-1_10", "llama2_7b_rank_0-1_9"], None, "llama2_7b_rank_0-1_10"),
        (["llama-network-1_10", "llama-network-1_9"], None, "llama-network-1_10"),
        # mindspore saves weights alone, and what is trained, in folders of their own
        (
            ["llama_rank_0-network-1_9", "llama_rank_0-network-1_10"],
            None,
            "llama_rank_0-network-1_10",
        ),
        (
            ["llama_rank_0-trainable_params-1_10", "llama_rank_0-trainable_params-2_1"],
            None,
            "llama_rank_0-trainable_params-2_1",
        ),
        (
            ["llama_rank_0-network-1_10", "llama_rank_0_1-network-1_10"],
            None,
            "llama_rank_0_1-network-1_10",
        ),
        (["a_rank_0-1_10", "b_rank_0-1_10"], "a-1_10", "a_rank_0-1_10"),
        (["a_rank_0-1_10", "b_rank_0_2-1_10"], "b_2-1_10", "b_rank_0_2-1_10"),
        (["a_0", "b_0"], "b_", "b_0"),
        (["checkpoint_0"], None, "checkpoint_0"),
        (["net"], None, "net"),
    ],
)
def test_the_file_of_a_rank_is_chosen_by_numbers(
    files: list[str], suffix: str | None, wanted: str
) -> None:
    paths = [f"rank_0/{name}.safetensors" for name in files]
    for order in (paths, paths[::-1]):
        assert rank_names.choose(order, suffix).paths == {0: f"rank_0/{wanted}.safetensors"}


def test_a_step_that_a_rank_has_not_finished_is_passed_over(ranks: Path, tmp_path: Path) -> None:
    write_ranks(
        ranks,
        lambda r: {n: a + 1 for n, a in held_by(r).items()},
        "net_rank_{r}-1_20.safetensors",
        [0, 1, 3],
    )
    catalog = js.open(ranks)
    assert any("rank 0, 1, 3 has newer files" in note for note in catalog.notes)
    check_equal(merged(ranks, tmp_path / "o"), ARRAYS)


def test_another_step_is_taken_when_asked_for(ranks: Path, tmp_path: Path) -> None:
    newer = {n: a + 1 for n, a in ARRAYS.items()}
    write_ranks(ranks, lambda r: held_by(r, newer), "net_rank_{r}-1_20.safetensors")
    check_equal(merged(ranks, tmp_path / "new"), newer)
    check_equal(merged(ranks, tmp_path / "old", suffix="1_10"), ARRAYS)
    with pytest.raises(CoverageError, match="no step ending in 1_30 has a file in every one of"):
        js.open(ranks, suffix="1_30")


def test_files_that_names_do_not_tell_apart_are_refused(ranks: Path) -> None:
    write_ranks(ranks, name="other_rank_{r}-1_10.safetensors")
    with pytest.raises(CoverageError, match=r"rank_0 has both .*, of the same step") as error:
        js.open(ranks)
    (remedies,) = re.findall(r"\(--suffix\): (\S+) or (\S+)\.$", str(error.value))
    assert remedies == ("net-1_10", "other-1_10")
    for suffix in remedies:  # what is advised helps
        assert all(f"/{suffix[:3]}" in f.path for f in js.open(ranks, suffix=suffix).files)


@pytest.mark.parametrize("suffix", [".ckpt", "ckpt", "1_10.ckpt", "-1_10.ckpt", "net-1_10.ckpt"])
def test_files_of_two_kinds_are_told_apart_by_their_kind(
    suffix: str, ranks: Path, tmp_path: Path
) -> None:
    newer = {n: a + 1 for n, a in ARRAYS.items()}
    write_ranks(ranks, lambda r: held_by(r, newer), "net_rank_{r}-1_10.ckpt")
    write_ranks(ranks, lambda r: held_by(r, ARRAYS), "net_rank_{r}-1_9.ckpt")
    check_equal(merged(ranks, tmp_path / "ckpt", suffix=suffix), newer)
    other = suffix.replace("ckpt", "safetensors")
    check_equal(merged(ranks, tmp_path / "safetensors", suffix=other), ARRAYS)


def test_both_kinds_of_files_at_once_are_refused_unless_one_is_chosen(
    ranks: Path, tmp_path: Path
) -> None:
    write_ranks(ranks, name="net_rank_{r}-1_20.ckpt")
    with pytest.raises(CoverageError, match="expected one file type"):
        js.open(ranks)
    check_equal(merged(ranks, tmp_path / "o", suffix="1_20"), ARRAYS)


# --- redundancy, missing ranks, replicas ------------------------------------------------------


def kept_once(rank: int) -> Held:
    """Each shard on one rank only: wq on ranks 0 and 1, the others on 2 and 3."""
    names = {0: {"wq"}, 1: {"wq"}, 2: {"wo", "norm"}, 3: {"wo"}}[rank]
    return {n: a for n, a in held_by(rank).items() if n in names}


@pytest.mark.parametrize("said", ["True", "False", None])
@pytest.mark.parametrize("held", [held_by, kept_once])
def test_what_files_hold_decides_and_not_what_they_say_of_it(
    held: Callable[[int], Held], said: str | None, tmp_path: Path
) -> None:
    write_strategy(tmp_path / "strategy")
    told = {"remove_redundancy": said} if said else None
    source = write_ranks(tmp_path / "checkpoint", held, metadata=told)
    check_equal(merged(source, tmp_path / "o"), ARRAYS)
    js.convert(source, tmp_path / "cut", "same", **QUICK)
    js.convert(source, tmp_path / "once", "same", **QUICK, remove_redundancy=True)
    for out, redundancy in (("cut", "False"), ("once", "True")):
        paths = sorted((tmp_path / out).glob("rank_*/*.safetensors"))
        assert {ms.check_mindspore_reads(p)["remove_redundancy"] for p in paths} == {redundancy}
        check_equal(merged(tmp_path / out, tmp_path / f"{out}_o"), ARRAYS)


def test_each_shard_is_stored_once_when_asked(ranks: Path, tmp_path: Path) -> None:
    js.convert(ranks, tmp_path / "o", "same", **QUICK, remove_redundancy=True)
    sizes = [t[2] for held in ms.rank_weights_of(tmp_path / "o").values() for t in held.values()]
    assert sum(map(len, sizes)) == sum(a.nbytes for a in ARRAYS.values())


@pytest.mark.parametrize("gone", [0, 3])
def test_a_rank_is_not_missed_when_a_replica_has_its_bytes(
    ranks: Path, gone: int, tmp_path: Path
) -> None:
    shutil.rmtree(ranks / f"rank_{gone}")
    assert any(f"no files of rank {gone}" in note for note in js.open(ranks).notes)
    check_equal(merged(ranks, tmp_path / "o"), ARRAYS)


def test_any_one_rank_of_a_real_job_is_not_missed(tmp_path: Path) -> None:
    """MindSpore needs rank 5 of this one and not rank 2, by accident of its layout."""
    for gone in range(8):
        source = tmp_path / f"without_{gone}"
        shutil.copytree(golden("dp2mp2pp2", "src_safetensors"), source / "checkpoint")
        shutil.copytree(golden("dp2mp2pp2", "strategy"), source / "strategy")
        shutil.rmtree(source / "checkpoint" / f"rank_{gone}")
        js.merge(source / "checkpoint", source / "o", **QUICK)
        assert ms.hashed(ms.folder_weights(source / "o")) == ms.truth("dp2mp2pp2")


def test_a_missing_rank_without_a_replica_is_told_with_its_tensor(
    ranks: Path, tmp_path: Path
) -> None:
    for gone in (0, 2):
        shutil.rmtree(ranks / f"rank_{gone}")
    with pytest.raises(CoverageError, match=r"w[qo]: .* 48 elements, of which the source holds 24"):
        js.merge(ranks, tmp_path / "o", **QUICK)
    assert not (tmp_path / "o").exists()


def test_a_stage_that_is_missing_does_not_pass_for_half_a_model(tmp_path: Path) -> None:
    shutil.copytree(golden("dp2mp2pp2", "src_safetensors"), tmp_path / "checkpoint")
    shutil.copytree(golden("dp2mp2pp2", "strategy"), tmp_path / "strategy")
    for rank in range(4, 8):
        shutil.rmtree(tmp_path / "checkpoint" / f"rank_{rank}")
    with pytest.raises(CoverageError, match=r"22 weights .* no files \(rank 4, 5, 6, 7\): lm_head"):
        js.merge(tmp_path / "checkpoint", tmp_path / "o", **QUICK)


def test_replicas_that_differ_are_found_by_verify(
    ranks: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["verify", str(ranks)]) == 0
    wrong = {n: a + (n == "wo") for n, a in held_by(3).items()}
    write_ranks(ranks, lambda _: wrong, ranks=[3])
    assert main(["verify", str(ranks)]) == 3
    one, other = (f"rank_{r}/{STEP.format(r=r)}" for r in (1, 3))
    assert f"wo differs between {one} and {other}." in capsys.readouterr().out


def test_verifying_a_whole_run_says_that_replicas_are_not_compared(
    ranks: Path, capsys: pytest.CaptureFixture
) -> None:
    run = ranks.parent
    assert main(["verify", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"note: replicas are not compared; jaxshard verify {ranks} does that." in said
    wrong = {n: a + (n == "wo") for n, a in held_by(3).items()}
    write_ranks(ranks, lambda _: wrong, ranks=[3])
    assert main(["verify", str(ranks)]) == 3
    capsys.readouterr()


def test_numbers_that_differ_between_ranks_are_found_too(tmp_path: Path) -> None:
    write_strategy(tmp_path / "strategy")
    source = write_ranks(
        tmp_path / "c", lambda r: {**held_by(r), "global_step": np.array([r // 3], np.int32)}
    )
    assert [p.split()[0] for p in js.verify(source).problems] == ["global_step"]


# --- what goes along -----------------------------------------------------------------------


def test_numbers_of_the_job_are_carried_along_uncut(training: Path, tmp_path: Path) -> None:
    whole = merged(training, tmp_path / "o")
    check_equal({n: whole[n] for n in NUMBERS}, NUMBERS)
    assert (tmp_path / "o" / "hyper_param.safetensors").exists()
    js.convert(tmp_path / "o", tmp_path / "cut", LAYOUT, **QUICK, drop_prefix="adam_")
    for held in ms.rank_weights_of(tmp_path / "cut").values():
        assert held["loss_scale"] == ("F32", (), NUMBERS["loss_scale"].tobytes())
        assert held["global_step"] == ("I32", (1,), NUMBERS["global_step"].tobytes())


def test_states_are_cut_again_with_their_weights(training: Path, tmp_path: Path) -> None:
    one = Placement((("mp", 2),), (("mp",),))
    target = Layout(2, dict.fromkeys((*ARRAYS, *(f"adam_m.{n}" for n in ARRAYS)), (one,)))
    js.convert(training, tmp_path / "o", target, **QUICK)
    for rank, held in ms.rank_weights_of(tmp_path / "o").items():
        for name, array in ARRAYS.items():
            part = np.split(array, 2)[rank]
            assert held[name][2] == part.tobytes()
            assert held[f"adam_m.{name}"][2] == (part * 2).tobytes()


def test_accumulated_gradients_are_left_out_unless_kept(training: Path, tmp_path: Path) -> None:
    report = js.merge(training, tmp_path / "o", **QUICK)
    assert any("3 accumulated gradients" in note for note in report.notes)
    assert not any(n.startswith("accu_grads") for n in ms.folder_weights(tmp_path / "o"))
    report = js.merge(training, tmp_path / "kept", **QUICK, keep_accu_grads=True)
    assert not any("accumulated" in note for note in report.notes)
    kept = ms.folder_weights(tmp_path / "kept")
    assert kept["accu_grads.wq"][2] == (ARRAYS["wq"] * 3).tobytes()


def test_prefixes_are_dropped_and_a_prefix_of_nothing_is_said(
    training: Path, tmp_path: Path
) -> None:
    report = js.merge(training, tmp_path / "o", **QUICK, drop_prefix=["adam_", "adma_"])
    assert ms.folder_weights(tmp_path / "o").keys() == ARRAYS.keys() | NUMBERS.keys()
    note = "no tensor starts with adma_: drop_prefix= (--drop-prefix) adma_ has no effect."
    assert note in report.notes
    with pytest.raises(NotFoundError, match="all of them are excluded"):
        js.merge(training, tmp_path / "p", drop_prefix=["w", "n", "a", "g", "l"])


def test_the_same_is_asked_for_on_the_command_line(training: Path, tmp_path: Path) -> None:
    newer = {n: np.asarray(a + 1) for n, a in with_states(0).items()}
    write_ranks(training, lambda _: newer, "net_rank_{r}-1_20.safetensors")
    flags = "--suffix 1_10 --prefix net_ --drop-prefix adam_ --exclude ^wo --keep-accu-grads"
    out = tmp_path / "o"
    assert main(["convert", str(training), str(out), "--to", "same", *flags.split()]) == 0
    assert sorted(p.name for p in out.glob("rank_*/*")) == [
        f"net_rank_{r}-1_10.safetensors" for r in range(4)
    ]
    for rank, held in ms.rank_weights_of(out).items():
        kept = {n for n in with_states(rank) if not n.startswith(("adam_", "wo"))}
        assert held.keys() == kept
        assert any(n.startswith("accu_grads") for n in kept)
        assert held["wq"][2] == held_by(rank)["wq"].tobytes()  # of step 10, not 20
    assert main(["convert", str(training), str(tmp_path / "p"), "--to", "same"]) == 0
    (held, *_) = ms.rank_weights_of(tmp_path / "p").values()
    assert {n.split(".")[0] for n in held} == {"adam_m", *ARRAYS, *NUMBERS}


def test_a_note_tells_which_weights_and_states_are_in_no_file(training: Path) -> None:
    for rank in range(4):
        held = {n: a for n, a in with_states(rank).items() if n not in ("wq", "adam_m.wq")}
        write_ranks(training, lambda _, held=held: held, ranks=[rank])
    notes = " ".join(js.open(training).notes)
    assert "1 weights of the strategy are missing in the files: wq." in notes
    assert "1 optimizer states of the strategy are missing in the files: adam_m.wq." in notes


def test_a_tensor_of_no_strategy_is_kept_whichever_rank_has_it(tmp_path: Path) -> None:
    """MindSpore keeps only rank 0's and loses the others in silence."""
    write_strategy(tmp_path / "strategy")
    table = np.arange(4000, dtype=np.float32)
    source = write_ranks(
        tmp_path / "c", lambda r: {**held_by(r), **({"extra.table": table} if r == 3 else {})}
    )
    assert any("1 tensors are missing in the strategy" in note for note in js.open(source).notes)
    check_equal(merged(source, tmp_path / "o"), {**ARRAYS, "extra.table": table})
