"""Lineage: which steps the newest one grew from, and which were left behind.

    saved    10   20   30       back to 20, saved    21
    order     1    2    3                             4, which did not grow from 3
    restored first              21, 20, 10, and then 30

A run that resumes from an earlier step saves smaller names than are there, and so does one whose
steps are counted anew because its batch has grown. So a record says in which order it was saved,
and which saves before it are not its past. This module knows no names and no files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """Where a save stands among all those of a directory.

    Attributes:
        order: 1 for the first; 0 where nobody counted.
        left: first and last of the orders that it did not grow from.
    """

    order: int = 0
    left: tuple[tuple[int, int], ...] = ()

    def grew_from(self, order: int) -> bool:
        """Whether the save of that order is this one's past, or itself.

        >>> [Line(4, ((3, 3),)).grew_from(n) for n in (1, 2, 3, 4, 5)]
        [True, True, False, True, False]
        """
        return order <= self.order and not any(a <= order <= b for a, b in self.left)


def following(after: Line | None, newest: int) -> Line:
    """The line of a save that grows from ``after``, where ``newest`` is the largest order so far.

    >>> following(Line(2), newest=3)
    Line(order=4, left=((3, 3),))
    >>> following(Line(4, ((3, 3),)), newest=4)
    Line(order=5, left=((3, 3),))
    >>> following(None, newest=4)
    Line(order=5, left=((1, 4),))
    """
    before = after or Line()
    newest = max(newest, before.order)
    skipped = ((before.order + 1, newest),) if before.order < newest else ()
    return Line(newest + 1, before.left + skipped)
