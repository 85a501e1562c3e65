"""Compiled programs: compile ahead of the first call, read their memory, call them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from .bits import bits_of

_INDEX_BYTES = 1024  # tables of device numbers and offsets, which do not grow with the tensor
_DIGITS = re.compile(r"\d+")
_BUFFER = re.compile(r"\b(pred|[subfc]\d+|bf16|f8e\w+|f4e\w+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Executable:
    """A compiled program, and what it needs on each device beside arguments and results.

    Attributes:
        largest_bytes: the largest array in it, arguments and results included.
        temporary_bytes: all its temporaries, as the compiler counts them.
    """

    call: Callable[..., Any]
    compiled: jax.stages.Compiled
    largest_bytes: int
    temporary_bytes: int


def compile_program(
    function: Callable[..., Any],
    inputs: Sequence[jax.ShapeDtypeStruct | list[jax.ShapeDtypeStruct]],
    in_shardings: Any,
    out_shardings: Any,
) -> Executable:
    """``function`` compiled for ``inputs``, which it takes one by one."""
    jitted = jax.jit(function, in_shardings=in_shardings, out_shardings=out_shardings)
    with jax.enable_x64(True):
        compiled = jitted.lower(*inputs).compile()
    # Compiled.__call__ refuses sub-byte arrays: it asks for packed ones, and XLA:CPU makes none
    narrow = any(bits_of(x.dtype) < 8 for x in jax.tree.leaves(list(inputs)))
    memory = compiled.memory_analysis()
    return Executable(
        jitted if narrow else compiled,
        compiled,
        largest_array_bytes(compiled.as_text() or ""),
        int(memory.temp_size_in_bytes) if memory is not None else 0,
    )


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
        if size > _INDEX_BYTES or kind not in ("s32", "u32", "pred"):
            largest = max(largest, size)
    return largest
