"""Turning: copies between arrays whose elements lie in memory in different orders.

A plain transposed copy touches a new cache line with every element; here each line that was
fetched is used up before it is dropped, tile by tile. Elements of two bytes are moved in
twos, since four bytes take no longer than two:

    two rows, in words of two elements     a0 a1 | a2 a3        and of each word of theirs
                                           b0 b1 | b2 b3        lows and highs side by side
    their columns, in words                a0 b0 | a1 b1 | a2 b2 | a3 b3
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_TILE = 256  # elements along what is consecutive where it goes, and where it comes from
_APART = 32  # elements between the rows of a tile: rows a power of two apart share cache lines
_SMALL = 1 << 11  # a plane of fewer elements is quick in any order
_LOW, _HIGH = np.uint32(0x0000FFFF), np.uint32(0xFFFF0000)
_HALF = np.uint32(16)


def copy_into(out: Array, values: Array) -> None:
    """``out[...] = values``, quick where the two lie in memory in different orders."""
    to, come = _fastest(out), _fastest(values)
    if to == come or out.shape[to] * out.shape[come] < _SMALL:
        out[...] = values
        return
    others = [range(1 if d in (to, come) else n) for d, n in enumerate(out.shape)]
    tile = _Tile(out.dtype)
    for corner in product(*others):
        plane = tuple(slice(None) if d in (to, come) else i for d, i in enumerate(corner))
        # rows are consecutive where they go, columns where they come from
        a, b = (x[plane] if to < come else x[plane].T for x in (out, values))
        for i in range(0, a.shape[0], _TILE):
            for j in range(0, a.shape[1], _TILE):
                part = (slice(i, i + _TILE), slice(j, j + _TILE))
                tile.copy(a[part], b[part])


def _fastest(array: Array) -> int:
    """The dim whose neighbours are nearest in memory."""
    some = [d for d, n in enumerate(array.shape) if n > 1 and array.strides[d]]
    return min(some, key=lambda d: array.strides[d], default=0)


class _Tile:
    """Memory that tiles pass through."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._spare: Array = np.empty((_TILE, _TILE + _APART), dtype)
        self._words: NDArray[np.uint32] | None = None

    def copy(self, out: Array, values: Array) -> None:
        """``out[...] = values``; rows are consecutive in ``out``, columns in ``values``."""
        if self._dtype.itemsize == 2 and _in_twos(out.T) and _in_twos(values):
            self._copy_twos(out.T.view(np.uint32), values.view(np.uint32))
            return
        here = self._spare[: out.shape[0], : out.shape[1]]
        here[...] = values
        out[...] = here

    def _copy_twos(self, columns: NDArray[np.uint32], rows: NDArray[np.uint32]) -> None:
        """Fill the words of ``columns``, two of a column each, from those of ``rows``."""
        if self._words is None:
            self._words = np.empty((3, _TILE // 2, (_TILE + _APART) // 2), np.uint32)
        even, odd = rows[0::2], rows[1::2]
        low, high, spare = self._words[:, : even.shape[0], : even.shape[1]]
        np.left_shift(odd, _HALF, out=spare)
        np.bitwise_and(even, _LOW, out=low)
        np.bitwise_or(low, spare, out=low)
        np.bitwise_and(odd, _HIGH, out=spare)
        np.right_shift(even, _HALF, out=high)
        np.bitwise_or(high, spare, out=high)
        columns[0::2], columns[1::2] = low.T, high.T


def _in_twos(array: Array) -> bool:
    """Whether each row of ``array`` is whole words of two elements, and rows come in twos."""
    rows, columns = array.shape
    return (
        rows % 2 == columns % 2 == 0
        and array.strides[1] == 2
        and array.strides[0] % 4 == 0
        and array.ctypes.data % 4 == 0
    )
