"""Views: how the elements of a stored box lie in their file, and what becomes of them.

A piece without a view is contiguous and row-major. A view says that neighbours along
each dim are some bytes apart, so that a transposed, interleaved or repeated tensor is
read from where it is; and which steps turn what is stored into what is meant.

    stored (2, 3)   a b c d e f      transposed (3, 2), strides (1, 3)    a d
                                                                          b e
                                                                          c f
Numbers only: this module opens no file and computes no values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .dtypes import DType

if TYPE_CHECKING:
    from .catalog import Tensor

#: The file number of a box of zeros, which no file stores.
ZEROS = -1


@dataclass(frozen=True, slots=True)
class Affine:
    """A number for each element of a box: ``start`` at its first, plus ``steps`` along each dim.

    >>> Affine(10, (4, 1)).moved(1, by=2)
    Affine(start=12, steps=(4, 1))
    """

    start: int
    steps: tuple[int, ...]

    def moved(self, dim: int, by: int) -> Affine:
        """The same numbers for the box that begins ``by`` elements later along ``dim``."""
        return Affine(self.start + by * self.steps[dim], self.steps)


@dataclass(frozen=True, slots=True)
class Round:
    """Round the values to ``dtype`` on the way: what a cast there and back does."""

    dtype: DType


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply element (row, column) by ``scale[row // block, column // block]``.

    Attributes:
        scale: the factors, a small tensor.
        block: rows and columns that share one.
        at: the row and the column, in the stored weight, of each element of the box.
    """

    scale: Tensor
    block: tuple[int, int]
    at: tuple[Affine, Affine]


@dataclass(frozen=True, slots=True)
class AddProduct:
    """Add ``scaling * (b @ a)[row, column]``: a low-rank adapter.

    Attributes:
        a: (rank, columns).
        b: (rows, rank).
        at: the row and the column of each element of the box.
        columns: the columns of ``b`` that count, if not all: from the first on, so far apart.
        reproducible: sum over the rank one by one, each fused with its product and rounded,
            so that the bits depend on no machine; else as fast as the machine can.
    """

    a: Tensor
    b: Tensor
    scaling: float
    at: tuple[Affine, Affine]
    columns: tuple[int, int] = (0, 1)
    reproducible: bool = False


Step = Round | Scale | AddProduct


@dataclass(frozen=True, slots=True)
class View:
    """How a stored box is read.

    Attributes:
        strides: bytes between neighbours, per dim of the box; 0 repeats one element.
        dtype: what is stored.
        steps: what is done to the values, in float32, before they get the tensor's dtype.
    """

    strides: tuple[int, ...]
    dtype: DType
    steps: tuple[Step, ...] = ()

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The small tensors that the steps need whole."""
        found: list[Tensor] = []
        for step in self.steps:
            if isinstance(step, Scale):
                found.append(step.scale)
            elif isinstance(step, AddProduct):
                found += [step.a, step.b]
        return tuple(found)


def with_places(step: Step, at: tuple[Affine, ...]) -> Step:
    """``step`` for elements that are elsewhere in the box."""
    return step if isinstance(step, Round) else replace(step, at=(at[0], at[1]))


def places(step: Step) -> tuple[Affine, ...]:
    """The numbers that ``step`` knows its elements by."""
    return () if isinstance(step, Round) else step.at
