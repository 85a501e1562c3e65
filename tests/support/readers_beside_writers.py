"""Reads beside a writer that replaces the checkpoint all the time: one version or an error.

    python tests/support/readers_beside_writers.py [--reads 5000] [--format NAME]

The writer publishes checkpoints whose elements are all 1, or all 2: by jaxshard with
``overwrite=True``, or as a program that writes into one file in place. Of several files written
in place the first are new and the others old for a while, and no file changes: nothing tells
such a state from a checkpoint, so it is not tried.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import checkpoints
import numpy as np

import jaxshard as js
from jaxshard.conversion.load_rank import load_rank

FORMATS = {
    "huggingface": ("full", {}),
    "ranks": ("dp1mp2", {}),
    "ckpt ranks": ("dp1mp2", {"format": "ckpt", "crc": True}),
    "ckpt": ("full", {"format": "ckpt"}),
    "unified": ("full", {"format": "unified"}),
    "iteration": ("dp1mp2", {"format": "iteration"}),
    "orbax": ("full", {"format": "orbax"}),
}

IN_ONE_FILE = ("huggingface", "ckpt", "unified")


def _write(folder: Path, fmt: str, how: str, seconds: float) -> None:
    logging.disable(logging.WARNING)
    to, options = FORMATS[fmt]
    until = time.time() + seconds
    for number in itertools.count():
        if time.time() > until or os.getppid() == 1:
            return
        source = folder / f"hf{number % 2}"
        if how == "publish":
            js.convert(source, folder / "live", to, overwrite=True, fsync=False, **options)
            continue
        made = folder / f"made{number % 2}"
        for path in (p for p in made.rglob("*") if p.is_file()):
            target = folder / "live" / path.relative_to(made)
            with open(target, "r+b" if target.exists() else "wb") as file:
                file.write(path.read_bytes())
                file.truncate()
        time.sleep(0.003)


def run(fmt: str, how: str, reads: int, max_seconds: float) -> Counter[str]:
    """Read ``reads`` times beside the writer; how the reads ended."""
    folder = Path(tempfile.mkdtemp(prefix="readers-"))
    ended: Counter[str] = Counter()
    logging.disable(logging.WARNING)
    try:
        to, options = FORMATS[fmt]
        for number in (0, 1):
            arrays = checkpoints.llama_arrays(layers=2, hidden=32, vocab=256)
            filled = {n: np.full(a.shape, number + 1, np.float32) for n, a in arrays.items()}
            config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False}
            checkpoints.write_folder(folder / f"hf{number}", filled, config=config, num_files=2)
            made = folder / f"made{number}"
            js.convert(folder / f"hf{number}", made, to, fsync=False, **options)
        shutil.copytree(folder / "made0", folder / "live")
        context = multiprocessing.get_context("spawn")
        writer = context.Process(target=_write, args=(folder, fmt, how, max_seconds), daemon=True)
        writer.start()
        until = time.time() + max_seconds
        while sum(ended.values()) < reads and time.time() < until:
            try:
                arrays = load_rank(folder / "live", "full")
            except js.JaxshardError as error:
                ended[type(error).__name__] += 1
                continue
            values = {float(v) for a in arrays.values() for v in np.unique(a)}
            ended["MIXED" if len(values) != 1 else f"all {values.pop():.0f}"] += 1
        writer.terminate()
        writer.join()
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder, ignore_errors=True)
    return ended


def main() -> int:
    """Print how the reads of every format ended; 1 if one was a mixture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reads", type=int, default=5000)
    parser.add_argument("--format", choices=FORMATS, default=None)
    parser.add_argument("--seconds", type=float, default=600)
    given = parser.parse_args()
    mixed = 0
    for fmt in [given.format] if given.format else FORMATS:
        for how in ("publish", "in place") if fmt in IN_ONE_FILE else ("publish",):
            ended = run(fmt, how, given.reads, given.seconds)
            mixed += ended["MIXED"]
            print(f"{fmt}, {how}: {sum(ended.values())} reads: {dict(ended)}", flush=True)
    return 1 if mixed else 0


if __name__ == "__main__":
    raise SystemExit(main())
