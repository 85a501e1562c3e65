"""Staging: memory that tensors pass through, never given to two at a time, and never too much."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest

from jaxshard.devices import host_memory
from jaxshard.devices.host_memory import (
    BufferPool,
    pin_for,
)

KIB = 1 << 10


@pytest.fixture(autouse=True)
def _small_arenas(monkeypatch):
    monkeypatch.setattr(host_memory, "ARENA_BYTES", 64 * KIB)


class Pins:
    """A driver that pins nothing, and tells what it was asked."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.held: dict[int, int] = {}
        self.most, self._refuses = 0, refuses

    def __call__(self, address, num_bytes):
        if self._refuses:
            return None
        self.held[address] = num_bytes
        self.most = max(self.most, sum(self.held.values()))
        return lambda: self.held.pop(address)


def test_what_is_taken_lies_apart_on_cache_lines_and_within_the_bound():
    pins, rng = Pins(), random.Random(3)
    there = BufferPool(256 * KIB, pins)
    held: dict[int, np.ndarray] = {}
    for step in range(2000):
        size = rng.choice([1, 63, 64, 5000, 30 * KIB, 60 * KIB])
        if held and (rng.random() < 0.5 or sum(m.size for m in held.values()) + size > 100 * KIB):
            number = rng.choice(list(held))
            memory = held.pop(number)
            assert (memory == number % 251).all()  # nobody else wrote there
            there.give(memory)
        else:
            memory = held[step] = there.take(size)
            assert memory.size == size
            assert memory.ctypes.data % 64 == 0
            memory[:] = step % 251
    assert there.num_bytes == sum(pins.held.values())
    assert pins.most <= 256 * KIB
    for memory in held.values():
        there.give(memory)
    there.close()
    assert (there.num_bytes, pins.held) == (0, {})


def test_memory_is_used_again():
    there = BufferPool(1 << 20)
    places = set()
    for size in (30 * KIB, 60 * KIB, 10 * KIB):
        memory = there.take(size)
        places.add(memory.ctypes.data)
        there.give(memory)
    assert len(places) == 1
    assert there.num_bytes == 64 * KIB


def test_a_tensor_larger_than_the_bound_gets_memory_of_its_own_once_nothing_else_is_there():
    pins = Pins()
    there = BufferPool(64 * KIB, pins)
    there.give(there.take(KIB))
    large = there.take(1 << 20)
    assert pins.most == 1 << 20  # what lay idle was let go of first
    there.give(large)
    assert there.take(KIB) is not None


def test_who_finds_no_room_waits_until_there_is_some():
    there = BufferPool(64 * KIB)
    first = there.take(40 * KIB)
    got = []
    thread = threading.Thread(target=lambda: got.append(there.take(40 * KIB)))
    thread.start()
    time.sleep(0.05)
    assert not got
    there.give(first)
    thread.join(20)
    assert got[0].ctypes.data == first.ctypes.data


def test_who_waits_is_woken_when_all_is_stopped():
    there = BufferPool(64 * KIB)
    assert there.take(64 * KIB) is not None
    got = []
    thread = threading.Thread(target=lambda: got.append(there.take(1)))
    thread.start()
    time.sleep(0.05)
    there.stop()
    thread.join(20)
    assert got == [None]


def test_memory_that_cannot_be_pinned_does_as_well():
    there = BufferPool(64 * KIB, Pins(refuses=True))
    assert there.take(KIB) is not None
    there.close()


class Gpu:
    """What `pin_for` asks of a device."""

    platform, local_hardware_id = "gpu", 0

    def __init__(self, version: str = "cuda 13000") -> None:
        self.client = type("Client", (), {"platform_version": version})


def test_only_cuda_devices_with_a_driver_pin(monkeypatch):
    monkeypatch.setattr(host_memory, "_driver", lambda: None)
    cpu = type("Cpu", (), {"platform": "cpu"})
    assert [pin_for(device) for device in (cpu, Gpu("rocm 6"), Gpu())] == [None] * 3


class Driver:
    """The calls of CUDA's driver that are used, and how they answer."""

    def __init__(self, refusal: int) -> None:
        self._refusal, self.calls = refusal, []

    def __getattr__(self, name):
        def called(*args):
            self.calls.append(name)
            return self._refusal if "Register" in name else 0

        return called


@pytest.mark.parametrize("refusal", [0, 712])
def test_the_driver_is_asked_within_a_context_that_is_left_again(monkeypatch, refusal):
    driver = Driver(refusal)
    monkeypatch.setattr(host_memory, "_driver", lambda: driver)
    monkeypatch.setattr(host_memory, "_context", lambda *_: "context")
    pin = pin_for(Gpu())
    unpin = pin(4096, 100)
    within = ["cuCtxPushCurrent_v2", "cuMemHostRegister_v2", "cuCtxPopCurrent_v2"]
    assert driver.calls == within
    if refusal:
        assert unpin is None
        return
    unpin()
    assert driver.calls[3:] == [within[0], "cuMemHostUnregister", within[2]]
