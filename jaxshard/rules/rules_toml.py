"""User rules as TOML.

    name = "my model"

    [specs]                                  # the first pattern that matches a name decides
    "*.q_proj.weight" = "mp,-"               # per dim: axes joined by +, outer to inner; - is whole
    "lm_head.weight" = "-,-"

    [stages]
    layers = "model.layers.{layer}."         # names that begin so go where their layer goes
    first = ["model.embed_tokens.*"]
    last = ["model.norm.*", "lm_head.*"]
    layers_per_stage = [7, 9]

    [experts]
    names = "*.experts.{expert}."

Text in, rules out: this module opens no file.
"""

from __future__ import annotations

import re
from typing import Any

from ..core.decoders import parse_toml
from ..errors import LayoutError, did_you_mean
from .table import Rules, parse_spec

_TABLES = {
    "specs": None,
    "stages": ("layers", "first", "last", "layers_per_stage", "embedding", "head"),
    "experts": ("names",),
}


def read_rules(text: str, where: str = "rules") -> Rules:
    r"""The rules written in ``text``; ``where`` (a path) leads the messages.

    Raises:
        LayoutError: the text is no TOML, or says something that is no rule; with the line.

    >>> read_rules('[specs]\n"*.weight" = "mp,-"').specs
    (('*.weight', 'mp,-'),)
    """
    data = parse_toml(text, where, "Patterns and specs stand in quotes.")
    reader = _Reader(text, where)
    reader.check_keys("", data, ("name", *_TABLES))
    tables = {table: reader.table(data, table) for table in _TABLES}
    for table, keys in _TABLES.items():
        if keys:
            reader.check_keys(table, tables[table], keys)
    stages = tables["stages"]
    return Rules(
        name=reader.string("name", data.get("name", where)),
        specs=tuple(reader.spec(p, s) for p, s in tables["specs"].items()),
        layers=reader.numbered("layers", stages.get("layers", []), "layer"),
        first=reader.strings("first", stages.get("first", [])),
        last=reader.strings("last", stages.get("last", [])),
        layers_per_stage=reader.counts("layers_per_stage", stages.get("layers_per_stage")),
        experts=reader.numbered("names", tables["experts"].get("names", []), "expert"),
        embedding=reader.strings("embedding", stages.get("embedding", [])),
        head=reader.strings("head", stages.get("head", [])),
        written=tuple(tables["specs"]),
    )


class _Reader:
    """Checks one value after another and knows on which line a key stands."""

    def __init__(self, text: str, where: str) -> None:
        self._lines, self._where = text.splitlines(), where

    def at(self, key: str) -> str:
        quoted = re.compile(rf"""^\s*\[?\s*["']?{re.escape(key)}["']?\s*[\]=.]""")
        for number, line in enumerate(self._lines, start=1):
            if quoted.match(line):
                return f"{self._where}, line {number}"
        return self._where

    def check_keys(self, table: str, data: dict[str, Any], known: tuple[str, ...]) -> None:
        for key in data:
            if key not in known:
                inside = f"[{table}]" if table else "rules"
                hint = did_you_mean(key, known) or f" There are: {', '.join(known)}."
                if not table:
                    hint += ' A rule goes under [specs]: "PATTERN" = "mp,-".'
                raise LayoutError(f"{self.at(key)}: {inside} have no {key!r}.{hint}")

    def table(self, data: dict[str, Any], name: str) -> dict[str, Any]:
        value = data.get(name, {})
        if not isinstance(value, dict):
            raise LayoutError(
                f"{self.at(name)}: {name} is a table; write [{name}] on its own line."
            )
        return value

    def string(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            raise LayoutError(f"{self.at(key)}: {key} = {value!r}; write a text in quotes.")
        return value

    def strings(self, key: str, value: object) -> tuple[str, ...]:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise LayoutError(
                f'{self.at(key)}: {key} = {value!r}; write a pattern, or a list: ["model.norm.*"].'
            )
        return tuple(values)

    def numbered(self, key: str, value: object, field: str) -> tuple[str, ...]:
        patterns = self.strings(key, value)
        for pattern in patterns:
            if pattern.count(f"{{{field}}}") != 1:
                raise LayoutError(
                    f'{self.at(key)}: {key} = "{pattern}" does not say where the number is. '
                    f'Write {{{field}}} once in its place: "model.{field}s.{{{field}}}.".'
                )
        return patterns

    def counts(self, key: str, value: object) -> tuple[int, ...] | None:
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
        ):
            raise LayoutError(
                f"{self.at(key)}: {key} = {value!r}; write how many layers each stage has: [7, 9]."
            )
        return tuple(value)

    def spec(self, pattern: str, text: object) -> tuple[str, str]:
        if isinstance(text, dict):
            raise LayoutError(
                f"{self.at(pattern)}: {pattern} is read as a table; put the pattern in quotes: "
                f'"{pattern}.…" = "mp,-".'
            )
        spec = self.string(pattern, text)
        parse_spec(spec, f'{self.at(pattern)}: "{pattern}"')
        return pattern, spec
