"""Transfers deliver every wanted element once, and traffic counts them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sharding_changes import SIDE, move_of, shardings

from jaxshard.core.box import Box
from jaxshard.resharding.geometry import device_boxes, is_contiguous, traffic, transfers


@given(shardings(), shardings())
def test_every_wanted_element_is_delivered_once_from_a_device_that_has_it(source, target):
    move = move_of(source, target)
    delivered = [np.zeros((SIDE, SIDE), int) for _ in move.target_boxes]
    for piece in transfers(move):
        assert move.source_boxes[piece.source].contains(piece.box)
        for t in piece.targets:
            delivered[t][piece.box.slices] += 1
    for counts, box in zip(delivered, move.target_boxes, strict=True):
        wanted = np.zeros((SIDE, SIDE), int)
        wanted[box.slices] = 1
        assert np.array_equal(counts, wanted)


@given(shardings(), shardings())
def test_traffic_is_all_that_targets_hold_and_what_is_there_already_does_not_travel(source, target):
    move = move_of(source, target)
    found = traffic(move)
    assert found.same_device_bytes + found.cross_device_bytes == sum(
        b.size for b in move.target_boxes
    )
    held = device_boxes(source, move.shape)
    there = 0
    for device, box in device_boxes(target, move.shape).items():
        shared = held[device].intersect(box) if device in held else None
        there += shared.size if shared else 0
    assert found.same_device_bytes == there


@given(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(1, 4))] * 3))
def test_a_box_is_contiguous_where_numpy_says_so(ranges):
    start = tuple(a for a, _ in ranges)
    stop = tuple(min(a + n, 4) for a, n in ranges)
    part = np.zeros((4, 4, 4), np.int8)[Box(start, stop).slices]
    assert is_contiguous(Box(start, stop), (4, 4, 4)) == part.flags.c_contiguous
