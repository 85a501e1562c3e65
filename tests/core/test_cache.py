"""LRUCache evicts the least recently used entries, by their weight."""

from __future__ import annotations

from jaxshard.core.cache import LRUCache


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
