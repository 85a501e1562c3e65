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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..core.catalog import Catalog, File, StoredShard, Tensor
from ..core.layout import Layout, Placement
from ..errors import FormatError, NotFoundError, format_list, quote_name
from ..rules.match import weight_name
from . import huggingface
from .iteration_metadata import Described, parse
from .iteration_names import COMMON, METADATA
from .reader import Folder
from .safetensors import Entry, read_header
from .strict_json import FETCH, parse_object
from .training_scalars import job_numbers

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
    size = files[METADATA].num_bytes
    if size > _MAX_METADATA_BYTES:
        raise FormatError(f"{METADATA} has {size} bytes, which is absurd. {FETCH}")
    told = parse(parse_object(folder.read(METADATA, 0, size), METADATA), METADATA)
    found = _Found(folder, files, told)
    tensors = {t.name: t for one in told if (t := found.tensor(one))}
    model, _ = huggingface.read_model(folder, files)
    extras, _ = huggingface.carried(files, found.paths)
    return Catalog(
        root=folder.root,
        format="iteration",
        files=tuple(files[path] for path in found.paths),
        tensors=tensors,
        layout=_layout(told, tensors),
        model=model,
        metadata={},
        extras=tuple(path for path in extras if path != METADATA),
        hyper=job_numbers(tensors.values()),
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
    _headers: dict[str, dict[str, Entry]] = field(default_factory=dict)
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
                    f"{quote_name(one.name)} is in {lost or 'no file'} by {METADATA}, which "
                    f"{self.folder.root} does not have. Fetch what is missing."
                )
            self._left_out.append(one.name)
            return None
        return Tensor(one.name, one.dtype, one.shape, tuple(pieces))

    def _entry(self, one: Described, path: str) -> Entry:
        entry = self._headers[path].get(one.name)
        if entry is None:
            raise FormatError(
                f"{METADATA} says that {path} holds {quote_name(one.name)}, but it does not. "
                f"{FETCH}"
            )
        if (entry.dtype, entry.shape) != (one.dtype, one.local_shape):
            raise FormatError(
                f"{path}: {quote_name(one.name)} is {entry.dtype} {entry.shape}, but {METADATA} "
                f"says {one.dtype} {one.local_shape}. {FETCH}"
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


def _layout(told: Iterable[Described], tensors: Mapping[str, Tensor]) -> Layout | None:
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
