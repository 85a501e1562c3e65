"""Several JAX processes on this machine: started, waited for, their answers collected.

A test names a function of a module in this folder. Every process imports it, joins the
others over loopback, calls it, and answers with what it returns (as JSON).

One process that has imported everything, and woken no device, forks all of them: so a job costs
what it does, and not what importing costs.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_MARK = "ANSWER "
_HEAVY = ("jaxshard.loader", "jaxshard.saver", "jaxshard.resharding", "jaxshard.training")
_nursery: subprocess.Popen[str] | None = None


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
    environ: dict[str, str] | None = None,
    heartbeat_s: int = 100,
    fresh: bool = False,
) -> list[Ended]:
    """How each of ``count`` processes of ``devices`` devices ended ``module:function``.

    ``fresh`` ones are interpreters of their own, in which sets have other orders.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        told = [
            {
                "target": target,
                "index": i,
                "count": count,
                "devices": devices,
                "port": port,
                "heartbeat_s": heartbeat_s,
                "arguments": arguments,
                "environ": environ or {},
                "log": str(Path(folder) / f"{i}.log"),
            }
            for i in range(count)
        ]
        job = {"processes": told, "timeout_s": timeout_s}
        statuses = _apart(job) if fresh else _ask(job)
        return [_ended(status, Path(t["log"])) for status, t in zip(statuses, told, strict=True)]


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


def leave(answer: Any) -> None:
    """Answer and end, without waiting for processes that are dead."""
    print(_MARK + json.dumps(answer), flush=True)
    if json.loads(os.environ["JAXSHARD_TEST_PROCESS"])["index"] == 0:
        time.sleep(2)  # JAX ends the others when this one is gone, and they want to answer too
    os._exit(0)


def _ask(job: dict[str, Any]) -> list[int]:
    """Have a job done; how each of its processes ended."""
    global _nursery  # noqa: PLW0603 - one for all tests
    if _nursery is None or _nursery.poll() is not None:
        _nursery = subprocess.Popen(
            [sys.executable, "-c", "import processes; processes.nursery()"],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(_close, _nursery)
    assert _nursery.stdin is not None
    assert _nursery.stdout is not None
    _nursery.stdin.write(json.dumps(job) + "\n")
    _nursery.stdin.flush()
    return list(json.loads(_nursery.stdout.readline()))


def _apart(job: dict[str, Any]) -> list[int]:
    """Have a job done by processes that share nothing."""
    born = [
        subprocess.Popen(
            [sys.executable, "-c", "import processes; processes.alone()"],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "PYTHONHASHSEED": str(number + 1),
                "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
                "JAXSHARD_TEST_PROCESS": json.dumps(told),
            },
        )
        for number, told in enumerate(job["processes"])
    ]
    until = time.monotonic() + job["timeout_s"]
    for process in born:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    return [process.wait() for process in born]


def _close(nursery: subprocess.Popen[str]) -> None:
    for pipe in (nursery.stdin, nursery.stdout):
        assert pipe is not None
        pipe.close()
    nursery.wait(10)


def _ended(status: int, log: Path) -> Ended:
    output = log.read_text()
    answer = [json.loads(line[len(_MARK) :]) for line in output.splitlines() if _MARK in line[:7]]
    return Ended(status, output, answer[-1] if answer else None)


# --- in the process that forks -------------------------------------------------------


def nursery() -> None:
    """Do the jobs that are asked for on standard input, one after the other."""
    warnings.simplefilter("ignore")  # a fork beside JAX is warned of; no device is awake here
    for module in _HEAVY:
        import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        born = []
        for told in job["processes"]:
            pid = os.fork()
            if pid == 0:
                _live(told)
                sys.exit(0)  # by way of what JAX does at the end
            born.append(pid)
        print(json.dumps(_wait(born, job["timeout_s"])), flush=True)


def alone() -> None:
    """Do what the environment says."""
    _live(json.loads(os.environ["JAXSHARD_TEST_PROCESS"]))


def _live(told: dict[str, Any]) -> None:
    """What each process runs."""
    with open(told["log"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.close(0)
    warnings.simplefilter("default")
    os.environ.update(told["environ"], JAXSHARD_TEST_PROCESS=json.dumps(told))
    import jax  # noqa: PLC0415

    jax.config.update("jax_num_cpu_devices", told["devices"])
    jax.distributed.initialize(
        f"127.0.0.1:{told['port']}",
        num_processes=told["count"],
        process_id=told["index"],
        heartbeat_timeout_seconds=told["heartbeat_s"],
    )
    module, name = told["target"].split(":")
    answer = getattr(import_module(module), name)(told["index"], told["count"], *told["arguments"])
    print(_MARK + json.dumps(answer), flush=True)


def _wait(born: Sequence[int], timeout_s: float) -> list[int]:
    ended: dict[int, int] = {}
    until = time.monotonic() + timeout_s
    while len(ended) < len(born):
        for pid in born:
            if pid not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                ended[pid] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > until:
            for pid in set(born) - set(ended):
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
        time.sleep(0.01)
    return [ended[pid] for pid in born]
