"""NumPy dtypes of stored elements, and conversion of stored bytes to them.

Most tensors are used as they are stored. Sub-byte floats are unpacked, one to a byte, as
JAX keeps them; and a caller may ask for another floating-point width. This module knows
no files and no devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .. import native
from ..errors import LayoutError
from .dtypes import BY_NUMPY, OF_ARRAYS, DType

NumpyDType = np.dtype[np.generic]
Bytes = NDArray[np.uint8]

_FLOATS = {"F64", "F32", "F16", "BF16"}


def numpy_dtype(kind: DType) -> NumpyDType:
    """NumPy's dtype for elements stored as ``kind``.

    Raises:
        LayoutError: there is none (the 6-bit floats).

    >>> from .dtypes import dtype
    >>> numpy_dtype(dtype("BF16"))
    dtype(bfloat16)
    """
    if kind.numpy is None:
        raise LayoutError(
            f"JAX has no dtype for {kind}, so such tensors cannot be put on a device. Leave them "
            "out with exclude=, or convert from file to file."
        )
    return np.dtype(getattr(ml_dtypes, kind.numpy, kind.numpy))


@lru_cache(maxsize=256)
def stored_as(dtype: NumpyDType) -> DType:
    """The dtype in which elements of ``dtype`` are stored.

    Raises:
        LayoutError: the safetensors format has none.

    >>> str(stored_as(np.dtype("float32")))
    'F32'
    """
    kind = BY_NUMPY.get(dtype.name)
    if kind is None and dtype.name.startswith("key<"):
        raise LayoutError(
            f"files have no dtype for keys of a random generator ({dtype.name}). Save "
            "jax.random.key_data(keys), or leave them out."
        )
    if kind is None:
        raise LayoutError(
            f"files have no dtype for {dtype.name}. Cast it to one of {', '.join(BY_NUMPY)}."
        )
    return kind


def held_as(dtype: NumpyDType, shape: tuple[int, ...]) -> DType:
    """The dtype of an array of ``shape``: as files have it, or as arrays alone do.

    Raises:
        LayoutError: neither has such elements.

    >>> str(held_as(np.dtype("float32"), (2,))), str(held_as(np.dtype(ml_dtypes.int4), (2,)))
    ('F32', 'int4')
    """
    kind = BY_NUMPY.get(dtype.name)
    if kind is not None and prod(shape) * kind.bits % 8 == 0:
        return kind
    return OF_ARRAYS.get(dtype.name) or stored_as(dtype)


@dataclass(frozen=True, slots=True)
class Conversion:
    """From bytes as stored to elements in memory."""

    stored: DType
    dtype: NumpyDType

    @property
    def is_copy(self) -> bool:
        """Whether the bytes stay what they are."""
        return self.stored.unit_elements == 1 and numpy_dtype(self.stored) == self.dtype

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes in memory of an array of ``shape``."""
        return prod(shape) * self.dtype.itemsize

    def fill(self, out: NDArray[np.uint8], offset: int, data: NDArray[np.uint8]) -> None:
        """Put into the memory ``out`` what the stored bytes ``data``, from ``offset`` on, become.

        >>> from .dtypes import dtype
        >>> out = np.zeros(4, np.uint8)
        >>> Conversion(dtype("F4"), np.dtype("float4_e2m1fn")).fill(out, 1, np.uint8([0x21]))
        >>> out.tolist()
        [0, 0, 1, 2]
        """
        if self.is_copy:
            out[offset : offset + data.size] = data
            return
        elements = data.view(numpy_dtype(self.stored)) if self.stored.bits >= 8 else _unpack(data)
        start = offset // self.stored.unit_bytes * self.stored.unit_elements
        cast_into(out.view(self.dtype)[start : start + elements.size], elements)

    def __str__(self) -> str:
        return f"{self.stored} as {self.dtype.name}"


def cast_into(out: NDArray[Any], values: NDArray[Any]) -> None:
    """``out[...] = values``, whatever their dtypes: to the nearest, too large a value to inf."""
    if not native.cast(out, values):
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, values, casting="unsafe")


def can_become(stored: DType, dtype: NumpyDType) -> bool:
    """Whether elements stored as ``stored`` may be asked for as ``dtype``.

    They may as what they are, and one plain floating-point width as another.
    """
    wanted = BY_NUMPY.get(dtype.name)
    return dtype.name == stored.numpy or (
        wanted is not None and is_plain_float(wanted) and is_plain_float(stored)
    )


def is_plain_float(kind: DType) -> bool:
    """Whether ``kind`` is a floating point of 16 bits or more: what ``dtype=`` is about."""
    return kind.name in _FLOATS


def _unpack(data: NDArray[np.uint8]) -> NDArray[np.generic]:
    """Two 4-bit floats a byte, the first in the low half, as one a byte."""
    out = np.empty(2 * data.size, np.uint8)
    out[0::2] = data & 0x0F
    out[1::2] = data >> 4
    return out.view(ml_dtypes.float4_e2m1fn)


def pack(elements: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One 4-bit float a byte as two a byte: how they are stored."""
    halves = elements.reshape(-1, 2)
    packed: NDArray[np.uint8] = (halves[:, 0] & 0x0F | halves[:, 1] << 4).astype(np.uint8)
    return packed
