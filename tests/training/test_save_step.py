"""Checkpoints of a training loop that runs in several processes: one step, whole, or none."""

from __future__ import annotations

import shutil
import signal
from functools import partial

import multiprocess_training as work
import pytest
from processes import answers, run_processes
from test_multiprocess_convert import assert_same


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What two processes of four devices were told, and where they saved."""
    out = tmp_path_factory.mktemp("runs")
    return answers(run_processes("multiprocess_training:save", 2, 4, str(out), fresh=True)), out


@pytest.mark.parametrize("form", work.FORMATS)
def test_a_step_is_what_one_process_saves(saved, tmp_path, form):
    """Bit for bit: weights, moments, the key, what is on one device of each, and on the host."""
    alone = work.manager_of(tmp_path, format=form, save_network_only=True)
    for step in (1, 2):
        alone.save(step, work.state_of(step, 2, 4), extras={"at": step})
    for folder in ("checkpoint", "checkpoint_network"):
        assert_same(saved[1] / form / folder, tmp_path / folder)


def test_each_process_writes_about_half(saved):
    for form in work.FORMATS:
        one, other = (answer["written"][form] for answer in saved[0])
        assert abs(one - other) < 0.1 * (one + other), form


def test_by_time_all_save_when_process_0_says_so(saved):
    assert [answer["due"] for answer in saved[0]] == [[True, True]] * 2
    assert [answer["durable"] for answer in saved[0]] == ["done"] * 2


def test_after_a_failure_and_after_going_back_all_processes_save_the_same_steps_again(saved):
    for answer in saved[0]:
        # saved; failed; gone back by itself; failed again; then due, and once only
        assert answer["due again"] == [True, True, True, True, False, False, True, False]


def test_of_two_jobs_of_one_prefix_both_steps_are_kept(saved):
    for rank in range(8):
        names = [p.name for p in (saved[1] / f"twice/checkpoint/rank_{rank}").glob("net*")]
        assert sorted(names) == [
            f"net_rank_{rank}-1_1.safetensors",
            f"net_rank_{rank}_1-1_1.safetensors",
        ]


def test_what_one_process_cannot_save_all_hear_of_at_once(saved):
    first, last = (answer["refused"] for answer in saved[0])
    assert "process 1: LayoutError: extras['x']" in first["bad_extras"][1]
    assert last["bad_extras"][0] == "LayoutError"
    assert "process 1: OSError: [Errno 28] No space left" in first["full_disk"][1]
    assert "another writer is at work" in first["locked"][1]
    assert "process 0 failed: StorageError: another writer is at work" in last["locked"][1]
    assert first["no_record"][0] == "OSError"
    assert "committing: process 0 failed: OSError" in last["no_record"][1]
    for refused in (first, last):
        assert "written by one process only" in refused["orbax"][1]
        assert max(seconds for _, _, seconds in refused.values()) < 30  # of 60
    assert not [p for p in saved[1].rglob("*") if ".saving" in p.name]


@pytest.fixture(scope="module")
def restored(saved):
    """What four processes of two devices found there."""
    return answers(run_processes("multiprocess_training:restore", 4, 2, str(saved[1])))


def test_other_processes_restore_it_onto_other_layouts(restored):
    for answer in restored:
        for form in work.FORMATS:
            assert answer[form] == [2, {"at": 2}, True]
            assert answer[f"{form} by name"] == [1, {"at": 1}, True]
        assert answer["by strategy"] == [2, {"at": 2}, True]
        assert answer["nothing"] is None


def test_in_the_background_two_runs_keep_their_newest_steps(restored):
    for answer in restored:
        for n in range(2):
            assert answer[f"async {n}"] == [5, {"at": 5}, True]
            assert answer[f"kept {n}"] == [4, 5]


def test_one_process_restores_what_several_saved(saved):
    found = work.manager_of(saved[1] / "iteration").restore(work.state_of(0, 1, 1), verify=True)
    assert found.step == 2
    assert work.is_state_of(found.state, 2, 1, 1)


def test_a_step_that_one_process_finds_damaged_all_pass_over(saved, tmp_path):
    shutil.copytree(saved[1] / "ranks", tmp_path / "ranks")
    path = tmp_path / "ranks/checkpoint/rank_7/net_rank_7-1_2.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = answers(run_processes("multiprocess_training:damaged", 2, 2, str(tmp_path)))
    for step, right, passed_over, (kind, said, _) in found:
        assert (step, right) == (1, True)
        assert [name for name, _ in passed_over] == ["1_2"]
        assert "rank_7" in passed_over[0][1]
        assert kind in ("FormatError", "CoverageError")
        assert "rank_7" in said


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """For each way to die in a save, how the processes ended, and the run's folder."""
    found = {}
    for who, phase, in_background in (
        (1, "write", True),
        (1, "sum", False),
        (0, "lay out", False),
        (0, "record", True),
        (0, "commit", False),
    ):
        out = tmp_path_factory.mktemp(f"killed-{who}-{phase}")
        job = partial(run_processes, "multiprocess_training:killed", 2, 2)
        found[who, phase] = (job(str(out), who, phase, in_background), out)
    return found


def test_a_process_killed_in_a_save_has_the_others_raise_in_time(killed):
    for (who, phase), (ended, _) in killed.items():
        assert ended[who].status == -signal.SIGKILL, phase
        if who == 1:
            kind, said, seconds = ended[0].answer
            assert kind == "StorageError"
            assert "1 of 2 processes did not arrive within 2 s: 1" in said
            assert seconds < 20
        else:  # JAX's coordinator has died with it, and JAX ends the others
            assert ended[1].status != 0 or ended[1].answer[0] == "StorageError", phase


def test_the_step_before_is_good_and_the_rerun_goes_on_from_it(killed):
    places = [str(out) for _, out in killed.values()]
    for answer in answers(run_processes("multiprocess_training:rerun", 2, 2, places)):
        for (who, phase), (step, right, went_on) in zip(killed, answer, strict=True):
            # what was on the disk when it was being put in place is put in place afterwards
            assert step == (2 if phase == "commit" else 1), (who, phase)
            assert right
            assert went_on
    for _, out in killed.values():
        assert not [p for p in out.rglob("*") if ".saving" in p.name]


def test_a_step_of_which_processes_see_different_ones_is_not_good(tmp_path):
    found = answers(run_processes("multiprocess_training:different_steps", 2, 4, str(tmp_path)))
    for (recorded, plain), step, passed in found:
        assert "sees another save of it" in recorded[1]
        assert plain[0] == "CoverageError"
        assert "hold 2 different contents: processes 0; processes 1" in plain[1]
        assert step == 1
        assert len(passed) == 1
