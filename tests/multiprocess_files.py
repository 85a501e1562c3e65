"""What each of several processes does in the tests of loading and saving."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401 - names its dtypes to NumPy
import numpy as np
import processes
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxshard as js
from jaxshard import loading, saving
from jaxshard.errors import JaxshardError
from jaxshard.storage import shared_writing

STRATEGIES = ("dp2mp4", "mp8", "dp8", "dp2mp2pp2", "mp4pp2", "dp4mp2optall")


def truth_of(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= safetensors.numpy.load_file(path)
    return found


def is_right(arrays, truth):
    """Whether all shards here are bit for bit as in ``truth``."""
    assert set(arrays) == set(truth)
    return all(
        np.asarray(s.data).tobytes() == np.ascontiguousarray(truth[n][s.index]).tobytes()
        for n, a in arrays.items()
        for s in a.addressable_shards
    )


def distinct_bytes(arrays):
    """Bytes of this process's distinct shards."""
    held = {
        (n, str(s.index)): s.data.nbytes for n, a in arrays.items() for s in a.addressable_shards
    }
    return sum(held.values())


def load_and_save(index, count, source, out):
    """Load in every layout, save in several forms, load what was saved."""
    truth, answer = truth_of(source), {"load": {}, "save": {}}
    for strategy in STRATEGIES:
        counts = []
        arrays = loading.load(source, strategy, counted=counts.append)
        answer["load"][strategy] = {
            "right": is_right(arrays, truth),
            "read": counts[0].bytes_needed,
            "share": distinct_bytes(arrays),
        }
    answer["balanced"] = {}
    for strategy in ("dp2mp4", "dp8", "dp2mp2pp2"):
        counts = []
        arrays = loading.load(source, strategy, counted=counts.append, balanced=True)
        answer["balanced"][strategy] = {
            "right": is_right(arrays, truth),
            "read": counts[0].bytes_needed,
        }
    for strategy in ("dp2mp4", "mp4pp2", "dp4mp2optall"):
        arrays = loading.load(source, strategy)
        for form in ("huggingface", "ranks"):
            place = f"{out}/{strategy}-{form}"
            report = saving.save(arrays, place, format=form, durable=False, timeout_s=60)
            assert js.open(place)  # it is there for everybody when save has returned
            again = loading.load(place, strategy)
            answer["save"][f"{strategy}-{form}"] = {
                "right": is_right(again, truth),
                "written": report.counts.bytes_written,
                "total": sum(a.nbytes for a in truth.values()),
            }
    return answer


def killed_while_saving(index, count, source, out, who, when):
    """One process ends at once, in the middle; the others say what they then heard."""
    arrays = loading.load(source, "dp2mp4")
    plain, left = shared_writing.SharedFiles.write, [when]

    def dying(self, *args):
        if index == who and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return plain(self, *args)

    shared_writing.SharedFiles.write = dying
    begun = time.monotonic()
    try:
        saving.save(arrays, out, overwrite=True, durable=False, timeout_s=3)
    except JaxshardError as error:
        processes.leave([type(error).__name__, str(error), time.monotonic() - begun])
    processes.leave(["saved", "", 0])


def failing_while_saving(index, count, source, out):
    """The disk of one process is full; all hear of it at once, and the next save is good."""
    arrays = loading.load(source, "dp2mp4")
    plain = shared_writing.SharedFiles.write

    def full(self, *args):
        raise OSError(28, "No space left on device")

    if index == count - 1:
        shared_writing.SharedFiles.write = full
    begun, said = time.monotonic(), None
    try:
        saving.save(arrays, out, durable=False, timeout_s=60)
    except OSError as error:
        said = str(error)
    seconds = time.monotonic() - begun
    shared_writing.SharedFiles.write = plain
    saving.save(arrays, out, durable=False, timeout_s=60)
    return [said, seconds, is_right(loading.load(out, "mp8"), truth_of(source))]


def balanced_while_one_fails(index, count, source, is_killed):
    """One process cannot read, or is killed: nobody waits in a collective for it."""
    jax.devices()
    if index == 1 and is_killed:
        loading.carry = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
    elif index == 1:
        source = source + "-damaged"
    begun = time.monotonic()
    try:
        loading.load(source, "dp2mp4", balanced=True, timeout_s=3 if is_killed else 60)
    except JaxshardError as error:
        heard = [type(error).__name__, str(error), time.monotonic() - begun]
        return processes.leave(heard) if is_killed else heard
    return ["loaded", "", 0]


def apart(index, count, source, out):
    """No disk is shared: each process has a folder of its own, and never sees another's."""
    truth, own, answer = truth_of(source), f"{out}/host{index}/ckpt", {}
    for strategy in ("dp2mp4", "mp4pp2"):
        arrays = loading.load(source, strategy)
        place = f"{own}-{strategy}"
        saving.save(arrays, place, format="ranks", shared=False, durable=False, timeout_s=60)
        again = loading.load(place, strategy)
        answer[strategy] = {
            "right": is_right(again, truth),
            "names": sorted(p.name for p in Path(place).iterdir()),
        }
    refused = {}
    mesh = Mesh(np.array(jax.devices()), ("all",))
    arrays = loading.load(source, lambda name: NamedSharding(mesh, PartitionSpec("all")))
    for name, work in (
        ("other layout", lambda: loading.load(f"{own}-mp4pp2", "dp8")),
        ("shared", lambda: saving.save(arrays, f"{own}-together", timeout_s=4)),
        ("complete", lambda: saving.save(arrays, f"{own}-x", shared=False)),
        ("orbax", lambda: saving.save(arrays, f"{own}-x", format="orbax")),
    ):
        try:
            work()
        except JaxshardError as error:
            refused[name] = f"{type(error).__name__}: {error}"
    return answer | {"refused": refused}


def peak_memory(index, count, source):
    """How far memory grew while loading and saving, beyond the arrays themselves."""
    jax.devices()
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.local_devices()[0]))
    before = _peak_bytes()
    arrays = loading.load(source, "dp2mp4", host_bytes=8 << 20, workers=1)
    return {"grown": _peak_bytes() - before, "share": distinct_bytes(arrays)}


def _peak_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")
