"""Boxes: half-open rectangles of element indices, and the runs of bytes that store them.

Every question jaxshard answers ("which bytes does rank 3 need?") reduces to
intersecting two boxes. The byte runs of a box in a row-major
tensor follow from its shape. This module does not depend on files or devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from operator import lt, sub


@dataclass(frozen=True, slots=True)
class Box:
    """The elements ``start <= i < stop`` of an array, in global coordinates.

    >>> Box((0, 4), (4, 8)).shape
    (4, 4)
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """Return the box that covers an array of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dim."""
        return tuple(map(sub, self.stop, self.start))

    @property
    def size(self) -> int:
        """Elements in the box; 1 for a 0-d box."""
        return prod(map(sub, self.stop, self.start))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the box in an array."""
        return tuple(map(slice, self.start, self.stop))

    def intersect(self, other: Box) -> Box | None:
        """Return the common elements, or None if the boxes do not overlap.

        >>> Box((0, 0), (4, 4)).intersect(Box((2, 0), (6, 4)))
        Box(start=(2, 0), stop=(4, 4))
        >>> Box((0,), (2,)).intersect(Box((2,), (4,))) is None
        True
        """
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(map(lt, start, stop)) else None

    def contains(self, other: Box) -> bool:
        """Whether every element of ``other`` is in this box."""
        return all(map(int.__le__, self.start, other.start)) and all(
            map(int.__ge__, self.stop, other.stop)
        )

    def within(self, outer: Box) -> Box:
        """Return this box in coordinates local to ``outer``.

        >>> Box((2, 4), (4, 8)).within(Box((2, 0), (4, 8)))
        Box(start=(0, 4), stop=(2, 8))
        """
        first = outer.start
        return Box(
            tuple([a - o for a, o in zip(self.start, first, strict=True)]),
            tuple([b - o for b, o in zip(self.stop, first, strict=True)]),
        )

    def minus(self, other: Box) -> list[Box]:
        """Return disjoint boxes that cover this box without ``other``.

        >>> [b.shape for b in Box((0, 0), (4, 4)).minus(Box((1, 1), (4, 3)))]
        [(1, 4), (3, 1), (3, 1)]
        """
        hole = self.intersect(other)
        if hole is None:
            return [self] if self.size else []
        rest, start, stop = [], list(self.start), list(self.stop)
        for dim in range(len(start)):
            for a, b in ((start[dim], hole.start[dim]), (hole.stop[dim], stop[dim])):
                if a < b:
                    rest.append(
                        Box(
                            (*start[:dim], a, *start[dim + 1 :]), (*stop[:dim], b, *stop[dim + 1 :])
                        )
                    )
            start[dim], stop[dim] = hole.start[dim], hole.stop[dim]
        return rest

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"
