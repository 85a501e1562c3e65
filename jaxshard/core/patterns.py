"""Patterns of tensor names, matched once per kind of name.

    *.experts.*.w1.weight                  glob: * is any characters, dots included
    model.layers.{layer}.mlp.{part}.bias   placeholders: digits, one dotted part, {rest*} anything

Ninety thousand names are a few dozen kinds that differ in layer and expert numbers:

    model.layers.17.mlp.experts.203.up_proj.weight
    model.layers.#.mlp.experts.#.up_proj.weight       its template
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from .runtime import cached

_HOLE = re.compile(r"\{([^\W\d]\w*)(\*?)\}")
_WILD = re.compile(rf"\*|{_HOLE.pattern}")
_NUMBER_HOLES = frozenset({"layer", "expert", "index"})
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name

#: The text of each placeholder, by its name.
Holes = Mapping[str, str]
Predicate = Callable[[str], object]


def template(name: str) -> str:
    """Replace the numbers of ``name`` by ``#``; ``w1`` is a word, not a number.

    >>> template("layers.3.feed_forward.w1.weight")
    'layers.#.feed_forward.w1.weight'
    """
    return _NUMBER.sub("#", name)


class Glob:
    """A pattern in which ``*`` matches any characters.

    Matching is linear in the length of the name, which comes from an untrusted file.

    >>> Glob("*.experts.*.weight").matches("layers.0.experts.7.w1.weight")
    True
    """

    __slots__ = ("_parts",)

    def __init__(self, pattern: str) -> None:
        self._parts = pattern.split("*")

    def matches(self, name: str) -> bool:
        """Return whether the pattern matches the whole of ``name``."""
        head, *middle = self._parts
        if not middle:
            return name == head
        tail = middle.pop()
        at, end = len(head), len(name) - len(tail)
        if end < at or not (name.startswith(head) and name.endswith(tail)):
            return False
        for part in middle:  # the leftmost occurrence leaves the most room for the rest
            at = name.find(part, at, end)
            if at < 0:
                return False
            at += len(part)
        return True


def glob(pattern: str) -> Predicate:
    """Return the predicate of a glob."""
    return Glob(pattern).matches


def placeholders(pattern: str) -> Predicate:
    """Return the predicate of a pattern with placeholders."""
    return _compiled(pattern).fullmatch


def match(pattern: str, name: str) -> Holes | None:
    """Return the text of each placeholder of ``pattern`` in ``name``, or None without a match.

    >>> match("h.{layer}.{part}.bias", "h.3.mlp.bias")
    {'layer': '3', 'part': 'mlp'}
    """
    found = _compiled(pattern).fullmatch(name)
    return found.groupdict() if found else None


def fill(pattern: str, found: Holes) -> str:
    """Return ``pattern`` with its placeholders filled in.

    >>> fill("layers_{layer}.{part}", {"layer": "3", "part": "mlp"})
    'layers_3.mlp'
    """
    return _HOLE.sub(lambda hole: found[hole[1]], pattern)


def holes(pattern: str) -> frozenset[str]:
    """Return the names of the placeholders of ``pattern``."""
    return frozenset(hole[1] for hole in _HOLE.finditer(pattern))


def numbered(patterns: Iterable[str], field: str) -> re.Pattern[str] | None:
    """Compile globs for the beginning of a name; the only group that matches is the number.

    >>> numbered(["*layers.{layer}."], "layer").match("model.layers.12.mlp").groups()
    ('12',)
    """
    parts = []
    for pattern in patterns:
        before, after = pattern.split(f"{{{field}}}")
        parts.append(_lazy(before) + r"(\d{1,9})" + _lazy(after))
    return re.compile("|".join(parts)) if parts else None


def _lazy(pattern: str) -> str:
    return ".*?".join(map(re.escape, pattern.split("*")))


class Patterns:
    """An ordered list of patterns; each is compared once with each kind of name.

    Names of one kind differ only in numbers that no pattern contains: ``layers.61.*``
    distinguishes layer 61 from all others, ``layers.{layer}.*`` none. A pattern whose result
    depends on more (a repeated placeholder, digits next to a wildcard) is compared with every
    name.

    Attributes:
        num_compared: how many times a pattern was compared with a name.
    """

    def __init__(
        self, patterns: Iterable[str], compiled: Callable[[str], Predicate] = glob
    ) -> None:
        texts = tuple(patterns)
        self._numbers = frozenset(n for p in texts for n in _NUMBER.findall(p))
        numbered_texts = list(enumerate(texts))
        self._special = [(i, compiled(p)) for i, p in numbered_texts if _is_special(p)]
        self._plain = [(i, compiled(p)) for i, p in numbered_texts if not _is_special(p)]
        self._known: dict[str, int | None] = {}
        self.num_compared = 0

    def find(self, name: str, kind: str = "") -> int | None:
        """Return the index of the first pattern that matches ``name``.

        ``kind`` is ``template(name)``, if the caller has it.

        >>> Patterns(["h.1.{x}", "h.{layer}.{x}"], placeholders).find("h.0.w")
        1
        """
        if self._numbers:
            kind = _NUMBER.sub(self._kept, name)
        elif not kind:
            kind = template(name)
        if kind not in self._known:
            self._known[kind] = self._first(self._plain, name)
        plain = self._known[kind]
        if not self._special:
            return plain
        special = self._first(self._special, name)
        return min((i for i in (plain, special) if i is not None), default=None)

    def _kept(self, number: re.Match[str]) -> str:
        return number[0] if number[0] in self._numbers else "#"

    def _first(self, patterns: Iterable[tuple[int, Predicate]], name: str) -> int | None:
        for i, matches in patterns:
            self.num_compared += 1
            if matches(name):
                return i
        return None


def _is_special(pattern: str) -> bool:
    """Return whether ``pattern`` may match one of two names of a kind and not the other."""
    names = [hole[1] for hole in _HOLE.finditer(pattern)]
    parts = _WILD.sub("\0", pattern).split(".")
    return len(set(names)) < len(names) or any(
        "\0" in part and any(map(str.isdigit, part)) for part in parts
    )


@cached(4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts, at, seen = [], 0, set[str]()
    for hole in _HOLE.finditer(pattern):
        parts.append(re.escape(pattern[at : hole.start()]))
        name = hole[1]
        if name in seen:
            parts.append(f"(?P={name})")
        else:
            kind = ".*" if hole[2] else r"\d+" if name in _NUMBER_HOLES else "[^./]+"
            parts.append(f"(?P<{name}>{kind})")
        seen.add(name)
        at = hole.end()
    return re.compile("".join(parts) + re.escape(pattern[at:]))
