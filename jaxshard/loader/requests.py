"""Requested arrays, and the distinct shards that this process must make.

    wants        w: rows over 2 devices        shards      w[0:2] → device 0
                 w: whole on devices 0 and 1               w[2:4] → device 1
                                                           w[0:4] → devices 0 and 1

Each shard is read once for all its devices and arrays. This module does no I/O and makes no
array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh, Sharding

from ..conversion.select import chooser, missed
from ..core.box import Box
from ..core.catalog import Tensor
from ..core.numpy_dtypes import Conversion, NumpyDType
from ..errors import JaxshardError
from ..mapping import Mapping
from ..planning.copies import TensorCopy, move_into
from ..resharding.geometry import device_boxes
from ..rules import Rules, Unmatched
from ..storage.resources import default_workers

Devices = Sequence[jax.Device] | Mesh | None


@dataclass(frozen=True, slots=True)
class ArrayRequest:
    """An array of ``dtype`` with ``sharding``, made from a tensor of the source."""

    tensor: Tensor
    dtype: NumpyDType
    sharding: Sharding


@dataclass(frozen=True)
class LoadRequest:
    """All arrays of a load, and how they become the result for the caller."""

    wants: tuple[ArrayRequest, ...]
    build: Callable[[Sequence[jax.Array]], Any] = field(repr=False)
    notes: tuple[str, ...] = ()  # of the layout, if the target has one


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadArguments:
    """Arguments of ``load`` with their defaults resolved; see there."""

    devices: Devices = None
    rules: Rules | None = None
    unmatched: Unmatched = "error"
    dtype: Any = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    host_bytes: int | None = None
    workers: int = field(default_factory=default_workers)
    strict: bool = True
    name_of: Callable[[str], str] | None = None
    names: Mapping | str | None = None
    mmap: bool = False
    copy: bool = False
    verify: bool = False
    stream: bool = False

    @property
    def takes(self) -> Callable[[str], bool]:
        """A function that returns whether a name of the source is selected."""
        return chooser(self.include, self.exclude)

    @property
    def misses(self) -> Callable[[str], bool]:
        """A function that returns whether a weight that only the target has is an error."""
        return missed(self.names, self.include, self.exclude)


@dataclass(frozen=True, slots=True)
class ShardRequest:
    """A distinct box of a tensor in one dtype: one buffer, filled once."""

    box: Box
    conversion: Conversion

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer."""
        return self.conversion.num_bytes(self.box.shape)


@dataclass(frozen=True, slots=True)
class TensorRequest:
    """All arrays of one tensor.

    Attributes:
        shards: the buffers to fill; ``Target.ranks`` of a copy are indices into them.
        uses: for each array, its devices in JAX's order and their shards.
    """

    tensor: Tensor
    wants: tuple[ArrayRequest, ...]
    shards: tuple[ShardRequest, ...]
    uses: tuple[tuple[tuple[jax.Device, int], ...], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its distinct shards in memory."""
        return sum(shard.num_bytes for shard in self.shards)

    def move(self, but: Iterable[int] = ()) -> TensorCopy | None:
        """Return the copy of the stored bytes to the shards, except those of ``but``.

        Raises:
            CoverageError: the source lacks part of a shard.
            LayoutError: a shard would cut through a byte of a packed dtype.
        """
        targets: dict[Box, tuple[int, ...]] = {}
        there = set(but)
        for number, shard in enumerate(self.shards):
            if number not in there and shard.box.size:
                targets[shard.box] = (*targets.get(shard.box, ()), number)
        try:
            if not targets:
                return None
            move = move_into(self.tensor, targets)
            move.cells  # noqa: B018 - checks coverage before any I/O
            return move
        except JaxshardError as error:
            raise type(error)(f"{self.tensor.name}: {error}") from None


def adopts(devices: Sequence[jax.Device]) -> bool:
    """Return whether arrays on ``devices`` can alias host memory."""
    return all(device.platform == "cpu" for device in devices)


def is_kept(request: TensorRequest, *, adopted: bool = True) -> bool:
    """Return whether arrays of ``request`` alias the memory it is read into."""
    return adopted and any(adopts([device for device, _ in use]) for use in request.uses)


def requests_of(wants: Sequence[ArrayRequest]) -> tuple[tuple[TensorRequest, tuple[int, ...]], ...]:
    """Group ``wants`` by tensor, in the order of the files; also return their indices."""
    by_tensor: dict[str, list[int]] = {}
    for number, want in enumerate(wants):
        by_tensor.setdefault(want.tensor.name, []).append(number)
    found = [
        (_tensor_request([wants[n] for n in numbers]), tuple(numbers))
        for numbers in by_tensor.values()
    ]
    return tuple(sorted(found, key=lambda item: _first_byte(item[0].tensor)))


def files_of(requests: Iterable[TensorRequest]) -> Iterator[int]:
    """Yield the numbers of the files that ``requests`` read, with repetitions."""
    for request in requests:
        move = request.move()
        if move is None:
            continue
        for cell in move.cells:
            yield from (move.pieces[i][0].file for i, _ in cell.sources)
        for operand in move.operands:
            yield from (piece.file for piece in operand.shards)


def _tensor_request(wants: Sequence[ArrayRequest]) -> TensorRequest:
    tensor = wants[0].tensor
    numbers: dict[ShardRequest, int] = {}
    uses = []
    for want in wants:
        conversion = Conversion(tensor.dtype, want.dtype)
        uses.append(
            tuple(
                (device, numbers.setdefault(ShardRequest(box, conversion), len(numbers)))
                for device, box in device_boxes(want.sharding, tensor.shape).items()
            )
        )
    return TensorRequest(tensor, tuple(wants), tuple(numbers), tuple(uses))


def _first_byte(tensor: Tensor) -> tuple[int, int]:
    return min(((p.file, p.offset) for p in tensor.shards), default=(0, 0))
