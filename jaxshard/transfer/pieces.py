"""The piecewise plan: which cuts, in which order, so that little is in flight at once.

Between any two sets of devices: cut on the source device, copy device to device,
join on the destination. Cuts and joins are one program each over all their devices, which know
from their number where to cut, so that eight devices cost one compilation and not eight.

    source devices   cut   ┌──┬──┐
                           └──┴──┘
                    copy    ╲  ╲───▶ ▒      no device waits for another
    target devices  join     ──────▶ ░      in waves, so that cuts and arrivals stay bounded

This module decides; `piecewise` does. It touches no array.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import jax

from ..box import Box
from .geometry import Move, Piece, pieces

WHOLE = -1  # in place of a cut: the shard as it is


@dataclass(frozen=True, slots=True)
class Cut:
    """Source devices that cut a box of ``shape`` out of their shards, each from its own start."""

    shape: tuple[int, ...]
    devices: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a piece comes from: a source device (by number), and its cut or `WHOLE`."""

    source: int
    cut: int


@dataclass(frozen=True, slots=True)
class Join:
    """Target devices that put together their shard from pieces of the same shapes.

    Attributes:
        devices: numbers of the target devices.
        segments: per dim, the lengths of the pieces along it; the pieces are their product.
        slots: for every piece of that product in row-major order, its origin for each device.
    """

    devices: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[Origin, ...], ...]


@dataclass(frozen=True, slots=True)
class Wave:
    """Cuts and joins that are in flight together, and their bytes on the fullest device."""

    cuts: tuple[Cut, ...]
    joins: tuple[Join, ...]
    peak_bytes: int


@lru_cache(maxsize=4096)
def waves(move: Move, limit_bytes: int) -> tuple[Wave, ...]:
    """The whole move, in as few waves as keep each within ``limit_bytes`` on every device.

    A wave never has less than one target shard (with its replicas), so a limit below that is
    exceeded: look at ``peak_bytes``.
    """
    by_box: dict[Box, list[int]] = defaultdict(list)
    for ordinal, box in enumerate(move.target_boxes):
        by_box[box].append(ordinal)
    groups = list(by_box.values())
    whole = _wave(move, [t for group in groups for t in group])
    if whole.peak_bytes <= limit_bytes:
        return (whole,)
    done: list[Wave] = []
    open_targets: list[int] = []
    open_wave: Wave | None = None
    for group in groups:
        wider = _wave(move, [*open_targets, *group])
        if open_wave is not None and wider.peak_bytes > limit_bytes:
            done.append(open_wave)
            open_targets, wider = [], _wave(move, group)
        open_targets, open_wave = [*open_targets, *group], wider
    return (*done, open_wave) if open_wave is not None else tuple(done)


def _wave(move: Move, targets: Sequence[int]) -> Wave:
    """One wave that fills the shards of ``targets``."""
    wanted = set(targets)
    chosen = [
        Piece(p.source, kept, p.box)
        for p in pieces(move)
        if (kept := tuple(t for t in p.targets if t in wanted))
    ]
    cuts, origins = _cuts(move, chosen)
    arrivals: dict[int, list[tuple[Box, Origin]]] = defaultdict(list)
    for piece, origin in zip(chosen, origins, strict=True):
        for target in piece.targets:
            arrivals[target].append((piece.box, origin))
    return Wave(cuts, _joins(arrivals), _peak(move, cuts, chosen))


def _cuts(move: Move, chosen: Sequence[Piece]) -> tuple[tuple[Cut, ...], list[Origin]]:
    """The cuts that yield the chosen pieces; pieces of one shape share a cut across devices."""
    starts: list[dict[int, tuple[int, ...]]] = []  # per cut, by source device
    shapes: list[tuple[int, ...]] = []
    of_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    origins = []
    for piece in chosen:
        held = move.source_boxes[piece.source]
        if piece.box == held:
            origins.append(Origin(piece.source, WHOLE))
            continue
        shape = piece.box.shape
        cut = next((c for c in of_shape[shape] if piece.source not in starts[c]), len(shapes))
        if cut == len(shapes):
            of_shape[shape].append(cut)
            shapes.append(shape)
            starts.append({})
        starts[cut][piece.source] = piece.box.within(held).start
        origins.append(Origin(piece.source, cut))
    cuts = (
        Cut(shape, tuple(sorted(by_device)), tuple(by_device[d] for d in sorted(by_device)))
        for shape, by_device in zip(shapes, starts, strict=True)
    )
    return tuple(cuts), origins


def _joins(arrivals: dict[int, list[tuple[Box, Origin]]]) -> tuple[Join, ...]:
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
    for target, received in sorted(arrivals.items()):
        received.sort(key=lambda item: item[0].start)
        alike[_segments([box for box, _ in received])].append(target)
    return tuple(
        Join(
            tuple(targets),
            segments,
            tuple(
                tuple(arrivals[t][slot][1] for t in targets)
                for slot in range(prod(map(len, segments)))
            ),
        )
        for segments, targets in alike.items()
    )


def _segments(boxes: Sequence[Box]) -> tuple[tuple[int, ...], ...]:
    """The lengths along each dim of boxes that tile a box as a grid, as shards always do."""
    spans = [sorted({(b.start[d], b.stop[d]) for b in boxes}) for d in range(len(boxes[0].start))]
    assert prod(map(len, spans)) == len(boxes), "shards of one array form a grid"
    return tuple(tuple(stop - start for start, stop in spans_d) for spans_d in spans)


def positions(segments: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    """Where each piece of the grid begins, in row-major order.

    >>> positions(((2, 1), (4,)))
    [(0, 0), (2, 0)]
    """
    starts = [[sum(lengths[:k]) for k in range(len(lengths))] for lengths in segments]
    return list(product(*starts))


def _peak(move: Move, cuts: Sequence[Cut], chosen: Sequence[Piece]) -> int:
    """Bytes of cuts and arrivals on the fullest device.

    A piece that arrives as a whole target shard is not an intermediate: it is the result.
    """
    held: dict[jax.Device, int] = defaultdict(int)
    for cut in cuts:
        for source in cut.devices:
            held[move.source_devices[source]] += prod(cut.shape)
    for piece in chosen:
        for target in piece.targets:
            device = move.target_devices[target]
            is_result = piece.box == move.target_boxes[target]
            if device != move.source_devices[piece.source] and not is_result:
                held[device] += piece.box.size
    return max(held.values(), default=0) * move.dtype.itemsize
