"""Boxes: NumPy's indexing is the truth."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.core.box import Box


@st.composite
def boxes(draw, ndim=None, most=6):
    ndim = draw(st.integers(0, 3)) if ndim is None else ndim
    pairs = [sorted(draw(st.tuples(*[st.integers(0, most)] * 2))) for _ in range(ndim)]
    return Box(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


pairs = st.integers(0, 3).flatmap(lambda n: st.tuples(boxes(n), boxes(n)))


def mask(box: Box, most: int = 6) -> np.ndarray:
    found = np.zeros((most,) * len(box.start), int)
    found[box.slices] = 1
    return found


@given(pairs)
def test_an_intersection_has_the_elements_of_both(two):
    a, b = two
    shared = a.intersect(b)
    expected = mask(a) & mask(b)
    if shared is None:
        assert not expected.any()
    else:
        assert np.array_equal(mask(shared), expected)
        assert shared == b.intersect(a)


@given(pairs)
def test_what_is_left_is_disjoint_and_all_of_it(two):
    a, b = two
    rest = a.minus(b)
    total = sum((mask(r) for r in rest), np.zeros_like(mask(a)))
    assert np.array_equal(total, mask(a) * (1 - mask(b) * bool(b.size)))
    assert all(r.size for r in rest)


@given(pairs)
def test_a_box_contains_what_adds_nothing_to_it(two):
    a, b = two
    if a.contains(b):
        assert not (mask(b) > mask(a)).any()
    if b.size and not (mask(b) > mask(a)).any():
        assert a.contains(b)


@given(pairs)
def test_local_coordinates_index_the_same_elements(two):
    outer, inner = two
    numbers = np.arange(6 ** len(outer.start)).reshape((6,) * len(outer.start))
    if outer.contains(inner) and inner.size:
        there = numbers[outer.slices][inner.within(outer).slices]
        assert np.array_equal(there, numbers[inner.slices])


def test_a_box_without_dims_has_one_element():
    whole = Box.whole(())
    assert (whole.size, whole.shape, whole.slices, str(whole)) == (1, (), (), "[]")
    assert whole.intersect(whole) == whole
    assert whole.minus(whole) == []


def test_an_empty_box_touches_nothing():
    empty = Box((2,), (2,))
    assert empty.size == 0
    assert empty.intersect(Box((0,), (4,))) is None
    assert empty.minus(Box((0,), (4,))) == []
