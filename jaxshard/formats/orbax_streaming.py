"""Writing for Orbax, one tensor at a time: for models that do not fit in memory.

Orbax is given descriptions instead of arrays, and a handler that reads what each stands
for when its turn comes. What it writes are NumPy arrays, as if all had been there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import NDArray

from ..errors import JaxshardError, StorageError
from .orbax import said
from .orbax_quiet import quiet


@dataclass(frozen=True)
class Later:
    """An array that will be there when it is asked for.

    Attributes:
        shape: of the array.
        dtype: of its elements.
        read: gives the array; called once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    read: Callable[[], NDArray[np.generic]]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return int(np.prod(self.shape, dtype=np.int64))


class _Handler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
    """Writes arrays one after the other, each read just before and gone after."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(
        self, values: Sequence[Later], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        options = args or [ocp.SaveArgs()] * len(values)
        for value, info, option in zip(values, infos, options, strict=True):
            array = np.asarray(value.read())
            for written in await super().serialize([array], [info], [option]):
                await asyncio.to_thread(written.result)
        return []


def write(place: Path, tensors: Mapping[str, Later]) -> None:
    """Write ``tensors`` as a flat Orbax item at ``place``, which is replaced.

    Raises:
        StorageError: Orbax cannot write it.
        JaxshardError: what ``read`` raises.
    """
    registry = ocp.type_handlers.create_type_handler_registry((Later, _Handler()))
    with quiet():
        saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))
        try:
            saver.save(place.absolute(), args=ocp.args.PyTreeSave(dict(tensors)), force=True)
        except (OSError, ValueError) as error:
            if isinstance(error, JaxshardError):
                raise
            raise StorageError(f"{place}: Orbax could not write it: {said(error)}.") from error
        finally:
            saver.close()
