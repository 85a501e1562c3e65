"""What survives: processes killed at any moment, damaged files, full disks."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import random
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import training_kill_points
import training_kills
from training_kills import CUT, is_state_of, state_of

from jaxshard.errors import FormatError, JaxshardError, NotFoundError, StorageError
from jaxshard.storage.fs import publish_new
from jaxshard.storage.local import Handles
from jaxshard.training import CheckpointManager, commit_step, records
from jaxshard.training.records import StepName
from jaxshard.training.run_directory import RunDirectory, writer_lock
from jaxshard.training.steps import find_steps

FORMATS = ("ranks", "iteration", "huggingface", "orbax")


def _killed(directory: Path, *options: str, program: ModuleType = training_kills) -> dict[str, Any]:
    path = Path(program.__file__)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(path.parents[2])}
    done = subprocess.run(
        [sys.executable, path, directory, *options],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=1800,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("seed", "options"),
    enumerate(
        [
            ["--format=ranks"],
            ["--format=ranks", "--async", "--network", "--slow"],
            ["--format=iteration", "--keep=1", "--slow"],
            ["--format=iteration", "--async"],
            ["--format=huggingface", "--slow"],
            ["--format=huggingface", "--async", "--keep=1"],
            ["--format=orbax", "--kills=8", "--longest=0.7"],
            ["--format=orbax", "--kills=6", "--longest=0.7", "--async"],
        ]
    ),
)
def test_a_run_killed_at_any_moment_has_the_last_step_that_was_saved(tmp_path, seed, options):
    found = _killed(tmp_path / "run", "--kills=20", f"--seed={seed}", *options)
    assert found["wrong"] == []
    assert found["saved"] >= 6  # it got somewhere between the kills
    assert found["hits"]["save"] >= 1  # in the middle
    assert found["hits"]["restore"] >= 1
    if "--slow" in options:
        assert found["hits"]["removal"] >= 1
    assert found["left_over"] == []


@pytest.mark.parametrize(
    ("format", "sample"), [("ranks", 6), ("iteration", 6), ("huggingface", 6), ("orbax", 3)]
)
def test_a_save_killed_before_any_call_that_changes_a_name_is_there_or_not(
    tmp_path, format, sample
):
    """A sample of the calls; all of them with JAXSHARD_ALL_KILLS=1, which takes minutes."""
    sample = 0 if os.environ.get("JAXSHARD_ALL_KILLS") else sample
    found = _killed(
        tmp_path, f"--format={format}", f"--sample={sample}", program=training_kill_points
    )
    for name, one in found.items():
        assert one["wrong"] == [], name
        assert one["kills"] >= sample, name
        assert one["calls"]["os.rename"] >= 3, name
        assert one["calls"]["renameat2"] >= 1, name


def test_a_kill_of_a_save_that_removes_the_old_step_first_would_be_found_out(tmp_path):
    options = ("--format=huggingface", "--sample=3", "--broken")
    found = _killed(tmp_path, *options, program=training_kill_points)
    assert found["huggingface new"]["wrong"]


def test_removing_the_old_before_the_new_is_whole_would_be_found_out(tmp_path):
    found = _killed(tmp_path / "run", "--kills=12", "--keep=1", "--broken")
    assert found["wrong"]


# --- damage ----------------------------------------------------------------------------------


def _manager(directory: Path, **how: object) -> CheckpointManager:
    options = {"prefix": "net", "strategy": CUT, "fsync": False, "workers": 1} | how
    return CheckpointManager(directory, **options)


def _saved(directory: Path, steps: range, **how: object) -> CheckpointManager:
    manager = _manager(directory, **how)
    for step in steps:
        manager.save(step, state_of(step), extras={"at": step})
    return manager


def _save_and_wait(manager: CheckpointManager, step: int) -> None:
    manager.save(step, state_of(step))
    manager.wait()


def _flip(data: bytes, chance: random.Random) -> bytes | None:
    bit = chance.randrange(len(data) * 8)
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes | None:
    return data[: chance.randrange(len(data))]


def _delete(data: bytes, chance: random.Random) -> bytes | None:
    return None


@pytest.mark.parametrize("format", FORMATS)
def test_damage_to_any_one_file_never_leads_to_wrong_data(tmp_path, format):
    chance = random.Random(7)
    manager = _saved(tmp_path, range(1, 4), format=format)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size]
    newest = set(find_steps(RunDirectory.of(tmp_path))[-1].record.files)
    for number in range(84 if format != "orbax" else 16):  # which takes longer for each
        path = chance.choice(files)
        whole = path.read_bytes()
        damaged = (_flip, _flip, _cut, _delete)[number % 4](whole, chance)
        path.unlink() if damaged is None else path.write_bytes(damaged)
        found = manager.restore(state_of(0), verify=True)
        assert is_state_of(found.state, found.step), path
        assert found.extras == {"at": found.step}
        if path.relative_to(tmp_path).as_posix() in newest:
            assert found.step == 2
            assert found.passed_over[0][0] == "1_3"
            assert found.passed_over[0][1]
        else:
            assert found.step == 3 or ".jaxshard/1_3" in str(path)
        path.write_bytes(whole)
    assert manager.restore(state_of(0), verify=True).step == 3


def test_without_checksums_a_flipped_bit_would_be_restored(tmp_path):
    manager = _saved(tmp_path, range(1, 2))
    path = tmp_path / "checkpoint/rank_0/net_rank_0-1_1.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert not is_state_of(manager.restore(state_of(0)).state, 1)
    with pytest.raises(NotFoundError, match="checksum"):
        manager.restore(state_of(0), verify=True)


@pytest.mark.parametrize("format", FORMATS)
def test_without_verify_a_missing_or_truncated_file_leads_to_the_step_before(
    tmp_path, format, caplog
):
    manager = _saved(tmp_path, range(1, 4), format=format)
    last, before = (step.record for step in find_steps(RunDirectory.of(tmp_path))[:0:-1])
    path = tmp_path / max(last.files, key=lambda p: last.files[p].num_bytes)
    path.write_bytes(path.read_bytes()[:-1])
    other = tmp_path / max(before.files, key=lambda p: before.files[p].num_bytes)
    other.unlink()
    with caplog.at_level(logging.WARNING):
        found = manager.restore(state_of(0))
    assert found.step == 1
    assert is_state_of(found.state, 1)
    (first, truncated), (second, missing) = found.passed_over
    assert (first, second) == ("1_3", "1_2")
    assert "bytes" in truncated
    assert path.name in truncated
    assert "missing" in missing
    assert other.name in missing
    assert "passed over" in caplog.text


@pytest.mark.parametrize("format", ["ranks", "iteration", "huggingface"])
def test_without_verify_a_file_with_a_broken_header_leads_to_the_step_before(tmp_path, format):
    manager = _saved(tmp_path, range(1, 3), format=format)
    for path in find_steps(RunDirectory.of(tmp_path))[-1].record.files:
        if not path.endswith(".safetensors"):
            continue
        place = tmp_path / path
        whole = place.read_bytes()
        place.write_bytes(b"\xff" * 8 + whole[8:])  # its size is right
        found = manager.restore(state_of(0))
        assert (found.step, found.passed_over[0][0]) == (1, "1_2"), path
        assert place.name in found.passed_over[0][1]
        place.write_bytes(whole)
    assert manager.restore(state_of(0)).step == 2


def test_a_named_step_that_is_damaged_is_an_error_and_not_another_step(tmp_path):
    manager = _saved(tmp_path, range(1, 3))
    path = tmp_path / "checkpoint/rank_1/net_rank_1-1_2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="rank_1"):
        manager.restore(state_of(0), step=2)


def test_damaged_strategy_files_are_not_believed(tmp_path):
    manager = _saved(tmp_path, range(1, 2))
    (kept,) = tmp_path.glob(".jaxshard/strategy-*")
    for folder in (kept, tmp_path / "strategy"):
        (folder / "ckpt_strategy_rank_0.ckpt").write_bytes(b"")
        if folder == kept:  # the newest layout's files lie in the open as well
            assert manager.restore(state_of(0)).step == 1
    with pytest.raises(NotFoundError, match="strategy files"):
        manager.restore(state_of(0))
    manager.save(2, state_of(2))  # which mends them
    assert manager.restore(state_of(0), step=1, verify=True).step == 1


def test_states_are_told_apart(tmp_path):
    manager = _saved(tmp_path, range(1, 6), keep_max=0)
    ranks = tmp_path / "checkpoint/rank_1"
    (ranks / "net_rank_1-1_2.safetensors").unlink()
    path = ranks / "net_rank_1-1_3.safetensors"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    os.rename(tmp_path / ".jaxshard/1_4.json", tmp_path / ".jaxshard/1_4.removed")
    plain = {s.name.step: s.state for s in manager.steps()}
    assert plain == {1: "complete", 2: "incomplete", 3: "corrupt", 4: "partial", 5: "complete"}
    path = ranks / "net_rank_1-1_5.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert manager.steps()[4].state == "complete"
    assert manager.steps(deep=True)[4].state == "corrupt"


# --- interrupted, and gone on with -------------------------------------------------------------


def _stop_in_commit(monkeypatch, after: int) -> None:
    """Have the ``after``-th renaming fail as if the process ended there."""
    count = iter(range(10**6))
    rename = os.replace

    def replace(a, b):
        if ".saving/" in str(a) and next(count) == after:
            raise KeyboardInterrupt
        rename(a, b)

    def publish(a, b):
        if next(count) == after:
            raise KeyboardInterrupt
        publish_new(a, b)

    monkeypatch.setattr(commit_step.os, "replace", replace)
    monkeypatch.setattr(commit_step, "publish_new", publish)


@pytest.mark.parametrize("format", FORMATS)
def test_a_step_that_was_on_the_disk_is_put_in_place_by_the_next_process(
    tmp_path, format, monkeypatch
):
    manager = _saved(tmp_path, range(1, 2), format=format)
    with monkeypatch.context() as patched:
        _stop_in_commit(patched, after=1 if format == "ranks" else 0)
        with pytest.raises(KeyboardInterrupt):
            manager.save(2, state_of(2), extras={"at": 2})
    assert [s.state for s in find_steps(RunDirectory.of(tmp_path))] == ["complete", "partial"]
    found = _manager(tmp_path, format=format).restore(state_of(0), verify=True)
    assert (found.step, found.passed_over) == (2, ())
    assert is_state_of(found.state, 2)
    assert not list((tmp_path / ".jaxshard").glob("*.saving"))


def test_saving_a_step_again_is_never_a_mixture(tmp_path, monkeypatch):
    manager = _saved(tmp_path, range(1, 3))
    with monkeypatch.context() as patched:
        _stop_in_commit(patched, after=1)
        with pytest.raises(KeyboardInterrupt):
            manager.save(2, state_of(22), extras={"at": 22})
    found = _manager(tmp_path).restore(state_of(0), verify=True)
    assert is_state_of(found.state, 22)


@pytest.mark.parametrize(
    ("format", "network"),
    [*((format, False) for format in FORMATS), ("ranks", True), ("huggingface", True)],
)
def test_a_removal_stopped_anywhere_leaves_no_step_that_looks_whole(
    tmp_path, format, network, monkeypatch
):
    manager = _saved(tmp_path, range(1, 3), format=format, keep_max=0, save_network_only=network)
    places = RunDirectory.of(tmp_path)
    record = find_steps(places)[0].record
    count = 0
    while True:  # stopped before the first, the second … deletion, until none stops it
        with monkeypatch.context() as patched:
            _stop_before_deletion(patched, count)
            try:
                commit_step.remove(places, record)
            except KeyboardInterrupt:
                assert [(s.name.step, s.state) for s in find_steps(places)] == [
                    (1, "partial"),
                    (2, "complete"),
                ]
                _check_folders_are_whole_or_gone(tmp_path, record)
            else:
                break
        commit_step.recover(places)
        assert [s.name.step for s in find_steps(places)] == [2]
        assert not list((tmp_path / ".jaxshard").rglob("*1_1*"))
        manager.save(1, state_of(1))
        manager.save(2, state_of(2))  # the newest again
        record = next(s.record for s in find_steps(places) if s.name.step == 1)
        count += 1
    assert count >= len(record.units)


def _stop_before_deletion(monkeypatch, after: int) -> None:
    """Have the process end, as it were, before its ``after``-th deletion or renaming away."""
    left = [after]

    def counted(work):
        def stopping(*given, **how):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return work(*given, **how)

        return stopping

    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(commit_step.shutil, "rmtree", counted(commit_step.shutil.rmtree))
    rename = os.rename

    def renaming(a, b):
        # taking the record away is what comes before all deletions
        (rename if str(b).endswith(".removed") else counted(rename))(a, b)

    monkeypatch.setattr(commit_step.os, "rename", renaming)


def _check_folders_are_whole_or_gone(directory: Path, record: records.Record) -> None:
    """Whoever knows no records never finds a folder that lacks some of its files."""
    there = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    for unit in record.units:
        files = {path for path in record.files if path.startswith(f"{unit}/")}
        assert not files or files & there in (files, set()), unit


def test_a_removal_that_was_interrupted_is_finished_and_looks_complete_to_nobody(tmp_path):
    manager = _saved(tmp_path, range(1, 4), format="iteration", keep_max=0)
    places = RunDirectory.of(tmp_path)
    os.rename(places.record(StepName(1, 1)), places.record(StepName(1, 1), ".removed"))
    assert [s.state for s in find_steps(places)] == ["partial", "complete", "complete"]
    manager.save(4, state_of(4))
    assert [s.name.step for s in find_steps(places)] == [2, 3, 4]
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == [
        *(f"iteration_{n:08d}" for n in (2, 3, 4)),
        "latest_checkpointed_iteration.txt",
    ]


def test_two_writers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxshard.training.run_directory.WAIT_S", 0.1)
    manager = _saved(tmp_path, range(1, 2))
    with (
        writer_lock(RunDirectory.of(tmp_path)),
        pytest.raises(StorageError, match="another writer"),
    ):
        manager.save(2, state_of(2))
    manager.save(2, state_of(2))


# --- a full disk ---------------------------------------------------------------------------------


def _fill_disk(monkeypatch, after_bytes: int) -> None:
    left = [after_bytes]
    write = Handles.write_views

    def refuse(self, path, offset, views):
        left[0] -= sum(map(len, views))
        if left[0] < 0:
            raise StorageError(f"{path}: {os.strerror(errno.ENOSPC)}.")
        write(self, path, offset, views)

    monkeypatch.setattr(Handles, "write_views", refuse)
    orbax = import_module("orbax.checkpoint")

    def refused(self, place, **how):
        place.mkdir(parents=True)
        (place / "half").write_bytes(b"x")
        raise Exception(f"RESOURCE_EXHAUSTED: {os.strerror(errno.ENOSPC)}")  # a bare one

    monkeypatch.setattr(orbax.Checkpointer, "save", refused)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_on_a_full_disk_the_step_fails_cleanly_and_the_others_stay(
    tmp_path, monkeypatch, format, asynchronous
):
    manager = _saved(tmp_path, range(1, 3), format=format, async_save=asynchronous)
    manager.wait()
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patched:
        _fill_disk(patched, 5000)
        with pytest.raises(StorageError, match="No space left"):
            _save_and_wait(manager, 3)
    assert sorted(tmp_path.rglob("*")) == before
    manager.save(4, state_of(4))  # room again
    manager.wait()
    assert [s.name.step for s in manager.steps()] == [1, 2, 4]
    assert manager.restore(state_of(0), verify=True).step == 4


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_on_a_full_disk_training_goes_on_where_it_was_told_to(
    tmp_path, monkeypatch, caplog, format, asynchronous
):
    manager = _saved(
        tmp_path, range(1, 3), format=format, on_storage_error="warn", async_save=asynchronous
    )
    manager.wait()
    with monkeypatch.context() as patched:
        _fill_disk(patched, 5000)
        with caplog.at_level(logging.WARNING):
            _save_and_wait(manager, 3)
    assert "step 1_3 is not saved" in caplog.text
    assert "No space left" in str(manager.last_failure)
    assert manager.latest_step() == 2
    _save_and_wait(manager, 4)
    assert manager.latest_step() == 4


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_with_too_little_room_is_not_even_begun_with(tmp_path, monkeypatch, format):
    manager = _saved(tmp_path, range(1, 2), format=format)
    room = argparse.Namespace(free=100)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda place: room)
        with pytest.raises(StorageError, match="100 bytes free"):
            manager.save(2, state_of(2))
    assert manager.latest_step() == 1


def test_a_limit_of_the_system_is_told_as_what_it_is(tmp_path):
    """A real refusal by the kernel, in a process of its own: files may not grow beyond a limit."""
    program = """
import resource, signal, sys
from training_kills import *
from jaxshard.errors import StorageError
ours = CheckpointManager(sys.argv[1], prefix="net", strategy=CUT, workers=1)
ours.save(1, state_of(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    ours.save(2, state_of(2))
except StorageError as error:
    print("refused", error)
print("newest", ours.latest_step())
"""
    here = Path(training_kills.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout.startswith("refused")
    assert done.stdout.endswith("newest 1\n")


def test_what_fails_in_the_background_is_raised_by_the_next_call_with_its_cause(
    tmp_path, monkeypatch
):
    manager = _saved(tmp_path, range(1, 2), async_save=True)
    manager.wait()
    with monkeypatch.context() as patched:
        _fill_disk(patched, 0)
        manager.save(2, state_of(2))
        manager._background._thread.join()
    with pytest.raises(StorageError, match="saving step 1_2 failed in the background") as caught:
        manager.maybe_save(3, state_of(3))
    assert isinstance(caught.value.__cause__, JaxshardError)
    manager.save(3, state_of(3))
    manager.close()
    assert manager.latest_step() == 3


def test_a_step_whose_pointers_cannot_be_written_is_there_all_the_same(
    tmp_path, monkeypatch, caplog
):
    manager = _saved(tmp_path, range(1, 2))
    with monkeypatch.context() as patched:
        patched.setattr("jaxshard.training.commit_step._write_if_changed", _no_room)
        with caplog.at_level(logging.WARNING):
            manager.save(2, state_of(2))
    assert "pointers to it are not" in caplog.text
    assert manager.restore(state_of(0), verify=True).step == 2


def _no_room(path: Path, data: bytes) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
