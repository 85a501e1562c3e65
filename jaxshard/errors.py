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
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

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


def size_text(num_bytes: float) -> str:
    """Return a number of bytes in decimal units, with three digits.

    >>> size_text(1_705_119_744), size_text(12)
    ('1.71 GB', '12 B')
    """
    if num_bytes < 1000:
        return f"{int(num_bytes)} B"
    exponent = min(len(str(int(num_bytes))) - 1, 17) // 3
    return f"{num_bytes / 1000**exponent:.3g} {'KMGTP'[exponent - 1]}B"


def html_table(title: str, header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Return a table for notebooks, with all text escaped.

    >>> html_table("<b>", ["a"], [[1]])
    '<table><caption>&lt;b&gt;</caption><tr><th>a</th></tr><tr><td>1</td></tr></table>'
    """
    from html import escape  # noqa: PLC0415 - for notebooks only

    def line(cells: Iterable[object], tag: str) -> str:
        found = (f"<{tag}>{escape(quote_name(str(cell)))}</{tag}>" for cell in cells)
        return f"<tr>{''.join(found)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    caption = escape(quote_name(title))
    return f"<table><caption>{caption}</caption>{line(header, 'th')}{body}</table>"


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


# --- All problems of a request, reported as one error before any I/O

_MAX_HINTS = 3  # a search for similar names takes long among 100,000
_MAX_MISFITS = 20


@dataclass
class Problems:
    """Mismatches between a source and a target.

    Attributes:
        source: what the source is called in the report.
        missing: names of the target that the source lacks.
        unexpected: tensors of the source that the target lacks.
        misfits: tensors whose shape, dtype or sharding differs, each with its numbers.
    """

    source: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def check(
        self,
        tensors: Collection[str],
        names: Iterable[str],
        *,
        if_missing: str = "",
        if_unexpected: str = "",
    ) -> None:
        """Raise one error if there are problems.

        Args:
            tensors: names of the source.
            names: names of the target.
            if_missing: the remedy for missing names.
            if_unexpected: the remedy for unexpected tensors.

        Raises:
            NotFoundError: names are missing on either side.
            LayoutError: only shapes, dtypes or shardings differ.

        >>> Problems("src/", misfits=["w: shape (2,), expected (3,)"]).check([], [])
        Traceback (most recent call last):
        jaxshard.errors.LayoutError: 1 tensors do not fit the target:
          w: shape (2,), expected (3,)
        """
        report = []
        if self.missing:
            report.append(
                f"{len(self.missing)} names of the target are not among the {len(tensors)} "
                f"tensors of {self.source}: {format_list(self.missing)}."
                f"{_hints(self.missing, tensors)} {if_missing}"
            )
        if self.unexpected:
            report.append(
                f"{len(self.unexpected)} tensors of {self.source} are not in the target: "
                f"{format_list(self.unexpected)}.{_hints(self.unexpected, names)} {if_unexpected}"
            )
        if self.misfits:
            more = len(self.misfits) - _MAX_MISFITS
            listed = [*self.misfits[:_MAX_MISFITS], *([f"and {more} more"] if more > 0 else ())]
            report.append(
                "\n  ".join((f"{len(self.misfits)} tensors do not fit the target:", *listed))
            )
        if report:
            kind = NotFoundError if self.missing or self.unexpected else LayoutError
            raise kind("\n".join(report))


def _hints(names: list[str], known: Iterable[str]) -> str:
    listed = list(known)
    found = ((name, did_you_mean(name, listed)) for name in names[:_MAX_HINTS])
    return "".join(f" For {name}:{hint}" for name, hint in found if hint)
