"""Barriers with time-outs, which pass results and errors between processes.

They go over JAX's own coordinator, the small server in process 0 that
``jax.distributed.initialize`` starts, and never over device collectives: those have no
time-out, and a process that died would leave the others waiting in them.

    process 0   ── write ──┤ arrived, well ├── all are well: go on
    process 1   ── write ──┤ arrived, disk full ├── everybody raises, when all have come
    process 2   ── killed                       ── everybody raises, when the time is over

Meetings are numbered by what they are for, so everybody must come to the same ones: whatever
can fail is done *inside* a meeting, where its failure is heard, and never before one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from ..errors import JaxshardError, StorageError, format_list

#: Processes may be apart by as much as their disks are. It is longer than JAX's own heartbeat
#: (100 s unless ``jax.distributed.initialize`` is told otherwise): of a process that died, JAX
#: ends the others first. With a shorter time-out they raise instead.
DEFAULT_TIMEOUT_S = 600.0
_SHOWN = 5  # errors of other processes in one message
_KEPT = 64  # answers that stay for whoever is behind; no process is as many meetings behind


class Coordinator(Protocol):
    """What is used of JAX's client of its coordinator."""

    def wait_at_barrier(
        self, name: str, timeout_ms: int, process_ids: Sequence[int] | None = None
    ) -> None: ...

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...

    def key_value_delete(self, key: str) -> None: ...


@dataclass
class Meeting:
    """What this process says to all at the end of a meeting, and then what each said."""

    says: str = ""
    heard: list[str] = field(default_factory=list)


class Processes:
    """The processes of this job. Everybody must come to the same meetings in the same order.

    Attributes:
        index: the number of this process in its job.
        count: how many there are.
        members: their numbers.
        timeout_s: how long they wait for each other.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        coordinator: Coordinator | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        about: str = "",
        group: str = "jaxshard",
        members: tuple[int, ...] | None = None,
    ) -> None:
        self.index, self.count, self.timeout_s = index, count, timeout_s
        self.members = tuple(range(count)) if members is None else members
        self._named = None if members is None else members  # the coordinator counts all others
        self._coordinator, self._about, self._group = coordinator, about, group

    @property
    def are_several(self) -> bool:
        """Whether there are others to meet."""
        return self._coordinator is not None

    def about(self, subject: str) -> Processes:
        """The same processes, whose errors name ``subject``; it may be called otherwise in each."""
        return Processes(
            self.index,
            self.count,
            self._coordinator,
            self.timeout_s,
            f"{subject}: ",
            self._group,
            self._named,
        )

    def of(self, members: Collection[int]) -> Processes:
        """Those of them that are ``members``, at meetings to which no other comes.

        This process alone where it is not one of them, or the only one.
        """
        chosen = tuple(sorted(members))
        if chosen == self.members:
            return self
        if self.index not in chosen or len(chosen) == 1:
            return Processes(self.index, timeout_s=self.timeout_s)
        digest = hashlib.sha256(repr(chosen).encode()).hexdigest()[:16]
        group = f"{self._group}/of {digest}"
        how = self.timeout_s, self._about, group, chosen
        return Processes(self.index, len(chosen), self._coordinator, *how)

    def apart(self, group: str) -> Processes:
        """The same processes at meetings of their own, which may go on beside others."""
        return Processes(
            self.index,
            self.count,
            self._coordinator,
            self.timeout_s,
            self._about,
            f"{self._group}/{group}",
            self._named,
        )

    def meet(self, what: str, error: BaseException | None = None) -> None:
        """Wait until all processes are here; ``error`` is why this one cannot go on.

        Raises:
            StorageError: another process failed, or did not come in time.
        """
        self._meet(what, "", error)

    def hear(self, what: str, text: str = "") -> list[str]:
        """What each process says, in the order of ``members``; all must say something.

        Raises:
            StorageError: another process failed, or did not come in time.
        """
        return self._meet(what, text, None)

    def _meet(self, what: str, text: str, error: BaseException | None) -> list[str]:
        if self._coordinator is None:
            return [text]
        place = self._next_place(what)
        why = None if error is None else f"{type(error).__name__}: {error}"
        try:
            self._coordinator.key_value_set(f"{place}/{self.index}", json.dumps([text, why]))
            timeout_ms = round(self.timeout_s * 1000)
            if self._named is None:
                self._coordinator.wait_at_barrier(place, timeout_ms)
            else:
                self._coordinator.wait_at_barrier(place, timeout_ms, self._named)
            found = self._statuses(place)
        except Exception as refused:
            if error is None:  # else the caller's own error says more
                raise self._absent(what, place, refused) from refused
            return []
        failed = {i: why for i, (_, why) in found.items() if why is not None}
        if self.index == self.members[0] and (before := _earlier(place, 1)):
            self._coordinator.key_value_delete(before)
        if failed and error is None:
            said = [f"process {i}: {why}" for i, why in sorted(failed.items())]
            more = f", and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
            raise StorageError(
                f"{self._about}{what}: {len(failed)} of {self.count} processes failed: "
                f"{', '.join(said[:_SHOWN])}{more}"  # whole sentences, with their remedies
            )
        return [said for _, (said, _) in sorted(found.items())]

    @contextmanager
    def together(self, what: str) -> Iterator[Meeting]:
        """All processes do what is inside, and go on when all have done it.

        Raises:
            StorageError: another process failed, or did not come in time.
        """
        meeting = Meeting()
        try:
            yield meeting
        except BaseException as error:
            self.meet(what, error)
            raise
        meeting.heard = self.hear(what, meeting.says)

    def agree(self, what: str, make: Callable[[], str]) -> str:
        """What ``make`` gives in process 0, where alone it is called; known to all.

        Raises:
            StorageError: process 0 failed, or did not say it in time.
        """
        if self._coordinator is None:
            return make()
        place = self._next_place(what)
        if self.index == self.members[0]:
            if before := _earlier(place, _KEPT):
                self._coordinator.key_value_delete(before)
            return self._say(place, make)
        try:
            said = self._coordinator.blocking_key_value_get(place, round(self.timeout_s * 1000))
        except Exception as refused:
            raise StorageError(
                f"{self._about}{what}: process {self.members[0]} said nothing within "
                f"{self.timeout_s:g} s. It ended, or does something else."
            ) from refused
        text, error = json.loads(said)
        if error is not None:
            raise StorageError(f"{self._about}{what}: process {self.members[0]} failed: {error}")
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

    def _statuses(self, place: str) -> dict[int, tuple[str, str | None]]:
        """What each process said that came, and why it failed if it did."""
        assert self._coordinator is not None
        found = self._coordinator.key_value_dir_get(place)
        return {int(key.rsplit("/", 1)[1]): tuple(json.loads(value)) for key, value in found}

    def _next_place(self, what: str) -> str:
        """A name nobody has met at; all processes count alike, for they come to the same meetings.

        Counted in one process at a time: what runs in a thread beside others meets ``apart``.
        """
        purpose = f"{self._group}/{what}"
        number = _MET[purpose] = _MET.get(purpose, -1) + 1
        return f"{purpose}/{number}"

    def _absent(self, what: str, place: str, refused: Exception) -> StorageError:
        try:
            statuses = self._statuses(place)
        except Exception:
            return StorageError(
                f"{self._about}{what}: process 0, which the others meet at, does not answer "
                f"({str(refused).splitlines()[0]}). Start the job again."
            )
        failed = sorted((i, why) for i, (_, why) in statuses.items() if why is not None)
        missing = sorted(set(self.members) - set(statuses))
        return StorageError(
            f"{self._about}{what}: {len(missing)} of {self.count} processes did not come within "
            f"{self.timeout_s:g} s: {format_list(map(str, missing), 8)}."
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
    if client is None:
        raise JaxshardError(
            f"there are {count} processes of JAX and no coordinator over which they could meet. "
            "Call jax.distributed.initialize() first."
        )
    return Processes(jax.process_index(), count, cast(Coordinator, client), timeout_s)


_MET: dict[str, int] = {}  # how often, for each purpose


def _earlier(place: str, meetings: int) -> str | None:
    """The place so many meetings of the same purpose ago, where nobody looks any more."""
    purpose, number = place.rsplit("/", 1)
    return f"{purpose}/{int(number) - meetings}" if int(number) >= meetings else None
