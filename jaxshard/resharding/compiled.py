"""The compiled route: XLA programs on one set of devices, with intermediate shardings.

The program is the identity with other output shardings. XLA may replicate a whole tensor on
every device to get there, and for some pairs does. So the intermediates of every program are
checked after compiling, and a pair that fails is routed through one or two intermediate
shardings of the same mesh. If none is within the bound, this route is not available.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, pairwise, permutations, product
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from ..core.layout import Axes, Spec
from ..core.runtime import cached
from ..devices.mesh import placement_of
from .geometry import ShardingChange, as_bits, bits_of, from_bits

_MAX_ORDERS = 720  # all orders of six axes (64 devices); with more axes, the first ones


def paths(axes: Axes, source: Spec, target: Spec) -> Iterator[list[Spec]]:
    """Yield one or two intermediate specs between ``source`` and ``target``, lazily.

    Every step has an inverse, so the last spec is searched among the steps from the target. No
    intermediate shard is larger than the larger end's.

    >>> axes = (("a", 2), ("b", 2), ("c", 2))
    >>> next(paths(axes, (("b",), ("a",)), (("b", "c", "a"), ())))
    [(('b', 'c'), ('a',))]
    """
    least_parts = min(_parts(axes, source), _parts(axes, target))
    last = {s for s in _next_specs(axes, target) if _parts(axes, s) >= least_parts} - {source}
    first = [s for s in _next_specs(axes, source) if _parts(axes, s) >= least_parts and s != target]
    for spec in first:
        if spec in last:
            yield [spec]
    for spec in first:
        for other in _next_specs(axes, spec):
            if other in last:
                yield [spec, other]


@cached(4096)
def _next_specs(axes: Axes, spec: Spec) -> tuple[Spec, ...]:
    used = {a for dim in spec for a in dim}
    found: dict[Spec, None] = {}
    for d, split in enumerate(spec):
        for moved in range(1, len(split) + 1):  # exchange
            for other in range(len(spec)):
                if other != d:
                    changed = list(spec)
                    changed[d] = split[:-moved]
                    changed[other] = spec[other] + split[-moved:]
                    found[tuple(changed)] = None
        if split:  # gather
            found[_with(spec, d, split[:-1])] = None
        for name, _ in axes:  # slice
            if name not in used:
                found[_with(spec, d, (*split, name))] = None
    for other_spec in _same_counts(axes, tuple(len(dim) for dim in spec)):  # permute
        if _counts(axes, other_spec) == _counts(axes, spec):
            found[other_spec] = None
    found.pop(spec, None)
    return tuple(found)


@cached(256)
def _same_counts(axes: Axes, lengths: tuple[int, ...]) -> tuple[Spec, ...]:
    """Return every spec with that many axes per dim."""
    names = [a for a, _ in axes]
    specs = []
    for order in islice(permutations(names, sum(lengths)), _MAX_ORDERS):
        left = list(order)
        specs.append(tuple(tuple(left.pop(0) for _ in range(n)) for n in lengths))
    return tuple(specs)


def _with(spec: Spec, dim: int, split: tuple[str, ...]) -> Spec:
    return (*spec[:dim], split, *spec[dim + 1 :])


def _counts(axes: Axes, spec: Spec) -> tuple[int, ...]:
    size: Mapping[str, int] = dict(axes)
    return tuple(prod(size[a] for a in dim) for dim in spec)


def _parts(axes: Axes, spec: Spec) -> int:
    return prod(_counts(axes, spec))


# --- The common mesh of two shardings, its axes factored into primes


@dataclass(frozen=True, slots=True)
class CommonMesh:
    """Factored mesh over ``devices``, and the specs of both ends on it, one entry per dim."""

    devices: tuple[jax.Device, ...]
    axes: Axes
    source: Spec
    target: Spec

    def sharding(self, spec: Spec) -> NamedSharding:
        """Return the sharding of ``spec`` on the mesh."""
        return NamedSharding(
            _mesh(self.devices, self.axes), PartitionSpec(*(d or None for d in spec))
        )


@cached(4096)
def common_mesh(source: NamedSharding, target: NamedSharding, num_dims: int) -> CommonMesh | None:
    """Return the common mesh of two shardings of a tensor of ``num_dims``, or None."""
    devices = tuple(source.mesh.devices.flat)
    number = {device: n for n, device in enumerate(devices)}
    if set(target.mesh.devices.flat) != set(devices):
        return None
    source_axes = _factors(np.arange(len(devices)).reshape(source.mesh.devices.shape))
    numbers = np.array([number[d] for d in target.mesh.devices.flat], dtype=int)
    target_axes = _factors(numbers.reshape(target.mesh.devices.shape))
    if source_axes is None or target_axes is None:
        return None
    strides = sorted({f for axis in (*source_axes, *target_axes) for f in axis}, reverse=True)
    if any(a != b * size for (a, _), (b, size) in pairwise(strides)):
        return None  # 2×3 and 3×2: strides 3, 2 and 1 do not form a mesh
    names = {stride: f"f{n}" for n, (stride, _) in enumerate(strides)}
    return CommonMesh(
        devices,
        tuple((names[stride], size) for stride, size in strides),
        _spec(source, source_axes, names, num_dims),
        _spec(target, target_axes, names, num_dims),
    )


_Factor = tuple[int, int]  # stride in device numbers, size


def _factors(numbers: np.ndarray[tuple[int, ...], np.dtype[np.int_]]) -> list[list[_Factor]] | None:
    """Return the prime factors of each mesh axis, outer to inner; None if not strided."""
    primes = [_primes(n) for n in numbers.shape]
    fine = numbers.reshape([p for axis in primes for p in axis])
    origin = (0,) * fine.ndim
    if fine[origin] != 0:
        return None
    strides = [int(fine[(*origin[:k], 1, *origin[k + 1 :])]) for k in range(fine.ndim)]
    for at in product(*map(range, fine.shape)):
        if fine[at] != sum(i * s for i, s in zip(at, strides, strict=True)):
            return None
    left = iter(zip(strides, fine.shape, strict=True))
    return [[next(left) for _ in axis] for axis in primes]


def _spec(
    named: NamedSharding, factors: list[list[_Factor]], names: dict[int, str], num_dims: int
) -> Spec:
    of = dict(zip(named.mesh.axis_names, factors, strict=True))
    spec = placement_of(named).spec
    split = tuple(tuple(names[s] for a in axes for s, _ in of[a]) for axes in spec)
    return split + ((),) * (num_dims - len(split))


def _primes(n: int) -> list[int]:
    """Return the prime factors of ``n``, smallest first.

    >>> _primes(12)
    [2, 2, 3]
    """
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found


@cached(256)
def _mesh(devices: tuple[jax.Device, ...], axes: Axes) -> Mesh:
    sizes = [n for _, n in axes]
    grid = np.array(devices, dtype=object).reshape(sizes)
    assert grid.size == prod(sizes)
    return Mesh(grid, tuple(a for a, _ in axes), axis_types=(AxisType.Auto,) * len(axes))


# --- The route: programs on one set of devices

#: The largest intermediate, as a multiple of the larger shard.
MAX_RATIO = 1.25

_MAX_DETOURS = 12  # compiled before giving up; the first has sufficed so far


@cached(4096)
def route(move: ShardingChange) -> tuple[ShardingChange, ...] | None:
    """Split ``move`` into moves of one program each, within the bound; None if impossible.

    The choice is made with a small tensor of the same shardings, and holds for every shape.
    """
    if not isinstance(move.source, NamedSharding) or not isinstance(move.target, NamedSharding):
        return None
    ends = common_mesh(move.source, move.target, len(move.shape))
    if ends is None:
        return None
    between = _between(ends, move.dtype)
    if between is None:
        return None
    stops = [ends.sharding(s) for s in (ends.source, *between, ends.target)]
    if not all(_divides(s, move.shape) for s in stops):
        return None
    return tuple(ShardingChange(move.shape, move.dtype, a, b) for a, b in pairwise(stops))


@cached(4096)
def _between(ends: CommonMesh, dtype: np.dtype[np.generic]) -> tuple[Spec, ...] | None:
    detours = islice(paths(ends.axes, ends.source, ends.target), _MAX_DETOURS)
    ways: Iterator[Sequence[Spec]] = chain([()], detours)
    shape = _small_shape(len(ends.devices), len(ends.source))
    for way in ways:
        stops = [ends.sharding(s) for s in (ends.source, *way, ends.target)]
        limit = _limit([ShardingChange(shape, dtype, stops[0], stops[-1])])
        steps = pairwise(stops)
        if all(_largest_bytes(ShardingChange(shape, dtype, a, b)) <= limit for a, b in steps):
            return tuple(way)
    return None


def _small_shape(num_devices: int, num_dims: int) -> tuple[int, ...]:
    """Return a shape that any spec over the devices divides, larger than index tables.

    >>> _small_shape(8, 2)
    (184, 184)
    """
    return (num_devices * -(-round(32768 ** (1 / num_dims)) // num_devices),) * num_dims


def _divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


def _limit(moves: Sequence[ShardingChange]) -> int:
    return int(MAX_RATIO * max(m.shard_bytes for m in moves))


@cached(4096)
def _largest_bytes(move: ShardingChange) -> int:
    return program((move,)).executable.largest_bytes


@dataclass(frozen=True)
class CompiledProgram:
    """Compiled program that moves several arrays, each between its own shardings."""

    moves: tuple[ShardingChange, ...]
    executable: Executable

    @property
    def fits(self) -> bool:
        """Whether every intermediate is within the bound of the arrays that it depends on."""
        return self.executable.largest_bytes <= _limit(self.moves) and all(
            num_bytes <= _limit([self.moves[n] for n in numbers])
            for numbers, num_bytes in self.executable.largest_made_of.items()
            if numbers
        )

    def __call__(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Return the arrays at the targets of their moves; they must be at the sources."""
        return list(self.executable.call(*arrays))


@cached(4096)
def program(moves: tuple[ShardingChange, ...]) -> CompiledProgram:
    """Compile the program for ``moves``, once for each tuple of them."""
    executable = compile_program(
        lambda *arrays: [_take(m, x) for m, x in zip(moves, arrays, strict=True)],
        [jax.ShapeDtypeStruct(m.shape, m.dtype) for m in moves],
        in_shardings=tuple(m.source for m in moves),
        out_shardings=[m.target for m in moves],
    )
    return CompiledProgram(moves, executable)


def _take(move: ShardingChange, array: jax.Array) -> jax.Array:
    bits = as_bits(array)
    if bits is array:
        return array
    for sharding in (move.source, move.target):
        bits = jax.lax.with_sharding_constraint(bits, sharding)
    return from_bits(bits, move.dtype)


# --- Compiled programs: ahead-of-time compilation and memory analysis

_INDEX_BYTES = 1024  # tables of device numbers and offsets, of constant size
_INDEX_KINDS = ("s32", "u32", "s64", "u64", "pred")
_DIGITS = re.compile(r"\d+")
_NAME = re.compile(r"%([\w.-]+)")
_PARAMETER = re.compile(r" parameter\((\d+)\)")
_BUFFER = re.compile(r"\b(pred|[subfc]\d+|bf16|f8e\w+|f4e\w+)\[([\d,]*)\]")


@contextmanager
def own_context() -> Iterator[None]:
    """Override the caller's ``jax.set_mesh`` and ``jax.enable_x64``.

    JAX refuses programs over another mesh than that of `jax.set_mesh`, and without
    ``enable_x64`` it silently truncates 64-bit values to 32.
    """
    with jax.enable_x64(True), jax.set_mesh(None):
        yield


@dataclass(frozen=True)
class Executable:
    """Compiled program, and its memory on each device.

    Attributes:
        largest_bytes: the largest array in it, arguments and results included.
        largest_made_of: the largest array for each set of arguments (by number) that arrays
            depend on.
        temporary_bytes: bytes of temporaries, as counted by the compiler.
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
    """Compile ``function``, whose arguments are ``inputs``."""
    jitted = jax.jit(function, in_shardings=in_shardings, out_shardings=out_shardings)
    # Compiled.__call__ accepts only packed sub-byte arrays, which XLA:CPU does not have
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
    """Add the memory layout of arrays to ``inputs``, or calls would compile again."""

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
    """Return the bytes of the largest array in a compiled program.

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
    """Return the bytes of the largest array for each set of arguments it depends on.

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
        for other in used:  # including the computations that it calls
            called_with[other] |= made_of[name]
        largest[made_of[name]] = max(largest[made_of[name]], largest_array_bytes(rest))
    for computation, lines in reversed(
        others.items()
    ):  # callers follow the computations that they call
        numbers = called_with[computation]
        for _, rest in lines:
            for other in _NAME.findall(rest):
                called_with[other] |= numbers
            largest[numbers] = max(largest[numbers], largest_array_bytes(rest))
    return dict(largest)


_Lines = list[tuple[str, str]]  # the name of an instruction, and the rest of it


def _computations(text: str) -> tuple[_Lines, dict[str, _Lines]]:
    """Return the instructions of the entry, and those of every other computation by name."""
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
