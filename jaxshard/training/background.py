"""Background task: one at a time, its failure raised by the next call.

What fails is raised by the next call of whoever asked for it, with its cause.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ..errors import JaxshardError, StorageError

_log = logging.getLogger("jaxshard.training")


class Background:
    """At most one thread, that does what it was given last."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: tuple[str, BaseException] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether the thread is still at it."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, what: str, work: Callable[[], None]) -> None:
        """Wait for what went before, and then do ``work`` in a thread.

        Raises:
            JaxshardError: what went before had failed; ``work`` is not begun.
        """
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failure = (what, error)
                # said at once as well: the next call may never come
                _log.error("%s failed in the background: %s", what, error)

        # not a daemon: a program that ends has its last save finished first
        self._thread = threading.Thread(target=run, name=f"jaxshard {what}")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is going on.

        Raises:
            JaxshardError: it had failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what failed since last asked; waits for nothing.

        Raises:
            JaxshardError: it had failed.
        """
        if self._failure is None or self.is_busy:
            return
        (what, error), self._failure = self._failure, None
        kind = type(error) if isinstance(error, JaxshardError) else StorageError
        raise kind(f"{what} failed in the background: {error}") from error
