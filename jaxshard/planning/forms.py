"""Forms: how a source lies in its file, where that is not contiguous and row-major.

A mapped tensor is made of others' bytes, which may lie in another order of dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..box import Box
from ..catalog import Piece
from ..cells import Cell
from ..ranges import Runs, byte_runs, strided_runs
from ..views import ZEROS


@dataclass(frozen=True, slots=True)
class Form:
    """How a source box lies in its file, where that is not contiguous and row-major.

    Attributes:
        strides: bytes between neighbours, per dim.
        item_bytes: bytes of a stored element; 0 if nothing is stored (zeros).
    """

    strides: tuple[int, ...]
    item_bytes: int

    def runs(self, part: Box, stored: Box, base: int = 0) -> tuple[Runs, tuple[int, ...]]:
        """Where ``part`` lies of the box ``stored`` that begins at ``base``; see ranges."""
        start = part.within(stored).start
        at = base + sum(i * s for i, s in zip(start, self.strides, strict=True))
        return strided_runs(part.shape, self.strides, self.item_bytes, at)

    def is_permuted(self, box: Box) -> bool:
        """Whether its dims have another order in the file, as far as ``box`` has them."""
        some = [s for s, n in zip(self.strides, box.shape, strict=True) if s and n != 1]
        return any(a < b for a, b in pairwise(some))


Forms = tuple[Form | None, ...]


def form_of(piece: Piece) -> Form | None:
    """How ``piece`` lies in its file; None for contiguous and row-major."""
    view = piece.view
    if view is None:
        return None
    item_bytes = 0 if piece.file == ZEROS else view.dtype.unit_bytes
    return Form(view.strides, item_bytes)


def part_runs(part: Box, stored: Box, form: Form | None, unit: int) -> Runs | None:
    """Where ``part`` lies, from the first byte of the box ``stored``; None if nothing does."""
    if form is None:
        return byte_runs(part.within(stored), stored.shape, unit)
    return form.runs(part, stored)[0] if form.item_bytes else None


def permuted_form(cell: Cell, forms: Forms) -> Form | None:
    """The form of a source of ``cell`` that lies in another order of dims, if there is one."""
    for i, part in cell.sources:
        form = forms[i]
        if form and form.is_permuted(part):
            return form
    return None
