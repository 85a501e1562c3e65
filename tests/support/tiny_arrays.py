"""Small arrays and safetensors files of them, written in the order given."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np


def array(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    made = np.dtype(getattr(ml_dtypes, dtype, dtype))
    data = np.random.default_rng(seed).integers(0, 256, made.itemsize * int(np.prod(shape)))
    return data.astype(np.uint8).view(made).reshape(shape)


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file with its tensors in the order given, whatever their dtypes."""
    names = {"float32": "F32", "bfloat16": "BF16", "uint8": "U8", "int64": "I64", "float16": "F16"}
    header, at = {}, 0
    for name, value in tensors.items():
        offsets = [at, at := at + value.nbytes]
        dtype, shape = names[value.dtype.name], list(value.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    data = b"".join(value.tobytes() for value in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    return found.keys() == wanted.keys() and all(
        (found[n].dtype, found[n].shape, found[n].tobytes()) == (w.dtype, w.shape, w.tobytes())
        for n, w in wanted.items()
    )
