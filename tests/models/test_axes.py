"""Axis expressions: parsing, printing, and what is derived from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.errors import LayoutError
from jaxshard.models.axes import Axes, Dim, Sum, Term, parse

NAMES = st.sampled_from(["embed", "heads", "head_dim", "mlp", "kv_heads", "16"])
WEIGHTS = st.sampled_from(["q", "k", "v", "q.bias", "e.gate"])
TERMS = st.builds(Term, WEIGHTS, st.lists(NAMES, max_size=2).map(tuple))
SUMS = st.builds(Sum, st.lists(TERMS, min_size=2, max_size=3).map(tuple))
PLAIN = st.builds(
    Dim, st.lists(NAMES, min_size=1, max_size=3).map(tuple), st.sampled_from([1, 32, 128])
)
SHARED = st.builds(Dim, st.tuples(NAMES, SUMS) | st.tuples(SUMS, NAMES) | st.tuples(SUMS))


@st.composite
def axes(draw):
    dims = draw(st.lists(PLAIN, max_size=3))
    if draw(st.booleans()):
        dims.insert(draw(st.integers(0, len(dims))), draw(SHARED))
    return Axes(tuple(dims))


@given(axes())
def test_what_is_printed_parses_to_the_same(found):
    assert parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(heads", "is missing"),
        ("heads)", "'\\)' is not a name"),
        ("heads & embed", "'&' has no meaning"),
        ("(q + k) (gate + up)", "one dim, not two"),
        ("(1 + q)", "'1' is not a name of a weight"),
    ],
)
def test_a_wrong_expression_is_refused_with_its_place(text, message):
    with pytest.raises(LayoutError, match=message):
        parse(text)


def test_a_part_of_a_shared_tensor_is_the_weights_own_axes():
    fused = parse("(kv_heads (q:q_per_kv + k + v) head_dim) embed")
    assert fused.weights == ("q", "k", "v")
    assert str(fused.part("q")) == "(kv_heads q_per_kv head_dim) embed"
    assert str(fused.part("k")) == "(kv_heads head_dim) embed"


def test_aliases_are_replaced_until_none_is_left():
    aliases = {"heads": ("kv_heads", "q_per_kv"), "q_per_kv": ("two", "half")}
    assert str(parse("(heads head_dim)").expanded(aliases)) == "(kv_heads two half head_dim)"
