"""Small arrays: loaded and saved in few steps, with the bits and places that each has alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from tiny_arrays import array, same, write

import jaxshard as js
from jaxshard.loader import make_arrays
from jaxshard.storage.local import Handles

ONE = {"workers": 1}


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """How often bytes are read, written, and put on devices."""
    found: Counter[str] = Counter()

    def counting(owner, name):
        function = getattr(owner, name)

        def counted(*args, **how):
            found[name] += 1
            return function(*args, **how)

        monkeypatch.setattr(owner, name, counted)

    for name in ("read_views", "write_views"):
        counting(Handles, name)
    counting(jax, "device_put")
    return found


@pytest.mark.parametrize("size", [1, 3, 16, 100], ids=lambda n: f"{n} elements")
def test_a_thousand_tiny_neighbours_are_loaded_in_a_few_reads_and_puts(tmp_path, calls, size):
    wanted = {f"block.{i}.w": array("float32", (size,), i) for i in range(1000)}
    write(tmp_path / "model.safetensors", wanted)
    counts = []
    found = js.load(tmp_path, jax.devices()[1], counted=counts.append, **ONE)
    assert counts[0].num_reads <= 2
    assert counts[0].bytes_read == counts[0].bytes_needed == 4000 * size
    assert calls["read_views"] <= 4  # a header is two
    assert calls["device_put"] <= 4  # one of them asks whether the device has the dtype
    assert same({n: np.asarray(a) for n, a in found.items()}, wanted)
    assert {a.sharding for a in found.values()} == {SingleDeviceSharding(jax.devices()[1])}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int64"])
def test_a_thousand_tiny_arrays_are_saved_in_one_write(tmp_path, calls, kind):
    wanted = {f"block.{i}.w": array(kind, (3,), i) for i in range(1000)}
    with jax.enable_x64(True):
        arrays = {n: jax.device_put(a, jax.devices()[len(n) % 2]) for n, a in wanted.items()}
    calls.clear()
    report = js.save(arrays, tmp_path / "out", fsync=False, **ONE)
    assert report.counts.num_writes == 1
    assert calls["write_views"] == 2  # the tensors, and a header
    assert same(safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors"), wanted)


def places() -> dict[str, object]:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("x"))

    def by_name(name: str) -> object:
        number = int(name[1:])
        return (whole, jax.devices()[number % 3], rows if number % 10 == 7 else whole)[number % 3]

    return {"a device": jax.devices()[2], "replicas": whole, "by name": by_name}


kinds = st.sampled_from(["float32", "bfloat16", "uint8", "int64", "float16"])
lengths = st.sampled_from([0, 4, 12, 16, 64, 300, 4096, 20_000])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(kinds, lengths), min_size=1, max_size=30),
    st.sampled_from(["a device", "replicas", "by name"]),
    st.sampled_from([{}, {"copy": True}, {"mmap": True}, {"dtype": "float32"}]),
)
def test_loading_small_arrays_together_is_loading_each_alone_and_saving_gives_them_back(
    tmp_path_factory, tensors, place, how
):
    folder = tmp_path_factory.mktemp("small")
    stored = {f"t{i}": array(kind, (n,), i) for i, (kind, n) in enumerate(tensors)}
    write(folder / "model.safetensors", stored)
    target = places()[place]
    found = js.load(folder, target, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_arrays, "SMALL_BYTES", 0)
        alone = js.load(folder, target, **how)
    assert list(found) == list(alone)
    for name, one in alone.items():
        both = found[name], one
        assert len({(a.sharding, a.dtype, a.shape, a.committed) for a in both}) == 1
        assert np.asarray(both[0]).tobytes() == np.asarray(one).tobytes()
    if "dtype" not in how:
        js.save(found, folder / "out", fsync=False)
        assert same(safetensors.numpy.load_file(folder / "out" / "model.safetensors"), stored)


def test_leaves_that_share_a_small_tensor_each_get_an_array_of_their_dtype(tmp_path):
    stored = {f"t{i}": np.arange(8, dtype=np.float16) + i for i in range(5)}
    write(tmp_path / "model.safetensors", stored)
    devices = jax.devices()
    tree = {
        f"{n}.{d}": jax.ShapeDtypeStruct((8,), kind, sharding=SingleDeviceSharding(devices[d]))
        for n in stored
        for d, kind in ((0, "float16"), (1, "float32"))
    }
    found = js.load(tmp_path, tree, name_of=lambda path: path.split(".")[0])
    for path, leaf in tree.items():
        assert found[path].sharding == leaf.sharding
        assert found[path].dtype == leaf.dtype
        assert (np.asarray(found[path]) == stored[path.split(".")[0]]).all()


def test_small_arrays_do_not_hold_the_memory_that_was_read_for_all(tmp_path):
    """On CPU devices too: one array that stays would keep the bytes of thousands."""
    write(tmp_path / "model.safetensors", {f"t{i}": array("uint8", (64,), i) for i in range(64)})
    found = js.load(tmp_path, jax.devices()[0])
    at = sorted(a.unsafe_buffer_pointer() for a in found.values())
    steps = {b - a for a, b in pairwise(at)}
    assert steps != {64}
