"""Saves that are killed at every call that changes a name on the disk.

    python tests/support/training_kill_points.py DIR [--format ranks,orbax] [--sample 20] [--seed 1]

An audit hook sees each rename, replacement, link, removal, new folder and file opened for writing
by any thread, and a wrapper the system's ``renameat2``. A forked process saves one step, and is
killed before the first such call, the second …, until it comes to the end. Then the newest good
step must be the one before or the new one, bit for bit, all steps before must still be there, and
one more save must leave nothing behind. ``--twice`` also kills the process that tidies up.

    new       a new step; the oldest one goes
    again     the newest step once more, with other contents
    apart     a step of a name that another job's files have

States are NumPy's, so that no device is woken before a fork.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from training_kills import CUT, break_it, ended, forked, is_state_of, state_of

from jaxshard.storage import fs
from jaxshard.training import CheckpointManager
from jaxshard.training.run_directory import RunDirectory
from jaxshard.training.steps import find_steps

SCENARIOS = ("new", "again", "apart")
_EVENTS = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.symlink"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Countdown:
    """Kills this process before the call number ``left`` that changes a name below ``below``."""

    def __init__(self, below: Path, left: int) -> None:
        self.below, self.left, self.seen = str(below), left, list[str]()

    def begin(self) -> None:
        sys.addaudithook(self._hook)
        plain = fs._function

        def function(name: str) -> Any:
            call = plain(name)
            if name != "renameat2" or call is None:
                return call

            def counted(*given: Any) -> Any:
                self._count("renameat2")
                return call(*given)

            return counted

        fs._function = function

    def _hook(self, event: str, given: tuple[Any, ...]) -> None:
        if event in _EVENTS or (event == "open" and self._is_for_writing(*given)):
            self._count(event)

    def _is_for_writing(self, path: object, mode: object, flags: object) -> bool:
        is_written = isinstance(flags, int) and flags & _WRITING
        return bool(is_written) and self.below in str(path)

    def _count(self, what: str) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        self.seen.append(what)


def manager(directory: Path, format: str, **how: Any) -> CheckpointManager:
    options = {"keep_max": 2, "save_network_only": format != "orbax"} | how
    return CheckpointManager(
        directory,
        prefix="net",
        format=format,
        strategy=CUT,
        fsync=False,
        workers=1,
        **options,
    )


def begun(directory: Path, format: str) -> None:
    """A run of two steps; for ``apart`` it is the other job's."""
    ours = manager(directory, format)
    for step in (1, 2):
        ours.save(step, state_of(step), extras={"at": step})


def saved(directory: Path, format: str, scenario: str, countdown: Countdown, pipe: int) -> None:
    """Save the step of the scenario, counting calls; all that were made, if it comes to the end."""
    ours = manager(directory, format)
    if scenario != "apart":
        ours.restore(state_of(0))
    step, value = (3, 3) if scenario == "new" else (2, 102)
    countdown.begin()
    ours.save(step, state_of(value), extras={"at": value})
    os.write(pipe, json.dumps(Counter(countdown.seen)).encode())


def looked_at(directory: Path, format: str) -> tuple[int, str]:
    """The state that is restored, and what is wrong."""
    try:
        found = manager(directory, format).restore(state_of(0), verify=True)
    except Exception as error:
        return 0, f"restore fails: {error}"
    value = found.extras.get("at", 0)
    if not is_state_of(found.state, value):
        return value, f"step {found.name} is not what was saved"
    steps = {str(s.name): s.state for s in manager(directory, format).steps(deep=True)}
    broken = [name for name, state in steps.items() if state in ("corrupt", "incomplete")]
    return value, f"{broken} are broken" if broken else ""


def tidied(directory: Path, format: str) -> str:
    """What is wrong, or lies about, after one more save that ends."""
    ours = manager(directory, format)
    ours.restore(state_of(0))
    ours.save(9, state_of(9), extras={"at": 9})
    states = [s.state for s in find_steps(RunDirectory.of(directory))]
    if set(states) != {"complete"}:
        return f"after one more save the steps are {states}"
    own = [p.name for p in (directory / ".jaxshard").iterdir()]
    strange = [n for n in own if not (n.endswith(".json") or n.startswith("strategy-"))]
    strange = [n for n in strange if n not in ("lock", "removed")]
    if "removed" in own:
        strange += os.listdir(directory / ".jaxshard/removed")
    left = [str(p) for p in directory.rglob("*.new")]
    return f"{strange + left} are left" if strange or left else ""


def in_child(work: Callable[[], object]) -> Any:
    """What ``work`` gives in a forked process, as JSON."""
    text, status = ended(*forked(lambda pipe: os.write(pipe, json.dumps(work()).encode())))
    return json.loads(text) if text else [0, f"a look at what is left ended with {status}"]


def trial(place: Path, format: str, scenario: str, at: int, twice: int | None) -> tuple[str, Any]:
    """Kill a save before call ``at``; what is wrong, and the calls if it came to the end."""
    run = place / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(place / "begun", run)
    countdown = Countdown(run, at)
    text, status = ended(*forked(lambda pipe: saved(run, format, scenario, countdown, pipe)))
    if status not in (0, signal.SIGKILL):
        return f"the save ended with {status}", None
    if twice is not None:
        again = Countdown(run, twice)

        def look() -> object:
            again.begin()
            return looked_at(run, format)

        in_child(look)
    value, problem = in_child(lambda: looked_at(run, format))
    new, old = {"new": (3, 2)}.get(scenario, (102, 2))
    if not problem and value != new and (text or value != old):
        problem = f"the state of {value} was restored"
    if not problem:
        others = scenario == "apart"
        problem = in_child(lambda: [0, (others and other_jobs(run)) or tidied(run, format)])[1]
    return problem, json.loads(text) if text else None


def other_jobs(run: Path) -> str:
    """What is wrong with the step of the other job, which no save of this one may touch."""
    found = manager(run, "ranks").restore(state_of(0), step="1_2", verify=True)
    return "" if is_state_of(found.state, 2) else "the other job's step is not as it was"


def kills(place: Path, format: str, scenario: str, options: argparse.Namespace) -> dict[str, Any]:
    """Kill saves of one kind at all calls, or at a sample of them."""
    place.mkdir(parents=True)
    in_child(lambda: begun(place / "begun", format))
    problem, calls = trial(place, format, scenario, 10**9, None)
    number = sum(calls.values())
    wrong = [f"without a kill: {problem}"] if problem else []
    points: Iterator[int] | list[int] = range(number + 5)
    if options.sample:
        points = sorted(random.sample(range(number), min(options.sample, number)))
    done = ends = 0
    for at in points:
        twice = random.randrange(12) if options.twice else None
        problem, finished = trial(place, format, scenario, at, twice)
        done += 1
        ends += finished is not None
        if problem:
            wrong.append(f"killed before call {at}: {problem}")
        print(format, scenario, at, "of", number, problem or "well", file=sys.stderr, flush=True)
    return {"calls": calls, "kills": done - ends, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--format", default="ranks,iteration,huggingface,orbax")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--broken", action="store_true", help="remove the old step first")
    options = parser.parse_args()
    if options.broken:
        break_it()
    random.seed(options.seed)
    import_module("logging").disable()
    found: dict[str, Any] = {}
    for format in options.format.split(","):
        if format == "orbax":
            import_module("jaxshard.formats.orbax")
        for scenario in SCENARIOS[: 3 if format == "ranks" else 2]:
            name = f"{format} {scenario}"
            found[name] = kills(options.directory / format / scenario, format, scenario, options)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
