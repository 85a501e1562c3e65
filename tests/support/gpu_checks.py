"""What must hold on one GPU; run by ``test_gpu.py``, on the first device that JAX has.

python tests/support/gpu_checks.py FOLDER
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxshard.devices.host_memory import pin_for
from jaxshard.devices.host_transfer import to_host
from jaxshard.loader import load
from jaxshard.mapping import Mapping, Stack, Transpose
from jaxshard.resharding import gather
from jaxshard.saver import save
from jaxshard.training import CheckpointManager

DTYPES = ("float32", "bfloat16", "float16", "int8", "uint8", "bool", "int64", "float64")
NARROW = ("float8_e4m3fn", "float8_e5m2")
SIDE = 1500  # 9 MB in float32: large enough for what only large tensors pass through


def model() -> dict[str, np.ndarray]:
    """A tensor of every dtype, one large, one 0-d and one empty."""
    rng = np.random.default_rng(7)
    found = {f"t.{d}": rng.integers(0, 2, (64, 48)).astype(np.dtype(d)) for d in (*DTYPES, *NARROW)}
    found |= {f"w.{n}": rng.standard_normal((SIDE, SIDE), np.float32) for n in range(12)}
    found |= {
        f"h.{n}": w.astype(ml_dtypes.bfloat16) for n, w in enumerate(list(found.values())[-3:])
    }
    return found | {"scalar": np.float32(3).reshape(()), "none": np.zeros((0, 4), np.float32)}


def assert_same(found, expected) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        have = np.asarray(found[name])
        assert have.dtype == value.dtype, (name, have.dtype)
        assert have.tobytes() == value.tobytes(), name


def check_loads(folder: Path, device: jax.Device) -> None:
    """Every dtype arrives; memory that was used for one tensor is not seen by another."""
    values = model()
    checkpoints.write_folder(folder / "model", values)
    for how in ({}, {"host_bytes": 32 << 20}, {"workers": 1}, {"copy": True}, {"dtype": None}):
        arrays = load(folder / "model", device, **how)
        assert all(a.devices() == {device} for a in arrays.values())
        assert_same(arrays, values)
    mesh = Mesh(np.array([device], dtype=object), ("mp",))
    assert_same(load(folder / "model", lambda _: NamedSharding(mesh, PartitionSpec())), values)
    half = load(folder / "model", device, dtype="bfloat16", include=["w[.]"])
    assert_same(half, {n: v.astype(ml_dtypes.bfloat16) for n, v in values.items() if n[:2] == "w."})


def check_turned_loads(folder: Path, device: jax.Device) -> None:
    """Transposed on the way, with and without a CPU device that does it."""
    large = {n: v for n, v in model().items() if n[:2] in ("w.", "h.")}
    mapping = Mapping((Transpose(("w.{layer}", "h.{layer}")), Stack("w.{layer}", "w")))
    arrays = load(folder / "model", device, names=mapping, include=["w[.]", "h[.]"])
    expected = {n: v.T for n, v in large.items() if n.startswith("h.")}
    expected["w"] = np.stack([large[f"w.{n}"].T for n in range(12)])
    assert_same(arrays, expected)
    there = {n: jax.device_put(v, device) for n, v in large.items()}
    assert_same(mapping.apply_arrays(there), expected)


def check_donation(folder: Path, device: jax.Device) -> None:
    """A loaded tree is given to a step that uses its memory, and the answer is right."""
    values = {n: v for n, v in model().items() if n.startswith("w.")}
    tree = load(folder / "model", device, include=["w[.]"])
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = jax.block_until_ready(step(tree))
    assert all(x.is_deleted() for x in tree.values())
    assert_same(out, {n: v + np.float32(1) for n, v in values.items()})


def check_saves(folder: Path, device: jax.Device) -> None:
    """What is saved from there is what was loaded, in all formats, within little memory."""
    values = model()
    for number, how in enumerate(({}, {"host_bytes": 4 << 20}, {"format": "ranks"})):
        tree = load(folder / "model", device)
        out = folder / f"saved-{number}"
        save(tree, out, **how)
        assert_same(load(out, device), values)
        assert_same(tree, values)


def check_hosting(_: Path, device: jax.Device) -> None:
    """Arrays come to the host from device memory and from pinned memory, and are not kept."""
    values = {n: v for n, v in model().items() if v.dtype.itemsize < 8}
    tree = {n: jax.device_put(v, device) for n, v in values.items()}
    assert_same(dict(zip(tree, to_host(list(tree.values())), strict=True)), values)
    pinned = SingleDeviceSharding(device, memory_kind="pinned_host")
    offloaded = jax.device_put(tree, pinned)
    assert_same(dict(zip(offloaded, to_host(list(offloaded.values())), strict=True)), values)
    assert_same(gather(tree, host=True), values)
    int4 = jnp.arange(-8, 8, dtype=jnp.int8).astype(jnp.int4)
    assert to_host([jax.device_put(int4, device)])[0].astype(np.int8).tolist() == [*range(-8, 8)]


def check_steps(folder: Path, device: jax.Device) -> None:
    """A step is saved as it was, though the loop gives its memory away at once."""
    values = {n: v for n, v in model().items() if n.startswith("w.")}
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    for kind in ("device", "pinned_host"):
        place = SingleDeviceSharding(device, memory_kind=kind)
        state = {n: jax.device_put(v, place) for n, v in values.items()}
        manager = CheckpointManager(folder / f"steps-{kind}", async_save=True)
        manager.save(1, state)
        if kind == "device":
            jax.block_until_ready(step(state))
        elif device.platform == "gpu":  # a CPU device's arrays are looked at where they lie
            for array in state.values():
                array.delete()
        manager.close()
        described = {n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in values.items()}
        found = CheckpointManager(folder / f"steps-{kind}").restore(described).state
        assert_same(found, values)


def check_pinning(_: Path, device: jax.Device) -> None:
    """CUDA pins memory, and unpins it, as often as it is asked."""
    pin = pin_for(device)
    assert (pin is not None) == (device.platform == "gpu")
    if pin is None:
        return
    memory = np.ones(8 << 20, np.uint8)
    for _ in range(3):
        unpin = pin(memory.ctypes.data, memory.nbytes)
        assert unpin is not None
        assert pin(memory.ctypes.data, memory.nbytes) is None  # it is pinned already
        assert int(jax.device_put(memory, device).sum()) == memory.size
        unpin()


CHECKS = (
    check_pinning,
    check_loads,
    check_turned_loads,
    check_donation,
    check_saves,
    check_hosting,
    check_steps,
)

if __name__ == "__main__":
    first = jax.devices()[0]
    for check in CHECKS:
        check(Path(sys.argv[1]), first)
        print(f"{first.device_kind}: {check.__doc__.splitlines()[0]}", flush=True)
