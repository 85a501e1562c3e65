"""Moving a model between layouts on its devices: jaxshard against device_put, one jit, and a copy.

    python benchmarks/reshard.py            the 1.7 GB tree of 147 tensors
    python benchmarks/reshard.py --smoke    the same, tiny
    python benchmarks/reshard.py --save     and keep the results for this machine
    python benchmarks/reshard.py --stress   50 runs while every cpu is busy: no deadlock
    python benchmarks/reshard.py --gpu      what one GPU can show; says so where there is none

Each method runs in a process of its own, on eight devices of the CPU backend: one first call,
then repeated ones, then some more while its memory is watched. All tensors are compared with
what they should be, bit for bit, after every call. ``floor`` copies, device to device, as
many bytes as must change devices, in one piece for each pair of devices. ``memory`` is the most
anonymous memory in any call, first or repeated, beyond the source tree. Ratios are of medians
within one run of the program.

``outside`` is the part of a repeated call that moves nothing: on the default route the time in
which no thread is copying; on the device routes, where XLA's threads cannot be seen, what a call
takes for the same tree with every side 16 times smaller (an upper bound: latencies are in it).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import measure

# ruff: noqa: PLC0415 - JAX and what needs it are imported by the measured processes alone
sys.path.insert(0, str(Path(__file__).parent.parent))

METHODS = ("jaxshard", "jaxshard device", "device_put", "one jit", "floor")
OURS = METHODS[:2]
_SLOW_TO_COMPILE = ("one jit",)  # minutes for some cases, whatever the size of the arrays
CASES = ("dp2mp4 → mp8", "dp2mp4 → dp4mp2", "mp8 → pp2mp4", "4 → 8 devices")
DEVICE_BYTES = 256 << 20
_TINY = 16
_FEW = 3


# --- the trees ---------------------------------------------------------------------------


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


def mesh_of(sizes, names, numbers=range(8)):
    import jax
    import numpy as np
    from jax.sharding import Mesh

    return Mesh(np.array(jax.devices())[list(numbers)].reshape(sizes), names)


def on(mesh, kind: str):
    """The sharding of a tensor of ``kind`` over the axis mp of ``mesh``."""
    from jax.sharding import NamedSharding, PartitionSpec

    spec = {"row": ("mp", None), "col": (None, "mp"), "whole": ()}[kind]
    return NamedSharding(mesh, PartitionSpec(*spec))


def shardings(case: str, scale: int):
    """The source and the target sharding of every tensor."""
    mp8, four = mesh_of((8,), ("mp",)), mesh_of((4,), ("mp",), range(4))
    stages = (four, mesh_of((4,), ("mp",), range(4, 8)))
    dp2mp4, dp4mp2 = (mesh_of(sizes, ("dp", "mp")) for sizes in ((2, 4), (4, 2)))
    source, target = {
        "dp2mp4 → mp8": (dp2mp4, mp8),
        "dp2mp4 → dp4mp2": (dp2mp4, dp4mp2),
        "mp8 → pp2mp4": (mp8, None),
        "4 → 8 devices": (four, mp8),
    }[case]
    before, after = {}, {}
    for name, (_, kind) in tensors(scale).items():
        layer = int(name.split(".")[0]) if "." in name else (0 if name == "embed" else 15)
        before[name] = on(source, kind)
        after[name] = on(target or stages[layer // 8], kind)
    return before, after


def make(before: dict, scale: int) -> dict:
    """The source tree, made on the devices, so that XLA owns its memory."""
    import jax
    import jax.numpy as jnp

    tree, fills = {}, {}
    for n, (name, (shape, _)) in enumerate(tensors(scale).items()):
        if name not in before:
            continue
        key = shape, before[name]
        if key not in fills:
            fills[key] = jax.jit(
                lambda n, shape=shape: _values(jnp, shape, n).view(jnp.bfloat16),
                out_shardings=before[name],
            )
        tree[name] = jax.block_until_ready(fills[key](jnp.uint16(n)))
    return tree


def _values(xp, shape: tuple[int, ...], n):
    """The bits of tensor ``n``. Finite: one jit over the tree does not keep every NaN."""
    bits = xp.arange(shape[-1], dtype=xp.uint16) * xp.uint16(31) + n
    if len(shape) > 1:
        bits = bits + (xp.arange(shape[0], dtype=xp.uint16) * xp.uint16(7))[:, None]
    return bits & xp.uint16(0x3FFF)


def wanted(scale: int) -> dict:
    """The bits of every tensor, by NumPy alone."""
    import numpy as np

    return {
        name: _values(np, shape, np.uint16(n))
        for n, (name, (shape, _)) in enumerate(tensors(scale).items())
    }


def check(out: dict, after: dict, want: dict) -> None:
    """Every shard of every tensor is where it should be, and what it should be."""
    import numpy as np

    assert out.keys() == want.keys()
    for name, array in out.items():
        assert array.sharding.is_equivalent_to(after[name], array.ndim), name
        seen = set()
        for shard in array.addressable_shards:
            where = (str(shard.index), shard.data.unsafe_buffer_pointer())
            if where not in seen:  # replicas may be one memory
                seen.add(where)
                bits = np.asarray(shard.data).view(np.uint16)
                assert np.array_equal(bits, want[name][shard.index]), (name, shard.device)


def fresh(tree: dict) -> dict:
    """The same memory as new arrays: JAX keeps what it has read back to the host with the old."""
    import jax

    return {
        k: jax.make_array_from_single_device_arrays(
            x.shape, x.sharding, [s.data for s in x.addressable_shards]
        )
        for k, x in tree.items()
    }


def link_bytes(before: dict, after: dict, scale: int) -> dict:
    """Bytes that must go from one device to another, by (source, target)."""
    import numpy as np

    from jaxshard.resharding.geometry import ShardingChange, transfers

    found = defaultdict(int)
    for name, (shape, _) in tensors(scale).items():
        move = ShardingChange(shape, np.dtype(np.uint16), before[name], after[name])
        for piece in transfers(move):
            for t in piece.targets:
                pair = (move.source_devices[piece.source], move.target_devices[t])
                if pair[0] != pair[1]:
                    found[pair] += piece.box.size * 2
    return found


# --- one method, in a process of its own --------------------------------------------------


class Memory:
    """The most anonymous memory of this process while it is open, in bytes."""

    def __enter__(self) -> Memory:
        self.peak = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        return 0


def method_of(method: str, tree: dict, before: dict, after: dict, scale: int):
    """A function of the tree that does the whole job, and the time to prepare it."""
    import jax
    import numpy as np

    import jaxshard.resharding as js

    if method in OURS:
        t0 = time.perf_counter()
        run = js.prepare_reshard(tree, after, route=_route(method), device_bytes=DEVICE_BYTES)
        print(run.plan, file=sys.stderr)
        return lambda tree: jax.block_until_ready(run(tree)), time.perf_counter() - t0
    if method == "device_put":
        return lambda tree: jax.block_until_ready(jax.device_put(tree, after)), 0.0
    if method == "one jit":
        identity = jax.jit(lambda x: x, out_shardings=after)
        return lambda tree: jax.block_until_ready(identity(tree)), 0.0
    links = link_bytes(before, after, scale)
    ones = [jax.device_put(np.ones(n, np.uint8), a) for (a, _), n in links.items()]
    ones = jax.block_until_ready([x + x for x in ones])  # XLA's own memory
    to = [b for _, b in links]
    return lambda _: jax.block_until_ready(jax.device_put(ones, to)), 0.0


def _route(method: str) -> str:
    return "device" if method.endswith("device") else "auto"


def timed(run, tree: dict):
    """What ``run`` returns for the tree under new labels, and the seconds it took."""
    source = fresh(tree)
    t0 = time.perf_counter()
    out = run(source)
    return out, time.perf_counter() - t0


def idle_seconds(run, tree: dict) -> float:
    """Seconds of a repeated call in which no thread is copying; the median of five."""
    from jaxshard.resharding import cpu_route

    copy, spans = cpu_route._copy, []

    def watched(copies) -> None:
        t0 = time.perf_counter()
        copy(copies)
        spans.append((t0, time.perf_counter()))

    cpu_route._copy = watched
    idle = []
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
        idle.append(t1 - t0 - busy)
    cpu_route._copy = copy
    return statistics.median(idle)


def tiny_seconds(case: str, method: str, scale: int) -> float:
    """Seconds of a repeated call for a tree of tensors that weigh nothing; the median of five."""
    before, after = shardings(case, scale)
    tree = make(before, scale)
    run, _ = method_of(method, tree, before, after, scale)
    run(tree)
    return statistics.median(timed(run, tree)[1] for _ in range(5))


def child(case: str, method: str, scale: int, repeats: int) -> None:
    """Measure one method, and print the result as JSON."""
    import jax

    before, after = shardings(case, scale)
    tree, want = make(before, scale), wanted(scale)
    run, prepare = method_of(method, tree, before, after, scale)
    memory_before = Memory.now()

    def checked(out) -> None:
        if method != "floor":
            check(out, after, want)

    with Memory() as memory:
        out, first = timed(run, tree)
    peaks = [memory.peak - memory_before]
    checked(out)
    target_bytes = 0
    if method != "floor":
        target_bytes = sum(s.data.nbytes for x in out.values() for s in x.addressable_shards)
    walls = []
    for _ in range(repeats):
        del out
        out, wall = timed(run, tree)
        checked(out)
        walls.append(wall)
    for _ in range(_FEW):
        del out
        with Memory() as memory:
            out, _ = timed(run, tree)
        checked(out)
        peaks.append(memory.peak - memory_before)
    outside = None
    if method == "jaxshard":
        outside = idle_seconds(run, tree)
    elif method in OURS:
        outside = tiny_seconds(case, method, scale * _TINY if scale == 1 else scale)
    found = {
        "prepare_s": prepare,
        "first_s": first,
        "walls_s": walls,
        "peaks_bytes": peaks,
        "outside_s": outside,
        "target_bytes": target_bytes,
        "jax": jax.__version__,
    }
    print(json.dumps(found))


def use_eight_cpu_devices(env) -> None:
    """Set in ``env`` what JAX reads when it is imported."""
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "TF_CPP_MIN_LOG_LEVEL": "3"}


def sample(case: str, method: str, scale: int, repeats: int) -> dict | str:
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


# --- what came of it ------------------------------------------------------------------------


def bars(got: dict, others: dict) -> dict[str, tuple[float, float | None, bool]]:
    """What one of our methods is held to: by name what it reached, the bar, and whether it holds.

    A method that gave no result is a bar that holds: nothing else would do the job at all.
    """
    wall = statistics.median(got["walls_s"])
    found = {
        f"repeat s, against {name}": (wall, _wall(others.get(name)))
        for name in ("device_put", "one jit")
    }
    found["repeat s, against 2 × floor"] = (wall, 2 * _wall(others.get("floor")))
    found["memory MB, against target + device_bytes"] = (
        max(got["peaks_bytes"]) / 1e6,
        (got["target_bytes"] + DEVICE_BYTES) / 1e6,
    )
    found["outside transfers, against 5 %"] = (got["outside_s"] / wall, 0.05)
    found["prepare + first s, against 3"] = (got["prepare_s"] + got["first_s"], 3.0)
    return {
        name: (reached, None if math.isinf(bar) else bar, reached <= bar)
        for name, (reached, bar) in found.items()
    }


def _wall(got: dict | str | None) -> float:
    return statistics.median(got["walls_s"]) if isinstance(got, dict) else math.inf


def report(cases: list[str], methods: list[str], scale: int, repeats: int) -> dict:
    """Measure and print one table per case, with a verdict on each bar; all of it, as data."""
    about = measure.machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()), f"load {measure.load()}")
    found = {}
    for case in cases:
        print(f"\n{case}")
        results = {m: sample(case, m, scale, repeats) for m in methods}
        _table(results)
        verdicts = {}
        for method in OURS:
            got = results.get(method)
            if isinstance(got, dict):
                verdicts[method] = bars(got, results)
                if scale == 1:  # what is tiny spends its time outside transfers, whoever moves it
                    _verdict(method, verdicts[method])
        found[case] = {"methods": results, "bars": verdicts}
    return {"scale": scale, "device_bytes": DEVICE_BYTES, "cases": found}


def _table(results: dict[str, dict | str]) -> None:
    base = _wall(results.get("floor"))
    heads = [
        "prepare s",
        "first s",
        "both s",
        "repeat s",
        "min s",
        "÷ floor",
        "memory MB",
        "÷ target",
    ]
    print(" " * 18 + "".join(f"{head:>11}" for head in heads) + f"{'outside ms':>12}")
    for method, got in results.items():
        if isinstance(got, str):
            print(f"  {method:16}{got}")
            continue
        wall, peak = _wall(got), max(got["peaks_bytes"])
        share = peak / got["target_bytes"] if got["target_bytes"] else math.nan
        both = got["prepare_s"] + got["first_s"]
        cells = (got["prepare_s"], got["first_s"], both, wall, min(got["walls_s"]), wall / base)
        outside = "" if got["outside_s"] is None else f"{got['outside_s'] * 1e3:12.1f}"
        numbers = "".join(f"{x:11.3f}" for x in cells)
        print(f"  {method:16}{numbers}{peak / 1e6:11.0f}{share:11.2f}{outside}")


def _verdict(method: str, verdicts: dict[str, tuple[float, float | None, bool]]) -> None:
    for name, (reached, bar, holds) in verdicts.items():
        said = "holds" if holds else "FAILS"
        against = "none: it gave no result" if bar is None else f"{bar:.3f}"
        print(f"  {said}  {method}: {name}: {reached:.3f}, bar {against}")


# --- under load -----------------------------------------------------------------------------


def stress_cases(scale: int, layers: int) -> dict:
    """By name: the source and the target of every tensor of so many layers, and the route."""
    last = {str(n) for n in range(layers, 16)}
    every = tensors(scale).items()
    kinds = {name: kind for name, (_, kind) in every if name.split(".")[0] not in last}
    dp2mp4, mp8 = mesh_of((2, 4), ("dp", "mp")), mesh_of((8,), ("mp",))
    backwards = mesh_of((8,), ("mp",), range(7, -1, -1))
    cube = mesh_of((2, 2, 2), ("a", "b", "c"))
    swapped = {"row": "col", "col": "row", "whole": "whole"}
    rows = {n: on(dp2mp4, kind) for n, kind in kinds.items()}
    columns = {n: on(mp8, swapped[kind]) for n, kind in kinds.items()}
    others = {n: on(backwards, swapped[kind]) for n, kind in kinds.items()}
    # what XLA alone would rebuild whole on every device
    blocks = {n: _split(cube, kind, ("b", "a")) for n, kind in kinds.items()}
    strips = {n: _split(cube, kind, (("b", "c", "a"), None)) for n, kind in kinds.items()}
    return {
        "programs": (rows, columns, "device"),
        "ways round": (blocks, strips, "device"),
        "pieces": (rows, others, "device"),
        "the default route": (rows, columns, "auto"),
    }


def _split(mesh, kind: str, spec: tuple):
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec(*(() if kind == "whole" else spec)))


def stress(scale: int, layers: int, runs: int) -> None:
    """Move again and again while other processes keep every cpu busy, from one thread and two.

    Without a barrier between programs in which devices wait for each other, XLA:CPU
    stops for good under such load; `stress_in_time` is what notices.
    """
    import jax

    import jaxshard.resharding as js

    want = wanted(scale)
    with every_cpu_busy() as num_busy:
        for name, (before, after, route) in stress_cases(scale, layers).items():
            tree = make(before, scale)
            there = js.prepare_reshard(tree, after, route=route)
            kinds = sorted({leaf.kind for leaf in there.plan.leaves})
            num_round = sum(bool(leaf.between) for leaf in there.plan.leaves)
            for num_threads in (1, 2):
                seconds = in_threads(num_threads, runs, lambda there=there, tree=tree: there(tree))
                print(
                    f"{name}, threads {num_threads}: {runs} runs of {len(tree)} arrays "
                    f"({', '.join(kinds)}; {num_round} by a way round) ended in {seconds:.1f} s",
                    flush=True,
                )
            check(there(tree), after, {name: want[name] for name in after})
    print(f"jax {jax.__version__}, {num_busy} busy processes on {os.cpu_count()} cpus")


def in_threads(num_threads: int, runs: int, call) -> float:
    """Seconds until ``runs`` calls from so many threads are over."""
    t0 = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        for done in [pool.submit(call) for _ in range(runs)]:
            done.result()
    return time.perf_counter() - t0


@contextmanager
def every_cpu_busy():
    """Two processes for every cpu that do nothing, as fast as they can; how many there are."""
    load = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        yield len(load)
    finally:
        for process in load:
            process.kill()
            process.wait()


def stress_in_time(*, smoke: bool) -> None:
    """The stress run in a process of its own, which has to end in time."""
    seconds = 300 if smoke else 1800
    command = [sys.executable, __file__, "--stress-child", *(["--smoke"] if smoke else [])]
    env = dict(os.environ)
    use_eight_cpu_devices(env)
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        rc = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the busy ones too
        sys.exit(f"FAILS: no end in {seconds} s; devices wait for each other for good")
    sys.exit(rc)


# --- one GPU ----------------------------------------------------------------------------------


class HostTraffic:
    """Counts the bytes that JAX reads back to the host, or sends from it, while it is open."""

    def __enter__(self) -> HostTraffic:
        import numpy as np
        from jax._src import array
        from jax._src.interpreters import pxla

        self.read_bytes = self.sent_bytes = 0
        self._saved = array.ArrayImpl._value, pxla.batched_device_put
        read, send = self._saved[0].fget, self._saved[1]

        def _value(x):
            self.read_bytes += x.nbytes
            return read(x)

        def batched_device_put(aval, sharding, xs, *args, **kwargs):
            self.sent_bytes += sum(x.nbytes for x in xs if isinstance(x, np.ndarray))
            return send(aval, sharding, xs, *args, **kwargs)

        array.ArrayImpl._value = property(_value)
        pxla.batched_device_put = batched_device_put
        return self

    def __exit__(self, *_: object) -> None:
        from jax._src import array
        from jax._src.interpreters import pxla

        array.ArrayImpl._value, pxla.batched_device_put = self._saved


_WITH_A_GPU = """\
With one GPU it shows that reshard between all shardings over it, into its pinned host memory and
back, and gather to a device take no byte through the host: what JAX counts as read back and as
sent stays at 0, and within device memory its transfer guards, which on a GPU catch every copy,
stay silent. With several GPUs, the same for layouts over them."""


def gpu(*, smoke: bool) -> None:
    """What one GPU can show: the routes of one device, and that nothing is read back."""
    import jax

    devices = [d for d in jax.devices() if d.platform == "gpu"]
    if devices:
        check_on(devices, 512 if smoke else 4096)
        return
    print(f"skipped: no GPU here, only {jax.devices()[0].platform}")
    print(_WITH_A_GPU)
    if smoke:
        print("Here the same program runs on one CPU device, which shows that it runs, no more.")
        check_on(jax.devices()[:1], 64)


def ends_over(devices: list) -> list:
    """Shardings of a matrix over these devices, in their memory and in pinned host memory."""
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

    mesh = Mesh(np.array(devices), ("x",))
    specs = [PartitionSpec(), PartitionSpec("x"), PartitionSpec(None, "x")]
    ends = [NamedSharding(mesh, s) for s in specs]
    ends += [NamedSharding(mesh, s, memory_kind="pinned_host") for s in specs]
    return [*ends, SingleDeviceSharding(devices[-1])]


def check_on(devices: list, side: int) -> None:
    """Move arrays between all layouts of these devices, counting what the host sees."""
    import jax
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    import jaxshard.resharding as js

    seconds = defaultdict(list)
    ends = ends_over(devices)
    for dtype in ("bfloat16", "float32", "int8", "int4", "float8_e4m3fn"):
        value = jax.random.randint(jax.random.key(0), (side, side), 0, 8).astype(dtype)
        want = np.asarray(value)
        for a in ends:
            x = jax.block_until_ready(jax.device_put(value, a))
            for b in ends:
                run = js.prepare_reshard(x, b, route="device", copy=True)
                with HostTraffic() as host, guards(a, b):
                    jax.block_until_ready(run(x))
                    t0 = time.perf_counter()
                    y = jax.block_until_ready(run(x))
                    seconds[run.plan.leaves[0].kind].append(time.perf_counter() - t0)
                    # js.gather(y, devices[0]), by this route also where the CPU runs this program
                    one = js.reshard(y, SingleDeviceSharding(devices[0]), route="device")
                    jax.block_until_ready(one)
                assert (host.read_bytes, host.sent_bytes) == (0, 0), (dtype, a, b)
                assert y.sharding == b
                assert one.devices() == {devices[0]}
                with HostTraffic() as host:
                    whole = js.gather(y, host=True)
                # once at most: in pinned memory, and on the CPU, NumPy looks at the memory itself
                assert host.read_bytes <= want.nbytes, (dtype, a, b, host.read_bytes)
                assert whole.tobytes() == want.tobytes(), (dtype, a, b)
    print(f"{len(devices)} × {devices[0].device_kind}: all arrived, 0 bytes through the host")
    for kind, times in seconds.items():
        print(f"  {kind:10}{len(times):4} moves, median {statistics.median(times) * 1e3:.2f} ms")
    if len(devices) == 1:
        print("  not shown: anything between devices; one GPU cannot be several to JAX")


@contextmanager
def guards(*ends):
    """JAX's transfer guards, where no end is host memory: a copy there is one they are to catch."""
    import jax

    if any(s.memory_kind == "pinned_host" for s in ends):
        yield
        return
    with (
        jax.transfer_guard_device_to_host("disallow_explicit"),
        jax.transfer_guard_host_to_device("disallow_explicit"),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--save", action="store_true", help="keep the results for this machine")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--stress", action="store_true", help="50 runs while every cpu is busy")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--stress-child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case, method, scale, repeats = args.child
        child(case, method, int(scale), int(repeats))
    elif args.stress_child:
        stress(*((32, 1, 8) if args.smoke else (4, 16, 50)))
    elif args.gpu:
        gpu(smoke=args.smoke)
    elif args.stress:
        stress_in_time(smoke=args.smoke)
    else:
        scale, repeats = (_TINY, 2) if args.smoke else (1, args.repeats)
        methods = args.method or [m for m in METHODS if not (args.smoke and m in _SLOW_TO_COMPILE)]
        found = report(args.case or list(CASES), methods, scale, repeats)
        if args.save:
            print(measure.save("reshard", found))


if __name__ == "__main__":
    main()
