"""Waves of cuts and joins fill every target shard within their limit."""

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sharding_changes import SIDE, move_of, shardings

from jaxshard.resharding.piecewise import WHOLE, positions, waves


@given(shardings(), shardings(), st.sampled_from([0, 60, 200, 10**6]))
def test_waves_fill_every_shard_with_its_elements_and_keep_to_the_limit(source, target, limit):
    move = move_of(source, target)
    array = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    filled = {}
    for wave in waves(move, limit):
        boxes = set()
        for join in wave.joins:
            shape = tuple(map(sum, join.segments))
            for nth, t in enumerate(join.devices):
                assert t not in filled
                filled[t] = np.full(shape, -1)
                boxes.add(move.target_boxes[t])
                sizes = list(product(*join.segments))
                for slot, start, size in zip(
                    join.slots, positions(join.segments), sizes, strict=True
                ):
                    piece = cut_out(move, wave, slot[nth], array)
                    assert piece.shape == size
                    filled[t][tuple(map(slice, start, np.add(start, size)))] = piece
        assert wave.peak_bytes <= limit or len(boxes) == 1
        assert wave.peak_bytes <= 1.0 * move.shard_bytes or len(boxes) > 1
    for t, box in enumerate(move.target_boxes):
        assert np.array_equal(filled[t], array[box.slices])


def cut_out(move, wave, origin, array):
    shard = array[move.source_boxes[origin.source].slices]
    if origin.cut == WHOLE:
        return shard
    cut = wave.cuts[origin.cut]
    start = cut.starts[cut.devices.index(origin.source)]
    return shard[tuple(map(slice, start, np.add(start, cut.shape)))]
