"""Mappings between the names and shapes of two programs' models.

q  (n·d, H) ──┐
k  (m·d, H) ──┼─ Fuse ── Transpose ── Stack over layers ──→ one tensor; a rank reads of
v  (m·d, H) ──┘                                             each file what its shard holds

Names are imported on first access, so that layouts do not import the tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core import lazy_getattr

if TYPE_CHECKING:
    from .group_ops import ROWS, Dequantize, Fuse, Stack, Tie, Unfuse, Unstack, Untie
    from .mapping import MappedFrom, Mapping, read_mapping, write_mapping
    from .ops import (
        Affine,
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
        Substitute,
        Transpose,
        Unpad,
        Unrepeat,
    )
    from .quantization import dequantized, true_config
    from .tables import find_mapping, form_of, table

_HOME = {
    "Affine": "ops",
    "Cast": "ops",
    "Dequantize": "group_ops",
    "Drop": "ops",
    "Expect": "ops",
    "Fuse": "group_ops",
    "Mapping": "mapping",
    "Merge": "ops",
    "Op": "ops",
    "MappedFrom": "mapping",
    "Pad": "ops",
    "ROWS": "group_ops",
    "Rename": "ops",
    "Repeat": "ops",
    "Slice": "ops",
    "Split": "ops",
    "Stack": "group_ops",
    "Substitute": "ops",
    "Tie": "group_ops",
    "Transpose": "ops",
    "Unfuse": "group_ops",
    "Unpad": "ops",
    "Unrepeat": "ops",
    "Unstack": "group_ops",
    "Untie": "group_ops",
    "dequantized": "quantization",
    "find_mapping": "tables",
    "form_of": "tables",
    "read_mapping": "mapping",
    "table": "tables",
    "true_config": "quantization",
    "write_mapping": "mapping",
}

__all__ = [
    "ROWS",
    "Affine",
    "Cast",
    "Dequantize",
    "Drop",
    "Expect",
    "Fuse",
    "MappedFrom",
    "Mapping",
    "Merge",
    "Op",
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

if not TYPE_CHECKING:  # without it, type checkers refuse unknown names
    __getattr__ = lazy_getattr(__name__, _HOME)


def __dir__() -> list[str]:
    return list(__all__)
