"""Stored elements and NumPy's: sub-byte floats are unpacked, plain floats cast, others refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from jaxshard.core.dtypes import BY_NAME, BY_NUMPY
from jaxshard.core.numpy_dtypes import (
    Conversion,
    can_become,
    held_as,
    numpy_dtype,
    pack,
    stored_as,
)
from jaxshard.errors import LayoutError


@pytest.mark.parametrize("name", sorted(BY_NUMPY))
def test_every_stored_dtype_with_a_numpy_name_returns_to_itself(name):
    assert numpy_dtype(BY_NUMPY[name]).name == name
    assert stored_as(numpy_dtype(BY_NUMPY[name])) == BY_NUMPY[name]


@pytest.mark.parametrize("name", ["F6_E2M3", "F6_E3M2"])
def test_six_bit_floats_have_no_numpy_dtype(name):
    with pytest.raises(LayoutError, match=f"{name} has no JAX dtype"):
        numpy_dtype(BY_NAME[name])


def test_packed_elements_are_unpacked_to_the_same_elements():
    elements = np.arange(16, dtype=np.uint8)
    out = np.zeros(16, np.uint8)
    Conversion(BY_NAME["F4"], np.dtype("float4_e2m1fn")).fill(out, 0, pack(elements))
    assert np.array_equal(out, elements)


def test_a_cast_rounds_to_nearest_and_overflows_to_infinity():
    values = np.array([1.0, 1 + 2**-9, 1e39, -1e39])
    out = np.zeros(8, np.uint8)
    Conversion(BY_NAME["F64"], np.dtype(ml_dtypes.bfloat16)).fill(out, 0, values.view(np.uint8))
    assert out.view(ml_dtypes.bfloat16).astype(float).tolist() == [1.0, 1.0, np.inf, -np.inf]


def test_only_plain_floats_change_their_width():
    assert can_become(BY_NAME["BF16"], np.dtype(np.float32))
    assert can_become(BY_NAME["I32"], np.dtype(np.int32))
    assert not can_become(BY_NAME["I32"], np.dtype(np.int64))
    assert not can_become(BY_NAME["F8_E4M3"], np.dtype(np.float32))


def test_dtypes_of_arrays_alone_are_held_and_not_stored():
    assert held_as(np.dtype(ml_dtypes.int4), (3,)).name == "int4"
    with pytest.raises(LayoutError, match="files have no dtype for int4"):
        stored_as(np.dtype(ml_dtypes.int4))
