"""Optional compiled kernels: transposes, casts and adapter sums.

They are compiled when jaxshard is installed, if a C compiler is available (``hatch_build.py``).
Each function returns whether it did the work. Otherwise (nothing was compiled, or the arrays have
another memory layout) its caller does the same with NumPy, slower. Only sums of products may
differ in the last bit, as they do between two matrix products of NumPy.

``JAXSHARD_NATIVE=0`` disables the kernels.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_VERSION = 2  # of the functions in kernels.c
_MOST_RANK = 256
_ITEMS = (1, 2, 4)  # NumPy transposes wider ones as fast


def turn(out: Array, values: Array, *, is_final: bool = False) -> bool:
    """``out[...] = values`` for two matrices with opposite memory orders.

    Args:
        out: (rows, columns), contiguous along the first dim.
        values: (rows, columns), contiguous along the second dim.
        is_final: ``out`` is not read soon, so it bypasses the cache.

    >>> from jaxshard.native import is_there, turn
    >>> out, values = np.zeros((3, 2), "u2").T, np.arange(6, dtype="u2").reshape(2, 3)
    >>> turn(out, values) is is_there(), out.tolist() == values.tolist() or not is_there()
    (True, True)
    """
    library = _library()
    item = out.itemsize
    if library is None or item not in _ITEMS or out.dtype != values.dtype:
        return False
    if not _are_fit(out, values) or out.ndim != 2:
        return False
    if out.strides[0] != item or values.strides[1] != item:
        return False
    rows, columns = out.shape[1], out.shape[0]
    library.turn(
        _address(out),
        out.strides[1],
        _address(values),
        values.strides[0],
        rows,
        columns,
        item,
        is_final,
    )
    return True


def cast(out: Array, values: Array) -> bool:
    """``out[...] = values`` from bfloat16 to float32 or back, for two that lie in memory alike."""
    library = _library()
    if library is None:
        return False
    call = {
        ("bfloat16", "float32"): library.bf16_to_f32,
        ("float32", "bfloat16"): library.f32_to_bf16,
    }.get((values.dtype.name, out.dtype.name))
    if call is None or not _are_fit(out, values) or not _lie_alike(out, values):
        return False
    call(_address(out), _address(values), values.size)
    return True


def add_product(
    out: Array,
    values: Array,
    b: NDArray[np.float32],
    a: NDArray[np.float32],
    scaling: float | np.float32,
) -> bool:
    """``out[...] = values + scaling * (b @ a)`` in float32, rounded once to bfloat16.

    Args:
        out: (rows, columns) of bfloat16.
        values: (rows, columns) of bfloat16, contiguous along the same dim.
        b: (rows, rank).
        a: (rank, columns).
        scaling: the product is multiplied with it before it is added.
    """
    library = _library()
    if library is None or not values.dtype.name == out.dtype.name == "bfloat16":
        return False
    if not _are_fit(out, values) or not b.dtype == a.dtype == np.float32:
        return False
    if values.ndim != 2 or (*b.shape, a.shape[1]) != (out.shape[0], a.shape[0], out.shape[1]):
        return False
    if values.strides[0] == values.itemsize != values.strides[1]:
        out, values, b, a = out.T, values.T, a.T, b.T
    item, rank = values.itemsize, a.shape[0]
    if out.strides[1] != item or values.strides[1] != item or rank > _MOST_RANK:
        return False
    b, a = (x if x.strides[1] == x.itemsize else np.ascontiguousarray(x) for x in (b, a))
    library.add_product_to_bf16(
        _address(out),
        out.strides[0],
        _address(values),
        values.strides[0],
        _address(b),
        b.strides[0] // b.itemsize,
        _address(a),
        a.strides[0] // a.itemsize,
        *values.shape,
        rank,
        float(scaling),
    )
    return True


def is_there() -> bool:
    """Whether the loops were compiled, and may be used."""
    return _library() is not None


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _are_fit(out: Array, values: Array) -> bool:
    """Whether C may write one and read the other, and they are of one shape."""
    alike = out.shape == values.shape and out.dtype.isnative and values.dtype.isnative
    return alike and out.flags.writeable and out.flags.aligned and values.flags.aligned


def _lie_alike(a: Array, b: Array) -> bool:
    """Whether both, of one shape, fill their memory without a gap, in the same order."""
    want = 1
    for (n, stride_a), stride_b in sorted(
        zip(zip(a.shape, a.strides, strict=True), b.strides, strict=True), key=lambda d: d[0][1]
    ):
        if n > 1:
            if stride_a != want * a.itemsize or stride_b != want * b.itemsize:
                return False
            want *= n
    return True


@cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("JAXSHARD_NATIVE") == "0" or sys.byteorder != "little":
        return None
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name("kernels.so")))
        if library.jaxshard_kernels() != _VERSION:
            return None
    except (OSError, AttributeError):
        return None
    pointer, size, apart = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_ssize_t
    matrix, cast_arguments = (pointer, apart), (pointer, pointer, size)
    sums = (pointer, size, pointer, size, size, size, size, ctypes.c_float)
    for name, arguments in {
        "turn": (*matrix, *matrix, size, size, size, ctypes.c_int),
        "bf16_to_f32": cast_arguments,
        "f32_to_bf16": cast_arguments,
        "add_product_to_bf16": (*matrix, *matrix, *sums),
    }.items():
        call = getattr(library, name)
        call.argtypes, call.restype = arguments, None
    return library
