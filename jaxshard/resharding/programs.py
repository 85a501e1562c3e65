"""Compiled programs: ahead-of-time compilation and memory analysis."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import Sharding

from ..core.cache import cached
from .geometry import bits_of

_INDEX_BYTES = 1024  # tables of device numbers and offsets, which do not grow with the tensor
_INDEX_KINDS = ("s32", "u32", "s64", "u64", "pred")
_DIGITS = re.compile(r"\d+")
_NAME = re.compile(r"%([\w.-]+)")
_PARAMETER = re.compile(r" parameter\((\d+)\)")
_BUFFER = re.compile(r"\b(pred|[subfc]\d+|bf16|f8e\w+|f4e\w+)\[([\d,]*)\]")


@contextmanager
def own_context() -> Iterator[None]:
    """While it is open, neither the caller's mesh nor its ``enable_x64`` has a say.

    JAX refuses a program over another mesh than that of `jax.set_mesh`, and outside
    ``enable_x64`` it cuts 64-bit values to 32 without a word.
    """
    with jax.enable_x64(True), jax.set_mesh(None):
        yield


@dataclass(frozen=True)
class Executable:
    """A compiled program, and what it needs on each device beside arguments and results.

    Attributes:
        largest_bytes: the largest array in it, arguments and results included.
        largest_made_of: the largest of the arrays that are made of the same arguments (by number).
        temporary_bytes: all its temporaries, as the compiler counts them.
    """

    call: Callable[..., Any]
    compiled: jax.stages.Compiled
    largest_bytes: int
    largest_made_of: Mapping[frozenset[int], int]
    temporary_bytes: int


def compile_program(
    function: Callable[..., Any],
    inputs: Sequence[jax.ShapeDtypeStruct | list[jax.ShapeDtypeStruct]],
    in_shardings: Any,
    out_shardings: Any,
) -> Executable:
    """``function`` compiled for ``inputs``, which it takes one by one."""
    jitted = jax.jit(function, in_shardings=in_shardings, out_shardings=out_shardings)
    # Compiled.__call__ refuses sub-byte arrays: it asks for packed ones, and XLA:CPU makes none
    narrow = any(bits_of(x.dtype) < 8 for x in jax.tree.leaves(list(inputs)))
    with own_context():
        if narrow:
            inputs = _as_held(inputs, in_shardings)
        compiled = jitted.lower(*inputs).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    return Executable(
        jitted if narrow else compiled,
        compiled,
        largest_array_bytes(text),
        largest_made_of(text),
        int(memory.temp_size_in_bytes) if memory is not None else 0,
    )


def _as_held(inputs: Sequence[Any], shardings: Any) -> list[Any]:
    """``inputs`` with the memory layout that arrays have; calls would compile again without it."""

    def held(x: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
        layout = _layout(np.dtype(x.dtype), len(x.shape), next(iter(sharding.device_set)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=Format(layout, sharding))

    if isinstance(shardings, tuple):
        return [held(x, sharding) for x, sharding in zip(inputs, shardings, strict=True)]
    return [jax.tree.map(lambda x: held(x, shardings), each) for each in inputs]


@cached(128)
def _layout(dtype: np.dtype[np.generic], num_dims: int, device: jax.Device) -> Any:
    return jax.device_put(np.zeros((1,) * num_dims, dtype), device).format.layout


def largest_array_bytes(text: str) -> int:
    """Bytes of the largest array that is mentioned in a compiled program.

    >>> largest_array_bytes("%p = bf16[8,4]{1,0} parameter(0), %t = s32[8]{0} constant(...)")
    64
    """
    largest = 0
    for kind, dims in _BUFFER.findall(text):
        digits = _DIGITS.search(kind)
        itemsize = max(int(digits[0]) // 8, 1) if digits else 1
        size = prod(map(int, filter(None, dims.split(",")))) * itemsize
        if size > _INDEX_BYTES or kind not in _INDEX_KINDS:
            largest = max(largest, size)
    return largest


def largest_made_of(text: str) -> dict[frozenset[int], int]:
    """Bytes of the largest array for each set of arguments that arrays are made of.

    >>> text = '''
    ... ENTRY %main (a: f32[8], b: f32[2]) -> (f32[8], f32[4]) {
    ...   %a = f32[8]{0} parameter(0)
    ...   %b = f32[2]{0} parameter(1)
    ...   %twice = f32[4]{0} concatenate(%b, %b), dimensions={0}
    ...   ROOT %both = (f32[8]{0}, f32[4]{0}) tuple(%a, %twice)
    ... }'''
    >>> {tuple(sorted(numbers)): n for numbers, n in largest_made_of(text).items()}
    {(0,): 32, (1,): 16, (0, 1): 32}
    """
    entry, others = _computations(text)
    made_of: dict[str, frozenset[int]] = {}
    called_with: dict[str, frozenset[int]] = defaultdict(frozenset)
    largest: dict[frozenset[int], int] = defaultdict(int)
    for name, rest in entry:
        found = _PARAMETER.search(rest)
        numbers = frozenset([int(found[1])] if found else [])
        used = _NAME.findall(rest)
        made_of[name] = numbers.union(*(made_of.get(x, ()) for x in used))
        for other in used:  # the computations that it calls, among them
            called_with[other] |= made_of[name]
        largest[made_of[name]] = max(largest[made_of[name]], largest_array_bytes(rest))
    for computation, lines in reversed(others.items()):  # callers stand below what they call
        numbers = called_with[computation]
        for _, rest in lines:
            for other in _NAME.findall(rest):
                called_with[other] |= numbers
            largest[numbers] = max(largest[numbers], largest_array_bytes(rest))
    return dict(largest)


_Lines = list[tuple[str, str]]  # the name of an instruction, and the rest of it


def _computations(text: str) -> tuple[_Lines, dict[str, _Lines]]:
    """The instructions of the entry, and those of every other computation by its name."""
    entry: _Lines = []
    others: dict[str, _Lines] = {}
    lines: _Lines = []
    for line in text.splitlines():
        if line.endswith("{") and (name := _NAME.search(line)):
            lines = entry if line.startswith("ENTRY") else others.setdefault(name[1], [])
        elif " = " in line and line.startswith(" "):
            name_part, rest = line.split(" = ", 1)
            lines.append((name_part.split()[-1].lstrip("%"), rest))
    return entry, others
