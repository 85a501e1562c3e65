"""Coverage: which tensors of a checkpoint are not all there, and whose files would bring the rest.

A rank that is missing takes a shard of every tensor with it. So all of them are told of in
one report, and what to fetch: any one holder of each shard that is nowhere. Headers decide;
no byte is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..box import Box
from ..catalog import Catalog, Tensor
from ..cells import cells
from ..errors import CoverageError, some
from ..layout import Layout

_MOST, _MOST_HOLDERS = 8, 4  # shards told of, and holders of each


def gaps_error(source: Catalog, gaps: Mapping[str, CoverageError]) -> CoverageError:
    """The error for the tensors ``gaps`` of ``source``, each with what it lacks."""
    first, *others = gaps
    text = str(gaps[first])
    if others:
        text += f" {len(others)} more tensors lack some: {some(others, 3)}."
    return CoverageError(f"{text} {remedy(source, gaps)}")


def remedy(source: Catalog, names: Iterable[str] | None = None) -> str:
    """What to fetch so that the tensors ``names`` (all, where none are given) are whole."""
    stored = source
    while stored.origin is not None:  # a mapping's tensors have other names, the same ranks
        stored, names = stored.origin.catalog, None
    if stored.layout is None:
        return "Fetch the missing files."
    lost: dict[tuple[int, ...], None] = {}
    for name in stored.tensors if names is None else names:
        lost |= dict.fromkeys(_lost_shards(stored.tensors[name], stored.layout))
    if not lost:
        return "Fetch the missing files."
    one_of = [" or ".join(_ranks(holders)) for holders in sorted(lost)]
    more = f"; and {len(one_of) - _MOST} more" if len(one_of) > _MOST else ""
    return f"Fetch {'; '.join(one_of[:_MOST])}{more}."


def _lost_shards(tensor: Tensor, layout: Layout) -> list[tuple[int, ...]]:
    """The holders of each shard of ``tensor`` that is in no file, or not all of it."""
    stored = dict.fromkeys(p.box for p in tensor.pieces)
    wanted: dict[Box, list[int]] = {}
    for placement in layout.placements.get(tensor.name, ()):
        for shard in placement.shards(tensor.shape):
            ranks = (placement.first_rank + r for r in shard.holders)
            wanted.setdefault(shard.box, []).extend(ranks)
    return [
        tuple(sorted(ranks))
        for box, ranks in wanted.items()
        if box not in stored and not _is_held(tuple(stored), box)
    ]


def _is_held(stored: tuple[Box, ...], box: Box) -> bool:
    try:
        cells(stored, (box,))
    except CoverageError:
        return False
    return True


def _ranks(holders: tuple[int, ...]) -> list[str]:
    shown = [f"rank_{rank}" for rank in holders[:_MOST_HOLDERS]]
    return shown if len(holders) <= _MOST_HOLDERS else [*shown, "…"]
