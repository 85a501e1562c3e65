"""Mappings applied to arrays in memory, with NumPy or JAX.

All layers of a model share one expression with different leaves, so it is compiled once. JAX
is imported only to evaluate JAX arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.dtypes import CODES, DType
from ..core.numpy_dtypes import code_values, held_as, numpy_dtype, stored_as
from ..core.runtime import cached
from ..errors import LayoutError, format_list
from .algebra import (
    check_affine,
    check_bits,
    check_cast,
    check_code,
    check_cut,
    check_join,
    check_order,
    check_repeat,
    check_reshape,
    check_scales,
)


@dataclass(frozen=True, slots=True)
class Expression:
    """A lazy array: an operation ``kind`` on ``inputs``; a leaf is a named or numbered array.

    Attributes:
        dtype: the NumPy name of the dtype.
        how: the operation's arguments.
        name: the source tensor, for messages.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    inputs: tuple[Expression, ...] = ()
    how: tuple[Any, ...] = ()
    name: str = field(default="", compare=False)


def leaf(name: str | int, shape: tuple[int, ...], dtype: str) -> Expression:
    """Return the expression of an existing array."""
    return Expression("leaf", shape, dtype, (), (name,), str(name))


class Expressions:
    """The algebra of lazy arrays: it records operations and computes nothing."""

    @staticmethod
    def shape(x: Expression) -> tuple[int, ...]:
        """Elements along each dim."""
        return x.shape

    @staticmethod
    def transpose(x: Expression, order: Sequence[int]) -> Expression:
        """Dim ``i`` of the result is dim ``order[i]`` of ``x``."""
        check_order(x.name, order, x.shape)
        return _of(x, "transpose", tuple(x.shape[d] for d in order), tuple(order))

    @staticmethod
    def reshape(x: Expression, shape: tuple[int, ...]) -> Expression:
        """The same elements in the same row-major order."""
        check_reshape(x.name, x.shape, shape)
        return _of(x, "reshape", shape)

    @staticmethod
    def cut(x: Expression, dim: int, start: int, stop: int) -> Expression:
        """The elements ``start:stop`` along ``dim``."""
        check_cut(x.name, x.shape, dim, start, stop)
        return _of(x, "cut", _with_length(x.shape, dim, stop - start), dim, start, stop)

    @staticmethod
    def join(xs: Sequence[Expression], dim: int, name: str) -> Expression:
        """``xs`` concatenated along ``dim``."""
        check_join(name, dim, [(x.name, x.shape, x.dtype) for x in xs])
        shape = _with_length(xs[0].shape, dim, sum(x.shape[dim] for x in xs))
        return Expression("join", shape, xs[0].dtype, tuple(xs), (dim,), name)

    @staticmethod
    def repeat(x: Expression, dim: int, times: int) -> Expression:
        """``x`` with ``dim``, of length 1, repeated."""
        check_repeat(x.name, x.shape, dim)
        return _of(x, "repeat", _with_length(x.shape, dim, times))

    @staticmethod
    def pad(x: Expression, dim: int, length: int) -> Expression:
        """``x`` padded with zeros along ``dim`` to ``length``."""
        return _of(x, "pad", _with_length(x.shape, dim, length), dim)

    @staticmethod
    def cast(x: Expression, dtype: DType) -> Expression:
        """The values of ``x`` rounded to ``dtype``."""
        check_cast(stored_as(np.dtype(x.dtype)), dtype)
        name = numpy_dtype(dtype).name
        return Expression("cast", x.shape, name, (x,), (dtype,), x.name)

    @staticmethod
    def affine(x: Expression, times: float, plus: float) -> Expression:
        """Each value of ``x`` times ``times`` plus ``plus``, rounded once to the dtype of ``x``."""
        width = check_affine(held_as(np.dtype(x.dtype), x.shape))
        if (times, plus) == (1, 0):
            return x
        return _of(x, "affine", x.shape, times, plus, width)

    @staticmethod
    def decoded(x: Expression, code: str) -> Expression:
        """The values that each integer of ``x`` packs, in float32."""
        check_code(x.name, x.shape, stored_as(np.dtype(x.dtype)), code)
        shape = (*x.shape[:-1], x.shape[-1] * CODES[code].num_values)
        return Expression("decoded", shape, "float32", (x,), (code,), x.name)

    @staticmethod
    def bits_as(x: Expression, dtype: DType) -> Expression:
        """The bits of ``x`` as values of ``dtype``."""
        check_bits(x.name, stored_as(np.dtype(x.dtype)), dtype)
        name = numpy_dtype(dtype).name
        return Expression("bits", x.shape, name, (x,), (dtype,), x.name)

    @staticmethod
    def scaled(
        x: Expression,
        scale: Expression,
        block: tuple[int, int],
        dtype: DType,
        outer: Expression | None = None,
        *,
        divides: bool = False,
    ) -> Expression:
        """The dequantized values of ``x`` with a factor for each block in ``scale``."""
        check_scales(x.name, x.shape, scale.name, scale.shape, block)
        name = numpy_dtype(dtype).name
        inputs = (x, scale) if outer is None else (x, scale, outer)
        return Expression("scaled", x.shape, name, inputs, (block, dtype, divides), x.name)


def _of(x: Expression, kind: str, shape: tuple[int, ...], *how: Any) -> Expression:
    return Expression(kind, shape, x.dtype, (x,), how, x.name)


def _with_length(shape: tuple[int, ...], dim: int, length: int) -> tuple[int, ...]:
    return (*shape[:dim], length, *shape[dim + 1 :])


def evaluate(made: Mapping[str, Expression], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate ``made``: on the devices of JAX arrays, otherwise with NumPy.

    Raises:
        LayoutError: the inputs of one result are on different devices.
    """
    import numpy as np  # noqa: PLC0415 - descriptions do without it

    numbered = {name: _numbered(expression) for name, expression in made.items()}
    for name, (_, leaves) in numbered.items():
        _check_together(name, leaves, arrays)
    result: dict[str, Any] = {}
    together: dict[tuple[str, ...], list[str]] = {}
    for name, (general, leaves) in numbered.items():
        inputs = [arrays[x] for x in leaves]
        if general.kind == "leaf":
            result[name] = inputs[0]
        elif all(isinstance(x, np.ndarray) for x in inputs):
            # ascontiguousarray would give a scalar a dim
            with np.errstate(over="ignore", invalid="ignore"):  # too large becomes inf, as in JAX
                result[name] = np.asarray(value(general, inputs, np), order="C")
        else:
            together.setdefault(leaves, []).append(name)
    for leaves, names in together.items():  # the layers of one stack share one program
        program = _compiled(tuple(numbered[name][0] for name in names))
        result |= zip(names, program(*(arrays[x] for x in leaves)), strict=True)
    return {name: result[name] for name in made}


def _check_together(name: str, leaves: Sequence[str], arrays: Mapping[str, Any]) -> None:
    """Refuse inputs on different devices, which no single program can read."""
    sets: dict[frozenset[Any], str] = {}
    for x in leaves:
        sharding = getattr(arrays[x], "sharding", None)
        if sharding is not None and len(leaves) > 1:
            sets.setdefault(frozenset(sharding.device_set), x)
    if len(sets) > 1:
        places = (
            f"{x} on {format_list((str(n) for n in sorted(d.id for d in devices)), 8)}"
            for devices, x in sets.items()
        )
        raise LayoutError(
            f"{name}: its sources are on different devices ({format_list(places, 2)}), such as "
            "those of several pipeline stages. Move them onto one mesh first: "
            'jaxshard.reshard(arrays, "dp1mp8"), with as many ranks as devices.'
        )


def _numbered(expression: Expression) -> tuple[Expression, tuple[str, ...]]:
    """Replace leaf names by numbers, which all layers share; also return the names."""
    numbers: dict[str, int] = {}

    def general(x: Expression) -> Expression:
        if x.kind == "leaf":
            return leaf(numbers.setdefault(x.how[0], len(numbers)), x.shape, x.dtype)
        return Expression(x.kind, x.shape, x.dtype, tuple(map(general, x.inputs)), x.how)

    return general(expression), tuple(numbers)


@cached(1024)
def _compiled(expressions: tuple[Expression, ...]) -> Any:
    import jax  # noqa: PLC0415 - only for JAX arrays
    import jax.numpy as jnp  # noqa: PLC0415

    def program(*inputs: Any) -> tuple[Any, ...]:
        return tuple(value(x, inputs, jnp) for x in expressions)

    return jax.jit(program)


def value(expression: Expression, inputs: Sequence[Any], xp: Any) -> Any:
    """Evaluate an expression whose leaves are indices of ``inputs``, with NumPy or jnp."""
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
    block, dtype, divides = how
    factors = xs[1].astype("float32")
    if len(xs) > 2:
        outer = xs[2].astype("float32").reshape(())
        factors = factors / outer if divides else factors * outer
    rows, columns = factors.shape[-2:]
    row, column = (xp.arange(n) // b for n, b in zip(shape[-2:], block, strict=True))
    if rows != shape[-2]:
        factors = factors[..., row, :]
    if columns != shape[-1]:
        factors = factors[..., column]
    return (xs[0].astype("float32") * factors).astype(numpy_dtype(dtype))


def _affine(xs: Sequence[Any], shape: tuple[int, ...], how: tuple[Any, ...], xp: Any) -> Any:
    times, plus, width = how
    kind = numpy_dtype(width).type
    x = xs[0].astype(kind)
    if xp is not np:
        x = _product(x, kind(times))  # also by 1: no earlier product or sum is joined to this one
    elif times != 1:
        x = x * kind(times)
    return (x + kind(plus) if plus else x).astype(xs[0].dtype)


def _product(x: Any, times: Any) -> Any:
    """``x * times`` in JAX, rounded as IEEE 754 defines.

    XLA replaces subnormal values by zero on CPUs, and fuses a product with a sum. Therefore this
    computes products near or below the smallest normal number from integers, and returns all of
    them through integers.
    """
    import jax.numpy as jnp  # noqa: PLC0415 - only for JAX arrays

    info = np.finfo(times.dtype)
    word = np.dtype(f"uint{info.bits}").type
    one = 1 << info.nmant  # the smallest normal number, as an integer
    lift = word((info.nmant - int(info.minexp)) << info.nmant)  # the smallest number becomes 1
    top = word(1 << (info.bits - 1))
    plain = x * times
    size = _recast(x, word) & ~top
    is_small = (size < one) | ((_recast(plain, word) & ~top) < 2 * one)
    lifted = jnp.where(size < one, size.astype(x.dtype), _recast(size + lift, x.dtype))
    product = lifted * abs(times)
    # The rounding error of the product, from halves whose products are exact (Dekker)
    half = info.nmant // 2 + 1
    high = abs(times) * times.dtype.type((1 << half) + 1)
    high = high - (high - abs(times))
    low = abs(times) - high
    x_high = _recast(_recast(lifted, word) & ~word((1 << half) - 1), x.dtype)
    x_low = lifted - x_high
    error = ((x_high * high - product) + x_low * high + x_high * low) + x_low * low
    floor = jnp.floor(product)
    rest, count = product - floor, floor.astype(word)
    is_up = (rest > 0.5) | ((rest == 0.5) & ((error > 0) | ((error == 0) & (count % 2 == 1))))
    small = jnp.where(product < one, count + is_up, _recast(product, word) - lift)
    sign = (_recast(x, word) & top) ^ (top if times < 0 else word(0))
    return _recast(jnp.where(is_small, small | sign, _recast(plain, word)), x.dtype)


def _recast(x: Any, dtype: Any) -> Any:
    from jax import lax  # noqa: PLC0415 - only for JAX arrays

    return lax.bitcast_convert_type(x, dtype)


def _decoded(xs: Sequence[Any], shape: tuple[int, ...], how: tuple[Any, ...], xp: Any) -> Any:
    bits, _ = CODES[how[0]]
    places = xp.arange(CODES[how[0]].num_values, dtype=xs[0].dtype) * bits
    numbers = (xs[0][..., None] >> places) & ((1 << bits) - 1)
    return xp.asarray(code_values(how[0]))[numbers].reshape(shape)


_KINDS: dict[str, Callable[[Sequence[Any], tuple[int, ...], tuple[Any, ...], Any], Any]] = {
    "transpose": lambda xs, shape, how, xp: xp.transpose(xs[0], how[0]),
    "reshape": lambda xs, shape, how, xp: xp.reshape(xs[0], shape),
    "cut": lambda xs, shape, how, xp: xs[0][(slice(None),) * how[0] + (slice(*how[1:]),)],
    "join": lambda xs, shape, how, xp: xp.concatenate(xs, axis=how[0]),
    "repeat": lambda xs, shape, how, xp: xp.broadcast_to(xs[0], shape),
    "pad": _pad,
    "cast": lambda xs, shape, how, xp: xs[0].astype(numpy_dtype(how[0])),
    "affine": _affine,
    "decoded": _decoded,
    "bits": lambda xs, shape, how, xp: xs[0].view(numpy_dtype(how[0])),
    "scaled": _scaled,
}
