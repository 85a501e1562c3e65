"""Mapped loads against plain ones, and LoRA merges against ``cp``.

    python benchmarks/mapping.py [--gigabytes 1.7] [--rounds 5] [--dir DISK] [--save] [--smoke]

load    a Llama-shaped folder goes onto 8 CPU devices as dp2mp4, as it is; then with q, k, v
        and gate, up fused, every matrix transposed, and all layers stacked. Every sample is a
        fresh process that loads several times, the two in turns.
merge   adapters of rank 16 on every linear layer are merged file to file by ``jaxshard lora``,
        against ``cp -r`` of the output, at equal durability (no fsync on either side).

Answers are compared with NumPy's, by code that shares nothing with jaxshard; bytes read and
peak memory are asserted where they are promised. Times are told, not asserted.
"""

# ruff: noqa: PLC0415 - the parent imports no JAX, so that it takes no time from its samples

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import measure
import numpy as np
from measure import Sample
from models import SMOKE, Llama, llama_of, write_llama
from safetensors import safe_open
from safetensors.numpy import save_file

_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
_L = "model.layers.{layer}."
_RANK = 16
_ALPHA = 32
_BUDGET_BYTES = 256 << 20
_SLACK_BYTES = 100_000_000  # beside the budget: the interpreter, NumPy, the plan
_REAL_BYTES = 10**9
_LINEAR = (
    *(f"self_attn.{x}_proj" for x in "qkvo"),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
)


# --- a sample of load -------------------------------------------------------------------


def fused(model: Llama) -> Any:
    """The mapping to a scanned model of fused kernels."""
    from jaxshard.mapping import Fuse, Mapping, Stack, Transpose

    qkv = tuple(f"{_L}self_attn.{x}_proj.weight" for x in "qkv")
    gate = tuple(f"{_L}mlp.{x}_proj.weight" for x in ("gate", "up"))
    return Mapping(
        (
            Fuse(qkv, _L + "qkv", (model.heads // model.kv_heads, 1, 1), model.kv_heads),
            Fuse(gate, _L + "fc1", (1, 1)),
            Transpose(
                (
                    *(_L + x for x in ("qkv", "fc1")),
                    *(_L + x + ".weight" for x in ("self_attn.o_proj", "mlp.down_proj")),
                    "lm_head.weight",
                )
            ),
            Stack(_L + "{rest*}", "layers.{rest*}"),
        )
    )


def child(kind: str, folder: Path, repeats: int, *, check: bool) -> None:
    """Load ``folder`` and print what it took."""
    import jax

    from jaxshard.loader import load

    model = _model_of(folder)
    names = fused(model) if kind == "mapped" else None
    counts: list[Any] = []
    walls, cpus, peaks = [], [], []
    load(folder, "dp2mp4", include=["norm"])  # imports, first calls
    for _ in range(repeats):
        if model.num_bytes >= _REAL_BYTES:  # see the notes on hosts that take memory back
            measure.have_memory()
        peak = _Peak()
        cpu, start = time.process_time(), time.perf_counter()
        arrays = jax.block_until_ready(load(folder, "dp2mp4", names=names, counted=counts.append))
        walls.append(time.perf_counter() - start)
        cpus.append(time.process_time() - cpu)
        peaks.append(peak.stop())
        if check:
            _check(arrays, folder, model, mapped=kind == "mapped")
        del arrays
    done = counts[-1]
    told = {"needed": done.bytes_needed, "read": done.bytes_read, "reads": done.num_reads}
    print(json.dumps({"walls": walls, "cpus": cpus, "peak": max(peaks), **told}))


def _check(arrays: dict[str, Any], folder: Path, model: Llama, *, mapped: bool) -> None:
    """Fused tensors equal what NumPy makes of the files; plain ones equal the files."""
    stored = _stored(folder)
    if not mapped:
        for name, array in arrays.items():
            assert _same(array, stored(name)), name
        return
    for layer in range(model.layers):
        q, k, v = (stored(f"model.layers.{layer}.self_attn.{x}_proj.weight") for x in "qkv")
        grouped = [x.reshape(model.kv_heads, -1, model.hidden) for x in (q, k, v)]
        expected = np.concatenate(grouped, axis=1).reshape(-1, model.hidden).T
        assert _same(arrays["layers.qkv"][layer], expected), layer
        gate, up = (stored(f"model.layers.{layer}.mlp.{x}_proj.weight") for x in ("gate", "up"))
        expected = np.concatenate([gate, up]).T
        assert _same(arrays["layers.fc1"][layer], expected), layer
        down = stored(f"model.layers.{layer}.mlp.down_proj.weight")
        assert _same(arrays["layers.mlp.down_proj.weight"][layer], down.T), layer
    assert _same(arrays["lm_head.weight"], stored("lm_head.weight").T)


def _same(array: Any, expected: Any) -> bool:
    return np.array_equal(np.asarray(array).view("u2"), expected.view("u2"))


def _stored(folder: Path) -> Callable[[str], Any]:
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"] if index.exists() else {}

    def get(name: str) -> Any:
        with safe_open(folder / files.get(name, "model.safetensors"), "np") as file:
            return file.get_tensor(name)

    return get


def _model_of(folder: Path) -> Llama:
    config = json.loads((folder / "config.json").read_text())
    return Llama(
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
        config["vocab_size"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
    )


class _Peak:
    """The most anonymous memory that is added from now on, looked at every 2 ms."""

    def __init__(self) -> None:
        import threading

        self._start = self._most = _anon()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, _anon())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._most, _anon()) - self._start


def _anon() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) << 10


# --- comparisons ------------------------------------------------------------------------


def sample(kind: str, folder: Path, repeats: int, *, check: bool = False) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", kind, "--folder", str(folder)]
    command += ["--repeats", str(repeats), *["--check"] * check]
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(measure.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_loads(folder: Path, model: Llama, rounds: int, repeats: int) -> dict[str, Any]:
    """Medians of plain and mapped loads in turns, and their ratios."""
    for kind in ("plain", "mapped"):
        sample(kind, folder, 1, check=True)
    taken: dict[str, list[dict[str, Any]]] = {"plain": [], "mapped": []}
    for number in range(rounds):
        for kind in list(taken)[:: -1 if number % 2 else 1]:
            if model.num_bytes >= _REAL_BYTES:
                measure.wait_for_quiet()
            taken[kind].append(sample(kind, folder, repeats))
    found: dict[str, Any] = {}
    for kind, samples in taken.items():
        assert all(s["needed"] == model.num_bytes for s in samples), f"{kind} read too much"
        found[kind] = {
            "wall_s": round(median(median(s["walls"]) for s in samples), 3),
            "cpu_s": round(median(median(s["cpus"]) for s in samples), 3),
            "peak_bytes": max(s["peak"] for s in samples),
            "read_ratio": round(samples[0]["read"] / model.num_bytes, 4),
            "reads": samples[0]["reads"],
            "all_wall_s": [round(w, 3) for s in samples for w in s["walls"]],
        }
    plain, mapped = found["plain"], found["mapped"]
    found["wall_ratio"] = round(mapped["wall_s"] / plain["wall_s"], 3)
    found["cpu_ratio"] = round(mapped["cpu_s"] / plain["cpu_s"], 3)
    found["peak_ratio"] = round(mapped["peak_bytes"] / plain["peak_bytes"], 3)
    return found


def write_adapter(folder: Path, model: Llama) -> int:
    """A PEFT folder with an adapter on every linear layer; its bytes."""
    random = np.random.default_rng(1)
    tensors = {}
    for name, shape in model.shapes().items():
        module = name.removesuffix(".weight")
        if module.endswith(_LINEAR):
            sizes = {"lora_A": (_RANK, shape[1]), "lora_B": (shape[0], _RANK)}
            for half, size in sizes.items():
                values = random.standard_normal(size, np.float32) * np.float32(0.01)
                tensors[f"base_model.model.{module}.{half}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": _ALPHA, "r": _RANK}))
    return sum(x.nbytes for x in tensors.values())


def measure_merges(work: Path, model: Llama, rounds: int) -> dict[str, Any]:
    """A merge file to file, and ``cp -r`` of what it makes, in turns."""
    base, adapter, merged, copy = (work / n for n in ("model", "adapter", "merged", "copy"))
    adapter_bytes = write_adapter(adapter, model)
    merge = [sys.executable, "-m", "jaxshard", "lora", str(base), str(merged)]
    merge += ["--adapter", str(adapter), "--no-fsync", "--json", "--quiet"]
    watched = measure.run(merge, watch=True)
    if model.num_bytes >= _REAL_BYTES:
        assert watched.peak_anon_bytes <= _BUDGET_BYTES + _SLACK_BYTES, watched.peak_anon_bytes
    read = json.loads(watched.output)["counts"]["bytes_read"]
    assert read == model.num_bytes + adapter_bytes, read
    _check_merge(base, adapter, merged, model)

    def run(command: list[str], out: Path) -> Callable[[], Sample]:
        def one() -> Sample:
            measure.remove(out)
            if model.num_bytes >= _REAL_BYTES:
                measure.wait_for_quiet()
                measure.touch_memory(2 * model.num_bytes)
            return measure.run(command)

        return one

    measure.remove(copy)
    copied = work / "copied"
    os.rename(merged, copied)
    cases = {"cp": run(["cp", "-r", str(copied), str(copy)], copy), "merge": run(merge, merged)}
    taken = measure.in_turns(cases, rounds)
    found: dict[str, Any] = {name: measure.summary(s) for name, s in taken.items()}
    found["wall_ratio"] = measure.ratio(taken["merge"], taken["cp"])
    found["peak_anon_bytes"] = watched.peak_anon_bytes
    return found


def _check_merge(base: Path, adapter: Path, merged: Path, model: Llama) -> None:
    before, after = _stored(base), _stored(merged)
    with safe_open(adapter / "adapter_model.safetensors", "np") as pairs:
        for name in model.shapes():
            weight = before(name)
            at = f"base_model.model.{name.removesuffix('.weight')}."
            if name.removesuffix(".weight").endswith(_LINEAR):
                a, b = (pairs.get_tensor(f"{at}lora_{x}.weight") for x in "AB")
                exact = weight.astype("f4") + b @ a * np.float32(_ALPHA / _RANK)
                made = after(name).astype("f4")
                assert np.abs(made - exact).max() <= 2**-8 * np.abs(exact).max(), name
            else:
                assert np.array_equal(after(name).view("u2"), weight.view("u2")), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to work; its disk is measured")
    parser.add_argument("--only", choices=("load", "merge"))
    parser.add_argument("--save", action="store_true", help="keep the numbers as JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny, to see that all runs")
    parser.add_argument("--child", choices=("plain", "mapped"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        child(a.child, a.folder, a.repeats, check=a.check)
        return
    model = SMOKE if a.smoke else llama_of(int(a.gigabytes * 1e9))
    rounds, repeats = (1, 1) if a.smoke else (a.rounds, a.repeats)
    with tempfile.TemporaryDirectory(dir=a.dir) as work:
        folder = Path(work) / "model"
        write_llama(folder, model)
        measure.read_files(folder)
        found: dict[str, Any] = {"num_bytes": model.num_bytes}
        found["file_system"] = measure.file_system(Path(work))
        if a.only != "merge":
            found["load"] = measure_loads(folder, model, rounds, repeats)
        if a.only != "load":
            found["merge"] = measure_merges(Path(work), model, rounds)
    print(json.dumps({"machine": measure.machine(), **found}, indent=1))
    if a.save:
        print(measure.save("mapping", found))


if __name__ == "__main__":
    main()
