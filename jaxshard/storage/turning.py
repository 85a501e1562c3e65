"""Turning: copies between arrays whose elements lie in memory in different orders.

A plain transposed copy touches a new cache line with every element. Tiles are copied instead,
in which each line that was fetched is used up before it is dropped: by compiled loops where
there are some, else by NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import native

Array = NDArray[Any]

_TILE = 512  # elements a side: fits a core's cache, and few calls, between which threads wait
_APART = 32  # elements between the rows of a tile: no power of two, or they share cache lines
_SMALL = 1 << 11  # a plane of fewer elements is quick in any order


def copy_into(out: Array, values: Array, *, is_final: bool = False) -> None:
    """``out[...] = values``, quick where the two lie in memory in different orders.

    ``is_final`` says that nobody reads ``out`` soon.
    """
    to, come = _fastest(out), _fastest(values)
    if to == come or out.shape[to] * out.shape[come] < _SMALL:
        out[...] = values
    else:
        planes = _planes(out, values, to, come)
        left = [plane for plane in planes if not native.turn(*plane, is_final=is_final)]
        if left:
            _copy_tiles(left)


def _planes(out: Array, values: Array, to: int, come: int) -> Iterator[tuple[Array, Array]]:
    """What is to be turned, plane by plane: along the first dim ``out`` is dense, along the
    second ``values``.
    """
    others = [range(1 if d in (to, come) else n) for d, n in enumerate(out.shape)]
    for corner in product(*others):
        plane = tuple(slice(None) if d in (to, come) else i for d, i in enumerate(corner))
        there, here = (x[plane] if to < come else x[plane].T for x in (out, values))
        yield there, here


def _copy_tiles(planes: Sequence[tuple[Array, Array]]) -> None:
    """Planes of one shape by NumPy, in tiles."""
    out = planes[0][0]
    rows, columns = (min(_TILE, n) for n in out.shape)
    spare = np.empty((rows, columns + _APART), out.dtype)
    for out, values in planes:
        for i in range(0, out.shape[0], rows):
            for j in range(0, out.shape[1], columns):
                tile = (slice(i, i + rows), slice(j, j + columns))
                there = out[tile]
                here = spare[: there.shape[0], : there.shape[1]]
                here[...] = values[tile]
                there[...] = here


def _fastest(array: Array) -> int:
    """The dim whose neighbours are nearest in memory."""
    some = [d for d, n in enumerate(array.shape) if n > 1 and array.strides[d]]
    return min(some, key=lambda d: array.strides[d], default=0)
