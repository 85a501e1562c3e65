"""Expressions: a mapping of values in memory, as data that NumPy or JAX evaluates.

Layers of a model have one expression between them, with other leaves, so it is compiled
once. This module imports JAX only where it evaluates with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from ..dtypes import DType
from ..elements import numpy_dtype
from ..errors import LayoutError


@dataclass(frozen=True, slots=True)
class Expression:
    """A value made from others: ``kind`` says how. A leaf has none, and a name or a number."""

    kind: str
    shape: tuple[int, ...]
    inputs: tuple[Expression, ...] = ()
    how: tuple[Any, ...] = ()


def leaf(name: str | int, shape: tuple[int, ...]) -> Expression:
    """A value that is given."""
    return Expression("leaf", shape, (), (name,))


class Expressions:
    """The algebra of values in memory: what to compute is written down, and nothing is."""

    @staticmethod
    def shape(x: Expression) -> tuple[int, ...]:
        """Elements along each dim."""
        return x.shape

    @staticmethod
    def transpose(x: Expression, order: Sequence[int]) -> Expression:
        """Dim ``i`` of the result is dim ``order[i]`` of ``x``."""
        if sorted(order) != list(range(len(x.shape))):
            raise LayoutError(f"{tuple(order)} is not an order of the dims of shape {x.shape}.")
        return Expression("transpose", tuple(x.shape[d] for d in order), (x,), (tuple(order),))

    @staticmethod
    def reshape(x: Expression, shape: tuple[int, ...]) -> Expression:
        """The same elements in the same row-major order."""
        if prod(shape) != prod(x.shape):
            raise LayoutError(f"shape {x.shape} cannot become {shape}.")
        return Expression("reshape", shape, (x,))

    @staticmethod
    def cut(x: Expression, dim: int, start: int, stop: int) -> Expression:
        """The elements ``start:stop`` along ``dim``."""
        if not 0 <= start < stop <= x.shape[dim]:
            raise LayoutError(f"{start}:{stop} is no part of dim {dim} of shape {x.shape}.")
        shape = (*x.shape[:dim], stop - start, *x.shape[dim + 1 :])
        return Expression("cut", shape, (x,), (dim, start, stop))

    @staticmethod
    def join(xs: Sequence[Expression], dim: int, name: str) -> Expression:
        """``xs`` one after the other along ``dim``."""
        first = xs[0].shape
        for x in xs:
            if (*x.shape[:dim], *x.shape[dim + 1 :]) != (*first[:dim], *first[dim + 1 :]):
                raise LayoutError(f"{name}: {first} and {x.shape} do not join along dim {dim}.")
        shape = (*first[:dim], sum(x.shape[dim] for x in xs), *first[dim + 1 :])
        return Expression("join", shape, tuple(xs), (dim,))

    @staticmethod
    def repeat(x: Expression, dim: int, times: int) -> Expression:
        """``x`` with ``dim``, of length 1, repeated."""
        shape = (*x.shape[:dim], times, *x.shape[dim + 1 :])
        return Expression("repeat", shape, (x,))

    @staticmethod
    def pad(x: Expression, dim: int, length: int) -> Expression:
        """``x`` with zeros after it along ``dim``, up to ``length``."""
        shape = (*x.shape[:dim], length, *x.shape[dim + 1 :])
        return Expression("pad", shape, (x,), (dim,))

    @staticmethod
    def cast(x: Expression, dtype: DType) -> Expression:
        """The values of ``x`` rounded to ``dtype``."""
        return Expression("cast", x.shape, (x,), (dtype,))

    @staticmethod
    def scaled(
        x: Expression, scale: Expression, block: tuple[int, int], dtype: DType
    ) -> Expression:
        """The true values of a matrix whose blocks each have a factor in ``scale``."""
        return Expression("scaled", x.shape, (x, scale), (block, dtype))


def evaluate(made: Mapping[str, Expression], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``made``: on the devices if ``arrays`` are JAX's, else with NumPy."""
    import numpy as np  # noqa: PLC0415 - descriptions do without it

    result: dict[str, Any] = {}
    for name, expression in made.items():
        if expression.kind == "leaf":
            result[name] = arrays[expression.how[0]]
            continue
        numbers: dict[str, int] = {}
        general = _numbered(expression, numbers)
        inputs = [arrays[leaf] for leaf in numbers]
        if all(isinstance(x, np.ndarray) for x in inputs):
            result[name] = np.ascontiguousarray(value(general, inputs, np))
        else:
            result[name] = _compiled(general)(*inputs)
    return result


def _numbered(expression: Expression, numbers: dict[str, int]) -> Expression:
    """``expression`` with numbers for its leaves' names, the same for every layer."""
    if expression.kind == "leaf":
        name = expression.how[0]
        return leaf(numbers.setdefault(name, len(numbers)), expression.shape)
    inputs = tuple(_numbered(x, numbers) for x in expression.inputs)
    return Expression(expression.kind, expression.shape, inputs, expression.how)


@lru_cache(maxsize=1024)
def _compiled(expression: Expression) -> Any:
    import jax  # noqa: PLC0415 - only who has arrays on devices has JAX
    import jax.numpy as jnp  # noqa: PLC0415

    return jax.jit(lambda *inputs: value(expression, inputs, jnp))


def value(expression: Expression, inputs: Sequence[Any], xp: Any) -> Any:
    """The value of an expression whose leaves are numbers of ``inputs``, with NumPy or jnp."""
    kind, how, shape = expression.kind, expression.how, expression.shape
    if kind == "leaf":
        return inputs[how[0]]
    xs = [value(x, inputs, xp) for x in expression.inputs]
    return _KINDS[kind](xs, shape, how, xp)


def _pad(xs: Sequence[Any], shape: tuple[int, ...], how: tuple[Any, ...], xp: Any) -> Any:
    x, dim = xs[0], how[0]
    rest = (*shape[:dim], shape[dim] - x.shape[dim], *shape[dim + 1 :])
    return xp.concatenate([x, xp.zeros(rest, x.dtype)], axis=dim)


def _scaled(xs: Sequence[Any], shape: tuple[int, ...], how: tuple[Any, ...], xp: Any) -> Any:
    block, dtype = how
    row, column = (xp.arange(n) // b for n, b in zip(shape, block, strict=True))
    factors = xs[1].astype("float32")[row][:, column]
    return (xs[0].astype("float32") * factors).astype(numpy_dtype(dtype))


_KINDS: dict[str, Callable[[Sequence[Any], tuple[int, ...], tuple[Any, ...], Any], Any]] = {
    "transpose": lambda xs, shape, how, xp: xp.transpose(xs[0], how[0]),
    "reshape": lambda xs, shape, how, xp: xp.reshape(xs[0], shape),
    "cut": lambda xs, shape, how, xp: xs[0][(slice(None),) * how[0] + (slice(*how[1:]),)],
    "join": lambda xs, shape, how, xp: xp.concatenate(xs, axis=how[0]),
    "repeat": lambda xs, shape, how, xp: xp.broadcast_to(xs[0], shape),
    "pad": _pad,
    "cast": lambda xs, shape, how, xp: xs[0].astype(numpy_dtype(how[0])),
    "scaled": _scaled,
}
