"""Random models in random layouts, and NumPy's opinion of which bytes lie where.

Tensors are arrays of *units*, the fewest elements that fill whole bytes, so that every
dtype is one of plain bytes and NumPy's own slicing says what a shard must hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import lcm, prod
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from jaxshard.core.box import Box
from jaxshard.core.catalog import Catalog, File, StoredShard, Tensor
from jaxshard.core.dtypes import BY_NAME, DType, in_units, num_bytes
from jaxshard.core.layout import Layout, Placement


@dataclass(frozen=True)
class Model:
    """A few tensors, and several layouts that each of them divides in."""

    tensors: tuple[Tensor, ...]
    layouts: tuple[Layout, ...]
    seed: int

    def units(self, tensor: Tensor) -> np.ndarray:
        """The tensor's bytes: an array of as many units as the dtype makes of its shape."""
        shape, _ = in_units(tensor.shape, (), tensor.dtype)
        rng = np.random.default_rng([self.seed, *tensor.name.encode()])
        raw = rng.integers(0, 256, (*shape, tensor.dtype.unit_bytes), np.uint8)
        return raw.view(f"V{tensor.dtype.unit_bytes}").reshape(shape)

    def shard(self, tensor: Tensor, box: Box) -> bytes:
        """What NumPy finds in ``box`` of the tensor."""
        _, (inside,) = in_units(tensor.shape, (box,), tensor.dtype)
        return self.units(tensor)[inside.slices].tobytes()

    def rank_bytes(self, layout: Layout, rank: int) -> dict[str, tuple[tuple[int, ...], bytes]]:
        """Local shape and bytes of every tensor of which ``rank`` holds a box."""
        found = {}
        for tensor in self.tensors:
            box = layout.box_of(tensor.name, tensor.shape, rank)
            if box is not None:
                found[tensor.name] = (box.shape, self.shard(tensor, box))
        return found


@st.composite
def models(draw: st.DrawFn, num_layouts: int = 2, most_ranks: int = 8) -> Model:
    """A model in ``num_layouts`` layouts: mixed dims, dtypes, empty tensors and scalars."""
    sizes = [draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12])) for _ in range(num_layouts)]
    sizes = [min(n, most_ranks) for n in sizes]
    tensors, placements = [], [dict[str, tuple[Placement, ...]]() for _ in sizes]
    for i in range(draw(st.integers(1, 4))):
        name = f"t{i}"
        ndim = draw(st.integers(0, 3))
        kind = draw(st.sampled_from(list(BY_NAME.values())))
        rows_are_whole = kind.unit_elements == 1 or (ndim > 0 and draw(st.booleans()))
        for at, num_ranks in zip(placements, sizes, strict=True):
            at[name] = draw(_placements(num_ranks, ndim if rows_are_whole else 0))
        placed = [p for at in placements for p in at[name]]
        shape = draw(_shape(ndim, kind, placed, rows_are_whole))
        tensors.append(Tensor(name, kind, shape, ()))
    layouts = [Layout(n, at) for n, at in zip(sizes, placements, strict=True)]
    return Model(tuple(tensors), tuple(layouts), draw(st.integers(0, 99)))


@st.composite
def _placements(draw: st.DrawFn, num_ranks: int, ndim: int) -> tuple[Placement, ...]:
    """Where one tensor lies: in one or several disjoint ranges of the ranks."""
    cuts = {0, num_ranks}
    if draw(st.booleans()):
        cuts.add(draw(st.integers(0, num_ranks)))
    edges = sorted(cuts)
    ranges = list(pairwise(edges))
    used = draw(st.lists(st.sampled_from(ranges), min_size=1, max_size=2, unique=True))
    return tuple(draw(_placement(b - a, ndim, a)) for a, b in sorted(used))


@st.composite
def _placement(draw: st.DrawFn, num_ranks: int, ndim: int, first: int) -> Placement:
    axes, left = [], num_ranks
    while left > 1:
        size = draw(st.sampled_from([n for n in range(2, left + 1) if left % n == 0]))
        axes.append((f"a{len(axes)}", size))
        left //= size
    spec: list[list[str]] = [[] for _ in range(ndim)]
    for name in draw(st.permutations([a for a, _ in axes])):
        dim = draw(st.integers(-1, ndim - 1))
        if dim >= 0:
            spec[dim].append(name)
    return Placement(tuple(axes), tuple(map(tuple, spec)), first)


@st.composite
def _shape(
    draw: st.DrawFn, ndim: int, kind: DType, placed: Sequence[Placement], rows_are_whole: bool
) -> tuple[int, ...]:
    """A shape that divides in every placement; now and then with an empty dim."""
    if not rows_are_whole:  # packed, and no row is whole bytes: it can be moved, not cut
        last = draw(st.integers(1, 5)) if ndim > 1 else kind.unit_elements
        return (*[kind.unit_elements] * (ndim - 1), last)
    ways = [lcm(*(p.ways(d) for p in placed)) for d in range(ndim)]
    shape = [w * draw(st.sampled_from([1, 2, 3, 1, 2, 3, 0])) for w in ways]
    if ndim:
        shape[-1] *= kind.unit_elements
    if prod(shape) > 100_000:
        shape = [w * (kind.unit_elements if d == ndim - 1 else 1) for d, w in enumerate(ways)]
    return tuple(shape)


def in_memory(model: Model, layout: Layout, drop: float = 0.0) -> tuple[Catalog, list[bytes]]:
    """``model`` stored by the ranks of ``layout``: its catalog, and every rank's bytes.

    With ``drop``, about that share of the replicas is left out, never all of a shard.
    """
    rng = np.random.default_rng(model.seed)
    files: list[bytearray] = [bytearray(b"head") for _ in range(layout.num_ranks)]
    tensors = {}
    for tensor in model.tensors:
        pieces = []
        for placement in layout.placements[tensor.name]:
            for shard in placement.shards(tensor.shape):
                ranks = [placement.first_rank + r for r in shard.holders]
                kept = [r for r in ranks if rng.random() >= drop] or ranks[-1:]
                for rank in kept:
                    pieces.append(StoredShard(rank, len(files[rank]), shard.box))
                    files[rank] += model.shard(tensor, shard.box)
        tensors[tensor.name] = Tensor(tensor.name, tensor.dtype, tensor.shape, tuple(pieces))
    listed = tuple(File(f"f{i}", len(b)) for i, b in enumerate(files))
    return Catalog("memory", "ranks", listed, tensors, layout), [bytes(b) for b in files]


def write_whole(model: Model, folder: Path) -> None:
    """``model`` as a Hugging Face folder, its one file spelled out by hand."""
    folder.mkdir(parents=True)
    header: dict[str, object] = {}
    data = b""
    for tensor in model.tensors:
        raw = model.units(tensor).tobytes()
        header[tensor.name] = {
            "dtype": tensor.dtype.name,
            "shape": tensor.shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_by_hand(path: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shape and bytes of every tensor in a safetensors file, by nobody's code but this."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header: Mapping[str, dict] = json.loads(raw[8:start])
    found = {}
    for name, told in header.items():
        if name != "__metadata__":
            a, b = told["data_offsets"]
            found[name] = (tuple(told["shape"]), raw[start + a : start + b])
            assert b - a == num_bytes(found[name][0], BY_NAME[told["dtype"]])
    return found
