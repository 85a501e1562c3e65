"""Bounded decoders of TOML and YAML: any text ends in a value or in one of our errors.

The libraries' own parsers raise whatever Python raises (RecursionError, ValueError of a
date), need quadratic time for some texts, and let a few lines of YAML stand for millions
of values. JSON has a decoder of its own kind in ``formats/strict_json``. This module
opens no file and does not know what the values mean.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Final

from ..errors import FormatError, JaxshardError, LayoutError, quote_name

MAX_TOML_BYTES: Final = 16 << 20
MAX_YAML_BYTES: Final = 256 << 10  # PyYAML reads about 100 KB a second; a job's file has 10 KB

_MAX_DEPTH = 64
_MAX_NODES = 100_000  # values in a YAML text, each alias counted as all that it stands for
_MAX_BITS = 64
_MAX_DIGITS = 100  # PyYAML's sexagesimal numbers cost the square of their length

# tomllib needs time with the square of the parts of one dotted key. A part is bare or quoted.
_LONG_KEY = re.compile(
    rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{_MAX_DEPTH}}}"""
)


def parse_toml(text: str, where: str, remedy: str = "Check the file.") -> dict[str, Any]:
    """Return the values of ``text``, which is TOML; ``where`` leads the message of an error.

    Raises:
        LayoutError: it is not TOML, too large, or nested too deep.

    >>> parse_toml("[specs]", "rules.toml")
    {'specs': {}}
    """
    if len(text) > MAX_TOML_BYTES:
        raise LayoutError(
            f"{where}: {len(text)} characters (expected at most {MAX_TOML_BYTES}). {remedy}"
        )
    import tomllib  # noqa: PLC0415 - most commands read no TOML

    if _LONG_KEY.search(text):
        raise LayoutError(f"{where}: a key with more than {_MAX_DEPTH} parts. {remedy}")
    try:
        values = tomllib.loads(text)
        _refuse_large_numbers(values)
    except RecursionError:
        raise LayoutError(f"{where}: not TOML: values are nested too deep. {remedy}") from None
    except ValueError as error:  # TOMLDecodeError, or a date or number that Python refuses
        raise LayoutError(f"{where}: not TOML: {quote_name(_one_line(error))}. {remedy}") from None
    return values


def _refuse_large_numbers(value: object) -> None:
    """Refuse integers that TOML does not have: Python raises when it prints the largest."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _refuse_large_numbers(inner)
    elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError(f"an integer of {value.bit_length()} bits (expected at most {_MAX_BITS})")


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of ``text``, which is YAML; ``where`` leads the message of an error.

    Raises:
        ImportError: PyYAML is not installed.
        FormatError: it is not YAML, too large, nested too deep, or has unbounded aliases.
    """
    import yaml  # noqa: PLC0415 - only MindFormers' configurations need it

    if len(text) > MAX_YAML_BYTES:
        raise FormatError(
            f"{where}: {len(text)} characters (expected at most {MAX_YAML_BYTES} in a "
            "configuration). Check the path."
        )
    try:
        return yaml.load(text, Loader=_yaml_loader())
    except JaxshardError as error:
        raise FormatError(f"{where}: {error} Check the file.") from None
    except Exception as error:  # YAMLError, and what Python raises of dates, numbers and keys
        raise FormatError(
            f"{where}: not YAML: {quote_name(_one_line(error))}. Check the file."
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@cache
def _yaml_loader() -> Any:
    """Return PyYAML's safe loader with bounds on depth, aliases and digits."""
    import yaml  # noqa: PLC0415

    class BoundedLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
        """Counts nodes, an alias as all that it stands for."""

        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self._depth = self._num_nodes = 0
            self._sizes: dict[int, int] = {}  # of a composed node, by its id

        def compose_node(self, parent: Any, index: Any) -> Any:
            before = self._num_nodes
            is_alias = self.check_event(yaml.AliasEvent)
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                raise FormatError(f"more than {_MAX_DEPTH} levels.")
            node = super().compose_node(parent, index)
            self._depth -= 1
            if is_alias:
                if id(node) not in self._sizes:
                    raise FormatError("an alias stands for a value that contains it.")
                self._num_nodes += self._sizes[id(node)]
            else:
                self._num_nodes += 1
                self._sizes[id(node)] = self._num_nodes - before
            if self._num_nodes > _MAX_NODES:
                raise FormatError(f"more than {_MAX_NODES} values, those of aliases counted.")
            return node

        def construct_scalar(self, node: Any) -> Any:
            value = super().construct_scalar(node)
            is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
            if is_number and len(value) > _MAX_DIGITS:
                raise FormatError(f"a number of {len(value)} characters.")
            return value

    return BoundedLoader
