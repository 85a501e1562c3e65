"""Mappings: any model's weights with another's names and shapes, read only where needed.

q  (n·d, H) ──┐
k  (m·d, H) ──┼─ Fuse ── Transpose ── Stack over layers ──→ one tensor; a rank reads of
v  (m·d, H) ──┘                                             each file what its shard holds

Each name is fetched when it is first used: who only needs how boxes lie reads no tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazily import fetching

if TYPE_CHECKING:
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

_HOME = {
    "Cast": "ops",
    "Dequantize": "joins",
    "Drop": "ops",
    "Expect": "ops",
    "FORMS": "tables",
    "Fuse": "joins",
    "Mapping": "mapping",
    "Merge": "ops",
    "Op": "ops",
    "Origin": "mapping",
    "Pad": "ops",
    "ROWS": "joins",
    "Rename": "ops",
    "Repeat": "ops",
    "Slice": "ops",
    "Split": "ops",
    "Stack": "stacks",
    "Substitute": "regexes",
    "Tie": "stacks",
    "Transpose": "ops",
    "Unfuse": "joins",
    "Unpad": "ops",
    "Unrepeat": "ops",
    "Unstack": "stacks",
    "Untie": "stacks",
    "dequantized": "tables",
    "find_mapping": "tables",
    "form_of": "tables",
    "read_mapping": "text",
    "table": "tables",
    "true_config": "tables",
    "write_mapping": "text",
}

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

__getattr__ = fetching(__name__, _HOME)


def __dir__() -> list[str]:
    return list(__all__)
