"""Reading and placing: at the same time, each shard once, all or nothing."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import checkpoints
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxshard.conversion.open import open_checkpoint
from jaxshard.devices.host_memory import BufferPool
from jaxshard.errors import StorageError
from jaxshard.loader import load, make_arrays
from jaxshard.loader import read as carrying
from jaxshard.loader.memory_budget import load_budget
from jaxshard.loader.read import Source, carry
from jaxshard.loader.requests import ArrayRequest, requests_of
from jaxshard.storage.readers import SourceFiles

P = PartitionSpec


@pytest.fixture
def unseen(monkeypatch):
    """Devices whose memory the host does not see: what they hold is copied there."""
    monkeypatch.setattr("jaxshard.loader.make_arrays.adopts", lambda devices: False)
    monkeypatch.setattr("jaxshard.loader.requests.adopts", lambda devices: False)
    monkeypatch.setattr("jaxshard.loader.make_arrays.adopts", lambda devices: False)


def two_tensors(folder: Path) -> dict[str, np.ndarray]:
    arrays = {n: np.full((128, 64), i, np.float32) for i, n in enumerate("ab")}
    checkpoints.write_folder(folder, arrays)
    return arrays


@pytest.mark.usefixtures("unseen")
def test_each_distinct_shard_goes_to_a_device_once_and_from_there_to_its_replicas(
    tmp_path, monkeypatch
):
    checkpoints.write_folder(tmp_path, {"w": np.arange(64, dtype=np.float32).reshape(8, 8)})
    mesh = jax.make_mesh((2, 4), ("dp", "mp"), axis_types=(AxisType.Auto,) * 2)
    puts, real = [], jax.device_put

    def counted(x: Any, *args: Any) -> Any:
        puts.extend(x if isinstance(x, list) else [x])
        return real(x, *args)

    monkeypatch.setattr(make_arrays.jax, "device_put", counted)
    arrays = load(tmp_path, {"w": NamedSharding(mesh, P("mp"))})
    put = [x for x in puts if x.size > 1]  # the rest asks whether a device takes the dtype
    from_host = [x for x in put if isinstance(x, np.ndarray)]
    assert [x.shape for x in from_host] == [(2, 8)] * 4
    assert [x.shape for x in put if isinstance(x, jax.Array)] == [(2, 8)] * 4
    assert np.array_equal(arrays["w"], np.arange(64).reshape(8, 8))


def test_one_tensor_is_read_while_another_is_placed(tmp_path, monkeypatch):
    arrays = two_tensors(tmp_path)
    catalog = open_checkpoint(tmp_path)
    first, second = sorted(catalog.tensors.values(), key=lambda t: t.shards[0].offset)
    second_is_read, met = threading.Event(), []
    read, place = SourceFiles.read, carrying.place

    def reading(self: Any, piece: Any, *args: Any) -> None:
        if piece == second.shards[0]:
            second_is_read.set()
        read(self, piece, *args)

    def placed(job: Any, memory: Any, **how: Any) -> Any:
        if job.tensor.name == first.name:
            met.append(second_is_read.wait(20))  # the first is on its way all that time
        return place(job, memory, **how)

    monkeypatch.setattr(SourceFiles, "read", reading)
    monkeypatch.setattr(carrying, "place", placed)
    found = load(catalog, jax.devices()[0], workers=2)
    assert met == [True]
    assert all(np.array_equal(found[n], arrays[n]) for n in arrays)


def test_a_load_that_fails_returns_nothing_and_keeps_nothing(tmp_path, monkeypatch):
    two_tensors(tmp_path)
    calls, read = [], SourceFiles.read

    def failing(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise StorageError("the disk is gone")
        read(self, *args)

    monkeypatch.setattr(SourceFiles, "read", failing)
    gc.collect()
    before = len(jax.live_arrays())
    with pytest.raises(StorageError, match="the disk is gone"):
        load(tmp_path, jax.devices()[0], workers=1)
    assert len(calls) == 2  # the first tensor was placed
    gc.collect()
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize("end", ["lend", "place", "read"])
def test_a_failure_anywhere_wakes_who_waits_for_room(tmp_path, monkeypatch, end):
    two_tensors(tmp_path)
    catalog = open_checkpoint(tmp_path)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wants = [ArrayRequest(t, np.dtype("float32"), here) for t in catalog.tensors.values()]
    todo = [job for job, _ in requests_of(wants)]
    waiting = threading.Event()
    take = BufferPool.take

    def told(self: Any, num_bytes: int) -> Any:
        if self.num_bytes:
            waiting.set()
        return take(self, num_bytes)

    def out_of_memory(*args: Any) -> Any:
        assert waiting.wait(20)
        time.sleep(0.05)  # and now the other thread is in the wait itself
        raise MemoryError("no page left")

    def nothing(*args: Any) -> None:
        return None

    monkeypatch.setattr(BufferPool, "take", told)
    if end == "place":
        place = carrying._LoadSink.place
        monkeypatch.setattr(
            carrying._LoadSink, "place", lambda *a: out_of_memory() if a[-1] else place(*a)
        )

    class Failing(Source):
        can_lend = True
        read = staticmethod(out_of_memory if end == "read" else nothing)
        lend = staticmethod(out_of_memory if end == "lend" else nothing)

    budget = load_budget(64 << 20, workers=2)
    with pytest.raises(MemoryError, match="no page left"):
        carry(todo, Failing(), budget=budget, staging=BufferPool(1), adopted=False)
