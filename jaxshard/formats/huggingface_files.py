"""The files of a Hugging Face folder to be written: which tensors in which, and the index.

Groups and names are those of transformers, so that it loads what is written. This
module knows nothing of bytes' places inside a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import LayoutError

_UNITS = {
    **{"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", re.ASCII)


def plan_files(tensors: Iterable[tuple[str, int]], max_shard_bytes: int) -> list[list[str]]:
    """The names of each file, in the order given: a new file where the next would not fit.

    A tensor larger than ``max_shard_bytes`` gets a file of its own; the file being filled
    goes on after it. No tensors make one empty file.

    >>> plan_files([("a", 3), ("b", 3), ("big", 9), ("c", 1)], max_shard_bytes=4)
    [['a'], ['big'], ['b', 'c']]
    """
    groups: list[list[str]] = []
    current: list[str] = []
    room = max_shard_bytes
    for name, num_bytes in tensors:
        if num_bytes > max_shard_bytes:
            groups.append([name])
            continue
        if num_bytes > room:
            groups.append(current)
            current, room = [], max_shard_bytes
        current.append(name)
        room -= num_bytes
    return [*groups, current] if current or not groups else groups


def file_names(num_files: int) -> list[str]:
    """What the files are called.

    >>> file_names(1), file_names(2)[0]
    (['model.safetensors'], 'model-00001-of-00002.safetensors')
    """
    if num_files == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]


def index_json(
    weight_map: Mapping[str, str], total_size: int, metadata: Mapping[str, Any]
) -> bytes:
    """``model.safetensors.index.json``; ``total_size`` is the bytes of all tensors."""
    index = {"metadata": {**metadata, "total_size": total_size}, "weight_map": dict(weight_map)}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def parse_size(text: str | int) -> int:
    """The bytes that ``text`` means.

    Raises:
        LayoutError: it is not a positive number with a unit.

    >>> parse_size("5GB"), parse_size("4 GiB"), parse_size(7)
    (5000000000, 4294967296, 7)
    """
    match = _SIZE.fullmatch(str(text)) if not isinstance(text, bool) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    num_bytes = _times(match[1], unit) if match and unit else 0
    if num_bytes < 1:
        raise LayoutError(
            f"{text!r} is not a size. Write it like 5GB (10**9), 4GiB (2**30) or 500MB."
        )
    return num_bytes


def _times(number: str, unit: int) -> int:
    """``number``, a decimal fraction, of ``unit``, exactly and rounded down."""
    whole, _, part = number.partition(".")
    return int(whole + part) * unit // int(10 ** len(part))
