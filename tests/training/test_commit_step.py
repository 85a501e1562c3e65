"""What a save may replace: its own run's steps, and nothing that another job put there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import safetensors.numpy

from jaxshard.errors import JaxshardError, LayoutError, StorageError
from jaxshard.training import CheckpointManager, commit_step, save_step
from jaxshard.training.records import StepName

FOLDERS = {"iteration": "iteration_00000010", "huggingface": "net-1_10", "orbax": "net-1_10"}


def _state(value: float) -> dict[str, Any]:
    return {"params": {"w": np.full(8, value, np.float32)}}


def _manager(directory: Path, **how: Any) -> CheckpointManager:
    options = {"prefix": "net", "fsync": False, "workers": 1, "keep_max": 0} | how
    return CheckpointManager(directory, **options)


def _save_and_wait(manager: CheckpointManager, step: int, value: float) -> None:
    manager.save(step, _state(value))
    manager.wait()


def _value(directory: Path, step: Any = None, **how: Any) -> float:
    found = _manager(directory, **how).restore(_state(0), step=step, verify=True)
    return float(found.state["params"]["w"][0])


def _held(directory: Path, name: str) -> float:
    path = directory / f"checkpoint/rank_0/{name}.safetensors"
    return float(safetensors.numpy.load_file(path)["w"][0])


def _rank_file(directory: Path, name: str, folder: str = "checkpoint") -> Path:
    """A rank's file as MindSpore leaves it, without any record."""
    path = directory / folder / "rank_0" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({"w": np.full(8, -7, np.float32)}, path, {"format": "ms"})
    return path


# --- rank files: both are kept -------------------------------------------------------------------


def test_a_second_job_of_the_same_prefix_keeps_both_as_mindspore_does(tmp_path, caplog):
    _manager(tmp_path).save(10, _state(1))
    second = _manager(tmp_path)
    second.save(10, _state(2))
    assert "net_rank_0_1-1_10.safetensors" in caplog.text  # and it is logged
    second.save(10, _state(3))  # its own step is replaced
    second.save(20, _state(4))
    third = _manager(tmp_path)
    third.save(20, _state(5))  # a name that the first job never had
    third.save(10, _state(6))
    names = sorted(p.stem for p in (tmp_path / "checkpoint/rank_0").glob("*.safetensors"))
    assert {name: _held(tmp_path, name) for name in names} == {
        "net_rank_0-1_10": 1,
        "net_rank_0_1-1_10": 3,
        "net_rank_0_1-1_20": 4,
        "net_rank_0-1_20": 5,
        "net_rank_0_2-1_10": 6,
    }
    assert _value(tmp_path) == 6  # the last that was saved
    assert _value(tmp_path, 10) == 6
    assert _value(tmp_path, "1_10") == 1
    assert _value(tmp_path, "_1-1_10") == 3
    assert _value(tmp_path, "net_rank_0_1-1_20") == 4
    meta = json.loads((tmp_path / "checkpoint/rank_0/meta.json").read_text())
    assert meta["last_ckpt_file"] == "net_rank_0_2-1_10.safetensors"
    assert {str(s.name): s.state for s in third.steps(deep=True)} == dict.fromkeys(
        ("1_10", "_1-1_10", "_1-1_20", "1_20", "_2-1_10"), "complete"
    )


@pytest.mark.parametrize(
    ("there", "ours"),
    [
        (["net_rank_0-1_10"], "net_rank_0_1-1_10"),
        (["net_rank_0-1_10", "net_rank_0_1-1_10", "net_rank_0_2-1_5"], "net_rank_0_3-1_10"),
        (["other_rank_0-1_10", "net_rank_0-1_20"], "net_rank_0-1_10"),  # in nobody's way
    ],
)
def test_rank_files_that_have_no_record_are_kept(tmp_path, there, ours):
    foreign = [_rank_file(tmp_path, f"{name}.safetensors") for name in there]
    before = [path.read_bytes() for path in foreign]
    manager = _manager(tmp_path)
    manager.save(10, _state(1))
    assert [path.read_bytes() for path in foreign] == before
    assert _held(tmp_path, ours) == 1
    manager.save(10, _state(2))
    assert _held(tmp_path, ours) == 2


def test_a_rank_file_of_a_further_copy_is_kept_as_well(tmp_path):
    path = _rank_file(tmp_path, "net_rank_0-network-1_10.safetensors", "checkpoint_network")
    before = path.read_bytes()
    _manager(tmp_path, save_network_only=True).save(10, _state(1))
    assert path.read_bytes() == before
    assert path.with_name("net_rank_0_1-network-1_10.safetensors").exists()
    assert _held(tmp_path, "net_rank_0_1-1_10") == 1


def test_a_step_whose_record_was_lost_is_kept(tmp_path):
    _manager(tmp_path).save(10, _state(1))
    (tmp_path / ".jaxshard/1_10.json").unlink()
    _manager(tmp_path).save(10, _state(2))
    assert (_held(tmp_path, "net_rank_0-1_10"), _held(tmp_path, "net_rank_0_1-1_10")) == (1, 2)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_restored_run_replaces_its_own_steps_also_those_that_it_went_back_from(
    tmp_path, asynchronous
):
    with _manager(tmp_path, async_save=asynchronous) as first:
        for step in (10, 20, 30):
            first.save(step, _state(step))
    with _manager(tmp_path, async_save=asynchronous) as again:
        again.restore(_state(0), step=10)
        for step in (20, 30):
            again.save(step, _state(100 + step))
    names = sorted(p.stem for p in (tmp_path / "checkpoint/rank_0").glob("*.safetensors"))
    assert names == [f"net_rank_0-1_{step}" for step in (10, 20, 30)]
    assert _value(tmp_path) == 130


def test_a_restored_run_keeps_the_number_of_its_job(tmp_path):
    _manager(tmp_path).save(10, _state(1))
    _manager(tmp_path).save(10, _state(2))
    again = _manager(tmp_path)
    assert again.restore(_state(0)).name == StepName(1, 10, task=1)
    again.save(10, _state(3))
    again.save(20, _state(4))
    assert (_held(tmp_path, "net_rank_0_1-1_10"), _held(tmp_path, "net_rank_0_1-1_20")) == (3, 4)
    assert _held(tmp_path, "net_rank_0-1_10") == 1


def test_retention_of_one_job_does_not_remove_what_another_one_saved(tmp_path):
    first = _manager(tmp_path)
    for step in (10, 20):
        first.save(step, _state(step))
    second = _manager(tmp_path, keep_max=1)
    for step in (10, 20, 30):
        second.save(step, _state(100 + step))
    assert {str(s.name) for s in second.steps()} == {"1_10", "1_20", "_1-1_30"}
    assert _value(tmp_path) == 130


def test_a_job_of_several_tasks_is_killed_and_recovered_by_its_own_names(tmp_path, monkeypatch):
    _manager(tmp_path).save(10, _state(1))
    with monkeypatch.context() as patched:
        patched.setattr(commit_step, "_put_in_place", _stop)
        with pytest.raises(KeyboardInterrupt):
            _manager(tmp_path).save(10, _state(2))
    assert (tmp_path / ".jaxshard/_1-1_10.moving").exists()
    assert _value(tmp_path) == 2
    assert _held(tmp_path, "net_rank_0-1_10") == 1


def _stop(*given: Any, **how: Any) -> None:
    raise KeyboardInterrupt


# --- folders: an error, unless overwriting was requested -----------------------------------------


def _foreign_folder(directory: Path, format: str) -> Path:
    path = directory / "checkpoint" / FOLDERS[format] / "notes.txt"
    path.parent.mkdir(parents=True)
    path.write_text("my work")
    return path


def _listed(directory: Path) -> set[str]:
    paths = (p.relative_to(directory).as_posix() for p in directory.rglob("*"))
    return {path for path in paths if path not in (".jaxshard", ".jaxshard/lock")}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("format", FOLDERS)
def test_a_folder_that_no_record_is_about_is_not_replaced_unasked(tmp_path, format, asynchronous):
    path = _foreign_folder(tmp_path, format)
    before = _listed(tmp_path)
    manager = _manager(tmp_path, format=format, async_save=asynchronous)
    with pytest.raises(LayoutError, match=rf"{FOLDERS[format]}.*no record.*overwrite=True"):
        _save_and_wait(manager, 10, 1)
    assert path.read_text() == "my work"
    assert _listed(tmp_path) == before
    manager.save(10, _state(2), overwrite=True)
    manager.save(10, _state(3))  # a step of its own by now
    manager.close()
    assert not path.exists()
    assert _value(tmp_path, format=format) == 3


def test_rank_files_are_replaced_where_that_was_requested(tmp_path):
    _rank_file(tmp_path, "net_rank_0-1_10.safetensors")
    _manager(tmp_path).save(10, _state(1), overwrite=True)
    assert _held(tmp_path, "net_rank_0-1_10") == 1
    assert _value(tmp_path) == 1


@pytest.mark.parametrize("format", ["huggingface", "orbax"])
def test_a_second_job_of_the_same_prefix_keeps_both_folders(tmp_path, format, caplog):
    _manager(tmp_path, format=format).save(10, _state(1))
    second = _manager(tmp_path, format=format, save_network_only=True)
    second.save(10, _state(2))
    assert "this job's is called net-_1-1_10" in caplog.text
    second.save(10, _state(3))  # its own step is replaced
    second.save(20, _state(4))
    _manager(tmp_path, format=format).save(10, _state(5))
    folders = sorted(p.name for p in (tmp_path / "checkpoint").iterdir())
    assert folders == ["net-1_10", "net-_1-1_10", "net-_1-1_20", "net-_2-1_10"]
    copies = sorted(p.name for p in (tmp_path / "checkpoint_network").iterdir())
    if format == "huggingface":
        assert copies == ["net-network-_1-1_10", "net-network-_1-1_20"]
    named = {"1_10": 1, "net-_1-1_10": 3, "_1-1_20": 4, "_2-1_10": 5}
    assert {step: _value(tmp_path, step, format=format) for step in named} == named
    assert _value(tmp_path, format=format) == 5  # the last that was saved
    caplog.clear()
    again = _manager(tmp_path, format=format)
    assert again.restore(_state(0)).name == StepName(1, 10, task=2)
    again.save(10, _state(6))  # the restored run's own step is replaced
    assert "Both are kept" not in caplog.text
    assert _value(tmp_path, format=format) == 6


def test_a_checkpoint_2_0_folder_of_another_job_is_kept_by_an_error(tmp_path):
    _manager(tmp_path, format="iteration").save(10, _state(1))
    second = _manager(tmp_path, format="iteration")
    with pytest.raises(LayoutError, match=r"neither saved nor restored\. Restore a step first"):
        second.save(10, _state(2))
    assert _value(tmp_path, format="iteration") == 1
    second.restore(_state(0))
    second.save(10, _state(3))
    assert _value(tmp_path, format="iteration") == 3


# --- what appears while a step is saved ----------------------------------------------------------


@pytest.mark.parametrize("format", ["ranks", *FOLDERS])
def test_what_appears_while_a_step_is_written_is_not_replaced(tmp_path, monkeypatch, format):
    manager = _manager(tmp_path, format=format)
    manager.save(5, _state(5))
    written, made = save_step._write_step, []

    def then_it_appears(job: Any) -> Any:
        record = written(job)
        if format == "ranks":
            made.append(_rank_file(tmp_path, "net_rank_0-1_10.safetensors"))
        else:
            made.append(_foreign_folder(tmp_path, format))
        return record

    monkeypatch.setattr(save_step, "_write_step", then_it_appears)
    with pytest.raises(LayoutError, match="no record"):
        manager.save(10, _state(1))
    assert made[0].exists()
    assert _value(tmp_path, format=format) == 5
    assert [p.name for p in (tmp_path / ".jaxshard").glob("*1_10*")] == []


@pytest.mark.parametrize("format", ["ranks", *FOLDERS])
def test_what_appears_as_a_step_is_put_in_place_stays_and_the_step_follows_once_it_is_gone(
    tmp_path, monkeypatch, format
):
    manager = _manager(tmp_path, format=format, on_storage_error="raise")
    manager.save(5, _state(5))
    replaced, made = commit_step.replace_file, []

    def then_it_appears(path: Path, data: bytes, **how: Any) -> None:
        replaced(path, data, **how)
        if format == "ranks":
            made.append(_rank_file(tmp_path, "net_rank_0-1_10.safetensors"))
        else:
            made.append(_foreign_folder(tmp_path, format))

    with monkeypatch.context() as patched:
        patched.setattr(commit_step, "replace_file", then_it_appears)
        with pytest.raises(StorageError, match=r"another job's\. Move that away"):
            manager.save(10, _state(10))
    before = made[0].read_bytes()
    assert _value(tmp_path, format=format) == 5
    manager.save(20, _state(20))  # other steps are saved as before
    assert _value(tmp_path, format=format) == 20
    assert made[0].read_bytes() == before
    made[0].unlink()
    if format != "ranks":
        made[0].parent.rmdir()
    assert _value(tmp_path, 10, format=format) == 10


def test_an_old_record_that_does_not_say_what_it_replaces_is_put_in_place(tmp_path):
    """Of a version that replaced whatever had the step's name."""
    manager = _manager(tmp_path)
    manager.save(10, _state(1))
    own = tmp_path / ".jaxshard"
    line = json.loads((own / "1_10.json").read_bytes().split(b"\n")[0])
    del line["replaces"]
    data = json.dumps(line).encode()
    (own / "1_10.moving").write_bytes(data + b"\n%08x\n" % crc32(data))
    (own / "1_10.json").unlink()
    assert _value(tmp_path) == 1


@pytest.mark.parametrize("prefix", ["net_1", "net-1_10", "net_rank_0"])
def test_prefixes_that_look_like_numbers_of_jobs_are_jobs_of_their_own(tmp_path, prefix):
    _manager(tmp_path).save(5, _state(1))
    other = _manager(tmp_path, prefix=prefix)
    try:
        other.save(10, _state(2))
    except JaxshardError:
        pytest.fail("another prefix was taken for a step of this job")
    assert _held(tmp_path, "net_rank_0-1_5") == 1
