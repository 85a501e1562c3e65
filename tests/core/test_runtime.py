"""Caches evict the least recently used entries, and are cleared all at once."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxshard as js
from jaxshard.core.runtime import LRUCache
from jaxshard.devices import host_memory
from jaxshard.resharding import geometry


def misses(cache: LRUCache[str, str], keys: str, weight: int = 1) -> str:
    """Look up ``keys`` in turn and return those that were computed."""
    computed: list[str] = []

    def make(key: str) -> str:
        computed.append(key)
        return key.upper()

    for key in keys:
        assert cache.get(key, weight, lambda key=key: make(key)) == key.upper()
    return "".join(computed)


def test_cached_values_are_not_computed_again():
    assert misses(LRUCache(3), "abcabcaabbcc") == "abc"


def test_the_least_recently_used_entry_is_evicted_first():
    cache = LRUCache[str, str](3)
    assert misses(cache, "abcad") == "abcd"
    assert misses(cache, "acd") == ""
    assert misses(cache, "b") == "b"


def test_only_a_single_entry_may_exceed_the_maximum_weight():
    cache = LRUCache[str, str](10)
    for weight in (4, 4, 4, 11, 3):
        misses(cache, chr(ord("a") + weight) + str(weight), weight)
        assert cache.weight <= max(10, weight)
    assert cache.weight == 6


def test_clearing_caches_frees_programs_plans_and_host_memory():
    mesh = jax.make_mesh((2, 4), ("dp", "mp"), axis_types=(AxisType.Auto,) * 2)
    first, second = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("dp",), ("mp",)))
    array = jax.device_put(np.arange(64.0, dtype=np.float32), first)
    js.reshard([array], [second])
    host_memory.region(host_memory.MIN_REGION_BYTES)
    assert geometry.device_boxes.cache_info().currsize
    js.clear_caches()
    assert not geometry.device_boxes.cache_info().currsize
    assert not host_memory.kept_bytes()
    again = js.reshard([array], [second])[0]
    assert np.array_equal(again, array)
