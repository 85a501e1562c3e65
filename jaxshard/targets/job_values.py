"""The numbers of a job as values: ``global_step`` and the like, read from a checkpoint.

They are tensors of one element, or stand in the ``common.json`` of a Checkpoint 2.0
folder. Whoever needs them needs a handful of bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..catalog import Catalog, Tensor
from ..elements import numpy_dtype
from ..formats.iteration_names import COMMON
from ..storage.reading import SourceFiles

_MAX_COMMON_BYTES = 1 << 20


def job_values(catalog: Catalog) -> dict[str, Any]:
    """The job's numbers by name; none where the checkpoint has none."""
    values = _common(catalog)
    one = [t for t in catalog.tensors.values() if t.name in catalog.hyper and _is_number(t)]
    if not one:
        return values
    files = SourceFiles(catalog)
    try:
        return values | {t.name: _value(files, t) for t in one}
    finally:
        files.close()


def _is_number(tensor: Tensor) -> bool:
    return tensor.shape in ((), (1,)) and bool(tensor.pieces) and tensor.dtype.numpy is not None


def _value(files: SourceFiles, tensor: Tensor) -> bool | int | float:
    data = bytearray(tensor.num_bytes)
    files.read(tensor.pieces[0], tensor.pieces[0].offset, memoryview(data))
    value = np.frombuffer(data, numpy_dtype(tensor.dtype))[0]
    if tensor.dtype.name == "BOOL":
        return bool(value)
    return int(value) if tensor.dtype.name[0] in "IU" else float(value)


def _common(catalog: Catalog) -> dict[str, Any]:
    for path in catalog.extras:
        place = Path(catalog.root) / path
        if place.name == COMMON and place.stat().st_size <= _MAX_COMMON_BYTES:
            try:
                values = json.loads(place.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return {}
            return dict(values) if isinstance(values, Mapping) else {}
    return {}
