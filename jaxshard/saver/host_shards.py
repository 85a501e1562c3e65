"""Shards of arrays as a catalog and byte source.

Every distinct shard that this process holds is a piece; its "file" is the shard, from
byte 0. So the planner that lays out files from files lays them out from devices as well,
and nothing is gathered.

    CPU     the host looks at the shard where it lies
    others  parts of the shard come to the host while they are needed (``fetching``)
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from numpy.typing import NDArray

from ..core.box import Box
from ..core.catalog import ZEROS, Catalog, File, Model, StoredShard, Tensor
from ..core.dtypes import DType, num_bytes
from ..core.numpy_dtypes import Bytes, pack, stored_as
from ..devices.host_transfer import is_on_host
from ..errors import JaxshardError, LayoutError
from ..formats.huggingface import scalar_names
from ..mapping import Mapping as NamesAndShapes
from ..planning.bundles import SMALL_BYTES
from ..storage.io import Source
from .chunked_fetch import Fetched, Room

Array = jax.Array | NDArray[np.generic]


class ArraySource(Source):
    """The shards of arrays, read as the engine reads files.

    Attributes:
        catalog: what there is.
    """

    can_lend = True

    def __init__(
        self,
        arrays: Mapping[str, Array],
        *,
        model: Model = Model(),  # noqa: B008 - frozen
        metadata: Mapping[str, str] | None = None,
        room: Room = Room(),  # noqa: B008 - frozen
        has_numbers: bool = False,
    ) -> None:
        """Catalogue ``arrays``; ``room`` is for parts of shards that must come to the host.

        With ``has_numbers``, a job's numbers (``global_step`` …) are told from weights.

        Raises:
            LayoutError: an array's dtype is none that files have.
        """
        self._shards: list[Array] = []
        self._whose: list[tuple[str, Box]] = []
        self._forms: dict[tuple[np.dtype[np.generic], tuple[int, ...]], _Form] = {}
        self._hosted = _Hosted()
        self._lent_whole: dict[int, int] = {}  # small shards that the host sees: their bytes
        self._views: dict[int, Bytes] = {}
        self._fetched = Fetched(room, _stored_bytes)
        self._files: list[File] = []
        tensors = {name: self._tensor(name, array) for name, array in arrays.items()}
        files = tuple(self._files)
        self.catalog = Catalog(
            "the arrays",
            "arrays",
            files,
            tensors,
            model=model,
            metadata=dict(metadata or {}),
            scalars=scalar_names(tensors.values()) if has_numbers else frozenset(),
        )

    def map(self, mapping: NamesAndShapes) -> None:
        """Catalogue the arrays by other names and shapes; nothing is computed.

        Raises:
            JaxshardError: as ``Mapping.apply``.
        """
        self.catalog = mapping.apply(self.catalog)

    def shard_of(self, piece: StoredShard) -> tuple[str, Box] | None:
        """The array and the box of it that ``piece`` lies in; None for zeros that none holds."""
        return None if piece.file == ZEROS else self._whose[piece.file]

    def read(self, piece: StoredShard, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of the shard that is ``piece``."""
        out = np.frombuffer(buffer, np.uint8)
        view = self._view(piece)
        if view is not None:
            out[...] = view[offset : offset + out.size]
            return
        done = 0
        while done < out.size:
            start, held = self._part(piece, offset + done)
            part = held[offset + done - start :][: out.size - done]
            out[done : done + part.size] = part
            done += part.size

    def lend(self, piece: StoredShard, offset: int, num_bytes: int) -> memoryview | None:
        """The shard's own memory, or that of a part of it that has come to the host."""
        whole = self._small(piece, num_bytes)
        if whole is not None:
            return whole
        start, held = 0, self._view(piece)
        if held is None:
            start, held = self._part(piece, offset)
            if offset - start + num_bytes > held.size:
                return None
        return held[offset - start :][:num_bytes].data

    def _small(self, piece: StoredShard, num_bytes: int) -> memoryview | None:
        """A copy of a small shard that is wanted whole, which costs less than a look at it."""
        if self._lent_whole.get(piece.file) != num_bytes:
            return None
        return memoryview(np.asarray(self._shards[piece.file]).tobytes())

    def close(self) -> None:
        """Let go of the arrays' memory: one that is looked at cannot be donated."""
        self._views.clear()
        self._shards.clear()
        self._fetched.clear()

    def _part(self, piece: StoredShard, offset: int) -> tuple[int, Bytes]:
        """The part of the shard that holds byte ``offset``, on the host, and where it starts."""
        shard = self._shards[piece.file]
        assert isinstance(shard, jax.Array)
        return self._fetched.holding(piece.file, shard, stored_as(shard.dtype), offset)

    def _view(self, piece: StoredShard) -> Bytes | None:
        view = self._views.get(piece.file)
        if view is None:
            shard = self._shards[piece.file]
            if isinstance(shard, jax.Array) and not is_on_host(shard):
                return None
            view = _stored_bytes(np.asarray(shard))
            self._views[piece.file] = view
        return view

    def _tensor(self, name: str, array: Array) -> Tensor:
        shape, dtype = tuple(array.shape), array.dtype
        form = self._forms.get((dtype, shape))
        if form is None:
            form = self._forms[dtype, shape] = _form(name, dtype, shape)
        whole = self._hosted.whole(array)
        if whole is not None:
            return Tensor(name, form.kind, shape, (self._piece(name, form.box, whole, form.size),))
        pieces = [
            self._piece(name, box, shard, shard.nbytes)
            for box, shard in _distinct_shards(array).items()
        ]
        return Tensor(name, form.kind, shape, tuple(pieces))

    def _piece(self, name: str, box: Box, shard: Array, size: int) -> StoredShard:
        number = len(self._shards)
        self._shards.append(shard)
        self._whose.append((name, box))
        self._files.append(File(f"shard {number}", size))
        if size <= SMALL_BYTES and self._hosted.is_seen:
            self._lent_whole[number] = size
        return StoredShard(number, 0, box)


class _Form(NamedTuple):
    """What arrays of one dtype and shape have in common; ``size``: their bytes in memory."""

    kind: DType
    box: Box
    size: int


def _form(name: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> _Form:
    try:
        kind = stored_as(dtype)
        num_bytes(shape, kind)
    except JaxshardError as error:
        raise LayoutError(f"{name}: {error}") from None
    return _Form(kind, Box.whole(shape), prod(shape) * dtype.itemsize)


class _Hosted:
    """Where the array lies that was looked at last; of thousands that lie alike, found out once.

    Attributes:
        is_seen: whether the host sees its memory.
    """

    def __init__(self) -> None:
        self._last: object = None  # a sharding, or the device of a sharding of one
        self._is_one = self._is_whole = False
        self.is_seen = True

    def whole(self, array: Array) -> Array | None:
        """All of ``array`` as one shard of this process; None where it is cut."""
        self.look(array)
        if self._is_one:
            return array
        if not self._is_whole:
            return None
        assert isinstance(array, jax.Array)
        return array.addressable_data(0)

    def look(self, array: Array) -> None:
        """Find out about ``array``."""
        if isinstance(array, np.ndarray):
            self._last, self._is_one, self.is_seen = None, True, True
            return
        sharding = key = array.sharding
        if type(sharding) is SingleDeviceSharding:  # there is one for each array
            (key,) = sharding.device_set
        if key is self._last:
            return
        self._last = key
        self._is_whole = sharding.is_fully_replicated and sharding.is_fully_addressable
        self._is_one = self._is_whole and len(sharding.device_set) == 1
        self.is_seen = is_on_host(array)


def num_fetched(arrays: Mapping[str, Array]) -> int:
    """The most distinct shards of one array that must come to the host; 0 if none must."""
    found, hosted = 0, _Hosted()
    for array in arrays.values():
        hosted.look(array)
        if not hosted.is_seen:
            found = max(found, len(_distinct_shards(array)))
    return found


def _distinct_shards(array: Array) -> dict[Box, Array]:
    """One shard for each distinct box that this process can address."""
    if not isinstance(array, jax.Array):
        return {Box.whole(array.shape): array}
    found: dict[Box, Array] = {}
    for shard in array.addressable_shards:
        ranges = [s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True)]
        box = Box(tuple(a for a, _ in ranges), tuple(b for _, b in ranges))
        if box not in found:
            found[box] = shard.data
    return found


def _stored_bytes(view: NDArray[np.generic]) -> Bytes:
    """The elements as they are stored; the same memory unless they are packed there."""
    flat = np.ascontiguousarray(view).reshape(-1).view(np.uint8)
    return pack(flat) if stored_as(view.dtype).bits == 4 else flat
