"""Rules: from tensor names and a strategy to a layout.

    names + shapes ──┐
    strategy ────────┼──→ layout()  ──→  which box of each tensor every rank holds
    rules ───────────┘

``rules_for`` finds the table of a known model family, ``read_rules`` parses a user's own.
"""

from __future__ import annotations

from .families import missing_layers, missing_parts, rules_for, table_for
from .logical_axes import LogicalAxisRules, with_axis_rules
from .match import OPTIMIZER_PREFIXES, Policy, Unmatched, weight_name
from .placement import layout, split_layers
from .table import ModelFacts, Rules, describe, read_rules

__all__ = [
    "OPTIMIZER_PREFIXES",
    "LogicalAxisRules",
    "ModelFacts",
    "Policy",
    "Rules",
    "Unmatched",
    "describe",
    "layout",
    "missing_layers",
    "missing_parts",
    "read_rules",
    "rules_for",
    "split_layers",
    "table_for",
    "weight_name",
    "with_axis_rules",
]
