"""Restores in one process while another saves and removes steps in the same run.

    python tests/support/training_beside.py DIR --format ranks,orbax --restores 1000 [--again]

The saving process keeps ``--keep`` steps, so there is a complete one at all times; with
``--again`` it goes back every few steps, and saves the same names with other contents. Every
restore must give one step as it was saved, and none that is older than the one before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
from training_kills import CUT, NAMES, forked

from jaxshard.training import CheckpointManager


def state_of(value: int) -> dict[str, object]:
    """A state that tells in every element which save it is of."""
    return {"params": {n: np.full(s, value, np.float32) for n, s in NAMES.items()}, "step": value}


def value_of(state: dict[str, object]) -> int | None:
    """Which save the whole of ``state`` is of; None if it is of several."""
    values = {int(v) for w in state["params"].values() for v in np.unique(w)}
    return values.pop() if values == {state["step"]} else None


def manager(options: argparse.Namespace, **how: object) -> CheckpointManager:
    strategy = {"strategy": CUT} if options.format in ("ranks", "iteration") else {}
    return CheckpointManager(
        options.directory,
        prefix="net",
        format=options.format,
        keep_max=options.keep,
        fsync=False,
        workers=1,
        **strategy,
        **how,
    )


def save_for_ever(options: argparse.Namespace, pipe: int) -> None:
    ours, step, value = manager(options), 0, 0
    while True:
        step, value = step + 1, value + 1
        if options.again and value % 5 == 0:
            step -= 2
        ours.save(step, state_of(value), extras={"value": value})
        if value == 2:
            os.write(pipe, b"begun")


def restores(options: argparse.Namespace) -> dict[str, object]:
    """How often each kind of answer came."""
    reader, pid = forked(lambda pipe: save_for_ever(options, pipe))
    os.read(reader, 5)
    answers: Counter[str] = Counter()
    newest, passed, start = 0, 0, time.monotonic()
    try:
        for _ in range(options.restores):
            try:
                found = manager(options).restore(state_of(0), verify=options.verify)
            except Exception as error:
                answers[f"{type(error).__name__}: {error}"[:400]] += 1
                continue
            value = value_of(found.state)
            passed += len(found.passed_over)
            if value is None or found.extras != {"value": value}:
                answers["mixed"] += 1
            elif value < newest:
                answers["older than the one before"] += 1
            else:
                answers["good"] += 1
            newest = max(newest, value or 0)
    finally:
        os.kill(pid, signal.SIGKILL)
        if os.waitpid(pid, 0)[1] != signal.SIGKILL:
            answers["the saving process had failed"] += 1
        os.close(reader)
    seconds = time.monotonic() - start
    return {"answers": answers, "saved": newest, "passed_over": passed, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--format", default="ranks")
    parser.add_argument("--restores", type=int, default=100)
    parser.add_argument("--keep", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    options = parser.parse_args()
    import_module("logging").disable()
    top, found = options.directory, {}
    for name in options.format.split(","):
        if name == "orbax":
            import_module("jaxshard.formats.orbax")
        options.directory, options.format = top / name, name
        found[name] = restores(options)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
