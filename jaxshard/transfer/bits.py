"""Elements as bits: how a program moves values without looking at them.

XLA:CPU computes with narrow floats as wider ones, moves included: that doubles the memory,
and a signalling NaN comes back quiet. As unsigned integers they are left alone. Integers of two
bits, on which it dies, travel as bytes.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

_NUMBER = re.compile(r"\d+")


def bits_of(dtype: np.dtype[np.generic]) -> int:
    """Bits of one element, as its name says.

    >>> bits_of(np.dtype("bfloat16")), bits_of(np.dtype("int4"))  # NumPy gives int4 a byte
    (16, 4)
    """
    digits = _NUMBER.search(dtype.name)
    return int(digits[0]) if digits else 8 * dtype.itemsize


def is_narrow_float(dtype: np.dtype[np.generic]) -> bool:
    """Whether elements are floats of 8 or 16 bits.

    >>> is_narrow_float(np.dtype("float16")), is_narrow_float(np.dtype("int8"))
    (True, False)
    """
    return bool(jnp.issubdtype(dtype, jnp.floating)) and bits_of(dtype) in (8, 16)


def is_carried(dtype: np.dtype[np.generic]) -> bool:
    """Whether elements travel as others: narrow floats, and integers of less than four bits.

    >>> is_carried(np.dtype("bfloat16")), is_carried(np.dtype("int2")), is_carried(np.dtype("int4"))
    (True, True, False)
    """
    return is_narrow_float(dtype) or bits_of(dtype) < 4


def as_bits(array: jax.Array) -> jax.Array:
    """``array`` as what its elements travel as; itself where they travel as they are."""
    if not is_carried(array.dtype):
        return array
    if not is_narrow_float(array.dtype):
        return array.astype("int8" if jnp.issubdtype(array.dtype, jnp.signedinteger) else "uint8")
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def from_bits(array: jax.Array, dtype: np.dtype[np.generic]) -> jax.Array:
    """What `as_bits` was given."""
    if array.dtype == dtype:
        return array
    if not is_narrow_float(dtype):
        return array.astype(dtype)
    return jax.lax.bitcast_convert_type(array, dtype)
