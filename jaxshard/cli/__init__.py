"""The command line: entry points, and output to the terminal.

Results are written to standard output, progress and errors to standard error. Exit status:
0 success · 2 invalid request · 3 invalid checkpoint · 4 storage error · 1 a bug (traceback).
Only the parser is imported before the command is known, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ..errors import JaxshardError, StorageError, printable
from .parsing import parser

_PAGER = "less -FRX"  # quits if one screen suffices, and leaves the text there
_COLLECT_AFTER = 200_000  # allocations between collections; Python's default is 700


def program() -> int:
    """Run ``main`` as the process's only work; return the exit status.

    A plan is many small objects that live until the end and form no cycles. Scanning them for
    cycles repeatedly, and once more at exit, would cost a tenth of a command's time outside I/O.
    """
    gc.set_threshold(_COLLECT_AFTER)
    status = main()
    gc.freeze()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = parser().parse_args(argv)
    if getattr(arguments, "command", None) is None:
        parser().print_help()
        return 2
    try:
        # imports NumPy, so only after the command is known
        run = getattr(import_module(f".{arguments.module}", __package__), arguments.command)
        if getattr(arguments, "models", None):
            import_module(".commands", __package__).register_files(arguments.models)
        status = int(run(arguments))
        sys.stdout.flush()  # before exit, where a closed pipe would be a traceback
        return status
    except JaxshardError as error:
        return _fail(error, arguments)
    except KeyboardInterrupt:
        write_error("jaxshard: interrupted. Finished files are kept for --resume.")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader closed the pipe
        return 0
    except OSError as error:  # unforeseen, but an error of the system and not a bug
        where = f"{error.filename}: " if error.filename else ""
        return _fail(StorageError(f"{where}{error.strerror or error}."), arguments)


def _fail(error: JaxshardError, arguments: argparse.Namespace) -> int:
    text = " ".join(str(error).split())
    if getattr(arguments, "json", False):
        write_json({"error": type(error).__name__, "message": text}, indent=None)
    write_error(f"jaxshard: {type(error).__name__}: {text}")
    return error.exit_status


def write(text: str) -> None:
    """Print ``text`` to standard output; names and notes from untrusted files are escaped."""
    print(printable(text))


def write_paged(text: str) -> None:
    """Print ``text``, through the pager if it is longer than the terminal."""
    text = printable(text)
    if not sys.stdout.isatty() or _fits(text) or not _page(text):
        print(text)


def _fits(text: str) -> bool:
    import shutil  # noqa: PLC0415 - for terminals only

    return text.count("\n") + 1 < shutil.get_terminal_size().lines  # a line for the prompt


def _page(text: str) -> bool:
    """Show ``text`` with ``$PAGER``; return False if it cannot be started."""
    import shlex  # noqa: PLC0415 - a hundredth of a second, for terminals only
    import subprocess  # noqa: PLC0415

    sys.stdout.flush()
    try:
        command = shlex.split(os.environ.get("PAGER", _PAGER))
        pager = subprocess.Popen(command, stdin=subprocess.PIPE)
    except (OSError, ValueError, IndexError):  # not found, an open quote, or empty
        return False
    with pager:
        try:
            pager.communicate(f"{text}\n".encode(errors="replace"))
        except KeyboardInterrupt:  # the key belongs to the pager, which has not ended
            pager.wait()
    return True


def write_error(text: str) -> None:
    """Print ``text`` to standard error, escaped."""
    print(printable(text), file=sys.stderr)


def write_json(data: object, indent: int | None = 1) -> None:
    """Print ``data`` as JSON in ASCII, so that nothing needs further escapes."""
    print(json.dumps(data, indent=indent))
