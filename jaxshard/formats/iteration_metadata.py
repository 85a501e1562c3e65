"""The ``metadata.json`` of a Checkpoint 2.0 folder: reader and writer.

    {"state_dict_metadata": {name: {"properties", "global_shape", "axis_fragmentations",
                                    "layout", "chunk"}},
     "storage_data": {"('name', (0,))": [{"file_name", "storage_rank", "rank_group"}]}}

This module knows no files: only what is said of them.
"""

from __future__ import annotations

import json
import re
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, NoReturn

from ..core.box import Box
from ..core.catalog import Tensor
from ..core.dtypes import DType
from ..core.layout import Placement, Shard
from ..errors import FormatError, LayoutError, quote_name
from .mindspore_ckpt import TENSOR_TYPES
from .strict_json import FETCH

_KEY = re.compile(r"\((?P<name>(['\"]).*\2), \((?P<number>\d{1,9}),\)\)", re.DOTALL)
_MAX_PARTS = 1 << 20
_MAX_DIMS = 64
_MAX_DIM = 1 << 62
_TYPE_OF = {kind: name for name, kind in TENSOR_TYPES.items() if name != "Int4"}


class Stored(NamedTuple):
    """Shard ``number`` is in the file ``path``, written by ``rank``."""

    number: int
    path: str
    rank: int


@dataclass(frozen=True, slots=True)
class Described:
    """One tensor by the metadata.

    Attributes:
        parts: into how many parts each dim is cut.
        placement: who holds which, if it says so and the ranks are neighbours.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    parts: tuple[int, ...]
    placement: Placement | None
    stored: tuple[Stored, ...]

    @property
    def is_cut(self) -> bool:
        """Whether any dim is in parts."""
        return prod(self.parts) > 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of each shard."""
        return tuple(n // ways for n, ways in zip(self.shape, self.parts, strict=True))

    def box(self, number: int) -> Box:
        """The box of shard ``number``: they are counted row by row.

        >>> kind = TENSOR_TYPES["Float32"]
        >>> print(Described("w", kind, (4, 6), (2, 3), None, ()).box(4))
        [2:4, 2:4]
        """
        index = []
        for ways in reversed(self.parts):
            index.append(number % ways)
            number //= ways
        start = tuple(i * n for i, n in zip(reversed(index), self.local_shape, strict=True))
        return Box(start, tuple(a + n for a, n in zip(start, self.local_shape, strict=True)))


# ---------------------------------------------------------------------------- reading


def parse(told: Mapping[str, Any], where: str) -> tuple[Described, ...]:
    """The tensors that the metadata ``told``, read from ``where``, describes.

    Raises:
        FormatError: it is not such metadata, or contradicts itself.
    """
    described = _object(told.get("state_dict_metadata"), f"{where}: state_dict_metadata")
    stored = _stored(_object(told.get("storage_data"), f"{where}: storage_data"), where)
    unknown = sorted(stored.keys() - described.keys())
    if unknown:
        _refuse(f"{where}: storage_data has {quote_name(unknown[0])}, which is not described")
    return tuple(
        _described(name, one, tuple(stored.get(name, ())), f"{where}: {quote_name(name)}")
        for name, one in described.items()
    )


def _stored(data: Mapping[str, Any], where: str) -> dict[str, list[Stored]]:
    found = dict[str, list[Stored]]()
    for key, entries in data.items():
        name, number = _name_and_number(key, where)
        for entry in entries if isinstance(entries, list) else [None]:
            path = entry.get("file_name") if isinstance(entry, dict) else None
            rank = entry.get("storage_rank") if isinstance(entry, dict) else None
            if not isinstance(path, str) or "/" in path or "\\" in path or path.startswith("."):
                _refuse(f"{where}: {quote_name(key)} is in no file of this folder")
            if type(rank) is not int or not 0 <= rank < _MAX_PARTS:
                _refuse(f"{where}: {quote_name(key)} has no storage_rank")
            found.setdefault(name, []).append(Stored(number, path, rank))
    for name, all_of_it in found.items():
        shards = {(stored.path, stored.number) for stored in all_of_it}
        if len({path for path, _ in shards}) != len(shards):
            _refuse(f"{where}: one file is to hold several shards of {quote_name(name)}")
    return found


def _name_and_number(key: str, where: str) -> tuple[str, int]:
    match = _KEY.fullmatch(key)
    if match is None:
        _refuse(f"{where}: {quote_name(key)} is not like ('name', (0,))")
    quoted = match["name"]
    if "\\" not in quoted:
        return quoted[1:-1], int(match["number"])
    try:
        name = literal_eval(quoted)
    except (ValueError, SyntaxError):
        _refuse(f"{where}: {quote_name(key)} has no name")
    return str(name), int(match["number"])


def _described(name: str, told: object, stored: tuple[Stored, ...], where: str) -> Described:
    one = _object(told, where)
    shape = _numbers(one.get("global_shape"), f"{where}: global_shape", 0, _MAX_DIM)
    parts = _numbers(one.get("axis_fragmentations"), f"{where}: axis_fragmentations", 1, _MAX_PARTS)
    if not shape:
        parts = ()  # a number has no dims to cut, however that is said
    if len(parts) != len(shape) or any(n % ways for n, ways in zip(shape, parts, strict=False)):
        _refuse(f"{where}: shape {shape} is not cut into {parts} parts")
    if prod(parts) > _MAX_PARTS:
        _refuse(f"{where}: {prod(parts)} shards are absurd")
    wrong = [s.number for s in stored if s.number >= prod(parts)]
    if wrong:
        _refuse(f"{where}: there is no shard {wrong[0]} of {prod(parts)}")
    properties = _object(one.get("properties"), f"{where}: properties")
    kind = TENSOR_TYPES.get(str(properties.get("dtype")))
    if kind is None:
        _refuse(f"{where}: dtype {quote_name(str(properties.get('dtype')))} is not known")
    placement, ranks = _placement(one.get("layout"), len(shape), where)
    described = Described(name, kind, shape, parts, placement and placement[1], stored)
    if placement is not None:
        _check_agrees(described, placement[0], ranks, where)
    return described


def _placement(
    layout: object, ndim: int, where: str
) -> tuple[tuple[Placement, Placement | None] | None, tuple[int, ...]]:
    """The placement counted from rank 0, and the same on its ranks if they are neighbours."""
    if layout is None:
        return None, ()
    told = _object(layout, f"{where}: layout")
    if told.get("interleaved_parallel"):
        _refuse(f"{where}: its parts are interleaved, which is supported by no operation here")
    matrix = _numbers(told.get("device_matrix"), f"{where}: device_matrix", 1, _MAX_PARTS)
    ranks = _numbers(told.get("rank_list"), f"{where}: rank_list", 0, _MAX_PARTS)
    maps = told.get("tensor_map")
    if not isinstance(maps, list) or len(maps) != ndim or prod(matrix) != len(ranks):
        _refuse(f"{where}: tensor_map or rank_list does not fit the device_matrix or the shape")
    last = len(matrix) - 1
    spec = []
    for one in maps:
        axes = _numbers(one if isinstance(one, list) else [one], f"{where}: tensor_map", -1, last)
        spec.append(tuple(f"d{v}" for v in axes if v != -1))
    named = [axis for axes in spec for axis in axes]
    if len(set(named)) != len(named):
        _refuse(f"{where}: tensor_map has an axis twice")
    plain = Placement(tuple((f"d{last - i}", n) for i, n in enumerate(matrix)), tuple(spec))
    if ranks != tuple(range(ranks[0], ranks[0] + len(ranks))):
        return (plain, None), ranks
    return (plain, Placement(plain.axes, plain.spec, ranks[0])), ranks


def _check_agrees(one: Described, placement: Placement, ranks: tuple[int, ...], where: str) -> None:
    """Refuse shard numbers that are not those of the ranks that stored them."""
    if tuple(placement.ways(d) for d in range(len(one.shape))) != one.parts:
        _refuse(f"{where}: axis_fragmentations {one.parts} are not what its layout gives")
    boxes = placement.boxes(one.shape)
    position = {rank: i for i, rank in enumerate(ranks)}
    for number, path, rank in one.stored:
        if rank not in position or boxes[position[rank]] != one.box(number):
            _refuse(
                f"{where}: by its layout rank {rank} has not shard {number}, which {path} holds"
            )


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        _refuse(f"{what} is not an object")
    return value


def _numbers(value: object, what: str, least: int, most: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > max(_MAX_DIMS, _MAX_PARTS):
        _refuse(f"{what} is not a list of numbers")
    if any(type(n) is not int or not least <= n <= most for n in value):
        _refuse(f"{what} {quote_name(str(value))} has what is not a number from {least} to {most}")
    return tuple(value)


def _refuse(what: str) -> NoReturn:
    raise FormatError(f"{what}. {FETCH}")


# ---------------------------------------------------------------------------- writing


Stores = Callable[[str, Placement, Shard], Sequence[tuple[int, str]]]
"""``stores(name, placement, shard)``: the (rank, file) pairs that store the shard."""


def to_bytes(tensors: Sequence[tuple[Tensor, Placement | None]], stores: Stores) -> bytes:
    """The metadata of ``tensors``, each with its placement; None for one that is whole.

    Raises:
        LayoutError: MindSpore has no such dtype.
    """
    described, stored = {}, {}
    for tensor, placement in tensors:
        layout = placement or Placement(())
        shards = sorted(layout.shards(tensor.shape), key=lambda s: s.box.start)
        described[tensor.name] = _to_describe(tensor, placement, shards)
        for number, shard in enumerate(shards):
            holders = [layout.first_rank + r for r in shard.holders]
            stored[repr((tensor.name, (number,)))] = [
                {"file_name": path, "storage_rank": rank, "rank_group": holders}
                for rank, path in stores(tensor.name, layout, shard)
            ]
    told = {"state_dict_metadata": described, "storage_data": stored}
    return json.dumps(told, separators=(",", ":")).encode()


def _to_describe(
    tensor: Tensor, placement: Placement | None, shards: Sequence[Shard]
) -> dict[str, Any]:
    dtype = _TYPE_OF.get(tensor.dtype)
    if dtype is None:
        raise LayoutError(
            f"{quote_name(tensor.name)}: MindSpore has no dtype {tensor.dtype}. Leave it out "
            "(exclude= of a conversion, --exclude), or write another format."
        )
    layout = placement or Placement(())
    replica = {rank: i for shard in shards for i, rank in enumerate(shard.holders)}
    return {
        "properties": {
            "dtype": dtype,
            "replica_id": [replica[r] for r in range(layout.num_ranks)],
            "allow_shape_mismatch": False,
            "allow_to_save": True,
        },
        "global_shape": tensor.shape,
        "axis_fragmentations": [layout.ways(d) for d in range(len(tensor.shape))] or [1],
        "layout": placement and _layout(placement, len(tensor.shape)),
        "chunk": [
            {"global_offset": [number], "local_shape": shard.box.shape}
            for number, shard in enumerate(shards)
        ],
    }


def _layout(placement: Placement, ndim: int) -> dict[str, Any]:
    names = [name for name, _ in placement.axes]
    number = {name: len(names) - 1 - i for i, name in enumerate(names)}
    spec = placement.spec + ((),) * (ndim - len(placement.spec))
    maps = [[number[a] for a in axes] for axes in spec]
    return {
        "device_matrix": [n for _, n in placement.axes],
        "tensor_map": [(axes[0] if len(axes) == 1 else axes) if axes else -1 for axes in maps],
        "interleaved_parallel": False,
        "alias_name": names,
        "rank_list": list(placement.ranks),
    }
