"""The tensor algebra of mapping operations, and the checks that all its implementations share.

The same operation runs on tensors in files (``tensors.Geometry``), on arrays in memory
(``arrays.Expressions``) and on placements (``layouts.Placing``).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol, TypeVar

from ..core import dtypes
from ..core.dtypes import BY_NAME, DType, is_float
from ..errors import FormatError, LayoutError, did_you_mean

T = TypeVar("T")


class Algebra(Protocol[T]):
    """Operations on a tensor type ``T`` with known shapes."""

    def shape(self, x: T) -> tuple[int, ...]:
        """Elements along each dim."""
        ...

    def transpose(self, x: T, order: Sequence[int]) -> T:
        """Dim ``i`` of the result is dim ``order[i]`` of ``x``."""
        ...

    def reshape(self, x: T, shape: tuple[int, ...]) -> T:
        """The same elements in the same row-major order."""
        ...

    def cut(self, x: T, dim: int, start: int, stop: int) -> T:
        """The elements ``start:stop`` along ``dim``."""
        ...

    def join(self, xs: Sequence[T], dim: int, name: str) -> T:
        """``xs`` concatenated along ``dim``; ``name`` is for errors."""
        ...

    def repeat(self, x: T, dim: int, times: int) -> T:
        """``x`` with ``dim``, of length 1, repeated."""
        ...

    def pad(self, x: T, dim: int, length: int) -> T:
        """``x`` padded with zeros along ``dim`` to ``length``."""
        ...

    def cast(self, x: T, dtype: DType) -> T:
        """The values of ``x`` rounded to ``dtype``."""
        ...

    def scaled(self, x: T, scale: T, block: tuple[int, int], dtype: DType) -> T:
        """The dequantized values of a matrix with a factor for each block in ``scale``."""
        ...


# --- Checks: one message for tensors in files and for arrays in memory

Shape = tuple[int, ...]


def check_numbers(word: str, least: int = 0, **numbers: int) -> None:
    """Refuse fields of an operation below ``least``."""
    for name, n in numbers.items():
        if n < least:
            why = " Dims are counted from 0." if name == "dim" else ""
            raise LayoutError(f"{word}: {name} = {n} must be {least} or more.{why}")


def length_of(shape: Shape, dim: int, what: str = "") -> int:
    """Return the length of ``dim``; ``what`` is the prefix of errors.

    Raises:
        LayoutError: no such dim.
    """
    if not 0 <= dim < len(shape):
        raise LayoutError(
            f"{what}{': ' if what else ''}shape {shape} has no dim {dim}; dims are counted from 0."
        )
    return shape[dim]


def check_order(name: str, order: Sequence[int], shape: Shape) -> None:
    """Refuse an order that is not a permutation of the dims of ``shape``."""
    if sorted(order) != list(range(len(shape))):
        raise LayoutError(
            f"{name}: {tuple(order)} is not a permutation of the {len(shape)} dims of shape "
            f"{shape}."
        )


def check_reshape(name: str, old: Shape, new: Shape) -> None:
    """Refuse a shape with another number of elements."""
    if prod(new) != prod(old):
        raise LayoutError(
            f"{name}: shape {old} has {prod(old)} elements and cannot become {new}, which has "
            f"{prod(new)}."
        )


def check_cut(name: str, shape: Shape, dim: int, start: int, stop: int) -> None:
    """Refuse a slice that is empty or out of bounds."""
    if not 0 <= start < stop <= length_of(shape, dim, name):
        raise LayoutError(f"{name}: {start}:{stop} is not a slice of dim {dim} of shape {shape}.")


def check_join(
    target: str, dim: int, parts: Sequence[tuple[str, Shape, DType | str | None]]
) -> None:
    """Refuse tensors (name, shape, dtype) with different dtypes or other dims."""
    first, shape, dtype = parts[0]
    length_of(shape, dim, target)
    for name, other, kind in parts[1:]:
        same = len(other) == len(shape) and all(
            a == b or d == dim for d, (a, b) in enumerate(zip(shape, other, strict=True))
        )
        if not same or kind != dtype:
            raise LayoutError(
                f"{target}: {first} ({dtype}, {shape}) and {name} ({kind}, {other}) cannot be "
                "joined "
                f"along dim {dim}. Cast or reshape one of them first."
            )


def check_repeat(name: str, shape: Shape, dim: int) -> None:
    """Refuse to repeat a dim that is not of length 1."""
    if length_of(shape, dim, name) != 1:
        raise LayoutError(
            f"{name}: dim {dim} of shape {shape} has {shape[dim]} elements, expected 1 to repeat."
        )


def check_cast(old: DType, new: DType) -> None:
    """Refuse a cast that truncates values."""
    if old.name.startswith("C") and not new.name.startswith("C"):
        raise LayoutError(f"{old} to {new} would lose the imaginary parts.")
    if is_float(old) and not is_float(new):
        raise LayoutError(f"{old} to {new} would truncate fractions and overflow. Cast to a float.")


def check_scales(
    name: str, shape: Shape, scale: str, scale_shape: Shape, block: tuple[int, int]
) -> None:
    """Refuse factors whose shape is not that of the blocks of a matrix."""
    expected = tuple(-(-n // b) for n, b in zip(shape, block, strict=False))
    if len(shape) != 2 or scale_shape != expected:
        raise LayoutError(
            f"{name}: shape {shape} in blocks of {block[0]} x {block[1]} needs scales of shape "
            f"{expected}, but {scale} has {scale_shape}."
        )


def dtype_of(word: str, name: str) -> DType:
    """Return the dtype of an operation by its name.

    Raises:
        LayoutError: no such dtype.
    """
    try:
        return dtypes.dtype(name)
    except FormatError as error:
        raise LayoutError(f"{word}: {error}{did_you_mean(name.upper(), BY_NAME)}") from None
