"""A run beside foreign files, unreadable records, and processes that save or restore there too."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import pytest
import training_beside
from training_kills import CUT, is_state_of, state_of

from jaxshard.errors import JaxshardError, NotFoundError, StorageError
from jaxshard.training import (
    CheckpointManager,
    commit_step,
    restore,
)
from jaxshard.training import open_step as examining
from jaxshard.training.run_directory import RunDirectory, writer_lock

FORMATS = ("ranks", "iteration", "huggingface", "orbax")
_GONE = ("missing", "does not exist", "no checkpoint", "no weight files", "Orbax", "has no file")


def _manager(directory: Path, **how: Any) -> CheckpointManager:
    options = {"prefix": "net", "strategy": CUT, "fsync": False, "workers": 1} | how
    return CheckpointManager(directory, **options)


def _saved(directory: Path, *steps: int, **how: Any) -> CheckpointManager:
    manager = _manager(directory, **how)
    for step in steps:
        manager.save(step, state_of(step), extras={"at": step})
    return manager


def _restored(directory: Path) -> int:
    found = _manager(directory).restore(state_of(0), verify=True)
    assert is_state_of(found.state, found.step)
    return found.step


# --- foreign files -------------------------------------------------------------------------------

_JUNK = (".DS_Store", "._1_1.json", "x.bak", ".nfs000012", "notes.json", "1_1 copy.json")
_JUNK += ("01_01.json", "x.moving", "x.removed", "x.saving", ".x.saving.partial", ".x.new")
_JUNK += ("strategy-notes", "ckpt_strategy_rank_0.ckpt.bak", "ckpt_strategy_rank_9.ckpt", "x")
_PLACES = (".jaxshard", ".jaxshard/removed", ".jaxshard/strategy-*", "checkpoint", "strategy")


def _put_junk(directory: Path, place: str, *, folders: bool) -> list[Path]:
    found = sorted(directory.glob(place)) or [directory / place]
    made = []
    for folder in found:
        folder.mkdir(exist_ok=True)
        for name in _JUNK:
            if (folder / name).exists() or (place == "strategy" and name.endswith("9.ckpt")):
                continue  # rank files of more ranks are the layout's before, and are replaced
            made.append(folder / name / "inside" if folders else folder / name)
            made[-1].parent.mkdir(exist_ok=True)
            made[-1].write_bytes(b"not ours")
    return made


@pytest.mark.parametrize("format", ["ranks", "iteration", "huggingface"])
@pytest.mark.parametrize("folders", [False, True])
@pytest.mark.parametrize("place", _PLACES)
def test_foreign_files_in_a_run_change_nothing_and_are_left_alone(tmp_path, place, folders, format):
    manager = _saved(tmp_path, 1, 2, format=format, keep_max=2, save_network_only=True)
    junk = _put_junk(tmp_path, place, folders=folders)
    assert _restored(tmp_path) == 2
    manager = _saved(tmp_path, 3, 4, format=format, keep_max=2, save_network_only=True)
    assert [(s.name.step, s.state) for s in manager.steps(deep=True)] == [
        (3, "complete"),
        (4, "complete"),
    ]
    assert manager.latest_step() == 4
    assert _restored(tmp_path) == 4
    assert all(path.read_bytes() == b"not ours" for path in junk)


def test_strategy_files_of_a_layout_that_is_gone_go_and_foreign_ones_beside_them_stay(tmp_path):
    _saved(tmp_path, 1)
    (old,) = (tmp_path / ".jaxshard").glob("strategy-*")
    (old / "notes").write_text("not ours")
    _manager(tmp_path, strategy=None, keep_max=1).save(2, state_of(2))
    assert os.listdir(old) == ["notes"]
    assert _restored(tmp_path) == 2


def test_a_layout_file_of_the_strategy_before_does_not_stay_in_the_open(tmp_path):
    place, kept = tmp_path / "strategy", tmp_path / "kept"
    for folder in (place, kept):
        folder.mkdir()
    (place / "layout.json").write_text("{}")
    (place / "notes.json").write_text("{}")
    (kept / "ckpt_strategy_rank_0.ckpt").write_bytes(b"new")
    commit_step._copy_strategy(place, kept)
    assert sorted(os.listdir(place)) == ["ckpt_strategy_rank_0.ckpt", "notes.json"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_pointer_that_cannot_be_written_keeps_neither_the_step_nor_other_pointers_away(
    tmp_path, make, caplog
):
    manager = _saved(tmp_path, 1)
    meta = tmp_path / "checkpoint/rank_0/meta.json"
    meta.unlink()
    make(meta)
    manager.save(2, state_of(2), extras={"at": 2})
    assert _restored(tmp_path) == 2
    told = json.loads((tmp_path / "checkpoint/rank_1/meta.json").read_text())
    assert told["last_ckpt_file"] == "net_rank_1-1_2.safetensors"
    assert ("meta.json: Is a directory" in caplog.text) == meta.is_dir()


# --- records that cannot be read -----------------------------------------------------------------


def _as_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _as_pipe(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"\0" * 99)


def _refused(code: int) -> Any:
    def refuse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read = Path.read_bytes

        def read_bytes(self: Path) -> bytes:
            if self == path:
                raise OSError(code, os.strerror(code), str(self))
            return read(self)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)

    return refuse


@pytest.mark.parametrize("bad", [1, 2, 3])
@pytest.mark.parametrize(
    "spoil", [_as_folder, _as_pipe, _damaged, _refused(errno.EIO), _refused(errno.EACCES)]
)
def test_a_record_that_cannot_be_read_is_one_bad_step(tmp_path, monkeypatch, bad, spoil):
    manager = _saved(tmp_path, 1, 2, 3)
    spoil(tmp_path / f".jaxshard/1_{bad}.json", monkeypatch)
    newest = 2 if bad == 3 else 3
    found = manager.restore(state_of(0), verify=True)
    assert found.step == newest
    assert is_state_of(found.state, newest)
    assert [name for name, _ in found.passed_over] == ["1_3"] * (bad == 3)
    assert manager.latest_step() == newest
    named = f".jaxshard/1_{bad}.json"
    states = {s.name.step: (s.state, named in s.reason) for s in manager.steps()}
    assert states == {n: ("corrupt", True) if n == bad else ("complete", False) for n in (1, 2, 3)}
    manager.save(4, state_of(4), extras={"at": 4})
    assert manager.restore(state_of(0), verify=True).step == 4
    monkeypatch.undo()
    if spoil not in (_as_folder, _as_pipe, _damaged):  # its strategy was kept for it
        assert manager.restore(state_of(0), step=bad, verify=True).step == bad


@pytest.mark.parametrize("state", ["moving", "removed"])
@pytest.mark.parametrize("spoil", [_as_folder, _as_pipe, _refused(errno.EIO)])
def test_a_record_of_what_was_interrupted_that_cannot_be_read_keeps_no_other_step_away(
    tmp_path, monkeypatch, state, spoil
):
    manager = _saved(tmp_path, 1, 2)
    own = tmp_path / ".jaxshard"
    os.rename(own / "1_2.json", own / f"1_2.{state}")
    spoil(own / f"1_2.{state}", monkeypatch)
    assert manager.restore(state_of(0), verify=True).step == 1
    manager.save(3, state_of(3), extras={"at": 3})
    assert manager.restore(state_of(0), verify=True).step == 3
    assert {s.name.step: s.state for s in manager.steps()}[2] == "partial"
    assert (own / f"1_2.{state}").exists()  # it may be whole, and is all that tells of its files


def test_a_folder_where_the_record_belongs_is_named_before_anything_is_written(tmp_path):
    manager = _saved(tmp_path, 1)
    (tmp_path / ".jaxshard/1_2.json").mkdir()
    with pytest.raises(StorageError, match=r"1_2\.json is a folder.*Move it away"):
        manager.save(2, state_of(2))
    assert not list(tmp_path.glob("checkpoint/rank_*/*1_2*"))
    assert _restored(tmp_path) == 1


def test_where_our_own_folder_cannot_be_listed_it_is_named(tmp_path, monkeypatch):
    manager = _saved(tmp_path, 1)
    listed = os.listdir

    def refuse(path: Any = ".") -> list[str]:
        if str(path).endswith(".jaxshard"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    for ask in (lambda: manager.restore(state_of(0)), manager.latest_step, manager.steps):
        with pytest.raises(StorageError, match=r"\.jaxshard cannot be listed: Permission denied"):
            ask()


def test_a_folder_of_a_rank_that_cannot_be_listed_spoils_only_the_steps_that_need_it(
    tmp_path, monkeypatch
):
    manager = _saved(tmp_path, 1, format="iteration")
    (tmp_path / "checkpoint/rank_7").mkdir()
    listed = os.listdir

    def refuse(path: Any = ".") -> list[str]:
        if str(path).endswith("rank_7"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert manager.restore(state_of(0), verify=True).step == 1
    manager.save(2, state_of(2))
    assert manager.latest_step() == 2


# --- restoring beside retention ------------------------------------------------------------------


def _files_of(directory: Path, step: int) -> list[Path]:
    files = [p for p in (directory / "checkpoint").rglob("*") if p.is_file()]
    ends = (f"-1_{step}/", f"-1_{step}.", f"iteration_{step:08d}/")
    return [p for p in files if any(end in str(p) for end in ends)]


@pytest.mark.parametrize("when", ["before opening", "before reading"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_step_whose_files_go_while_it_is_restored_is_passed_over(
    tmp_path, monkeypatch, format, when
):
    manager = _saved(tmp_path, 1, 2, format=format)
    opened = restore.open_step

    def open_step(places: RunDirectory, record: Any, *how: Any) -> Any:
        catalog = None if when == "before opening" else opened(places, record, *how)
        if record.step.step == 2:
            for path in _files_of(tmp_path, 2):
                path.unlink()
        return catalog or opened(places, record, *how)

    monkeypatch.setattr(restore, "open_step", open_step)
    found = manager.restore(state_of(0))
    assert found.step == 1
    assert is_state_of(found.state, 1)
    ((name, reason),) = found.passed_over
    assert name == "1_2"
    assert any(word in reason for word in _GONE)


def test_a_step_that_goes_for_a_newer_one_leads_to_the_newer_one(tmp_path, monkeypatch):
    """Of one step that is there at all times, no listing says that there is none."""
    _saved(tmp_path, 1)
    opened, writer, next_step = restore.open_step, _manager(tmp_path, keep_max=1), iter((2, 3))

    def open_step(*given: Any) -> Any:
        if step := next(next_step, None):
            writer.save(step, state_of(step), extras={"at": step})
        return opened(*given)

    monkeypatch.setattr(restore, "open_step", open_step)
    found = _manager(tmp_path).restore(state_of(0), verify=True)
    assert found.step == 3
    assert is_state_of(found.state, 3)
    assert [name for name, _ in found.passed_over] == ["1_1", "1_2"]
    assert all("removed while it was read" in reason for _, reason in found.passed_over)


@pytest.mark.parametrize("format", FORMATS)
def test_a_step_that_is_saved_again_while_it_is_read_is_no_mixture(tmp_path, monkeypatch, format):
    _saved(tmp_path, 1, format=format)
    opened, again = restore.open_step, _saved(tmp_path, format=format)
    again.restore(state_of(0))
    often = iter(range(2))

    def open_step(*given: Any) -> Any:
        catalog = opened(*given)
        if next(often, None) is not None:
            again.save(1, state_of(101), extras={"at": 101})
        return catalog

    monkeypatch.setattr(restore, "open_step", open_step)
    found = _manager(tmp_path).restore(state_of(0))
    assert found.extras == {"at": 101}
    assert is_state_of(found.state, 101)


def test_a_named_step_that_goes_is_an_error_and_not_another_step(tmp_path, monkeypatch):
    manager = _saved(tmp_path, 1, 2)
    opened = restore.open_step

    def open_step(*given: Any) -> Any:
        for path in _files_of(tmp_path, 2):
            path.unlink()
        return opened(*given)

    monkeypatch.setattr(restore, "open_step", open_step)
    with pytest.raises(JaxshardError, match="1_2"):
        manager.restore(state_of(0), step=2)


def test_the_newest_step_is_found_though_the_one_listed_goes(tmp_path, monkeypatch):
    _saved(tmp_path, 1)
    opened, writer, next_step = examining.open_step, _manager(tmp_path, keep_max=1), iter((2, 3))

    def open_step(*given: Any) -> Any:
        if step := next(next_step, None):
            writer.save(step, state_of(step))
        return opened(*given)

    monkeypatch.setattr(examining, "open_step", open_step)
    manager = _manager(tmp_path)
    assert manager.latest_step() == 3
    next_step = iter((4,))
    assert [(s.name.step, s.state) for s in manager.steps()] == []  # 3 went, and is not broken
    assert [(s.name.step, s.state) for s in manager.steps()] == [(4, "complete")]


def test_where_no_step_is_good_each_reason_is_told(tmp_path):
    manager = _saved(tmp_path, 1, 2)
    for step in (1, 2):
        _files_of(tmp_path, step)[0].unlink()
    with pytest.raises(NotFoundError, match=r"none of its 2 steps is good: 1_2: .*missing; 1_1: "):
        manager.restore(state_of(0))


@pytest.mark.parametrize("options", [[], ["--again"], ["--no-verify", "--keep=2"]])
def test_every_restore_beside_a_process_that_saves_gives_one_whole_step(tmp_path, options):
    program = Path(training_beside.__file__)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(program.parents[2])}
    done = subprocess.run(
        [
            sys.executable,
            program,
            tmp_path,
            "--format=ranks,iteration,huggingface",
            "--restores=25",
            *options,
        ],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=120,
    )
    for found in json.loads(done.stdout).values():
        assert found["answers"] == {"good": 25}
        assert found["saved"] > 1


# --- readers and the lock ------------------------------------------------------------------------


@pytest.mark.parametrize("is_reader", [True, False])
def test_a_writer_waits_for_a_reader_that_tidies_up_and_only_a_moment_for_a_writer(
    tmp_path, monkeypatch, is_reader
):
    monkeypatch.setattr("jaxshard.training.run_directory.WAIT_S", 0.05)
    manager = _saved(tmp_path, 1)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with writer_lock(RunDirectory.of(tmp_path), is_reader=is_reader):
            held.set()
            done.wait(0.4 if is_reader else 30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    try:
        if is_reader:
            manager.save(2, state_of(2), extras={"at": 2})
            assert _restored(tmp_path) == 2
        else:
            with pytest.raises(StorageError, match="another writer"):
                manager.save(2, state_of(2))
    finally:
        done.set()
        thread.join()
    manager.save(3, state_of(3), extras={"at": 3})


def test_a_reader_takes_the_lock_only_where_something_was_interrupted(tmp_path, monkeypatch):
    manager = _saved(tmp_path, 1)
    (tmp_path / ".jaxshard/removed").mkdir(exist_ok=True)
    (tmp_path / ".jaxshard/removed/.DS_Store").write_bytes(b"")
    taken = []
    monkeypatch.setattr(restore, "recover", lambda places: taken.append(places) or [])
    manager.restore(state_of(0))
    assert not taken
    (tmp_path / ".jaxshard/1_2.saving").mkdir()
    manager.restore(state_of(0))
    assert taken


def test_a_step_that_the_manager_saved_is_restored_without_a_note(tmp_path, caplog):
    """A training job has no config.json beside its steps; it need not be told at each restart."""
    manager = CheckpointManager(tmp_path, format="huggingface", prefix="m")
    manager.save(1, {"w": jax.numpy.ones(4)})
    with caplog.at_level("WARNING", "jaxshard"):
        restored = manager.restore({"w": jax.numpy.zeros(4)})
    assert restored.notes == ()
    assert "config.json" not in caplog.text
