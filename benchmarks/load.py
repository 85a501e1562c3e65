"""Loading onto a mesh against NumPy views with device_put, orbax, and other peers.

A Llama-shaped checkpoint (1.7 GB of bfloat16 in 4 files, as the safetensors package lays
them out) goes onto 8 CPU devices as dp2mp4, attention outputs and down projections split
by columns. Every sample is a fresh process, methods take turns, and what is timed begins
after imports and ends when all arrays are ready. Every method's shards are compared with
the file bit by bit.

    python benchmarks/load.py [--smoke] [--rounds 7] [--only NAME] [--part NAME] [--save]
    python benchmarks/load.py --gpu [--save]      onto one GPU, where there is one

The baseline maps the files and gives all views to one ``jax.device_put``. Asserted are the
answers, that each distinct byte is read once, and that memory is the arrays and the budget.
"""

# ruff: noqa: PLC0415 - the parent imports no JAX, so that it takes no time from its samples

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import measure
from models import SMOKE, Llama, write_llama

_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
_GPU = {"JAX_PLATFORMS": "cuda,cpu"}
_PINNED = "plain copy from pinned memory"
_HOST_BYTES = 256 << 20  # the default budget of a load
_HEADERS = 1.005  # bytes read, over those of tensors: headers, the interpreter's own
Result = dict[str, Any]


# --- one sample: a process of its own ---------------------------------------------------


def child(
    method: str,
    folder: Path,
    repeats: int,
    *,
    check: bool,
    watch: bool,
    one_device: bool,
    touch_bytes: int,
) -> None:
    """Load ``folder`` and print what it took.

    First, ``touch_bytes`` of free memory are had for sure: see the notes on hosts that take
    it back.
    """
    import jax
    from loaders import LOADERS, MODULES

    for module in MODULES.get(LOADERS.get(method), ()):
        importlib.import_module(module)
    jax.block_until_ready(jax.device_put(1.0))
    shardings = _on_one_device(folder) if one_device else _shardings(folder)
    load = LOADERS[method] if method != _PINNED else _pinned(folder)
    walls, cpus, peaks = [], [], []
    read_before = _read_by_calls()
    if touch_bytes:
        measure.have_memory(touch_bytes)
    for _ in range(repeats):
        watcher = _Peak() if watch else None
        cpu, start = _cpu(), time.perf_counter()
        arrays = load(folder, shardings)
        walls.append(time.perf_counter() - start)
        cpus.append(_cpu() - cpu)
        if watcher:
            peaks.append(watcher.stop())
        if check:
            _check(arrays, folder)
        del arrays
    print(
        json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                "walls": walls,
                "cpus": cpus,
                "peak_anon_bytes": max(peaks, default=0),
                "read_bytes": (_read_by_calls() - read_before) // repeats,
            }
        )
    )


def _shardings(folder: Path) -> dict[str, Any]:
    """The mesh dp2mp4 by the Megatron way of cutting; independent of jaxshard's rules."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from loaders import views

    mesh = jax.make_mesh((2, 4), ("dp", "mp"), axis_types=(AxisType.Auto,) * 2)
    found = {}
    for name, view in views(folder).items():
        spec = PartitionSpec("mp", None)
        if "o_proj" in name or "down_proj" in name:
            spec = PartitionSpec(None, "mp")
        found[name] = NamedSharding(mesh, PartitionSpec() if view.ndim == 1 else spec)
    return found


def _on_one_device(folder: Path) -> dict[str, Any]:
    import jax
    from jax.sharding import SingleDeviceSharding
    from loaders import entries

    return dict.fromkeys(entries(folder), SingleDeviceSharding(jax.devices()[0]))


def _pinned(folder: Path) -> Callable[..., Mapping[str, Any]]:
    """Copies what is in pinned memory already, to know what the bus can do."""
    import jax
    from loaders import views

    device = jax.devices()[0]
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    there = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
    held = jax.block_until_ready({n: jax.device_put(v, host) for n, v in views(folder).items()})
    return lambda folder, shardings: jax.block_until_ready(jax.device_put(held, there))


def _check(arrays: Mapping[str, Any], folder: Path) -> None:
    """Every shard of every array equals the file, bit by bit."""
    import numpy as np
    from loaders import views

    expected = views(folder)
    assert set(arrays) == set(expected), "names differ"
    for name, array in arrays.items():
        for shard in array.addressable_shards:
            stored = expected[name][shard.index]
            same = np.array_equal(np.asarray(shard.data).view("u2"), stored.view("u2"))
            assert same, f"{name} on {shard.device} differs from the file"


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _read_by_calls() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


class _Peak:
    """The most anonymous memory a load adds, looked at every 2 ms."""

    def __init__(self) -> None:
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


# --- the comparison ---------------------------------------------------------------------


def sample(
    method: str,
    folder: Path,
    *,
    repeats: int = 1,
    check: bool = False,
    watch: bool = False,
    gpu: bool = False,
    touch_bytes: int = 0,
) -> Result:
    """One fresh process; RuntimeError with its last words if it fails."""
    command = [sys.executable, __file__, "--child", method, "--folder", str(folder)]
    command += ["--repeats", str(repeats), *["--check"] * check, *["--watch"] * watch]
    command += ["--touch", str(touch_bytes), *["--one-device"] * gpu]
    ours = _GPU if gpu else _ENVIRONMENT
    environment = {**os.environ, **ours, "PYTHONPATH": str(measure.ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled, too
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no words").splitlines()[-1])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(cases: Mapping[str, Callable[[], Result]], rounds: int) -> Result:
    """Medians of every case, taken in turns, and their ratios to the first."""
    taken: dict[str, list[Result]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            measure.wait_for_quiet(limit_s=4.0)
            taken[name].append(cases[name]())
            walls = " ".join(f"{w:.2f}" for w in taken[name][-1]["walls"])
            print(f"{name}: {walls} s", file=sys.stderr, flush=True)
    found: Result = {}
    base: Result | None = None
    for name, samples in taken.items():
        wall = median(median(s["walls"]) for s in samples)
        cpu = median(median(s["cpus"]) for s in samples)
        base = base or {"wall": wall, "cpu": cpu}
        found[name] = {
            "wall_s": round(wall, 3),
            "cpu_s": round(cpu, 3),
            "wall_ratio": round(wall / base["wall"], 3),
            "cpu_ratio": round(cpu / base["cpu"], 3),
            "all_wall_s": [round(w, 3) for s in samples for w in s["walls"]],
        }
    return found


def usable(methods: Sequence[str], folder: Path) -> tuple[list[str], dict[str, str]]:
    """The methods that run here and are right, and why the others do not."""
    good, bad = [], {}
    for method in methods:
        try:
            sample(method, folder, check=True)
        except RuntimeError as error:
            bad[method] = str(error)
        else:
            good.append(method)
    return good, bad


def check_ours(folder: Path, aligned: Path) -> None:
    """Every way that jaxshard reads gives what the file holds; AssertionError if not."""
    from loaders import IN_PLACE, OURS

    for method, where in ((OURS, folder), (IN_PLACE, aligned)):
        try:
            sample(method, where, check=True)
        except RuntimeError as error:
            raise AssertionError(f"{method}: {error}") from None


def memory(methods: Sequence[str], folder: Path, model: Llama) -> Result:
    """Peak anonymous memory over the distinct bytes, and bytes read by calls over them."""
    from loaders import OURS

    found = {}
    for method in methods:
        taken = sample(method, folder, watch=True)
        found[method] = {
            "peak_anon_over_distinct": round(taken["peak_anon_bytes"] / model.num_bytes, 3),
            "read_over_distinct": round(taken["read_bytes"] / model.num_bytes, 3),
        }
        if method == OURS and model is not SMOKE:
            assert taken["peak_anon_bytes"] <= model.num_bytes + _HOST_BYTES, taken
            assert model.num_bytes <= taken["read_bytes"] <= model.num_bytes * _HEADERS, taken
    return found


def cold(folder: Path, rounds: int, touch_bytes: int) -> Result:
    """From a cold page cache, against the best plain way to read the same files."""
    from loaders import OURS
    from reads import SEVERAL_READERS, WAYS

    def timed(read: Callable[[Path], None]) -> Result:
        _forget(folder)
        if touch_bytes:
            measure.have_memory(touch_bytes)
        cpu, start = _cpu(), time.perf_counter()
        read(folder)
        return {"walls": [time.perf_counter() - start], "cpus": [_cpu() - cpu]}

    def load() -> Result:
        _forget(folder)
        return sample(OURS, folder, touch_bytes=touch_bytes)

    ways: dict[str, Callable[[], Result]] = {}
    refused = {}
    for name, read in WAYS.items():
        try:
            read(folder)
        except OSError as error:  # tmpfs knows no O_DIRECT
            refused[name] = str(error.strerror)
        else:
            ways[name] = partial(timed, read)
    found = compare({**ways, "jaxshard": load}, rounds)
    told: dict[str, object] = {"not_here": refused}
    for what, some in (("best", ways), ("best_of_one_reader", ways.keys() - SEVERAL_READERS)):
        best = min(some, key=lambda name: float(found[name]["wall_s"]))
        ratio = found["jaxshard"]["wall_s"] / found[best]["wall_s"]
        told |= {what: best, f"jaxshard_over_{what}": round(ratio, 3)}
    return {**found, **told, "file_system": measure.file_system(folder)}


def on_gpu(folder: Path, rounds: int) -> Result:
    """Onto one GPU from a warm page cache, against what others do and what the bus can."""
    from loaders import BASELINE, OURS

    numpy = "safetensors.numpy load_file + device_put"
    try:
        sample(numpy, folder, check=True, gpu=True)
        device = sample(OURS, folder, check=True, gpu=True)["device"]
    except RuntimeError as error:
        return {"device": "", "not_run": f"no GPU that JAX can use here: {error}"}
    cases = {m: partial(sample, m, folder, gpu=True) for m in (numpy, BASELINE, OURS, _PINNED)}
    return {"device": device, **compare(cases, rounds)}


def _forget(folder: Path) -> None:
    os.sync()
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _aligned_copy(folder: Path, place: Path, model: Llama) -> None:
    """The same checkpoint as jaxshard writes it: every tensor on a cache line."""
    from jaxshard.api import convert

    convert(folder, place, max_shard_size=-(-model.num_bytes // 4) + (32 << 20))


def _native_copy(folder: Path, place: Path) -> None:
    """The same checkpoint in Orbax's own format; a process of its own, as it wakes JAX."""
    command = [sys.executable, "-m", "jaxshard", "convert", str(folder), str(place)]
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(measure.ROOT)}
    command += ["--format", "orbax", "--quiet"]
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)


def main() -> None:
    options = _options()
    if options.child:
        child(
            options.child,
            options.folder,
            options.repeats,
            check=options.check,
            watch=options.watch,
            touch_bytes=options.touch,
            one_device=options.one_device,
        )
        return
    model = SMOKE if options.smoke else Llama()
    rounds = 1 if options.smoke else options.rounds
    report = gpu_report(model, rounds) if options.gpu else cpu_report(model, rounds, options)
    report["load_average"] = measure.load()
    print(json.dumps({"machine": measure.machine(), **report}, indent=1))
    if options.save:
        kind = ["load", *["gpu"] * options.gpu, *filter(None, (options.part, options.only))]
        print(measure.save("-".join(kind), report))


def gpu_report(model: Llama, rounds: int) -> Result:
    with tempfile.TemporaryDirectory(prefix="jaxshard-load-") as scratch:
        write_llama(Path(scratch) / "model", model)
        found = on_gpu(Path(scratch) / "model", rounds)
        return {"device": found.pop("device"), "bytes": model.num_bytes, "gpu": found}


def cpu_report(model: Llama, rounds: int, options: argparse.Namespace) -> Result:
    from loaders import BASELINE, IN_PLACE, LOADERS, NOT_TRIED, ORBAX_NATIVE, OURS, native_of

    touch_bytes = 0 if options.smoke else measure.HAVE_BYTES
    with tempfile.TemporaryDirectory(prefix="jaxshard-load-") as scratch:
        folder, aligned = Path(scratch) / "model", Path(scratch) / "aligned"
        write_llama(folder, model)
        _aligned_copy(folder, aligned, model)
        check_ours(folder, aligned)
        asked = [m for m in LOADERS if m != IN_PLACE and (options.only or "") in m]
        asked = list(dict.fromkeys([BASELINE, OURS, *asked]))
        if ORBAX_NATIVE in asked:
            _native_copy(folder, native_of(folder))
        good, bad = usable(asked, folder)
        assert not {BASELINE, OURS} & set(bad), bad
        not_run = {**bad, **NOT_TRIED}
        report: Result = {
            "bytes": model.num_bytes,
            "tensors": len(model.shapes()),
            "file_system": measure.file_system(folder),
            "not_run": not_run,
        }
        timed = [BASELINE, OURS] if options.smoke else good  # the others have run once, too
        there = {"touch_bytes": touch_bytes}
        cases = {m: _case(m, folder, **there) for m in timed}
        cases["jaxshard, mmap=True, aligned files"] = _case(IN_PLACE, aligned, **there)
        taken_back = {m: _case(m, folder) for m in (BASELINE, OURS)}
        again = {m: _case(m, folder, repeats=5, **there) for m in (BASELINE, OURS)}
        parts: dict[str, Callable[[], Result]] = {
            "warm": lambda: compare(cases, rounds),
            "warm, free memory as the host left it": lambda: compare(taken_back, rounds),
            "again_in_one_process": lambda: compare(again, rounds),
            "memory": lambda: memory(timed, folder, model),
            "cold": lambda: cold(folder, rounds, touch_bytes),
        }
        report |= {name: part() for name, part in parts.items() if (options.part or "") in name}
    return report


def _case(method: str, folder: Path, **how: Any) -> Callable[[], Result]:
    return partial(sample, method, folder, **how)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help="of the peers, those whose name has this")
    parser.add_argument("--part", help="parts with this in their name: warm, again, memory or cold")
    parser.add_argument("--save", action="store_true", help="keep the result with this machine's")
    parser.add_argument("--gpu", action="store_true", help="onto one GPU; says so if there is none")
    parser.add_argument("--child")
    parser.add_argument("--one-device", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--touch", type=int, default=0)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--watch", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
