"""Several JAX processes on this machine: started, waited for, their answers collected.

A test names a function of a module in this folder. Every process imports it, joins the
others over loopback, calls it, and answers with what it returns (as JSON).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_MARK = "ANSWER "


@dataclass(frozen=True)
class Ended:
    """How one process ended; ``answer`` is None if it gave none."""

    status: int
    output: str
    answer: Any


def run_processes(
    target: str,
    count: int,
    devices: int,
    *arguments: Any,
    timeout_s: float = 120,
    distributed: bool = True,
    environ: dict[str, str] | None = None,
) -> list[Ended]:
    """How each of ``count`` processes of ``devices`` devices ended ``module:function``."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.log" for i in range(count)]
        started = []
        for i, log in enumerate(logs):
            told = {
                "target": target,
                "index": i,
                "count": count,
                "port": port if distributed else None,
                "arguments": arguments,
            }
            env = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAXSHARD_TEST_PROCESS": json.dumps(told),
                "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
                **(environ or {}),
            }
            command = [sys.executable, "-c", "import processes; processes.child()"]
            with log.open("w") as out:
                started.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
        _wait(started, timeout_s)
        return [_ended(p.returncode, log) for p, log in zip(started, logs, strict=True)]


def answers(ended: Sequence[Ended]) -> list[Any]:
    """What the processes answered; the output of those that failed, otherwise."""
    failed = [f"process {i} ended with {e.status}:\n{e.output}" for i, e in enumerate(ended)]
    assert all(e.status == 0 for e in ended), "\n".join(failed)
    return [e.answer for e in ended]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def child() -> None:
    """What each process runs."""
    told = json.loads(os.environ["JAXSHARD_TEST_PROCESS"])
    if told["port"] is not None:
        import jax  # noqa: PLC0415

        jax.distributed.initialize(
            f"127.0.0.1:{told['port']}", num_processes=told["count"], process_id=told["index"]
        )
    module, name = told["target"].split(":")
    answer = getattr(import_module(module), name)(told["index"], told["count"], *told["arguments"])
    print(_MARK + json.dumps(answer), flush=True)


def leave(answer: Any) -> None:
    """Answer and end, without waiting for processes that are dead."""
    print(_MARK + json.dumps(answer), flush=True)
    if json.loads(os.environ["JAXSHARD_TEST_PROCESS"])["index"] == 0:
        time.sleep(3)  # JAX ends the others when this one is gone, and they want to answer too
    os._exit(0)


def _wait(started: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    try:
        for process in started:
            process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()


def _ended(status: int, log: Path) -> Ended:
    output = log.read_text()
    answer = [json.loads(line[len(_MARK) :]) for line in output.splitlines() if _MARK in line[:7]]
    return Ended(status, output, answer[-1] if answer else None)
