"""The CPU route fills every distinct target shard once, or aliases a source shard."""

import numpy as np
from hypothesis import given
from sharding_changes import SIDE, move_of, shardings

from jaxshard.resharding.cpu_route import aligned_empty, filling, num_copied


@given(shardings(), shardings())
def test_fills_assemble_every_target_shard(source, target):
    move = move_of(source, target)
    array = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    plan = filling(move)
    held = {n: array[move.source_boxes[n].slices] for n in plan.sources}
    found = []
    for fill in plan.fills:
        shard = np.full(fill.shape, -1)
        for n, from_source, into_target in fill.copies:
            shard[into_target] = held[n][from_source]
        assert len(fill.copies) == 1 or not fill.may_alias
        found.append(shard)
    of_device = plan.of_device * (len(move.target_boxes) // len(plan.of_device))
    for n, box in zip(of_device, move.target_boxes, strict=True):
        assert np.array_equal(found[n], array[box.slices])


@given(shardings())
def test_an_unchanged_sharding_copies_nothing(sharding):
    assert num_copied(move_of(sharding, sharding)) == 0


def test_buffers_are_aligned_for_xla():
    for size in (1, 63, 4096):
        assert aligned_empty((size,), np.dtype(np.int8)).ctypes.data % 64 == 0
