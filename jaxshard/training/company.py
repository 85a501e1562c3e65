"""Company: the processes of a job that keep one run together, each with a manager of its own."""

from __future__ import annotations

from itertools import count

import jax

from ..multiprocess.barriers import Processes, processes_of_jax

_NUMBERS = count()


class Company:
    """The processes whose managers are one; found when they are first needed.

    All make their managers in the same order. So each manager's meetings are apart from those of
    another, and from those of ``save`` and ``load``: one may save in the background meanwhile.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._number = timeout_s, next(_NUMBERS)
        self._found: Processes | None = None

    @property
    def processes(self) -> Processes:
        """All of them; no device is woken where JAX was not told that there are several."""
        if self._found is None:
            alone = not jax.distributed.is_initialized()
            found = Processes() if alone else processes_of_jax(self._timeout_s)
            self._found = found.apart(f"manager {self._number}")
        return self._found

    def of_process_0(self, choice: bool) -> bool:
        """What process 0 chose, whatever this one would have."""
        return bool(self.processes.agree("choosing", lambda: "yes" if choice else ""))
