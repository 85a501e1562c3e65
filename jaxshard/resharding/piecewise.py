"""The piecewise route: slice shards, copy the pieces device to device, assemble them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..core.box import Box
from ..core.runtime import cached
from .compiled import Executable, compile_program
from .geometry import (
    ShardingChange,
    Transfer,
    as_bits,
    data_of,
    from_bits,
    from_shards,
    is_carried,
    transfers,
)

WHOLE = -1  # instead of a cut: the whole shard


@dataclass(frozen=True, slots=True)
class Cut:
    """Slice of ``shape`` out of the shards of source devices, each at its own start."""

    shape: tuple[int, ...]
    devices: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class PieceSource:
    """Source of a piece: a source device (by number), and its cut or `WHOLE`."""

    source: int
    cut: int


@dataclass(frozen=True, slots=True)
class Join:
    """Target devices that assemble their shards from pieces of the same shapes.

    Attributes:
        devices: numbers of the target devices.
        segments: per dim, the lengths of the pieces along it; the pieces are their product.
        slots: for every piece of that product in row-major order, its source for each device.
    """

    devices: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[PieceSource, ...], ...]


@dataclass(frozen=True, slots=True)
class Wave:
    """Cuts and joins in flight together, and their bytes on the fullest device."""

    cuts: tuple[Cut, ...]
    joins: tuple[Join, ...]
    peak_bytes: int


@cached(4096)
def waves(move: ShardingChange, limit_bytes: int) -> tuple[Wave, ...]:
    """Split the move into waves of at most ``limit_bytes`` on every device.

    A wave has at least one target shard (with its replicas), so it may exceed a small limit: see
    ``peak_bytes``.
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


def _wave(move: ShardingChange, targets: Sequence[int]) -> Wave:
    """Return one wave that fills the shards of ``targets``."""
    wanted = set(targets)
    chosen = [
        Transfer(p.source, kept, p.box)
        for p in transfers(move)
        if (kept := tuple(t for t in p.targets if t in wanted))
    ]
    cuts, origins = _cuts(move, chosen)
    arrivals: dict[int, list[tuple[Box, PieceSource]]] = defaultdict(list)
    for piece, origin in zip(chosen, origins, strict=True):
        for target in piece.targets:
            arrivals[target].append((piece.box, origin))
    return Wave(cuts, _joins(arrivals), _peak(move, cuts, chosen))


def _cuts(
    move: ShardingChange, chosen: Sequence[Transfer]
) -> tuple[tuple[Cut, ...], list[PieceSource]]:
    """Return the cuts of the chosen pieces; pieces of one shape share a cut across devices."""
    starts: list[dict[int, tuple[int, ...]]] = []  # per cut, by source device
    shapes: list[tuple[int, ...]] = []
    of_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    origins = []
    for piece in chosen:
        held = move.source_boxes[piece.source]
        if piece.box == held:
            origins.append(PieceSource(piece.source, WHOLE))
            continue
        shape = piece.box.shape
        cut = next((c for c in of_shape[shape] if piece.source not in starts[c]), len(shapes))
        if cut == len(shapes):
            of_shape[shape].append(cut)
            shapes.append(shape)
            starts.append({})
        starts[cut][piece.source] = piece.box.within(held).start
        origins.append(PieceSource(piece.source, cut))
    cuts = (
        Cut(shape, tuple(sorted(by_device)), tuple(by_device[d] for d in sorted(by_device)))
        for shape, by_device in zip(shapes, starts, strict=True)
    )
    return tuple(cuts), origins


def _joins(arrivals: dict[int, list[tuple[Box, PieceSource]]]) -> tuple[Join, ...]:
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
    """Return the lengths along each dim of boxes that form a grid, as shards always do."""
    spans = [sorted({(b.start[d], b.stop[d]) for b in boxes}) for d in range(len(boxes[0].start))]
    assert prod(map(len, spans)) == len(boxes), "shards of one array form a grid"
    return tuple(tuple(stop - start for start, stop in spans_d) for spans_d in spans)


def positions(segments: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    """Return the start of each piece of the grid, in row-major order.

    >>> positions(((2, 1), (4,)))
    [(0, 0), (2, 0)]
    """
    starts = [[sum(lengths[:k]) for k in range(len(lengths))] for lengths in segments]
    return list(product(*starts))


def _peak(move: ShardingChange, cuts: Sequence[Cut], chosen: Sequence[Transfer]) -> int:
    """Return the bytes of cuts and received pieces on the fullest device.

    A piece that is a whole target shard is a result, not an intermediate.
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


# --- Execution: cut, copy device to device, join

_AXIS = "device"
_Numbers = tuple[int, ...]  # devices, numbered along the source or the target sharding


@dataclass(frozen=True)
class PiecewiseProgram:
    """Compiled cuts and joins of several moves between the same devices."""

    moves: tuple[ShardingChange, ...]
    rounds: tuple[_Round, ...]

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of cuts, received pieces and temporaries on the fullest device."""
        return max((r.peak_bytes for r in self.rounds), default=0)

    @property
    def num_compiled(self) -> int:
        """Number of compiled programs."""
        return sum(len(r.cuts) + len(r.joins) for r in self.rounds)

    def __call__(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Return the arrays at the targets of their moves; they must be at the sources."""
        sources = [data_of(x) for x in arrays]
        shards: list[list[jax.Array | None]] = [[None] * len(m.target_boxes) for m in self.moves]
        for n, part in enumerate(self.rounds):
            part.run(self.moves, sources, shards)
            if n + 1 < len(
                self.rounds
            ):  # free this wave's pieces first, or the bound would not hold
                jax.block_until_ready(shards)
        return [
            jax.make_array_from_single_device_arrays(m.shape, m.target, list(_complete(s)))
            for m, s in zip(self.moves, shards, strict=True)
        ]


@dataclass(frozen=True)
class _Round:
    """One wave of each move: per set of devices, one program that cuts or joins."""

    waves: tuple[Wave | None, ...]
    cuts: dict[_Numbers, Executable]
    joins: dict[_Numbers, Executable]
    peak_bytes: int

    def run(
        self,
        moves: Sequence[ShardingChange],
        sources: Sequence[Sequence[jax.Array]],
        shards: Sequence[list[jax.Array | None]],
    ) -> None:
        """Fill the shards of this wave's targets."""
        made = self._cut(moves, sources)
        waiting: dict[_Numbers, list[tuple[int, list[jax.Array]]]] = defaultdict(list)
        for m, wave in enumerate(self.waves):
            for join in wave.joins if wave else ():
                devices = tuple(moves[m].target_devices[d] for d in join.devices)
                slots = [_send([made[m][o] for o in slot], devices) for slot in join.slots]
                if len(slots) == 1:
                    _place(shards[m], join.devices, slots[0])
                else:
                    waiting[join.devices].append((m, slots))
        for numbers, parts in waiting.items():
            joined = self.joins[numbers].call(*(slots for _, slots in parts))
            for (m, _), array in zip(parts, joined, strict=True):
                _place(shards[m], numbers, array)

    def _cut(
        self, moves: Sequence[ShardingChange], sources: Sequence[Sequence[jax.Array]]
    ) -> list[dict[PieceSource, jax.Array]]:
        """Return the pieces of each move, whole shards included."""
        made = [{PieceSource(n, WHOLE): x for n, x in enumerate(data)} for data in sources]
        for numbers, cut in self.cuts.items():
            parts = _cuts_by(numbers, self.waves)
            stacked = [
                _stack([sources[m][n] for n in numbers], _at(moves[m].source_devices, numbers))
                for m, _ in parts
            ]
            for (m, cuts), outputs in zip(parts, cut.call(*stacked), strict=True):
                for (c, _), array in zip(cuts, outputs, strict=True):
                    for n, piece in zip(numbers, data_of(array), strict=True):
                        made[m][PieceSource(n, c)] = piece
        return made


@cached(4096)
def program(moves: tuple[ShardingChange, ...], limit_bytes: tuple[int, ...]) -> PiecewiseProgram:
    """Compile moves between the same devices, each within its own limit if possible."""
    planned = [waves(m, limit) for m, limit in zip(moves, limit_bytes, strict=True)]
    rounds = []
    for n in range(max(map(len, planned))):
        now = tuple(p[n] if n < len(p) else None for p in planned)
        rounds.append(_round(moves, now))
    return PiecewiseProgram(moves, tuple(rounds))


def _round(moves: tuple[ShardingChange, ...], now: tuple[Wave | None, ...]) -> _Round:
    cutters = dict.fromkeys(c.devices for w in now if w for c in w.cuts)
    cuts = {
        numbers: _compile_cuts(
            _at(moves[0].source_devices, numbers),
            [(moves[m], [c for _, c in cuts]) for m, cuts in _cuts_by(numbers, now)],
        )
        for numbers in cutters
    }
    joining: dict[_Numbers, list[tuple[ShardingChange, Join]]] = defaultdict(list)
    for m, wave in zip(moves, now, strict=True):
        for join in wave.joins if wave else ():
            if len(join.slots) > 1:
                joining[join.devices].append((m, join))
    joins = {
        numbers: _compile_joins(_at(moves[0].target_devices, numbers), parts)
        for numbers, parts in joining.items()
    }
    temporary = [p.temporary_bytes for p in (*cuts.values(), *joins.values())]
    peak = sum(w.peak_bytes for w in now if w)
    return _Round(now, cuts, joins, peak + max(temporary, default=0))


def _cuts_by(
    numbers: _Numbers, now: Sequence[Wave | None]
) -> list[tuple[int, list[tuple[int, Cut]]]]:
    """For each move, its cuts (with their numbers) by exactly these devices, if any."""
    found = [
        (m, [(c, cut) for c, cut in enumerate(wave.cuts) if cut.devices == numbers])
        for m, wave in enumerate(now)
        if wave
    ]
    return [(m, cuts) for m, cuts in found if cuts]


def _compile_cuts(
    devices: Sequence[jax.Device], parts: Sequence[tuple[ShardingChange, Sequence[Cut]]]
) -> Executable:
    mesh = _line(tuple(devices))

    def cut(*shards: jax.Array) -> list[list[jax.Array]]:
        me = jax.lax.axis_index(_AXIS)
        return [
            [from_bits(_slice(as_bits(shard), c, me), m.dtype) for c in cuts]
            for shard, (m, cuts) in zip(shards, parts, strict=True)
        ]

    inputs = [
        jax.ShapeDtypeStruct(_stacked_shape(m.source_boxes[0].shape, mesh), m.dtype)
        for m, _ in parts
    ]
    return _compile(cut, mesh, inputs)


def _slice(shard: jax.Array, cut: Cut, me: jax.Array) -> jax.Array:
    if len(set(cut.starts)) == 1:
        limits = tuple(a + n for a, n in zip(cut.starts[0], cut.shape, strict=True))
        return jax.lax.slice(shard, cut.starts[0], limits)
    start = jnp.asarray(np.array(cut.starts, np.int32))[me]
    return jax.lax.dynamic_slice(shard, list(start), cut.shape)


def _compile_joins(
    devices: Sequence[jax.Device], parts: Sequence[tuple[ShardingChange, Join]]
) -> Executable:
    mesh = _line(tuple(devices))

    def joined(*slots: list[jax.Array]) -> list[jax.Array]:
        return [_assemble(pieces, j, m.dtype) for pieces, (m, j) in zip(slots, parts, strict=True)]

    inputs = [
        [
            jax.ShapeDtypeStruct(_stacked_shape(shape, mesh), m.dtype)
            for shape in product(*j.segments)
        ]
        for m, j in parts
    ]
    return _compile(joined, mesh, inputs)


def _assemble(slots: Sequence[jax.Array], join: Join, dtype: np.dtype[np.generic]) -> jax.Array:
    """Assemble a shard; XLA compiles each of these forms without temporaries."""
    cut_dims = [d for d, lengths in enumerate(join.segments) if len(lengths) > 1]
    if len(cut_dims) == 1:
        return from_bits(jnp.concatenate([as_bits(s) for s in slots], axis=cut_dims[0]), dtype)
    shape = [sum(lengths) for lengths in join.segments]
    starts = positions(join.segments)
    if not is_carried(dtype):
        whole = jnp.zeros(shape, dtype)
        for start, slot in zip(starts, slots, strict=True):
            whole = jax.lax.dynamic_update_slice(whole, slot, start)
        return whole
    # XLA would copy the result of updates as bits; disjoint bits are combined by OR in place
    padded = (_padded(as_bits(s), start, shape) for start, s in zip(starts, slots, strict=True))
    return from_bits(reduce(jnp.bitwise_or, padded), dtype)


def _padded(piece: jax.Array, start: Sequence[int], shape: Sequence[int]) -> jax.Array:
    margins = [(a, n - a - size, 0) for a, n, size in zip(start, shape, piece.shape, strict=True)]
    return jax.lax.pad(piece, jnp.zeros((), piece.dtype), margins)


def _compile(function: Callable[..., Any], mesh: Mesh, inputs: Sequence[Any]) -> Executable:
    spread = PartitionSpec(_AXIS)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=spread,
        out_specs=spread,
        check_vma=False,
    )
    sharding = NamedSharding(mesh, spread)
    return compile_program(mapped, inputs, in_shardings=sharding, out_shardings=sharding)


@cached(1024)
def _line(devices: tuple[jax.Device, ...]) -> Mesh:
    return Mesh(np.array(devices, dtype=object), (_AXIS,), axis_types=(AxisType.Auto,))


def _stacked_shape(shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
    return (mesh.devices.size * shape[0], *shape[1:])


def _stack(shards: Sequence[jax.Array], devices: tuple[jax.Device, ...]) -> jax.Array:
    """Return the shards as one array, split along dim 0 by device, without copies."""
    mesh = _line(devices)
    shape = _stacked_shape(shards[0].shape, mesh)
    sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
    return jax.make_array_from_single_device_arrays(shape, sharding, list(shards))


def _send(pieces: Sequence[jax.Array], devices: tuple[jax.Device, ...]) -> jax.Array:
    """Copy the pieces to their devices, as one array split along dim 0."""
    mesh = _line(devices)
    shape = _stacked_shape(pieces[0].shape, mesh)
    return from_shards(pieces, NamedSharding(mesh, PartitionSpec(_AXIS)), shape)


def _place(shards: list[jax.Array | None], numbers: _Numbers, found: jax.Array) -> None:
    for n, shard in zip(numbers, data_of(found), strict=True):
        shards[n] = shard


def _at(devices: Sequence[jax.Device], numbers: _Numbers) -> tuple[jax.Device, ...]:
    return tuple(devices[n] for n in numbers)


def _complete(shards: Sequence[jax.Array | None]) -> list[jax.Array]:
    assert all(s is not None for s in shards), "every target device has its shard"
    return [s for s in shards if s is not None]
