"""Loads and conversions from an object store, beside raw requests and download-then-load.

A server on the loopback, in a process of its own, answers each request after a latency and sends
with a rate per connection: model A 20 ms and 200 MB/s, model B 50 ms and 50 MB/s, 1 GB/s in all.

    python benchmarks/remote.py [--smoke] [--bytes 1700000000] [--rounds 3] [--only load,convert]

raw       the same bytes, fetched by obstore in requests of 4 MiB, 64 in flight, into new memory
load      js.load(…, "dp2mp4") on 8 CPU devices
download  huggingface_hub's snapshot_download, then js.load of the folder
convert   js.convert from the store to a local folder
copy      raw reads from the store and raw writes to it: file by file, read in requests of 4 MiB and
          sent by obstore in parts of 8 MiB, 16 at once
store     js.convert from the store to the store

Rounds are interleaved; ratios are of medians. What is loaded is compared bit by bit.
"""

# ruff: noqa: PLC0415 - JAX and the Hub read their environment once, so it is set before the import

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import measure
import models

MODELS = {"A": (0.02, 200e6), "B": (0.05, 50e6)}
_SERVER = Path(__file__).parent.parent / "tests/support/object_server.py"
_REQUEST = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny case, quickly")
    parser.add_argument("--bytes", type=int, default=1_700_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="raw,load,download,convert,copy,store")
    parser.add_argument("--save", action="store_true", help="keep the results with the project's")
    given = parser.parse_args()
    if given.smoke:
        given.rounds = 1
    results: dict[str, object] = {"load_before": measure.load()}
    print(measure.machine())
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        models.write_llama(
            place / "model", models.SMOKE if given.smoke else models.llama_of(given.bytes)
        )
        for model, (latency, rate) in MODELS.items():
            with _serving(place / "model", latency, rate) as address:
                command = [sys.executable, __file__, "--inside", address, str(place)]
                command += [str(given.rounds), given.only, model]
                subprocess.run(command, check=True, env=_environment(address))
            results[model] = json.loads((place / f"{model}.json").read_bytes())
    results["load_after"] = measure.load()
    if given.save:
        print(f"kept in {measure.save('remote', results)}")


class _serving:
    """The server's process."""

    def __init__(self, folder: Path, latency: float, rate: float) -> None:
        options = [f"--latency={latency}", f"--per-connection={rate}", "--total=1e9"]
        self._process = subprocess.Popen(
            [sys.executable, str(_SERVER), *options, f"model={folder}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


def _environment(address: str) -> dict[str, str]:
    return os.environ | {
        "AWS_ENDPOINT": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_REGION": "us-east-1",
        "HF_ENDPOINT": address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
    }


def inside(address: str, place: Path, rounds: int, only: list[str], model: str) -> None:
    """Measure in a process whose environment refers to the server."""
    import jax
    import numpy as np

    import jaxshard as js

    local = js.load(place / "model", "dp2mp4")
    files = sorted((place / "model").glob("*.safetensors"))
    num_bytes = sum(f.stat().st_size for f in files)

    def load() -> object:
        return jax.block_until_ready(js.load("s3://model", "dp2mp4"))

    def download() -> object:
        from huggingface_hub import snapshot_download

        cache = place / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        folder = snapshot_download("org/model", cache_dir=cache)
        return jax.block_until_ready(js.load(folder, "dp2mp4"))

    def convert() -> None:
        js.convert("s3://model", place / "out", overwrite=True, fsync=False)

    def store() -> None:
        js.convert("s3://model", "s3://results/out", overwrite=True)

    verbs: dict[str, Callable[[], Any]] = {
        "copy": lambda: _copied(files),
        "store": store,
        "raw": lambda: _raw(files),
        "load": load,
        "download": download,
        "convert": convert,
    }
    taken: dict[str, list[float]] = {name: [] for name in only}
    for number in range(rounds + 1):
        for name in only if number % 2 else reversed(only):
            start = time.perf_counter()
            made = verbs[name]()
            seconds = time.perf_counter() - start
            if isinstance(made, dict) and not number:
                for tensor, array in local.items():
                    ours, theirs = (np.asarray(a).view(np.uint8) for a in (made[tensor], array))
                    np.testing.assert_array_equal(ours, theirs, err_msg=tensor)
            del made
            if number or rounds == 1:  # the first round opens connections
                taken[name].append(seconds)
    print(f"model {model}: {MODELS[model][0] * 1e3:.0f} ms, {MODELS[model][1] / 1e6:.0f} MB/s a "
          f"connection, {num_bytes / 1e6:.0f} MB")  # fmt: skip
    measured = {"bytes": num_bytes, "latency_s": MODELS[model][0], "seconds": taken}
    (place / f"{model}.json").write_text(json.dumps(measured))
    base = median(taken[only[0]])
    for name, seconds in taken.items():
        middle = median(seconds)
        print(
            f"  {name:9}{middle:7.2f} s{num_bytes / middle / 1e6:7.0f} MB/s{middle / base:7.2f} x"
        )


def _raw(files: list[Path]) -> list[object]:
    """Fetch all bytes of the weight files into new memory."""
    import numpy as np
    import obstore
    from obstore.store import from_url

    store = from_url("s3://model", client_options={"allow_http": True})
    memory = {f.name: np.empty(f.stat().st_size, np.uint8) for f in files}

    def fetch(part: tuple[str, int]) -> None:
        name, start = part
        stop = min(start + _REQUEST, len(memory[name]))
        data = obstore.get(store, name, options={"range": (start, stop)}).bytes()
        memory[name][start:stop] = np.frombuffer(data, np.uint8)

    parts = [(n, at) for n, m in memory.items() for at in range(0, len(m), _REQUEST)]
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(fetch, parts))
    return list(memory.values())


def _copied(files: list[Path]) -> None:
    """Copy the weight files inside the store, by way of memory."""
    import obstore
    from obstore.store import from_url

    store = from_url("s3://model", client_options={"allow_http": True})
    results = from_url("s3://results", client_options={"allow_http": True})
    with ThreadPoolExecutor(64) as pool:
        for file in files:
            size = file.stat().st_size

            def fetch(start: int, name: str = file.name, size: int = size) -> object:
                part = (start, min(start + _REQUEST, size))
                return obstore.get(store, name, options={"range": part}).bytes()

            parts = pool.map(fetch, range(0, size, _REQUEST))
            how = {"chunk_size": 8 << 20, "max_concurrency": 16}
            obstore.put(results, f"copy/{file.name}", parts, **how)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        address, folder, rounds, only, model = sys.argv[2:]
        inside(address, Path(folder), int(rounds), only.split(","), model)
    else:
        main()
