"""Shards of arrays as a catalog and byte source.

Every distinct shard that this process holds is a piece; its "file" is the shard, from
byte 0. The planner that lays out files from files therefore lays them out from devices
as well, and no array is gathered.

    HostShards   CPU     reads the shard's own memory
                 others  copies chunks of the shard to the host on demand (``chunked_fetch``)
    Snapshot     CPU     aliases the memory; JAX cannot donate it while it is aliased, so the
                         next step allocates its results elsewhere. No copy, no wait.
                 others  copies every distinct shard to the host at once
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from numpy.typing import NDArray

from ..core.box import Box
from ..core.catalog import ZEROS, Catalog, File, Model, StoredShard, Tensor
from ..core.dtypes import DType, num_bytes
from ..core.numpy_dtypes import Bytes, pack, stored_as
from ..errors import JaxshardError, LayoutError, StorageError
from ..formats.huggingface import scalar_names
from ..mapping import Mapping as NamesAndShapes
from ..planning.bundles import SMALL_BYTES
from ..resharding.geometry import device_boxes
from ..storage.io import Source
from .host_transfer import (
    ChunkBudget,
    ChunkCache,
    is_on_host,
    to_host,
)

Array = jax.Array | NDArray[np.generic]
SnapshotMode = Literal["auto", "copy"]


class HostShards(Source):
    """The shards of arrays, read by the engine like files.

    Attributes:
        arrays: the arrays by their names in files.
        catalog: their distinct shards.
    """

    can_lend = True

    def __init__(
        self,
        arrays: Mapping[str, Array],
        *,
        model: Model = Model(),  # noqa: B008 - frozen
        metadata: Mapping[str, str] | None = None,
        room: ChunkBudget = ChunkBudget(),  # noqa: B008 - frozen
        has_numbers: bool = False,
    ) -> None:
        """Catalogue ``arrays``; ``room`` bounds the chunks that are copied from devices.

        With ``has_numbers``, training scalars (``global_step`` …) are not weights.

        Raises:
            LayoutError: no file format has an array's dtype.
        """
        self.arrays = dict(arrays)
        self._shards: list[Array] = []
        self._owners: list[tuple[str, Box]] = []
        self._types: dict[tuple[np.dtype[np.generic], tuple[int, ...]], _ArrayType] = {}
        self._placement = _Placement()
        self._copied_whole: dict[int, int] = {}  # bytes of small shards in host memory
        self._views: dict[int, Bytes] = {}
        self._fetched = ChunkCache(room, _stored_bytes)
        self._files: list[File] = []
        tensors = {name: self._tensor(name, array) for name, array in arrays.items()}
        self.catalog = Catalog(
            "the arrays",
            "arrays",
            tuple(self._files),
            tensors,
            model=model,
            metadata=dict(metadata or {}),
            scalars=scalar_names(tensors.values()) if has_numbers else frozenset(),
        )

    def map(self, mapping: NamesAndShapes) -> None:
        """Catalogue the arrays by other names and shapes, without computing them.

        Raises:
            JaxshardError: as ``Mapping.apply``.
        """
        self.catalog = mapping.apply(self.catalog)

    def shard_of(self, piece: StoredShard) -> tuple[str, Box] | None:
        """Return the name and box of the shard that holds ``piece``; None for implicit zeros."""
        return None if piece.file == ZEROS else self._owners[piece.file]

    def read(self, piece: StoredShard, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of the shard of ``piece``."""
        out = np.frombuffer(buffer, np.uint8)
        view = self._view(piece)
        if view is not None:
            out[...] = view[offset : offset + out.size]
            return
        done = 0
        while done < out.size:
            start, held = self._chunk(piece, offset + done)
            chunk = held[offset + done - start :][: out.size - done]
            out[done : done + chunk.size] = chunk
            done += chunk.size

    def lend(self, piece: StoredShard, offset: int, num_bytes: int) -> memoryview | None:
        """Return the shard's own memory, or that of the chunk that holds these bytes."""
        if self._copied_whole.get(piece.file) == num_bytes:
            # copying a small shard costs less than a NumPy view of it
            return memoryview(np.asarray(self._shards[piece.file]).tobytes())
        start, held = 0, self._view(piece)
        if held is None:
            start, held = self._chunk(piece, offset)
            if offset - start + num_bytes > held.size:
                return None
        return held[offset - start :][:num_bytes].data

    def close(self) -> None:
        """Release the arrays: JAX cannot donate an array while its memory is aliased."""
        self.arrays.clear()
        self._views.clear()
        self._shards.clear()
        self._fetched.clear()

    def _chunk(self, piece: StoredShard, offset: int) -> tuple[int, Bytes]:
        """Return the chunk on the host that holds byte ``offset``, and its first byte."""
        shard = self._shards[piece.file]
        assert isinstance(shard, jax.Array)
        return self._fetched.holding(piece.file, shard, stored_as(shard.dtype), offset)

    def _view(self, piece: StoredShard) -> Bytes | None:
        view = self._views.get(piece.file)
        if view is None:
            shard = self._shards[piece.file]
            if isinstance(shard, jax.Array) and not is_on_host(shard):
                return None
            view = self._views[piece.file] = _stored_bytes(np.asarray(shard))
        return view

    def _tensor(self, name: str, array: Array) -> Tensor:
        shape, dtype = tuple(array.shape), array.dtype
        kind = self._types.get((dtype, shape))
        if kind is None:
            kind = self._types[dtype, shape] = _array_type(name, dtype, shape)
        whole = self._placement.whole(array)
        pieces: tuple[StoredShard, ...]
        if whole is not None:
            pieces = (self._piece(name, kind.box, whole, kind.size),)
        else:
            assert isinstance(array, jax.Array)
            pieces = tuple(
                self._piece(name, box, shard, shard.nbytes)
                for box, shard in _distinct_shards(array).items()
            )
        return Tensor(name, kind.stored, shape, pieces)

    def _piece(self, name: str, box: Box, shard: Array, size: int) -> StoredShard:
        number = len(self._shards)
        self._shards.append(shard)
        self._owners.append((name, box))
        self._files.append(File(f"shard {number}", size))
        if size <= SMALL_BYTES and self._placement.is_on_host:
            self._copied_whole[number] = size
        return StoredShard(number, 0, box)


class Snapshot(HostShards):
    """Shards of a training state, complete on the host when the constructor returns.

    The training loop writes into its own NumPy arrays, so these are always copied. Of arrays on
    devices of several processes, each process holds the shards of its own devices.
    """

    def __init__(self, arrays: Mapping[str, Array], *, mode: SnapshotMode = "auto") -> None:
        """Hold ``arrays``; afterwards the caller may run the next step.

        Args:
            arrays: by their names in files.
            mode: ``"auto"`` aliases arrays in host memory, ``"copy"`` copies them as well.

        Raises:
            LayoutError: no file format has an array's dtype.
        """
        super().__init__(arrays)
        for name, tensor in self.catalog.tensors.items():
            if tensor.dtype.bits < 8:
                raise LayoutError(f"{name}: {tensor.dtype} is packed in files. Cast it to save it.")
        # the next step may delete what was copied: only aliased arrays must survive
        self._aliased = {
            name: array
            for name, array in arrays.items()
            if mode == "auto" and isinstance(array, jax.Array) and is_on_host(array)
        }
        copied = _copy_to_host(self._shards, copies_aliased=mode == "copy")
        self._views = {number: _stored_bytes(shard) for number, shard in enumerate(copied)}
        self._shards.clear()
        self._copied_whole.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of all distinct shards."""
        return sum(view.nbytes for view in self._views.values())

    def whole(self) -> dict[str, Array]:
        """Return the aliased arrays themselves, and the others assembled in host memory."""
        return {
            name: self._aliased[name] if name in self._aliased else self._assembled(name)
            for name in self.arrays
        }

    def check_still(self) -> None:
        """Refuse a snapshot whose aliased memory may have been freed.

        Raises:
            StorageError: the caller deleted an array during the save.
        """
        if any(array.is_deleted() for array in self._aliased.values()):
            raise StorageError(
                "an array was deleted while it was being saved, so the files may hold values of "
                "the next step. Delete no array during a save, or pass snapshot='copy'."
            )

    def close(self) -> None:
        """Release the arrays and their copies."""
        super().close()
        self._aliased.clear()

    def _assembled(self, name: str) -> NDArray[np.generic]:
        array = self.arrays[name]
        out = np.empty(array.shape, array.dtype)
        for piece in self.catalog.tensors[name].shards:
            shard = self._views[piece.file].view(array.dtype).reshape(piece.box.shape)
            out[piece.box.slices] = shard
        return out


def _copy_to_host(shards: Iterable[Array], *, copies_aliased: bool) -> list[NDArray[np.generic]]:
    """Return each of ``shards`` in host memory; transfers from devices run concurrently."""
    shards = list(shards)
    on_devices = [s for s in shards if isinstance(s, jax.Array) and not is_on_host(s)]
    transferred = iter(to_host(on_devices))
    found = []
    for shard in shards:
        if isinstance(shard, np.ndarray):
            found.append(shard.copy())
        elif not is_on_host(shard):
            there = next(transferred)
            # pinned host memory was aliased, not copied: the loop may donate it
            found.append(there.copy() if shard.sharding.memory_kind == "pinned_host" else there)
        else:
            seen = np.asarray(shard)
            found.append(seen.copy() if copies_aliased else seen)
    return found


class _ArrayType(NamedTuple):
    """Values that arrays of one dtype and shape share; ``size``: their bytes in memory."""

    stored: DType
    box: Box
    size: int


def _array_type(name: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> _ArrayType:
    try:
        stored = stored_as(dtype)
        num_bytes(shape, stored)
    except JaxshardError as error:
        raise LayoutError(f"{name}: {error}") from None
    return _ArrayType(stored, Box.whole(shape), prod(shape) * dtype.itemsize)


class _Placement:
    """Placement of the last array: thousands of arrays in a row share one sharding.

    Attributes:
        is_on_host: whether its memory is host memory.
    """

    def __init__(self) -> None:
        self._last: object = None  # a sharding, or the device of a SingleDeviceSharding
        self._is_one = self._is_whole = False
        self.is_on_host = True

    def whole(self, array: Array) -> Array | None:
        """Return all of ``array`` as one shard of this process; None if it is sharded."""
        self.update(array)
        if self._is_one:
            return array
        if not self._is_whole:
            return None
        assert isinstance(array, jax.Array)
        return array.addressable_data(0)

    def update(self, array: Array) -> None:
        """Describe ``array``, unless its sharding is that of the last one."""
        if isinstance(array, np.ndarray):
            self._last, self._is_one, self.is_on_host = None, True, True
            return
        sharding = key = array.sharding
        if type(sharding) is SingleDeviceSharding:  # each array has its own
            (key,) = sharding.device_set
        if key is self._last:
            return
        self._last = key
        self._is_whole = sharding.is_fully_replicated and sharding.is_fully_addressable
        self._is_one = self._is_whole and len(sharding.device_set) == 1
        self.is_on_host = is_on_host(array)


def num_fetched(arrays: Mapping[str, Array]) -> int:
    """Return the largest number of distinct shards of one array outside host memory."""
    found, placement = 0, _Placement()
    for array in arrays.values():
        placement.update(array)
        if not placement.is_on_host:
            assert isinstance(array, jax.Array)
            found = max(found, len(_distinct_shards(array)))
    return found


def _distinct_shards(array: jax.Array) -> dict[Box, jax.Array]:
    """Return one shard for each distinct box of this process."""
    found: dict[Box, jax.Array] = {}
    boxes = device_boxes(array.sharding, array.shape)  # in the order of the shards
    for box, shard in zip(boxes.values(), array.addressable_shards, strict=True):
        if box not in found:
            found[box] = shard.data
    return found


def _stored_bytes(view: NDArray[np.generic]) -> Bytes:
    """Return the elements as stored: the same memory, unless they are packed in files."""
    flat = np.ascontiguousarray(view).reshape(-1).view(np.uint8)
    return pack(flat) if stored_as(view.dtype).bits == 4 else flat
