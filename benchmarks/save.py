"""Saving sharded arrays as a Hugging Face folder, against ``cp`` of the bytes written.

A Llama-shaped model (1.7 GB of bfloat16) lies on 8 CPU devices as dp2mp4. In one process it
is saved again and again; every save alternates with a ``cp -r`` of what it wrote, both to
folders that did not exist, and the first save is compared with the source bit by bit.

    python benchmarks/save.py [--smoke] [--rounds 7] [--save]

``cp`` does not wait for the disk; ``durable`` does, and is set against ``cp`` and ``sync``.
Asserted are the answer, and that a save adds no more memory than its budget.
"""

# ruff: noqa: PLC0415 - JAX reads its environment once, so it is set before the import

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import measure
from models import SMOKE, Llama, write_llama

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")


_HOST_BYTES = 256 << 20  # the default budget of a save


def timed(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds ``work`` takes, and the most anonymous memory it adds."""
    peak = _Peak()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start, peak.stop()


class _Peak:
    """The most anonymous memory added, looked at every 10 ms."""

    def __init__(self) -> None:
        self._start = self._most = _anon()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.01):
            self._most = max(self._most, _anon())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._most, _anon()) - self._start


def _anon() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) << 10


def compare(scratch: Path, model: Llama, rounds: int) -> dict[str, Any]:
    """Medians of saving and of copying, and their ratios."""
    from jaxshard.api import verify
    from jaxshard.loader import load
    from jaxshard.saver import save

    source, saved, copied = scratch / "source", scratch / "saved", scratch / "copied"
    write_llama(source, model)
    tree = load(source, "dp2mp4")
    size = -(-model.num_bytes // 4)
    save(tree, saved, max_shard_size=size, fsync=False)
    verdict = verify(saved, against=source)
    assert not verdict.problems, verdict.problems
    cases: dict[str, Callable[[], object]] = {
        "cp": lambda: subprocess.run(["cp", "-r", saved, copied], check=True),
        "cp and sync": lambda: (
            subprocess.run(["cp", "-r", saved, copied], check=True),
            subprocess.run(["sync", "-f", copied], check=True),
        ),
        "save": lambda: save(tree, copied, max_shard_size=size, fsync=False),
        "save, durable": lambda: save(tree, copied, max_shard_size=size),
        "save by rank": lambda: save(
            tree, copied, format="ranks", remove_redundancy=True, fsync=False
        ),
    }
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            measure.remove(copied)
            if model is not SMOKE:
                measure.wait_for_quiet(limit_s=4.0)
                measure.touch_memory(6 << 30)  # last: what is given back goes cold again
            taken[name].append(timed(cases[name]))
    added = max(peak for name in cases if "save" in name for _, peak in taken[name])
    assert added <= _HOST_BYTES, f"a save added {added} bytes of memory"
    wall = {name: median(seconds for seconds, _ in samples) for name, samples in taken.items()}
    against = {"cp": "cp", "cp and sync": "cp and sync", "save, durable": "cp and sync"}
    return {
        name: {
            "wall_s": round(wall[name], 3),
            "ratio": round(wall[name] / wall[against.get(name, "cp")], 3),
            "against": against.get(name, "cp"),
            "peak_added_anon_mib": max(peak for _, peak in samples) >> 20,
            "all_wall_s": [round(seconds, 3) for seconds, _ in samples],
        }
        for name, samples in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="keep the result with this machine's")
    options = parser.parse_args()
    model = SMOKE if options.smoke else Llama()
    with tempfile.TemporaryDirectory(prefix="jaxshard-save-") as scratch:
        found = compare(Path(scratch), model, 1 if options.smoke else options.rounds)
        report = {
            "bytes": model.num_bytes,
            "file_system": measure.file_system(Path(scratch)),
            "load_average": measure.load(),
            **found,
        }
    print(json.dumps({"machine": measure.machine(), **report}, indent=1))
    if options.save:
        print(measure.save("save", report))


if __name__ == "__main__":
    main()
