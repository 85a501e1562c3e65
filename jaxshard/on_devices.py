"""On devices: strategies for arrays that are already there.

Turns "dp4mp2" and the arrays' own names into shardings, by the rules of their family. Moving
them is ``transfer``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from .catalog import Model
from .devices import rank_devices, shardings
from .errors import LayoutError
from .notes import log_notes
from .rules import Rules, layout, rules_for
from .strategy import Strategy
from .trees import named_leaves


def target_of(
    tree: Any,
    target: Any,
    *,
    devices: Sequence[jax.Device] | None = None,
    rules: Rules | None = None,
) -> Any:
    """``target`` as ``transfer`` takes it: a strategy becomes a sharding for each name.

    Raises:
        LayoutError: the strategy does not fit the arrays, or ``devices``.
    """
    if isinstance(target, str):
        target = Strategy.parse(target)
    if isinstance(target, Strategy):
        return strategy_shardings(tree, target, devices=devices, rules=rules)
    if devices is not None or rules is not None:
        raise LayoutError(
            f"devices and rules go with a strategy; a {type(target).__name__} says all by itself."
        )
    return target


def strategy_shardings(
    tree: Any,
    strategy: Strategy,
    *,
    devices: Sequence[jax.Device] | None = None,
    rules: Rules | None = None,
) -> Mapping[str, NamedSharding]:
    """The sharding of each leaf of ``tree`` under ``strategy``, by its name.

    A leaf's name is its path, joined by dots (see ``trees``). ``rules`` go before those of the
    family that the names tell, or stand alone where they tell none.

    Raises:
        LayoutError: names without a rule, dims that do not divide, too few devices.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in named_leaves(tree)[0]}
    placed = layout(shapes, strategy, _table(list(shapes), rules))
    log_notes(str(strategy), placed.notes)
    return shardings(placed, rank_devices(strategy, devices))


def _table(names: list[str], rules: Rules | None) -> Rules:
    try:
        family = rules_for(Model(), names)
    except LookupError:
        if rules is None:
            raise
        return rules
    return family.override(rules) if rules else family
