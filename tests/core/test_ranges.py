"""Ranges: NumPy says which bytes a box is, and in which order."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_box import boxes

from jaxshard.core.box import Box
from jaxshard.core.ranges import (
    Runs,
    block_dim,
    blocks,
    blocks_along,
    byte_runs,
    is_contiguous,
    tiles,
)

itemsizes = st.sampled_from([1, 2, 3, 4, 8])


def bytes_of(box: Box, shape: tuple[int, ...], itemsize: int) -> list[int]:
    """The byte offsets of the elements of ``box``, in row-major order."""
    numbers = np.arange(prod(shape)).reshape(shape)[box.slices]
    return [i * itemsize + b for i in numbers.reshape(-1).tolist() for b in range(itemsize)]


def listed(runs: Runs) -> list[int]:
    return [at + i for at, length in runs for i in range(length)]


@given(boxes(), itemsizes, st.integers(0, 100))
def test_runs_are_the_bytes_of_a_box_in_order(box, itemsize, base):
    shape = (6,) * len(box.start)
    runs = byte_runs(box, shape, itemsize, base)
    assert listed(runs) == [base + b for b in bytes_of(box, shape, itemsize)]
    assert runs.num_bytes == box.size * itemsize


@given(boxes(), itemsizes)
def test_runs_are_as_long_as_they_can_be(box, itemsize):
    shape = (6,) * len(box.start)
    runs = list(byte_runs(box, shape, itemsize))
    if box.size:
        assert all(a + length < b for (a, length), (b, _) in pairwise(runs))
        assert is_contiguous(box, shape) == (len(runs) == 1)


@given(boxes(), st.sampled_from([1, 4, 1000]))
def test_requests_cover_the_runs_and_little_more(box, itemsize):
    if not box.size:
        return
    runs = byte_runs(box, (6,) * len(box.start), itemsize)
    requests = runs.coalesced()
    assert set(listed(runs)) <= set(listed(requests))
    assert len(requests) <= len(runs)
    assert requests.num_bytes <= 5 * runs.num_bytes
    assert len(set(listed(requests))) == requests.num_bytes  # no byte is asked for twice


@pytest.mark.parametrize(
    ("stride", "requests"),
    [(4096 + 2048, 1), (4096 + 2049 + 2048, 4), (2048, 1)],
    ids=["a page apart", "more than a page", "neighbours"],
)
def test_gaps_of_a_page_are_read_along(stride, requests):
    assert len(Runs(0, 2048, ((4, stride),)).coalesced()) == requests


def test_short_rows_far_apart_are_not_one_span():
    """A row of 16 bytes every 4000: a span would read 250 times the bytes."""
    assert len(Runs(0, 16, ((100, 4000),)).coalesced()) == 100


@given(boxes(), itemsizes, st.integers(1, 200))
def test_blocks_are_the_box_in_order_and_none_too_large(box, itemsize, limit):
    numbers = np.arange(6 ** len(box.start)).reshape((6,) * len(box.start))
    parts = list(blocks(box, itemsize, limit))
    flat = [i for part in parts for i in numbers[part.slices].reshape(-1).tolist()]
    assert flat == numbers[box.slices].reshape(-1).tolist()
    assert all(part.size * itemsize <= max(limit, itemsize) for part in parts)
    assert all(is_contiguous(part.within(box), box.shape) for part in parts)
    if box.start:
        dim = block_dim(box, itemsize, limit)
        assert all(part.shape[dim + 1 :] == box.shape[dim + 1 :] for part in parts)
        assert all(n == 1 for part in parts for n in part.shape[:dim])


def test_a_pattern_costs_the_same_however_many_rows():
    runs = byte_runs(Box((0, 0), (10**9, 1)), (10**9, 2), 2)
    assert (len(runs), runs.outer) == (10**9, ((10**9, 4),))


@given(boxes(), itemsizes, st.integers(1, 200), st.permutations(range(3)))
def test_a_grid_in_any_order_holds_every_element_once(box, itemsize, limit, order):
    ndim = len(box.start)
    order = tuple(d for d in order if d < ndim)
    strides = tuple(6 ** (ndim - 1 - order.index(d)) * itemsize for d in range(ndim))
    numbers = np.arange(6**ndim).reshape((6,) * ndim)
    for grid in (blocks_along(box, order, itemsize, limit), tiles(box, strides, itemsize, limit)):
        parts = list(grid)
        held = [i for part in parts for i in numbers[part.slices].reshape(-1).tolist()]
        assert sorted(held) == sorted(numbers[box.slices].reshape(-1).tolist())
        assert len(parts) == len(grid)
        assert all(part.size * itemsize <= max(limit, itemsize) for part in parts)


@given(st.data(), boxes(), itemsizes, st.integers(1, 200))
def test_kinds_count_every_block_and_those_of_a_kind_hold_the_same_of_every_part(
    data, box, itemsize, limit
):
    parts = data.draw(st.lists(boxes(ndim=len(box.start)), max_size=3))
    for grid in (blocks(box, itemsize, limit), tiles(box, (1,) * len(box.start), itemsize, limit)):
        counted: dict[object, int] = {}
        for block, times in grid.kinds(parts):
            counted[_seen(block, parts)] = counted.get(_seen(block, parts), 0) + times
        listed_one_by_one: dict[object, int] = {}
        for block in grid:
            key = _seen(block, parts)
            listed_one_by_one[key] = listed_one_by_one.get(key, 0) + 1
        assert counted == listed_one_by_one


def _seen(block: Box, parts: list[Box]) -> tuple[object, ...]:
    """All that is counted of a block: its shape, and that of what it holds of each part."""
    shared = [part.intersect(block) for part in parts]
    return block.shape, tuple(s and s.shape for s in shared)


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 20, 1 << 20), (1 << 10, 1 << 20, 1 << 10)])
def test_a_grid_of_millions_of_blocks_is_neither_listed_nor_counted_one_by_one(shape):
    box = Box.whole(shape)
    for grid in (
        blocks(box, 4, 1 << 20),
        blocks_along(box, tuple(reversed(range(len(shape)))), 4, 1 << 20),
        tiles(box, tuple(1 << 20 * d for d in range(len(shape))), 4, 8 << 20),
    ):
        kinds = list(grid.kinds([Box(box.start, (shape[0] // 3, *shape[1:]))]))
        assert len(kinds) <= 3 ** len(shape)
        assert sum(times for _, times in kinds) == len(grid) > 10**5
        tracemalloc.start()
        assert next(iter(grid)).size * 4 <= 8 << 20
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
