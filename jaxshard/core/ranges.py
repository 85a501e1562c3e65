"""Byte ranges: the runs of bytes of a box in its file, and the requests that read them.

A box is at most one strided pattern per outer dim, so it is kept as a pattern: a
million-row slice costs the same to plan as a single row. Pure: no I/O.

    a (4, 8) tensor, the box of columns 0:4     ████░░░░ ████░░░░ ████░░░░ ████░░░░
    Runs(offset 0, length 4, 4 times, every 8)  one request each, or one for the span
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
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
        """Return the offset of each run.

        >>> Runs(offset=0, length=16, outer=((2, 100), (3, 32))).offsets()
        [0, 32, 64, 100, 132, 164]
        """
        found = [self.offset]
        for count, stride in self.outer:
            found = [at + i * stride for at in found for i in range(count)]
        return found

    def coalesced(self) -> Runs:
        """Return the requests that read these runs: rows with small gaps become one span.

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
    """Return the runs of ``box`` in a row-major tensor of ``shape`` that starts at ``base``.

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
    """Return the runs of a strided box whose first element is at ``base``, in file order.

    Also returns the dims in that order, slowest first, without those of length 1 or of stride 0
    (repeated elements).

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


@dataclass(frozen=True, slots=True)
class Grid:
    """``box`` split into equal blocks, computed lazily during iteration.

    The last block of each dim may be smaller. A grid of a million blocks needs no more memory,
    and no more time to count, than one of ten.

    Attributes:
        box: the box to split.
        steps: elements of a block along each dim.
        order: the dims, slowest first.
    """

    box: Box
    steps: tuple[int, ...]
    order: tuple[int, ...]

    def __len__(self) -> int:
        if not self.box.size:
            return 0
        return prod(-(-n // s) for n, s in zip(self.box.shape, self.steps, strict=True))

    def __iter__(self) -> Iterator[Box]:
        box, steps = self.box, self.steps
        if not box.size:
            return
        cut = [d for d in self.order if steps[d] < box.shape[d]]
        if not cut:
            yield box
            return
        *outer, last = cut
        start, stop = list(box.start), list(box.stop)
        for index in _product([range(box.start[d], box.stop[d], steps[d]) for d in outer]):
            for d, a in zip(outer, index, strict=True):
                start[d], stop[d] = a, min(a + steps[d], box.stop[d])
            step, end = steps[last], box.stop[last]
            for a in range(box.start[last], end, step):
                start[last], stop[last] = a, min(a + step, end)
                yield Box(tuple(start), tuple(stop))

    def kinds(self, parts: Iterable[Box]) -> Iterator[tuple[Box, int]]:
        """Yield a block of each kind, and the number of blocks of that kind.

        Blocks of a kind have one shape, and hold boxes of one shape of the same ``parts``, so
        whatever is counted of one is true of all. Kinds are as many as the parts have edges,
        however many blocks there are.

        >>> grid = blocks(Box((0,), (1 << 40,)), 1, limit=1 << 20)
        >>> [(str(block), n) for block, n in grid.kinds([Box((0,), (3 << 19,))])]
        [('[0:1048576]', 1), ('[1048576:2097152]', 1), ('[2097152:3145728]', 1048574)]
        """
        if not self.box.size:
            return
        edges = list(parts)
        along = [
            list(_kinds_along(a, b, step, {n for p in edges for n in (p.start[d], p.stop[d])}))
            if step < b - a
            else [(a, b, 1)]
            for d, (a, b, step) in enumerate(
                zip(self.box.start, self.box.stop, self.steps, strict=True)
            )
        ]
        for kind in product(*along):
            starts, stops, counts = zip(*kind, strict=True) if kind else ((), (), ())
            yield Box(starts, stops), prod(counts)


def _product(ranges: Sequence[range]) -> Iterator[tuple[int, ...]]:
    """As ``itertools.product``, which would first make a list of each range."""
    if not ranges:
        yield ()
        return
    for first in ranges[0]:
        for rest in _product(ranges[1:]):
            yield first, *rest


def _kinds_along(
    start: int, stop: int, step: int, edges: set[int]
) -> Iterator[tuple[int, int, int]]:
    """Of the intervals that ``step`` cuts ``start:stop`` into, one of each kind, and how many.

    An interval with an edge inside is the only one of its kind, and so is a shorter last one.
    """
    inside = {edge - start for edge in edges if start < edge < stop}
    alone = {at // step for at in (*inside, stop - start) if at % step}
    bounds = {0, -(-(stop - start) // step), *alone, *(i + 1 for i in alone)}
    bounds |= {at // step for at in inside}
    for first, end in pairwise(sorted(bounds)):
        at = start + first * step
        yield at, min(at + step, stop), end - first


def tiles(
    box: Box, strides: tuple[int, ...], itemsize: int, limit: int, least_run: int = 4096
) -> Grid:
    """``box`` cut into boxes of at most ``limit`` bytes that are long on both sides.

    A tile first grows along the dims that repeat what is stored, so that it is read once; then
    along those that are neighbours where it is stored (``strides``), until a run there has
    ``least_run`` bytes; then along those that are neighbours where it goes, which is row-major.

    >>> [t.shape for t in tiles(Box((0, 0), (8, 8)), (1, 8), 1, limit=32, least_run=4)]
    [(4, 8), (4, 8)]
    """
    lengths = box.shape
    extent = [1] * len(lengths)
    most = max(1, limit // itemsize)
    repeats = [d for d in range(len(lengths)) if not strides[d]]
    for dim in repeats:
        extent[dim] = max(1, min(lengths[dim], most // prod(extent)))
    most_run = min(most, -(-least_run // itemsize) * prod(extent))
    for dim in sorted(set(range(len(lengths))).difference(repeats), key=lambda d: strides[d]):
        extent[dim] = max(1, min(lengths[dim], most_run // prod(extent)))
    for dim in reversed(range(len(lengths))):
        extent[dim] = max(1, min(lengths[dim], most // (prod(extent) // extent[dim])))
    return Grid(box, tuple(extent), tuple(range(len(lengths))))


def blocks_along(box: Box, order: tuple[int, ...], itemsize: int, limit: int) -> Grid:
    """As ``blocks``, of a box whose dims lie in another ``order``, slowest first.

    >>> [str(b) for b in blocks_along(Box((0, 0), (8, 4)), (1, 0), itemsize=2, limit=32)]
    ['[0:8, 0:2]', '[0:8, 2:4]']
    """
    turned = Box(tuple(box.start[d] for d in order), tuple(box.stop[d] for d in order))
    steps = blocks(turned, itemsize, limit).steps
    return Grid(box, tuple(steps[order.index(d)] for d in range(len(order))), order)


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


def blocks(box: Box, itemsize: int, limit: int) -> Grid:
    """``box`` cut into boxes of at most ``limit`` bytes, in row-major order.

    Each is whole in its inner dims, one element thick in its outer ones and a range
    of the dim between, so it is contiguous in any row-major tensor that is as wide
    as ``box`` there. One element may exceed the limit.

    >>> [str(b) for b in blocks(Box((0, 0), (4, 8)), itemsize=2, limit=32)]
    ['[0:2, 0:8]', '[2:4, 0:8]']
    """
    lengths = box.shape
    dims = tuple(range(len(lengths)))
    dim = block_dim(box, itemsize, limit)
    inner = itemsize * prod(lengths[dim + 1 :])
    if not lengths or not prod(lengths) or inner * prod(lengths[: dim + 1]) <= limit:
        return Grid(box, lengths, dims)
    step = max(1, limit // inner)
    return Grid(box, (*(1 for _ in lengths[:dim]), step, *lengths[dim + 1 :]), dims)
