"""Turning: a copy into another order of elements is a copy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxshard import native
from jaxshard.storage.transforms import copy_into

DTYPES = [np.uint8, np.uint16, np.float32, np.float64, "V16"]


def filled(shape: tuple[int, ...], dtype: object) -> np.ndarray:
    """Elements of random bytes."""
    size = np.dtype(dtype).itemsize * int(np.prod(shape))
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    return data.view(dtype).reshape(shape)


@pytest.fixture(params=["compiled", "by NumPy"], autouse=True)
def way(request):
    """Everything here holds with the compiled loops, and without."""
    if request.param == "compiled" and not native.is_there():
        pytest.skip("the loops were not compiled here")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "by NumPy":
            patch.setattr(native, "_library", lambda: None)
        yield


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([1, 2, 3, 8, 65, 300]), min_size=1, max_size=4),
    st.data(),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_any_order_becomes_any_other(lengths, data, dtype, is_final):
    while np.prod(lengths) > 1 << 18:
        lengths.remove(max(lengths))
    order = data.draw(st.permutations(range(len(lengths))))
    shape = [lengths[d] for d in order]
    values = filled(tuple(shape), dtype).transpose(np.argsort(order))
    out = np.zeros(values.shape, dtype)
    copy_into(out, values, is_final=is_final)
    assert out.tobytes() == values.tobytes()


@pytest.mark.parametrize("is_final", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_a_tile_and_less(dtype, is_final):
    for shape in ((1100, 700), (513, 512), (2, 600, 520)):
        values = filled(shape, dtype).swapaxes(-1, -2)
        out = np.zeros(values.shape, dtype)
        copy_into(out, values, is_final=is_final)
        assert out.tobytes() == values.tobytes()


def test_repeated_and_reversed_elements():
    for values in (
        np.broadcast_to(filled((300, 1), np.uint16), (300, 300)).T[:, ::-1],
        filled((300, 300), np.uint16)[::-1].T,
    ):
        out = np.zeros(values.shape, values.dtype)
        copy_into(out, values)
        assert out.tobytes() == values.tobytes()
