"""Partition of output files and shards over processes, balanced by bytes.

Ranks that hold the same boxes are replicas and go to one process, so that it reads
those boxes once for all of them; then the ranks are cut where the bytes are.

    dp2mp2   rank 0 1 2 3                     process 0   ranks 0 and 2: the upper rows
             rows ▀ ▄ ▀ ▄                     process 1   ranks 1 and 3: the lower rows

Everybody computes the same split from the same plan; nothing is sent. Pure.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from ..core.layout import Placement, shard_dim_over_replicas
from ..errors import LayoutError
from ..planning.outputs import Entry, Outputs

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
