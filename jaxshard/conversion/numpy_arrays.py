"""Tensors of a checkpoint as NumPy arrays in host memory, without a device.

``LazyTensors`` reads one whole tensor at a time, ``read_scalars`` the training scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.catalog import Catalog, Tensor
from ..core.decoders import FETCH, parse_object
from ..core.numpy_dtypes import numpy_dtype
from ..errors import FormatError
from ..formats.folder import COMMON
from ..formats.huggingface import TRAINING_SCALARS, scalar_value
from ..formats.output_files import LazyArray
from ..planning.copies import TensorCopy
from ..planning.plan import Plan
from ..storage.engine import HostArrays, run
from ..storage.io import Source
from ..storage.local import LocalFolder
from ..storage.readers import SourceFiles
from ..storage.resources import Budget, Counts


class _WholeTensor(HostArrays):
    is_memory = False  # the counts are those of the plan, which is of files


@dataclass
class LazyTensors:
    """Whole tensors of a plan, each read when it is needed, and the counts of all reads."""

    source: Source
    budget: Budget
    progress: Callable[[int], None] | None = None
    counts: Counts = field(default_factory=Counts)

    def of(self, plan: Plan) -> dict[str, LazyArray]:
        """Return the tensors of ``plan`` by name.

        Raises:
            LayoutError: arrays do not have a tensor's dtype.
        """
        found = {}
        for copy in plan.moves():
            tensor = plan.source.tensors[copy.name]
            dtype = numpy_dtype(tensor.dtype)
            found[copy.name] = LazyArray(tensor.shape, dtype, partial(self.read, copy, tensor))
        return found

    def read(self, copy: TensorCopy, tensor: Tensor) -> NDArray[Any]:
        """Read the whole ``tensor``."""
        into = _WholeTensor([(tensor.name, tensor.dtype, tensor.shape)])
        self.counts += run([copy], self.source, into, budget=self.budget, progress=self.progress)
        return into.arrays()[tensor.name]


# --- Training scalars (``global_step`` …) of a checkpoint as values

_MAX_COMMON_BYTES = 1 << 20


def read_scalars(catalog: Catalog) -> dict[str, Any]:
    """Return training scalars (``global_step`` …) by name; null in ``common.json`` is unknown.

    They are tensors of one element, or values in the ``common.json`` of a Checkpoint 2.0 folder.

    Raises:
        FormatError: a scalar does not have the type of its name, or ``common.json`` is damaged.
    """
    values = _common(catalog)
    one = [t for t in catalog.tensors.values() if t.name in catalog.scalars and _is_number(t)]
    if not one:
        return values
    files = SourceFiles(catalog)
    try:
        return values | _typed({t.name: _value(files, t) for t in one}, catalog.root)
    finally:
        files.close()


def _typed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {n: scalar_value(n, v, where) if n in TRAINING_SCALARS else v for n, v in values.items()}


def _is_number(tensor: Tensor) -> bool:
    kind = tensor.dtype
    is_real = kind.numpy is not None and not kind.name.startswith("C")
    return tensor.shape in ((), (1,)) and bool(tensor.shards) and is_real


def _value(files: SourceFiles, tensor: Tensor) -> bool | int | float:
    data = bytearray(tensor.num_bytes)
    files.read(tensor.shards[0], tensor.shards[0].offset, memoryview(data))
    value = np.frombuffer(data, numpy_dtype(tensor.dtype))[0]
    if tensor.dtype.name == "BOOL":
        return bool(value)
    return int(value) if tensor.dtype.name[0] in "IU" else float(value)


def _common(catalog: Catalog) -> dict[str, Any]:
    found = [path for path in catalog.extras if PurePosixPath(path).name == COMMON]
    if not found:
        return {}
    folder = LocalFolder(catalog.root, found[:1])
    try:
        size = folder.files()[found[0]].num_bytes
        where = f"{catalog.root}/{found[0]}"
        if size > _MAX_COMMON_BYTES:
            raise FormatError(f"{where} has {size} bytes, expected a few numbers. {FETCH}")
        said = parse_object(folder.read(found[0], 0, size), where)
    finally:
        folder.close()
    return _typed(
        {n: v for n, v in said.items() if n not in TRAINING_SCALARS or v is not None}, where
    )
