"""Arrays from filled buffers: of single tensors, and of many small ones at once.

    CPU     the array aliases the buffer; replicas share it
    others  one transfer per distinct shard, then copies from device to device for replicas;
            also on CPU devices with ``copy=True``

An array is always made from the shards of this process's devices: ``device_put`` of a whole
NumPy array compares it with those of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain

import jax
import numpy as np
from jax.sharding import Sharding
from numpy.typing import NDArray

from ..core.catalog import Catalog, Tensor
from ..core.numpy_dtypes import Bytes, Conversion, NumpyDType, numpy_dtype
from ..core.runtime import cached, paused
from ..devices.host_memory import ALIGNMENT, unaligned_empty
from ..errors import LayoutError
from ..formats.registry import Orbax, format_of
from ..planning.bundles import SMALL_BYTES, Bundle, bundled, small_bytes
from ..storage.io import Source
from ..storage.local import FolderVersions
from ..storage.resources import Counts, WorkQueue, default_budget, run_threads
from .memory_budget import (
    as_array,
    check_memory,
    need_of,
)
from .requests import ArrayRequest, TensorRequest, adopts, requests_of

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
