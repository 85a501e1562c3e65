"""Outputs: which file of a result holds which box of which tensor.

A checkpoint on disk is a layout whose ranks are files: rank folders have one file per
rank, and a Hugging Face folder is a layout of as many ranks as it has shards. Ranks
whose files list the same tensors share one *content*, so thousands of rank files cost
little. This module does not depend on file formats and writes nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..core.catalog import Tensor
from ..core.dtypes import num_bytes
from ..core.layout import Axes, Layout, Placement, Shard, Spec
from ..core.runtime import paused
from ..errors import LayoutError

Keepers = Mapping[tuple[str, int], int]
"""By a tensor's name and the first rank of its placement: an index into ``Shard.holders``."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a rank's file.

    Attributes:
        shape: the shape of the rank's box, derived from the placement.
        num_bytes: its bytes.
    """

    tensor: Tensor
    placement: Placement
    order: int
    shape: tuple[int, ...]  # stored, because thousands of ranks share an entry
    num_bytes: int

    @classmethod
    def of(cls, tensor: Tensor, placement: Placement, order: int) -> Entry:
        """Return the entry of ``tensor`` on the ranks of ``placement``."""
        if not placement.spec:
            return cls(tensor, placement, order, tensor.shape, tensor.num_bytes)
        shape = placement.local_shape(tensor.shape)
        return cls(tensor, placement, order, shape, num_bytes(shape, tensor.dtype))


@dataclass(frozen=True)
class Outputs:
    """The files of a result.

    Attributes:
        paths: each rank's file, relative to the result's root.
        layout: which ranks hold which boxes, replicas included.
        kept: for a tensor stored without redundancy, which of each shard's holders
            stores it; all holders store tensors that are not in it.
        contents: the distinct lists of entries.
        content_of: per rank, its index in ``contents``.
    """

    paths: tuple[str, ...]
    layout: Layout
    kept: Keepers = field(repr=False)
    contents: tuple[tuple[Entry, ...], ...] = field(repr=False)
    content_of: tuple[int, ...] = field(repr=False)

    def holders(self, name: str, placement: Placement, shard: Shard) -> tuple[int, ...]:
        """Return the ranks whose files store ``shard`` of tensor ``name``."""
        keeper = self.kept.get((name, placement.first_rank))
        ranks = shard.holders if keeper is None else (shard.holders[keeper],)
        return tuple(placement.first_rank + r for r in ranks)

    def rank_bytes(self) -> list[int]:
        """Return the tensor bytes of each rank's file."""
        sizes = [sum(e.num_bytes for e in content) for content in self.contents]
        return [sizes[c] for c in self.content_of]


@paused()
def arrange(
    tensors: Sequence[Tensor],
    layout: Layout,
    paths: Sequence[str],
    *,
    remove_redundancy: bool = False,
    keepers: Keepers | None = None,
) -> Outputs:
    """Return the outputs that hold ``tensors`` laid out by ``layout``.

    With ``remove_redundancy``, one of its holders stores each shard: for tensors with the same
    replicas, the one with the fewest bytes so far. If given, ``keepers`` decide instead, and all
    holders store the tensors that are not in it.

    Raises:
        LayoutError: a tensor does not divide, or has no placement.
    """
    if len(paths) != layout.num_ranks:
        raise LayoutError(f"{layout.num_ranks} ranks need as many files, not {len(paths)}.")
    shelves = _Shelves(keepers)
    for order, tensor in enumerate(tensors):
        placements = layout.placements.get(tensor.name, ())
        if not placements:
            raise LayoutError(f"{tensor.name} is placed on no rank of the target.")
        for placement in placements:
            shelves.put(Entry.of(tensor, placement, order), remove_redundancy)
    contents, content_of = shelves.contents(layout.num_ranks)
    return Outputs(tuple(paths), layout, shelves.kept, contents, content_of)


class _Shelves:
    """Entries grouped by the set of ranks that stores them."""

    def __init__(self, keepers: Keepers | None) -> None:
        self.kept: dict[tuple[str, int], int] = {}
        self._keepers = keepers
        self._whole: dict[range, list[Entry]] = {}
        self._groups: dict[tuple[Axes, Spec, int, bool], _Replicas] = {}

    def put(self, entry: Entry, remove_redundancy: bool) -> None:
        placement, shape = entry.placement, entry.tensor.shape
        key = entry.tensor.name, placement.first_rank
        is_named = self._keepers is None or key in self._keepers
        shards = placement.shards(shape) if remove_redundancy and is_named else ()
        if not shards or len(shards[0].holders) == 1:
            self._whole.setdefault(placement.ranks, []).append(entry)
            return
        group = self._group(placement, shards, 0 in shape)
        if self._keepers is None:
            load, keeper = heapq.heappop(group.loads)
            heapq.heappush(group.loads, (load + entry.num_bytes, keeper))
        else:
            keeper = self._keepers[key]
        self.kept[key] = keeper
        group.kept[keeper].append(entry)

    def _group(self, placement: Placement, shards: Sequence[Shard], is_empty: bool) -> _Replicas:
        """Return the replicas that hold ``shards``, one object for all specs with equal holders."""
        key = (placement.axes, placement.spec, placement.first_rank, is_empty)
        group = self._groups.get(key)
        if group is None:  # rare, and slow: there may be thousands of holders
            first, holders = placement.first_rank, tuple(s.holders for s in shards)
            known = self._groups.values()
            like = (g for g in known if (g.first_rank, g.holders) == (first, holders))
            group = self._groups[key] = next(like, None) or _Replicas(first, holders)
        return group

    def contents(self, num_ranks: int) -> tuple[tuple[tuple[Entry, ...], ...], tuple[int, ...]]:
        shelves: list[list[int]] = [[] for _ in range(num_ranks)]
        lists = list(self._whole.values())
        holders: list[Sequence[int]] = list(self._whole)
        for group in {id(g): g for g in self._groups.values()}.values():
            for keeper, entries in enumerate(group.kept):
                lists.append(entries)
                holders.append(group.keepers(keeper))
        for i, ranks in enumerate(holders):
            if lists[i]:
                for rank in ranks:
                    shelves[rank].append(i)
        numbers: dict[tuple[int, ...], int] = {}
        content_of = tuple(numbers.setdefault(tuple(s), len(numbers)) for s in shelves)
        contents = tuple(
            tuple(heapq.merge(*(lists[i] for i in shelf), key=lambda e: e.order))
            for shelf in numbers
        )
        return contents, content_of


class _Replicas:
    """Ranks that are replicas of each other, by shard, and the entries that each stores."""

    def __init__(self, first_rank: int, holders: tuple[tuple[int, ...], ...]) -> None:
        self.first_rank, self.holders = first_rank, holders
        self.loads = [(0, keeper) for keeper in range(len(holders[0]))]
        self.kept: list[list[Entry]] = [[] for _ in self.loads]

    def keepers(self, index: int) -> list[int]:
        """Return the ranks that store a tensor whose keeper is ``index``."""
        return [self.first_rank + ranks[index] for ranks in self.holders]
