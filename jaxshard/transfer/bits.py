"""Elements as bits: how a program moves values without looking at them.

XLA:CPU computes with narrow floats as wider ones, moves included: that doubles the memory,
and a signalling NaN comes back quiet. As unsigned integers they are left alone.
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


def as_bits(array: jax.Array) -> jax.Array:
    """``array`` as unsigned integers where it is of narrow floats, and as it is otherwise."""
    if not is_narrow_float(array.dtype):
        return array
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def from_bits(array: jax.Array, dtype: np.dtype[np.generic]) -> jax.Array:
    """What `as_bits` was given."""
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)
