"""Random tensors in files and in memory, and what a mapping makes of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from ends import Into
from hypothesis import strategies as st

from jaxshard.core.box import Box
from jaxshard.core.catalog import Catalog, File, StoredShard, Tensor
from jaxshard.core.dtypes import BY_NUMPY
from jaxshard.mapping import Affine, Cast, Merge, Op, Pad, Repeat, Slice, Split, Transpose
from jaxshard.mapping import Mapping as MappingOfNames
from jaxshard.planning.copies import TensorCopy, move_into
from jaxshard.storage.engine import Budget, Counts, run
from jaxshard.storage.io import Source

KINDS = ("transpose", "split", "merge", "slice", "pad", "repeat")
FACTORS = st.sampled_from([1.0, -1.0, 0.5, 8.0, 0.3, -7.1, 64**-0.5, 1e-9, 3e12])
SHIFTS = st.sampled_from([0.0, 1.0, -1.0, 0.7, -3e-5, 1e9])
Arrays = Mapping[str, np.ndarray[Any, Any]]
SMALL = Budget(1, 64, 64)


class Memory(Source):
    """Tensors laid out in one buffer as files would be, each possibly cut in boxes."""

    def __init__(self, arrays: Arrays, cuts: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.read_bytes = 0
        self.touched: list[tuple[int, int]] = []
        data, tensors = bytearray(), {}
        for name, array in arrays.items():
            ways = (cuts or {}).get(name, (1,) * array.ndim)
            pieces = []
            for box in grid(array.shape, ways):
                pieces.append(StoredShard(0, len(data), box))
                data += np.ascontiguousarray(array[box.slices]).tobytes()
            kind = BY_NUMPY[array.dtype.name]
            tensors[name] = Tensor(name, kind, array.shape, tuple(pieces))
        self.data = bytes(data)
        self.catalog = Catalog("memory", "test", (File("all", len(data)),), tensors)

    def read(self, piece: StoredShard, offset: int, buffer: memoryview) -> None:
        assert piece.file == 0
        assert 0 <= offset <= offset + len(buffer) <= len(self.data)
        self.touched.append((offset, offset + len(buffer)))
        self.read_bytes += len(buffer)
        buffer[:] = self.data[offset : offset + len(buffer)]


def grid(shape: tuple[int, ...], ways: tuple[int, ...]) -> list[Box]:
    boxes = [Box((), ())]
    for n, w in zip(shape, ways, strict=True):
        step = n // w
        boxes = [
            Box((*b.start, i * step), (*b.stop, (i + 1) * step)) for b in boxes for i in range(w)
        ]
    return boxes


def read_box(
    memory: Memory, tensor: Tensor, box: Box, budget: Budget = SMALL
) -> tuple[np.ndarray[Any, Any], Counts]:
    """The values of ``box`` of ``tensor``, as the engine carries them."""
    dtype = np.dtype(getattr(ml_dtypes, tensor.dtype.numpy or "", tensor.dtype.numpy))
    out = np.full(box.size * dtype.itemsize, 0xEE, np.uint8)

    def write(move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        out[offset : offset + len(buffer)] = np.frombuffer(buffer, np.uint8)
        return 1

    counts = run([move_into(tensor, {box: (0,)})], memory, Into(write), budget=budget)
    return out.view(dtype).reshape(box.shape), counts


def read_all(memory: Memory, catalog: Catalog, budget: Budget = SMALL) -> dict[str, Any]:
    return {
        n: read_box(memory, t, Box.whole(t.shape), budget)[0] for n, t in catalog.tensors.items()
    }


def same(a: Arrays, b: Arrays) -> bool:
    """Whether two trees hold the same bits under the same names."""
    return a.keys() == b.keys() and all(
        x.dtype == b[n].dtype and x.shape == b[n].shape and x.tobytes() == b[n].tobytes()
        for n, x in a.items()
    )


def rank_catalog(memory: Memory, mapped: Catalog, ways: Callable[[Tensor], tuple[int, ...]]) -> Any:
    """``mapped`` written as files cut by ``ways``, and opened again."""
    arrays = read_all(memory, mapped)
    return Memory(arrays, {n: ways(replace(mapped.tensors[n])) for n in arrays})


@st.composite
def worlds(draw: st.DrawFn, more: tuple[str, ...] = (), dtypes: tuple[str, ...] = ()) -> Any:
    """A random chain of operations on one tensor, and ways to cut source and result.

    ``more`` may be "affine" and "cast", to one of ``dtypes``.
    """
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 4, 6]), min_size=1, max_size=3)))
    ops: list[Op] = []
    now = shape
    for _ in range(draw(st.integers(1, 4))):
        dim = draw(st.integers(0, len(now) - 1))
        kind = draw(st.sampled_from([*KINDS, *more]))
        if kind == "transpose":
            order = tuple(draw(st.permutations(range(len(now)))))
            ops.append(Transpose(("w",), order))
            now = tuple(now[i] for i in order)
        elif kind == "split" and len(now) < 5:
            a = draw(st.sampled_from([n for n in range(1, now[dim] + 1) if now[dim] % n == 0]))
            ops.append(Split(("w",), dim, (a, -1)))
            now = (*now[:dim], a, now[dim] // a, *now[dim + 1 :])
        elif kind == "merge" and dim + 1 < len(now):
            ops.append(Merge(("w",), dim, (-1, now[dim + 1])))
            now = (*now[:dim], now[dim] * now[dim + 1], *now[dim + 2 :])
        elif kind == "slice" and now[dim] > 1:
            a = draw(st.integers(0, now[dim] - 1))
            b = draw(st.integers(a + 1, now[dim]))
            ops.append(Slice(("w",), dim, a, b))
            now = (*now[:dim], b - a, *now[dim + 1 :])
        elif kind == "pad":
            to = now[dim] + draw(st.integers(0, 3))
            ops.append(Pad(("w",), dim, now[dim], to))
            now = (*now[:dim], to, *now[dim + 1 :])
        elif kind == "repeat":
            ops.append(Repeat(("w",), 1, 2, dim))
            now = (*now[:dim], 2 * now[dim], *now[dim + 1 :])
        elif kind == "affine":
            ops.append(Affine(("w",), draw(FACTORS), draw(SHIFTS)))
        elif kind == "cast":
            ops.append(Cast(("w",), draw(st.sampled_from(dtypes))))
    ways = tuple(draw(st.sampled_from([w for w in (1, 2, 3) if n % w == 0])) for n in shape)
    tile = draw(st.sampled_from([8, 32, 4096]))
    return shape, MappingOfNames(tuple(ops)), ways, tile
