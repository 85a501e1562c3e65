"""Cells: every target element is filled from a source that holds it, once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_layouts import models
from test_box import boxes, mask

from jaxshard.core.box import Box
from jaxshard.errors import CoverageError
from jaxshard.planning.copies import cells


@given(models())
def test_cells_fill_every_target_and_read_no_element_twice(model):
    source, target = model.layouts
    for tensor in model.tensors:
        stored, wanted = (
            tuple({b for p in layout.placements[tensor.name] for b in p.boxes(tensor.shape)})
            for layout in (source, target)
        )
        filled = [np.zeros(tensor.shape, int) for _ in wanted]
        read = np.zeros(tensor.shape, int)
        for cell in cells(stored, wanted):
            inside = np.zeros(tensor.shape, int)
            for index, part in cell.sources:
                assert stored[index].contains(part)
                inside[part.slices] += 1
            assert (inside[cell.box.slices] == 1).all()
            assert inside.sum() == cell.box.size
            read += inside
            for index, part in cell.targets:
                assert cell.box.contains(part)
                filled[index][part.slices] += 1
        for box, found in zip(wanted, filled, strict=True):
            expected = np.zeros(tensor.shape, int)
            expected[box.slices] = 1
            assert np.array_equal(found, expected)
        assert read.max(initial=0) <= 1


@given(st.lists(boxes(2), min_size=1, max_size=4), st.lists(boxes(2), min_size=1, max_size=3))
def test_overlapping_sources_and_targets_are_right_or_refused(stored, wanted):
    there = sum(mask(b) for b in stored) > 0
    complete = all(there[b.slices].all() for b in wanted)
    try:
        found = cells(tuple(stored), tuple(wanted))
    except CoverageError:
        assert not complete
        return
    assert complete
    for index, box in enumerate(wanted):
        filled = sum(
            (mask(part) for cell in found for i, part in cell.targets if i == index),
            np.zeros((6, 6), int),
        )
        assert np.array_equal(filled, mask(box))
    for cell in found:
        inside = sum(mask(part) for _, part in cell.sources)
        for _, part in cell.targets:
            assert (inside[part.slices] == 1).all()


def test_columns_that_share_a_source_are_one_cell_and_others_are_not():
    stored = (Box((0, 0), (4, 6)), Box((0, 6), (4, 12)))
    wanted = tuple(Box((0, c), (4, c + 2)) for c in range(0, 12, 2))
    assert [[i for i, _ in c.targets] for c in cells(stored, wanted)] == [[0, 1, 2], [3, 4, 5]]


def test_rows_of_one_source_need_no_company():
    stored, wanted = (Box((0,), (8,)),), (Box((0,), (4,)), Box((4,), (8,)))
    assert [[i for i, _ in c.targets] for c in cells(stored, wanted)] == [[0], [1]]


def test_missing_elements_are_counted():
    with pytest.raises(CoverageError, match=r"has 8 elements, of which the source holds 6"):
        cells((Box((0,), (6,)),), (Box((0,), (8,)),))
