"""Rules turn tensor names and a strategy into a layout.

    names + shapes ──┐
    strategy ────────┼──→ layout()  ──→  which box of each tensor every rank holds
    rules ───────────┘

``rules_for`` finds the table of a known model family, ``read_rules`` reads a user's own.
"""

from __future__ import annotations

from .families import FAMILIES, MODEL_TYPES
from .findings import Policy
from .match import OPTIMIZER_PREFIXES, weight_name
from .place import layout
from .read import read_rules
from .recognise import rules_for
from .stages import split_layers
from .table import ModelFacts, Rules, describe
from .wholeness import missing_layers, missing_parts

__all__ = [
    "FAMILIES",
    "MODEL_TYPES",
    "OPTIMIZER_PREFIXES",
    "ModelFacts",
    "Policy",
    "Rules",
    "describe",
    "layout",
    "missing_layers",
    "missing_parts",
    "read_rules",
    "rules_for",
    "split_layers",
    "weight_name",
]
