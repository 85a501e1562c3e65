"""The run's directory: who may write there, links, disks, and readers beside a writer."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxshard.errors import StorageError
from jaxshard.training import CheckpointManager, records, run_directory, steps
from jaxshard.training.records import StepName
from jaxshard.training.run_directory import RunDirectory, writer_lock
from jaxshard.training.steps import find_steps

TREE = {"params": {"w": np.arange(4.0)}}


def _manager(directory: Path, **how: Any) -> CheckpointManager:
    return CheckpointManager(directory, **({"prefix": "net", "fsync": False} | how))


# --- one writer ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # JAX warns of forks; these children do not use it
def test_a_process_forked_during_a_save_does_not_keep_the_lock(tmp_path):
    reader, writer = os.pipe()
    with writer_lock(RunDirectory.of(tmp_path)):
        child = os.fork()
        if child == 0:  # a worker that reads data, and lives longer than the save
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    os.close(reader)
    try:
        with writer_lock(RunDirectory.of(tmp_path)):
            pass
    finally:
        os.close(writer)
        os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore")
def test_a_process_forked_during_a_save_does_not_outlive_the_writer_as_one(tmp_path):
    """The writer is killed; its worker lives on, and holds nothing."""
    reader, writer = os.pipe()
    said, say = os.pipe()
    child = os.fork()
    if child == 0:
        with writer_lock(RunDirectory.of(tmp_path)):
            if os.fork() == 0:
                os.close(writer)
                os.write(say, b"up")
                os.read(reader, 1)
            os._exit(0)  # as if killed: no lock is given back
    os.close(reader)
    assert os.read(said, 2) == b"up"
    os.waitpid(child, 0)
    with writer_lock(RunDirectory.of(tmp_path)):
        pass
    os.close(writer)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_not_called_another_writer(tmp_path, monkeypatch, code):
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match="cannot be locked") as caught:
        _manager(tmp_path).save(1, TREE)
    assert "another writer" not in str(caught.value)


# --- links and disks -----------------------------------------------------------------------------


def _victim(tmp_path: Path) -> Path:
    """A folder of somebody else's, with a file that nobody here may touch."""
    path = tmp_path / "elsewhere/rank_0/net_rank_0-1_1.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"precious")
    return path


def test_links_in_a_run_from_a_stranger_lead_to_nothing_being_deleted(tmp_path):
    victim = _victim(tmp_path)
    run = tmp_path / "run"
    manager = _manager(run)
    manager.save(1, TREE)
    manager.save(2, TREE)
    record = find_steps(RunDirectory.of(run))[0].record
    evil = replace(record, units=("way/rank_0/net_rank_0-1_1.safetensors",))
    (run / ".jaxshard/1_1.json").unlink()
    (run / ".jaxshard/1_1.removed").write_bytes(records.to_bytes(evil))
    (run / "way").symlink_to(tmp_path / "elsewhere")
    assert manager.restore(TREE, strict=False).step == 2
    assert victim.read_bytes() == b"precious"
    with pytest.raises(StorageError, match="outside of"):
        manager.save(3, TREE)
    assert victim.read_bytes() == b"precious"


def test_a_linked_folder_for_what_is_removed_is_not_emptied(tmp_path):
    victim = _victim(tmp_path)
    manager = _manager(tmp_path / "run")
    manager.save(1, TREE)
    (tmp_path / "run/.jaxshard/removed").symlink_to(tmp_path / "elsewhere")
    assert manager.restore(TREE).step == 1
    manager.save(2, TREE)
    assert victim.read_bytes() == b"precious"


def test_a_staged_step_that_is_a_link_is_not_moved_here(tmp_path):
    victim = _victim(tmp_path)
    run = tmp_path / "run"
    manager = _manager(run)
    manager.save(1, TREE)
    places_of = RunDirectory.of(run)
    record = find_steps(places_of)[0].record
    (run / ".jaxshard/1_2.saving").mkdir()
    (run / ".jaxshard/1_2.saving/checkpoint").symlink_to(tmp_path / "elsewhere")
    unit = "checkpoint/rank_0/net_rank_0-1_1.safetensors"
    moving = replace(record, step=StepName(1, 2), units=(unit,))
    (run / ".jaxshard/1_2.moving").write_bytes(records.to_bytes(moving))
    assert manager.restore(TREE).step == 1
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("format", ["ranks", "huggingface", "orbax"])
def test_a_checkpoint_folder_that_is_a_link_elsewhere_is_refused_with_a_remedy(tmp_path, format):
    run = tmp_path / "run"
    (tmp_path / "disk").mkdir()
    run.mkdir()
    (run / "checkpoint").symlink_to(tmp_path / "disk")
    with pytest.raises(StorageError, match=r"outside of .*Pass the directory itself"):
        _manager(run, format=format).save(1, TREE)
    assert list((tmp_path / "disk").iterdir()) == []
    assert sorted(p.name for p in (run / ".jaxshard").iterdir()) == ["lock"]


def test_a_checkpoint_folder_on_another_disk_is_refused_before_anything_is_moved(
    tmp_path, monkeypatch
):
    manager = _manager(tmp_path)
    manager.save(1, TREE)

    class Elsewhere:
        def __init__(self, found: os.stat_result) -> None:
            self.st_dev, self.st_mode = found.st_dev + 1, found.st_mode

    real = Path.stat

    def stat_of(self: Path, **how: Any) -> Any:
        found = real(self, **how)
        there = self.name == "rank_0" and stat.S_ISDIR(found.st_mode)
        return Elsewhere(found) if there else found

    monkeypatch.setattr(Path, "stat", stat_of)
    with pytest.raises(StorageError, match="on another disk"):
        manager.save(2, TREE)
    monkeypatch.undo()
    assert not list((tmp_path / ".jaxshard").glob("*.moving"))
    assert manager.latest_step() == 1


# --- on the disk before it counts ----------------------------------------------------------------


@pytest.mark.parametrize("format", ["ranks", "huggingface", "orbax"])
def test_every_file_and_every_new_folder_is_on_the_disk_before_the_step_counts(
    tmp_path, monkeypatch, format
):
    synced: list[str] = []
    fsync, replaced = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def note_whole(a: Any, b: Any) -> None:
        replaced(a, b)
        if str(b).endswith("1_1.json"):
            synced.append("whole")

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_whole)
    run = tmp_path / "new/run"
    _manager(run, format=format, fsync=True).save(1, TREE)
    before = set(synced[: synced.index("whole")])
    step = find_steps(RunDirectory.of(run))[0]
    folders = {run.parent.parent, run.parent, run}
    for path in step.record.files:
        place = run / path
        folders |= {p for p in place.parents if p.is_relative_to(run)}
        # it was synced where it was written, before it was moved
        assert any(s.endswith(f"/{path}") for s in before), path
    moved = {run / unit for unit in step.record.units}
    for folder in folders:
        under_way = any(folder == m or m in folder.parents for m in moved)
        name = folder.relative_to(run).as_posix() if under_way else ""
        assert str(folder) in before or (name and any(s.endswith(f"/{name}") for s in before)), (
            folder
        )


# --- readers beside a writer ---------------------------------------------------------------------


def test_a_step_that_becomes_whole_while_somebody_looks_is_not_overlooked(tmp_path, monkeypatch):
    """Its record is missed as one that is moving, and as one that is whole."""
    manager = _manager(tmp_path)
    manager.save(1, TREE, extras={"at": 1})
    own = tmp_path / ".jaxshard"
    os.rename(own / "1_1.json", own / "1_1.moving")
    recorded = steps._recorded

    def then_it_is_whole(places: RunDirectory) -> Any:
        yield from recorded(places)
        if (own / "1_1.moving").exists():
            os.rename(own / "1_1.moving", own / "1_1.json")

    monkeypatch.setattr(steps, "_recorded", then_it_is_whole)
    (found,) = find_steps(RunDirectory.of(tmp_path))
    assert found.state == "complete"
    assert found.record is not None


def test_a_step_that_goes_while_somebody_looks_is_no_error(tmp_path, monkeypatch):
    manager = _manager(tmp_path)
    for step in (1, 2):
        manager.save(step, TREE)
    own = tmp_path / ".jaxshard"
    listed = steps.names_in

    def then_it_goes(places: RunDirectory, state: str) -> Any:
        found = listed(places, state)
        if state == records.WHOLE:
            (own / "1_1.json").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(steps, "names_in", then_it_goes)
    assert str(find_steps(RunDirectory.of(tmp_path))[-1].name) == "1_2"


def test_a_damaged_record_of_a_removal_leaves_nothing_that_looks_like_a_step(tmp_path, caplog):
    manager = _manager(tmp_path)
    for step in (1, 2):
        manager.save(step, TREE)
    own = tmp_path / ".jaxshard"
    data = (own / "1_2.json").read_bytes()
    (own / "1_2.json").unlink()
    (own / "1_2.removed").write_bytes(data[:-3])
    with caplog.at_level(logging.INFO):
        found = manager.restore(TREE)
    assert found.step == 1
    assert found.passed_over == (("1_2", "it is partial: its removal was interrupted"),)
    assert "the rest of it stays" in caplog.text
    manager.save(2, TREE)  # which makes it whole again
    assert manager.restore(TREE, verify=True).step == 2
    assert not (own / "1_2.removed").exists()


def test_between_saves_nothing_is_held(tmp_path):
    _manager(tmp_path).save(1, TREE)
    assert run_directory._held == set()


def test_a_strangers_record_of_a_step_that_is_saved_again_has_nothing_deleted_elsewhere(tmp_path):
    victim = _victim(tmp_path)
    run = tmp_path / "run"
    manager = _manager(run)
    manager.save(1, TREE)
    record = find_steps(RunDirectory.of(run))[0].record
    units = (*record.units, "way/rank_0/net_rank_0-1_1.safetensors")
    (run / "way").symlink_to(tmp_path / "elsewhere")
    (run / ".jaxshard/1_1.json").write_bytes(records.to_bytes(replace(record, units=units)))
    manager.save(1, TREE)
    assert victim.read_bytes() == b"precious"
