"""What each of several processes does in the tests of the training loop's checkpoints."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import processes
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from multiprocess_files import die_in, forbid_gathering, placed, refusal
from training_weights import SHAPES, SPECS

from jaxshard.distributed.processes import processes_of_jax
from jaxshard.errors import StorageError
from jaxshard.saver import shared_write
from jaxshard.storage import writers
from jaxshard.training import CheckpointManager, commit_step, run_directory, save_step
from jaxshard.training.run_directory import RunDirectory, writer_lock

P = PartitionSpec
FORMATS = ("ranks", "iteration", "huggingface")


def state_of(step, dp, mp):
    """Weights and moments on all devices, a key, a counter, and what is on the host."""
    mesh = Mesh(np.array(jax.devices()[: dp * mp]).reshape(dp, mp), ("dp", "mp"))
    chance = np.random.default_rng(step)

    def arrays(dtype):
        return {
            n: placed(
                chance.standard_normal(SHAPES[n]).astype(dtype), NamedSharding(mesh, SPECS[n])
            )
            for n in SPECS
        }

    return {
        "params": arrays("bfloat16"),
        "opt_state": [{"mu": arrays(np.float32), "nu": arrays(np.float32)}],
        "count": jnp.int32(step),  # on a device of each process's own
        "key": jax.random.key(step),
        "keys": jax.random.wrap_key_data(  # on all devices
            placed(chance.integers(0, 1 << 32, (8, 2), np.uint32), NamedSharding(mesh, P("dp")))
        ),
        "seen": np.arange(step, step + 5),
        "step": step,
    }


def is_state_of(state, step, dp, mp):
    """Whether all that this process has of ``state`` is that of ``step``, bit for bit."""
    want = state_of(step, dp, mp)
    if jax.tree.structure(want) != jax.tree.structure(state):
        return False
    return all(_same(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want)))  # noqa: B905


def _same(a, b):
    if not isinstance(b, jax.Array):
        return np.array_equal(a, b) and type(a) is type(b)
    if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
        return a.dtype == b.dtype and _same(jax.random.key_data(a), jax.random.key_data(b))
    here = {s.device: s.data for s in a.addressable_shards}
    return (
        a.dtype == b.dtype
        and here.keys() == {s.device for s in b.addressable_shards}
        and all(
            np.asarray(here[s.device]).tobytes() == np.asarray(s.data).tobytes()
            for s in b.addressable_shards
        )
    )


def manager_of(directory, **how):
    options = {"prefix": "net", "fsync": False, "workers": 1, "timeout_s": 60} | how
    return CheckpointManager(directory, **options)


def save(index, count, out):
    """Runs of two steps in every form; what each process is told on the way."""
    forbid_gathering()
    written, answer = [0], {"refused": {}, "written": {}}
    plain = writers.SharedFiles.write

    def counted(self, rank, name, offset, data):
        written[0] += len(data)
        return plain(self, rank, name, offset, data)

    writers.SharedFiles.write = counted
    for form in FORMATS:
        manager = manager_of(f"{out}/{form}", format=form, save_network_only=True)
        for step in (1, 2):
            manager.save(step, state_of(step, 2, 4), extras={"at": step})
        answer["written"][form] = written[0]
        written[0] = 0
    # in the background; two runs beside each other, and the older steps go
    runs = [manager_of(f"{out}/async-{n}", async_save=True, keep_max=2) for n in range(2)]
    for step in range(1, 6):
        for manager in runs:
            manager.save(step, state_of(step, 2, 4), extras={"at": step})
    for manager in runs:
        manager.close()
    by_time = manager_of(f"{out}/by-time", save_every_seconds=1e-9 if index == 0 else 1e9)
    answer["due"] = [by_time.maybe_save(step, state_of(step, 2, 4)) for step in (1, 2)]
    answer["durable"] = refusal(
        lambda: manager_of(f"{out}/durable", fsync=True).save(1, state_of(1, 2, 4))
    )[0]
    answer["refused"] = _refused(index, out)
    answer["due again"] = _due_again(index, out)
    for _ in range(2):  # a second job of the same prefix
        manager_of(f"{out}/twice").save(1, state_of(1, 2, 4))
    return answer


def _due_again(index, out):
    """After a background save that failed in process 1 alone, and after going back."""
    manager = manager_of(
        f"{out}/again", save_every_steps=10, async_save=True, on_storage_error="warn"
    )
    due = [manager.maybe_save(10, state_of(10, 2, 4))]
    manager.wait()
    plain = shared_write.run
    shared_write.run = _full_disk if index else plain
    try:
        due.append(manager.maybe_save(20, state_of(20, 2, 4)))
        due.append(manager.maybe_save(10, state_of(10, 2, 4)))
        manager.wait()
    finally:
        shared_write.run = plain
    due += [manager.maybe_save(20, state_of(20, 2, 4)) for _ in range(2)]
    manager.wait()
    manager.restore(state_of(0, 2, 4), step=10)
    due += [manager.maybe_save(step, state_of(step, 2, 4)) for step in (10, 20, 20)]
    manager.close()
    return due


def _no_room(*args, **kwargs):
    raise OSError(28, "No space left on device")


def _full_disk(*args, **kwargs):
    raise StorageError("No space left on device.")


def _refused(index, out):
    def bad_extras():
        manager_of(f"{out}/ranks").save(
            3, state_of(3, 2, 4), extras={"x": object()} if index else {}
        )

    def full_disk():
        plain = shared_write.run
        shared_write.run = _no_room if index else plain
        try:
            manager_of(f"{out}/ranks").save(3, state_of(3, 2, 4))
        finally:
            shared_write.run = plain

    def locked():  # by somebody else, whom process 0 alone meets
        run_directory.WAIT_S = 0.1
        hold = writer_lock(RunDirectory.of(f"{out}/ranks")) if index == 0 else nullcontext()
        with hold:
            manager_of(f"{out}/ranks").save(3, state_of(3, 2, 4))

    def no_record():
        plain = save_step._record_of
        save_step._record_of = _no_room
        try:
            manager_of(f"{out}/ranks").save(3, state_of(3, 2, 4))
        finally:
            save_step._record_of = plain

    def orbax():
        manager_of(f"{out}/x", format="orbax").save(1, state_of(1, 2, 4))

    return {
        work.__name__: refusal(work) for work in (bad_extras, full_disk, locked, no_record, orbax)
    }


def restore(index, count, out):
    """What was saved by other processes, onto other layouts."""
    forbid_gathering()
    answer = {}
    for form in FORMATS:
        manager = manager_of(f"{out}/{form}")
        found = manager.restore(state_of(0, 4, 2), verify=True)
        answer[form] = [found.step, found.extras, is_state_of(found.state, 2, 4, 2)]
        named = manager.restore(state_of(0, 2, 4), step=1)
        answer[f"{form} by name"] = [named.step, named.extras, is_state_of(named.state, 1, 2, 4)]
    for n in range(2):
        manager = manager_of(f"{out}/async-{n}")
        found = manager.restore(state_of(0, 8, 1), verify=True)
        answer[f"async {n}"] = [found.step, found.extras, is_state_of(found.state, 5, 8, 1)]
        answer[f"kept {n}"] = [s.global_step for s in manager.steps()]
    weights = jax.tree.map(_described, state_of(0, 2, 4)["params"])
    found = manager_of(f"{out}/huggingface").restore(
        {"params": weights}, parts="weights", strategy="dp4mp2", strict=False
    )
    want = state_of(2, 4, 2)["params"]
    answer["by strategy"] = [
        found.step,
        found.extras,
        all(_same(found.state["params"][n], want[n]) for n in want),
    ]
    answer["nothing"] = manager_of(f"{out}/none").restore(state_of(0, 2, 4), missing_ok=True)
    return answer


def _described(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def damaged(index, count, out):
    """A step that one process alone finds damaged is passed over by all."""
    manager = manager_of(f"{out}/ranks")
    found = manager.restore(state_of(0, 2, 2), verify=True)
    right = is_state_of(found.state, 1, 2, 2)
    return [
        found.step,
        right,
        found.passed_over,
        refusal(lambda: manager.restore(state_of(0, 2, 2), step=2, verify=True)),
    ]


PHASES = {
    "wait": (shared_write, "wait_for"),
    "write": (shared_write, "run"),
    "sum": (save_step, "_sums"),
    "lay out": (writers.SharedFiles, "lay_out"),
    "record": (save_step, "_record_of"),
    "commit": (commit_step, "_put_in_place"),
}


def killed(index, count, out, who, phase, in_background):
    """One process ends at once in the middle of the second save; the others say what they hear."""
    manager = manager_of(out, async_save=in_background, timeout_s=2)
    manager.save(1, state_of(1, 2, 2), extras={"at": 1})
    manager.wait()
    if index == who:
        die_in(*PHASES[phase])

    def work():
        manager.save(2, state_of(2, 2, 2), extras={"at": 2})
        manager.wait()

    processes.leave(refusal(work))


def rerun(index, count, places):
    """Every run goes on from its newest good step."""
    answer = []
    for place in places:
        manager = manager_of(place)
        found = manager.restore(state_of(0, 2, 2), verify=True)
        right = is_state_of(found.state, found.step, 2, 2) and found.extras == {"at": found.step}
        manager.save(3, state_of(3, 2, 2), extras={"at": 3})
        last = manager.restore(state_of(0, 2, 2), verify=True)
        answer.append([found.step, right, is_state_of(last.state, 3, 2, 2)])
    return answer


def different_steps(index, count, out):
    """Each process has a directory of its own, whose step of the same number has other values."""
    for name in "ab":
        manager = manager_of(f"{out}/{name}", format="iteration")
        manager.save(1, state_of(1, 2, 4))
        manager.save(2, state_of(2 if name == "a" else 3, 2, 4) | {"step": 2})
        manager.close()
    own = f"{out}/{'ab'[index]}"
    answer = []
    for _ in ("with records", "without"):  # as MindFormers leaves them
        other = manager_of(own, format="iteration")
        answer.append(refusal(lambda: other.restore(state_of(9, 2, 4), step=2)))  # noqa: B023
        other.close()
        shutil.rmtree(f"{own}/.jaxshard", ignore_errors=True)
        processes_of_jax(60).barrier("removed")
    found = manager_of(own, format="iteration").restore(state_of(9, 2, 4))
    return answer, found.step, found.passed_over
