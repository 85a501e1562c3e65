"""Saves in a process that is killed again and again, and a look at what is left each time.

Run as a program: a process with everything imported forks one child a trial, so that a trial
costs milliseconds. The child restores and goes on saving, and says after each save that it is
done; it is killed at a random moment: while it restores, saves, or removes. Then the newest good
step must be at least the last one that was said to be done, and be bit for bit the state of that
step.

    python tests/support/training_kills.py DIR --format ranks --kills 20 --seed 1 [--async]

``--slow`` takes a while for each file that is removed, so that kills hit removals often.

States are NumPy's, so that no device is woken before a fork.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import numpy as np

from jaxshard.core.layout import Layout, Placement
from jaxshard.training import CheckpointManager, commit_step, save_step
from jaxshard.training.run_directory import RunDirectory
from jaxshard.training.steps import find_steps

_PATIENCE = 4  # times the kills asked for, where none has yet fallen into a save

warnings.simplefilter("ignore")  # a fork beside JAX is warned of; no device is awake here

NAMES = {"model.layers.0.wq": (8, 64), "model.layers.0.wo": (64, 8), "model.norm": (64,)}
CUT = Layout(
    2,
    {
        name: (Placement((("mp", 2),), spec),)
        for base, spec in (
            ("model.layers.0.wq", (("mp",),)),
            ("model.layers.0.wo", ((), ("mp",))),
            ("model.norm", ()),
        )
        for name in (base, f"adam_m.{base}", f"adam_v.{base}")
    },
)


def state_of(step: int) -> dict[str, object]:
    """A state that tells which step it is of, in every element."""
    random_numbers = np.random.default_rng(step)

    def arrays() -> dict[str, np.ndarray]:
        return {n: random_numbers.standard_normal(s, np.float32) for n, s in NAMES.items()}

    return {
        "params": arrays(),
        "opt_state": [{"mu": arrays(), "nu": arrays(), "count": np.int32(step)}],
        "step": step,
    }


def is_state_of(state: dict[str, object], step: int) -> bool:
    want = state_of(step)
    same = state["step"] == step and state["opt_state"][0]["count"] == step
    for part, other in (
        (state["params"], want["params"]),
        (state["opt_state"][0]["mu"], want["opt_state"][0]["mu"]),
        (state["opt_state"][0]["nu"], want["opt_state"][0]["nu"]),
    ):
        same &= all(np.array_equal(part[n], other[n]) for n in NAMES)
    return bool(same)


def manager(options: argparse.Namespace) -> CheckpointManager:
    return CheckpointManager(
        options.directory,
        prefix="net",
        format=options.format,
        strategy=CUT,
        keep_max=options.keep,
        async_save=options.asynchronous,
        save_network_only=options.network,
        remove_redundancy=options.network,
        fsync=False,
        workers=1,
    )


def child(options: argparse.Namespace, pipe: int) -> None:
    """Go on saving until killed; each number said is a step that is on the disk."""
    ours = manager(options)
    found = ours.restore(state_of(0), missing_ok=True)
    step = found.step if found else 0
    os.write(pipe, b"0 ")
    while True:
        step += 1
        ours.save(step, state_of(step), extras={"at": step})
        # in the background only the one before is certain now
        os.write(pipe, b"%d " % (step - options.asynchronous))


def begun(options: argparse.Namespace) -> bytes:
    """Save a few steps; the last of them, and the seconds that each took."""
    start, number = time.perf_counter(), 3
    with manager(options) as ours:
        for step in range(1, number + 1):
            ours.save(step, state_of(step), extras={"at": step})
    return json.dumps([number, (time.perf_counter() - start) / number]).encode()


def trial(options: argparse.Namespace, said: int, *, early: bool) -> tuple[int, str, set[str]]:
    """Kill one child; the last step it said, what is wrong, and what the kill hit."""
    reader, pid = forked(lambda pipe: child(options, pipe))
    if early:  # it restores first
        time.sleep(random.random() * options.longest / 10)
    else:
        select.select([reader], [], [], 60)
        time.sleep(random.random() * options.longest)
    os.kill(pid, signal.SIGKILL)
    text, status = ended(reader, pid)
    hit = set() if text else {"restore"}
    said = max([said, *(int(n) for n in text.split())])
    if status != signal.SIGKILL:
        return said, f"the child ended by itself: {status}", hit
    text, status = ended(*forked(lambda pipe: os.write(pipe, json.dumps(look(options)).encode())))
    if status or not text:
        return said, f"looking at what is left ended with {status}", hit
    left, step, problem = json.loads(text)
    hit |= {"removal" if "removal" in reason else "save" for reason in left}
    if not problem and step < said:
        problem = f"step {step} was restored, {said} was saved"
    return max(said, step), problem, hit


def look(options: argparse.Namespace) -> tuple[list[str], int, str]:
    """Why steps are not whole, the step that is restored, and what is wrong."""
    left = [
        s.reason for s in find_steps(RunDirectory.of(options.directory)) if s.state != "complete"
    ]
    try:
        found = manager(options).restore(state_of(0), verify=True, missing_ok=True)
    except Exception as error:
        return left, 0, f"restore fails: {error}"
    if found is None:
        return left, 0, ""
    if not is_state_of(found.state, found.step) or found.extras != {"at": found.step}:
        return left, found.step, f"step {found.step} is not what was saved"
    return left, found.step, ""


def forked(work: Callable[[int], object]) -> tuple[int, int]:
    """A child that does ``work``, given the end of a pipe; the other end, and its number."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            work(writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    return reader, pid


def ended(reader: int, pid: int) -> tuple[bytes, int]:
    """All that a child said, and how it ended."""
    text = b""
    while part := os.read(reader, 1 << 16):
        text += part
    os.close(reader)
    return text, os.waitpid(pid, 0)[1]


def break_it() -> None:
    """Remove the old before the new is whole, which is what must not be done."""
    written = save_step._write_step

    def remove_first(request: save_step.SaveRequest) -> object:
        for step in find_steps(request.directory):
            if step.record:
                save_step.remove(request.directory, step.record)
        return written(request)

    save_step._write_step = remove_first


def slow_down() -> None:
    """Take a while for each file that is removed, as slow disks do."""
    delete = commit_step._delete_units

    def slowly(places: RunDirectory, units: Iterable[str]) -> None:
        for unit in units:
            delete(places, [unit])
            time.sleep(0.01)

    commit_step._delete_units = slowly


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--format", default="ranks")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=int, default=2)
    parser.add_argument("--longest", type=float, default=0.1)
    parser.add_argument("--async", dest="asynchronous", action="store_true")
    parser.add_argument("--network", action="store_true")
    parser.add_argument("--broken", action="store_true")
    parser.add_argument("--slow", action="store_true")
    options = parser.parse_args()
    random.seed(options.seed)
    if options.format == "orbax":
        import_module("jaxshard.formats.orbax")  # once, and not in every child
    if options.broken:
        break_it()
    if options.slow:
        slow_down()
    said, seconds = json.loads(ended(*forked(lambda pipe: os.write(pipe, begun(options))))[0])
    options.longest = max(options.longest, 5 * seconds)  # whatever else the machine does
    wrong: list[str] = []
    hits = {"save": 0, "removal": 0, "restore": 0}
    number = 0
    while number < options.kills or (not hits["save"] and number < _PATIENCE * options.kills):
        said, problem, hit = trial(options, said, early=number % 4 == 3)
        for what in hit:
            hits[what] += 1
        if problem:
            wrong.append(f"kill {number}: {problem}")
        number += 1
    found = {"kills": number, "saved": said, "hits": hits, "wrong": wrong}
    text, _ = ended(*forked(lambda pipe: os.write(pipe, json.dumps(tidied(options)).encode())))
    print(json.dumps({**found, "left_over": json.loads(text)}))
    return 0


def tidied(options: argparse.Namespace) -> list[str]:
    """What lies about after one more save that nobody interrupts."""
    step = 10**6
    with manager(options) as ours:
        ours.save(step, state_of(step))
    own = re.compile(r"lock|removed|strategy-\w+|\d+_\d+\.json")
    names = [p.name for p in (options.directory / ".jaxshard").iterdir()]
    steps = [p.name for p in options.directory.rglob("*.new")]
    return [n for n in names if not own.fullmatch(n)] + steps


if __name__ == "__main__":
    sys.exit(main())
