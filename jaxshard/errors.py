"""Errors, grouped by the next action of the user.

JaxshardError
├── FormatError     (ValueError)  a file is invalid: fetch it again
├── CoverageError   (ValueError)  shards are missing, or overlap and differ: find the right ones
├── LayoutError     (ValueError)  the requested layout is impossible: request another
├── NotFoundError   (KeyError)    no such tensor or checkpoint: check the name
└── StorageError    (OSError)     the disk or network failed: retry, or free space

Each is also a builtin exception, so that code without jaxshard imports can catch it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: The options that continue an interrupted conversion, and that replace a result.
RESUME = "resume=True (--resume)"
OVERWRITE = "overwrite=True (--overwrite)"
#: Remedy for a full or broken disk; a conversion keeps its finished files.
MEND_THE_DISK = f"Make room or mend the disk, then run again; a conversion goes on with {RESUME}."


class JaxshardError(Exception):
    """Base class of all errors that jaxshard raises deliberately."""

    #: Exit status of the command line on this error.
    exit_status = 1

    def __str__(self) -> str:
        """The message, safe to print: names in it may come from an untrusted file."""
        return printable(Exception.__str__(self))  # KeyError's would wrap it in quotes


class FormatError(JaxshardError, ValueError):
    """A file is invalid: fetch it again."""

    exit_status = 3


class CoverageError(JaxshardError, ValueError):
    """A shard is missing, or shards of one tensor overlap and differ."""

    exit_status = 3


class LayoutError(JaxshardError, ValueError):
    """The requested layout is impossible: request another."""

    exit_status = 2


class NotFoundError(JaxshardError, KeyError):
    """No such tensor, file or checkpoint: check the name."""

    exit_status = 2


class StorageError(JaxshardError, OSError):
    """The disk or network failed: retry, or free space."""

    exit_status = 4


# Longer words and lines are shortened: a path fits, a hostile name does not.
_MAX_WORD = 300
_MAX_LINE = 4000
_MAX_NAME = 200
_LONG_WORD = re.compile(rf"\S{{{_MAX_WORD + 1},}}")


def printable(text: str) -> str:
    r"""Return ``text`` without control or bidirectional characters, its words and lines bounded.

    All output to a terminal or a log passes through it. Newlines stay.

    >>> print(printable("w" + chr(27) + "[31m" + chr(0x202E)))
    w\x1b[31m\u202e
    """
    return "\n".join(map(_printable_line, text.split("\n")))


def _printable_line(line: str) -> str:
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(line) <= _MAX_WORD:
        return line
    line = _LONG_WORD.sub(lambda found: _shortened(found[0], _MAX_WORD), line)
    return _shortened(line, _MAX_LINE)


def quote_name(text: str) -> str:
    r"""Return a name from an untrusted file on one line of bounded length.

    >>> print(quote_name("wte.weight"), quote_name("a" + chr(10)))
    wte.weight 'a\n'
    """
    safe = text if text.isprintable() and text else ascii(text)
    return _shortened(safe, _MAX_NAME)


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[-most // 4 :]} ({len(text)} characters)"


def format_list(names: Iterable[str], limit: int = 5) -> str:
    """Return the first ``limit`` of ``names`` for a sentence, and the number of the rest.

    >>> format_list(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    all_names = list(names)
    head = ", ".join(map(_inline, all_names[:limit]))
    rest = len(all_names) - limit
    return f"{head} and {rest} more" if rest > 0 else head


def _inline(name: str) -> str:
    """Return ``name`` as part of a sentence; phrases and empty strings are valid too."""
    return quote_name(name) if name else name


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests the closest of ``known``, or an empty string.

    >>> did_you_mean("lm_head.wieght", ["lm_head.weight", "norm.weight"])
    ' Did you mean lm_head.weight?'
    """
    from difflib import get_close_matches  # noqa: PLC0415 - only in error messages

    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {quote_name(close[0])}?" if close else ""
