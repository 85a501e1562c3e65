"""Turning: a copy into another order of elements is a copy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxshard.loading.turning import turned
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


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (2, 0, 1), (1, 2, 0)])
def test_what_devices_turn_is_what_numpy_does(dtype, order):
    values = filled((80, 65, 99), dtype)[:, 1:, :93].transpose(order)
    asked = []

    def turn(array):
        asked.append(array.shape)
        return turned(array)

    out = np.zeros(values.shape, dtype)
    copy_into(out, values, turn)
    assert np.array_equal(out, values)
    assert bool(asked) == (order[-1] != 2)


def test_what_cannot_be_turned_elsewhere_is_turned_here():
    def never(array):
        raise AssertionError(array.dtype)

    for values in (
        np.broadcast_to(filled((300, 1), np.uint16), (300, 300)).T[:, ::-1],
        filled((300, 300), np.float64).T,
        filled((300, 300), "V16").T,
        filled((60, 60), np.uint16).T,
    ):
        out = np.zeros(values.shape, values.dtype)
        copy_into(out, values, never)
        assert out.tobytes() == values.tobytes()
