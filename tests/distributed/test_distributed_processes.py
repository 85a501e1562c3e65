"""Where processes meet: threads here, over a coordinator that is a dict."""

from __future__ import annotations

import json
import threading
import time

import pytest

from jaxshard.distributed.processes import Processes
from jaxshard.errors import StorageError


class Threads:
    """A coordinator for threads of one process."""

    def __init__(self, count):
        self.count, self.values, self.places = count, {}, {}
        self.news = threading.Condition()

    def wait_at_barrier(self, name, timeout_ms, process_ids=None):
        with self.news:
            awaited = self.count if process_ids is None else len(process_ids)
            self.places[name] = self.places.get(name, 0) + 1
            self.news.notify_all()
            if not self.news.wait_for(lambda: self.places[name] == awaited, timeout_ms / 1000):
                raise TimeoutError("the barrier timed out")

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.news:
            assert key not in self.values
            self.values[key] = value
            self.news.notify_all()

    def blocking_key_value_get(self, key, timeout_ms):
        with self.news:
            if not self.news.wait_for(lambda: key in self.values, timeout_ms / 1000):
                raise TimeoutError("no such key")
            return self.values[key]

    def key_value_dir_get(self, key):
        with self.news:
            return [(k, v) for k, v in self.values.items() if k.startswith(f"{key}/")]

    def key_value_delete(self, key):
        with self.news:
            for known in [k for k in self.values if k == key or k.startswith(f"{key}/")]:
                del self.values[known]


class Job:
    """Threads that play processes; each counts its meetings by itself."""

    def __init__(self, monkeypatch, count=3, timeout_s=5.0):
        self.coordinator, self.count, self.timeout_s = Threads(count), count, timeout_s
        met = threading.local()

        class Met(dict):  # what is one dict in a process is one for each thread here
            def get(self, key, default):
                return met.__dict__.get(key, default)

            def __setitem__(self, key, value):
                met.__dict__[key] = value

        monkeypatch.setattr("jaxshard.distributed.processes._MET", Met())

    def run(self, work):
        """What ``work`` gives, or raises, in each process."""
        found = {}

        def one(index):
            own = Processes(index, self.count, self.coordinator, self.timeout_s)
            try:
                found[index] = work(own)
            except Exception as error:
                found[index] = error

        threads = [threading.Thread(target=one, args=(i,)) for i in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[i] for i in range(self.count)]


@pytest.fixture
def job(monkeypatch):
    return Job(monkeypatch)


def test_alone_nobody_is_waited_for():
    alone = Processes()
    assert alone.broadcast("x", lambda: "said") == "said"
    assert alone.all_gather("x", "heard") == ["heard"]
    alone.barrier("x")
    with pytest.raises(ZeroDivisionError), alone.together("x"):
        raise ZeroDivisionError
    assert not alone.are_several


def test_all_hear_what_each_says_and_what_process_0_decides(job):
    def work(own):
        with own.together("counting") as meeting:
            meeting.sent = str(own.index)
        chosen = own.broadcast("choosing", lambda: f"as {own.index} says")
        return meeting.received, chosen, own.all_gather("again", "x" * own.index)

    assert job.run(work) == [(["0", "1", "2"], "as 0 says", ["", "x", "xx"])] * 3


def test_what_fails_in_one_process_all_hear_and_the_next_meeting_is_in_step(job):
    def work(own):
        heard = None
        try:
            with own.together("writing"):
                if own.index == 1:
                    raise AssertionError("no room")
        except (StorageError, AssertionError) as error:
            heard = str(error)
        own.barrier("writing")
        return heard

    heard = job.run(work)
    assert "1 of 3 processes failed: process 1: AssertionError: no room" in heard[0]
    assert heard[2] == heard[0]
    assert heard[1].startswith("no room")


def test_what_process_0_cannot_do_the_others_hear(job):
    def work(own):
        def make():
            raise OSError(28, "No space left on device")

        return own.about("out").broadcast("beginning", make)

    first, *others = job.run(work)
    assert isinstance(first, OSError)
    for other in others:
        assert "out: beginning: process 0 failed: OSError: [Errno 28] No space" in str(other)


def test_who_does_not_come_is_named_in_time(monkeypatch):
    def work(own):
        if own.index == 2:
            return "gone"
        return own.about("out").barrier("writing")

    begun = time.monotonic()
    first, second, _ = Job(monkeypatch, timeout_s=0.2).run(work)
    for error in (first, second):
        assert "out: writing: 1 of 3 processes did not arrive within 0.2 s: 2" in str(error)
    assert time.monotonic() - begun < 3


def test_meetings_apart_do_not_count_for_each_other(job):
    """A save in the background and one beside it: each is in step with its own kind."""

    def work(own):
        behind = own.apart("background")
        for _ in range(own.index):  # they begin the one and the other in any order
            time.sleep(0.01)
        found = []
        mine = threading.Thread(
            target=lambda: found.append(behind.all_gather("x", f"b{own.index}"))
        )
        if own.index % 2:
            mine.start()
            found.append(own.all_gather("x", f"f{own.index}"))
        else:
            found.append(own.all_gather("x", f"f{own.index}"))
            mine.start()
        mine.join()
        return sorted(found)

    assert job.run(work) == [[["b0", "b1", "b2"], ["f0", "f1", "f2"]]] * 3


def test_what_was_said_does_not_pile_up_at_the_coordinator(job):
    def work(own):
        for number in range(200):
            own.broadcast("each step", lambda number=number: str(number))
            if number % 10 == 9:
                own.barrier("now and then")

    assert job.run(work) == [None] * 3
    assert len(job.coordinator.values) < 80
    assert all(json.loads(value) is not None for value in job.coordinator.values.values())


def test_some_of_the_processes_meet_without_the_others(job):
    def work(processes):
        if processes.index == 1:
            return processes.of({0, 2}).all_gather("loading", "not one of them")
        few = processes.of({2, 0})
        return (
            few.members,
            few.all_gather("loading", str(few.index)),
            few.broadcast("who", lambda: "zero"),
        )

    with_two = ((0, 2), ["0", "2"], "zero")
    assert job.run(work) == [with_two, ["not one of them"], with_two]


def test_an_absent_one_of_some_processes_is_named_by_its_number(monkeypatch):
    job = Job(monkeypatch, timeout_s=0.2)
    found = job.run(lambda p: p.of({1, 2}).all_gather("loading") if p.index == 1 else None)
    assert "1 of 2 processes did not arrive within 0.2 s: 2." in str(found[1])


def test_a_failure_among_some_processes_is_heard_by_those_alone(job):
    def work(processes):
        with processes.of({0, 1}).together("loading"):
            if processes.index == 1:
                raise ValueError("no such file")
        return "well"

    found = job.run(work)
    assert "1 of 2 processes failed: process 1: ValueError: no such file" in str(found[0])
    assert isinstance(found[1], ValueError)
    assert found[2] == "well"
