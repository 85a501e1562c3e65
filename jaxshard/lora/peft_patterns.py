r"""PEFT's module patterns, matched in bounded time.

PEFT calls ``re.match(r"(.*\.)?(PATTERN)$", module)``, and Python's ``re`` may take years for an
untrusted pattern. An expression is therefore evaluated on all positions of a name together, as the
bits of one integer:

    name        q . k . v           starts 101010   after "k" 000100   after "k.*" 000111
    positions   0 1 2 3 4 5         (a match may begin at 0 and after each dot)

Steps are counted, and a config that needs more than a fixed number of steps is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Generic, TypeVar

from ..errors import FormatError

V = TypeVar("V")

MAX_STEPS = 4_000_000  # a few seconds at worst
_MAX_PATTERNS = 1 << 16
_MAX_EXPRESSIONS, _MAX_LENGTH = 1 << 10, 1 << 10  # expressions, and characters of one
_MAX_DEPTH = 20  # nested groups
_WORD = 6  # log2 of the bits in a machine word
_PLAIN = re.compile(r"[\w.]+", re.ASCII)
_TOKEN = re.compile(
    r"\(\?:|\(\?P<\w+>|\(\?|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d+\}|\{\d*,\d*\}|.", re.DOTALL
)
_CLASSES = frozenset("dwsDWS")
_ENDS = {"^": "start", "\\A": "start", "$": "end", "\\Z": "very end"}


class _TooLong(Exception):
    """The budget of steps is exhausted."""


class _Unknown(Exception):
    """A part of an expression that cannot be matched in bounded time."""


@dataclass
class _Steps:
    """The remaining budget of steps."""

    left: int

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise _TooLong


class _Text:
    """A name and sets of positions in it; bit ``i`` is the position before character ``i``."""

    def __init__(self, text: str, steps: _Steps) -> None:
        self.text, self._steps = text, steps
        self._cost = 1 + (len(text) >> _WORD)
        self._masks: dict[str, int] = {}
        self._found: dict[str, int] = {}

    def count(self) -> None:
        """Count one operation on sets of positions."""
        self._steps.take(self._cost)

    @cached_property
    def starts(self) -> int:
        """Positions where a match may begin: 0, and after each dot of the first line."""
        self._steps.take(len(self.text))
        line = self.text.partition("\n")[0]
        return 1 | sum(2 << i for i, c in enumerate(line) if c == ".")

    def at(self, which: str) -> int:
        """Return the positions of the start, of the end as in ``$``, or of the very end."""
        last = len(self.text)
        before_newline = which == "end" and self.text.endswith("\n")
        return {"start": 1}.get(which, 1 << last) | (before_newline and 1 << (last - 1))

    def mask(self, atom: str) -> int:
        """Return the positions whose character matches ``atom``."""
        if atom not in self._masks:
            self._masks[atom] = sum(bits for c, bits in self._places.items() if _is_one(atom, c))
        self.count()
        return self._masks[atom]

    def found(self, literal: str) -> int:
        """Return the positions where ``literal`` begins."""
        if literal not in self._found:
            self._steps.take(self._cost * len(literal))
            places, at = list[int](), self.text.find(literal)
            while at >= 0:
                places.append(at)
                at = self.text.find(literal, at + 1)
            self._steps.take(len(places))
            self._found[literal] = _bits(places, len(self.text))
        self.count()
        return self._found[literal]

    @cached_property
    def _places(self) -> dict[str, int]:
        self._steps.take(len(self.text))
        found: dict[str, list[int]] = {}
        for i, c in enumerate(self.text):
            found.setdefault(c, []).append(i)
        return {c: _bits(places, len(self.text)) for c, places in found.items()}


def _bits(places: list[int], length: int) -> int:
    data = bytearray((length >> 3) + 1)
    for i in places:
        data[i >> 3] |= 1 << (i & 7)
    return int.from_bytes(data, "little")


@lru_cache(maxsize=1 << 14)
def _is_one(atom: str, char: str) -> bool:
    return re.fullmatch(atom, char) is not None


_Node = Callable[[_Text, int], int]
"""Maps the positions before a part of an expression to the positions after it."""


@dataclass(frozen=True)
class ByPattern(Generic[V]):
    """Values by pattern; the first pattern that matches the end of a module's name decides.

    Attributes:
        values: the value of each pattern.
        where: their file and key, for errors.
    """

    values: Mapping[str, V]
    where: str = ""

    def find(self, module: str, default: V) -> V:
        """Return the value for ``module``.

        Raises:
            FormatError: matching needs too many steps.
        """
        try:
            found = self._first(module)
        except _TooLong:
            raise FormatError(
                f"{self.where}: {len(self._values)} patterns need more than {MAX_STEPS} steps to "
                "match the names of this adapter. Write module names in full, without repeats "
                "(* +), or pass scaling= (--scaling) and adapter_rank= (--adapter-rank) for all."
            ) from None
        return default if found is None else self._values[found]

    def _first(self, module: str) -> int | None:
        plain = self._names.find(module, self._steps) if self._names.shapes else None
        text = _Text(module, self._steps)
        for i, node in self._expressions:
            if plain is not None and plain < i:
                break
            if node(text, text.starts) & text.at("end"):
                return i
        return plain

    @cached_property
    def _steps(self) -> _Steps:
        return _Steps(MAX_STEPS)

    @cached_property
    def _values(self) -> tuple[V, ...]:
        return tuple(self.values.values())

    @cached_property
    def _names(self) -> _Names:
        return _Names({p: i for i, p in enumerate(self.values) if _PLAIN.fullmatch(p)})

    @cached_property
    def _expressions(self) -> tuple[tuple[int, _Node], ...]:
        some = [(i, p) for i, p in enumerate(self.values) if not _PLAIN.fullmatch(p)]
        return tuple((i, _parsed(p)) for i, p in some)


class _Names:
    """Patterns that are names: letters, digits, and dots that match any character.

    Patterns of one length with dots at the same positions share one lookup.
    """

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self.shapes: dict[tuple[int, ...], dict[tuple[str, ...], int]] = {}
        for pattern, number in numbers.items():
            parts = tuple(pattern.split("."))
            self.shapes.setdefault(tuple(map(len, parts)), {})[parts] = number

    def find(self, module: str, steps: _Steps) -> int | None:
        """Return the smallest index of a pattern that matches the end of ``module``."""
        steps.take(1 + (len(module) >> _WORD))
        text = module.removesuffix("\n")  # like $
        best = None
        if "\n" in text:
            return None  # a dot does not match a newline
        for lengths, numbers in self.shapes.items():
            steps.take(len(lengths))
            begin = len(text) - sum(lengths) - len(lengths) + 1
            if begin < 0 or (begin and text[begin - 1] != "."):
                continue
            parts, at = [], begin
            for length in lengths:
                parts.append(text[at : at + length])
                at += length + 1
            number = numbers.get(tuple(parts))
            if number is not None and (best is None or number < best):
                best = number
        return best


def check_patterns(patterns: Mapping[str, object], where: str) -> None:
    """Refuse patterns that are invalid, too long or too many, or not supported.

    Raises:
        FormatError: with the pattern.
    """
    if len(patterns) > _MAX_PATTERNS:
        raise FormatError(
            f"{where} has {len(patterns)} patterns, expected at most {_MAX_PATTERNS}. Fetch the "
            "adapter again, or list fewer modules."
        )
    expressions = [p for p in patterns if not _PLAIN.fullmatch(p)]
    if len(expressions) > _MAX_EXPRESSIONS:
        raise FormatError(
            f"{where} has {len(expressions)} regular expressions, expected at most "
            f"{_MAX_EXPRESSIONS}. Write module names instead."
        )
    for pattern in expressions:
        _check(pattern, where)


def _check(pattern: str, where: str) -> None:
    shown = repr(pattern[:80])
    if len(pattern) > _MAX_LENGTH:
        raise FormatError(
            f"{where} has {shown} …, an expression of {len(pattern)} characters, expected "
            f"at most {_MAX_LENGTH}. Write module names instead."
        )
    try:
        re.compile(f"(.*\\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(
            f"{where} has {shown}, which is not a regular expression: {error}."
        ) from None
    try:
        _parsed(pattern)
    except _Unknown as error:
        raise FormatError(
            f"{where} has {shown} with {error}, which is not supported. Use only names, classes, "
            "groups, alternatives (|) and repeats (? * + {m,n})."
        ) from None


@lru_cache(maxsize=1 << 10)
def _parsed(pattern: str) -> _Node:
    """Parse ``pattern``, which is valid for ``re``.

    Raises:
        _Unknown: an unsupported construct, such as a back reference.
    """
    tokens = _TOKEN.findall(pattern)
    node, at = _alternatives(tokens, 0, 0)
    if at < len(tokens):
        raise _Unknown("a ) without its (")
    return node


def _alternatives(tokens: list[str], at: int, depth: int) -> tuple[_Node, int]:
    """Parse the alternatives from token ``at``; also return the token after them."""
    if depth > _MAX_DEPTH:
        raise _Unknown(f"groups nested deeper than {_MAX_DEPTH}")
    ways: list[list[_Node]] = [[]]
    while at < len(tokens) and tokens[at] != ")":
        if tokens[at] == "|":
            ways.append([])
            at += 1
            continue
        end = _end_of_literal(tokens, at)
        if end > at:
            node, at = _literal("".join(t[-1] for t in tokens[at:end])), end
        else:
            node, at = _repeated(tokens, at, depth)
        ways[-1].append(node)
    return _either([_after(parts) for parts in ways]), at


def _end_of_literal(tokens: list[str], at: int) -> int:
    """Return the end of the run of literal characters that begins at token ``at``."""
    end = at
    while end < len(tokens) and _is_literal(tokens[end]):
        end += 1
    return end - 1 if end > at and end < len(tokens) and _times(tokens[end]) else end


def _is_literal(token: str) -> bool:
    if token[0] == "\\":
        return not token[1].isalnum()
    return len(token) == 1 and token not in ".^$*+?()|"


def _repeated(tokens: list[str], at: int, depth: int) -> tuple[_Node, int]:
    """Parse one atom or group with its repetition; also return the token after it."""
    token = tokens[at]
    atom = None
    if token in ("(", "(?:") or token.startswith("(?P<"):
        node, at = _alternatives(tokens, at + 1, depth + 1)
    elif token in _ENDS:
        node = _place(_ENDS[token])
    elif token.startswith("(?") or (token[0] == "\\" and token[1].isalnum()):
        if token[1:] not in _CLASSES:
            raise _Unknown(f"{token} …" if token == "(?" else token)
        node, atom = _one(token), token
    else:
        atom = token if token in "." or len(token) > 1 else re.escape(token)
        node = _one(atom)
    at += 1
    if at < len(tokens) and (times := _times(tokens[at])):
        at += 1
        if at < len(tokens) and tokens[at] == "+":
            raise _Unknown(f"{tokens[at - 1]}+ (possessive)")
        at += at < len(tokens) and tokens[at] == "?"  # lazy: the same names match
        node = _run(atom) if atom and times == (0, None) else _times_over(node, *times)
    return node, at


def _times(token: str) -> tuple[int, int | None] | None:
    known = {"?": (0, 1), "*": (0, None), "+": (1, None)}
    if token in known or token[0] != "{" or len(token) == 1:
        return known.get(token)
    least, comma, most = token[1:-1].partition(",")
    return int(least or 0), (int(most) if most else None) if comma else int(least)


def _one(atom: str) -> _Node:
    return lambda text, at: (at & text.mask(atom)) << 1


def _literal(text: str) -> _Node:
    return lambda name, at: (at & name.found(text)) << len(text)


def _run(atom: str) -> _Node:
    """Match any number of ``atom``: an addition carries through each run of matches."""

    def after(text: _Text, at: int) -> int:
        mask = text.mask(atom)
        return at | (((at & mask) + mask) ^ mask)

    return after


def _place(which: str) -> _Node:
    return lambda text, at: at & text.at(which)


def _after(parts: list[_Node]) -> _Node:
    def after(text: _Text, at: int) -> int:
        for part in parts:
            if not at:
                break
            at = part(text, at)
        return at

    return after


def _either(ways: list[_Node]) -> _Node:
    if len(ways) == 1:
        return ways[0]

    def after(text: _Text, at: int) -> int:
        found = 0
        for way in ways:
            text.count()
            found |= way(text, at)
        return found

    return after


def _times_over(node: _Node, least: int, most: int | None) -> _Node:
    def after(text: _Text, at: int) -> int:
        for _ in range(least):
            text.count()
            at = node(text, at)
        seen, new, done = at, at, least
        while new and (most is None or done < most):
            text.count()
            new = node(text, new) & ~seen
            seen |= new
            done += 1
        return seen

    return after
