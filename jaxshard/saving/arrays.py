"""Arrays as a checkpoint: what is on the devices, catalogued like what is in files.

Every distinct shard that this process holds is a piece; its "file" is the shard, from
byte 0. So the planner that lays out files from files lays them out from devices as well.
Nothing is gathered: a shard is looked at where it lies, or copied to the host a part at
a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from numpy.typing import NDArray

from ..box import Box
from ..catalog import Catalog, File, Model, Piece, Tensor
from ..elements import stored_as
from ..errors import JaxshardError

Array = jax.Array | NDArray[np.generic]


class ArraySource:
    """The shards of arrays, read as the engine reads files."""

    def __init__(self, arrays: Mapping[str, Array], model: Model = Model()) -> None:  # noqa: B008
        """Catalogue ``arrays``.

        Raises:
            LayoutError: an array's dtype is none that files have.
        """
        self._shards: list[Array] = []
        self._views: dict[int, NDArray[np.uint8]] = {}
        tensors = {name: self._tensor(name, array) for name, array in arrays.items()}
        files = tuple(File(f"shard {i}", shard.nbytes) for i, shard in enumerate(self._shards))
        self.catalog = Catalog("memory", "arrays", files, tensors, model=model)

    def read(self, piece: Piece, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of the shard that is ``piece``."""
        np.frombuffer(buffer, np.uint8)[:] = self._bytes(piece)[offset : offset + len(buffer)]

    def lend(self, piece: Piece, offset: int, num_bytes: int) -> memoryview | None:
        """The shard's own memory, where the host can see it."""
        return self._bytes(piece)[offset : offset + num_bytes].data

    def _bytes(self, piece: Piece) -> NDArray[np.uint8]:
        view = self._views.get(piece.file)
        if view is None:
            view = np.ascontiguousarray(self._shards[piece.file]).reshape(-1).view(np.uint8)
            self._views[piece.file] = view
        return view

    def _tensor(self, name: str, array: Array) -> Tensor:
        try:
            kind = stored_as(array.dtype)
        except JaxshardError as error:
            raise type(error)(f"{name}: {error}") from None
        pieces = []
        for box, shard in _distinct_shards(array).items():
            pieces.append(Piece(len(self._shards), 0, box))
            self._shards.append(shard)
        return Tensor(name, kind, array.shape, tuple(pieces))


def _distinct_shards(array: Array) -> dict[Box, Array]:
    """One shard for each distinct box that this process can address."""
    if not isinstance(array, jax.Array):
        return {Box.whole(array.shape): array}
    found: dict[Box, Array] = {}
    for shard in array.addressable_shards:
        ranges = [s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True)]
        box = Box(tuple(a for a, _ in ranges), tuple(b for _, b in ranges))
        found.setdefault(box, shard.data)
    return found
