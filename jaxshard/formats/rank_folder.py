"""Rank folders: one weight file per rank, sharded by a strategy.

    model/rank_0/net_rank_0-1_10.safetensors      or .ckpt; several steps may share a folder
    model/rank_1/net_rank_1-1_10.safetensors
    model/strategy/ckpt_strategy_rank_0.ckpt …    the layout: the boxes of every rank
    model/elsewhere.json                          tensors stored on other hosts

A file does not contain the position of its shards: the layout does. A replica may be stored by
every holder or by some of them, which the headers show. ``strategy_files`` reads the layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import lcm, prod
from typing import Any

from ..core.box import Box
from ..core.catalog import Catalog, StoredShard, Tensor
from ..core.decoders import as_ints, as_list, as_object, parse_object, refuse
from ..core.dtypes import BY_NAME, DType
from ..core.layout import Axes, Layout, Placement, Spec, check_divides
from ..core.runtime import cached
from ..errors import CoverageError, FormatError, LayoutError, format_list, quote_name
from ..planning.outputs import arrange
from ..rules.match import weight_name
from . import huggingface, rank_names, strategy_files, strategy_layouts
from .folder import Folder
from .huggingface import scalar_names
from .output_files import Request, Result, SafetensorsContainer
from .safetensors import StoredTensor
from .strategy_layouts import for_dims
from .weight_files import CkptContainer, read_weight_file

_STRATEGY = re.compile(r"(merged_)?strategy/|merged_strategy\.ckpt")
_ALL_STRATEGIES = "Pass the folder with the strategy files of all ranks."
_LARGE_ELEMENTS = 1024  # a tensor without a strategy and with more elements is not a scalar


def recognise(files: Iterable[str]) -> bool:
    """Return whether ``files`` include weight files in rank folders."""
    return any(map(rank_names.is_rank_file, files))


def read(
    folder: Folder,
    layout: Layout | None,
    *,
    suffix: str | None = None,
) -> Catalog:
    """Read the catalog of the rank files below ``folder``.

    Args:
        folder: contains ``rank_0/`` …. Ranks may be missing if replicas are present.
        layout: the layout of the strategy files; optional for a single rank.
        suffix: selects one of several files per rank by the end of its name, ``1_10``; by
            default the newest step that every rank has.

    Raises:
        LayoutError: several ranks without a layout.
        FormatError: a file is damaged, or a shard's shape contradicts the layout.
        CoverageError: ranks disagree on a tensor or on the files.
    """
    listed = folder.files()
    chosen = rank_names.choose(listed, suffix)
    by_rank = chosen.paths
    notes = [*(layout.notes if layout else ()), *chosen.notes]
    if layout is None:
        notes.append(_check_alone(by_rank, folder.root))
    else:
        _check_ranks(by_rank, layout, folder.root)
    gathered = _Gathered(layout)
    files = tuple(listed[by_rank[rank]] for rank in sorted(by_rank))
    for number, rank in enumerate(sorted(by_rank)):
        file = read_weight_file(folder, by_rank[rank])
        for entry in file.entries:
            gathered.add(rank, number, entry, by_rank[rank])
        gathered.metadata |= file.metadata
        notes += file.notes
    gathered.check_names(folder.root)
    gathered.add_elsewhere(read_remote_tensors(folder) if layout else {})
    lost = gathered.lost(by_rank.keys())
    notes += gathered.notes(lost)
    missing = sorted(set(range(layout.num_ranks)) - set(by_rank)) if layout else []
    if layout is not None and layout.unknown:
        unknown = format_list(map(str, layout.unknown), 8)
        notes.append(
            f"the strategy files of rank {unknown} are missing, so tensors that need these ranks "
            f"are refused. {_ALL_STRATEGIES}"
        )
    if missing:
        notes.append(
            f"no files of rank {format_list(map(str, missing))}; replicas are read instead where "
            "possible."
        )
    model, _ = huggingface.read_model(folder, listed)
    others = [p for p in listed if not _is_own(p)]
    extras, _ = huggingface.carried(others, [f.path for f in files])
    gathered.metadata.pop("remove_redundancy", None)  # the headers decide
    return Catalog(
        root=folder.root,
        format="ranks",
        files=files,
        tensors=(tensors := gathered.tensors()),
        layout=gathered.layout(layout) if layout else None,
        model=model,
        metadata=gathered.metadata,
        extras=extras,
        scalars=frozenset(gathered.scalars) if layout else scalar_names(tensors.values()),
        notes=tuple(notes),
        lost=lost,
    )


def _is_own(path: str) -> bool:
    """Return whether ``path`` belongs to the rank folders and not to the model."""
    of_rank = rank_names.rank_of_folder(path) is not None
    return of_rank or path == REMOTE_TENSORS or bool(_STRATEGY.match(path))


def _check_alone(by_rank: Mapping[int, str], root: str) -> str:
    """Return a note on a single rank without a strategy; refuse several ranks."""
    if len(by_rank) > 1:
        raise LayoutError(
            f"{root} has {len(by_rank)} ranks but no strategy files, so the shards' positions are "
            "unknown. Pass them: open(path, strategy=…), or src_strategy= of a conversion "
            "(--src-strategy PATH)."
        )
    return f"no strategy files: the tensors in {next(iter(by_rank.values()))} are read as whole."


def _check_ranks(by_rank: Mapping[int, str], layout: Layout, root: str) -> None:
    beyond = sorted(r for r in by_rank if r >= layout.num_ranks)
    if beyond:
        raise CoverageError(
            f"{root} has rank {format_list(map(str, beyond))}, but its strategy has "
            f"{layout.num_ranks} ranks. Pass the strategy files it was written with."
        )
    unknown = sorted(set(by_rank).intersection(layout.unknown))
    if unknown:
        stage = min(p.first_rank // p.num_ranks for ps in layout.placements.values() for p in ps)
        raise CoverageError(
            f"{root} has rank {format_list(map(str, unknown))}, but got the strategy of stage "
            f"{stage} only. {_ALL_STRATEGIES}"
        )


# --- headers of the files -------------------------------------------------------------------------


@dataclass(slots=True)
class _SeenTensor:
    """A tensor with the shards seen so far."""

    dtype: DType
    shape: tuple[int, ...]
    where: str
    pieces: list[StoredShard] = field(default_factory=list)


class _Gathered:
    """Tensors merged from the headers of all ranks."""

    def __init__(self, layout: Layout | None) -> None:
        self.metadata: dict[str, str] = {}
        self.scalars: dict[str, None] = {}
        self._placed = dict(layout.placements) if layout else {}
        self._found: dict[str, _SeenTensor] = {}

    def add(self, rank: int, file: int, entry: StoredTensor, path: str) -> None:
        placements = self._placed.get(entry.name)
        if placements is None:
            self.scalars[entry.name] = None
            shape, box = entry.shape, Box.whole(entry.shape)
        else:
            if len(entry.shape) == 1 and len(placements[0].spec) > 1:
                placements = tuple(for_dims(p, 1) for p in placements)
                self._placed[entry.name] = placements
            shape, box = _place(entry, placements, rank, path)
        found = self._found.get(entry.name)
        if found is None:
            found = self._found[entry.name] = _SeenTensor(entry.dtype, shape, path)
        if (found.shape, found.dtype) != (shape, entry.dtype):
            raise CoverageError(
                f"{entry.name}: {found.dtype} {found.shape} in {found.where}, but {entry.dtype} "
                f"{shape} in {path}. Pass the strategy files these were written with."
            )
        found.pieces += [
            StoredShard(file, at, _moved(part, entry.shape, box)) for at, part in entry.pieces
        ]

    def add_elsewhere(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors that only other hosts store, without shards."""
        for name, tensor in tensors.items():
            if name in self._placed and name not in self._found:
                self._found[name] = _SeenTensor(tensor.dtype, tensor.shape, REMOTE_TENSORS)

    def check_names(self, root: str) -> None:
        """Raise CoverageError if the strategy has none of the tensors, as all would seem whole."""
        if self._placed and self._found and not self._found.keys() & self._placed.keys():
            raise CoverageError(
                f"the strategy lacks all {len(self._found)} tensors of the files: {root} has "
                f"{format_list(self._found, 3)}, the strategy {format_list(self._placed, 3)}. "
                "Pass the strategy files these were written with."
            )

    def lost(self, present: Collection[int]) -> dict[str, tuple[int, ...]]:
        """Return weights whose ranks have no files here, with these ranks."""
        return {
            name: tuple(sorted(ranks))
            for name, placed in self._placed.items()
            if name not in self._found
            and weight_name(name) == name
            and not (ranks := {r for p in placed for r in p.ranks}).intersection(present)
        }

    def tensors(self) -> dict[str, Tensor]:
        return {
            name: Tensor(name, f.dtype, f.shape, tuple(f.pieces)) for name, f in self._found.items()
        }

    def layout(self, layout: Layout) -> Layout:
        """Return the layout of the tensors in the files; all others become ``absent``."""
        everywhere = (Placement((("all", layout.num_ranks),)),)
        held = {name: self._placed.get(name, everywhere) for name in self._found}
        absent = {name: placed for name, placed in self._placed.items() if name not in held}
        return replace(layout, placements=held, absent=absent)

    def notes(self, lost: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Return notes on tensors that only the strategy, or only the files, contain."""
        absent = [n for n in self._placed if n not in self._found and weight_name(n) not in lost]
        states = [n for n in absent if weight_name(n) != n]
        weights = [n for n in absent if weight_name(n) == n]
        large = [n for n in self.scalars if prod(self._found[n].shape) > _LARGE_ELEMENTS]
        texts = (
            (
                list(lost),
                f"weights are on ranks without files here (rank {_ranks_of(lost)}): {{}}. Tensors "
                "that need them are refused.",
            ),
            (
                weights,
                "weights of the strategy are missing in the files: {}. Is the checkpoint complete?",
            ),
            (states, "optimizer states of the strategy are missing in the files: {}."),
            (
                large if self._placed else [],
                "tensors are missing in the strategy and read as whole on every rank: {}. "
                "jaxshard verify compares the ranks.",
            ),
        )
        return [f"{len(names)} {text.format(format_list(names))}" for names, text in texts if names]


def _ranks_of(lost: Mapping[str, tuple[int, ...]]) -> str:
    return format_list(map(str, sorted({rank for ranks in lost.values() for rank in ranks})), 8)


def _moved(part: Box, held: tuple[int, ...], box: Box) -> Box:
    """Return ``part`` of a shard of shape ``held`` in coordinates of the whole tensor."""
    if part.stop == held and not any(part.start):
        return box  # shared by thousands of tensors
    start = tuple(a + o for a, o in zip(part.start, box.start, strict=True))
    return Box(start, tuple(b + o for b, o in zip(part.stop, box.start, strict=True)))


def _place(
    entry: StoredTensor, placements: tuple[Placement, ...], rank: int, path: str
) -> tuple[tuple[int, ...], Box]:
    """Return the full shape of a rank's tensor, and the rank's box of it."""
    placement = next((p for p in placements if rank in p.ranks), None)
    if placement is None:
        held = ", ".join(f"{p.ranks.start} to {p.ranks.stop - 1}" for p in placements)
        raise CoverageError(
            f"{path} contains {entry.name}, which is on ranks {held} only per the strategy. Pass "
            "the strategy files it was written with."
        )
    if len(placement.spec) > len(entry.shape):
        raise FormatError(
            f"{path}: {entry.name} has shape {entry.shape}, but its strategy splits "
            f"{len(placement.spec)} dims. Pass the strategy files it was written with."
        )
    return _whole(placement, entry.shape, rank)


@cached(4096)
def _whole(placement: Placement, held: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], Box]:
    """Return the full shape if ``rank`` holds a box of shape ``held``, and that box."""
    shape = tuple(n * placement.ways(dim) for dim, n in enumerate(held))
    return shape, placement.box(shape, rank)


# --- manifest of tensors stored on other hosts ----------------------------------------------------

# Hosts without a shared disk each keep the files of their own ranks. The manifest gives each host
# the names and shapes of all tensors, so requests for remote bytes fail with a clear message.
#
#   {"jaxshard_elsewhere": 1, "save": "7c01…",
#    "tensors": {"model.layers.9.mlp.up_proj.weight": ["BF16", [64, 16]]}}
#
# "save" is equal in all folders of one save. A host that died while publishing may still have an
# older manifest; then the identifiers differ.

REMOTE_TENSORS = "elsewhere.json"

_MARK, _VERSION = "jaxshard_elsewhere", 1
_MAX_BYTES = 100_000_000
_MAX_DIMS = 64
_MAX_DIM = 1 << 62


def remote_tensors_json(tensors: Iterable[Tensor], save: str = "") -> bytes:
    """Return the manifest of ``tensors`` for a folder of the save with identifier ``save``."""
    described = {t.name: [t.dtype.name, t.shape] for t in tensors}
    return (json.dumps({_MARK: _VERSION, "save": save, "tensors": described}) + "\n").encode()


def read_remote_tensors(folder: Folder) -> dict[str, Tensor]:
    """Read the tensors of the manifest, without shards; {} without a manifest.

    Raises:
        FormatError: the file is damaged.
    """
    return {
        name: _remote_tensor(name, entry)
        for name, entry in _read_manifest(folder).get("tensors", {}).items()
    }


def save_of(folder: Folder) -> str:
    """Read the identifier that all folders of one save share; "" without a manifest.

    Raises:
        FormatError: the file is damaged.
    """
    save = _read_manifest(folder).get("save", "")
    if not isinstance(save, str):
        refuse(f"{REMOTE_TENSORS}: save", save, "a string")
    return save


def _read_manifest(folder: Folder) -> dict[str, Any]:
    known = folder.files().get(REMOTE_TENSORS)
    if known is None or known.num_bytes > _MAX_BYTES:
        return {}
    root = parse_object(folder.read(REMOTE_TENSORS, 0, known.num_bytes), REMOTE_TENSORS)
    if _MARK not in root:
        return {}  # another program's file of the same name
    version = root[_MARK]
    if type(version) is not int or version != _VERSION:
        raise FormatError(
            f"{REMOTE_TENSORS}: version {quote_name(repr(version))} (expected {_VERSION}). Upgrade "
            "jaxshard, or save again."
        )
    as_object(root.get("tensors"), f"{REMOTE_TENSORS}: tensors")
    return root


def _remote_tensor(name: str, entry: object) -> Tensor:
    subject = f"{REMOTE_TENSORS}: {quote_name(name)}"
    fields = as_list(entry, subject)
    kind = BY_NAME.get(fields[0]) if len(fields) == 2 and isinstance(fields[0], str) else None
    if kind is None:
        refuse(subject, entry, "[dtype, shape]")
    return Tensor(name, kind, as_ints(fields[1], subject, 0, _MAX_DIM, _MAX_DIMS), ())


# --- rank redundancy ------------------------------------------------------------------------------

Holders = tuple[tuple[int, ...], ...]


def keepers(layout: Layout) -> dict[tuple[str, int], int]:
    """Return the holder that keeps each shard, as MindSpore chooses it.

    Keys are (name, first rank of the placement); values index the holders.

    >>> rows = Placement((("dp", 2), ("mp", 2)), (("mp",),))
    >>> keepers(Layout(4, {"w2": (rows,), "w1": (rows,)}))
    {('w1', 0): 0, ('w2', 0): 1}
    """
    alike: dict[Holders, int] = {}
    groups: dict[tuple[Axes, Spec], tuple[int, int]] = {}  # index in alike, number of replicas
    turns: dict[tuple[int, int], int] = {}
    found: dict[tuple[str, int], int] = {}
    for name in sorted(layout.placements):
        for placed in layout.placements[name]:
            cut = placed.axes, placed.spec
            if cut not in groups:  # computed once per placement: there may be thousands of holders
                holders = _holders(placed)
                groups[cut] = alike.setdefault(holders, len(alike)), len(holders[0])
            group, replicas = groups[cut]
            turn = turns.get((placed.first_rank, group), 0)
            turns[placed.first_rank, group] = turn + 1
            found[name, placed.first_rank] = turn % replicas
    return found


def _holders(placement: Placement) -> Holders:
    """Return the holders of each shard, counted from the first rank of the placement."""
    shape = tuple(placement.ways(dim) for dim in range(len(placement.spec)))
    return tuple(shard.holders for shard in placement.shards(shape))


# --- output files ---------------------------------------------------------------------------------

STRATEGY_FOLDER = "strategy"


def plan_files(
    source: Catalog, tensors: Sequence[Tensor], request: Request, *, ckpt: bool = False
) -> Result:
    """Plan ``rank_{r}/{prefix}_rank_{r}-{epoch}_{step}`` of each rank, and ``strategy/``.

    The files are ``.ckpt`` if ``ckpt``, else safetensors.

    Raises:
        LayoutError: a tensor is not in the layout, or does not divide.
    """
    layout = _by_stages(placed(source, tensors, request), source)
    strategy, notes = _strategy(source, tensors, layout)
    layout = replace(layout, notes=(*layout.notes, *notes))
    kind = "ckpt" if ckpt else "safetensors"
    prefix = rank_names.check_prefix(request.prefix)
    paths = [rank_names.file_path(r, prefix, request.step, kind) for r in range(layout.num_ranks)]
    once = request.remove_redundancy
    kept_by = keepers(_of_strategy(layout, source.scalars)) if once else None
    outputs = arrange(tensors, layout, paths, remove_redundancy=once, keepers=kept_by)
    side = {f"{STRATEGY_FOLDER}/{path}": data for path, data in strategy.items()}
    if ckpt:
        return Result("ckpt", outputs, CkptContainer(source.metadata, request.crc), side)
    redundancy = {"remove_redundancy": str(once)}  # as Python writes bools
    metadata = {**source.metadata, "format": "ms", **redundancy}
    return Result("ranks", outputs, SafetensorsContainer(metadata), side)


def placed(source: Catalog, tensors: Sequence[Tensor], request: Request) -> Layout:
    """Return the requested layout, with training scalars on every rank.

    Raises:
        LayoutError: a tensor is not in the layout.
    """
    assert request.to is not None
    layout = strategy_files.for_tensors(request.to, {t.name: t.shape for t in tensors})
    _check_names(source, tensors, layout)
    return _with_scalars(layout, source, tensors)


def _strategy(
    source: Catalog, tensors: Sequence[Tensor], layout: Layout
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Return the strategy files of all ranks, or a layout file if they cannot express it.

    Training scalars are left out, because they are never split. Also returns notes.
    """
    weights = [t for t in tensors if t.name not in source.scalars]
    included = weights or tensors
    for tensor in included:
        for placement in layout.placements[tensor.name]:
            check_divides(placement, tensor.shape, tensor.name)
    every = _of_strategy(layout, source.scalars if weights else frozenset())
    absent = _absent_shapes(every, {t.name: t.shape for t in tensors}, source.lost)
    shapes = {t.name: t.shape for t in included} | absent
    every = strategy_files.for_tensors(every, absent)
    try:
        return strategy_files.raw_files(strategy_files.from_layout(every, shapes)), ()
    except LayoutError as error:
        note = (
            f"the layout is in {STRATEGY_FOLDER}/{rank_names.LAYOUT_FILE}, because "
            f"MindSpore's strategy files cannot express it: {str(error).split('. ')[0]}."
        )
        own = strategy_layouts.layout_file_bytes(every, shapes)
        return {rank_names.LAYOUT_FILE: own}, (note,)


def _absent_shapes(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], lost: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Return shapes of tensors that only the strategy contains; the result's strategy keeps them.

    An optimizer state takes part in rank redundancy and has the shape of its weight. Only the
    split of weights on other hosts is known; any shape that it divides is equivalent.
    """
    found = {}
    for name, placements in layout.placements.items():
        weight = weight_name(name)
        if name in shapes or (weight not in shapes and weight not in lost):
            continue
        shape = shapes.get(weight) or _least_shape(placements)
        with suppress(LayoutError):
            for placement in placements:
                check_divides(for_dims(placement, len(shape)), shape)
            found[name] = shape
    return found


def _least_shape(placements: Sequence[Placement]) -> tuple[int, ...]:
    dims = max(len(p.spec) for p in placements)
    return tuple(lcm(*(p.ways(dim) for p in placements)) for dim in range(dims))


def _by_stages(layout: Layout, source: Catalog) -> Layout:
    """Return ``layout`` with a placement per stage, except for training scalars."""
    stage = prod(n for _, n in layout.stage_axes) if layout.stage_axes else layout.num_ranks
    placements = {
        name: tuple(s for p in placed for s in _by_stage(p, stage))
        for name, placed in layout.placements.items()
        if name not in source.scalars
    }
    return replace(layout, placements={**layout.placements, **placements})


def _of_strategy(layout: Layout, scalars: frozenset[str]) -> Layout:
    """Return all names of the strategy, absent ones too, because MindSpore counts them."""
    every = {**layout.absent, **layout.placements}
    return replace(layout, placements={n: p for n, p in every.items() if n not in scalars})


def _by_stage(placement: Placement, stage: int) -> list[Placement]:
    """Split the placement of an unsplit tensor over several stages into one per stage."""
    if placement.spec or placement.num_ranks <= stage:
        return [placement]
    firsts = range(placement.first_rank, placement.ranks.stop, stage)
    return [Placement((("all", stage),), (), first) for first in firsts]


def _with_scalars(layout: Layout, source: Catalog, tensors: Iterable[Tensor]) -> Layout:
    """Return ``layout`` with training scalars on every rank."""
    everywhere = (Placement((("all", layout.num_ranks),)),)
    added = {t.name: everywhere for t in tensors if t.name in source.scalars}
    return replace(layout, placements={**layout.placements, **added})


def _check_names(source: Catalog, tensors: Iterable[Tensor], layout: Layout) -> None:
    weights = {t.name for t in tensors} - source.scalars
    unplaced = sorted(weights - set(layout.placements))
    if unplaced:
        raise LayoutError(
            f"{len(unplaced)} tensors are not in the target's strategy: {format_list(unplaced)}. "
            "Leave them out (of a conversion with exclude=, --exclude; optimizer states with "
            "drop_prefix=, --drop-prefix adam_), or pass a strategy that has them."
        )
