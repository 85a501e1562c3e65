"""Arrays from filled buffers: the memory of shards, single tensors, and many small ones at once.

    CPU     the array aliases the buffer; replicas share it
    others  one transfer per distinct shard, then copies from device to device for replicas;
            also on CPU devices with ``copy=True``

An array is always made from the shards of this process's devices: ``device_put`` of a whole
NumPy array compares it with those of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import (
    dataclass,
    field,
    replace,
)
from itertools import chain
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Sharding
from numpy.typing import NDArray

from ..core.cache import cached
from ..core.catalog import Catalog, Tensor
from ..core.interpreter import paused
from ..core.numpy_dtypes import Bytes, Conversion, NumpyDType, numpy_dtype
from ..devices.host_memory import (
    ALIGNMENT,
    UNALIGNED,
    Prepare,
    allocate,
    unaligned_empty,
)
from ..errors import LayoutError
from ..formats.registry import Orbax, format_of
from ..planning.bundles import SMALL_BYTES, Bundle, bundled, small_bytes
from ..storage.io import Source
from ..storage.local import FolderVersions
from ..storage.resources import (
    LEAST_BYTES,
    Budget,
    Counts,
    WorkQueue,
    default_budget,
    fit_budget,
    run_threads,
)
from .requests import (
    ArrayRequest,
    ShardRequest,
    TensorRequest,
    adopts,
    is_kept,
    requests_of,
)

Shaped = NDArray[np.generic]
Use = Sequence[tuple[jax.Device, int]]


def place(
    request: TensorRequest, memory: Sequence[Bytes], *, adopted: bool = True
) -> list[jax.Array]:
    """Make the arrays of ``request``, whose shards are in ``memory``.

    Transfers are complete at the return. CPU devices alias the memory if ``adopted``; otherwise
    it is unaligned, so they copy it.
    """
    shards = [as_array(m, shard) for m, shard in zip(memory, request.shards, strict=True)]
    arrays = []
    for want, use in zip(request.wants, request.uses, strict=True):
        with keeping_64_bits(want.dtype.itemsize):
            if adopted and adopts([device for device, _ in use]):
                arrays.append(_adopted(request, want, use, shards))
            else:
                arrays.append(_transferred(request, want, use, shards))
    return arrays


def _adopted(
    request: TensorRequest, want: ArrayRequest, use: Use, shards: Sequence[Shaped]
) -> jax.Array:
    """Make an array that aliases ``shards``."""
    shape = request.tensor.shape
    if not use:  # no device is of this process, but the callback would be called
        return jax.make_array_from_single_device_arrays(shape, want.sharding, [], dtype=want.dtype)
    indices = want.sharding.addressable_devices_indices_map(shape)
    at = {_key(indices[device]): shards[number] for device, number in use}
    return jax.make_array_from_callback(
        shape, want.sharding, lambda index: at[_key(index)], dtype=want.dtype
    )


def _transferred(
    request: TensorRequest, want: ArrayRequest, use: Use, shards: Sequence[Shaped]
) -> jax.Array:
    """Transfer each shard to one device, and from there to its replicas."""
    at: dict[int, jax.Device] = {}
    for device, number in use:
        at.setdefault(number, device)
    sent = jax.device_put([shards[number] for number in at], list(at.values()))
    first = dict(zip(at, sent, strict=True))
    parts = [
        first[number] if device == at[number] else jax.device_put(first[number], device)
        for device, number in use
    ]
    array = jax.make_array_from_single_device_arrays(
        request.tensor.shape, want.sharding, parts, dtype=want.dtype
    )
    array.block_until_ready()
    return array


def _key(index: tuple[slice, ...] | None) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((s.start, s.stop) for s in index or ())


def keeping_64_bits(itemsize: int) -> AbstractContextManager[object]:
    """Enable 64-bit dtypes for elements of 8 bytes, which JAX otherwise truncates silently."""
    return jax.enable_x64(True) if itemsize >= 8 else nullcontext()


def check_dtypes(
    requests: Sequence[TensorRequest],
    others: Iterable[tuple[str, np.dtype[np.generic], jax.Device]] = (),
) -> None:
    """Check that the devices support the dtypes, by transferring one element of each.

    Args:
        requests: tensors to load.
        others: names, dtypes and devices of further tensors.

    Raises:
        LayoutError: with the name of a tensor and the error of JAX.
    """
    tried: set[tuple[str, np.dtype[np.generic]]] = set()
    used = (
        (request.tensor.name, want.dtype, device)
        for request in requests
        for want, use in zip(request.wants, request.uses, strict=True)
        for device, _ in use[:1]
    )
    for name, dtype, device in chain(used, others):
        if (device.platform, dtype) in tried:
            continue
        tried.add((device.platform, dtype))
        try:
            with keeping_64_bits(dtype.itemsize):
                made = jax.device_put(np.zeros(1, dtype), device)
        except Exception as error:  # backends raise different types
            raise _lacks(name, dtype, device, str(error)) from error
        if made.dtype != dtype:
            raise _lacks(name, dtype, device, f"it returned {made.dtype}")


def _lacks(name: str, dtype: np.dtype[np.generic], device: jax.Device, why: str) -> LayoutError:
    return LayoutError(
        f"{name}: {device} does not support {dtype.name} ({why.splitlines()[0]}). Load it "
        "with another dtype=, or leave such tensors out with exclude=."
    )


# --- Loading through Orbax's library, which makes the arrays itself


def restored_by_orbax(catalog: Catalog, wants: Sequence[ArrayRequest]) -> bool:
    """Return whether Orbax can make every array: as stored, and requested once."""
    names = [want.tensor.name for want in wants]
    return (
        isinstance(format_of(catalog.format), Orbax)
        and len(set(names)) == len(names)
        and all(catalog.tensors.get(want.tensor.name) is want.tensor for want in wants)
    )


def restore(
    catalog: Catalog, wants: Sequence[ArrayRequest], host_bytes: int | None
) -> tuple[list[jax.Array], Counts]:
    """Load the arrays of ``wants`` with Orbax; also return the read statistics.

    Orbax does not report the bytes that it reads; they are counted as those of the distinct
    shards, with one read per tensor.

    Raises:
        LayoutError: there is not the memory, or a device lacks a dtype.
        FormatError: Orbax cannot read them.
    """
    from ..formats import orbax  # noqa: PLC0415 - a second to import, and rarely needed

    todo = [request for request, _ in requests_of(wants)]
    group_bytes = default_budget() if host_bytes is None else host_bytes
    largest = max((request.tensor.num_bytes for request in todo), default=0)
    check_memory(need_of(todo), max(group_bytes, largest))
    check_dtypes(todo)
    versions = FolderVersions(catalog.root)
    found = orbax.load(catalog, {w.tensor.name: (w.dtype, w.sharding) for w in wants}, group_bytes)
    versions.check()
    num_bytes = sum(
        request.tensor.dtype.bits * shard.box.size // 8
        for request in todo
        for shard in request.shards
    )
    counts = Counts(bytes_needed=num_bytes, bytes_read=num_bytes, num_reads=len(todo))
    return [found[want.tensor.name] for want in wants], counts


# --- Small tensors of a load: adjacent ones are one read and one ``device_put``

_BUNDLE_BYTES = 256 << 10
_Kind = tuple[Sharding, NumpyDType]


@dataclass(frozen=True)
class SmallArrays:
    """Bundles of small tensors of a load.

    Attributes:
        bundles: their ``ranks`` are indices into ``kinds``.
        kinds: the shardings and dtypes of their arrays.
        wants: for each tensor, the places of its wants and which of ``kinds`` each is.
        tensors: those that are bundled.
    """

    bundles: tuple[Bundle, ...] = ()
    kinds: tuple[_Kind, ...] = ()
    wants: dict[str, list[tuple[int, int]]] = field(default_factory=dict, repr=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays on all devices."""
        found = 0
        for bundle in self.bundles:
            for number in bundle.ranks:
                found += bundle.data_bytes * len(self.kinds[number][0].device_set)
        return found

    def files(self) -> Iterator[int]:
        """Yield the numbers of the files to read, with repetitions."""
        return (span.piece.file for bundle in self.bundles for span in bundle.reads)

    def samples(self) -> Iterator[tuple[str, NumpyDType, jax.Device]]:
        """Yield the name of one tensor, the dtype and one device of each kind."""
        names = {n: bundle.names[0] for bundle in self.bundles for n in bundle.ranks}
        for number, name in names.items():
            sharding, dtype = self.kinds[number]
            yield name, dtype, next(iter(_devices(sharding)))


@paused()
def small_of(
    wants: Sequence[ArrayRequest], *, mmap: bool = False, fetched: bool = False
) -> tuple[SmallArrays, list[int]]:
    """Return the bundles of ``wants``, and the indices of all other wants.

    With ``mmap``, tensors that can be aliased in their files are not bundled.
    """
    if fetched:  # ahead, by the engine
        return SmallArrays((), (), {}, {}), list(range(len(wants)))
    kinds: dict[_Kind, int] = {}
    found: dict[str, list[tuple[int, int]]] = {}
    tensors: dict[str, Tensor] = {}
    for place, want in enumerate(wants):
        tensor = want.tensor
        number = -1
        if _can_be_small(tensor, mmap=mmap) and _is_whole_here(want.sharding):
            number = kinds.setdefault((want.sharding, want.dtype), len(kinds))
        found.setdefault(tensor.name, []).append((place, number))
        tensors[tensor.name] = tensor

    def goes_to(tensor: Tensor) -> tuple[int, ...] | None:
        numbers = tuple([number for _, number in found[tensor.name]])
        return None if -1 in numbers else numbers

    in_order = sorted(tensors.values(), key=_first_byte)
    made = bundled(in_order, goes_to, _BUNDLE_BYTES)
    bundles = tuple(item for item in made if isinstance(item, Bundle))
    names = {name for bundle in bundles for name in bundle.names}
    rest = [place for place, want in enumerate(wants) if want.tensor.name not in names]
    return SmallArrays(bundles, tuple(kinds), found, tensors), rest


def _can_be_small(tensor: Tensor, *, mmap: bool) -> bool:
    if not small_bytes(tensor, SMALL_BYTES) or tensor.dtype.bits < 8:
        return False
    return not (mmap and tensor.shards[0].offset % ALIGNMENT == 0)


@cached(1024)
def _is_whole_here(sharding: Sharding) -> bool:
    return bool(sharding.is_fully_replicated and sharding.is_fully_addressable)


@cached(1024)
def _devices(sharding: Sharding) -> tuple[jax.Device, ...]:
    return tuple(sharding.device_set)


def _first_byte(tensor: Tensor) -> tuple[int, int]:
    return (tensor.shards[0].file, tensor.shards[0].offset) if tensor.shards else (0, 0)


def load_small(
    small: SmallArrays, source: Source, arrays: dict[int, jax.Array], *, workers: int
) -> Counts:
    """Read the bundles, and store each array in ``arrays`` by the index of its want."""
    counts = [Counts() for _ in range(min(workers, len(small.bundles)))]

    def work(number: int) -> Callable[[WorkQueue[Bundle]], None]:
        def carry(bundles: WorkQueue[Bundle]) -> None:
            while bundle := bundles.next():
                counts[number] += _carried(bundle, small, source, arrays)

        return carry

    if counts:
        run_threads([work(n) for n in range(len(counts))], WorkQueue(iter(small.bundles)))
    return sum(counts, Counts())


@paused()
def _carried(
    bundle: Bundle, small: SmallArrays, source: Source, arrays: dict[int, jax.Array]
) -> Counts:
    buffer = unaligned_empty(bundle.num_bytes)
    for span in bundle.reads:
        part = buffer[span.start : span.start + span.num_bytes]
        lent = source.lend(span.piece, span.offset, span.num_bytes)
        if lent is None:
            source.read(span.piece, span.offset, part.data)
        else:
            part[...] = np.frombuffer(lent, np.uint8)
    stored = list(_stored(bundle, small.tensors, buffer))
    for number in dict.fromkeys(bundle.ranks):
        sharding, dtype = small.kinds[number]
        values = [
            _as(value, dtype, small.tensors[n])
            for n, value in zip(bundle.names, stored, strict=True)
        ]
        with keeping_64_bits(dtype.itemsize):
            made = jax.device_put(values, sharding)
        if not adopts(_devices(sharding)):
            jax.block_until_ready(made)  # bounds the bundles in flight
        for name, array in zip(bundle.names, made, strict=True):
            for place, kind in small.wants[name]:
                if kind == number:
                    arrays[place] = array
    needed, come, reads, *_ = bundle.numbers
    return Counts(needed, come, reads, needed, 1, 0)


def _stored(
    bundle: Bundle, tensors: dict[str, Tensor], buffer: Bytes
) -> Iterator[NDArray[np.generic]]:
    """Yield each tensor's stored elements, at addresses that no device aliases."""
    base = buffer.ctypes.data
    dtypes: dict[str, NumpyDType] = {}
    for name, start, length in zip(bundle.names, bundle.starts, bundle.lengths, strict=True):
        tensor = tensors[name]
        kind = tensor.dtype
        dtype = dtypes.get(kind.name)
        if dtype is None:
            dtype = dtypes[kind.name] = numpy_dtype(kind)
        data = buffer[start : start + length]
        at = base + start
        if at % ALIGNMENT == 0 or at % dtype.itemsize:
            apart = unaligned_empty(length)
            apart[...] = data
            data = apart
        yield data.view(dtype).reshape(tensor.shape)


def _as(value: NDArray[np.generic], dtype: NumpyDType, tensor: Tensor) -> NDArray[np.generic]:
    if value.dtype == dtype:
        return value
    made = unaligned_empty(value.size * dtype.itemsize)
    Conversion(tensor.dtype, dtype).fill(made, 0, value.reshape(-1).view(np.uint8))
    return made.view(dtype).reshape(value.shape)


# --- Host memory of a load: the buffers of its shards, and the budget for them


def as_array(memory: Bytes, shard: ShardRequest) -> NDArray[np.generic]:
    """Return ``memory`` as the NumPy array of ``shard``."""
    return memory.view(shard.conversion.dtype).reshape(shard.box.shape)


def staged_bytes(request: TensorRequest) -> int:
    """Return the transfer buffer size for the shards of ``request``."""
    return UNALIGNED + sum(_apart(shard.num_bytes) for shard in request.shards)


def _apart(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class RequestBuffers:
    """Buffers of one request's shards while they are filled."""

    __slots__ = ("_direct", "_prepare", "left_bytes", "request", "shards", "staged")

    def __init__(
        self, request: TensorRequest, given: dict[int, Bytes], staged: Bytes | None = None
    ) -> None:
        """Allocate all shards but those of ``given``, which are complete.

        If there is a transfer buffer ``staged`` (of `staged_bytes`), the shards are allocated in
        it, at addresses that CPU devices do not alias.
        """
        self.request, self.staged = request, staged
        self._prepare: list[Prepare | None] = []
        self.shards: list[Bytes] = []
        at = UNALIGNED
        for number, shard in enumerate(request.shards):
            memory, prepare = given.get(number), None
            if memory is None and staged is not None:
                memory = staged[at : at + shard.num_bytes]
                at += _apart(shard.num_bytes)
            elif memory is None:
                memory, prepare = allocate(shard.num_bytes)
            self.shards.append(memory)
            self._prepare.append(prepare)
        self._direct = [shard.conversion.is_copy for shard in request.shards]
        self.left_bytes = 0

    def place(self, shards: tuple[int, ...], offset: int, num_bytes: int) -> memoryview | None:
        """Return the destination of these stored bytes of a box, if they have exactly one."""
        if len(shards) != 1 or not self._direct[shards[0]]:
            return None
        prepare = self._prepare[shards[0]]
        if prepare and num_bytes:
            prepare(offset, num_bytes)
        return self.shards[shards[0]][offset : offset + num_bytes].data

    def fill(self, shards: tuple[int, ...], offset: int, data: memoryview) -> None:
        """Copy stored bytes of a box to every shard that needs them, unless they are in place."""
        if len(shards) == 1 and self._direct[shards[0]]:
            return
        for number in shards:
            conversion = self.request.shards[number].conversion
            conversion.fill(self.shards[number], offset, np.frombuffer(data, np.uint8))


# --- Memory budget, checked before the load

_CGROUP = Path("/sys/fs/cgroup")
_SPARE_BYTES = 64 << 20  # for allocations that are not counted
_BLOCK_BYTES = 2 << 20  # that fit a core's L2 cache on current servers
_MIN_STAGING_BYTES = 128 << 20  # below, transfers of small tensors wait for each other
_MAX_STAGING_BYTES = 512 << 20  # more was not faster


def load_budget(host_bytes: int, workers: int) -> Budget:
    """Choose threads and blocks for ``host_bytes``; blocks are larger than between files.

    A block is copied to memory in a few long runs, so the lower number of blocks saves more
    time than the lower cache hit rate costs.

    Raises:
        LayoutError: the budget is too small for one thread.
    """
    budget = fit_budget(host_bytes, workers)
    larger = replace(budget, block_bytes=_BLOCK_BYTES)
    return larger if larger.host_bytes <= host_bytes else budget


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Host memory that a load needs.

    Attributes:
        kept_bytes: distinct shards that become arrays on CPU devices.
        largest_bytes: the largest transfer buffer of one tensor, for other devices.
        passing_bytes: the sum of these buffers over all tensors.
    """

    kept_bytes: int
    largest_bytes: int
    passing_bytes: int


def need_of(
    requests: Sequence[TensorRequest], extra_bytes: int = 0, *, adopted: bool = True
) -> MemoryNeed:
    """Return the host memory of ``requests`` without the engine's blocks, plus ``extra_bytes``.

    Arrays on CPU devices alias the read buffers if ``adopted``; otherwise they are copies.
    """
    kept, largest, total = extra_bytes, 0, 0
    for request in requests:
        if is_kept(request, adopted=adopted):
            kept += request.num_bytes
            continue
        staged = staged_bytes(request)
        largest, total = max(largest, staged), total + staged
        for use in request.uses:
            if adopts([device for device, _ in use]):
                kept += sum(request.shards[number].num_bytes for _, number in use)
    return MemoryNeed(kept, largest, total)


def share_out(need: MemoryNeed, host_bytes: int | None, workers: int) -> tuple[Budget, int | None]:
    """Divide ``host_bytes`` into threads and blocks, and buffers for transfers to devices.

    The latter are None if all shards stay in host memory. A budget of the caller must hold the
    largest tensor; blocks get at most half of the rest, so that one tensor can be read during
    the transfer of another.

    Raises:
        LayoutError: ``host_bytes`` is too small for one thread and the largest tensor.
    """
    limit = default_budget() if host_bytes is None else host_bytes
    if not need.largest_bytes:
        return load_budget(limit, workers), None
    if host_bytes is None:
        budget = load_budget(limit, workers)
        return budget, min(_staging_bytes(need.largest_bytes), need.passing_bytes)
    left = host_bytes - need.largest_bytes
    if left < LEAST_BYTES:
        raise LayoutError(
            f"host_bytes={host_bytes}: the shards of one tensor need {need.largest_bytes} bytes "
            f"for their transfer, and reading at least {LEAST_BYTES}. Pass host_bytes="
            f"{need.largest_bytes + LEAST_BYTES} or more."
        )
    budget = load_budget(max(LEAST_BYTES, left // 2), workers)
    return budget, min(host_bytes - budget.host_bytes, need.passing_bytes)


def _staging_bytes(largest_bytes: int) -> int:
    """Return enough for reading one tensor during the transfer of another, within bounds."""
    most = max(largest_bytes, _MAX_STAGING_BYTES)
    return max(_MIN_STAGING_BYTES, min(2 * largest_bytes, most))


def check_memory(need: MemoryNeed, reading_bytes: int, in_flight_bytes: int = 0) -> None:
    """Refuse a load that exceeds the available memory.

    Raises:
        LayoutError: with the needed and the available bytes.
    """
    total = need.kept_bytes + in_flight_bytes + reading_bytes
    there = available_bytes()
    if there is not None and total + _SPARE_BYTES > there:
        raise LayoutError(
            f"the load needs {total} bytes of host memory (arrays {need.kept_bytes}, transfers "
            f"{in_flight_bytes}, reading {reading_bytes}), and {there} are available. "
            "Load fewer tensors with include=, another dtype=, or onto more machines."
        )


def available_bytes() -> int | None:
    """Return the memory that this process can still allocate; None if the system has no figure."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit.isdigit():
            used = int((_CGROUP / "memory.current").read_text())
            found.append(max(0, int(limit) - used + _reclaimable()))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def _reclaimable() -> int:
    """Return the page cache in the cgroup, which the kernel evicts under memory pressure."""
    for line in (_CGROUP / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
