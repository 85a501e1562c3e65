"""Catalogs: which file holds which box of which tensor.

Each format's reader makes a catalog from headers only. Planning, loading and verification then
do not depend on the format. This module opens no file.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any, Protocol, TypeVar

from ..errors import LayoutError, NotFoundError, did_you_mean, html_table, printable, size_text
from .box import Box
from .dtypes import DType, num_bytes
from .layout import Layout, Placement

T = TypeVar("T")

#: Axes whose ranks compute with their shards, and so need whole attention heads.
TENSOR_AXES = frozenset({"mp", "tp", "model", "tensor"})


@dataclass(frozen=True, slots=True)
class File:
    """File of a checkpoint: its path relative to the checkpoint's root, and its version.

    Times and inode are those of ``stat``; 0 if the storage has none. ``version`` is that of a
    remote store, for example an entity tag.
    """

    path: str
    num_bytes: int
    mtime_ns: int = 0
    ctime_ns: int = 0
    inode: int = 0
    version: str = ""


@dataclass(frozen=True, slots=True)
class StoredShard:
    """Stored box, whose first element is at byte ``offset`` of file number ``file``.

    The box is contiguous and row-major, unless it has a ``view``.
    """

    file: int
    offset: int
    box: Box
    view: View | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint and all its stored shards, replicas included.

    Shards of a tensor made from others (for example two matrices interleaved by rows) may be
    boxes only in a finer shape. ``factors`` then factors the length of each dim, and the shards
    are boxes of the shape of all factors in order.
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
        """The shape in which the shards are boxes."""
        if self.factors is None:
            return self.shape
        return tuple(n for dim in self.factors for n in dim)

    def fine(self, box: Box) -> Box:
        """Return ``box`` as a box of the finer shape, with the same elements in the same order.

        Raises:
            LayoutError: ``box`` begins or ends inside a factor.
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
        """Raise if a rank would hold a part of a group (a kv head with its q heads).

        Raises:
            LayoutError: with the number of groups and the remedy.
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
                        f"{self.shape[dim] // groups} (such as kv heads with their q heads), which "
                        f"{axis}={size[axis]} does not divide. Use a divisor of {groups}, repeat "
                        "the kv heads, or do not fuse."
                    )

    def _groups(self, dim: int) -> int:
        """Return the number of groups along ``dim``, counting each copy of a repeated one."""
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
    """Return ``start:stop`` of one dim along each of its factors.

    The result is one index of the outer factors, a range of one factor, and all of the inner ones.
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
    """Facts of ``config.json`` that layouts depend on."""

    type: str | None = None
    num_layers: int | None = None
    tied_embeddings: bool = False
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


class Origin(Protocol):
    """The catalog from which a mapping of names and shapes made another."""

    @property
    def catalog(self) -> Catalog: ...

    def place(self, layout: Layout) -> Layout:
        """Return the layout of the mapped tensors if the original ones have ``layout``."""
        ...


@dataclass(frozen=True)
class Catalog:
    """The contents of one checkpoint.

    Attributes:
        root: the folder that ``files`` are relative to.
        format: the format's name, as ``--format`` takes it.
        layout: for checkpoints split into ranks, the boxes of each rank.
        extras: side files to copy (tokenizer, config), relative to ``root``.
        scalars: names of training scalars, which are never split (``global_step`` …).
        notes: findings that are not errors.
        logged: notes that are already logged; see ``with_notes_logged``.
        origin: for a mapped catalog, the original one.
        keys: for tensors that are data of random keys, JAX's name of the generator.
        left_out: values that are not tensors (a text …), by name; operations that need the whole
            checkpoint raise an error.
        lost: weights that are only on ranks without files here, with those ranks; the strategy
            has their names, without shapes. Operations that need them raise an error.
        has_merged_adapters: adapters were added to the weights, so a target's layout may name
            adapters that the result does not have.
        config_is_given: ``config.json`` is the caller's, not the checkpoint's; results get it.
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
    config_is_given: bool = False
    lost: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        ranks = "" if self.layout is None else f", {self.layout.num_ranks:,} ranks"
        return (
            f"Catalog({self.root!r}, {self.format}, {len(self.tensors):,} tensors, "
            f"{size_text(self.num_bytes)}, {len(self.files):,} files{ranks})"
        )

    def _repr_html_(self) -> str:
        """Return the tensors and bytes per dtype, as a table for notebooks."""
        found: dict[str, list[int]] = {}
        for tensor in self.tensors.values():
            found.setdefault(tensor.dtype.name, []).append(tensor.num_bytes)
        rows = [(name, len(sizes), size_text(sum(sizes))) for name, sizes in sorted(found.items())]
        return html_table(repr(self), ("dtype", "tensors", "bytes"), rows)

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor ``name``.

        Raises:
            NotFoundError: the checkpoint lacks it; suggests the nearest name.
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


# --- Views: strides of a stored box in its file, and transforms of its values

#: File number of a box of zeros, which is not stored.
ZEROS = -1


@dataclass(frozen=True, slots=True)
class IndexMap:
    """IndexMap index of each element of a box: ``start``, plus ``steps`` along each dim.

    >>> IndexMap(10, (4, 1)).moved(1, by=2)
    IndexMap(start=12, steps=(4, 1))
    """

    start: int
    steps: tuple[int, ...]

    def moved(self, dim: int, by: int) -> IndexMap:
        """Return the indices of the box that begins ``by`` elements later along ``dim``."""
        return IndexMap(self.start + by * self.steps[dim], self.steps)


@dataclass(frozen=True, slots=True)
class RoundTo:
    """Round the values to ``dtype``, as a cast there and back does."""

    dtype: DType


@dataclass(frozen=True, slots=True)
class Decode:
    """Take one of the values that a stored integer packs; always the first step.

    Attributes:
        code: a key of ``dtypes.CODES``.
        at: the number of the value in its integer, of each element of the box. The strides of
            the view are 0 along the dims that it depends on.
    """

    code: str
    at: IndexMap


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply each element by ``scale[index // block]``, divided dim by dim.

    Attributes:
        scale: the factors, with as many dims as the weight.
        block: elements per factor along each dim.
        at: the index, in the stored weight, of each element of the box.
        outer: one number, by which all factors are multiplied first.
        divides: divide by ``outer`` instead.
    """

    scale: Tensor
    block: tuple[int, ...]
    at: tuple[IndexMap, ...]
    outer: Tensor | None = None
    divides: bool = False

    @property
    def is_by_part(self) -> bool:
        """Whether each part of the weight is read with its own part of ``scale``.

        Otherwise ``scale`` is small and read whole: one factor for several rows, or for each.
        """
        return max(self.block[:-1]) == 1 and self.scale.shape[-1] > 1

    def part_of(self, start: tuple[int, ...], lengths: tuple[int, ...]) -> Box:
        """Return the box of ``scale`` for the elements of a box, ``start`` after its first."""
        bounds = []
        for at, size in zip(self.at, self.block, strict=True):
            first = at.start + sum(i * s for i, s in zip(start, at.steps, strict=True))
            last = first + sum((n - 1) * s for n, s in zip(lengths, at.steps, strict=True))
            bounds.append((first // size, last // size + 1))
        return Box(*zip(*bounds, strict=True))

    def within(self, part: Box, scale: Tensor) -> Scale:
        """Return the step with ``scale``, which is ``part`` of its factors."""
        at = tuple(
            IndexMap(a.start - first * size, a.steps)
            for a, first, size in zip(self.at, part.start, self.block, strict=True)
        )
        return replace(self, scale=scale, at=at)


@dataclass(frozen=True, slots=True)
class AddProduct:
    """Add ``scaling * (b @ a)[row, column]``: a low-rank adapter.

    Attributes:
        a: (rank, columns).
        b: (rows, rank).
        at: the row and the column of each element of the box.
        columns: the first used column of ``b`` and the step between used columns.
        reproducible: sum over the rank one by one, each fused with its product and rounded, so
            that the bits are the same on every machine; otherwise as fast as possible.
    """

    a: Tensor
    b: Tensor
    scaling: float
    at: tuple[IndexMap, IndexMap]
    columns: tuple[int, int] = (0, 1)
    reproducible: bool = False


@dataclass(frozen=True, slots=True)
class MultiplyAdd:
    """Multiply by ``times``, then add ``plus``, each rounded to ``dtype`` (F32 or F64)."""

    times: float
    plus: float
    dtype: DType


Step = RoundTo | Decode | Scale | AddProduct | MultiplyAdd


@dataclass(frozen=True, slots=True)
class View:
    """Strides and transforms of a stored box.

    Attributes:
        strides: bytes between neighbours, per dim of the box; 0 repeats one element.
        dtype: the stored dtype.
        steps: transforms of the values, in float32 (in float64 from or to F64), before the cast
            to the tensor's dtype.
    """

    strides: tuple[int, ...]
    dtype: DType
    steps: tuple[Step, ...] = ()

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """Other tensors that the steps need."""
        found: list[Tensor] = []
        for step in self.steps:
            if isinstance(step, Scale):
                found += [step.scale, *([step.outer] if step.outer else [])]
            elif isinstance(step, AddProduct):
                found += [step.a, step.b]
        return tuple(found)

    @property
    def factors(self) -> tuple[Scale, ...]:
        """The steps that read their operand by parts."""
        return tuple(s for s in self.steps if isinstance(s, Scale) and s.is_by_part)

    @property
    def whole_operands(self) -> tuple[Tensor, ...]:
        """The small tensors among ``operands``, which are read whole."""
        by_part = [step.scale for step in self.factors]
        return tuple(t for t in self.operands if t not in by_part)


def with_places(step: Step, at: tuple[IndexMap, ...]) -> Step:
    """Return ``step`` for elements with other indices."""
    if isinstance(step, Decode):
        return replace(step, at=at[0])
    if isinstance(step, Scale):
        return replace(step, at=at)
    return replace(step, at=(at[0], at[1])) if isinstance(step, AddProduct) else step


def places(step: Step) -> tuple[IndexMap, ...]:
    """Return the element indices of ``step``."""
    if isinstance(step, Decode):
        return (step.at,)
    return step.at if isinstance(step, Scale | AddProduct) else ()


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


# --- Notes: findings that are not errors, and their delivery to the user

# Without a handler: if the program configures no logging, Python prints warnings to stderr.
_log = logging.getLogger("jaxshard")


def log_notes(subject: str, notes: Iterable[str], logged: Collection[str] = ()) -> None:
    """Log each of ``notes`` on ``subject`` once, as a warning, except those already ``logged``."""
    for note in dict.fromkeys(notes):
        if note not in logged:
            _log.warning("%s: %s", subject, note)


@lru_cache(maxsize=1024)
def log_once(subject: str, note: str) -> None:
    """Log a note on ``subject`` once in this process, for example of equal training steps."""
    _log.warning("%s: %s", subject, note)


def log_done(verb: str, subject: object, num_bytes: int, seconds: float) -> None:
    """Log one INFO line at the end of ``verb``, which took ``seconds``."""
    if not _log.isEnabledFor(logging.INFO):
        return
    speed = num_bytes / max(seconds, 1e-6) / 1e9
    done = f"{size_text(num_bytes)} in {seconds:.3g} s, {speed:.3g} GB/s"
    _log.info("%s %s: %s", verb, printable(str(subject)), done)


def with_notes_logged(catalog: Catalog) -> Catalog:
    """Log the notes of ``catalog`` that are not yet logged; return it with all marked as logged.

    Results derived from it inherit the marks: a checkpoint that is opened once and loaded for
    each of eight ranks logs its notes once.
    """
    log_notes(catalog.root, catalog.notes, catalog.logged)
    return replace(catalog, logged=catalog.logged.union(catalog.notes))
