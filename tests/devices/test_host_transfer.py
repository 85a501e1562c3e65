"""Parts of shards come from the device as they are needed, within a budget."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxshard.conversion.open import open_checkpoint
from jaxshard.core.catalog import StoredShard
from jaxshard.core.numpy_dtypes import stored_as
from jaxshard.devices import host_transfer
from jaxshard.devices.host_shards import HostShards
from jaxshard.devices.host_transfer import (
    ChunkBudget,
    ChunkCache,
    chunking_of,
    fetch,
    share_out,
)
from jaxshard.errors import LayoutError
from jaxshard.saver import save
from jaxshard.storage.resources import LEAST_BYTES


def as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@given(
    st.lists(st.integers(1, 7), min_size=0, max_size=4),
    st.integers(1, 300),
    st.sampled_from(["float32", "int8", "float64", "float4_e2m1fn"]),
)
def test_parts_are_runs_that_follow_each_other_and_fit(dims, part_bytes, name):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    shape = (*dims, 2) if name.startswith("float4") else tuple(dims)
    kind = stored_as(dtype)
    cut = chunking_of(shape, kind, part_bytes)
    at, total = 0, int(np.prod(shape)) * kind.bits // 8
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    while at < total:
        start, box = cut.holding(at)
        assert start == at
        inside = numbers[box.slices].reshape(-1)
        assert inside.tolist() == list(range(inside[0], inside[0] + box.size))
        assert int(inside[0]) * kind.bits == 8 * at
        most = max(part_bytes, dtype.itemsize * kind.unit_elements)
        together = kind.unit_elements > 1  # an odd row is kept with its neighbour
        assert box.size * dtype.itemsize <= most or together
        middle = at + box.size * kind.bits // 8 - 1
        assert cut.holding(middle) == (start, box)
        at += box.size * kind.bits // 8
    assert at == total


@pytest.mark.parametrize("part_bytes", [16, 100, 1 << 20])
@pytest.mark.parametrize("name", ["float32", "int64", "bfloat16", "bool"])
def test_a_part_holds_what_the_array_holds_there_and_leaves_no_copy_behind(name, part_bytes):
    values = np.arange(3 * 5 * 7).reshape(3, 5, 7).astype(np.dtype(name))
    with jax.enable_x64(True):
        shard = jax.device_put(values, jax.devices()[1])
    cut = chunking_of(values.shape, stored_as(values.dtype), part_bytes)
    for offset in range(0, values.nbytes, 13):
        start, box = cut.holding(offset)
        part = as_bytes(fetch(shard, box, cut))
        assert part.tobytes() == as_bytes(values)[start : start + part.size].tobytes()
    assert shard._npy_value is None


def test_the_parts_of_one_shape_share_one_program():
    shard = jax.device_put(np.zeros((4, 11, 3), np.float32), jax.devices()[0])
    cut = chunking_of(shard.shape, stored_as(shard.dtype), part_bytes=48)
    before = host_transfer._sliced._cache_size()
    for offset in range(0, shard.nbytes, 48):
        fetch(shard, cut.holding(offset)[1], cut)
    assert host_transfer._sliced._cache_size() == before + 1


# --- room -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
@pytest.mark.parametrize("num_shards", [1, 4, 64])
@pytest.mark.parametrize("host_bytes", [2 * LEAST_BYTES, 5 << 20, 256 << 20])
def test_blocks_and_parts_together_are_within_the_budget(host_bytes, workers, num_shards):
    budget, room = share_out(host_bytes, workers, num_shards)
    held = (room.parts + budget.workers) * room.part_bytes
    assert budget.host_bytes + held <= host_bytes
    assert room.part_bytes >= 4096
    assert room.parts >= 2 * budget.workers


def test_less_than_one_thread_needs_is_refused_with_a_number_that_works():
    with pytest.raises(LayoutError, match=rf"Pass host_bytes={2 * LEAST_BYTES} or more"):
        share_out(2 * LEAST_BYTES - 1, 8, 4)
    share_out(2 * LEAST_BYTES, 8, 4)


@pytest.fixture
def unseen(monkeypatch):
    """Devices whose memory the host does not see."""
    monkeypatch.setattr("jaxshard.devices.host_shards.is_on_host", lambda shard: False)


@pytest.mark.usefixtures("unseen")
def test_the_default_budget_is_enough_for_many_threads_and_long_rows(tmp_path, monkeypatch):
    mesh = jax.make_mesh((2, 4), ("dp", "mp"), axis_types=(AxisType.Auto,) * 2)
    stacked = np.arange(2 * 2600 * 512, dtype=np.float32).reshape(2, 2600, 512)  # a row: 5 MB
    tree = {"w": jax.device_put(stacked, NamedSharding(mesh, PartitionSpec("dp", None, "mp")))}
    save(tree, tmp_path / "many", workers=16, fsync=False)
    live, most = Live.watching(monkeypatch)
    save(tree, tmp_path / "little", workers=8, host_bytes=2 << 20, fsync=False)
    assert 0 < max(most) <= 3 << 19
    assert not live
    for place in ("many", "little"):
        catalog = open_checkpoint(tmp_path / place)
        piece = catalog["w"].shards[0]
        path = tmp_path / place / catalog.files[piece.file].path
        assert path.read_bytes()[piece.offset :] == stacked.tobytes()


class Live(dict[int, int]):
    """The bytes of parts that somebody still holds."""

    @classmethod
    def watching(cls, monkeypatch: pytest.MonkeyPatch) -> tuple[Live, list[int]]:
        """What is held now, and what was at every fetch."""
        live, most, real = cls(), [0], host_transfer.fetch

        def watched(*args: Any) -> np.ndarray:
            part = np.array(real(*args))
            live[id(part)] = part.nbytes
            weakref.finalize(part, live.pop, id(part))
            most.append(sum(list(live.values())))
            return part

        monkeypatch.setattr(host_transfer, "fetch", watched)
        gc.collect()
        return live, most


# --- threads ----------------------------------------------------------------------------


@pytest.mark.usefixtures("unseen")
def test_different_parts_are_fetched_at_the_same_time(monkeypatch):
    met = threading.Barrier(2, timeout=20)
    real = host_transfer.fetch

    def fetch_together(*args: Any) -> np.ndarray:
        met.wait()  # passes only when another thread is fetching too
        return real(*args)

    monkeypatch.setattr(host_transfer, "fetch", fetch_together)
    source = HostShards({n: jax.numpy.ones(8) for n in "ab"})
    pieces = [source.catalog[n].shards[0] for n in "ab"]
    with ThreadPoolExecutor(2) as pool:
        read = [pool.submit(source.read, p, 0, memoryview(bytearray(32))) for p in pieces]
    assert [r.exception() for r in read] == [None, None]


@pytest.mark.usefixtures("unseen")
def test_a_part_that_several_need_is_fetched_once(monkeypatch):
    calls, real = [], host_transfer.fetch
    monkeypatch.setattr(host_transfer, "fetch", lambda *a: calls.append(a) or real(*a))
    source = HostShards({"a": jax.numpy.arange(64.0)})
    piece = source.catalog["a"].shards[0]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: source.read(piece, n, memoryview(bytearray(8))), range(64)))
    assert len(calls) == 1


def test_a_fetch_that_fails_fails_for_all_who_wait_and_is_tried_again(monkeypatch):
    shard = jax.device_put(np.arange(16, dtype=np.float32), jax.devices()[0])
    fetched, begun = ChunkCache(ChunkBudget(2, 1 << 20), as_bytes), threading.Event()
    kind, real = stored_as(shard.dtype), host_transfer.fetch

    def fail(*args: Any) -> np.ndarray:
        begun.set()
        raise RuntimeError("the link is down")

    monkeypatch.setattr(host_transfer, "fetch", fail)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(fetched.holding, 0, shard, kind, 0) for _ in range(2)]
    assert begun.is_set()
    assert [str(a.exception()) for a in asked] == ["the link is down"] * 2
    monkeypatch.setattr(host_transfer, "fetch", real)
    assert fetched.holding(0, shard, kind, 5)[1].tobytes() == np.asarray(shard).tobytes()


@pytest.mark.usefixtures("unseen")
def test_no_more_parts_are_kept_than_there_is_room_for():
    shard = jax.device_put(np.arange(256, dtype=np.float32), jax.devices()[0])
    source = HostShards({"a": shard}, room=ChunkBudget(parts=3, part_bytes=64))
    piece, out = StoredShard(0, 0, source.catalog["a"].shards[0].box), bytearray(1024)
    source.read(piece, 0, memoryview(out))
    assert bytes(out) == np.asarray(shard).tobytes()
    assert len(source._fetched._parts) == 3
