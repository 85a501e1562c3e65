r"""Renaming by regular expressions.

\.self_attn\.(q|k|v)_proj\.   →   .attention.w\1.       and back, found by itself:
\.attention\.w(q|k|v)\.       →   .self_attn.\1_proj.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import LayoutError
from .algebra import Algebra, T
from .ops import Op, renamed

Rules = tuple[tuple[str, str], ...]

_SPECIAL = frozenset(".^$*+?{}[]|()\\")
_REFERENCE = re.compile(r"\\(?:(\d+)|g<(\w+)>|(\W))")


@dataclass(frozen=True, slots=True)
class Substitute(Op):
    r"""Each rule in turn: whatever its regular expression finds in a name is replaced.

    Attributes:
        rules: (expression, replacement), as ``re.sub`` takes them: ``\1`` is the first group.
        back: the rules of the way back. They may be left out where they follow from ``rules``:
            expressions that are plain text and groups, with each group once in the replacement.

    >>> there = Substitute(((r"\.w(\d)\.", r".linear_\1."),))
    >>> there.apply({"h.w1.weight": 1}, None), there.inverse().rules
    ({'h.linear_1.weight': 1}, (('\\.linear_(\\d)\\.', '.w\\g<1>.'),))
    """

    word: ClassVar[str] = "substitute"
    rules: tuple[tuple[str, str], ...]
    back: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for expression, replacement in (*self.rules, *self.back):
            try:
                re.compile(expression).sub(replacement, "")
            except (re.error, IndexError) as error:
                raise LayoutError(
                    f"substitute: {expression!r} with {replacement!r} is no regular expression "
                    f"with its replacement ({error})."
                ) from None

    def apply(self, tensors: Mapping[str, T], algebra: Algebra[T]) -> dict[str, T]:
        """The tensors by their new names.

        Raises:
            LayoutError: two get the same name, or one would not come back by ``back``.
        """
        return renamed(tensors, self._new_name)

    def _new_name(self, name: str) -> str:
        new = _substituted(self.rules, name)
        if self.back and (again := _substituted(self.back, new)) != name:
            raise LayoutError(
                f"substitute: {name} becomes {new}, and the way back makes {again} of it. Give "
                "back= rules that undo the rules, or expressions that find less."
            )
        return new

    def inverse(self) -> Substitute:
        """The way back; it refuses a name that did not come this way.

        Raises:
            LayoutError: it is not given, and does not follow from the rules.
        """
        if self.back:
            return Substitute(self.back, self.rules)
        back = []
        for expression, replacement in reversed(self.rules):
            turned = _turned(expression, replacement)
            if turned is None:
                raise LayoutError(
                    f"substitute has no inverse, for {expression!r} with {replacement!r} does not "
                    "say how to come back. Give back=, the rules for it."
                )
            back.append(turned)
        return Substitute(tuple(back), self.rules)


def _substituted(rules: Rules, name: str) -> str:
    for expression, replacement in rules:
        name = re.sub(expression, replacement, name)
    return name


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of an expression: what it finds. In a replacement, which one it is."""

    number: int
    finds: str = ""


_Tokens = list[str | _Group]


def _turned(expression: str, replacement: str) -> tuple[str, str] | None:
    """The expression and replacement that undo these; None if they do not say."""
    start = expression.startswith("^")
    end = expression.endswith("$") and not expression.endswith("\\$")
    found = _tokens(expression[start : len(expression) - end])
    if found is None:
        return None
    groups = [token for token in found if isinstance(token, _Group)]
    wanted = _references(replacement)
    used = [token.number for token in wanted if isinstance(token, _Group)]
    if not any(token for token in wanted if isinstance(token, str)):
        return None  # nothing to find it by: every name would go back
    if sorted(used) != [g.number for g in groups]:
        return None
    finds = {g.number: g.finds for g in groups}
    turned = "".join(
        f"({finds[t.number]})" if isinstance(t, _Group) else re.escape(t) for t in wanted
    )
    back = "".join(
        rf"\g<{used.index(t.number) + 1}>" if isinstance(t, _Group) else t.replace("\\", "\\\\")
        for t in found
    )
    return "^" * start + turned + "$" * end, back


def _tokens(expression: str) -> _Tokens | None:
    """The plain text and groups that ``expression`` is made of, if it is of nothing else."""
    found: _Tokens = []
    at, count = 0, 0
    while at < len(expression):
        char = expression[at]
        if char == "(":
            end = _end_of_group(expression, at)
            if end is None:
                return None
            count += 1
            found.append(_Group(count, expression[at + 1 : end - 1]))
            at = end
        elif char == "\\" and not expression[at + 1 : at + 2].isalnum():
            found.append(expression[at + 1 : at + 2])
            at += 2
        elif char in _SPECIAL or expression[at + 1 : at + 2] in ("*", "+", "?", "{"):
            return None
        else:
            found.append(char)
            at += 1
    return found


def _end_of_group(expression: str, at: int) -> int | None:
    """Past the group that begins at ``at``; None if it is named, nested or repeated."""
    end = at + 1
    while end < len(expression) and expression[end] != ")":
        if expression[end] in "([":
            return None
        end += 2 if expression[end] == "\\" else 1
    after = expression[end + 1 : end + 2]
    if end >= len(expression) or expression[at + 1] == "?" or after in ("*", "+", "?", "{"):
        return None
    return end + 1


def _references(replacement: str) -> _Tokens:
    """The plain text and the groups of a replacement."""
    found: _Tokens = []
    at = 0
    for reference in _REFERENCE.finditer(replacement):
        found.append(replacement[at : reference.start()])
        of = reference[1] or reference[2]
        if of:  # a group that is called by a name is none that is known
            found.append(_Group(int(of) if of.isdigit() else 0))
        else:
            found.append(reference[3])
        at = reference.end()
    found.append(replacement[at:])
    return found
