"""NumPy dtypes of stored elements, and conversion of stored bytes to them.

Most tensors are used as stored. Sub-byte floats are unpacked to one per byte, as in JAX, and
callers may request another floating-point width. This module does not depend on files or devices.
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
from .dtypes import BY_NUMPY, CODES, OF_ARRAYS, DType

NumpyDType = np.dtype[np.generic]
Bytes = NDArray[np.uint8]

_FLOATS = {"F64", "F32", "F16", "BF16"}


def numpy_dtype(kind: DType) -> NumpyDType:
    """Return the NumPy dtype of elements stored as ``kind``.

    Raises:
        LayoutError: NumPy has no such dtype (6-bit floats).

    >>> from .dtypes import dtype
    >>> numpy_dtype(dtype("BF16"))
    dtype(bfloat16)
    """
    if kind.numpy is None:
        raise LayoutError(
            f"{kind} has no JAX dtype, so such tensors cannot be put on a device. Leave them "
            "out with exclude=, or convert from file to file."
        )
    return np.dtype(getattr(ml_dtypes, kind.numpy, kind.numpy))


@lru_cache(maxsize=256)
def stored_as(dtype: NumpyDType) -> DType:
    """Return the dtype in which files store elements of ``dtype``.

    Raises:
        LayoutError: the safetensors format has no such dtype.

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
    """Return the dtype of an array of ``shape``: of files if possible, else of arrays alone.

    Raises:
        LayoutError: neither files nor arrays have such elements.

    >>> str(held_as(np.dtype("float32"), (2,))), str(held_as(np.dtype(ml_dtypes.int4), (2,)))
    ('F32', 'int4')
    """
    kind = BY_NUMPY.get(dtype.name)
    if kind is not None and prod(shape) * kind.bits % 8 == 0:
        return kind
    return OF_ARRAYS.get(dtype.name) or stored_as(dtype)


@dataclass(frozen=True, slots=True)
class Conversion:
    """Conversion of stored bytes to elements in memory."""

    stored: DType
    dtype: NumpyDType

    @property
    def is_copy(self) -> bool:
        """Whether the bytes stay the same."""
        return self.stored.unit_elements == 1 and numpy_dtype(self.stored) == self.dtype

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes in memory of an array of ``shape``."""
        return prod(shape) * self.dtype.itemsize

    def fill(self, out: NDArray[np.uint8], offset: int, data: NDArray[np.uint8]) -> None:
        """Convert the stored bytes ``data``, which begin at ``offset``, into the memory ``out``.

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
    """Assign ``out[...] = values`` between any dtypes: round to nearest, overflow to inf."""
    if not native.cast(out, values):
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, values, casting="unsafe")


def can_become(stored: DType, dtype: NumpyDType) -> bool:
    """Whether elements stored as ``stored`` can be loaded as ``dtype``.

    They can in their own dtype, and plain floats in another width.
    """
    wanted = BY_NUMPY.get(dtype.name)
    return dtype.name == stored.numpy or (
        wanted is not None and is_plain_float(wanted) and is_plain_float(stored)
    )


def is_plain_float(kind: DType) -> bool:
    """Whether ``kind`` is a float of 16 bits or more, which ``dtype=`` may convert."""
    return kind.name in _FLOATS


def _unpack(data: NDArray[np.uint8]) -> NDArray[np.generic]:
    """Unpack two 4-bit floats per byte, the first in the low half, to one per byte."""
    out = np.empty(2 * data.size, np.uint8)
    out[0::2] = data & 0x0F
    out[1::2] = data >> 4
    return out.view(ml_dtypes.float4_e2m1fn)


@lru_cache(maxsize=8)
def code_values(code: str) -> NDArray[np.float32]:
    """Return the values of all numbers of ``code``, a key of ``dtypes.CODES``.

    >>> code_values("e2m1")[:8].tolist(), code_values("int4")[:3].tolist()
    ([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], [-8.0, -7.0, -6.0])
    """
    numbers = np.arange(1 << CODES[code].bits, dtype=np.uint8)
    if code == "e2m1":
        return np.asarray(numbers.view(ml_dtypes.float4_e2m1fn), np.float32)
    return np.asarray(numbers, np.float32) - np.float32(len(numbers) // 2)


def pack(elements: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack one 4-bit float per byte to two per byte, as they are stored."""
    halves = elements.reshape(-1, 2)
    packed: NDArray[np.uint8] = (halves[:, 0] & 0x0F | halves[:, 1] << 4).astype(np.uint8)
    return packed
