"""Bounded decoders of TOML, YAML and JSON: any text ends in a value or in one of our errors.

The libraries' own parsers raise any Python exception (RecursionError, ValueError of a
date), need quadratic time for some texts, and let a few lines of YAML stand for millions
of values. Python's JSON parser also accepts repeated keys, UTF-16 and NaN. This module opens no
file and does not depend on the meaning of the values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from math import isinf
from typing import Any, Final, NoReturn

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


# --- JSON

FETCH = "Fetch the file again."

# A header of a few megabytes parses into a few hundred at worst. Larger text that is denser
# than any list of tensors is refused before the parser multiplies its size.
_DENSE_BYTES = 4 << 20

# An escape that JSON can spell and UTF-8 cannot, unless its other half follows.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _RefusedError(ValueError):
    """Raised inside the parser's hooks, which do not have the subject of the message."""


def parse_object(
    raw: bytes, subject: str, *, num_texts: Callable[[dict[str, Any]], int] | None = None
) -> dict[str, Any]:
    """Parse a JSON object strictly, from an untrusted file.

    Args:
        raw: the text.
        subject: the start of error messages.
        num_texts: counts the keys and strings of an object of the expected form, which the
            caller validates afterwards. If ``raw`` has that many, no key is repeated, and
            the slow check of each object is skipped.

    Raises:
        FormatError: the text is not a JSON object, repeats a key, or is nested too deep.

    >>> parse_object(b' {"a": [1]} ', "index.json")
    {'a': [1]}
    """
    _refuse_dense(raw, subject)
    try:
        value = _counted(raw, num_texts) if num_texts else None
        if value is None:
            value = json.loads(
                raw.decode("utf-8"),
                object_pairs_hook=_unique,
                parse_constant=_no_constant,
                parse_float=_finite,
            )
        if _SURROGATE.search(raw):
            json.dumps(
                value, ensure_ascii=False
            ).encode()  # surrogate pairs are single characters by now
    except UnicodeEncodeError:
        raise FormatError(f"{subject}: a text is not Unicode (lone surrogate). {FETCH}") from None
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{subject} is not UTF-8 text (byte {error.start} of {len(raw)}). {FETCH}"
        ) from None
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{subject} is not JSON ({error.msg} at character {error.pos} of {len(raw)} bytes). "
            + FETCH
        ) from None
    except RecursionError:
        raise FormatError(f"{subject}: JSON is nested too deep. {FETCH}") from None
    except ValueError as error:  # _RefusedError, or an integer of thousands of digits
        why = error if isinstance(error, _RefusedError) else "a number has too many digits"
        raise FormatError(f"{subject}: {why}. {FETCH}") from None
    if not isinstance(value, dict):
        raise FormatError(
            f"{subject} is a JSON {type(value).__name__} (expected an object). {FETCH}"
        )
    return value


def _counted(raw: bytes, num_texts: Callable[[dict[str, Any]], int]) -> dict[str, Any] | None:
    """Return the object if its number of strings proves that no key is repeated, else None.

    The parser drops repeated keys, so the object then has fewer strings than ``raw``.
    """
    if b"\\" in raw:
        return None  # an escaped quote does not start a string
    value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    if isinstance(value, dict) and 2 * num_texts(value) == raw.count(b'"'):
        return value
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"duplicate key {quote_name(key)} in one object")
            seen.add(key)
    return found


def _no_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    """Return the number; refuse ``1e999``, which Python reads as infinity."""
    value = float(digits)
    if isinf(value):
        raise _RefusedError(f"{quote_name(digits)} exceeds a 64-bit float")
    return value


def _refuse_dense(raw: bytes, subject: str) -> None:
    """Raise FormatError for large text that is denser than any list of tensors.

    The shortest entry, ``"a":{"dtype":"U8","shape":[],"data_offsets":[0,0]},``, is 51 bytes
    with 3 brackets, 4 colons and 10 quotes. ``[[],[],[],…`` costs 27 times its bytes.
    """
    if len(raw) <= _DENSE_BYTES:
        return
    for marks, fewest_bytes in ((b"{[", 10), (b":", 10), (b'"', 4)):
        count = sum(raw.count(bytes((mark,))) for mark in marks)
        if count * fewest_bytes > len(raw):
            raise FormatError(
                f"{subject} has {count} {marks.decode()} in {len(raw)} bytes, denser than any "
                f"list of tensors. {FETCH}"
            )


def as_object(value: object, subject: str) -> dict[str, Any]:
    """Return a JSON object, or raise FormatError."""
    if not isinstance(value, dict):
        refuse(subject, value, "an object")
    return value


def as_list(value: object, subject: str, max_items: int | None = None) -> list[Any]:
    """Return a JSON list of at most ``max_items``, or raise FormatError."""
    if not isinstance(value, list) or (max_items is not None and len(value) > max_items):
        refuse(subject, value, "a list" if max_items is None else f"a list of at most {max_items}")
    return value


def as_int(value: object, subject: str, low: int, high: int) -> int:
    """Return a JSON integer from ``low`` to ``high``, or raise FormatError.

    >>> as_int(3, "index.json: version", 1, 4)
    3
    """
    if type(value) is not int or not low <= value <= high:  # isinstance would accept a bool
        refuse(subject, value, f"an integer from {low} to {high}")
    return value


def as_ints(
    value: object, subject: str, low: int, high: int, max_items: int | None = None
) -> tuple[int, ...]:
    """Return a JSON list of integers from ``low`` to ``high``, or raise FormatError."""
    items = as_list(value, subject, max_items)
    for item in items:
        if type(item) is not int or not low <= item <= high:
            refuse(subject, value, f"integers from {low} to {high}")
    return tuple(items)


def refuse(subject: str, value: object, expected: str) -> NoReturn:
    """Raise FormatError: ``subject`` has ``value`` instead of ``expected``."""
    raise FormatError(f"{subject} is {quote_name(repr(value))} (expected {expected}). {FETCH}")
