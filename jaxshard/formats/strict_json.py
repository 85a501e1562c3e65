"""Strict, bounded JSON decoder for untrusted files.

Headers and indexes are JSON that anybody may have written. Python's parser lets a
repeated key win silently, guesses UTF-16, takes NaN, and grows memory with every
bracket; here each of those is a FormatError. This module does not know what the
objects mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import isinf
from typing import Any, NoReturn

from ..errors import FormatError, quote_name

FETCH = "Fetch the file again."

# A header of a few megabytes parses into a few hundred at worst. Above that, text which
# is denser than any list of tensors is refused before the parser multiplies it.
_DENSE_BYTES = 4 << 20

# An escape that JSON can spell and UTF-8 cannot, unless its other half follows.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _RefusedError(ValueError):
    """Raised inside the parser's hooks, which know no subject."""


def parse_object(
    raw: bytes, subject: str, *, num_texts: Callable[[dict[str, Any]], int] | None = None
) -> dict[str, Any]:
    """The JSON object that ``raw`` holds; ``subject`` begins the message of an error.

    Args:
        raw: the text.
        subject: begins the message of an error.
        num_texts: how many keys and texts an object of the expected form has, which the caller
            goes on to check. Where ``raw`` has as many, none of its keys is repeated, and
            they need not be looked at one by one.

    Raises:
        FormatError: it is no JSON object, repeats a key, or nests too deep.

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
            json.dumps(value, ensure_ascii=False).encode()  # pairs are one character by now
    except UnicodeEncodeError:
        raise FormatError(
            f"{subject} has text that is not Unicode (a lone surrogate). {FETCH}"
        ) from None
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
        raise FormatError(f"{subject} nests its JSON too deep to be read. {FETCH}") from None
    except ValueError as error:  # _RefusedError, or an integer of thousands of digits
        why = error if isinstance(error, _RefusedError) else "a number in it has too many digits"
        raise FormatError(f"{subject} is refused: {why}. {FETCH}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{subject} holds a JSON {type(value).__name__}, not an object. {FETCH}")
    return value


def _counted(raw: bytes, num_texts: Callable[[dict[str, Any]], int]) -> dict[str, Any] | None:
    """The object, if the number of its texts shows that no key is repeated; else None.

    A repeated key leaves fewer in the object than there are in ``raw``.
    """
    if b"\\" in raw:
        return None  # a quote that is escaped begins no text
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
                raise _RefusedError(f"the key {quote_name(key)} stands twice in one object")
            seen.add(key)
    return found


def _no_constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    """Refuse ``1e999``, which Python reads as infinity and writes as no JSON."""
    value = float(digits)
    if isinf(value):
        raise _RefusedError(f"{quote_name(digits)} is larger than any 64-bit float")
    return value


def _refuse_dense(raw: bytes, subject: str) -> None:
    """Refuse large text with more structure than a list of tensors can have.

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
