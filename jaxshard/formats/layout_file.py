"""Layout files: a layout as JSON, where strategy files cannot express it.

They know stages of equally many ranks, each holding all of a tensor. Experts that have
names of their own lie on a part of a stage; so does what a user's rules may ask for.

    {"jaxshard_layout": 1, "num_ranks": 4, "stage_axes": [["dp", 2], ["mp", 2]],
     "placements": [{"axes": [["mp", 2]], "spec": [["mp"], []], "first_rank": 2}, …],
     "tensors": {"model.layers.0.mlp.experts.3.w1.weight": [0], …}}

Tensors name their placements by number, since thousands share a few. This module knows
no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import prod
from typing import Any, NoReturn

from ..core.layout import Layout, Placement
from ..core.strategy import Axes
from ..errors import FormatError, quote_name
from .reader import Folder
from .strict_json import FETCH, parse_object

NAME = "layout.json"

_MARK = "jaxshard_layout"
_VERSION = 1
_MAX_BYTES = 100_000_000
_MAX_RANKS = 1 << 20
_MAX_DIMS = 64


def find(folder: Folder) -> str | None:
    """The layout file at the top of ``folder``, or the one file it is, if there is one."""
    files = folder.files()
    path = next(iter(files)) if len(files) == 1 else NAME
    if path not in files or "/" in path or not path.endswith(".json"):
        return None
    start = folder.read(path, 0, min(64, files[path].num_bytes))
    return path if f'"{_MARK}"'.encode() in start else None


def to_bytes(layout: Layout, names: Iterable[str]) -> bytes:
    """The file that says where ``layout`` has the tensors ``names``."""
    numbers: dict[Placement, int] = {}
    tensors = {
        name: [numbers.setdefault(p, len(numbers)) for p in layout.placements[name]]
        for name in names
    }
    placements = [{"axes": p.axes, "spec": p.spec, "first_rank": p.first_rank} for p in numbers]
    told = {
        _MARK: _VERSION,
        "num_ranks": layout.num_ranks,
        "stage_axes": layout.stage_axes,
        "placements": placements,
        "tensors": tensors,
    }
    return (json.dumps(told, ensure_ascii=False) + "\n").encode()


def read(folder: Folder, path: str) -> Layout:
    """The layout that the file at ``path`` says.

    Raises:
        FormatError: it is damaged, or says something that is no layout.
    """
    size = folder.files()[path].num_bytes
    if size > _MAX_BYTES:
        raise FormatError(f"{path} has {size} bytes; a layout has at most {_MAX_BYTES}. {FETCH}")
    told = parse_object(folder.read(path, 0, size), path)
    if told.get(_MARK) != _VERSION:
        raise FormatError(
            f"{path} is a layout of version {quote_name(repr(told.get(_MARK)))}; this jaxshard "
            f"reads version {_VERSION}."
        )
    num_ranks = _number(told.get("num_ranks"), 1, _MAX_RANKS, path, "num_ranks")
    placements = [
        _placement(one, num_ranks, path)
        for one in _list(told.get("placements"), path, "placements")
    ]
    return Layout(
        num_ranks,
        _tensors(told.get("tensors"), placements, path),
        _axes(told.get("stage_axes"), num_ranks, path),
    )


def _tensors(
    value: object, placements: list[Placement], path: str
) -> Mapping[str, tuple[Placement, ...]]:
    if not isinstance(value, dict):
        _refuse(path, "tensors", value)
    shared: dict[tuple[int, ...], tuple[Placement, ...]] = {}
    found = {}
    for name, numbers in value.items():
        key = tuple(
            _number(n, 0, len(placements) - 1, path, f"the placement of {quote_name(name)}")
            for n in _list(numbers, path, quote_name(name))
        )
        if key not in shared:
            chosen = sorted((placements[n] for n in key), key=lambda p: p.first_rank)
            for before, after in pairwise(chosen):
                if after.first_rank < before.ranks.stop:
                    _refuse(path, f"the placements of {quote_name(name)} (they overlap)", numbers)
            if not chosen:
                _refuse(path, f"the placements of {quote_name(name)}", numbers)
            shared[key] = tuple(chosen)
        found[name] = shared[key]
    return found


def _placement(value: object, num_ranks: int, path: str) -> Placement:
    if not isinstance(value, dict):
        _refuse(path, "a placement", value)
    axes = _axes(value.get("axes"), num_ranks, path)
    names = {a for a, _ in axes}
    spec = []
    for dim in _list(value.get("spec"), path, "spec"):
        split = _list(dim, path, "spec")
        if not all(isinstance(a, str) and a in names for a in split):
            _refuse(path, "spec", value)
        spec.append(tuple(split))
    used = [a for split in spec for a in split]
    if len(used) != len(set(used)) or len(spec) > _MAX_DIMS:
        _refuse(path, "spec", value)
    ranks = prod(n for _, n in axes)
    first = _number(value.get("first_rank"), 0, num_ranks - ranks, path, "first_rank")
    return Placement(axes, tuple(spec), first)


def _axes(value: object, num_ranks: int, path: str) -> Axes:
    axes = []
    for one in _list(value, path, "axes"):
        if not isinstance(one, list) or len(one) != 2 or not isinstance(one[0], str):
            _refuse(path, "an axis", one)
        axes.append((one[0], _number(one[1], 1, num_ranks, path, f"axis {quote_name(one[0])}")))
    if len(dict(axes)) != len(axes) or prod(n for _, n in axes) > num_ranks:
        _refuse(path, "axes", value)
    return tuple(axes)


def _list(value: object, path: str, what: str) -> list[Any]:
    if not isinstance(value, list):
        _refuse(path, what, value)
    return value


def _number(value: object, least: int, most: int, path: str, what: str) -> int:
    if type(value) is not int or not least <= value <= most:  # a bool is an int to isinstance
        _refuse(path, what, value)
    return value


def _refuse(path: str, what: str, value: object) -> NoReturn:
    raise FormatError(f"{path}: {what} cannot be {quote_name(repr(value))}. {FETCH}")
