"""Findings: what did not go as the rules say, gathered for one report.

Sixty-one layers with the same trouble are one line. What the caller's policy forbids
becomes one LayoutError; the rest becomes notes. This module knows no boxes.
"""

from __future__ import annotations

from typing import Literal

from ..errors import LayoutError, some
from ..strategy import Strategy
from .match import template, weight_name
from .table import Rules

Policy = Literal["error", "replicate"]

_NOTES = {
    "apart": "not of the text model, whole on the ranks of the first stage: {}: {}.",
    "unmatched": "no rule matches {}, whole on every rank of the stage: {}.",
    "heads": "cut within a head, so ranks hold parts of heads: {}: {}. Take an mp that divides the "
    'heads, or repeat the kv heads with a mapping (op = "repeat").',
    "uneven": "left whole, for it does not divide: {}: {}.",
    "no stage": "of no stage, so held by every stage: {}: {}.",
    "no shard": "not cut by the optimizer shard, which does not fit: {}: {}.",
}


def check_policy(name: str, value: str) -> None:
    """Refuse a policy that there is not.

    Raises:
        LayoutError: naming those there are.
    """
    if value not in ("error", "replicate"):
        raise LayoutError(f'{name}={value!r}: write "error" or "replicate".')


class Findings:
    """Names by what was found of them, and by their kind.

    Attributes:
        sharded: whether the optimizer shard fitted any tensor.
    """

    def __init__(self) -> None:
        self._names: dict[str, dict[tuple[str, str], list[str]]] = {}
        self.sharded = False

    def add(self, what: str, name: str, numbers: str) -> None:
        """Note that ``what`` was found of tensor ``name``."""
        kind = (template(name), numbers)
        self._names.setdefault(what, {}).setdefault(kind, []).append(name)

    def refuse(self, rules: Rules, strategy: Strategy, unmatched: Policy, uneven: Policy) -> None:
        """Raise what the policies forbid.

        Raises:
            LayoutError: all findings of one sort.
        """
        if unmatched == "error" and "unmatched" in self._names:
            raise LayoutError(
                f"none of the rules {rules.name} matches {self._count('unmatched')}: "
                f"{self._lines('unmatched')}. {self._remedy(rules)}, or ask for whole copies on "
                'every rank of the stage, in a conversion with unmatched="replicate" (--unmatched '
                "replicate)."
            )
        if "order" in self._names:
            first = next(iter(self._names["order"]))[0].replace("#", "*")
            raise LayoutError(
                f"the order of the dims of {self._count('order')} is not known: "
                f"{self._lines('order')}. Correct config.json, or give one of the two as a rule "
                f'for "{first}" (rules=, --rules).'
            )
        if "misfit" in self._names:
            raise LayoutError(
                f"the rule has other dims than {self._count('misfit')}: "
                f'{self._lines("misfit")}. Write one part for each dim, or "-" alone for whole.'
            )
        if uneven == "error" and "uneven" in self._names:
            first = next(iter(self._names["uneven"]))[0].replace("#", "*")
            raise LayoutError(
                f"{strategy} does not divide {self._count('uneven')}: "
                f"{self._lines('uneven')}. Take a strategy that divides them, leave the tensor "
                f'whole with the rule "{first}" = "-" (rules=, --rules), or, in a conversion, '
                'every such dim with uneven="replicate" (--uneven replicate).'
            )
        if "no shard" in self._names and not self.sharded:
            raise LayoutError(
                f"{strategy}: the optimizer shard fits no tensor: {self._lines('no shard', 2)}. "
                "Take a number of ways that divides the replicas, or -1 for all of them."
            )

    def notes(self) -> tuple[str, ...]:
        """What a person should know although it is no error."""
        return tuple(
            text.format(self._count(what), self._lines(what))
            for what, text in _NOTES.items()
            if what in self._names
        )

    def _count(self, what: str) -> str:
        number = sum(map(len, self._names[what].values()))
        return f"{number} {'dim' if what == 'uneven' else 'tensor'}{'s' if number > 1 else ''}"

    def _lines(self, what: str, limit: int = 5) -> str:
        """For each kind the first name, its numbers, and how many more there are."""
        return some(
            (
                f"{names[0]} {numbers}".rstrip()
                + (f" (and {len(names) - 1} like it)" if len(names) > 1 else "")
                for (_, numbers), names in self._names[what].items()
            ),
            limit,
        )

    def _remedy(self, rules: Rules) -> str:
        """The rule that would fit the first name, and the one that nearly does."""
        from difflib import get_close_matches  # noqa: PLC0415 - only when something is wrong

        (_, shape), names = next(iter(self._names["unmatched"].items()))
        name = weight_name(names[0])
        whole = ",".join("-" for n in shape.strip("()").split(",") if n.strip()) or "-"
        close = get_close_matches(name, [p for p, _ in rules.specs], n=1, cutoff=0.8)
        nearly = f'The rule "{close[0]}" nearly fits. ' if close else ""
        pattern = template(name).replace("#", "*")
        return f'{nearly}Give rules, such as "{pattern}" = "{whole}" for whole'
