"""Processes of a job: barriers with time-outs that pass results and errors, and shares of work.

They use JAX's own coordinator, the small server in process 0 that ``jax.distributed.initialize``
starts, and never device collectives: those have no time-out, so a dead process would block the
others in them.

    process 0   ── write ──┤ arrived, succeeded ├── all succeeded: continue
    process 1   ── write ──┤ arrived, disk full ├── every process raises when all have arrived
    process 2   ── killed                       ── every process raises after the time-out

Barriers are numbered by purpose, so every process must reach the same ones. Code that can fail
runs *inside* a barrier, which passes its error on, and never before one.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol, TypeVar, cast

from ..core.layout import Placement, shard_dim_over_replicas
from ..errors import JaxshardError, LayoutError, StorageError, format_list
from ..planning.outputs import Entry, Outputs

#: Processes may differ by as much as their disks do. It is longer than JAX's own heartbeat (100 s
#: unless ``jax.distributed.initialize`` sets it): if a process dies, JAX ends the others first.
#: With a shorter time-out they raise instead.
DEFAULT_TIMEOUT_S = 600.0
_SHOWN = 5  # errors of other processes in one message
_KEPT = 64  # broadcasts kept for slow processes; none is as many barriers behind


class Coordinator(Protocol):
    """The methods used of JAX's coordinator client."""

    def wait_at_barrier(
        self, name: str, timeout_ms: int, process_ids: Sequence[int] | None = None
    ) -> None: ...

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...

    def key_value_delete(self, key: str) -> None: ...


@dataclass
class BarrierData:
    """The text that this process sends at a barrier, and those received from all."""

    sent: str = ""
    received: list[str] = field(default_factory=list)


class Processes:
    """The processes of this job, which must reach the same barriers in the same order.

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
        """Return the subgroup ``members``, with its own barriers.

        If this process is not a member, or the only one, that is this process alone.
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
        """Return the same processes with separate barriers, for use in another thread."""
        return Processes(
            self.index,
            self.count,
            self._coordinator,
            self.timeout_s,
            self._about,
            f"{self._group}/{group}",
            self._named,
        )

    def barrier(self, what: str, error: BaseException | None = None) -> None:
        """Wait until all processes arrive; ``error`` is the failure of this one, if any.

        Raises:
            StorageError: another process failed, or did not arrive in time.
        """
        self._meet(what, "", error)

    def all_gather(self, what: str, text: str = "") -> list[str]:
        """Return the ``text`` of each process, in the order of ``members``.

        Raises:
            StorageError: another process failed, or did not arrive in time.
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
            if error is None:  # otherwise the caller's own error is more precise
                raise self._absent(what, place, refused) from refused
            return []
        failed = {i: why for i, (_, why) in found.items() if why is not None}
        if self.index == self.members[0] and (before := _earlier(place, 1)):
            self._coordinator.key_value_delete(before)
        if failed and error is None:
            errors = [f"process {i}: {why}" for i, why in sorted(failed.items())]
            more = f", and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
            raise StorageError(
                f"{self._about}{what}: {len(failed)} of {self.count} processes failed: "
                f"{', '.join(errors[:_SHOWN])}{more}"  # whole sentences, with their remedies
            )
        return [sent for _, (sent, _) in sorted(found.items())]

    @contextmanager
    def together(self, what: str) -> Iterator[BarrierData]:
        """Run the block in all processes, and wait until all have completed it.

        Raises:
            StorageError: another process failed, or did not arrive in time.
        """
        meeting = BarrierData()
        try:
            yield meeting
        except BaseException as error:
            self.barrier(what, error)
            raise
        meeting.received = self.all_gather(what, meeting.sent)

    def broadcast(self, what: str, make: Callable[[], str]) -> str:
        """Return the result of ``make`` in process 0, which alone calls it.

        Raises:
            StorageError: process 0 failed, or sent nothing in time.
        """
        if self._coordinator is None:
            return make()
        place = self._next_place(what)
        if self.index == self.members[0]:
            if before := _earlier(place, _KEPT):
                self._coordinator.key_value_delete(before)
            return self._send(place, make)
        try:
            answer = self._coordinator.blocking_key_value_get(place, round(self.timeout_s * 1000))
        except Exception as refused:
            raise StorageError(
                f"{self._about}{what}: process {self.members[0]} sent nothing within "
                f"{self.timeout_s:g} s. It has ended, or is busy with something else."
            ) from refused
        text, error = json.loads(answer)
        if error is not None:
            raise StorageError(f"{self._about}{what}: process {self.members[0]} failed: {error}")
        return str(text)

    def _send(self, place: str, make: Callable[[], str]) -> str:
        assert self._coordinator is not None
        try:
            text = make()
        except BaseException as error:
            failure = json.dumps([None, f"{type(error).__name__}: {error}"])
            with suppress(Exception):  # the caller's own error is more precise
                self._coordinator.key_value_set(place, failure)
            raise
        self._coordinator.key_value_set(place, json.dumps([text, None]))
        return text

    def _statuses(self, place: str) -> dict[int, tuple[str, str | None]]:
        """Return the text and the error, if any, of each process that arrived."""
        assert self._coordinator is not None
        found = self._coordinator.key_value_dir_get(place)
        return {int(key.rsplit("/", 1)[1]): tuple(json.loads(value)) for key, value in found}

    def _next_place(self, what: str) -> str:
        """Return the name of the next barrier; all processes count alike.

        Not thread-safe: code in another thread uses ``apart``.
        """
        purpose = f"{self._group}/{what}"
        number = _MET[purpose] = _MET.get(purpose, -1) + 1
        return f"{purpose}/{number}"

    def _absent(self, what: str, place: str, refused: Exception) -> StorageError:
        try:
            statuses = self._statuses(place)
        except Exception:
            return StorageError(
                f"{self._about}{what}: process 0, which runs the coordinator, does not answer "
                f"({str(refused).splitlines()[0]}). Start the job again."
            )
        failed = sorted((i, why) for i, (_, why) in statuses.items() if why is not None)
        missing = sorted(set(self.members) - set(statuses))
        return StorageError(
            f"{self._about}{what}: {len(missing)} of {self.count} processes did not arrive within "
            f"{self.timeout_s:g} s: {format_list(map(str, missing), 8)}."
            + "".join(f" Process {i} failed: {why}." for i, why in failed[:3])
            + " They have ended, or need longer. The result was not published; an earlier one is "
            "unchanged."
        )


def processes_of_jax(timeout_s: float = DEFAULT_TIMEOUT_S) -> Processes:
    """Return the processes of JAX's distributed runtime; one alone if it was not started.

    Raises:
        JaxshardError: this JAX does not give access to its coordinator.
    """
    import jax  # noqa: PLC0415 - already imported if there are several processes

    count = jax.process_count()
    if count == 1:
        return Processes()
    try:
        from jax._src import distributed  # noqa: PLC0415 - there is no public API

        client: Any = distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise JaxshardError(
            f"jax {jax.__version__} has moved its coordinator client, which {count} processes "
            "need. Use a version of jax that jaxshard is tested with."
        ) from error
    if client is None:
        raise JaxshardError(
            f"JAX has {count} processes and no coordinator. "
            "Call jax.distributed.initialize() first."
        )
    return Processes(jax.process_index(), count, cast(Coordinator, client), timeout_s)


_MET: dict[str, int] = {}  # number of barriers of each purpose


def _earlier(place: str, meetings: int) -> str | None:
    """Return the key of the barrier of the same purpose so many barriers ago, if any."""
    purpose, number = place.rsplit("/", 1)
    return f"{purpose}/{int(number) - meetings}" if int(number) >= meetings else None


# --- Partition of output files and shards over processes, balanced by bytes

_Place = tuple[int, tuple[int, ...], int]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Part:
    """One of ``count`` processes that together make one result: number ``index``.

    Raises:
        LayoutError: ``index`` is not below ``count``.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise LayoutError(
                f"process {self.index} of {self.count}: processes are numbered from 0 to "
                f"{self.count - 1}. Check process_index= (--process-index) and process_count= "
                "(--process-count)."
            )

    def __str__(self) -> str:
        return f"part {self.index} of {self.count}"


def split_outputs(outputs: Outputs, ranks: Iterable[int], count: int) -> tuple[frozenset[int], ...]:
    """For each of ``count`` processes, which of ``ranks`` it writes: about equally many bytes.

    Where there are fewer ranks than processes, some have nothing to write.
    """
    entries = _widest(outputs)
    ordered = sorted(ranks, key=lambda rank: _place(rank, entries))
    sizes = outputs.rank_bytes()
    cuts = cut_evenly([sizes[rank] for rank in ordered], count)
    found: list[set[int]] = [set() for _ in range(count)]
    for rank, process in zip(ordered, cuts, strict=True):
        found[process].add(rank)
    return tuple(map(frozenset, found))


def cut_evenly(sizes: Sequence[int], count: int) -> list[int]:
    """Return the process of each item: adjacent items together, by the middle of their bytes.

    >>> cut_evenly([4, 4, 4, 4], 2), cut_evenly([1, 1, 6], 2), cut_evenly([0, 0], 2)
    ([0, 0, 1, 1], [0, 0, 1], [0, 1])
    """
    total = sum(sizes)
    if not total:
        return [i * count // len(sizes) for i in range(len(sizes))]
    found, before = [], 0
    for size in sizes:
        found.append(min(count - 1, (2 * before + size) * count // (2 * total)))
        before += size
    return found


def assign(weights: Mapping[_T, int], holders: Mapping[_T, Sequence[int]]) -> dict[_T, int]:
    """Return one of its holders for each item, so that their loads are about equal.

    The heaviest item is assigned first, always to the holder with the least load.

    >>> assign({"a": 4, "b": 3, "c": 1}, {"a": [0, 1], "b": [0, 1], "c": [0, 1]})
    {'a': 0, 'b': 1, 'c': 1}
    """
    loads: dict[int, int] = {}
    found = {}
    for item, weight in heapq.nlargest(len(weights), weights.items(), key=lambda i: i[1]):
        process = min(holders[item], key=lambda p: (loads.get(p, 0), p))
        loads[process] = loads.get(process, 0) + weight
        found[item] = process
    return found


def cut_by_replicas(placement: Placement, shape: tuple[int, ...]) -> Placement | None:
    """Return ``placement`` cut further by its replicas, so that no two ranks hold the same.

    None if no dim is divisible. The first dim is preferred, because its parts are contiguous.

    >>> str(cut_by_replicas(Placement((("dp", 2), ("mp", 2)), ((), ("mp",))), (4, 8)))
    '[dp,mp] over dp2 mp2 from rank 0'
    """
    used = {a for axes in placement.spec for a in axes}
    ways = prod(n for a, n in placement.axes if a not in used)
    left = [n // placement.ways(dim) for dim, n in enumerate(shape)]
    for dim in sorted(range(len(shape)), key=lambda dim: (dim != 0, -left[dim])):
        if left[dim] % ways == 0:
            return shard_dim_over_replicas(placement, ways, dim)
    return None


def _widest(outputs: Outputs) -> dict[range, Entry]:
    """Return the largest tensor that is cut over each set of ranks."""
    found: dict[range, Entry] = {}
    for content in outputs.contents:
        for entry in content:
            if any(entry.placement.spec):
                best = found.get(entry.placement.ranks)
                if best is None or entry.tensor.num_bytes > best.tensor.num_bytes:
                    found[entry.placement.ranks] = entry
    return found


def _place(rank: int, entries: Mapping[range, Entry]) -> _Place:
    """Return the sort key of ``rank``, which puts replicas next to each other."""
    known = [entry for ranks, entry in entries.items() if rank in ranks]
    if not known:
        return rank, (), rank
    widest = max(known, key=lambda e: (e.tensor.num_bytes, e.tensor.name))
    placement = widest.placement
    box = placement.boxes(widest.tensor.shape)[rank - placement.first_rank]
    return placement.first_rank, box.start, rank


# --- Process index and count, from JAX or the environment

#: Job starters and their variables: (name, process index, process count).
STARTERS = (
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM", "SLURM_PROCID", "SLURM_NTASKS"),
)


def part_of(
    index: str | int | None, count: str | int | None, environ: Mapping[str, str]
) -> Part | None:
    """Return the part with this index and count; ``"auto"`` takes them from JAX or ``environ``.

    Raises:
        LayoutError: one is given without the other, or is not a number, or auto finds none.

    >>> part_of("auto", "auto", {"SLURM_PROCID": "2", "SLURM_NTASKS": "8"})
    Part(index=2, count=8)
    """
    if index is None and count is None:
        return None
    if index == "auto" or count == "auto":
        found = from_jax() or from_environment(environ)
        index = found.index if index in ("auto", None) else index
        count = found.count if count in ("auto", None) else count
    if index is None or count is None:
        given, missing = ("index", "count") if count is None else ("count", "index")
        raise LayoutError(
            f"process_{given}= (--process-{given}) needs process_{missing}= (--process-{missing}). "
            "Pass both, or auto, which reads both from the job."
        )
    return Part(
        _number("process_index= (--process-index)", index),
        _number("process_count= (--process-count)", count),
    )


def from_jax() -> Part | None:
    """Return the part of this process in a ``jax.distributed`` job; None outside of one.

    JAX is not imported: a program that has not imported it has not initialized it.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return None
    return Part(jax.process_index(), jax.process_count())


def from_environment(environ: Mapping[str, str]) -> Part:
    """Return the part of this process by the variables of a job starter.

    ``mpirun`` inside a SLURM job sets both kinds of variables; its own count.

    Raises:
        LayoutError: no known variables are set, or they are not numbers.
    """
    for _, index, count in STARTERS:
        if index in environ and count in environ:
            return Part(_number(index, environ[index]), _number(count, environ[count]))
    known = "; ".join(f"{who}: {index}, {count}" for who, index, count in STARTERS)
    raise LayoutError(
        f"auto: no job starter has set its variables ({known}), and jax.distributed is not "
        "initialized here. Start with srun or mpirun, or give numbers."
    )


def _number(name: str, text: str | int) -> int:
    try:
        return int(text)
    except ValueError:
        raise LayoutError(f"{name}: {text!r} is not a number.") from None
