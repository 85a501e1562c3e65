"""What comes off one GPU: saves, what they cost a training loop, and arrays on the host.

    python benchmarks/gpu.py [--rounds 5] [--dir DISK] [--save]
    python benchmarks/gpu.py --smoke        tiny; on a CPU device where there is no GPU

A Llama's weights (1.7 GB of bfloat16) lie on one GPU. Methods take turns in one process; no
method finds what JAX has read back before. Asserted are the answers: files and arrays are what
was loaded, bit for bit, also where a step is given the state's memory while it is saved.

    save     beside ``cp -r`` of what it writes, safetensors' own writer, and Orbax
    async    how long a save keeps the loop, beside a synchronous one and Orbax's
    gather   arrays on the host, beside ``jax.device_get``

Loads are measured by ``load.py --gpu``, and moves by ``reshard.py --gpu``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import measure
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from loaders import views
from measure import Sample
from models import SMOKE, Llama, write_llama

import jaxshard as js
from jaxshard.loader import load
from jaxshard.resharding import gather
from jaxshard.saver import save
from jaxshard.training import CheckpointManager

Tree = Mapping[str, jax.Array]


def timed(work: Callable[[], object]) -> Sample:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu, 0)


class Bench:
    """A model on one device, and the ways off it."""

    def __init__(self, work: Path, model: Llama, device: jax.Device) -> None:
        self._work, self._device = work, device
        self._model, self._out = work / "model", work / "out"
        write_llama(self._model, model)
        self._tree = load(self._model, device)
        self._size = -(-model.num_bytes // 4)

    def fresh(self) -> Tree:
        """The same memory as new arrays: JAX keeps what it has read back to the host."""
        return {
            name: jax.make_array_from_single_device_arrays(x.shape, x.sharding, [x])
            for name, x in self._tree.items()
        }

    def to_folder(self, write: Callable[[Tree, Path], object]) -> Callable[[], Sample]:
        def sample() -> Sample:
            measure.remove(self._out)
            tree = self.fresh()
            return timed(lambda: write(tree, self._out))

        return sample

    def saves(self, rounds: int) -> dict[str, object]:
        def ours(tree: Tree, out: Path) -> None:
            save(tree, out, max_shard_size=self._size, fsync=False)

        def copied(_: Tree, out: Path) -> None:
            subprocess.run(["cp", "-r", self._model, out], check=True)

        def by_safetensors(tree: Tree, out: Path) -> None:
            out.mkdir()
            host = {name: np.asarray(x) for name, x in tree.items()}
            safetensors.numpy.save_file(host, out / "model.safetensors")

        def by_orbax(tree: Tree, out: Path) -> None:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as saver:
                saver.save(out, args=ocp.args.StandardSave(tree))

        ours(self.fresh(), self._out)
        verdict = js.verify(self._out, against=self._model)
        assert not verdict.problems, verdict.problems
        cases = {
            "cp": self.to_folder(copied),
            "save": self.to_folder(ours),
            "safetensors": self.to_folder(by_safetensors),
            "orbax": self.to_folder(by_orbax),
        }
        samples = measure.in_turns(cases, rounds)
        return {
            **{name: measure.summary(each) for name, each in samples.items()},
            "save/cp": measure.ratio(samples["save"], samples["cp"]),
            "save/safetensors": measure.ratio(samples["save"], samples["safetensors"]),
            "save/orbax": measure.ratio(samples["save"], samples["orbax"]),
        }

    def async_saves(self, rounds: int) -> dict[str, object]:
        def blocked(asynchronous: bool) -> Callable[[], Sample]:
            def sample() -> Sample:
                measure.remove(self._out)
                manager = CheckpointManager(self._out, async_save=asynchronous, fsync=False)
                tree = self.fresh()
                found = timed(lambda: manager.save(1, tree))
                manager.close()
                return found

            return sample

        def orbax_blocked() -> Sample:
            measure.remove(self._out)
            saver = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
            tree = self.fresh()
            found = timed(lambda: saver.save(self._out, args=ocp.args.StandardSave(tree)))
            saver.wait_until_finished()
            saver.close()
            return found

        self._check_donated()
        cases = {
            "save": blocked(asynchronous=False),
            "blocked": blocked(asynchronous=True),
            "orbax blocked": orbax_blocked,
        }
        samples = measure.in_turns(cases, rounds)
        return {
            **{name: measure.summary(each) for name, each in samples.items()},
            "blocked/save": measure.ratio(samples["blocked"], samples["save"]),
            "orbax blocked/save": measure.ratio(samples["orbax blocked"], samples["save"]),
        }

    def _check_donated(self) -> None:
        """What a step is given while it is being saved is saved as it was before."""
        step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
        state = {name: jnp.copy(x) for name, x in self._tree.items()}
        measure.remove(self._out)
        manager = CheckpointManager(self._out, async_save=True, fsync=False)
        manager.save(1, state)
        jax.block_until_ready(step(state))
        manager.close()
        described = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in self._tree.items()}
        self._check(CheckpointManager(self._out).restore(described).state)

    def gathers(self, rounds: int) -> dict[str, object]:
        def on_host(get: Callable[[Tree], object]) -> Callable[[], Sample]:
            def sample() -> Sample:
                tree = self.fresh()
                return timed(lambda: get(tree))

            return sample

        self._check(gather(self.fresh(), host=True))
        cases = {
            "jax.device_get": on_host(jax.device_get),
            "gather": on_host(lambda tree: gather(tree, host=True)),
        }
        samples = measure.in_turns(cases, rounds)
        return {
            **{name: measure.summary(each) for name, each in samples.items()},
            "gather/device_get": measure.ratio(samples["gather"], samples["jax.device_get"]),
        }

    def _check(self, found: Mapping[str, object]) -> None:
        for name, stored in views(self._model).items():
            assert np.asarray(found[name]).tobytes() == stored.tobytes(), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="the disk to measure on (default: temporary)")
    parser.add_argument("--save", action="store_true", help="keep the results with the project's")
    parser.add_argument("--smoke", action="store_true", help="tiny: the answers, not the clock")
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not options.smoke:
        print(f"skipped: no GPU here, only {device.platform}")
        return
    model, rounds = (SMOKE, 1) if options.smoke else (Llama(), options.rounds)
    with tempfile.TemporaryDirectory(prefix="jaxshard-gpu-", dir=options.dir) as work:
        bench = Bench(Path(work), model, device)
        report = {
            "device": device.device_kind,
            "jax": jax.__version__,
            "bytes": model.num_bytes,
            "file_system": measure.file_system(Path(work)),
            "save": bench.saves(rounds),
            "async": bench.async_saves(rounds),
            "gather": bench.gathers(rounds),
            "load_average": measure.load(),
        }
    print(json.dumps({"machine": measure.machine(), **report}, indent=1))
    if options.save:
        print(measure.save("gpu", report))


if __name__ == "__main__":
    main()
