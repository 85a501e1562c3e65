"""Moving a model between layouts on its devices: jaxshard against device_put, one jit, and a copy.

    python benchmarks/reshard.py            the 1.7 GB tree of 147 tensors
    python benchmarks/reshard.py --smoke    the same, tiny
    python benchmarks/reshard.py --stress   50 runs while every cpu is busy: no deadlock
    python benchmarks/reshard.py --gpu      what one GPU can show; says so where there is none

Each method runs in a process of its own, on eight devices of the CPU backend: one first call,
then repeated ones, each checked bit for bit. ``floor`` copies, device to device, as
many bytes as must change devices; ``memory`` is the growth of anonymous memory over the source
tree at its worst moment. Ratios are of medians within one run of the program.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

# ruff: noqa: PLC0415 - JAX and what needs it are imported by the measured processes alone
sys.path.insert(0, str(Path(__file__).parent.parent))

METHODS = ("jaxshard", "jaxshard device", "device_put", "one jit", "floor")
_SLOW_TO_COMPILE = ("one jit",)  # minutes for some cases, whatever the size of the arrays
CASES = ("dp2mp4 → mp8", "dp2mp4 → dp4mp2", "mp8 → pp2mp4", "4 → 8 devices")
DEVICE_BYTES = 256 << 20


def tensors(scale: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and kinds of a 16-layer model; 147 tensors, 1.7 GB in bfloat16 at scale 1."""
    hidden, ffn, vocab = 2048 // scale, 5632 // scale, 32000 // scale
    found = {
        "embed": ((vocab, hidden), "row"),
        "norm": ((hidden,), "whole"),
        "lm_head": ((vocab, hidden), "row"),
    }
    for n in range(16):
        for name in ("q", "k", "v"):
            found[f"{n}.{name}"] = ((hidden, hidden), "row")
        found[f"{n}.o"] = ((hidden, hidden), "col")
        found[f"{n}.gate"] = ((ffn, hidden), "row")
        found[f"{n}.up"] = ((ffn, hidden), "row")
        found[f"{n}.down"] = ((hidden, ffn), "col")
        found[f"{n}.norm1"] = ((hidden,), "whole")
        found[f"{n}.norm2"] = ((hidden,), "whole")
    return found


def shardings(case: str, scale: int):
    """The source and the target sharding of every tensor."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = np.array(jax.devices())
    dp2mp4 = Mesh(devices.reshape(2, 4), ("dp", "mp"))
    dp4mp2 = Mesh(devices.reshape(4, 2), ("dp", "mp"))
    mp8 = Mesh(devices, ("mp",))
    four = Mesh(devices[:4], ("mp",))
    halves = (Mesh(devices[:4], ("mp",)), Mesh(devices[4:], ("mp",)))
    source, target = {
        "dp2mp4 → mp8": (dp2mp4, mp8),
        "dp2mp4 → dp4mp2": (dp2mp4, dp4mp2),
        "mp8 → pp2mp4": (mp8, None),
        "4 → 8 devices": (four, mp8),
    }[case]
    specs = {
        "row": PartitionSpec("mp", None),
        "col": PartitionSpec(None, "mp"),
        "whole": PartitionSpec(),
    }
    before, after = {}, {}
    for name, (_, kind) in tensors(scale).items():
        layer = int(name.split(".")[0]) if "." in name else (0 if name == "embed" else 15)
        before[name] = NamedSharding(source, specs[kind])
        after[name] = NamedSharding(target or halves[layer // 8], specs[kind])
    return before, after


def make(before: dict, scale: int) -> dict:
    """The source tree, made on the devices, so that XLA owns its memory."""
    import jax
    import jax.numpy as jnp

    tree = {}
    shapes = {name: shape for name, (shape, _) in tensors(scale).items() if name in before}
    for n, (name, shape) in enumerate(shapes.items()):
        fill = jax.jit(
            lambda n, shape=shape: (
                (
                    (
                        jax.lax.broadcasted_iota(jnp.uint16, shape, len(shape) - 1) * 31
                        + jax.lax.broadcasted_iota(jnp.uint16, shape, 0) * 7
                        + n.astype(jnp.uint16)
                    )
                    & 0x3FFF  # finite: one jit over the tree does not keep every NaN
                ).view(jnp.bfloat16)
            ),
            out_shardings=before[name],
        )
        tree[name] = jax.block_until_ready(fill(jnp.uint32(n)))
    return tree


def links(before: dict, after: dict, scale: int) -> dict:
    """Bytes that must go from one device to another, by (source, target), per tensor."""
    import numpy as np

    from jaxshard.transfer.geometry import Move, pieces

    found = []
    for name, (shape, _) in tensors(scale).items():
        move = Move(shape, np.dtype(np.uint16), before[name], after[name])
        per = defaultdict(int)
        for piece in pieces(move):
            for t in piece.targets:
                pair = (move.source_devices[piece.source], move.target_devices[t])
                if pair[0] != pair[1]:
                    per[pair] += piece.box.size * 2
        found += [(a, b, n) for (a, b), n in per.items()]
    return found


class Memory:
    """The most anonymous memory of this process while it is open, in bytes."""

    def __enter__(self) -> Memory:
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.grown = max(self.peak, self._now()) - self.start

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        return 0


def fresh(tree: dict) -> dict:
    """The same memory as new arrays: JAX keeps what it has read back to the host with the old."""
    import jax

    return {
        k: jax.make_array_from_single_device_arrays(
            x.shape, x.sharding, [s.data for s in x.addressable_shards]
        )
        for k, x in tree.items()
    }


def method_of(method: str, tree: dict, before: dict, after: dict, scale: int):
    """A function of the tree that does the whole job, and the time to prepare it."""
    import jax
    import numpy as np

    import jaxshard.transfer as js

    if method.startswith("jaxshard"):
        route = "device" if method.endswith("device") else "auto"
        t0 = time.perf_counter()
        run = js.prepare_reshard(tree, after, route=route, device_bytes=DEVICE_BYTES)
        print(run.plan, file=sys.stderr)
        return lambda tree: jax.block_until_ready(run(tree)), time.perf_counter() - t0
    if method == "device_put":
        return lambda tree: jax.block_until_ready(jax.device_put(tree, after)), 0.0
    if method == "one jit":
        identity = jax.jit(lambda x: x, out_shardings=after)
        return lambda tree: jax.block_until_ready(identity(tree)), 0.0
    sent = links(before, after, scale)
    ones = [jax.device_put(np.ones(n, np.uint8), a) for a, _, n in sent]
    ones = jax.block_until_ready([x + x for x in ones])  # XLA's own memory
    to = [b for _, b, _ in sent]
    return lambda _: jax.block_until_ready(jax.device_put(ones, to)), 0.0


def idle_share(run, tree: dict) -> float:
    """The part of a repeated call in which no thread is copying; the least of five."""
    from jaxshard.transfer import host_views

    copy, spans = host_views._copy, []

    def timed(copies) -> None:
        t0 = time.perf_counter()
        copy(copies)
        spans.append((t0, time.perf_counter()))

    host_views._copy = timed
    shares = []
    for _ in range(5):
        source = fresh(tree)
        spans.clear()
        t0 = time.perf_counter()
        run(source)
        t1 = time.perf_counter()
        busy, busy_until = 0.0, t0
        for a, b in sorted(spans):
            busy += max(b - max(a, busy_until), 0.0)
            busy_until = max(busy_until, b)
        shares.append(1 - busy / (t1 - t0))
    host_views._copy = copy
    return min(shares)


def child(case: str, method: str, scale: int, repeats: int) -> None:
    """Measure one method, and print the result as JSON."""
    import jax
    import numpy as np

    before, after = shardings(case, scale)
    tree = make(before, scale)
    want = {k: np.asarray(v).view(np.uint16) for k, v in list(tree.items())[:12]}
    run, prepare = method_of(method, tree, before, after, scale)
    with Memory() as memory:
        source = fresh(tree)
        t0 = time.perf_counter()
        out = run(source)
        first = time.perf_counter() - t0
    if method != "floor":
        for name, value in want.items():
            assert out[name].sharding.is_equivalent_to(after[name], value.ndim), name
            assert np.array_equal(np.asarray(out[name]).view(np.uint16), value), name
    walls = []
    for _ in range(repeats):
        del out
        source = fresh(tree)
        t0 = time.perf_counter()
        out = run(source)
        walls.append(time.perf_counter() - t0)
    idle = idle_share(run, tree) if method == "jaxshard" else None
    target_bytes = (
        sum(s.data.nbytes for x in out.values() for s in x.addressable_shards)
        if method != "floor"
        else 0
    )
    print(
        json.dumps(
            {
                "prepare": prepare,
                "first": first,
                "walls": walls,
                "memory": memory.grown,
                "idle": idle,
                "target_bytes": target_bytes,
                "jax": jax.__version__,
            }
        )
    )


def use_eight_cpu_devices(env) -> None:
    """Set in ``env`` what JAX reads when it is imported."""
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "TF_CPP_MIN_LOG_LEVEL": "3"}


def measure(case: str, method: str, scale: int, repeats: int) -> dict | str:
    """The result of one method, or why there is none."""
    command = [sys.executable, __file__, "--child", case, method, str(scale), str(repeats)]
    env = dict(os.environ)
    use_eight_cpu_devices(env)
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=300, check=False
        )
    except subprocess.TimeoutExpired:
        return "no answer in 300 s"
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return said[-1][:90] if said else f"ended by signal {-done.returncode}: out of memory?"
    return json.loads(done.stdout.splitlines()[-1])


def report(cases: list[str], methods: list[str], scale: int, repeats: int) -> None:
    """Print one table per case."""
    print(f"{platform.machine()}, {os.cpu_count()} cpus, {platform.platform()}")
    for case in cases:
        print(f"\n{case}")
        found = {m: measure(case, m, scale, repeats) for m in methods}
        floor = found.get("floor")
        base = statistics.median(floor["walls"]) if isinstance(floor, dict) else float("nan")
        heads = ("prepare s", "first s", "repeat s", "min s", "÷ floor", "memory MB", "÷ target")
        print(" " * 18 + "".join(f"{head:>11}" for head in heads))
        for method, got in found.items():
            if isinstance(got, str):
                print(f"  {method:16} {got}")
                continue
            wall = statistics.median(got["walls"])
            share = got["memory"] / got["target_bytes"] if got["target_bytes"] else float("nan")
            cells = (got["prepare"], got["first"], wall, min(got["walls"]), wall / base)
            numbers = "".join(f"{x:11.3f}" for x in cells)
            idle = "" if got["idle"] is None else f"  {got['idle']:.1%} of a call copies nothing"
            print(f"  {method:16}{numbers}{got['memory'] / 1e6:11.0f}{share:11.2f}{idle}")


def stress(scale: int, layers: int, runs: int) -> None:
    """Run the device routes again and again while other processes keep every cpu busy.

    Without a barrier between programs in which devices wait for each other, XLA:CPU
    stops for good under such load; the caller's timeout is what would notice.
    """
    import jax
    import numpy as np

    import jaxshard.transfer as js

    spin = "while True: pass"
    load = [
        subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        before, after = shardings("dp2mp4 → mp8", scale)
        tree = make(before, scale)
        there = js.prepare_reshard(tree, {n: columns(s) for n, s in after.items()}, route="device")
        want = {n: np.asarray(x).view(np.uint16) for n, x in tree.items()}
        t0 = time.perf_counter()
        for _ in range(runs):
            moved = there(tree)
        seconds = time.perf_counter() - t0
        assert all(np.array_equal(np.asarray(moved[n]).view(np.uint16), want[n]) for n in want)
    finally:
        for process in load:
            process.kill()
            process.wait()
    kinds = {leaf.kind for leaf in there.plan.leaves}
    print(
        f"{runs} runs of {len(tree)} arrays ({', '.join(sorted(kinds))}) ended in {seconds:.1f} s"
    )
    print(f"jax {jax.__version__}, load of {len(load)} processes on {os.cpu_count()} cpus")


def columns(sharding):
    """The sharding with its last dim split in place of its first: every byte is exchanged."""
    from jax.sharding import NamedSharding, PartitionSpec

    spec = (
        PartitionSpec(None, "mp") if sharding.spec == PartitionSpec("mp", None) else sharding.spec
    )
    return NamedSharding(sharding.mesh, spec)


def gpu() -> None:
    """What one GPU can show: the routes of one device, and that nothing is read back."""
    import jax

    devices = [d for d in jax.devices() if d.platform == "gpu"]
    if not devices:
        print(f"skipped: no GPU here, only {jax.devices()[0].platform}")
        print("With one GPU it would show that reshard and gather on that device, into its pinned")
        print("host memory and back, pass JAX's device-to-host and host-to-device guards, which on")
        print("a GPU catch every copy; with several, the same for each pair of layouts over them.")
        return
    check_on(devices)


def check_on(devices: list) -> None:
    """Move arrays between all layouts of these devices under JAX's transfer guards."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

    import jaxshard.transfer as js

    mesh = Mesh(np.array(devices), ("x",))
    specs = [PartitionSpec(), PartitionSpec("x"), PartitionSpec(None, "x")]
    ends = [NamedSharding(mesh, s) for s in specs]
    ends += [SingleDeviceSharding(devices[-1])]
    side = 4096 * len(devices)
    seconds = defaultdict(list)
    for dtype in ("bfloat16", "float32", "int8", "int4", "float8_e4m3fn"):
        value = jax.random.randint(jax.random.key(0), (side, side), 0, 8).astype(dtype)
        for a in ends:
            for b in ends:
                x = jax.block_until_ready(jax.device_put(value, a))
                run = js.prepare_reshard(x, b)
                with (
                    jax.transfer_guard_device_to_host("disallow_explicit"),
                    jax.transfer_guard_host_to_device("disallow_explicit"),
                ):
                    jax.block_until_ready(run(x))
                    t0 = time.perf_counter()
                    y = jax.block_until_ready(run(x))
                seconds[run.plan.leaves[0].kind].append(time.perf_counter() - t0)
                assert y.sharding.is_equivalent_to(b, 2)
                same = jnp.array_equal(jax.device_put(y, devices[0]), jax.device_put(x, devices[0]))
                assert bool(same), (dtype, a, b)
    print(f"{len(devices)} × {devices[0].device_kind}: every pair arrived, guards silent")
    for kind, times in seconds.items():
        print(f"  {kind:10}{len(times):4} moves, median {statistics.median(times) * 1e3:.2f} ms")
    if len(devices) == 1:
        print("  not shown: anything between devices; one GPU cannot be several to JAX")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--stress", action="store_true", help="50 runs while every cpu is busy")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case, method, scale, repeats = args.child
        child(case, method, int(scale), int(repeats))
    elif args.gpu:
        gpu()
    elif args.stress:
        use_eight_cpu_devices(os.environ)
        stress(16 if args.smoke else 4, 1 if args.smoke else 16, 50)
    else:
        scale, repeats = (16, 2) if args.smoke else (1, args.repeats)
        methods = args.method or [m for m in METHODS if not (args.smoke and m in _SLOW_TO_COMPILE)]
        report(args.case or list(CASES), methods, scale, repeats)


if __name__ == "__main__":
    main()
