"""Snapshots of a training state.

    CPU      the host looks at the arrays where they are. As long as it does, JAX will not
             give their memory to the next step: donating them has no effect, and the step
             makes its results elsewhere. Nothing is copied, nothing waits.
    others   one transfer to the host for each distinct shard, all under way at once

Of arrays on devices of several processes, a process holds what its own devices have.
What NumPy owns is copied: the loop may write into it. A snapshot knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeGuard

import jax
import numpy as np
from numpy.typing import NDArray

from ..core.box import Box
from ..core.catalog import Catalog, File, StoredShard, Tensor
from ..core.numpy_dtypes import Bytes, stored_as
from ..devices.host_transfer import is_on_host, to_host
from ..errors import JaxshardError, LayoutError, StorageError
from ..storage.io import Source
from .state import Array

How = Literal["auto", "copy"]


class Snapshot(Source):
    """The shards of arrays on the host; the engine reads them as it reads files."""

    can_lend = True

    def __init__(self, arrays: Mapping[str, Array], *, how: How = "auto") -> None:
        """Hold ``arrays``; when this returns, the loop may go on.

        Args:
            arrays: by their names in files.
            how: ``"auto"`` as the module says; ``"copy"`` copies on the CPU backend too.

        Raises:
            LayoutError: an array's dtype is none that files have.
        """
        self._arrays, self._how = dict(arrays), how
        # what was copied, here or from a device, may go: a step that is given it will delete it
        self._looked_at = [a for a in arrays.values() if _is_looked_at(a, how)]
        shards = {name: _distinct_shards(array) for name, array in arrays.items()}
        self._shards: list[Bytes] = []
        self._count = 0
        tensors = {name: self._tensor(name, a, shards[name]) for name, a in arrays.items()}
        given = [shard for found in shards.values() for shard in found.values()]
        self._shards.extend(_host_bytes(shard) for shard in _on_the_host(given, how))
        files = tuple(File(f"shard {i}", shard.nbytes) for i, shard in enumerate(self._shards))
        self.catalog = Catalog("memory", "arrays", files, tensors)

    @property
    def arrays(self) -> Mapping[str, Array]:
        """The arrays themselves, by their names in files."""
        return self._arrays

    @property
    def num_bytes(self) -> int:
        """Bytes of all distinct shards."""
        return sum(shard.nbytes for shard in self._shards)

    def read(self, piece: StoredShard, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of the shard that is ``piece``."""
        shard = self._shards[piece.file]
        np.frombuffer(buffer, np.uint8)[:] = shard[offset : offset + len(buffer)]

    def lend(self, piece: StoredShard, offset: int, num_bytes: int) -> memoryview | None:
        """The shard's own memory."""
        return self._shards[piece.file][offset : offset + num_bytes].data

    def whole(self) -> dict[str, Array]:
        """The arrays themselves, where they are held still; elsewhere whole ones of the host's."""
        return {name: self._whole(name, array) for name, array in self._arrays.items()}

    def check_still(self) -> None:
        """Refuse a snapshot whose memory may have been given away after all.

        Raises:
            StorageError: an array was deleted while it was looked at.
        """
        if any(array.is_deleted() for array in self._looked_at):
            raise StorageError(
                "an array was deleted while it was being saved, so what was written may be of the "
                "step after. Delete nothing during a save, or take snapshot='copy'."
            )

    def close(self) -> None:
        """Let go of the arrays."""
        self._shards.clear()
        self._arrays.clear()
        self._looked_at.clear()

    def _whole(self, name: str, array: Array) -> Array:
        pieces = self.catalog.tensors[name].shards
        if _is_looked_at(array, self._how):
            return array
        out = np.empty(array.shape, array.dtype)
        for piece in pieces:
            shard = self._shards[piece.file].view(array.dtype).reshape(piece.box.shape)
            out[piece.box.slices] = shard
        return out

    def _tensor(self, name: str, array: Array, shards: Mapping[Box, Array]) -> Tensor:
        try:
            kind = stored_as(array.dtype)
        except JaxshardError as error:
            raise type(error)(f"{name}: {error}") from None
        if kind.bits < 8:
            raise LayoutError(f"{name}: {kind} is packed in files. Cast it to save it.")
        pieces = tuple(StoredShard(self._count + n, 0, box) for n, box in enumerate(shards))
        self._count += len(pieces)
        return Tensor(name, kind, array.shape, pieces)


def _host_bytes(shard: NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(shard).reshape(-1).view(np.uint8)


def _on_the_host(shards: Sequence[Array], how: How) -> list[NDArray[np.generic]]:
    """Each of ``shards`` where the host sees it: where it lies, or in memory of its own."""
    far = [s for s in shards if isinstance(s, jax.Array) and not is_on_host(s)]
    come = iter(to_host(far))
    found = []
    for shard in shards:
        if isinstance(shard, np.ndarray):
            found.append(shard.copy())
        elif not is_on_host(shard):
            there = next(come)
            # in the host's memory already: then it was looked at, and the loop may give it away
            found.append(there.copy() if shard.sharding.memory_kind == "pinned_host" else there)
        else:
            seen = np.asarray(shard)
            found.append(seen.copy() if how == "copy" else seen)
    return found


def _is_looked_at(array: Array, how: How) -> TypeGuard[jax.Array]:
    """Whether the snapshot has no memory of its own for ``array``."""
    return isinstance(array, jax.Array) and how == "auto" and is_on_host(array)


def _distinct_shards(array: Array) -> dict[Box, Array]:
    """One shard for each distinct box that this process can address."""
    if not isinstance(array, jax.Array):
        return {Box.whole(array.shape): array}
    found: dict[Box, Array] = {}
    for shard in array.addressable_shards:
        box = _box(shard.index, array.shape)
        if box not in found:
            found[box] = shard.data
    return found


def _box(index: Sequence[slice], shape: tuple[int, ...]) -> Box:
    ranges = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    return Box(tuple(a for a, _ in ranges), tuple(b for _, b in ranges))
