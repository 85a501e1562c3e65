"""Turning: a copy into another order of elements is a copy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.storage import turning
from jaxshard.storage.turning import copy_into

DTYPES = [np.uint8, np.uint16, np.float32, np.float64, "V16"]


def filled(shape: tuple[int, ...], dtype: object) -> np.ndarray:
    """Elements of random bytes."""
    size = np.dtype(dtype).itemsize * int(np.prod(shape))
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    return data.view(dtype).reshape(shape)


@given(
    st.lists(st.sampled_from([1, 2, 3, 8, 65, 300]), min_size=1, max_size=4),
    st.data(),
    st.sampled_from(DTYPES),
)
def test_any_order_becomes_any_other(lengths, data, dtype):
    while np.prod(lengths) > 1 << 18:
        lengths.remove(max(lengths))
    order = data.draw(st.permutations(range(len(lengths))))
    shape = [lengths[d] for d in order]
    values = filled(tuple(shape), dtype).transpose(np.argsort(order))
    out = np.zeros(values.shape, dtype)
    copy_into(out, values)
    assert out.tobytes() == values.tobytes()


@pytest.mark.parametrize("rows", [512, 514, 601])
@pytest.mark.parametrize("columns", [256, 640, 333])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_elements_of_two_bytes_turn_wherever_they_begin_and_end(rows, columns, skip):
    values = filled((rows, columns + skip), np.uint16)[:, skip:]
    out = np.zeros((columns + 3, rows + 5), np.uint16)
    copy_into(out[:columns, :rows], values.T)
    assert np.array_equal(out[:columns, :rows], values.T)
    assert not out[columns:].any()
    assert not out[:, rows:].any()


def test_whole_planes_of_two_bytes_are_moved_in_twos(monkeypatch):
    moved = []
    plain = turning._Tile._copy_twos
    monkeypatch.setattr(
        turning._Tile, "_copy_twos", lambda self, a, b: (moved.append(b.size), plain(self, a, b))
    )
    copy_into(np.empty((512, 1024), np.uint16), filled((1024, 512), np.uint16).T)
    assert 2 * sum(moved) == 512 * 1024
