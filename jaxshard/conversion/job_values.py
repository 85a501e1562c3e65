"""Training scalars (``global_step`` …) of a checkpoint as values.

They are tensors of one element, or stand in the ``common.json`` of a Checkpoint 2.0
folder. Whoever needs them needs a handful of bytes. Each comes in its own type, or the
file that has it is refused: nobody vouches for what a JSON file calls ``global_step``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ..core.catalog import Catalog, Tensor
from ..core.decoders import FETCH, parse_object
from ..core.numpy_dtypes import numpy_dtype
from ..errors import FormatError
from ..formats.folder import COMMON
from ..formats.huggingface import TRAINING_SCALARS, scalar_value
from ..storage.local import LocalFolder
from ..storage.readers import SourceFiles

_MAX_COMMON_BYTES = 1 << 20


def job_values(catalog: Catalog) -> dict[str, Any]:
    """The job's numbers by name; those that ``common.json`` has as null are not known.

    Raises:
        FormatError: a number is not what its name says, or ``common.json`` is damaged.
    """
    values = _common(catalog)
    one = [t for t in catalog.tensors.values() if t.name in catalog.hyper and _is_number(t)]
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
    return tensor.shape in ((), (1,)) and bool(tensor.pieces) and is_real


def _value(files: SourceFiles, tensor: Tensor) -> bool | int | float:
    data = bytearray(tensor.num_bytes)
    files.read(tensor.pieces[0], tensor.pieces[0].offset, memoryview(data))
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
