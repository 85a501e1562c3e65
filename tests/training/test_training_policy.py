"""When a run saves again: after a failure, a refusal, and after going back to an earlier step."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxshard.errors import JaxshardError, LayoutError, StorageError
from jaxshard.training import CheckpointManager, commit_step, save_step, steps
from jaxshard.training.policy import Cadence, Schedule


def _state(value: float) -> dict[str, Any]:
    return {"params": {"w": np.full(4, value, np.float32)}}


class Clock:
    """Seconds that pass when the test lets them."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def _manager(directory: Path, **how: Any) -> CheckpointManager:
    options = {"prefix": "net", "fsync": False, "workers": 1, "keep_max": 0} | how
    return CheckpointManager(directory, **options)


@contextmanager
def _no_room() -> Iterator[None]:
    written = save_step._write_step

    def refused(job: Any) -> Any:
        raise StorageError("No space left on device.")

    save_step._write_step = refused
    try:
        yield
    finally:
        save_step._write_step = written


def _resumed(directory: Path) -> tuple[int, float]:
    found = _manager(directory).restore(_state(0), verify=True)
    return found.step, float(found.state["params"]["w"][0])


# --- the two ways in which steps were skipped ----------------------------------------------------


def test_a_run_that_went_back_saves_the_same_steps_again(tmp_path):
    manager = _manager(tmp_path, save_every_steps=10)
    for step in range(1, 41):
        manager.maybe_save(step, _state(step))
    assert manager.restore(_state(0), step=30).step == 30
    saved = [step for step in range(31, 41) if manager.maybe_save(step, _state(1000 + step))]
    assert saved == [40]
    assert _resumed(tmp_path) == (40, 1040.0)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("on_storage_error", ["raise", "warn"])
def test_a_save_that_failed_is_due_again(tmp_path, asynchronous, on_storage_error):
    manager = _manager(
        tmp_path,
        save_every_steps=10,
        async_save=asynchronous,
        on_storage_error=on_storage_error,
    )
    manager.maybe_save(10, _state(10))
    manager.wait()
    with _no_room(), suppress(StorageError):
        manager.maybe_save(20, _state(20))
        manager.wait()
    assert manager.restore(_state(0)).step == 10
    assert not manager.maybe_save(10, _state(10))  # which is on the disk
    assert manager.maybe_save(20, _state(1020))
    assert not manager.maybe_save(20, _state(1020))  # the twin: once is enough
    manager.close()
    assert _resumed(tmp_path) == (20, 1020.0)


def test_a_failed_save_does_not_put_off_the_next_one_by_time(tmp_path):
    clock = Clock()
    manager = _manager(tmp_path, save_every_seconds=60, clock=clock)
    clock.now = 60
    with _no_room(), pytest.raises(StorageError):
        manager.maybe_save(1, _state(1))
    clock.now = 61
    assert manager.maybe_save(2, _state(2))
    clock.now = 120
    assert not manager.maybe_save(3, _state(3))
    clock.now = 121
    assert manager.maybe_save(4, _state(4))


def test_time_counts_from_a_restore_but_not_from_a_look_at_some_weights(tmp_path):
    clock = Clock()
    manager = _manager(tmp_path, save_every_seconds=60, clock=clock)
    manager.save(1, _state(1))
    clock.now = 50
    manager.restore(_state(0), parts="weights")
    clock.now = 60
    assert manager.maybe_save(2, _state(2))
    clock.now = 110
    manager.restore(_state(0), step=1)
    clock.now = 169
    assert not manager.maybe_save(2, _state(2))
    clock.now = 170
    assert manager.maybe_save(2, _state(2))


def test_a_loop_that_goes_back_by_itself_saves_again(tmp_path):
    manager = _manager(tmp_path, save_every_steps=10)
    for step in [*range(1, 21), *range(15, 21)]:
        manager.maybe_save(step, _state(step + 1000 * (step == 20)))
    assert [manager.maybe_save(step, _state(2000 + step)) for step in (19, 20)] == [False, True]
    assert _resumed(tmp_path) == (20, 2020.0)


def test_the_last_step_of_an_epoch_and_of_the_run_is_saved_once(tmp_path):
    manager = _manager(tmp_path, save_every_steps=10, async_save=True)
    assert [manager.maybe_save(step, _state(step)) for step in (9, 10, 10, 11)] == [
        False,
        True,
        False,
        False,
    ]
    manager.close()


def test_a_step_that_was_on_the_disk_when_its_save_failed_is_no_step_left_behind(
    tmp_path, monkeypatch
):
    manager = _manager(tmp_path, save_every_steps=10, on_storage_error="warn")
    manager.save(10, _state(10))
    with monkeypatch.context() as patched:
        patched.setattr(commit_step, "_put_in_place", _refuse)
        manager.save(20, _state(20))
    assert "Input/output" in str(manager.last_failure)
    manager.save(30, _state(30))  # which puts 20 in place first
    assert [str(step.name) for step in manager.steps()] == ["1_10", "1_20", "1_30"]
    assert not any(step.abandoned for step in manager.steps())


def _refuse(*given: Any, **how: Any) -> None:
    raise OSError(5, "Input/output error")


# --- any order of what may happen ----------------------------------------------------------------


class Run:
    """A loop over a manager, beside a model of which state is on the disk."""

    def __init__(self, directory: Path, seed: int, *, asynchronous: bool) -> None:
        self.chance, self.clock = random.Random(seed), Clock()
        self.directory = directory
        self.manager = _manager(
            directory,
            save_every_steps=self.chance.choice([0, 2, 3]),
            save_every_seconds=self.chance.choice([0, 5]),
            async_save=asynchronous,
            on_storage_error="warn",
            clock=self.clock,
        )
        self.cadence = Cadence(
            self.manager._schedule._cadence.every_steps,
            self.manager._schedule._cadence.every_seconds,
        )
        self.values: dict[int, float] = {}  # of the steps on the disk
        self.newest: tuple[int, float] | None = None  # what a restart resumes from
        self.went_back: tuple[int, float] | None = None  # to a step that was named
        self.good, self.since = None, 0.0  # the step that the loop's state is on the disk as
        self.step, self.version = 1, 0
        self.highest: int | None = None

    def expected(self) -> bool:
        if self.highest is not None and self.step < self.highest:
            self.good = None
        return self.cadence.is_due(
            self.step, now=self.clock.now, last_step=self.good, last_time=self.since
        )

    def tick(self) -> None:
        self.step += 1
        self.clock.now += self.chance.random() * 4

    def maybe_save(self) -> None:
        self.version += 1
        value, due = float(self.version), self.expected()
        self._goes_on()
        assert self.manager.maybe_save(self.step, _state(value)) == due
        if due:
            self._saved(value)

    def save(self) -> None:
        self.version += 1
        self._goes_on()
        self.manager.save(self.step, _state(float(self.version)))
        self._saved(float(self.version))

    def fail(self) -> None:
        due = self.expected()
        self.manager.wait()
        self._goes_on()
        with _no_room():
            assert self.manager.maybe_save(self.step, _state(-1.0)) == due
            self.manager.wait()
        if due:
            self.highest = self.step

    def reject(self) -> None:
        self._goes_on()
        with pytest.raises(LayoutError):
            self.manager.save(self.step, _state(-1.0), extras={"x": object()})

    def restore(self) -> None:
        if self.newest is None:
            return
        step = self.chance.choice([None, *self.values])
        found = self.manager.restore(_state(0), step=step, verify=True)
        want = self.newest if step is None else (step, self.values[step])
        assert (found.step, float(found.state["params"]["w"][0])) == want
        self.went_back = want if step is not None else None
        self.good, self.since = found.step, self.clock.now
        self.step = self.highest = found.step

    def look(self) -> None:
        if self.newest is not None:
            self.manager.restore(_state(0), parts="weights")
            self.good, self.highest = None, None

    def back(self) -> None:
        self.step = max(1, self.step - self.chance.randrange(3))

    def _goes_on(self) -> None:
        """The loop goes on from the step that it restored: a restart resumes from there."""
        if self.went_back is not None:
            self.newest, self.went_back = self.went_back, None

    def _saved(self, value: float) -> None:
        self.values[self.step] = value
        self.newest = (self.step, value)
        self.good, self.since, self.highest = self.step, self.clock.now, self.step


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_what_is_due_follows_from_what_is_saved_and_good_in_any_order_of_events(
    tmp_path, seed, asynchronous, caplog
):
    caplog.set_level(logging.ERROR, "jaxshard.training")
    run = Run(tmp_path, seed, asynchronous=asynchronous)
    events = [run.tick, run.tick, run.maybe_save, run.maybe_save, run.save, run.fail]
    events += [run.reject, run.restore, run.look, run.back]
    for _ in range(60):
        run.chance.choice(events)()
    run.manager.close()
    if run.newest is not None:
        assert _resumed(tmp_path) == run.newest


def test_another_thread_may_end_a_save_at_any_time_but_only_the_step_last_tried_depends_on_it():
    """So several processes need to agree on nothing else."""
    for seed in range(200):
        chance = random.Random(seed)
        late, early = (Schedule(Cadence(2, 0.0), 0.0) for _ in range(2))
        step = 1
        for _ in range(30):
            step = max(1, step + chance.choice([-2, -1, 0, 1, 1, 2]))
            both = [one.is_due(step, 0.0) for one in (early, late)]
            assert both[0] == both[1] or step == early.tried == late.tried
            if chance.random() < 0.3:
                late.ended(saved=False)  # it ends before the next one begins
                early.began(step, 0.0)
                late.began(step, 0.0)
                early.ended(saved=False)
            elif chance.random() < 0.1:
                late.ended(saved=False)
                early.restored(step, 0.0)
                late.restored(step, 0.0)


def test_a_failure_in_the_background_is_raised_once_and_the_step_is_due_again(tmp_path):
    manager = _manager(tmp_path, save_every_steps=10, async_save=True)
    with _no_room():
        manager.maybe_save(10, _state(10))
        manager._background._thread.join()
    with pytest.raises(JaxshardError, match="saving step 1_10 failed in the background"):
        manager.maybe_save(10, _state(10))
    assert manager.maybe_save(10, _state(10))
    manager.close()
    assert _resumed(tmp_path) == (10, 10.0)


# --- how often the directory is scanned ----------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_scans_the_steps_of_the_run_once(tmp_path, monkeypatch, asynchronous):
    scans, found = [], steps._found

    def counted(run: Any) -> Any:
        scans.append(run)
        return found(run)

    with _manager(tmp_path, keep_max=2, async_save=asynchronous) as manager:
        manager.save(1, _state(1))
        manager.wait()
        monkeypatch.setattr(steps, "_found", counted)
        for step in range(2, 6):
            manager.save(step, _state(step))
    assert len(scans) == 4
    assert [s.global_step for s in manager.steps()] == [4, 5]
