"""Byte ranges: where a box of a row-major tensor lies in its file, and how it is read.

A box is at most one strided pattern per outer dim, so it is kept as a pattern: a
million-row slice costs the same to plan as a single row. Pure: no I/O.

    a (4, 8) tensor, the box of columns 0:4     ████░░░░ ████░░░░ ████░░░░ ████░░░░
    Runs(offset 0, length 4, 4 times, every 8)  one request each, or one for the span
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from operator import mul

from .box import Box

_GAP_BYTES = 4096  # below a page, one more request costs more than the bytes skipped
_OVER_READ = 4  # but a request never reads more than this many times the gapless bytes extra


@dataclass(frozen=True, slots=True)
class Runs:
    """Equal runs of ``length`` bytes at ``offset + sum(i * stride)``.

    >>> list(Runs(offset=0, length=16, outer=((4, 32),)))
    [(0, 16), (32, 16), (64, 16), (96, 16)]
    """

    offset: int
    length: int
    outer: tuple[tuple[int, int], ...]  # (count, stride in bytes), slowest first

    def __len__(self) -> int:
        return prod(n for n, _ in self.outer)

    @property
    def num_bytes(self) -> int:
        """Bytes in all runs."""
        return len(self) * self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in product(*(range(n) for n, _ in self.outer)):
            at = sum(i * s for i, (_, s) in zip(index, self.outer, strict=True))
            yield self.offset + at, self.length

    def offsets(self) -> list[int]:
        """Where each run begins.

        >>> Runs(offset=0, length=16, outer=((2, 100), (3, 32))).offsets()
        [0, 32, 64, 100, 132, 164]
        """
        found = [self.offset]
        for count, stride in self.outer:
            found = [at + i * stride for at in found for i in range(count)]
        return found

    def coalesced(self) -> Runs:
        """The requests that fetch these runs: rows whose gaps are small are one span.

        >>> Runs(offset=0, length=16, outer=((4, 32),)).coalesced()
        Runs(offset=0, length=112, outer=())
        >>> Runs(offset=0, length=16, outer=((4, 8192),)).coalesced()
        Runs(offset=0, length=16, outer=((4, 8192),))
        """
        if not self.outer:
            return self
        count, stride = self.outer[-1]
        if stride - self.length > min(_GAP_BYTES, _OVER_READ * self.length):
            return self
        return Runs(self.offset, (count - 1) * stride + self.length, self.outer[:-1]).coalesced()


def byte_runs(box: Box, shape: tuple[int, ...], itemsize: int, base: int = 0) -> Runs:
    """The bytes of ``box`` in a row-major tensor of ``shape`` starting at byte ``base``.

    >>> byte_runs(Box((0, 0), (4, 4)), (4, 8), itemsize=4)
    Runs(offset=0, length=16, outer=((4, 32),))
    >>> byte_runs(Box((2, 0), (4, 8)), (4, 8), itemsize=4)
    Runs(offset=64, length=64, outer=())
    """
    strides = list(accumulate(shape[:0:-1], mul, initial=itemsize))[::-1] if shape else []
    offset = base + sum([a * s for a, s in zip(box.start, strides, strict=True)])
    lengths = box.shape
    inner = len(shape)  # dims [inner:] are whole, hence contiguous
    while inner and lengths[inner - 1] == shape[inner - 1]:
        inner -= 1
    cut = max(inner - 1, 0)
    length = itemsize * prod(lengths[cut:])
    outer = tuple((n, s) for n, s in zip(lengths[:cut], strides[:cut], strict=True) if n != 1)
    return Runs(offset, length, outer)


def strided_runs(
    lengths: tuple[int, ...], strides: tuple[int, ...], itemsize: int, base: int = 0
) -> tuple[Runs, tuple[int, ...]]:
    """The bytes of a strided box whose first element is at ``base``, in the file's order.

    Also the dims in that order, slowest first; those of length 1 or stride 0 (repeated)
    are not among them.

    >>> strided_runs((3, 2), (2, 6), itemsize=2)
    (Runs(offset=0, length=12, outer=()), (1, 0))
    """
    some = [d for d, n in enumerate(lengths) if n != 1 and strides[d]]
    order = tuple(sorted(some, key=lambda d: -strides[d]))
    length, outer = itemsize, list[tuple[int, int]]()
    for dim in reversed(order):
        n, stride = lengths[dim], strides[dim]
        if not outer and stride == length:
            length *= n
        elif outer and stride == outer[0][0] * outer[0][1]:
            outer[0] = (outer[0][0] * n, outer[0][1])
        else:
            outer.insert(0, (n, stride))
    return Runs(base, length, tuple(outer)), order


def tiles(
    box: Box, strides: tuple[int, ...], itemsize: int, limit: int, least_run: int = 4096
) -> Iterator[Box]:
    """``box`` cut into boxes of at most ``limit`` bytes that are long on both sides.

    A tile first grows along the dims that are neighbours where it is stored (``strides``),
    until a run there has ``least_run`` bytes; then along those that are neighbours where
    it goes, which is row-major.

    >>> [t.shape for t in tiles(Box((0, 0), (8, 8)), (1, 8), 1, limit=32, least_run=4)]
    [(4, 8), (4, 8)]
    """
    lengths = box.shape
    if not prod(lengths):
        return
    extent = [1] * len(lengths)
    most = max(1, limit // itemsize)
    for dim in sorted(range(len(lengths)), key=lambda d: strides[d]):
        room = min(most, -(-least_run // itemsize)) // prod(extent)
        extent[dim] = max(1, min(lengths[dim], room)) if strides[dim] else 1
    for dim in reversed(range(len(lengths))):
        extent[dim] = max(1, min(lengths[dim], most // (prod(extent) // extent[dim])))
    cuts = [
        [(a, min(a + step, b)) for a in range(box.start[d], b, step)]
        for d, (b, step) in enumerate(zip(box.stop, extent, strict=True))
    ]
    for intervals in product(*cuts):
        yield Box(tuple(a for a, _ in intervals), tuple(b for _, b in intervals))


def blocks_along(box: Box, order: tuple[int, ...], itemsize: int, limit: int) -> Iterator[Box]:
    """As ``blocks``, of a box whose dims lie in another ``order``, slowest first.

    >>> [str(b) for b in blocks_along(Box((0, 0), (8, 4)), (1, 0), itemsize=2, limit=32)]
    ['[0:8, 0:2]', '[0:8, 2:4]']
    """
    place = [order.index(d) for d in range(len(order))]
    turned = Box(tuple(box.start[d] for d in order), tuple(box.stop[d] for d in order))
    for block in blocks(turned, itemsize, limit):
        yield Box(tuple(block.start[i] for i in place), tuple(block.stop[i] for i in place))


def is_contiguous(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether ``box`` is one run of a row-major tensor of ``shape``.

    >>> is_contiguous(Box((2, 0), (3, 4)), (4, 8)), is_contiguous(Box((0, 0), (2, 4)), (4, 8))
    (True, False)
    """
    return not byte_runs(box, shape, 1).outer


def block_dim(box: Box, itemsize: int, limit: int) -> int:
    """The dim of which each of ``box``'s blocks has a range: whole after it, one thick before.

    >>> block_dim(Box((0, 0), (4, 8)), itemsize=2, limit=32)
    0
    """
    lengths = box.shape
    dim, inner = len(lengths), itemsize
    while dim and inner * lengths[dim - 1] <= limit:
        dim -= 1
        inner *= lengths[dim]
    return max(0, dim - 1)


def blocks(box: Box, itemsize: int, limit: int) -> Iterator[Box]:
    """``box`` cut into boxes of at most ``limit`` bytes, in row-major order.

    Each is whole in its inner dims, one element thick in its outer ones and a range
    of the dim between, so it is contiguous in any row-major tensor that is as wide
    as ``box`` there. One element may exceed the limit.

    >>> [str(b) for b in blocks(Box((0, 0), (4, 8)), itemsize=2, limit=32)]
    ['[0:2, 0:8]', '[2:4, 0:8]']
    """
    lengths = box.shape
    if not prod(lengths):
        return
    dim = block_dim(box, itemsize, limit)
    cut, inner = dim + 1, itemsize * prod(lengths[dim + 1 :])
    if not lengths or inner * prod(lengths[: dim + 1]) <= limit:
        yield box
        return
    step = max(1, limit // inner)
    outer = (range(a, b) for a, b in zip(box.start[:dim], box.stop[:dim], strict=True))
    for index in product(*outer):
        head, after = tuple(index), tuple(i + 1 for i in index)
        for a in range(box.start[dim], box.stop[dim], step):
            b = min(a + step, box.stop[dim])
            yield Box((*head, a, *box.start[cut:]), (*after, b, *box.stop[cut:]))
