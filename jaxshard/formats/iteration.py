"""Checkpoint 2.0 folders of MindFormers: shard files and ``metadata.json``.

    latest_checkpointed_iteration.txt            "10"
    iteration_00000010/
        common.json                              training scalars
        metadata.json                            layout of each tensor; file of each shard
        llama-model-0000000-0000004.safetensors  weights stored by rank 0 of 4
        llama-opt-0000000-0000004.safetensors    optimizer states stored by rank 0 of 4

The number of a shard counts over the parts of all dims, the last dim fastest (it is called
``global_offset``, despite its meaning). The layout is also stored as a device matrix and tensor
map; a folder in which the two disagree is refused. Each replica may be stored by all its holders
or by one.

    metadata.json
        {"state_dict_metadata": {name: {"properties", "global_shape", "axis_fragmentations",
                                        "layout", "chunk"}},
         "storage_data": {"('name', (0,))": [{"file_name", "storage_rank", "rank_group"}]}}
"""

from __future__ import annotations

import json
import re
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, prod
from typing import Any, NamedTuple, NoReturn

from ..core.box import Box
from ..core.catalog import Catalog, File, StoredShard, Tensor
from ..core.decoders import FETCH, as_ints, as_list, as_object, parse_object
from ..core.dtypes import DType
from ..core.layout import Layout, Placement, Shard
from ..errors import FormatError, LayoutError, NotFoundError, format_list, quote_name
from ..planning.outputs import Outputs, arrange
from ..rules.match import weight_name
from . import huggingface
from .folder import COMMON, ITERATION_METADATA, TRACKER, Folder
from .huggingface import scalar_names
from .mindspore_ckpt import TENSOR_TYPES, TYPE_NAMES
from .output_files import Request, Result, SafetensorsContainer
from .rank_folder import placed
from .safetensors import HeaderEntry, read_header

_MAX_METADATA_BYTES = 1 << 28  # a thousand tensors on a thousand ranks, all replicas stored
_MAX_COMMON_BYTES = 1 << 20


def read(folder: Folder) -> Catalog:
    """Read the catalog of the iteration in ``folder``.

    Missing files are skipped: replicas may replace them, and optimizer states are optional.

    Raises:
        FormatError: a file is damaged, or the metadata contradicts itself or the files.
        NotFoundError: a weight is only in missing files.
    """
    files = folder.files()
    size = files[ITERATION_METADATA].num_bytes
    if size > _MAX_METADATA_BYTES:
        raise FormatError(
            f"{ITERATION_METADATA} has {size} bytes (expected at most {_MAX_METADATA_BYTES}). "
            f"{FETCH}"
        )
    metadata = parse(
        parse_object(folder.read(ITERATION_METADATA, 0, size), ITERATION_METADATA),
        ITERATION_METADATA,
    )
    found = _ShardFiles(folder, files, metadata)
    tensors = {t.name: t for one in metadata if (t := found.tensor(one))}
    model, _ = huggingface.read_model(folder, files)
    extras, _ = huggingface.carried(files, found.paths)
    return Catalog(
        root=folder.root,
        format="iteration",
        files=tuple(files[path] for path in found.paths),
        tensors=tensors,
        layout=_checkpoint_layout(metadata, tensors),
        model=model,
        metadata={},
        extras=tuple(path for path in extras if path != ITERATION_METADATA),
        scalars=scalar_names(tensors.values()),
        notes=(*found.notes(), *_health(folder, files)),
    )


@dataclass(slots=True)
class _ShardFiles:
    """Shard files named by the metadata: the present ones, with headers, and the missing."""

    folder: Folder
    files: Mapping[str, File]
    metadata: tuple[TensorMetadata, ...]
    paths: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    _headers: dict[str, dict[str, HeaderEntry]] = field(default_factory=dict)
    _left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = {stored.path for one in self.metadata for stored in one.stored}
        self.paths = tuple(sorted(named & self.files.keys()))
        self.missing = tuple(sorted(named - self.files.keys()))
        for path in self.paths:
            header = read_header(self.folder, path, file_bytes=self.files[path].num_bytes)
            self._headers[path] = {entry.name: entry for entry in header.entries}

    def tensor(self, one: TensorMetadata) -> Tensor | None:
        """Return the tensor with its present shards; None for an optimizer state without any."""
        numbers = {path: i for i, path in enumerate(self.paths)}
        pieces = [
            StoredShard(numbers[path], self._entry(one, path).start, one.box(number))
            for number, path, _ in one.stored
            if path in numbers
        ]
        if not pieces:
            if weight_name(one.name) == one.name:
                lost = format_list(sorted({path for _, path, _ in one.stored}))
                raise NotFoundError(
                    f"{quote_name(one.name)}: {self.folder.root} lacks {lost or 'any file'} that "
                    f"stores it (per {ITERATION_METADATA}). Fetch the missing files."
                )
            self._left_out.append(one.name)
            return None
        return Tensor(one.name, one.dtype, one.shape, tuple(pieces))

    def _entry(self, one: TensorMetadata, path: str) -> HeaderEntry:
        entry = self._headers[path].get(one.name)
        if entry is None:
            raise FormatError(
                f"{path} does not contain {quote_name(one.name)}, which {ITERATION_METADATA} lists "
                f"there. {FETCH}"
            )
        if (entry.dtype, entry.shape) != (one.dtype, one.local_shape):
            raise FormatError(
                f"{path}: {quote_name(one.name)} is {entry.dtype} {entry.shape} (expected "
                f"{one.dtype} {one.local_shape} per {ITERATION_METADATA}). {FETCH}"
            )
        return entry

    def notes(self) -> list[str]:
        notes = []
        if self.missing:
            notes.append(
                f"{format_list(self.missing)} is missing; replicas are read instead where possible."
            )
        if self._left_out:
            notes.append(
                f"{len(self._left_out)} optimizer states are only in missing files: "
                f"{format_list(self._left_out)}."
            )
        return notes


def _checkpoint_layout(
    metadata: Iterable[TensorMetadata], tensors: Mapping[str, Tensor]
) -> Layout | None:
    """Return the layout; None if the rank numbers of a split tensor are not contiguous."""
    kept = [one for one in metadata if one.name in tensors]
    stored = [rank for one in kept for _, _, rank in one.stored]
    placed = [one.placement for one in kept if one.placement]
    num_ranks = max((*(p.ranks.stop for p in placed), *(rank + 1 for rank in stored)), default=1)
    if any(one.placement is None and one.is_cut for one in kept):
        return None
    everywhere = Placement((("all", num_ranks),))
    return Layout(num_ranks, {one.name: (one.placement or everywhere,) for one in kept})


def _health(folder: Folder, files: Mapping[str, File]) -> list[str]:
    """Return notes on the verdict of MindFormers' health monitor."""
    common = files.get(COMMON)
    if common is None or common.num_bytes > _MAX_COMMON_BYTES:
        return []
    status = parse_object(folder.read(COMMON, 0, common.num_bytes), COMMON).get("ckpt_status")
    if status != 1:
        return []
    return [f"{COMMON} has ckpt_status 1: MindFormers marked this checkpoint unhealthy."]


# --- metadata.json --------------------------------------------------------------------------------

_KEY = re.compile(r"\((?P<name>(['\"]).*\2), \((?P<number>\d{1,9}),\)\)", re.DOTALL)
_MAX_PARTS = 1 << 20
_MAX_DIMS = 64
_MAX_DIM = 1 << 62


class ShardFile(NamedTuple):
    """A stored shard: its number, its file, and the rank that wrote it."""

    number: int
    path: str
    rank: int


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """Metadata of one tensor.

    Attributes:
        parts: the number of parts of each dim.
        placement: boxes of the ranks, if stored and the ranks are contiguous.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    parts: tuple[int, ...]
    placement: Placement | None
    stored: tuple[ShardFile, ...]

    @property
    def is_cut(self) -> bool:
        """Whether a dim is split."""
        return prod(self.parts) > 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of each shard."""
        return tuple(n // ways for n, ways in zip(self.shape, self.parts, strict=True))

    def box(self, number: int) -> Box:
        """Return the box of shard ``number``, counted in row-major order.

        >>> kind = TENSOR_TYPES["Float32"]
        >>> print(TensorMetadata("w", kind, (4, 6), (2, 3), None, ()).box(4))
        [2:4, 2:4]
        """
        index = []
        for ways in reversed(self.parts):
            index.append(number % ways)
            number //= ways
        start = tuple(i * n for i, n in zip(reversed(index), self.local_shape, strict=True))
        return Box(start, tuple(a + n for a, n in zip(start, self.local_shape, strict=True)))


# --- reading --------------------------------------------------------------------------------------


def parse(root: Mapping[str, Any], where: str) -> tuple[TensorMetadata, ...]:
    """Parse ``metadata.json``; ``where`` is for error messages.

    Raises:
        FormatError: the metadata is invalid or contradicts itself.
    """
    described = as_object(root.get("state_dict_metadata"), f"{where}: state_dict_metadata")
    stored = _stored(as_object(root.get("storage_data"), f"{where}: storage_data"), where)
    unknown = sorted(stored.keys() - described.keys())
    if unknown:
        _refuse(
            f"{where}: storage_data has {quote_name(unknown[0])}, which state_dict_metadata lacks"
        )
    return tuple(
        _tensor(name, fields, tuple(stored.get(name, ())), f"{where}: {quote_name(name)}")
        for name, fields in described.items()
    )


def _stored(data: Mapping[str, Any], where: str) -> dict[str, list[ShardFile]]:
    found = dict[str, list[ShardFile]]()
    for key, entries in data.items():
        name, number = _name_and_number(key, where)
        for entry in entries if isinstance(entries, list) else [None]:
            path = entry.get("file_name") if isinstance(entry, dict) else None
            rank = entry.get("storage_rank") if isinstance(entry, dict) else None
            if not isinstance(path, str) or "/" in path or "\\" in path or path.startswith("."):
                _refuse(f"{where}: {quote_name(key)} has no file_name in this folder")
            if type(rank) is not int or not 0 <= rank < _MAX_PARTS:
                _refuse(f"{where}: {quote_name(key)} has no valid storage_rank")
            found.setdefault(name, []).append(ShardFile(number, path, rank))
    for name, shard_files in found.items():
        shards = {(file.path, file.number) for file in shard_files}
        if len({path for path, _ in shards}) != len(shards):
            _refuse(f"{where}: one file stores several shards of {quote_name(name)}")
    return found


def _name_and_number(key: str, where: str) -> tuple[str, int]:
    match = _KEY.fullmatch(key)
    if match is None:
        _refuse(f"{where}: {quote_name(key)} is not of the form ('name', (0,))")
    quoted = match["name"]
    if "\\" not in quoted:
        return quoted[1:-1], int(match["number"])
    try:
        name = literal_eval(quoted)
    except (ValueError, SyntaxError):
        _refuse(f"{where}: {quote_name(key)} has an invalid name")
    return str(name), int(match["number"])


def _tensor(name: str, value: object, stored: tuple[ShardFile, ...], where: str) -> TensorMetadata:
    fields = as_object(value, where)
    shape = as_ints(fields.get("global_shape"), f"{where}: global_shape", 0, _MAX_DIM, _MAX_DIMS)
    parts = as_ints(
        fields.get("axis_fragmentations"), f"{where}: axis_fragmentations", 1, _MAX_PARTS, _MAX_DIMS
    )
    if not shape:
        parts = ()  # a scalar has no dims, but MindFormers writes [1]
    if len(parts) != len(shape) or any(n % ways for n, ways in zip(shape, parts, strict=False)):
        _refuse(f"{where}: shape {shape} is not divisible into {parts} parts")
    if prod(parts) > _MAX_PARTS:
        _refuse(f"{where}: {prod(parts)} shards (expected at most {_MAX_PARTS})")
    wrong = [s.number for s in stored if s.number >= prod(parts)]
    if wrong:
        _refuse(f"{where}: no shard {wrong[0]} (expected 0 to {prod(parts) - 1})")
    properties = as_object(fields.get("properties"), f"{where}: properties")
    kind = TENSOR_TYPES.get(str(properties.get("dtype")))
    if kind is None:
        _refuse(f"{where}: unknown dtype {quote_name(str(properties.get('dtype')))}")
    placement, ranks = _placement(fields.get("layout"), len(shape), where)
    described = TensorMetadata(name, kind, shape, parts, placement and placement[1], stored)
    if placement is not None:
        _check_agrees(described, placement[0], ranks, where)
    return described


def _placement(
    value: object, ndim: int, where: str
) -> tuple[tuple[Placement, Placement | None] | None, tuple[int, ...]]:
    """Return the placement from rank 0, the one on its ranks if contiguous, and the ranks."""
    if value is None:
        return None, ()
    layout = as_object(value, f"{where}: layout")
    if layout.get("interleaved_parallel"):
        _refuse(f"{where}: interleaved_parallel is not supported")
    matrix = as_ints(
        layout.get("device_matrix"), f"{where}: device_matrix", 1, _MAX_PARTS, _MAX_DIMS
    )
    ranks = as_ints(layout.get("rank_list"), f"{where}: rank_list", 0, _MAX_PARTS, _MAX_PARTS)
    maps = as_list(layout.get("tensor_map"), f"{where}: tensor_map")
    if len(maps) != ndim or prod(matrix) != len(ranks):
        _refuse(f"{where}: tensor_map or rank_list does not fit the device_matrix or the shape")
    last = len(matrix) - 1
    spec = []
    for one in maps:
        axes = as_ints(one if isinstance(one, list) else [one], f"{where}: tensor_map", -1, last)
        spec.append(tuple(f"d{v}" for v in axes if v != -1))
    named = [axis for axes in spec for axis in axes]
    if len(set(named)) != len(named):
        _refuse(f"{where}: tensor_map uses an axis twice")
    plain = Placement(tuple((f"d{last - i}", n) for i, n in enumerate(matrix)), tuple(spec))
    if ranks != tuple(range(ranks[0], ranks[0] + len(ranks))):
        return (plain, None), ranks
    return (plain, Placement(plain.axes, plain.spec, ranks[0])), ranks


def _check_agrees(
    one: TensorMetadata, placement: Placement, ranks: tuple[int, ...], where: str
) -> None:
    """Raise FormatError if a shard number is not that of the rank that stored it."""
    if tuple(placement.ways(d) for d in range(len(one.shape))) != one.parts:
        _refuse(f"{where}: axis_fragmentations {one.parts} contradict its layout")
    boxes = placement.boxes(one.shape)
    position = {rank: i for i, rank in enumerate(ranks)}
    for number, path, rank in one.stored:
        if rank not in position or boxes[position[rank]] != one.box(number):
            _refuse(
                f"{where}: shard {number} is stored in {path} by rank {rank}, which does not hold "
                "it per the layout"
            )


def _refuse(what: str) -> NoReturn:
    raise FormatError(f"{what}. {FETCH}")


# --- writing --------------------------------------------------------------------------------------


Stores = Callable[[str, Placement, Shard], Sequence[tuple[int, str]]]
"""``stores(name, placement, shard)`` returns the (rank, file) pairs that store the shard."""


def metadata_json(tensors: Sequence[tuple[Tensor, Placement | None]], stores: Stores) -> bytes:
    """Return ``metadata.json`` of ``tensors``, each with its placement; None if unsplit.

    Raises:
        LayoutError: MindSpore lacks a dtype.
    """
    described, stored = {}, {}
    for tensor, placement in tensors:
        layout = placement or Placement(())
        shards = sorted(layout.shards(tensor.shape), key=lambda s: s.box.start)
        described[tensor.name] = _tensor_json(tensor, placement, shards)
        for number, shard in enumerate(shards):
            holders = [layout.first_rank + r for r in shard.holders]
            stored[repr((tensor.name, (number,)))] = [
                {"file_name": path, "storage_rank": rank, "rank_group": holders}
                for rank, path in stores(tensor.name, layout, shard)
            ]
    root = {"state_dict_metadata": described, "storage_data": stored}
    return json.dumps(root, separators=(",", ":")).encode()


def _tensor_json(
    tensor: Tensor, placement: Placement | None, shards: Sequence[Shard]
) -> dict[str, Any]:
    dtype = TYPE_NAMES.get(tensor.dtype)
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
        "layout": placement and _layout_json(placement, len(tensor.shape)),
        "chunk": [
            {"global_offset": [number], "local_shape": shard.box.shape}
            for number, shard in enumerate(shards)
        ],
    }


def _layout_json(placement: Placement, ndim: int) -> dict[str, Any]:
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


# --- output files: weights and optimizer states of a rank in separate files -----------------------
#
# A layout's ranks are files. So the files here are a layout of twice as many ranks: a state has
# the placement of its weight, that many ranks further on.

_COMMON = ("epoch_num", "step_num", "global_step", "loss_scale", "global_batch_size")


def plan_files(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """Plan the files of ``iteration_{step}/`` and the tracker that names it.

    Raises:
        LayoutError: a tensor is not in the layout, or MindSpore lacks its dtype.
    """
    everything = Layout(1, {t.name: (Placement(()),) for t in tensors})
    layout = everything if request.to is None else placed(source, tensors, request)
    step = int(request.numbers.get("global_step", request.numbers.get("step_num", 0)))
    if step < 0:
        raise LayoutError(f"global_step is {step} (expected 0 or more).")
    folder = f"iteration_{step:08d}"
    states = {t.name for t in tensors if _is_state(t.name, source)}
    files = _OutputNames(layout.num_ranks, folder, request.prefix, bool(states))
    placements = {
        t.name: files.placements(t.name, layout, t.name in states, t.name in source.scalars)
        for t in tensors
    }
    outputs = arrange(
        tensors,
        Layout(files.num_files, placements, notes=layout.notes),
        files.paths,
        remove_redundancy=request.remove_redundancy,
    )
    placed_tensors = [(t, None if t.name in source.scalars else _cut(layout, t)) for t in tensors]
    side = {
        f"{folder}/{ITERATION_METADATA}": metadata_json(placed_tensors, files.stores(outputs)),
        f"{folder}/{COMMON}": _common(request.numbers),
        TRACKER: str(step).encode(),
    }
    return Result(
        "iteration",
        outputs,
        SafetensorsContainer({"format": "ms"}),
        side,
        extras_to=folder,
        files_per_rank=files.num_files // layout.num_ranks,
    )


def _is_state(name: str, source: Catalog) -> bool:
    return name in source.scalars or weight_name(name) != name


def _cut(layout: Layout, tensor: Tensor) -> Placement | None:
    """Return the placement of a tensor; in the first stage if several stages hold it."""
    placement = layout.placements[tensor.name][0]
    return placement if layout.num_ranks > 1 else None


def _common(numbers: Mapping[str, Any]) -> bytes:
    """Return ``common.json``, the scalars that MindFormers resumes with; unknown ones are null.

    Raises:
        LayoutError: a scalar is infinite or NaN.
    """
    known = {name: numbers.get(name) for name in (*_COMMON, "consumed_samples")}
    more = {k: v for k, v in numbers.items() if k not in known and k != "ckpt_status"}
    scalars = {**known, **more, "ckpt_status": numbers.get("ckpt_status")}
    for name, value in scalars.items():
        if isinstance(value, float) and not isfinite(value):
            raise LayoutError(
                f"{name} is {value} (expected a finite number in {COMMON}). Leave it out with "
                "exclude= (--exclude)."
            )
    return json.dumps(scalars, indent=4).encode()


class _OutputNames:
    """Names of the output files: of weights by rank, then of optimizer states by rank."""

    def __init__(self, num_ranks: int, folder: str, prefix: str, has_states: bool) -> None:
        self._num_ranks, self._folder = num_ranks, folder
        kinds = ("model", "opt") if has_states else ("model",)
        named = prefix.rstrip("-_") + "-" if prefix.rstrip("-_") else ""
        self.names = tuple(
            f"{named}{kind}-{rank:07d}-{num_ranks:07d}.safetensors"
            for kind in kinds
            for rank in range(num_ranks)
        )
        self.num_files = len(self.names)
        self.paths = [f"{folder}/{name}" for name in self.names]

    def placements(
        self, name: str, layout: Layout, is_state: bool, is_scalar: bool
    ) -> tuple[Placement, ...]:
        """Return the placements of tensor ``name`` over the files; a scalar is in one file."""
        shift = self._num_ranks if is_state else 0
        if is_scalar:
            return (Placement((), (), shift),)
        return tuple(replace(p, first_rank=p.first_rank + shift) for p in layout.placements[name])

    def stores(self, outputs: Outputs) -> Stores:
        """Return the function that lists the files of a shard for the metadata."""

        def stores(name: str, placement: Placement, shard: Shard) -> list[tuple[int, str]]:
            mine = next(
                p
                for p in outputs.layout.placements[name]
                if p.first_rank % self._num_ranks == placement.first_rank
            )  # the first of several stages: the metadata has room for one layout
            return [
                (file % self._num_ranks, self.names[file])
                for file in outputs.holders(name, mine, shard)
            ]

        return stores
