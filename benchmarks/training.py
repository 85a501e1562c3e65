"""The training loop's checkpoints: what a save costs, what it costs the loop, and coming back.

    python benchmarks/training.py [--rounds 5] [--dir DISK] [--save] [--smoke]

A state of 1.74 GB, a Llama's weights in bfloat16 with Adam's moments in float32, lies on 8 CPU
devices as dp2mp4.

    sync      a save, beside ``cp -r`` of the files it makes, with and without fsync; and Orbax
    async     how long ``save`` keeps the loop: looking at the arrays, or copying them
    restore   onto dp4mp2, beside a plain ``load`` of the same files
    memory    what a save takes beyond the state, while a step that is given it (donated) runs

All in one process, in turns. Answers are compared bit for bit. In the end every bar that was set
is told with what was measured, held or missed; memory beyond its bound is an error.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
import orbax.checkpoint as ocp
from measure import Sample
from models import SMOKE, Llama, write_llama

import jaxshard as js
from jaxshard.devices.host_shards import Snapshot
from jaxshard.loader import load
from jaxshard.storage import checksums
from jaxshard.storage.resources import default_budget
from jaxshard.training import CheckpointManager
from jaxshard.training.open_step import open_step
from jaxshard.training.run_directory import RunDirectory
from jaxshard.training.state import as_array, take_apart
from jaxshard.training.steps import find_steps

MODEL = Llama(layers=12, hidden=1024, intermediate=2816, vocab=16000, heads=16, kv_heads=8)


def state_on(strategy: str, folder: Path) -> dict[str, object]:
    """The weights in ``folder`` on devices, with moments that lie like them."""
    params = load(folder, strategy)
    adam = optax.ScaleByAdamState(
        jnp.int32(7),
        {n: _moment(n, a) for n, a in params.items()},
        {n: _moment(f"{n} v", a) for n, a in params.items()},
    )
    return {"params": params, "opt_state": (adam,), "step": 7}


#: What was asked for: part, ratio, and the most it may be.
BARS = (
    ("sync", "save/cp", 1.3),
    ("sync", "save/orbax", 1.0),
    ("async", "blocked, looking/save", 0.1),
    ("restore", "restore/load", 1.2),
)
BEYOND = ": mib beyond the state"
_BASE = np.random.default_rng(0).standard_normal(1 << 22, np.float32)


def _moment(name: str, like: jax.Array) -> jax.Array:
    """Numbers that no compressor gets smaller, laid out as ``like``."""
    start = hash(name) % 1000
    data = np.resize(_BASE[start:], like.shape)
    return jax.device_put(data, like.sharding)


def timed(work: Callable[[], object]) -> Sample:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu, 0)


class Bench:
    """One state, and the ways to save it."""

    def __init__(self, work: Path, model: Llama, real: bool) -> None:
        self.work, self.real = work, real
        write_llama(work / "model", model, num_files=2)
        self.state = state_on("dp2mp4", work / "model")
        self.num_bytes = sum(
            leaf.nbytes for leaf in jax.tree.leaves(self.state) if isinstance(leaf, jax.Array)
        )
        self.out = work / "out"
        self.kept = work / "kept"
        manager = CheckpointManager(self.kept, prefix="llama", remove_redundancy=True)
        manager.save(1, self.state)

    def quiet(self) -> None:
        measure.remove(self.out)
        if self.real:
            measure.wait_for_quiet()
            measure.touch_memory(self.num_bytes * 3 // 2)

    def manager(self, **how: object) -> CheckpointManager:
        return CheckpointManager(self.out, prefix="llama", remove_redundancy=True, **how)

    def save(self, **how: object) -> Callable[[], Sample]:
        def sample() -> Sample:
            self.quiet()
            manager = self.manager(**how)
            return timed(lambda: manager.save(1, self.state))

        return sample

    def copy(self, *, sync: bool) -> Callable[[], Sample]:
        text = 'cp -r "$0" "$1"' + (' && find "$1" -type f -exec sync {} +' if sync else "")

        def sample() -> Sample:
            self.quiet()
            measure.read_files(self.kept)
            command = ["sh", "-c", text, str(self.kept / "checkpoint"), str(self.out)]
            return timed(lambda: subprocess.run(command, check=True))

        return sample

    def orbax(self) -> Sample:
        self.quiet()
        saver = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        tree = {k: self.state[k] for k in ("params", "opt_state")}
        found = timed(lambda: saver.save(self.out, args=ocp.args.StandardSave(tree)))
        saver.close()
        return found

    def blocked(self, **how: object) -> Callable[[], Sample]:
        """The time that ``save`` keeps the loop; the rest of the save is waited for, untimed."""

        def sample() -> Sample:
            self.quiet()
            manager = self.manager(async_save=True, fsync=False, **how)
            found = timed(lambda: manager.save(1, self.state))
            manager.close()
            return found

        return sample

    def orbax_blocked(self) -> Sample:
        self.quiet()
        saver = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        tree = {k: self.state[k] for k in ("params", "opt_state")}
        found = timed(lambda: saver.save(self.out, args=ocp.args.StandardSave(tree)))
        saver.wait_until_finished()
        saver.close()
        return found


def sync_saves(bench: Bench, rounds: int) -> dict[str, object]:
    """A save beside a copy of its bytes, and beside Orbax."""
    cases = {
        "cp": bench.copy(sync=False),
        "save": bench.save(fsync=False),
        "orbax": bench.orbax,
        "cp+sync": bench.copy(sync=True),
        "save durable": bench.save(fsync=True),
    }
    bench.orbax()  # its first save imports and starts what later ones find
    samples = measure.in_turns(cases, rounds)
    return {
        **{name: measure.summary(each) for name, each in samples.items()},
        "save/cp": measure.ratio(samples["save"], samples["cp"]),
        "durable/cp+sync": measure.ratio(samples["save durable"], samples["cp+sync"]),
        "save/orbax": measure.ratio(samples["save"], samples["orbax"]),
    }


def async_saves(bench: Bench, rounds: int) -> dict[str, object]:
    """What a save costs the loop, beside a synchronous one."""
    cases = {
        "save": bench.save(fsync=False),
        "blocked, looking": bench.blocked(),
        "blocked, copying": bench.blocked(snapshot="copy"),
        "orbax blocked": bench.orbax_blocked,
    }
    bench.orbax_blocked()  # likewise
    samples = measure.in_turns(cases, rounds)
    names = [n for n in cases if n != "save"]
    return {
        **{name: measure.summary(each) for name, each in samples.items()},
        **{f"{n}/save": measure.ratio(samples[n], samples["save"]) for n in names},
    }


def restores(bench: Bench, rounds: int) -> dict[str, object]:
    """Coming back in another layout, beside loading the same tensors."""
    places = RunDirectory.of(bench.kept)
    (step,) = find_steps(places)
    layout = js.Strategy.parse("dp4mp2")
    manager = CheckpointManager(bench.kept)
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x,
        bench.state,
    )
    target = jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            if isinstance(x, jax.Array)
            else x
        ),
        manager.restore(described, strategy=layout).state,
    )
    flat = {
        leaf.name: leaf.value
        for leaf in take_apart(target).leaves
        if isinstance(leaf.value, jax.ShapeDtypeStruct)
    }

    def plain() -> Sample:
        bench.quiet()
        return timed(lambda: load(open_step(places, step.record, step.format), flat, strict=False))

    def restored(verify: bool) -> Callable[[], Sample]:
        def sample() -> Sample:
            bench.quiet()
            return timed(lambda: manager.restore(target, verify=verify))

        return sample

    check_answer(bench, manager.restore(target, verify=True).state)
    measure.read_files(bench.kept)
    cases = {"load": plain, "restore": restored(False), "restore, verified": restored(True)}
    samples = measure.in_turns(cases, rounds)
    return {
        **{name: measure.summary(each) for name, each in samples.items()},
        "restore/load": measure.ratio(samples["restore"], samples["load"]),
        "restore/load, by cpu": _by_cpu(samples["restore"], samples["load"]),
        "verified/load": measure.ratio(samples["restore, verified"], samples["load"]),
        "all but the load": _beyond_the_load(manager, target),
    }


def _by_cpu(ours: Sequence[Sample], theirs: Sequence[Sample]) -> float:
    return round(median(s.cpu_s for s in ours) / median(s.cpu_s for s in theirs), 3)


def _beyond_the_load(manager: CheckpointManager, target: object) -> float:
    """Seconds that a restore takes for anything but the load: found by leaving the load out."""
    from jaxshard.training import restore_state  # noqa: PLC0415

    kept = restore_state.load_opened
    given = {
        leaf.name: leaf.value
        for leaf in take_apart(target).leaves
        if isinstance(leaf.value, jax.ShapeDtypeStruct)
    }
    restore_state.load_opened = lambda catalog, structs, options: (
        {name: given[name] for name in structs},
        None,
    )
    try:
        samples = [timed(lambda: manager.restore(target)) for _ in range(5)]
    finally:
        restore_state.load_opened = kept
    return round(median(s.wall_s for s in samples), 4)


def _anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) << 10


def memory(bench: Bench) -> dict[str, object]:
    """The most anonymous memory that a save takes beyond what the state has.

    In the background a step runs meanwhile that may use the state's memory for its results. As
    long as the save looks at it, it may not; then its results are the memory that is needed. On
    CPU devices each replica made by a step has memory of its own.

    Raises:
        AssertionError: it is more than those results, or one copy, and the budget for data in
            flight.
    """
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    step = step.lower(_arrays_of(bench.state)).compile()
    ways: dict[str, dict[str, object]] = {
        "sync": {},
        "async": {"async_save": True},
        "async, copying": {"async_save": True, "snapshot": "copy"},
    }
    found: dict[str, object] = {"snapshot_mib": _mib(bench.num_bytes)}
    for name, how in ways.items():
        bench.quiet()
        state = jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, bench.state)
        jax.block_until_ready(_arrays_of(state))
        held = sum(s.data.nbytes for a in _arrays_of(state) for s in a.addressable_shards)
        gc.collect()
        before = _anonymous_bytes()
        watcher = measure._Watcher(os.getpid())
        with bench.manager(fsync=False, **how) as manager:
            manager.save(1, state)
            arrays = _arrays_of(state)
            del state
            if how:
                arrays = jax.block_until_ready(step(arrays))
        peak, _ = watcher.stop()
        del arrays
        most = default_budget() + {"sync": 0, "async": held}.get(name, bench.num_bytes)
        found[f"{name}{BEYOND}"] = _mib(peak - before)
        found[f"{name}: mib at most"] = _mib(most)
        assert peak - before <= most, f"{name}: {_mib(peak - before)} MiB, {_mib(most)} at most"
    return found


def _arrays_of(tree: object) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _mib(num_bytes: int) -> int:
    return round(num_bytes / 2**20)


def check_answer(bench: Bench, found: object) -> None:
    for a, b in zip(jax.tree.leaves(bench.state), jax.tree.leaves(found), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b)), "restored is not what was saved"


def pieces(bench: Bench) -> dict[str, object]:
    """Where the time goes: a look, a copy, and the checksums of everything."""
    arrays = {leaf.name: as_array(leaf.value) for leaf in take_apart(bench.state).leaves}
    (step,) = find_steps(RunDirectory.of(bench.kept))
    root = RunDirectory.of(bench.kept).root
    return {
        "checksum": checksums.BEST,
        "look_s": timed(lambda: Snapshot(arrays)).wall_s,
        "copy_s": timed(lambda: Snapshot(arrays, mode="copy")).wall_s,
        "check_sums_s": timed(lambda: checksums.check_files(root, step.record.checksums)).wall_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="the disk to measure on (default: temporary)")
    parser.add_argument(
        "--only", choices=("sync", "async", "restore", "memory"), help="one part alone"
    )
    parser.add_argument("--save", action="store_true", help="keep the results with the project's")
    parser.add_argument("--smoke", action="store_true", help="tiny: the answers, not the clock")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="jaxshard-bench-", dir=options.dir))
    rounds = 1 if options.smoke else options.rounds
    try:
        bench = Bench(work, SMOKE if options.smoke else MODEL, not options.smoke)
        results: dict[str, object] = {
            "bytes": bench.num_bytes,
            "file_system": measure.file_system(work),
            "load_before": measure.load(),
            "pieces": pieces(bench),
        }
        if options.only in (None, "memory"):
            results["memory"] = memory(bench)
        parts = {"sync": sync_saves, "async": async_saves, "restore": restores}
        for name, part in parts.items():
            if options.only in (None, name):
                results[name] = part(bench, rounds)
        results["verdicts"] = verdicts(results)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    results["load_after"] = measure.load()
    show(results)
    if options.save:
        print(f"kept in {measure.save('training', results)}")


def verdicts(results: dict[str, object]) -> dict[str, str]:
    """Each bar that was measured: held or missed, and by how much."""
    found = {}
    for part, name, most in BARS:
        if part in results:
            value = results[part][name]
            told = "held" if value <= most else "MISSED"
            found[f"{part}: {name}"] = f"{told}: {value:.3f}, {most} at most"
    for name, value in results.get("memory", {}).items():
        if name.endswith(BEYOND):
            most = _mib(results["bytes"] + default_budget())  # one snapshot, and data in flight
            told = "held" if value <= most else "MISSED"
            found[f"memory: {name}"] = f"{told}: {value}, {most} at most"
    return found


def show(results: dict[str, object]) -> None:
    """The results as a person reads them."""
    print(f"{measure.machine()}, {results['file_system']}, {results['bytes'] / 1e9:.2f} GB")
    print(f"load {results['load_before']} before, {results['load_after']} after")
    print(results["pieces"])
    for name, value in results.get("memory", {}).items():
        print(f"  memory  {name:<24} {value}")
    for part in ("sync", "async", "restore"):
        for name, value in results.get(part, {}).items():
            if isinstance(value, dict):
                text = f"{value['wall_s']:.3f} s, cpu {value['cpu_s']:.3f} s  {value['all_wall_s']}"
            else:
                text = f"{value:.3f}"
            print(f"{part:>8}  {name:<24} {text}")
    for name, verdict in results["verdicts"].items():
        print(f"{name:<34} {verdict}")


if __name__ == "__main__":
    main()
