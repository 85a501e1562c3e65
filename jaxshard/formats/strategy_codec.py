"""Codec of MindSpore strategy files: protobuf and JSON.

A strategy file contains the device matrix and tensor map of every parameter of one pipeline
stage. It has no full shapes, dtypes or rank: all ranks of a stage have equal files. A *merged*
file contains several stages, with ``{stage}-`` before every name.

    ParallelStrategyMap    current_stage=1 (a count of saves!)    operators=2  layouts=3
      operator             node_name=1   { stage=1   { dim=1 }=2 * }=2
      layout               param_name=1  { dev_matrix=1 tensor_map=2 param_split_shape=3
                                           indices_offset=4 field=5 opt step=6 opt size=7 }=2

The JSON form has room for one axis per dim only. This module only converts between bytes and
these values; ``strategy_layouts`` converts device matrices to placements.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..core.decoders import as_int, as_ints, as_list, as_object, parse_object
from ..core.runtime import cached
from ..errors import FormatError, LayoutError, format_list, quote_name
from . import protobuf
from .folder import Folder
from .protobuf import BYTES, VARINT, Reader

MAX_FILE_BYTES = 1 << 28  # a million parameters are about 150 MB
_MAX_NAME_BYTES = 4096
_SHORT_BYTES = 512  # larger layouts are not cached; usual ones have 30 to 60 bytes
MAX_NUMBERS = 64  # of one list: mesh axes or tensor dims
MAX_LISTS = 4096  # one per input of an operator; a concatenation may have hundreds
MAX_STAGE = (1 << 16) - 1
INT32 = 1 << 31

Lists = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ParamLayout:
    """Layout of one parameter, in MindSpore's numbers.

    Attributes:
        dev_matrix: the ranks of a stage in row-major order, last axis fastest.
        tensor_maps: one list: the axis that splits each dim, counted from the *right*, or
            -1. Several lists: the axes of each dim, outer to inner.
        opt_weight_shard_step: rank distance of adjacent optimizer shards; 0 for none.
        opt_weight_shard_size: further parts of dim 0; -1 for one per replica.
        param_split_shape: uneven parts, used by old embeddings only.
        indices_offset: as param_split_shape.
        field: as param_split_shape.
    """

    dev_matrix: tuple[int, ...]
    tensor_maps: Lists
    opt_weight_shard_step: int = 0
    opt_weight_shard_size: int = 0
    param_split_shape: Lists = ((),)
    indices_offset: Lists = ((),)
    field: int = 0


@dataclass(frozen=True, slots=True)
class Operator:
    """Strategy of an operator; only its stage is used."""

    name: str
    stage: int
    strategies: Lists = ()


@dataclass(frozen=True)
class StrategyFile:
    """Contents of one strategy file, without the ``{stage}-`` prefixes of merged files.

    Attributes:
        path: the file, for messages.
        stages: the parameters of each pipeline stage.
        operators: the operators of all stages.
        merged: whether the names in the file have ``{stage}-`` prefixes.
        current_stage: a count of saves, not the pipeline stage.
    """

    path: str
    stages: Mapping[int, Mapping[str, ParamLayout]] = field(repr=False)
    operators: tuple[Operator, ...] = field(repr=False)
    merged: bool
    current_stage: int

    @property
    def stage(self) -> int:
        """Pipeline stage of a raw file; the first stage of a merged file."""
        return next(iter(self.stages))


# --- reading --------------------------------------------------------------------------------------


def parse(folder: Folder, path: str) -> StrategyFile:
    """Parse the binary strategy file at ``path``.

    Raises:
        FormatError: the file is damaged or not a strategy file.
    """
    reader = Reader(folder, path, block_bytes=1 << 16)
    check_size(path, reader.num_bytes)
    return _parse(reader)


def first_stage(folder: Folder, path: str) -> int | None:
    """Read the pipeline stage of the file's first operator only.

    Raises:
        FormatError: the file is damaged before the operator.
    """
    reader = Reader(folder, path)
    for number, kind, start, stop in reader.fields(0, reader.num_bytes):
        if number == 2 and kind == BYTES:
            return _operator(reader, start, stop).stage
    return None


def items(folder: Folder, path: str) -> frozenset[bytes]:
    """Return the file's operators and layouts as a set of bytes, to compare files.

    MindSpore writes the files of a stage in different orders. Comparing the sets needs a tenth
    of the time to parse them.

    Raises:
        FormatError: the file is damaged.
    """
    check_size(path, Reader(folder, path).num_bytes)
    reader = Reader(folder, path, block_bytes=MAX_FILE_BYTES)
    return frozenset(
        reader.take(start, stop, MAX_FILE_BYTES, "an item")
        for number, kind, start, stop in reader.fields(0, reader.num_bytes)
        if kind == BYTES
    )


def _parse(reader: Reader) -> StrategyFile:
    current_stage, operators = -1, list[Operator]()
    layouts = dict[str, ParamLayout]()
    known = dict[bytes, ParamLayout]()  # most parameters share a layout
    for number, kind, start, stop in reader.fields(0, reader.num_bytes):
        if number == 1 and kind == VARINT:
            current_stage = start
        elif number == 2 and kind == BYTES:
            operators.append(_operator(reader, start, stop))
        elif number == 3 and kind == BYTES:
            name, layout = _layout_item(reader, start, stop, known)
            if layouts.setdefault(name, layout) != layout:
                raise reader.damaged(start, f"parameter {name} has two different layouts")
        elif number <= 3:
            raise reader.damaged(start, f"invalid field {number} of a strategy file")
    if not 0 <= current_stage < 2 * INT32:
        raise reader.damaged(reader.num_bytes, "current_stage is missing")
    return by_stage(reader.path, layouts, tuple(operators), current_stage)


def _operator(reader: Reader, start: int, stop: int) -> Operator:
    name: str | None = None
    stage, strategies = -1, list[tuple[int, ...]]()
    for number, kind, a, b in reader.fields(start, stop):
        if number == 1 and kind == BYTES:
            name = reader.text(a, b, _MAX_NAME_BYTES, "an operator's name")
        elif number == 2 and kind == BYTES and stage < 0:
            for inner, inner_kind, c, d in reader.fields(a, b):
                if inner == 1 and inner_kind == VARINT:
                    stage = c
                elif inner == 2 and inner_kind == BYTES:
                    _append(reader, strategies, c, d)
        elif number <= 2:
            raise reader.damaged(a, f"invalid field {number} of an operator")
    if name is None or not 0 <= stage <= MAX_STAGE:
        raise reader.damaged(
            start, f"an operator without name or with stage {stage} (expected 0 to {MAX_STAGE})"
        )
    return Operator(name, stage, tuple(strategies))


def _layout_item(
    reader: Reader, start: int, stop: int, known: dict[bytes, ParamLayout]
) -> tuple[str, ParamLayout]:
    name, layout = None, None
    for number, kind, a, b in reader.fields(start, stop):
        if number == 1 and kind == BYTES:
            name = reader.text(a, b, _MAX_NAME_BYTES, "a parameter's name")
        elif number == 2 and kind == BYTES and layout is None:
            layout = _known_layout(reader, a, b, known)
        elif number <= 2:
            raise reader.damaged(a, f"invalid field {number} of a parameter's layout")
    if name is None or layout is None:
        raise reader.damaged(start, "a parameter without name or layout")
    return name, layout


def _known_layout(
    reader: Reader, start: int, stop: int, known: dict[bytes, ParamLayout]
) -> ParamLayout:
    """Parse the layout in bytes ``start`` to ``stop``; equal bytes are parsed once."""
    if stop - start > _SHORT_BYTES:
        return _param_layout(reader, start, stop)
    data = reader.take(start, stop, _SHORT_BYTES, "a layout")
    layout = known.get(data)
    if layout is None:
        layout = known[data] = _param_layout(reader, start, stop)
    return layout


def _param_layout(reader: Reader, start: int, stop: int) -> ParamLayout:
    lists: dict[int, list[tuple[int, ...]]] = {1: [], 2: [], 3: [], 4: []}
    values = dict[int, int]()
    for number, kind, a, b in reader.fields(start, stop):
        if number in lists and kind == BYTES:
            _append(reader, lists[number], a, b)
        elif 5 <= number <= 7 and kind == VARINT:
            values[number] = protobuf.signed(a)
        elif number <= 7:
            raise reader.damaged(a, f"invalid field {number} of a parameter's layout")
    if len(values) != 3 or len(lists[1]) != 1 or not lists[2]:
        raise reader.damaged(  # MindSpore writes one matrix per parameter
            start, "a layout without device matrix, tensor map or one of three numbers"
        )
    return checked(
        f"{reader.path}, byte {start}",
        ParamLayout(
            dev_matrix=lists[1][0],
            tensor_maps=tuple(lists[2]),
            opt_weight_shard_step=values[6],
            opt_weight_shard_size=values[7],
            param_split_shape=tuple(lists[3]),
            indices_offset=tuple(lists[4]),
            field=values[5],
        ),
    )


def _append(reader: Reader, lists: list[tuple[int, ...]], start: int, stop: int) -> None:
    """Append the message in bytes ``start`` to ``stop``, a repeated integer, to ``lists``."""
    out = tuple[int, ...]()
    for one in reader.fields(start, stop):
        if one[0] == 1:
            out += reader.numbers(one, MAX_NUMBERS)
        if len(out) > MAX_NUMBERS:
            raise reader.damaged(start, f"a list of more than {MAX_NUMBERS} numbers")
    if len(lists) == MAX_LISTS:
        raise reader.damaged(start, f"more than {MAX_LISTS} lists of numbers")
    lists.append(out)


def checked(where: str, layout: ParamLayout) -> ParamLayout:
    """Return ``layout`` if its numbers are valid, or raise FormatError."""
    if not _is_valid(layout):
        raise FormatError(f"{where}: invalid layout {layout}. The file is damaged; fetch it again.")
    return layout


@cached(4096)
def _is_valid(layout: ParamLayout) -> bool:
    """Return whether axes have ranks, and the tensor map uses existing axes at most once."""
    nested = len(layout.tensor_maps) > 1
    used = [v for dims in layout.tensor_maps for v in dims if v != -1]
    return (
        all(0 < n < INT32 for n in layout.dev_matrix)
        and all(0 <= v < len(layout.dev_matrix) for v in used)
        and len(used) == len(set(used))
        and not any(nested and len(dims) > 1 and -1 in dims for dims in layout.tensor_maps)
        and 0 <= layout.opt_weight_shard_step < INT32
        and -1 <= layout.opt_weight_shard_size < INT32
        and -INT32 <= layout.field < INT32
    )


_JSON_KEYS = {"current_stage", "parallel_strategy_item", "parallel_layout_item"}
_PREFIXED = re.compile(r"(0|[1-9][0-9]{0,4})-(.+)", re.DOTALL)


def by_stage(
    path: str,
    layouts: Mapping[str, ParamLayout],
    operators: tuple[Operator, ...],
    current_stage: int,
) -> StrategyFile:
    """Split ``layouts`` into stages, by name prefix if the file is merged.

    A parameter's own name may start with digits and a dash. So a file is merged only if all
    names do, and these stages are those of the operators.
    """
    named = {o.stage for o in operators}
    if not layouts:
        raise FormatError(
            f"{path}: a strategy file without parameters. It was truncated; fetch it again."
        )
    stages = dict[int, dict[str, ParamLayout]]()
    for name, layout in layouts.items():
        match = _PREFIXED.fullmatch(name)
        if not match or int(match[1]) not in (named or {int(match[1])}):
            break
        stages.setdefault(int(match[1]), {})[match[2]] = layout
    else:
        if all(stage <= MAX_STAGE for stage in stages):
            return StrategyFile(path, stages, operators, True, current_stage)
    if len(named) != 1:
        raise FormatError(
            f"{path}: the operators name stage {format_list(map(str, sorted(named))) or '(none)'} "
            "(expected one stage in a file that is not merged). It is damaged; fetch it again."
        )
    return StrategyFile(path, {named.pop(): dict(layouts)}, operators, False, current_stage)


# --- writing --------------------------------------------------------------------------------------


def to_bytes(file: StrategyFile) -> bytes:
    """Encode ``file`` as MindSpore does: proto2 with unpacked integers.

    Raises:
        LayoutError: the file has no parameter or no operator.
    """
    check_full(file)
    out = [protobuf.number_field(1, file.current_stage)]
    for o in file.operators:
        dims = b"".join(protobuf.bytes_field(2, protobuf.number_fields(1, d)) for d in o.strategies)
        body = protobuf.bytes_field(1, o.name.encode())
        body += protobuf.bytes_field(2, protobuf.number_field(1, o.stage) + dims)
        out.append(protobuf.bytes_field(2, body))
    for name, layout in named_layouts(file):
        body = protobuf.bytes_field(1, name.encode()) + protobuf.bytes_field(
            2, _layout_bytes(layout)
        )
        out.append(protobuf.bytes_field(3, body))
    return b"".join(out)


@cached(4096)
def _layout_bytes(layout: ParamLayout) -> bytes:
    out = protobuf.bytes_field(1, protobuf.number_fields(1, layout.dev_matrix))
    for number, lists in (
        (2, layout.tensor_maps),
        (3, layout.param_split_shape),
        (4, layout.indices_offset),
    ):
        out += b"".join(
            protobuf.bytes_field(number, protobuf.number_fields(1, one)) for one in lists
        )
    return out + b"".join(
        protobuf.number_field(number, value)
        for number, value in (
            (5, layout.field),
            (6, layout.opt_weight_shard_step),
            (7, layout.opt_weight_shard_size),
        )
    )


def named_layouts(file: StrategyFile) -> Iterable[tuple[str, ParamLayout]]:
    """Yield every layout with its name in the file."""
    for stage, params in file.stages.items():
        for name, layout in params.items():
            yield (f"{stage}-{name}" if file.merged else name), layout


def check_full(file: StrategyFile) -> None:
    """Raise LayoutError for a file that MindSpore refuses as empty."""
    empty = [s for s, params in file.stages.items() if not params]
    if empty or not file.stages or not file.operators:
        raise LayoutError(
            f"strategy file {file.path}: stage {format_list(map(str, empty)) or 0} has no "
            "parameters or no operators, and MindSpore refuses such a file. Use fewer pipeline "
            "stages."
        )


def check_size(path: str, num_bytes: int) -> None:
    """Raise FormatError for a file too large to be a strategy file."""
    if num_bytes > MAX_FILE_BYTES:
        raise FormatError(
            f"{path} has {num_bytes} bytes (expected at most {MAX_FILE_BYTES} in a strategy file). "
            "Check that it is not a weight checkpoint."
        )


# --- JSON -----------------------------------------------------------------------------------------


def to_json(file: StrategyFile) -> bytes:
    """Encode ``file`` as JSON.

    Raises:
        LayoutError: a dim is split over several axes, which JSON cannot express.
    """
    check_full(file)
    layouts = {}
    for name, one in named_layouts(file):
        if len(one.tensor_maps) != 1:
            raise LayoutError(
                f"{name}: JSON strategies cannot express a dim split over several axes "
                f"({one.tensor_maps}). Write the binary form (.ckpt)."
            )
        layouts[name] = {
            "dev_matrix": list(one.dev_matrix),
            "tensor_map": list(one.tensor_maps[0]),
            "param_split_shape": [n for part in one.param_split_shape for n in part],
            "indices_offset": [n for part in one.indices_offset for n in part],
            "field": one.field,
            "opt_weight_shard_step": one.opt_weight_shard_step,
            "opt_weight_shard_size": one.opt_weight_shard_size,
        }
    tree = {
        "current_stage": file.current_stage,
        "parallel_strategy_item": {
            o.name: {"stage": o.stage, "parallel_strategy": [list(s) for s in o.strategies]}
            for o in file.operators
        },
        "parallel_layout_item": layouts,
    }
    return json.dumps(tree).encode()


def from_json(data: bytes, path: str) -> StrategyFile:
    """Parse a JSON strategy file; ``path`` is for error messages.

    Raises:
        FormatError: the text is not JSON, or not a strategy.
    """
    root = parse_object(data, path)
    missing = sorted(_JSON_KEYS - root.keys())
    if missing:
        raise FormatError(f"{path} is not a JSON strategy file: {format_list(missing)} is missing.")
    operators = tuple(
        _json_operator(name, value, f"{path}, operator {quote_name(name)}")
        for name, value in as_object(root["parallel_strategy_item"], path).items()
    )
    layouts = {
        name: _json_layout(value, f"{path}, parameter {quote_name(name)}")
        for name, value in as_object(root["parallel_layout_item"], path).items()
    }
    current_stage = as_int(root["current_stage"], f"{path}: current_stage", 0, 2 * INT32)
    return by_stage(path, layouts, operators, current_stage)


def _json_operator(name: str, value: object, where: str) -> Operator:
    fields = as_object(value, where)
    subject = f"{where}: parallel_strategy"
    lists = as_list(fields.get("parallel_strategy"), subject, MAX_LISTS)
    stage = as_int(fields.get("stage"), f"{where}: stage", 0, MAX_STAGE)
    return Operator(name, stage, tuple(_json_ints(numbers, subject) for numbers in lists))


def _json_layout(value: object, where: str) -> ParamLayout:
    fields = as_object(value, where)
    fields = {"param_split_shape": [], "indices_offset": [], "field": 0, **fields}

    def integer(key: str) -> int:
        return as_int(fields.get(key), f"{where}: {key}", -INT32, INT32)

    def integers(key: str) -> tuple[int, ...]:
        return _json_ints(fields.get(key), f"{where}: {key}")

    layout = ParamLayout(
        dev_matrix=integers("dev_matrix"),
        tensor_maps=(integers("tensor_map"),),
        opt_weight_shard_step=integer("opt_weight_shard_step"),
        opt_weight_shard_size=integer("opt_weight_shard_size"),
        param_split_shape=(integers("param_split_shape"),),
        indices_offset=(integers("indices_offset"),),
        field=integer("field"),
    )
    return checked(where, layout)


def _json_ints(value: object, subject: str) -> tuple[int, ...]:
    return as_ints(value, subject, -INT32, INT32, MAX_NUMBERS)
