"""Suppression of Orbax's own log records while jaxshard calls it.

Its threads log what they raise with a traceback each, asyncio logs what no coroutine awaits any
more, and TensorStore's threads report to event loops that are closed by then. Callers see one
error of ours instead. Only what comes from Orbax's own code is left out, of any level, and only
while it works for us: another library that logs to the same loggers is heard.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp

_ORBAX = os.path.dirname(os.path.abspath(ocp.__file__)) + os.sep
_LOGGERS = ("absl", "asyncio")
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")  # how TensorStore's errors begin
_JOIN_S = 10.0
_LATE_S = 0.1  # for what TensorStore's threads have still to report


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Orbax logs and prints meanwhile."""
    threads = set(threading.enumerate())
    _QUIET.begin()
    try:
        yield
    except BaseException as error:
        _settle(threads, error)
        raise
    finally:
        _QUIET.end()


def _settle(before: set[threading.Thread], error: BaseException | None) -> None:
    """Wait for the threads of an operation that failed with ``error``, and drop what they left.

    What they report falls into the operation then.
    """
    for thread in threading.enumerate():
        if thread not in before and type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, _JOIN_S)  # its own raises what the thread did
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):  # they hold the tasks
            with suppress(Exception):  # a coroutine that is cleared may raise once more
                frame.clear()
        error = error.__cause__ or error.__context__
    gc.collect()  # asyncio logs an exception that was not awaited when its task goes
    time.sleep(_LATE_S)


class _Quiet(logging.Filter):
    """The filter of the loggers, and the hook for what threads cannot raise.

    Several threads may be quiet at once: the first installs it, the last removes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock, self._count = threading.Lock(), 0
        self._before: Callable[[Any], Any] = sys.unraisablehook
        self._hook = self._unraisable  # one object: a bound method is a new one each time

    def begin(self) -> None:
        """Install it."""
        with self._lock:
            self._count += 1
            if self._count == 1:
                for name in _LOGGERS:
                    logging.getLogger(name).addFilter(self)
                self._before, sys.unraisablehook = sys.unraisablehook, self._hook

    def end(self) -> None:
        """Remove it, unless another thread is quiet still."""
        with self._lock:
            self._count -= 1
            if self._count == 0:
                for name in _LOGGERS:
                    logging.getLogger(name).removeFilter(self)
                if sys.unraisablehook is self._hook:  # else another hook was put over it
                    sys.unraisablehook = self._before

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged: it is not Orbax's."""
        _, error, trace = record.exc_info or (None, None, None)
        is_orbaxs = record.pathname.startswith(_ORBAX) or _ORBAX in record.getMessage()
        is_tensorstores = record.name == "asyncio" and bool(_STATUS.match(str(error)))
        return not (is_orbaxs or is_tensorstores or _is_in(trace))

    def _unraisable(self, args: Any) -> None:
        is_late = isinstance(args.exc_value, RuntimeError) and "loop is closed" in str(
            args.exc_value
        )
        if not is_late:
            self._before(args)


def _is_in(trace: TracebackType | None) -> bool:
    """Whether an exception passed through Orbax."""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(_ORBAX):
            return True
        trace = trace.tb_next
    return False


_QUIET = _Quiet()
