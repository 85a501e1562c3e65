"""The tensor algebra of mapping operations, the checks of its implementations, and placements.

The same operation runs on tensors in files (``tensors.Geometry``), on arrays in memory
(``arrays.Expressions``) and on placements (``Placing``).
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import (
    dataclass,
    replace,
)
from math import prod
from typing import Protocol, TypeVar

from ..core import dtypes
from ..core.catalog import Tensor
from ..core.dtypes import BY_NAME, CODES, DType, is_float
from ..core.layout import (
    Layout,
    Placement,
    Spec,
)
from ..errors import FormatError, LayoutError, did_you_mean

T = TypeVar("T")


class Algebra(Protocol[T]):
    """Operations on a tensor type ``T`` with known shapes."""

    def shape(self, x: T) -> tuple[int, ...]:
        """Elements along each dim."""
        ...

    def transpose(self, x: T, order: Sequence[int]) -> T:
        """Dim ``i`` of the result is dim ``order[i]`` of ``x``."""
        ...

    def reshape(self, x: T, shape: tuple[int, ...]) -> T:
        """The same elements in the same row-major order."""
        ...

    def cut(self, x: T, dim: int, start: int, stop: int) -> T:
        """The elements ``start:stop`` along ``dim``."""
        ...

    def join(self, xs: Sequence[T], dim: int, name: str) -> T:
        """``xs`` concatenated along ``dim``; ``name`` is for errors."""
        ...

    def repeat(self, x: T, dim: int, times: int) -> T:
        """``x`` with ``dim``, of length 1, repeated."""
        ...

    def pad(self, x: T, dim: int, length: int) -> T:
        """``x`` padded with zeros along ``dim`` to ``length``."""
        ...

    def cast(self, x: T, dtype: DType) -> T:
        """The values of ``x`` rounded to ``dtype``."""
        ...

    def affine(self, x: T, times: float, plus: float) -> T:
        """Each value of ``x`` times ``times`` plus ``plus``, rounded once to the dtype of ``x``."""
        ...

    def decoded(self, x: T, code: str) -> T:
        """The values that each integer of ``x`` packs (``dtypes.CODES``), in float32.

        The last dim is as many times longer.

        Raises:
            LayoutError: integers of another width.
        """
        ...

    def bits_as(self, x: T, dtype: DType) -> T:
        """The bits of ``x`` as values of ``dtype``, of the same width."""
        ...

    def scaled(
        self,
        x: T,
        scale: T,
        block: tuple[int, int],
        dtype: DType,
        outer: T | None = None,
        *,
        divides: bool = False,
    ) -> T:
        """The dequantized values of ``x`` with a factor for each block in ``scale``.

        All dims of ``x`` but the last are rows. Each factor is first multiplied, or divided if
        ``divides``, by the one number ``outer``.
        """
        ...


# --- Checks: one message for tensors in files and for arrays in memory

Shape = tuple[int, ...]


def check_numbers(word: str, least: int = 0, **numbers: int) -> None:
    """Refuse fields of an operation below ``least``."""
    for name, n in numbers.items():
        if n < least:
            why = " Dims are counted from 0." if name == "dim" else ""
            raise LayoutError(f"{word}: {name} = {n} must be {least} or more.{why}")


def length_of(shape: Shape, dim: int, what: str = "") -> int:
    """Return the length of ``dim``; ``what`` is the prefix of errors.

    Raises:
        LayoutError: no such dim.
    """
    if not 0 <= dim < len(shape):
        raise LayoutError(
            f"{what}{': ' if what else ''}shape {shape} has no dim {dim}; dims are counted from 0."
        )
    return shape[dim]


def check_order(name: str, order: Sequence[int], shape: Shape) -> None:
    """Refuse an order that is not a permutation of the dims of ``shape``."""
    if sorted(order) != list(range(len(shape))):
        raise LayoutError(
            f"{name}: {tuple(order)} is not a permutation of the {len(shape)} dims of shape "
            f"{shape}."
        )


def check_reshape(name: str, old: Shape, new: Shape) -> None:
    """Refuse a shape with another number of elements."""
    if prod(new) != prod(old):
        raise LayoutError(
            f"{name}: shape {old} has {prod(old)} elements and cannot become {new}, which has "
            f"{prod(new)}."
        )


def check_cut(name: str, shape: Shape, dim: int, start: int, stop: int) -> None:
    """Refuse a slice that is empty or out of bounds."""
    if not 0 <= start < stop <= length_of(shape, dim, name):
        raise LayoutError(f"{name}: {start}:{stop} is not a slice of dim {dim} of shape {shape}.")


def check_join(
    target: str, dim: int, parts: Sequence[tuple[str, Shape, DType | str | None]]
) -> None:
    """Refuse tensors (name, shape, dtype) with different dtypes or other dims."""
    first, shape, dtype = parts[0]
    length_of(shape, dim, target)
    for name, other, kind in parts[1:]:
        same = len(other) == len(shape) and all(
            a == b or d == dim for d, (a, b) in enumerate(zip(shape, other, strict=True))
        )
        if not same or kind != dtype:
            raise LayoutError(
                f"{target}: {first} ({dtype}, {shape}) and {name} ({kind}, {other}) cannot be "
                "joined "
                f"along dim {dim}. Cast or reshape one of them first."
            )


def check_repeat(name: str, shape: Shape, dim: int) -> None:
    """Refuse to repeat a dim that is not of length 1."""
    if length_of(shape, dim, name) != 1:
        raise LayoutError(
            f"{name}: dim {dim} of shape {shape} has {shape[dim]} elements, expected 1 to repeat."
        )


def check_cast(old: DType, new: DType) -> None:
    """Refuse a cast that truncates values."""
    if old.name.startswith("C") and not new.name.startswith("C"):
        raise LayoutError(f"{old} to {new} would lose the imaginary parts.")
    if is_float(old) and not is_float(new):
        raise LayoutError(f"{old} to {new} would truncate fractions and overflow. Cast to a float.")


def check_affine(dtype: DType) -> DType:
    """Return the dtype in which values of ``dtype`` are multiplied and added: F32 or F64.

    Raises:
        LayoutError: not floats of a byte or more.
    """
    name = dtype.numpy or dtype.name
    if not is_float(dtype) or name.startswith(("complex", "float4", "F6")):
        raise LayoutError(
            f"{dtype} values cannot be multiplied and added to; expected floats of 8 bits or more. "
            "Dequantize or cast them first."
        )
    return BY_NAME["F64" if dtype.name == "F64" else "F32"]


def check_scales(
    name: str, shape: Shape, scale: str, scale_shape: Shape, block: tuple[int, int]
) -> None:
    """Refuse factors whose shape is not that of the blocks of a weight."""
    rows = shape[:-1] if block[0] == 1 else tuple(-(-n // block[0]) for n in shape[:-1])
    expected = (*rows, -(-shape[-1] // block[1])) if shape else ()
    if len(shape) < 2 or (len(shape) > 2 and block[0] > 1) or scale_shape != expected:
        raise LayoutError(
            f"{name}: shape {shape} in blocks of {block[0]} x {block[1]} needs scales of shape "
            f"{expected}, but {scale} has {scale_shape}."
        )


def check_code(name: str, shape: Shape, dtype: DType | None, code: str) -> None:
    """Refuse to decode what are not the integers of ``code``."""
    bits = CODES[code].stored_bits
    if not shape or dtype is None or dtype.bits != bits or dtype.name[0] not in "IU":
        raise LayoutError(
            f"{name}: {code} is packed in integers of {bits} bits along the last dim, got {dtype} "
            f"of shape {shape}."
        )


def check_bits(name: str, old: DType | None, new: DType) -> None:
    """Refuse to take the bits of one width for values of another."""
    if old is None or old.bits != new.bits:
        raise LayoutError(f"{name}: {old} is not as wide as {new}.")


def dtype_of(word: str, name: str) -> DType:
    """Return the dtype of an operation by its name.

    Raises:
        LayoutError: no such dtype.
    """
    try:
        return dtypes.dtype(name)
    except FormatError as error:
        raise LayoutError(f"{word}: {error}{did_you_mean(name.upper(), BY_NAME)}") from None


# --- Layouts of mapped models, derived from the layouts of their sources

STAGES = "pp"


@dataclass(frozen=True, slots=True)
class Placed:
    """A shape and its placements, one for each set of ranks that holds it."""

    name: str
    shape: tuple[int, ...]
    placements: tuple[Placement, ...]

    @property
    def spec(self) -> Spec:
        """The axes that split each dim, equal in all placements."""
        spec = self.placements[0].spec
        return spec + ((),) * (len(self.shape) - len(spec))

    def ways(self, dim: int) -> int:
        """Return the number of parts of ``dim``."""
        return self.placements[0].ways(dim)


class Placing:
    """The algebra of placements."""

    @staticmethod
    def shape(x: Placed) -> tuple[int, ...]:
        """Elements along each dim."""
        return x.shape

    @staticmethod
    def transpose(x: Placed, order: Sequence[int]) -> Placed:
        """Dim ``i`` of the result is dim ``order[i]`` of ``x``."""
        return _with(x, tuple(x.shape[d] for d in order), tuple(x.spec[d] for d in order))

    @staticmethod
    def reshape(x: Placed, shape: tuple[int, ...]) -> Placed:
        """A sharded dim keeps its axes if it becomes the outermost of its new dims."""
        spec: list[tuple[str, ...]] = []
        for old, new in _groups(x.shape, shape):
            outer = next((d for d in old if x.shape[d] != 1), None)
            split = [d for d in old if x.spec[d]]
            target = next((d for d in new if shape[d] != 1), None)
            if split and (split != [outer] or shape[target or 0] % x.ways(split[0])):
                raise LayoutError(_indivisible(x, split[0], shape, target))
            spec += [
                x.spec[outer] if split and outer is not None and d == target else () for d in new
            ]
        return _with(x, shape, tuple(spec))

    @staticmethod
    def cut(x: Placed, dim: int, start: int, stop: int) -> Placed:
        """The same axes on fewer elements."""
        shape = (*x.shape[:dim], stop - start, *x.shape[dim + 1 :])
        return _with(x, shape, x.spec)

    @staticmethod
    def join(xs: Sequence[Placed], dim: int, name: str) -> Placed:
        """Equal placements are kept; those of several stages become a dim split by stages."""
        first = xs[0]
        shape = (*first.shape[:dim], sum(x.shape[dim] for x in xs), *first.shape[dim + 1 :])
        if all(x.placements == first.placements for x in xs):
            return _with(replace(first, name=name), shape, first.spec)
        return Placed(name, shape, (_over_stages(xs, dim, name),))

    @staticmethod
    def repeat(x: Placed, dim: int, times: int) -> Placed:
        """The same axes."""
        return _with(x, (*x.shape[:dim], times, *x.shape[dim + 1 :]), x.spec)

    @staticmethod
    def pad(x: Placed, dim: int, length: int) -> Placed:
        """The same axes."""
        return _with(x, (*x.shape[:dim], length, *x.shape[dim + 1 :]), x.spec)

    @staticmethod
    def cast(x: Placed, dtype: DType) -> Placed:
        """The same placements."""
        return x

    @staticmethod
    def affine(x: Placed, times: float, plus: float) -> Placed:
        """The same placements."""
        return x

    @staticmethod
    def decoded(x: Placed, code: str) -> Placed:
        """The same axes on more elements."""
        return _with(x, (*x.shape[:-1], x.shape[-1] * CODES[code].num_values), x.spec)

    @staticmethod
    def bits_as(x: Placed, dtype: DType) -> Placed:
        """The same placements."""
        return x

    @staticmethod
    def scaled(
        x: Placed,
        scale: Placed,
        block: tuple[int, int],
        dtype: DType,
        outer: Placed | None = None,
        *,
        divides: bool = False,
    ) -> Placed:
        """The same placements."""
        return x


def placed(tensors: Dict[str, Tensor], layout: Layout) -> dict[str, Placed]:
    """Return the tensors that ``layout`` places."""
    return {
        n: Placed(n, t.shape, layout.placements[n])
        for n, t in tensors.items()
        if layout.placements.get(n)
    }


def _with(x: Placed, shape: tuple[int, ...], spec: Spec) -> Placed:
    return Placed(x.name, shape, tuple(replace(p, spec=spec) for p in x.placements))


def _groups(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Group the dims of two shapes so that the products of each group are equal."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = [i] if i < len(old) else [], [j] if j < len(new) else []
        while prod(old[d] for d in a) != prod(new[d] for d in b):
            if prod(old[d] for d in a) < prod(new[d] for d in b):
                a.append((a[-1] if a else i - 1) + 1)
            else:
                b.append((b[-1] if b else j - 1) + 1)
        groups.append((tuple(a), tuple(b)))
        i, j = i + len(a), j + len(b)
    return groups


def _indivisible(x: Placed, dim: int, shape: tuple[int, ...], target: int | None) -> str:
    axes = ", ".join(f"{a}={dict(x.placements[0].axes)[a]}" for a in x.spec[dim])
    groups = shape[target or 0]
    return (
        f"{x.name}: {axes} splits dim {dim} of shape {x.shape} in {x.ways(dim)}, which does not "
        f"divide the {groups} groups (such as kv heads) of its new shape {shape}. Use a divisor of "
        f"{groups}, repeat the kv heads, or pass rules for the new names."
    )


def _over_stages(xs: Sequence[Placed], dim: int, name: str) -> Placement:
    plain = {(p.axes, x.spec) for x in xs for p in x.placements}
    first = [x.placements[0].first_rank for x in xs]
    stages = list(dict.fromkeys(first))
    ranks = xs[0].placements[0].num_ranks
    even = len({first.count(s) for s in stages}) == 1 and first == sorted(first)
    near = all(s == stages[0] + i * ranks for i, s in enumerate(stages))
    alone = all(len(x.placements) == 1 for x in xs) and not xs[0].spec[dim]
    if len(plain) > 1 or not (even and near and alone):
        raise LayoutError(
            f"{name}: {xs[0].name} is {xs[0].placements[0]}, but "
            + next(f"{x.name} is {x.placements[0]}" for x in xs if x.placements != xs[0].placements)
            + ". Joined tensors must have equal placements, or equally many must be in each stage."
        )
    axes = xs[0].placements[0].axes
    axis = STAGES
    while axis in dict(axes):  # such as experts that are split already
        axis += "_outer"
    spec = tuple((axis,) if d == dim else before for d, before in enumerate(xs[0].spec))
    return Placement(((axis, len(stages)), *axes), spec, stages[0])
