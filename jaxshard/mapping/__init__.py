"""Mappings: any model's weights with another's names and shapes, read only where needed.

q  (n·d, H) ──┐
k  (m·d, H) ──┼─ Fuse ── Transpose ── Stack over layers ──→ one tensor; a rank reads of
v  (m·d, H) ──┘                                             each file what its shard holds
"""

from __future__ import annotations

from .joins import ROWS, Dequantize, Fuse, Stack, Unfuse, Unstack
from .mapping import Mapping
from .ops import (
    Cast,
    Drop,
    Expect,
    Merge,
    Op,
    Pad,
    Rename,
    Repeat,
    Slice,
    Split,
    Transpose,
    Unpad,
    Unrepeat,
)

__all__ = [
    "ROWS",
    "Cast",
    "Dequantize",
    "Drop",
    "Expect",
    "Fuse",
    "Mapping",
    "Merge",
    "Op",
    "Pad",
    "Rename",
    "Repeat",
    "Slice",
    "Split",
    "Stack",
    "Transpose",
    "Unfuse",
    "Unpad",
    "Unrepeat",
    "Unstack",
]
