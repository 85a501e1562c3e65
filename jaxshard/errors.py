"""Errors, grouped by what the person who meets one would do next.

JaxshardError
├── FormatError     (ValueError)  the file is not what it claims: fetch it again
├── CoverageError   (ValueError)  shards are missing, or overlap and differ: find the right ones
├── LayoutError     (ValueError)  the layout asked for is impossible: ask for another
├── NotFoundError   (KeyError)    no such tensor or checkpoint: check the name
└── StorageError    (OSError)     the disk or network refused: retry, or make room

Each is also a builtin, so that code which knows nothing of jaxshard can catch it.
"""

from __future__ import annotations

from collections.abc import Iterable

#: How to go on with a conversion that was interrupted, and how to have a result replaced.
RESUME = "resume=True (--resume)"
OVERWRITE = "overwrite=True (--overwrite)"
#: What to do when a disk is full or broken; what a conversion finished is kept.
MEND_THE_DISK = f"Make room or mend the disk, then run again; a conversion goes on with {RESUME}."


class JaxshardError(Exception):
    """Base of every error jaxshard raises on purpose."""

    #: What the command line returns to the shell when this error ends it.
    exit_status = 1

    __str__ = Exception.__str__  # KeyError's would wrap the message in quotes


class FormatError(JaxshardError, ValueError):
    """A file is not what it claims to be: fetch it again."""

    exit_status = 3


class CoverageError(JaxshardError, ValueError):
    """A shard is missing, or shards of one tensor overlap and differ."""

    exit_status = 3


class LayoutError(JaxshardError, ValueError):
    """The layout asked for is impossible: ask for another."""

    exit_status = 2


class NotFoundError(JaxshardError, KeyError):
    """No such tensor, file or checkpoint: check the name."""

    exit_status = 2


class StorageError(JaxshardError, OSError):
    """The disk or network refused: retry, or make room."""

    exit_status = 4


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of ``names`` in a sentence, and how many more there are.

    >>> some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    all_names = list(names)
    head = ", ".join(all_names[:limit])
    rest = len(all_names) - limit
    return f"{head} and {rest} more" if rest > 0 else head


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence offering the known name closest to ``name``, or nothing.

    >>> nearest("lm_head.wieght", ["lm_head.weight", "norm.weight"])
    ' Did you mean lm_head.weight?'
    """
    from difflib import get_close_matches  # noqa: PLC0415 - only when something is wrong

    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
