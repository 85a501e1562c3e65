"""What each of several processes does in the tests of resharding."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxshard import resharding
from jaxshard.errors import LayoutError

BITS = np.dtype("bfloat16")


def values(shape, dtype=BITS):
    """Random bits, the same in every process."""
    dtype = np.dtype(dtype)
    if dtype.name == "bool":
        return np.random.default_rng(7).random(shape) < 0.5
    return (
        np.random.default_rng(7)
        .integers(0, 256, (*shape, dtype.itemsize), np.uint8)
        .view(dtype)[..., 0]
    )


def spread(truth, sharding):
    with jax.enable_x64(True):
        if not sharding.addressable_devices:
            return jax.make_array_from_single_device_arrays(
                truth.shape, sharding, [], dtype=truth.dtype
            )
        return jax.make_array_from_callback(
            truth.shape, sharding, lambda index: truth[index], dtype=truth.dtype
        )


def is_right(array, truth, sharding):
    """Whether this process's shards are bit for bit as they should be."""
    assert array.sharding == sharding
    assert array.dtype == truth.dtype
    wanted = sharding.addressable_devices_indices_map(truth.shape)
    assert {s.device for s in array.addressable_shards} == set(wanted)
    return all(
        np.ascontiguousarray(np.asarray(s.data)).tobytes()
        == np.ascontiguousarray(truth[wanted[s.device]]).tobytes()
        for s in array.addressable_shards
    )


def grid(index, count, first, step):
    """Random pairs of layouts over all devices, and over some: what was wrong, and by which way."""
    sys.path.append(str(Path(__file__).parents[1] / "resharding"))
    from test_resharding_grid import PARTS, HostTraffic, pairs  # noqa: PLC0415 - needs devices

    traffic = HostTraffic(pytest.MonkeyPatch())
    kinds, wrong, host_bytes, over = Counter(), [], 0, []
    for part in PARTS:
        for n, (shape, source, target) in enumerate(pairs(part)[first::step]):
            truth = values(shape)
            array = spread(truth, source)
            prepared = resharding.prepare_reshard(array, target)
            before = traffic.read_bytes + traffic.sent_bytes
            moved = jax.block_until_ready(prepared(array))
            (leaf,) = prepared.plan.leaves
            if leaf.kind != "views":  # inside one process, where host memory is device memory
                host_bytes += traffic.read_bytes + traffic.sent_bytes - before
            kinds[leaf.kind] += 1
            shard_bytes = BITS.itemsize * max(
                np.prod(s.shard_shape(shape)) for s in (source, target)
            )
            if leaf.largest_bytes > 1.25 * shard_bytes and leaf.kind != "elsewhere":
                over.append((part, n, leaf.kind, leaf.largest_bytes / shard_bytes))
            if not is_right(moved, truth, target):
                wrong.append((part, n))
    pairs_done = sum(kinds.values())
    return {
        "kinds": kinds,
        "wrong": wrong,
        "host_bytes": host_bytes,
        "over": over,
        "pairs": pairs_done,
    }


def kinds(index, count):
    """Trees, dtypes, stages and single devices; what is refused, by name."""
    devices = np.array(jax.devices())
    everywhere = Mesh(devices.reshape(2, -1), ("a", "b"))
    half = len(devices) // 2
    stages = [Mesh(devices[:half].reshape(2, -1), ("a", "b")), Mesh(devices[half:], ("m",))]
    rows = NamedSharding(everywhere, PartitionSpec(("a", "b")))
    tree, target, truth = {}, {}, {}
    for dtype in ("float32", "int64", "float8_e4m3fn", "bool"):
        ways = (
            (NamedSharding(stages[0], PartitionSpec("a", "b")), stages[1]),
            (NamedSharding(stages[1], PartitionSpec(None, "m")), stages[0]),
            (rows, stages[1]),
        )
        for n, (a, b) in enumerate(ways if dtype == "float32" else ways[:1]):
            name = f"{dtype}.{n}"
            truth[name] = values((16, 24), dtype)
            tree[name] = spread(truth[name], a)
            target[name] = NamedSharding(b, PartitionSpec(b.axis_names[-1]))
    for name, shape, a, b in (
        (
            "number",
            (),
            NamedSharding(everywhere, PartitionSpec()),
            SingleDeviceSharding(devices[-1]),
        ),
        ("line", (48,), rows, NamedSharding(stages[1], PartitionSpec())),
        ("one", (16, 8), SingleDeviceSharding(devices[0]), rows),
        ("to one", (16, 8), rows, SingleDeviceSharding(devices[-1])),
        ("empty", (0, 8), NamedSharding(everywhere, PartitionSpec()), stages[1]),
    ):
        truth[name] = values(shape, "float32")
        tree[name] = spread(truth[name], a)
        target[name] = NamedSharding(b, PartitionSpec()) if isinstance(b, Mesh) else b
    moved = resharding.reshard(tree, target)
    right = all(is_right(moved[n], truth[n], target[n]) for n in tree)

    again = resharding.prepare_reshard(tree, target, donate=True)
    moved = again(tree)
    right = right and all(is_right(moved[n], truth[n], target[n]) for n in tree)

    refused = {}
    narrow = spread(values((16, 24)).view(np.uint16).astype("int4"), rows)
    pinned = NamedSharding(stages[1], PartitionSpec("m"), memory_kind="pinned_host")
    # processes 0 and 1 alone have a part in it; the others must refuse it all the same
    of_two = [
        NamedSharding(Mesh(devices[part], ("x",)), PartitionSpec())
        for part in (slice(0, 2), slice(2, 4))
    ]
    elsewhere = spread(values((16, 24)).view(np.uint16).astype("int4"), of_two[0])
    for name, work in (
        ("int4", lambda: resharding.reshard(narrow, NamedSharding(stages[1], PartitionSpec("m")))),
        ("of two", lambda: resharding.reshard(elsewhere, of_two[1])),
        ("memory", lambda: resharding.reshard(moved["one"], pinned)),
        ("views", lambda: resharding.reshard(moved["one"], target["line"], route="views")),
        ("host", lambda: resharding.gather({"w": moved["one"]}, host=True)),
    ):
        try:
            work()
        except LayoutError as error:
            refused[name] = str(error)
    for name in ("one", "to one", "line", "int64.0"):  # on all, on one device, on a stage
        whole = resharding.gather({"w": moved[name]}, host=True, from_processes=True)["w"]
        right = right and whole.tobytes() == truth[name].tobytes()
    plan = str(again.plan)
    return {"right": right, "refused": refused, "plan": plan}
