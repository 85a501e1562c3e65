"""Small tensors of a load: adjacent ones are one read and one ``device_put``.

    file     |abc|def|ghi|         one read for all
    arrays   a  b  c  d  …         one ``device_put`` for all that go to the same devices

Arrays own their memory, so the buffer of a bundle is freed as soon as they are made. Only tensors
that every one of their devices holds whole, all devices of this process, go this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Sharding
from numpy.typing import NDArray

from ..core.cache import cached
from ..core.catalog import Tensor
from ..core.interpreter import paused
from ..core.numpy_dtypes import Bytes, Conversion, NumpyDType, numpy_dtype
from ..devices.host_memory import ALIGNMENT, unaligned_empty
from ..planning.bundles import SMALL_BYTES, Bundle, bundled, small_bytes
from ..storage.io import Source
from ..storage.resources import Counts, WorkQueue, run_threads
from .make_arrays import keeping_64_bits
from .requests import ArrayRequest, adopts

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
