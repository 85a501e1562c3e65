"""Checkpoint 2.0 folders of MindFormers: shard files and ``metadata.json``.

    latest_checkpointed_iteration.txt            "10"
    iteration_00000010/
        common.json                              the job's numbers
        metadata.json                            each tensor's layout; which file has which shard
        llama-model-0000000-0000004.safetensors  what rank 0 of 4 stores of the weights
        llama-opt-0000000-0000004.safetensors    and of the optimizer's states

A shard is told by its number: counting over the parts of all dims, the last fastest
(``global_offset``, despite its name). The layout is told again as a device matrix and
tensor map; where the two disagree the folder is refused. Replicas may be stored by all
their holders or by one. What the metadata says is read by ``iteration_metadata``.
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
from ..core.decoders import FETCH, parse_object
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

_MAX_METADATA_BYTES = 1 << 28  # a thousand tensors on a thousand ranks, with all copies
_MAX_COMMON_BYTES = 1 << 20


def read(folder: Folder) -> Catalog:
    """The catalog of the one iteration in ``folder``.

    Files that are missing are passed over: replicas may serve, and optimizer states need
    not be there.

    Raises:
        FormatError: a file is damaged, or the metadata contradicts itself or the files.
        NotFoundError: weights are in no file that is there.
    """
    files = folder.files()
    size = files[ITERATION_METADATA].num_bytes
    if size > _MAX_METADATA_BYTES:
        raise FormatError(f"{ITERATION_METADATA} has {size} bytes, which is absurd. {FETCH}")
    told = parse(
        parse_object(folder.read(ITERATION_METADATA, 0, size), ITERATION_METADATA),
        ITERATION_METADATA,
    )
    found = _Found(folder, files, told)
    tensors = {t.name: t for one in told if (t := found.tensor(one))}
    model, _ = huggingface.read_model(folder, files)
    extras, _ = huggingface.carried(files, found.paths)
    return Catalog(
        root=folder.root,
        format="iteration",
        files=tuple(files[path] for path in found.paths),
        tensors=tensors,
        layout=_checkpoint_layout(told, tensors),
        model=model,
        metadata={},
        extras=tuple(path for path in extras if path != ITERATION_METADATA),
        scalars=scalar_names(tensors.values()),
        notes=(*found.notes(), *_health(folder, files)),
    )


@dataclass(slots=True)
class _Found:
    """The files that the metadata names and that are there."""

    folder: Folder
    files: Mapping[str, File]
    told: tuple[Described, ...]
    paths: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    _headers: dict[str, dict[str, HeaderEntry]] = field(default_factory=dict)
    _left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = {stored.path for one in self.told for stored in one.stored}
        self.paths = tuple(sorted(named & self.files.keys()))
        self.missing = tuple(sorted(named - self.files.keys()))
        for path in self.paths:
            header = read_header(self.folder, path, file_bytes=self.files[path].num_bytes)
            self._headers[path] = {entry.name: entry for entry in header.entries}

    def tensor(self, one: Described) -> Tensor | None:
        """The tensor with every piece that is there; None for a state of which none is."""
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
                    f"{quote_name(one.name)} is in {lost or 'no file'} by {ITERATION_METADATA}, "
                    f"which {self.folder.root} does not have. Fetch what is missing."
                )
            self._left_out.append(one.name)
            return None
        return Tensor(one.name, one.dtype, one.shape, tuple(pieces))

    def _entry(self, one: Described, path: str) -> HeaderEntry:
        entry = self._headers[path].get(one.name)
        if entry is None:
            raise FormatError(
                f"{ITERATION_METADATA} says that {path} holds {quote_name(one.name)}, but it does "
                f"not. {FETCH}"
            )
        if (entry.dtype, entry.shape) != (one.dtype, one.local_shape):
            raise FormatError(
                f"{path}: {quote_name(one.name)} is {entry.dtype} {entry.shape}, but "
                f"{ITERATION_METADATA} says {one.dtype} {one.local_shape}. {FETCH}"
            )
        return entry

    def notes(self) -> list[str]:
        notes = []
        if self.missing:
            notes.append(
                f"{format_list(self.missing)} is not there; replicas serve where they can."
            )
        if self._left_out:
            notes.append(
                f"{len(self._left_out)} optimizer states are in no file: "
                f"{format_list(self._left_out)}."
            )
        return notes


def _checkpoint_layout(told: Iterable[Described], tensors: Mapping[str, Tensor]) -> Layout | None:
    """Who holds which box; None where ranks are numbered in a way that no layout has."""
    kept = [one for one in told if one.name in tensors]
    stored = [rank for one in kept for _, _, rank in one.stored]
    placed = [one.placement for one in kept if one.placement]
    num_ranks = max((*(p.ranks.stop for p in placed), *(rank + 1 for rank in stored)), default=1)
    if any(one.placement is None and one.is_cut for one in kept):
        return None
    everywhere = Placement((("all", num_ranks),))
    return Layout(num_ranks, {one.name: (one.placement or everywhere,) for one in kept})


def _health(folder: Folder, files: Mapping[str, File]) -> list[str]:
    """What MindFormers' health monitor has left to say."""
    common = files.get(COMMON)
    if common is None or common.num_bytes > _MAX_COMMON_BYTES:
        return []
    status = parse_object(folder.read(COMMON, 0, common.num_bytes), COMMON).get("ckpt_status")
    if status != 1:
        return []
    return [f"{COMMON} has ckpt_status 1: MindFormers found this checkpoint unhealthy."]


# --- The ``metadata.json`` of a Checkpoint 2.0 folder: reader and writer

_KEY = re.compile(r"\((?P<name>(['\"]).*\2), \((?P<number>\d{1,9}),\)\)", re.DOTALL)
_MAX_PARTS = 1 << 20
_MAX_DIMS = 64
_MAX_DIM = 1 << 62


class ShardFile(NamedTuple):
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
    stored: tuple[ShardFile, ...]

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


def _stored(data: Mapping[str, Any], where: str) -> dict[str, list[ShardFile]]:
    found = dict[str, list[ShardFile]]()
    for key, entries in data.items():
        name, number = _name_and_number(key, where)
        for entry in entries if isinstance(entries, list) else [None]:
            path = entry.get("file_name") if isinstance(entry, dict) else None
            rank = entry.get("storage_rank") if isinstance(entry, dict) else None
            if not isinstance(path, str) or "/" in path or "\\" in path or path.startswith("."):
                _refuse(f"{where}: {quote_name(key)} is in no file of this folder")
            if type(rank) is not int or not 0 <= rank < _MAX_PARTS:
                _refuse(f"{where}: {quote_name(key)} has no storage_rank")
            found.setdefault(name, []).append(ShardFile(number, path, rank))
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


def _described(name: str, told: object, stored: tuple[ShardFile, ...], where: str) -> Described:
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


def metadata_json(tensors: Sequence[tuple[Tensor, Placement | None]], stores: Stores) -> bytes:
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


# --- Output files: weights and optimizer states of a rank in separate files
#
# A layout's ranks are files. So the files here are a layout of twice as many ranks: a state has
# the placement of its weight, that many ranks further on.

_COMMON = ("epoch_num", "step_num", "global_step", "loss_scale", "global_batch_size")


def plan_files(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Result:
    """Plan the files of ``iteration_{step}/`` and the tracker that names it.

    Raises:
        LayoutError: a tensor is not in the layout, or has a dtype that MindSpore has not.
    """
    everything = Layout(1, {t.name: (Placement(()),) for t in tensors})
    layout = everything if request.to is None else placed(source, tensors, request)
    step = int(request.numbers.get("global_step", request.numbers.get("step_num", 0)))
    if step < 0:
        raise LayoutError(f"global_step is {step}; an iteration is numbered from 0.")
    folder = f"iteration_{step:08d}"
    states = {t.name for t in tensors if _is_state(t.name, source)}
    files = _Files(layout.num_ranks, folder, request.prefix, bool(states))
    lying = {
        t.name: files.placements(t.name, layout, t.name in states, t.name in source.scalars)
        for t in tensors
    }
    outputs = arrange(
        tensors,
        Layout(files.num_files, lying, notes=layout.notes),
        files.paths,
        remove_redundancy=request.remove_redundancy,
    )
    told = [(t, None if t.name in source.scalars else _cut(layout, t)) for t in tensors]
    side = {
        f"{folder}/{ITERATION_METADATA}": metadata_json(told, files.stores(outputs)),
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
    """Where the tensor lies; of several stages that hold it, the first."""
    placement = layout.placements[tensor.name][0]
    return placement if layout.num_ranks > 1 else None


def _common(numbers: Mapping[str, Any]) -> bytes:
    """``common.json``: what MindFormers resumes with. What is not known is null.

    Raises:
        LayoutError: a number is infinite or not a number.
    """
    known = {name: numbers.get(name) for name in (*_COMMON, "consumed_samples")}
    more = {k: v for k, v in numbers.items() if k not in known and k != "ckpt_status"}
    said = {**known, **more, "ckpt_status": numbers.get("ckpt_status")}
    for name, value in said.items():
        if isinstance(value, float) and not isfinite(value):
            raise LayoutError(
                f"{name} is {value}, and {COMMON} can hold finite numbers only. Leave it out with "
                "exclude= (--exclude)."
            )
    return json.dumps(said, indent=4).encode()


class _Files:
    """Which file is which: those of weights by rank, then those of states."""

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
        self, name: str, layout: Layout, is_state: bool, is_number: bool
    ) -> tuple[Placement, ...]:
        """Where tensor ``name`` lies among the files; a number of the job in one of them."""
        shift = self._num_ranks if is_state else 0
        if is_number:
            return (Placement((), (), shift),)
        return tuple(replace(p, first_rank=p.first_rank + shift) for p in layout.placements[name])

    def stores(self, outputs: Outputs) -> Stores:
        """Which files store a shard, as the metadata is to say it."""

        def stores(name: str, placement: Placement, shard: Shard) -> list[tuple[int, str]]:
            mine = next(
                p
                for p in outputs.layout.placements[name]
                if p.first_rank % self._num_ranks == placement.first_rank
            )  # of several stages that hold it the first: one layout is all that can be said
            return [
                (file % self._num_ranks, self.names[file])
                for file in outputs.holders(name, mine, shard)
            ]

        return stores
