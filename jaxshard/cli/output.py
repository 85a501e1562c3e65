"""Writing to the terminal: the only place of the command line that prints.

Names, paths and notes may come from an untrusted file; they are escaped here.
"""

from __future__ import annotations

import json
import sys

from ..errors import printable


def write(text: str) -> None:
    """Print ``text`` to standard output."""
    print(printable(text))


def write_error(text: str) -> None:
    """Print ``text`` to standard error."""
    print(printable(text), file=sys.stderr)


def write_json(data: object, indent: int | None = 1) -> None:
    """Print ``data`` as JSON, in ASCII: escapes are JSON's own, and nothing is shortened."""
    print(json.dumps(data, indent=indent))
