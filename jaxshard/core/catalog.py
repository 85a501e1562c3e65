"""Catalogs: which file holds which box of which tensor.

Every on-disk format becomes one of these, by reading headers only. What follows
(planning, loading, verifying) never asks which format it was. This module opens
no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..errors import LayoutError, NotFoundError, did_you_mean
from .box import Box
from .dtypes import DType, num_bytes
from .layout import Layout, Placement

if TYPE_CHECKING:
    pass

#: Axes whose ranks compute with what they hold, and so need whole heads of it.
TENSOR_AXES = frozenset({"mp", "tp", "model", "tensor"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class File:
    """A file of the checkpoint: its path relative to the checkpoint's root, and its version.

    Times and inode are those of the system's ``stat``; 0 where the storage has none. ``version``
    is what a remote store calls a version, an entity tag for example.
    """

    path: str
    num_bytes: int
    mtime_ns: int = 0
    ctime_ns: int = 0
    inode: int = 0
    version: str = ""


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A stored box, whose first element is at byte ``offset`` of file number ``file``.

    It is contiguous and row-major, or lies as ``view`` says.
    """

    file: int
    offset: int
    box: Box
    view: View | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint and every stored piece of it, replicas included.

    A tensor made from others (two matrices row by row, say) may have pieces that are boxes
    only in a finer shape: ``factors`` then says, per dim, what its length is the product of,
    and the pieces' boxes are boxes of all factors in a row.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    shards: tuple[StoredShard, ...]
    factors: tuple[tuple[int, ...], ...] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor, counted once."""
        return num_bytes(self.shape, self.dtype)

    @property
    def fine_shape(self) -> tuple[int, ...]:
        """The shape that the pieces' boxes are boxes of."""
        if self.factors is None:
            return self.shape
        return tuple(n for dim in self.factors for n in dim)

    def fine(self, box: Box) -> Box:
        """``box`` of the shape as the same elements, in the same order, of the finer shape.

        Raises:
            LayoutError: it begins or ends inside a factor.
        """
        if self.factors is None:
            return box
        start: list[int] = []
        stop: list[int] = []
        for dim, factors in enumerate(self.factors):
            a, b = _fine_interval(self, dim, factors, box.start[dim], box.stop[dim])
            start += a
            stop += b
        return Box(tuple(start), tuple(stop))

    def check_groups(self, placement: Placement) -> None:
        """Refuse ranks that hold a part of what belongs together (a kv head and its q heads).

        Raises:
            LayoutError: with the number of groups, and what to do.
        """
        size = dict(placement.axes)
        for dim, axes in enumerate(placement.spec[: len(self.factors or ())]):
            assert self.factors is not None
            if not axes or len(self.factors[dim]) == 1:
                continue
            groups, ways = self._groups(dim), 1
            for axis in axes:
                ways *= size[axis]
                if axis in TENSOR_AXES and groups % ways:
                    raise LayoutError(
                        f"{self.name}: dim {dim} of shape {self.shape} is {groups} groups of "
                        f"{self.shape[dim] // groups} (kv heads with their q heads, say), which "
                        f"{axis}={size[axis]} does not divide. Use a divisor of {groups}, repeat "
                        "the kv heads, or do not fuse."
                    )

    def _groups(self, dim: int) -> int:
        """How many groups follow each other along ``dim``, each copy of a repeated one counted."""
        assert self.factors is not None
        first, *inner = self.factors[dim]
        at = sum(map(len, self.factors[:dim]))
        groups = first
        for fine, copies in enumerate(inner, start=at + 1):
            views = (p.view for p in self.shards if p.file >= 0)  # zeros have no strides
            if not any(view is not None and view.strides[fine] == 0 for view in views):
                break
            groups *= copies
        return groups


def _fine_interval(
    tensor: Tensor, dim: int, factors: tuple[int, ...], start: int, stop: int
) -> tuple[list[int], list[int]]:
    """``start:stop`` of one dim along each of its factors.

    It is one index of the outer factors, a range of one, and all of the inner ones.
    """
    first, last, left = list[int](), list[int](), prod(factors)
    a, b = start, max(start, stop - 1)
    for n in factors:
        left //= n
        first.append(a // left)
        last.append(b // left)
        a, b = a % left, b % left
    ranged = next((i for i, (x, y) in enumerate(zip(first, last, strict=True)) if x != y), None)
    if stop == start:
        last = [x - 1 for x in first]
    elif ranged is not None:
        inner = prod(factors[ranged + 1 :])
        if start % inner or stop % inner:
            raise LayoutError(
                f"dim {dim} of shape {tensor.shape} is made of {' x '.join(map(str, factors))}; "
                f"a shard {start}:{stop} of it begins or ends inside a group of {inner}. Cut at "
                f"multiples of {inner}, or leave the dim whole."
            )
    return first, [n + 1 for n in last]


@dataclass(frozen=True)
class Model:
    """What the checkpoint's ``config.json`` says of the model, as far as layouts care."""

    type: str | None = None
    num_layers: int | None = None
    tied_embeddings: bool = False
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


class Origin(Protocol):
    """What a catalog was made of by a mapping of names and shapes."""

    @property
    def catalog(self) -> Catalog: ...

    def place(self, layout: Layout) -> Layout:
        """The layout of the mapped tensors, when the catalog's own lie as ``layout`` says."""
        ...


@dataclass(frozen=True)
class Catalog:
    """The contents of one checkpoint.

    Attributes:
        root: the folder that ``files`` are relative to.
        format: the format's name, as ``--format`` takes it.
        layout: for checkpoints cut into ranks, who holds what.
        extras: other files to carry along (tokenizer, config), relative to ``root``.
        scalars: names of training scalars, which are never split (``global_step`` …).
        notes: things a person should know that are not errors.
        logged: those of them that a verb has logged; see ``notes.logged``.
        origin: for a mapped catalog, what it was made of.
        keys: for tensors that are the data of random keys, JAX's name of the generator.
        left_out: what the checkpoint holds and no tensor is (a text …), by name; who takes all
            of the checkpoint must be refused.
        lost: weights that lie only on ranks without files here, with those ranks: their names
            are known from the strategy, and no more. They are refused where they are needed.
        has_merged_adapters: adapters were added to the weights, so a target's layout may name
            adapters that the result does not have.
    """

    root: str
    format: str
    files: tuple[File, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)
    layout: Layout | None = field(default=None, repr=False)
    model: Model = Model()
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    scalars: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    logged: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    origin: Origin | None = field(default=None, repr=False, compare=False)
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    left_out: Mapping[str, str] = field(default_factory=dict, repr=False)
    has_merged_adapters: bool = False
    lost: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called ``name``.

        Raises:
            NotFoundError: there is none; the nearest name is offered.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise NotFoundError(
                f"no tensor {name} among the {len(self.tensors)} of {self.root}."
                + did_you_mean(name, self.tensors)
            ) from None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        return sum(t.num_bytes for t in self.tensors.values())


# --- Views: how the elements of a stored box lie in their file, and what becomes of them

#: The file number of a box of zeros, which no file stores.
ZEROS = -1


@dataclass(frozen=True, slots=True)
class Affine:
    """A number for each element of a box: ``start`` at its first, plus ``steps`` along each dim.

    >>> Affine(10, (4, 1)).moved(1, by=2)
    Affine(start=12, steps=(4, 1))
    """

    start: int
    steps: tuple[int, ...]

    def moved(self, dim: int, by: int) -> Affine:
        """The same numbers for the box that begins ``by`` elements later along ``dim``."""
        return Affine(self.start + by * self.steps[dim], self.steps)


@dataclass(frozen=True, slots=True)
class RoundTo:
    """Round the values to ``dtype`` on the way: what a cast there and back does."""

    dtype: DType


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply element (row, column) by ``scale[row // block, column // block]``.

    Attributes:
        scale: the factors, a small tensor.
        block: rows and columns that share one.
        at: the row and the column, in the stored weight, of each element of the box.
    """

    scale: Tensor
    block: tuple[int, int]
    at: tuple[Affine, Affine]


@dataclass(frozen=True, slots=True)
class AddProduct:
    """Add ``scaling * (b @ a)[row, column]``: a low-rank adapter.

    Attributes:
        a: (rank, columns).
        b: (rows, rank).
        at: the row and the column of each element of the box.
        columns: the columns of ``b`` that count, if not all: from the first on, so far apart.
        reproducible: sum over the rank one by one, each fused with its product and rounded,
            so that the bits depend on no machine; else as fast as the machine can.
    """

    a: Tensor
    b: Tensor
    scaling: float
    at: tuple[Affine, Affine]
    columns: tuple[int, int] = (0, 1)
    reproducible: bool = False


Step = RoundTo | Scale | AddProduct


@dataclass(frozen=True, slots=True)
class View:
    """How a stored box is read.

    Attributes:
        strides: bytes between neighbours, per dim of the box; 0 repeats one element.
        dtype: what is stored.
        steps: what is done to the values, in float32, before they get the tensor's dtype.
    """

    strides: tuple[int, ...]
    dtype: DType
    steps: tuple[Step, ...] = ()

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The small tensors that the steps need whole."""
        found: list[Tensor] = []
        for step in self.steps:
            if isinstance(step, Scale):
                found.append(step.scale)
            elif isinstance(step, AddProduct):
                found += [step.a, step.b]
        return tuple(found)


def with_places(step: Step, at: tuple[Affine, ...]) -> Step:
    """``step`` for elements that are elsewhere in the box."""
    return step if isinstance(step, RoundTo) else replace(step, at=(at[0], at[1]))


def places(step: Step) -> tuple[Affine, ...]:
    """The numbers that ``step`` knows its elements by."""
    return () if isinstance(step, RoundTo) else step.at


def group_by_bytes(
    sized: Iterable[tuple[T, int]],
    max_bytes: int,
    *,
    max_items: int | None = None,
    large_alone: bool = False,
) -> Iterator[list[T]]:
    """Group (item, bytes) pairs, in order, into groups of at most ``max_bytes``.

    A larger item gets a group of its own. It also ends the group before it, unless
    ``large_alone``: then that group continues after it.

    >>> sized = [("a", 3), ("b", 2), ("c", 9), ("d", 1)]
    >>> list(group_by_bytes(sized, 6))
    [['a', 'b'], ['c'], ['d']]
    >>> list(group_by_bytes(sized, 6, large_alone=True))
    [['c'], ['a', 'b', 'd']]
    """
    group, total = list[T](), 0
    for item, size in sized:
        if large_alone and size > max_bytes:
            yield [item]
            continue
        if group and (total + size > max_bytes or len(group) == max_items):
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group
