"""Barriers: where the processes of a job meet, or learn in time that somebody does not come.

They go over JAX's own coordinator, the small server in process 0 that
``jax.distributed.initialize`` starts, and never over device collectives: those have no
time-out, and a process that died would leave the others waiting in them.

    process 0   ── write ──┤ arrived, well ├── all are well: go on
    process 1   ── write ──┤ arrived, disk full ├── everybody raises, at once
    process 2   ── killed                       ── everybody raises, when the time is over
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, cast

from ..errors import JaxshardError, StorageError, some

DEFAULT_TIMEOUT_S = 600.0


class Coordinator(Protocol):
    """What is used of JAX's client of its coordinator."""

    def wait_at_barrier(self, name: str, timeout_ms: int) -> None: ...

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...

    def key_value_delete(self, key: str) -> None: ...


class Processes:
    """The processes of this job. Everybody must come to the same meetings in the same order.

    Attributes:
        index: the number of this process.
        count: how many there are.
        timeout_s: how long they wait for each other.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        coordinator: Coordinator | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        about: str = "",
    ) -> None:
        self.index, self.count, self.timeout_s = index, count, timeout_s
        self._coordinator, self._about = coordinator, about

    def about(self, subject: str) -> Processes:
        """The same processes, whose errors name ``subject``; it may be called otherwise in each."""
        return Processes(self.index, self.count, self._coordinator, self.timeout_s, f"{subject}: ")

    def meet(self, what: str, error: BaseException | None = None) -> None:
        """Wait until all processes are here; ``error`` is why this one cannot go on.

        Raises:
            StorageError: another process failed, or did not come in time.
        """
        if self._coordinator is None:
            return
        place = _next_place(what)
        said = None if error is None else f"{type(error).__name__}: {error}"
        try:
            self._coordinator.key_value_set(f"{place}/{self.index}", json.dumps(said))
            self._coordinator.wait_at_barrier(place, round(self.timeout_s * 1000))
        except Exception as refused:
            if error is None:  # else the caller's own error says more
                raise self._absent(what, place, refused) from refused
            return
        failed = {i: why for i, why in self._statuses(place).items() if why is not None}
        if self.index == 0 and (before := _before(place)):
            self._coordinator.key_value_delete(before)
        if failed and error is None:
            raise StorageError(
                f"{self._about}{what}: {len(failed)} of {self.count} processes failed: "
                f"{some(f'process {i}: {why}' for i, why in sorted(failed.items()))}"
            )

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """All processes do what is inside, and go on when all have done it.

        Raises:
            StorageError: another process failed, or did not come in time.
        """
        try:
            yield
        except BaseException as error:
            self.meet(what, error)
            raise
        self.meet(what)

    def agree(self, what: str, make: Callable[[], str]) -> str:
        """What ``make`` gives in process 0, where alone it is called; known to all.

        Raises:
            StorageError: process 0 failed, or did not say it in time.
        """
        if self._coordinator is None:
            return make()
        place = _next_place(what)
        if self.index == 0:
            return self._say(place, make)
        try:
            said = self._coordinator.blocking_key_value_get(place, round(self.timeout_s * 1000))
        except Exception as refused:
            raise StorageError(
                f"{self._about}{what}: process 0 said nothing within {self.timeout_s:g} s. It "
                "ended, or does something else."
            ) from refused
        text, error = json.loads(said)
        if error is not None:
            raise StorageError(f"{self._about}{what}: process 0 failed: {error}")
        return str(text)

    def _say(self, place: str, make: Callable[[], str]) -> str:
        assert self._coordinator is not None
        try:
            text = make()
        except BaseException as error:
            said = json.dumps([None, f"{type(error).__name__}: {error}"])
            with suppress(Exception):  # the caller's own error says more
                self._coordinator.key_value_set(place, said)
            raise
        self._coordinator.key_value_set(place, json.dumps([text, None]))
        return text

    def _statuses(self, place: str) -> dict[int, str | None]:
        assert self._coordinator is not None
        found = self._coordinator.key_value_dir_get(place)
        return {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in found}

    def _absent(self, what: str, place: str, refused: Exception) -> StorageError:
        try:
            statuses = self._statuses(place)
        except Exception:
            return StorageError(
                f"{self._about}{what}: process 0, which the others meet at, does not answer "
                f"({str(refused).splitlines()[0]}). Start the job again."
            )
        failed = sorted((i, why) for i, why in statuses.items() if why is not None)
        missing = sorted(set(range(self.count)) - set(statuses))
        return StorageError(
            f"{self._about}{what}: {len(missing)} of {self.count} processes did not come within "
            f"{self.timeout_s:g} s: {some(map(str, missing), 8)}."
            + "".join(f" Process {i} failed: {why}." for i, why in failed[:3])
            + " They ended, or need longer; what was being made is not visible, and what was there "
            "before still is."
        )


def processes_of_jax(timeout_s: float = DEFAULT_TIMEOUT_S) -> Processes:
    """The processes of JAX's distributed runtime; one alone where that was not started.

    Raises:
        JaxshardError: this JAX does not give access to its coordinator.
    """
    import jax  # noqa: PLC0415 - whoever has processes of JAX has imported it

    count = jax.process_count()
    if count == 1:
        return Processes()
    try:
        from jax._src import distributed  # noqa: PLC0415 - there is no public way to it

        client: Any = distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise JaxshardError(
            f"jax {jax.__version__} has moved its coordinator client, over which {count} processes "
            "meet. Use a version of jax that jaxshard is tested with."
        ) from error
    return Processes(jax.process_index(), count, cast(Coordinator, client), timeout_s)


_MET: dict[str, int] = {}  # how often, for each purpose


def _next_place(what: str) -> str:
    """A name nobody has met at; all processes count alike, for they come to the same meetings."""
    number = _MET[what] = _MET.get(what, -1) + 1
    return f"jaxshard/{what}/{number}"


def _before(place: str) -> str | None:
    """The last place of the same purpose: nobody looks there any more."""
    what, number = place.rsplit("/", 1)
    return f"{what}/{int(number) - 1}" if number != "0" else None
