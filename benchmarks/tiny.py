"""Tens of thousands of tiny tensors in one file, beside the safetensors library.

Where a tensor has a few bytes, what counts is the work for each tensor. CPU time of this process,
threads included, is compared for loading onto a device (``load_file`` and ``device_put`` of each
array), saving (``save_file`` of each array brought to NumPy), converting (``load_file`` and
``save_file``) and opening (``load_file``).

    python benchmarks/tiny.py [--smoke] [--tensors 60000] [--rounds 5] [--only inspect,convert]

Each round takes ours and theirs in turns, every other round backwards; ratios are of medians. What
is loaded and written is compared bit by bit. Asserted are the answers, and no times.
"""

# ruff: noqa: PLC0415 - JAX reads its environment once, so it is set before the import

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import measure

os.environ.setdefault("JAX_PLATFORMS", "cpu")

_ELEMENTS = 3
_MOST = {"load": 1.5, "save": 2.0, "convert": 2.0, "inspect": 1.0}  # what there should be at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny case, quickly")
    parser.add_argument("--tensors", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(_MOST), help="which comparisons, by commas")
    parser.add_argument("--dir", help="a folder on the disk to measure")
    asked = parser.parse_args()
    if asked.smoke:
        asked.tensors, asked.rounds = 300, 1
    logging.getLogger("jaxshard").setLevel(logging.ERROR)  # there is no config.json, on purpose
    print(f"{measure.machine()}; {asked.tensors} tensors of {4 * _ELEMENTS} bytes")
    with tempfile.TemporaryDirectory(dir=asked.dir) as name:
        pairs = _pairs(Path(name), asked.tensors)
        for what in asked.only.split(","):
            ours, theirs = pairs[what]
            print(f"{what:8}{_compared(ours, theirs, asked.rounds)}, wanted {_MOST[what]} x")


def _compared(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> str:
    """The CPU seconds of both, and the ratio of their medians."""
    taken: dict[Callable[[], float], list[float]] = {ours: [], theirs: []}
    for number in range(rounds + 1):
        for work in (ours, theirs) if number % 2 else (theirs, ours):
            seconds = work()
            if number or rounds == 1:  # the first round imports and compiles
                taken[work].append(seconds)
    a, b = median(taken[ours]), median(taken[theirs])
    return f"{a:8.2f} s of CPU, safetensors {b:.2f} s: {a / b:.2f} x"


def _cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    made = work()
    return time.process_time() - start, made


def _pairs(place: Path, num_tensors: int) -> dict[str, tuple[Callable[[], float], ...]]:
    """For each comparison, what takes ours and what takes theirs."""
    import jax
    import numpy as np
    from safetensors.numpy import load_file, save_file

    import jaxshard as js

    source, device = place / "model.safetensors", jax.devices()[0]
    tensors = {f"block.{i}.w": np.full(_ELEMENTS, i, np.float32) for i in range(num_tensors)}
    save_file(tensors, source)
    ours_to, theirs_to = place / "ours", place / "theirs.safetensors"

    def put() -> dict[str, jax.Array]:
        found = {k: jax.device_put(v, device) for k, v in load_file(source).items()}
        return jax.block_until_ready(found)

    def check(arrays: dict[str, Any]) -> None:
        assert len(arrays) == num_tensors
        for i in range(0, num_tensors, max(1, num_tensors // 100)):
            value = np.asarray(arrays[f"block.{i}.w"])
            assert value.tobytes() == np.full(_ELEMENTS, i, np.float32).tobytes()

    def load() -> float:
        seconds, arrays = _cpu(lambda: jax.block_until_ready(js.load(source, device)))
        check(arrays)
        return seconds

    def writing(work: Callable[[], Any]) -> float:
        shutil.rmtree(ours_to, ignore_errors=True)
        seconds, _ = _cpu(work)
        check(load_file(ours_to / "model.safetensors"))
        return seconds

    def save() -> float:
        arrays = put()  # anew each time: an array keeps what was brought to NumPy
        return writing(lambda: js.save(arrays, ours_to, fsync=False))

    def theirs_save() -> float:
        arrays = put()
        return _cpu(lambda: save_file({k: np.asarray(v) for k, v in arrays.items()}, theirs_to))[0]

    return {
        "load": (load, lambda: _cpu(put)[0]),
        "save": (save, theirs_save),
        "convert": (
            lambda: writing(lambda: js.convert(source, ours_to, fsync=False)),
            lambda: _cpu(lambda: save_file(load_file(source), theirs_to))[0],
        ),
        "inspect": (
            lambda: _cpu(lambda: js.open(source))[0],
            lambda: _cpu(lambda: load_file(source))[0],
        ),
    }


if __name__ == "__main__":
    main()
