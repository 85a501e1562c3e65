"""The tensor algebra in which every mapping operation is written.

The same operation runs on tensors in files (as geometry, see ``geometry``), on values in
memory (as expressions, see ``expressions``) and on placements (see ``placing``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from ..core.catalog import Tensor
from ..core.dtypes import DType
from . import tensors

T = TypeVar("T")


class Algebra(Protocol[T]):
    """What can be done with a tensor ``T``; shapes are always known."""

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
        """``xs`` one after the other along ``dim``; ``name`` is for errors."""
        ...

    def repeat(self, x: T, dim: int, times: int) -> T:
        """``x`` with ``dim``, of length 1, repeated."""
        ...

    def pad(self, x: T, dim: int, length: int) -> T:
        """``x`` with zeros after it along ``dim``, up to ``length``."""
        ...

    def cast(self, x: T, dtype: DType) -> T:
        """The values of ``x`` rounded to ``dtype``."""
        ...

    def scaled(self, x: T, scale: T, block: tuple[int, int], dtype: DType) -> T:
        """The true values of a matrix whose blocks each have a factor in ``scale``."""
        ...


class Geometry:
    """The algebra of tensors in files: nothing is read, only where it lies is told anew."""

    shape = staticmethod(lambda x: x.shape)
    transpose = staticmethod(tensors.transpose)
    reshape = staticmethod(tensors.reshape)
    cut = staticmethod(tensors.cut)
    join = staticmethod(tensors.join)
    repeat = staticmethod(tensors.repeat)
    cast = staticmethod(tensors.cast)
    scaled = staticmethod(tensors.scaled)

    @staticmethod
    def pad(x: Tensor, dim: int, length: int) -> Tensor:
        """``x`` with zeros after it along ``dim``, up to ``length``."""
        rest = (*x.shape[:dim], length - x.shape[dim], *x.shape[dim + 1 :])
        return tensors.join([x, tensors.zeros(rest, x.dtype)], dim, x.name)
