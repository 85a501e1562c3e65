"""Patterns of modules, as a stranger's config has them: regular expressions that must end.

Python's ``re`` can take years over a few characters. What an expression may take is
estimated from its text, and one that may take long is refused; names, alternatives and
``.*`` are no trouble.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from ..errors import FormatError

V = TypeVar("V")

_MOST_STEPS = 20_000_000  # tenths of a second at worst
_NAME_LENGTH = 64  # characters that a repeat may stop at
_NAME_PARTS = 10  # places where a pattern may begin
_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)
_PLAIN = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class ByPattern(Generic[V]):
    """Values by the pattern that the end of a module's name is; the first decides."""

    values: Mapping[str, V]

    def find(self, module: str, default: V) -> V:
        """The value for ``module``."""
        for pattern, value in self._compiled:
            if pattern.match(module):
                return value
        return default

    @cached_property
    def _compiled(self) -> tuple[tuple[re.Pattern[str], V], ...]:
        return tuple((_compiled(p), v) for p, v in self.values.items())


def check_pattern(pattern: str, where: str) -> None:
    """Refuse what is no regular expression, or may take too long.

    Raises:
        FormatError: with the pattern.
    """
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(
            f"{where} has {pattern[:80]!r}, no regular expression: {error}."
        ) from None
    if not _PLAIN.fullmatch(pattern) and _steps(pattern) > _MOST_STEPS:
        raise FormatError(
            f"{where} has {pattern[:80]!r}, an expression that may take too long to try. Name the "
            "modules with fewer repeats and alternatives."
        )


def _compiled(pattern: str) -> re.Pattern[str]:
    """As PEFT asks: the whole module, or what comes after a dot of it."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _steps(pattern: str) -> int:
    """About how many ways there are to try ``pattern`` on a name."""
    steps, alternatives = _NAME_PARTS, [1]
    before = ""
    for part in _PARTS.findall(pattern):
        if part == "(":
            alternatives.append(1)
        elif part == "|":
            alternatives[-1] += 1
        elif part == ")":
            steps *= alternatives.pop() if len(alternatives) > 1 else 1
        elif part == "?":
            steps *= 1 if before in ("*", "+", "?", "(") else 2
        elif part in ("*", "+") or (part[0] == "{" and len(part) > 1):
            if before == ")":
                return _MOST_STEPS + 1  # what is inside may be tried in exponentially many ways
            steps *= _NAME_LENGTH if before != "(" else 1
        before = part
        if steps > _MOST_STEPS:
            break
    return steps * alternatives[0]
