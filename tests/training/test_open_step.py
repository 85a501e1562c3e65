"""Runs that MindFormers saved: found, told apart and restored, whatever they look like."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from training_states import mesh

from jaxshard.core.layout import Layout, Placement
from jaxshard.errors import LayoutError
from jaxshard.training import CheckpointManager
from jaxshard.training.run_directory import RunDirectory
from jaxshard.training.steps import find_steps

KINDS = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16, "I32": np.int32}


def _manager(directory: Path, prefix: str = "llama") -> CheckpointManager:
    return CheckpointManager(directory, prefix=prefix, fsync=False)


def _golden_run(directory: Path, layout: str, source: str) -> Path:
    shutil.copytree(golden_files.golden(layout, source), directory / "checkpoint")
    shutil.copytree(golden_files.golden(layout, "strategy"), directory / "strategy")
    return directory


def _check_golden(directory: Path, layout: str, *, weights_only: bool) -> None:
    told = {
        name: tensor
        for name, tensor in golden_files.manifest(layout)["tensors"].items()
        if tensor["dtype"] in KINDS and tensor["shape"]
        if not weights_only or not name.startswith(("adam_", "accu_grads."))
    }
    on = NamedSharding(mesh(2, 4), P())
    target = {
        name: jax.ShapeDtypeStruct(tuple(t["shape"]), KINDS[t["dtype"]], sharding=on)
        for name, t in told.items()
    }
    found = _manager(directory).restore(target, strict=False)
    assert found.step == 10
    assert found.state
    for name, array in found.state.items():
        digest = hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
        assert digest == told[name]["sha256"], name


# MindSpore's own removal of redundancy loses parts of this one; the set beside it is right
RIGHT = {("dp2cp2mp2_2axis", "src_safetensors_dedup"): "src_safetensors_dedup_right"}


@pytest.mark.parametrize("source", ["src_safetensors", "src_safetensors_dedup", "src_ckpt"])
@pytest.mark.parametrize("layout", golden_files.LAYOUTS)
def test_every_layout_of_mindspores_rank_files_is_restored(tmp_path, layout, source):
    run = _golden_run(tmp_path, layout, RIGHT.get((layout, source), source))
    _check_golden(run, layout, weights_only=source == "src_ckpt")  # not all have more


def test_a_run_of_mindformers_default_files_is_listed(tmp_path):
    run = _golden_run(tmp_path, "dp4mp2_opt2", "src_ckpt")
    (step,) = _manager(run).steps()
    assert (str(step.name), step.state, step.format, len(step.paths)) == (
        "1_10",
        "complete",
        "ranks",
        8,
    )
    assert step.prefix == "net"


# --- damage, where there is no record ------------------------------------------------------------


def _with_a_second_step(directory: Path, source: str) -> Path:
    run = _golden_run(directory, "dp4mp2_opt2", source)
    for path in sorted((run / "checkpoint").glob("rank_*/*-1_10.*")):
        shutil.copyfile(path, path.with_name(path.name.replace("-1_10.", "-1_20.")))
    return run


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _garbled(data: bytes) -> bytes:
    return b"\xff" * 64 + data[64:]


@pytest.mark.parametrize("damage", [_cut, _garbled, lambda data: b""])
@pytest.mark.parametrize("source", ["src_safetensors", "src_ckpt"])
def test_a_damaged_file_leads_to_the_step_before(tmp_path, source, damage, caplog):
    run = _with_a_second_step(tmp_path, source)
    (path,) = (run / "checkpoint/rank_5").glob("*-1_20.*")
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        found = _manager(run).restore({}, strict=False)
    assert (found.name.step, found.passed_over[0][0]) == (10, "1_20")
    assert path.name in found.passed_over[0][1]
    assert "step 1_20 is passed over" in caplog.text
    path.write_bytes(next((run / "checkpoint/rank_5").glob("*-1_10.*")).read_bytes())
    assert _manager(run).restore({}, strict=False).name.step == 20  # the twin


# --- several jobs in one folder ------------------------------------------------------------------


def _rank_file(directory: Path, name: str, rank: int = 0, **numbers: int) -> None:
    """A rank's file as MindFormers has it, of one small weight."""
    path = directory / f"checkpoint/rank_{rank}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"w": np.arange(4.0, dtype=np.float32) + sum(map(ord, name))}
    data |= {n: np.array(v, np.int64) for n, v in numbers.items()}
    safetensors.numpy.save_file(data, path, {"format": "ms"})


def _run_of(directory: Path, *names: str) -> Path:
    shutil.copytree(golden_files.golden("dp2mp1", "strategy"), directory / "strategy")
    for name in names:
        _rank_file(directory, name)
    return directory


def _is_of(found: Any, name: str) -> bool:
    return found.state["w"][0] == sum(map(ord, name))


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank that holds everything: no strategy files are needed."""
    layout = Layout(1, {"w": (Placement((("all", 1),)),)})
    monkeypatch.setattr("jaxshard.training.open_step.open_strategy", lambda place: layout)


TARGET = {"w": np.zeros(4, np.float32)}
OF_A = [f"a_rank_0-1_{n}.safetensors" for n in (10, 20)]
OF_B = "b_rank_0-1_30.safetensors"


@pytest.mark.usefixtures("whole")
def test_two_jobs_files_are_not_mixed_and_each_gets_its_own(tmp_path):
    run = _run_of(tmp_path, *OF_A, OF_B)
    assert _is_of(_manager(run, "a").restore(TARGET), OF_A[1])
    assert _manager(run, "a").latest_step() == 20
    assert _is_of(_manager(run, "b").restore(TARGET), OF_B)
    with pytest.raises(LayoutError, match=r"prefix='llama': .* steps of 2 other jobs \(a, b\)"):
        _manager(run).restore(TARGET)


@pytest.mark.usefixtures("whole")
def test_the_only_job_there_is_need_not_be_named(tmp_path):
    assert _is_of(_manager(_run_of(tmp_path, *OF_A)).restore(TARGET), OF_A[1])


def test_a_step_is_whole_with_the_ranks_of_its_own_job(tmp_path):
    for rank in range(2):
        _rank_file(tmp_path, f"a_rank_{rank}-1_10.safetensors", rank)
    _rank_file(tmp_path, "b_rank_0-1_10.safetensors")
    found = {s.prefix: (s.state, len(s.paths)) for s in find_steps(RunDirectory.of(tmp_path))}
    assert found == {"a": ("complete", 2), "b": ("complete", 1)}
    _rank_file(tmp_path, "a_rank_0-1_20.safetensors")
    newest = find_steps(RunDirectory.of(tmp_path))[-1]
    assert (newest.state, newest.reason) == ("incomplete", "rank 1 has no file")


@pytest.mark.usefixtures("whole")
def test_of_one_name_the_later_task_is_the_newer(tmp_path):
    names = [f"a_rank_0{task}-1_10.safetensors" for task in ("", "_1", "_2", "_10")]
    run = _run_of(tmp_path, *names)
    assert [s.task for s in find_steps(RunDirectory.of(run))] == [0, 1, 2, 10]
    assert _is_of(_manager(run).restore(TARGET), names[-1])


def test_another_jobs_step_of_the_same_name_is_not_replaced(tmp_path):
    ours = _manager(tmp_path, "a")
    ours.save(10, TARGET)
    with pytest.raises(LayoutError, match="step 1_10 of the job 'a'"):
        _manager(tmp_path, "b").save(10, TARGET)
    _manager(tmp_path, "b").save(20, TARGET)
    assert _manager(tmp_path, "a").restore(TARGET).step == 10
    assert _manager(tmp_path, "b").restore(TARGET).step == 20
    assert not any(
        step.abandoned for step in find_steps(RunDirectory.of(tmp_path))
    )  # by the other job


# --- which step is meant -------------------------------------------------------------------------


@pytest.mark.usefixtures("whole")
def test_a_number_is_of_the_whole_run_also_where_names_count_in_epochs(tmp_path):
    run = _run_of(tmp_path)
    for name, number in (("1_5", 5), ("1_10", 10), ("2_5", 15)):
        _rank_file(run, f"a_rank_0-{name}.safetensors", step_num=number)
    manager = _manager(run)
    for wish, name in ((5, "1_5"), (15, "2_5"), ("2_5", "2_5")):
        found = manager.restore(TARGET, step=wish, strict=False)
        assert (str(found.name), found.step) == (name, {"1_5": 5, "2_5": 15}[name])


@pytest.mark.usefixtures("whole")
def test_a_number_that_may_be_two_steps_is_refused(tmp_path):
    run = _run_of(tmp_path, "a_rank_0-1_5.safetensors", "a_rank_0-2_5.safetensors")
    with pytest.raises(LayoutError, match="step 5 is ambiguous: 1_5 or 2_5"):
        _manager(run).restore(TARGET, step=5)
    assert str(_manager(run).restore(TARGET, step="1_5").name) == "1_5"


# --- ours and theirs -----------------------------------------------------------------------------


@pytest.mark.usefixtures("whole")
def test_a_run_goes_on_from_what_mindformers_saved(tmp_path, caplog):
    run = _run_of(tmp_path, *OF_A)
    manager = _manager(run, "a")
    assert manager.restore(TARGET).step == 20
    manager.save(30, TARGET)
    assert [str(s.name) for s in manager.steps()] == ["1_10", "1_20", "1_30"]
    assert _manager(run, "a").restore(TARGET).step == 30
    with caplog.at_level(logging.WARNING):
        manager.restore(TARGET, step=20)
    assert "step 1_20: it has no record" in caplog.text


def test_a_step_whose_record_was_lost_is_restored_and_that_is_said(tmp_path, caplog):
    manager = _manager(tmp_path)
    manager.save(1, {"params": TARGET}, extras={"at": 1})
    (tmp_path / ".jaxshard/1_1.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = manager.restore({"params": TARGET}, strict=False)
    assert found.extras == {}
    assert "step 1_1: it has no record" in caplog.text
    assert "restored without extras" in caplog.text


def test_a_lost_record_does_not_bring_back_what_was_left_behind(tmp_path):
    manager = _manager(tmp_path)
    for step in (10, 20, 30):
        manager.save(step, {"params": TARGET})
    manager.restore({"params": TARGET}, step=20)
    manager.save(21, {"params": TARGET})
    path = tmp_path / "checkpoint/rank_0/llama_rank_0-1_30.safetensors"
    os.utime(path, (1e9, 1e9))  # as old as it would be if the later save had taken its time
    (tmp_path / ".jaxshard/1_30.json").unlink()
    assert manager.restore({"params": TARGET}).step == 21


def test_what_a_format_has_to_say_of_a_step_is_said(tmp_path, caplog):
    run = _golden_run(tmp_path, "dp4mp2_opt2", "src_safetensors")
    for path in (run / "checkpoint/rank_7").iterdir():
        path.unlink()
    (run / "checkpoint/rank_7").rmdir()
    with caplog.at_level(logging.WARNING):
        _manager(run).restore({}, strict=False)
    assert "no files of rank 7" in caplog.text
