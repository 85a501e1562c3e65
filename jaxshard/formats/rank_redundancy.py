"""Rank redundancy: which of the ranks that hold the same shard keeps it, as MindSpore decides.

    held alike by ranks (0, 2) and (1, 3)     adam_m.w1    adam_m.w2    w1      w2
    kept by                                   0, 1         2, 3         0, 1    2, 3

Names that are held alike take turns in the order of the alphabet. MindSpore's loader does
not look which file has what: it works this out again from its network, and asks that rank.
So the turns are those of *all* names of the strategy, also of states that no file has.
"""

from __future__ import annotations

from ..layout import Layout, Placement, Spec
from ..strategy import Axes

Holders = tuple[tuple[int, ...], ...]


def keepers(layout: Layout) -> dict[tuple[str, int], int]:
    """For each name and first rank of a placement, the index of the keeper among the holders.

    >>> rows = Placement((("dp", 2), ("mp", 2)), (("mp",),))
    >>> keepers(Layout(4, {"w2": (rows,), "w1": (rows,)}))
    {('w1', 0): 0, ('w2', 0): 1}
    """
    alike: dict[Holders, int] = {}
    groups: dict[tuple[Axes, Spec], tuple[int, int]] = {}  # which of alike, and how many replicas
    turns: dict[tuple[int, int], int] = {}
    found: dict[tuple[str, int], int] = {}
    for name in sorted(layout.placements):
        for placed in layout.placements[name]:
            cut = placed.axes, placed.spec
            if cut not in groups:  # seldom: the holders may be thousands
                holders = _holders(placed)
                groups[cut] = alike.setdefault(holders, len(alike)), len(holders[0])
            group, replicas = groups[cut]
            turn = turns.get((placed.first_rank, group), 0)
            turns[placed.first_rank, group] = turn + 1
            found[name, placed.first_rank] = turn % replicas
    return found


def _holders(placement: Placement) -> Holders:
    """For each shard the ranks that hold it, counted from the first of the placement."""
    shape = tuple(placement.ways(dim) for dim in range(len(placement.spec)))
    return tuple(shard.holders for shard in placement.shards(shape))
