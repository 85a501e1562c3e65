"""Mappings: any model's weights with another's names and shapes, read only where needed.

q  (n·d, H) ──┐
k  (m·d, H) ──┼─ Fuse ── Transpose ── Stack over layers ──→ one tensor; a rank reads of
v  (m·d, H) ──┘                                             each file what its shard holds
"""

from __future__ import annotations

from .joins import ROWS, Dequantize, Fuse, Unfuse
from .mapping import Mapping, Origin
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
from .regexes import Substitute
from .stacks import Stack, Tie, Unstack, Untie
from .tables import FORMS, dequantized, find_mapping, form_of, table, true_config
from .text import read_mapping, write_mapping

__all__ = [
    "FORMS",
    "ROWS",
    "Cast",
    "Dequantize",
    "Drop",
    "Expect",
    "Fuse",
    "Mapping",
    "Merge",
    "Op",
    "Origin",
    "Pad",
    "Rename",
    "Repeat",
    "Slice",
    "Split",
    "Stack",
    "Substitute",
    "Tie",
    "Transpose",
    "Unfuse",
    "Unpad",
    "Unrepeat",
    "Unstack",
    "Untie",
    "dequantized",
    "find_mapping",
    "form_of",
    "read_mapping",
    "table",
    "true_config",
    "write_mapping",
]
