"""Dtypes: names, widths in bits, and byte sizes of boxes.

The names are those of the safetensors format (``BF16``, ``F8_E4M3`` …). Sub-byte
dtypes are stored packed, so their boxes are counted in *units*: the smallest
number of elements that fills whole bytes. Dtypes of arrays alone have NumPy's names
(``int4``) and its width, a whole byte. This module does not import NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod
from typing import NamedTuple

from ..errors import FormatError, LayoutError
from .box import Box


@dataclass(frozen=True, slots=True)
class DType:
    """Element type: its name, its width and its NumPy (or ml_dtypes) name."""

    name: str
    bits: int
    numpy: str | None

    @property
    def is_in_files(self) -> bool:
        """Whether weight files can store it; arrays, and Orbax checkpoints, have more dtypes."""
        return self.name in BY_NAME

    @property
    def unit_elements(self) -> int:
        """Elements in the smallest run of whole bytes: 1 except for sub-byte dtypes."""
        return 8 // gcd(self.bits, 8)

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit."""
        return self.bits * self.unit_elements // 8

    def __str__(self) -> str:
        return self.name


def is_float(dtype: DType) -> bool:
    """Whether elements are floating-point or complex numbers.

    >>> is_float(dtype("BF16")), is_float(dtype("U8"))
    (True, False)
    """
    return (dtype.numpy or dtype.name).lower().startswith(("f", "bf", "c"))


_TABLE = (
    DType("BOOL", 8, "bool"),
    DType("F4", 4, "float4_e2m1fn"),
    DType("F6_E2M3", 6, None),
    DType("F6_E3M2", 6, None),
    DType("U8", 8, "uint8"),
    DType("I8", 8, "int8"),
    DType("F8_E5M2", 8, "float8_e5m2"),
    DType("F8_E4M3", 8, "float8_e4m3fn"),
    DType("F8_E8M0", 8, "float8_e8m0fnu"),
    DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    DType("I16", 16, "int16"),
    DType("U16", 16, "uint16"),
    DType("F16", 16, "float16"),
    DType("BF16", 16, "bfloat16"),
    DType("I32", 32, "int32"),
    DType("U32", 32, "uint32"),
    DType("F32", 32, "float32"),
    DType("C64", 64, "complex64"),
    DType("F64", 64, "float64"),
    DType("I64", 64, "int64"),
    DType("U64", 64, "uint64"),
)
BY_NAME: Mapping[str, DType] = {d.name: d for d in _TABLE}
BY_NUMPY: Mapping[str, DType] = {d.numpy: d for d in _TABLE if d.numpy}

#: Dtypes of arrays that weight files cannot store, or store packed.
OF_ARRAYS: Mapping[str, DType] = {
    name: DType(name, bits, name)
    for name, bits in (
        *((n, 8) for n in ("int2", "uint2", "int4", "uint4", "float4_e2m1fn")),
        *((f"float8_{n}", 8) for n in ("e3m4", "e4m3", "e4m3b11fnuz")),
        ("complex128", 128),
    )
}


class Code(NamedTuple):
    """How integers of ``stored_bits`` pack values of ``bits`` each, lowest bits first."""

    bits: int
    stored_bits: int

    @property
    def num_values(self) -> int:
        """Values in each stored integer."""
        return self.stored_bits // self.bits


#: The float E2M1 in bytes; and integers, plus half their range, in words.
CODES = {"e2m1": Code(4, 8), "int4": Code(4, 32), "int8": Code(8, 32)}


def dtype(name: str) -> DType:
    """Return the dtype ``name`` of the safetensors format.

    Raises:
        FormatError: the format has no such dtype.

    >>> dtype("BF16").bits
    16
    """
    try:
        return BY_NAME[name]
    except KeyError:
        raise FormatError(
            f"dtype {name!r} is not one of the safetensors format ({', '.join(BY_NAME)})."
        ) from None


def num_bytes(shape: tuple[int, ...], kind: DType) -> int:
    """Return the bytes of a packed tensor of ``shape``.

    Raises:
        FormatError: its elements do not fill whole bytes.

    >>> num_bytes((3, 4), dtype("F4"))
    6
    """
    bits = prod(shape) * kind.bits
    if bits % 8:
        raise FormatError(f"{prod(shape)} elements of {kind} do not fill whole bytes.")
    return bits // 8


def in_units(
    shape: tuple[int, ...], boxes: tuple[Box, ...], kind: DType
) -> tuple[tuple[int, ...], tuple[Box, ...]]:
    """Return ``shape`` and ``boxes`` in units of ``kind.unit_bytes`` along the last dim.

    A sub-byte tensor whose rows are not whole bytes becomes one flat run, which can be moved
    but not split.

    Raises:
        LayoutError: a box cuts through a byte.

    >>> in_units((2, 8), (Box((0, 4), (2, 8)),), dtype("F4"))
    ((2, 4), (Box(start=(0, 2), stop=(2, 4)),))
    """
    per = kind.unit_elements
    if per == 1:
        return shape, boxes
    if not shape or shape[-1] % per:
        whole = Box.whole(shape)
        if any(box != whole for box in boxes):
            raise LayoutError(
                f"a {kind} tensor of shape {shape} has rows that are not whole bytes, so it can be "
                "moved but not cut. Leave it whole."
            )
        flat = (num_bytes(shape, kind) // kind.unit_bytes,)
        return flat, tuple(Box.whole(flat) for _ in boxes)
    if any(b.start[-1] % per or b.stop[-1] % per for b in boxes):
        raise LayoutError(
            f"a {kind} tensor packs {per} elements in {kind.unit_bytes} byte(s); a shard of shape "
            f"{boxes[0].shape} would cut through one. Split another dim."
        )
    return _last(shape, per), tuple(Box(_last(b.start, per), _last(b.stop, per)) for b in boxes)


def _last(numbers: tuple[int, ...], divisor: int) -> tuple[int, ...]:
    return (*numbers[:-1], numbers[-1] // divisor)
