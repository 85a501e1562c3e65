"""What each of several processes does in the tests of loading and saving."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - names its dtypes to NumPy
import numpy as np
import processes
import pytest
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxshard as js
from jaxshard import loader, saver
from jaxshard.distributed.processes import part_of
from jaxshard.errors import JaxshardError
from jaxshard.saver import shared_write
from jaxshard.saver.publish import Publication
from jaxshard.storage import engine, fetch, writers
from jaxshard.storage.transaction import Transaction

P = PartitionSpec
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


def forbid_gathering():
    """Nothing may ask all processes for their data, as JAX does to compare it."""

    def asked(*args, **kwargs):
        raise AssertionError("all data was asked of all processes")

    patch = pytest.MonkeyPatch()
    for name in ("process_allgather", "assert_equal", "broadcast_one_to_all"):
        patch.setattr(multihost_utils, name, asked)


def on_all(*spec):
    return NamedSharding(Mesh(np.array(jax.devices()), ("all",)), P(*spec))


def on_process(index, *spec):
    devices = [d for d in jax.devices() if d.process_index == index]
    return NamedSharding(Mesh(np.array(devices), ("own",)), P(*spec))


def placed(truth, sharding):
    """An array of JAX of what all processes know."""
    if not sharding.addressable_devices:
        return jax.make_array_from_single_device_arrays(
            truth.shape, sharding, [], dtype=truth.dtype
        )
    return jax.make_array_from_callback(
        truth.shape, sharding, lambda index: truth[index], dtype=truth.dtype
    )


def refusal(work):
    """What ``work`` says when it refuses, and after how many seconds."""
    begun = time.monotonic()
    try:
        work()
    except (JaxshardError, OSError) as error:
        return [type(error).__name__, str(error), time.monotonic() - begun]
    return ["done", "", time.monotonic() - begun]


def load_and_save(index, count, source, wide, out):
    """Load in every layout, save in several forms, load what was saved."""
    forbid_gathering()
    truth, answer = truth_of(source), {"load": {}, "save": {}, "balanced": {}, "wide": {}}
    for strategy in STRATEGIES:
        answer["load"][strategy], arrays = _loaded(source, strategy, truth)
        if strategy in ("dp2mp4", "mp4pp2", "dp4mp2optall"):
            for form in ("huggingface", "ranks"):
                place = f"{out}/{strategy}-{form}"
                report = saver.save(arrays, place, format=form, fsync=False, timeout_s=60)
                assert js.open(place)  # it is there for everybody when save has returned
                answer["save"][f"{strategy}-{form}"] = {
                    "right": is_right(loader.load(place, strategy), truth),
                    "written": report.counts.bytes_written,
                }
    for strategy in ("dp2mp4", "dp8", "dp2mp2pp2"):
        answer["balanced"][strategy] = _loaded(source, strategy, truth, balanced=True)[0]
    truth = truth_of(wide)  # whose columns are pages long: nothing lies between that is read over
    for name, spec in (("rows", ["all"]), ("columns", [None, "all"]), ("whole", [])):
        for balanced in (False, True):
            found, _ = _loaded(wide, on_all(*spec), truth, balanced=balanced)
            answer["wide"][f"{name}{' balanced' if balanced else ''}"] = found
    return answer


def _loaded(source, target, truth, **how):
    counts = []
    arrays = loader.load(source, target, counted=counts.append, **how)
    return {
        "right": is_right(arrays, truth),
        "needed": counts[0].bytes_needed,
        "read": counts[0].bytes_read,
        "share": distinct_bytes(arrays),
    }, arrays


FORMS = {
    "ckpt": {"format": "ckpt"},
    "unified": {"format": "unified"},
    "small-files": {"max_shard_size": 40_000, "fsync": True},
    "no-redundancy": {"format": "ranks", "remove_redundancy": True},
    "other-strategy": {"format": "ranks", "strategy": "dp4mp2", "fsync": True},
}


def forms(index, count, source, out):
    """Trees and forms of all kinds; each is there for all, whole, when save has returned."""
    forbid_gathering()
    arrays = loader.load(source, "dp2mp4")
    for name, how in FORMS.items():
        saver.save(arrays, f"{out}/{name}", extras=source, timeout_s=60, **({"fsync": False} | how))
    chance = np.random.default_rng(0)
    truth = {n: chance.standard_normal((8, 8), np.float32) for n in "abcdh"}
    truth["step"] = np.int32(7) * np.ones((), np.int32)
    mixed = {
        "a": placed(truth["a"], on_process(0)),
        "b": placed(truth["b"], on_all()),
        "c": placed(truth["c"], on_all()),
        "d": placed(truth["d"], on_process(count - 1, "own")),
        "step": jnp.int32(7),  # on a device of each process's own
        "h": truth["h"],  # and a copy of the host in each
    }
    right = {}
    for name, tree in (
        ("mixed", mixed),
        ("first alone", {"a": mixed["a"]}),
        ("last alone", {"d": mixed["d"]}),
        ("host", {"h": truth["h"]}),
    ):
        place = f"{out}/{name.replace(' ', '-')}"
        saver.save(tree, place, fsync=False, timeout_s=60)
        right[name] = _is_same(place, {n: truth[n] for n in tree})
    if index == count - 1:  # the others do not call
        saver.save({"d": mixed["d"]}, f"{out}/own", single_process=True, fsync=False)
        right["own"] = _is_same(f"{out}/own", {"d": truth["d"]})
    with jax.enable_x64(True):
        whole = js.gather({"a": mixed["a"], "d": mixed["d"]}, host=True, from_processes=True)
    right["gathered"] = all(whole[n].tobytes() == truth[n].tobytes() for n in whole)
    return {
        "right": right,
        "part": str(part_of("auto", "auto", {"SLURM_PROCID": "9", "SLURM_NTASKS": "10"})),
        "refused": _refused(index, count, arrays, mixed, out),
        "after": _after(arrays, source, out),
    }


def _is_same(place, truth):
    found = truth_of(place)
    return set(found) == set(truth) and all(
        found[n].dtype == t.dtype and found[n].tobytes() == t.tobytes() for n, t in truth.items()
    )


def _refused(index, count, arrays, mixed, out):
    """What is wrong in one process alone all hear of, and the next save is good all the same."""
    last = index == count - 1
    unlike = mixed | {"b": placed(np.zeros((8, 8), np.float32), on_all("all" if last else None))}
    other = {"w": placed(np.zeros((8, 8), np.float32), on_process(0 if last else count - 1, "own"))}
    nowhere = {"x": arrays["model.norm.weight"]} | other
    full = f"{out}/ckpt"
    plain = Publication.begin

    def begin(*args, **kwargs):
        if last:
            raise OSError(28, "No space left on device")
        return plain(*args, **kwargs)

    found = {
        "format": refusal(lambda: saver.save(arrays, out, format="tar" if last else "ranks")),
        "unlike": refusal(lambda: saver.save(unlike, f"{out}/x", timeout_s=60)),
        "nobody": refusal(lambda: saver.save(nowhere, f"{out}/x", timeout_s=60)),
        "exists": refusal(lambda: saver.save(arrays, full, timeout_s=60)),
        "alone": refusal(lambda: saver.save(arrays, f"{out}/x", single_process=True)),
    }
    own = f"{out}/host{index}"
    Publication.begin = begin
    how = {"format": "ranks", "shared_filesystem": False, "fsync": False, "timeout_s": 60}
    found["own"] = refusal(lambda: saver.save(arrays, own, **how))
    Publication.begin = plain
    saver.save(arrays, own, **how)  # nobody keeps the lock of what was given up
    return found


def _after(arrays, source, out):
    saver.save(arrays, f"{out}/after", fsync=False, timeout_s=60)
    return is_right(loader.load(f"{out}/after", "mp8"), truth_of(source))


PHASES = {  # what is called in the middle of each
    "begin": (writers.SharedFiles, "lay_out"),
    "write": (writers.SharedFiles, "write"),
    "publish": (Transaction, "publish"),
    "wait": (shared_write, "wait_for"),
}


def killed_while_saving(index, count, source, out, who, phase, after):
    """One process ends at once, in the middle; the others say what they then heard."""
    arrays = loader.load(source, "dp2mp2")
    if index == who:
        die_in(*PHASES[phase], after)
    processes.leave(
        refusal(lambda: saver.save(arrays, out, overwrite=True, fsync=False, timeout_s=2))
    )


def die_in(owner, name, after=0):
    """Have this process killed when ``name`` of ``owner`` is called after ``after`` calls."""
    plain, left = getattr(owner, name), [after]

    def dying(*args, **kwargs):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return plain(*args, **kwargs)

    setattr(owner, name, dying)


def rerun(index, count, source, places):
    """The same saves again, in processes that know nothing of those that were killed."""
    arrays, truth = loader.load(source, "dp2mp2"), truth_of(source)
    for place in places:
        saver.save(arrays, place, overwrite=True, fsync=False, timeout_s=60)
    return [is_right(loader.load(place, "mp4"), truth) for place in places]


def failing_while_saving(index, count, source, out):
    """The disk of one process is full; all hear of it at once, and the next save is good."""
    arrays = loader.load(source, "dp2mp4")
    plain = writers.SharedFiles.write

    def full(self, *args):
        raise OSError(28, "No space left on device")

    if index == count - 1:
        writers.SharedFiles.write = full
    _, said, seconds = refusal(lambda: saver.save(arrays, out, fsync=False, timeout_s=60))
    writers.SharedFiles.write = plain
    saver.save(arrays, out, fsync=False, timeout_s=60)
    return [said, seconds, is_right(loader.load(out, "mp8"), truth_of(source))]


def balanced_while_one_fails(index, count, source, how):
    """One process cannot read, or is killed before the meeting, or inside the collectives."""
    jax.devices()
    if index == 1 and how == "damaged":
        source = source + "-damaged"
    elif index == 1:
        die_in(loader, {"reading": "carry", "sending": "gathered"}[how])
    timeout_s = 2 if how == "reading" else 60
    heard = refusal(lambda: loader.load(source, "dp2mp2", balanced=True, timeout_s=timeout_s))
    return heard if how == "damaged" else processes.leave(heard)


def load_balanced(index, count, source):
    return is_right(loader.load(source, "dp2mp2", balanced=True), truth_of(source))


def apart(index, count, source, out):
    """No disk is shared: each process has a folder of its own, and never sees another's."""
    truth, own, answer = truth_of(source), f"{out}/host{index}/ckpt", {}
    for strategy in ("dp2mp4", "mp4pp2"):
        arrays = loader.load(source, strategy)
        place = f"{own}-{strategy}"
        how = {"format": "ranks", "shared_filesystem": False, "fsync": False}
        saver.save(arrays, place, timeout_s=60, **how)
        again = loader.load(place, strategy)
        answer[strategy] = {
            "right": is_right(again, truth),
            "names": sorted(p.name for p in Path(place).iterdir()),
        }
    refused = {}
    mesh = Mesh(np.array(jax.devices()), ("all",))
    arrays = loader.load(source, lambda name: NamedSharding(mesh, PartitionSpec("all")))
    for name, work in (
        ("other layout", lambda: loader.load(f"{own}-mp4pp2", "dp8")),
        ("shared", lambda: saver.save(arrays, f"{own}-together", timeout_s=4)),
        ("complete", lambda: saver.save(arrays, f"{own}-x", shared_filesystem=False)),
        ("orbax", lambda: saver.save(arrays, f"{own}-x", format="orbax")),
    ):
        try:
            work()
        except JaxshardError as error:
            refused[name] = f"{type(error).__name__}: {error}"
    return answer | {"refused": refused}


def mixed_saves(index, count, source, out):
    """One host dies while all publish: it has an older save than the others, and all hear of it."""
    own = f"{out}/host{index}/mixed"
    how = {"format": "ranks", "shared_filesystem": False, "fsync": False, "overwrite": True}
    arrays = loader.load(source, "mp4pp2")
    saver.save(arrays, own, **how, timeout_s=60)
    again = is_right(loader.load(own, "mp4pp2"), truth_of(source))
    plain = Transaction.publish

    def publish(self, *args):
        if index == 1:
            raise OSError(5, "Input/output error")
        return plain(self, *args)

    Transaction.publish = publish
    cut_short = refusal(lambda: saver.save(arrays, own, **how, timeout_s=60))
    Transaction.publish = plain
    return {
        "again": again,
        "cut short": cut_short,
        "plain": refusal(lambda: loader.load(own, "mp4pp2", timeout_s=60)),
        "balanced": refusal(lambda: loader.load(own, "mp4pp2", balanced=True, timeout_s=60)),
    }


def peak_memory(index, count, source, out):
    """How far memory grows beyond what is held before, for each verb, and what the arrays take."""
    rows, columns, replicas = P(("p", "d")), P(None, ("p", "d")), P("d")
    mesh = Mesh(np.array(jax.devices()).reshape(count, -1), ("p", "d"))
    how = {"host_bytes": 8 << 20, "workers": 1}
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.local_devices()[0]))
    grown, held = {}, {}

    def measured(name, work):
        before = _peak_bytes()
        made = jax.block_until_ready(work())
        grown[name] = _peak_bytes(reset=False) - before
        return made

    small = np.zeros((64, 64), np.float32)  # gloo and XLA take what they take once
    js.reshard(placed(small, NamedSharding(mesh, rows)), NamedSharding(mesh, columns))
    name = min(js.open(source).tensors)
    target = NamedSharding(mesh, replicas)
    found = measured(
        "balanced",
        lambda: loader.load(source, target, include=[f"^{name}$"], balanced=True, **how),
    )
    held["balanced"] = distinct_bytes(found)
    found.clear()
    target = NamedSharding(mesh, rows)
    arrays = measured("load", lambda: loader.load(source, target, **how))
    held["load"] = distinct_bytes(arrays)
    measured("save", lambda: saver.save(arrays, out, fsync=False, **how) and None)
    measured("reshard", lambda: js.reshard(arrays, NamedSharding(mesh, columns)))
    return {"grown": grown, "held": held}


def _peak_bytes(reset=True):
    """The most memory since it was last asked with ``reset``."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")


def load_from_store(index, count, url, source):
    """Whether loads are right, balanced by default and not, and the bytes that each fetched."""
    fetch.REQUEST_BYTES = fetch.RemoteFiles.request_bytes = 64 << 10
    fetch.GAP_BYTES = engine.GAP_BYTES = 4 << 10
    truth, answer = truth_of(source), {}
    for strategy in ("dp2mp4", "mp8"):
        counts = []
        loaded = [
            is_right(loader.load(url, strategy, counted=counts.append, **how), truth)
            for how in ({}, {"balanced": False})
        ]
        answer[strategy] = (*loaded, *(c.bytes_fetched for c in counts))
    return answer


def two_copies(index, count, folders):
    """Each process has a folder of its own at "the same" path; what loads of all kinds say."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    here, own = NamedSharding(mesh, PartitionSpec()), jax.local_devices()
    targets = {
        "strategy": ("dp2mp4", {}),
        "balanced": ("dp2mp4", {"balanced": True}),
        "sharding": (here, {}),
        "function": (lambda name: here, {}),
        "tree": ({"model.norm.weight": here}, {"strict": False}),
        "names": ("mp4", {"names": "llama-hf:llama-mindformers", "devices": jax.devices()[2:6]}),
    }
    first, other, copied, nowhere = folders

    def loaded(paths, target, how):
        return refusal(lambda: loader.load(paths[index], target, timeout_s=60, **how))

    answer = {"differ": {}, "copied": {}, "nowhere": {}}
    for what, (target, how) in targets.items():
        answer["differ"][what] = loaded((first, other), target, how)
        answer["copied"][what] = loaded((first, copied), target, how)
        if what != "function":  # only when it is open does it say where it goes
            answer["nowhere"][what] = loaded((first, nowhere), target, how)
    if index == 0:  # one process loads onto its own devices, and the others know nothing of it
        named = NamedSharding(Mesh(np.array(own), ("all",)), PartitionSpec())
        for target, devices in ((own[0], None), (lambda name: named, None), ("mp2", own[:2])):
            loader.load(first, target, devices=devices, timeout_s=1)
        loader.load(first, {"model.norm.weight": named}, strict=False, timeout_s=1)
    return answer


def own_ranks_only(index, count, servers, whole, strategy):
    """Each server has the rank files of its own stage, which MindSpore wrote, and loads them."""
    arrays = loader.load(servers[index], strategy, timeout_s=60)
    wanted = loader.load(whole, strategy, timeout_s=60)
    same = all(
        all(
            np.array_equal(np.asarray(a.data), np.asarray(b.data))
            for a, b in zip(array.addressable_shards, wanted[name].addressable_shards, strict=True)
        )
        and array.sharding == wanted[name].sharding
        for name, array in arrays.items()
    )
    held = {name for name, array in wanted.items() if array.addressable_shards}
    return {
        "same": same,
        "all here": held <= arrays.keys(),
        "other layout": refusal(lambda: loader.load(servers[index], "dp2mp4", timeout_s=60))[1],
    }
