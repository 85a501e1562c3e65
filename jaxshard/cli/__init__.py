"""The command line: parses arguments, runs one command, returns its exit status.

Answers go to standard output, progress and errors to standard error. Exit status:
0 done · 2 the request · 3 the checkpoint · 4 the disk · 1 a bug, with its traceback.
Only the parser is imported before a command is known, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ..errors import JaxshardError, StorageError
from .output import write_error, write_json
from .parsing import parser

_COLLECT_AFTER = 200_000  # objects more; Python's own is 700


def program() -> int:
    """``main``, as a process of its own; the exit status.

    A plan is many small objects that live until the end, and none of them in a cycle: looking
    through them again and again for cycles, and once more at the end, would be a tenth of the
    time that a command takes for anything but data.
    """
    gc.set_threshold(_COLLECT_AFTER)
    status = main()
    gc.freeze()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    arguments = parser().parse_args(argv)
    if getattr(arguments, "command", None) is None:
        parser().print_help()
        return 2
    try:
        # NumPy and all, only once a command is known
        run = getattr(import_module(f".{arguments.module}", __package__), arguments.command)
        status = int(run(arguments))
        sys.stdout.flush()  # here, and not when Python ends, a reader that has gone is no error
        return status
    except JaxshardError as error:
        return _fail(error, arguments)
    except KeyboardInterrupt:
        write_error("jaxshard: interrupted. Finished files are kept for --resume.")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone
        return 0
    except OSError as error:  # none is foreseen here, but it is the machine's refusal and no bug
        where = f"{error.filename}: " if error.filename else ""
        return _fail(StorageError(f"{where}{error.strerror or error}."), arguments)


def _fail(error: JaxshardError, arguments: argparse.Namespace) -> int:
    text = " ".join(str(error).split())
    if getattr(arguments, "json", False):
        write_json({"error": type(error).__name__, "message": text}, indent=None)
    write_error(f"jaxshard: {type(error).__name__}: {text}")
    return error.exit_status
