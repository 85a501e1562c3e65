"""Patterns of names: globs, placeholders, and one comparison for each kind of name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.core.patterns import Glob, Patterns, match, placeholders, template


@given(
    st.lists(st.sampled_from(["a", "b", "ab", ".", "*"]), max_size=8).map("".join),
    st.lists(st.sampled_from(["a", "b", "."]), max_size=10).map("".join),
)
def test_a_star_matches_any_characters(pattern: str, name: str) -> None:
    oracle = ".*".join(re.escape(part) for part in pattern.split("*"))
    assert Glob(pattern).matches(name) == bool(re.fullmatch(oracle, name, re.DOTALL))


_names = st.builds(
    "{}.{}.{}.{}".format,
    st.sampled_from(["layers", "x"]),
    st.integers(0, 12),
    st.sampled_from(["experts.3", "w1", "w2", "1"]),
    st.sampled_from(["weight", "bias"]),
)
_patterns = st.sampled_from(
    ["*", "layers.1.*", "*.1.*", "*.w1.weight", "*1.weight", "*.w*.bias", "x.*.weight", "*.12.*"]
)


@given(st.lists(_patterns, max_size=5), st.lists(_names, max_size=12))
def test_the_cache_of_kinds_changes_no_result(patterns: list[str], names: list[str]) -> None:
    cached = Patterns(patterns)
    for name in names:
        plain = next((i for i, p in enumerate(patterns) if Glob(p).matches(name)), None)
        assert cached.find(name, template(name)) == plain


@pytest.mark.parametrize(
    ("patterns", "name", "found"),
    [
        (["h.{layer}.w", "h.1.w"], "h.1.w", 0),
        (["h.1.w", "h.{layer}.w"], "h.1.w", 0),
        (["h.1.w", "h.{layer}.w"], "h.0.w", 1),
        (["{x*}.1.w", "h.{layer}.w"], "h.2.w", 1),
        (["h.{x*}1.w", "h.{layer}.w"], "h.11.w", 0),
        (["h.{x*}1.w", "h.{layer}.w"], "h.12.w", 1),
        (["{layer}.{layer}", "{x}.{layer}"], "3.4", 1),
        (["{layer}.{layer}", "{x}.{layer}"], "3.3", 0),
        (["w1.{layer}"], "w2.0", None),
    ],
)
@pytest.mark.parametrize("before", [(), ("h.0.w", "h.7.w", "3.3", "w1.1"), ("3.4", "h.2.w")])
def test_patterns_find_the_first_match(patterns, name, found, before) -> None:
    cached = Patterns(patterns, placeholders)
    for other in (*before, name):
        every = [i for i, p in enumerate(patterns) if match(p, other) is not None]
        assert cached.find(other) == min(every, default=None)
    assert cached.find(name) == found


def test_a_pattern_is_compared_once_with_each_kind_of_name() -> None:
    patterns = Patterns(
        ["model.layers.61.{rest*}", "model.layers.{layer}.mlp.{expert}.w"], placeholders
    )
    for layer in range(62):
        for expert in range(50):
            patterns.find(f"model.layers.{layer}.mlp.{expert}.w")
    assert patterns.num_compared == 2 + 1  # a kind of layer 61, and one of all others
    assert patterns.find("model.layers.61.mlp.3.w") == 0
