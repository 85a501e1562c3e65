"""Rank folders: one weight file for each rank, cut by a strategy.

    model/rank_0/net_rank_0-1_10.safetensors      {prefix}_rank_{r}-{epoch}_{step}
    model/rank_1/net_rank_1-1_10.safetensors
    model/strategy/ckpt_strategy_rank_0.ckpt …    what says who holds which box

A file alone does not say which part of a tensor it holds: the layout does. Replicas
may be stored by every holder or by some: which, is seen from the headers. This
module decides nothing about targets; the strategy files' own format is another's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..box import Box
from ..catalog import Catalog, File, Piece, Tensor
from ..dtypes import DType
from ..errors import CoverageError, FormatError, LayoutError, some
from ..layout import Layout, Placement
from . import huggingface, safetensors
from .folder import Folder

_RANK_FILE = re.compile(r"rank_(\d+)/([^/]+)\.(safetensors|ckpt)")
_OWN = re.compile(r"rank_\d+/|strategy/")  # what belongs to this layout and not to the model
_NUMBERS = re.compile(r"\d+")
_MAX_RANK = 1 << 20  # a folder called rank_99999999999 is no rank


def recognise(files: Iterable[str]) -> bool:
    """Whether these are the files of a rank folder."""
    return any(_RANK_FILE.fullmatch(path) for path in files)


def read(
    folder: Folder,
    layout: Layout | None,
    *,
    suffix: str | None = None,
) -> Catalog:
    """The catalog of the rank files below ``folder``.

    Args:
        folder: has ``rank_0/`` … below it. Ranks may be missing if replicas have their bytes.
        layout: who holds which box, from the strategy files. A single rank needs none.
        suffix: which of several files a rank to take: the end of its name, ``1_10``. By
            default the newest that every rank has, by the numbers in the name.

    Raises:
        LayoutError: there are several ranks but no layout.
        FormatError: a file is damaged, or a shard's shape contradicts the layout.
        CoverageError: ranks disagree about a tensor, or about which files there are.
    """
    listed = folder.files()
    by_rank, notes = _choose(listed, suffix)
    if layout is None:
        if len(by_rank) > 1:
            raise LayoutError(
                f"{folder.root} has {len(by_rank)} ranks but no strategy files, so nothing says "
                "which part of a tensor each holds. Name them with --src-strategy PATH."
            )
        layout = Layout(max(by_rank) + 1, {})
    _check_ranks(by_rank, layout, folder.root)
    gathered = _Gathered(layout)
    files = tuple(listed[by_rank[rank]] for rank in sorted(by_rank))
    for number, rank in enumerate(sorted(by_rank)):
        header = safetensors.read_header(folder, by_rank[rank])
        for entry in header.entries:
            gathered.add(rank, number, entry, by_rank[rank])
        gathered.metadata |= header.metadata
    notes += gathered.notes()
    missing = sorted(set(range(layout.num_ranks)) - set(by_rank))
    if missing:
        notes.append(f"no files of rank {some(map(str, missing))}; replicas serve where they can.")
    model, _ = huggingface.read_model(folder, listed)
    others = [p for p in listed if not _OWN.match(p)]
    extras, _ = huggingface.carried(others, [f.path for f in files])
    gathered.metadata.pop("remove_redundancy", None)  # what the files hold decides
    return Catalog(
        root=folder.root,
        format="ranks",
        files=files,
        tensors=gathered.tensors(),
        layout=replace(layout, placements=gathered.placements()),
        model=model,
        metadata=gathered.metadata,
        extras=extras,
        hyper=frozenset(gathered.hyper),
        notes=tuple(notes),
    )


def file_path(rank: int, prefix: str, extension: str = "safetensors") -> str:
    """Where the file of ``rank`` lies, as MindFormers names it.

    >>> file_path(3, "checkpoint_")
    'rank_3/checkpoint_3.safetensors'
    """
    return f"rank_{rank}/{prefix}{rank}.{extension}"


# --- which file of each rank ---------------------------------------------------------


def _choose(files: Mapping[str, File], suffix: str | None) -> tuple[dict[int, str], list[str]]:
    candidates: dict[int, list[str]] = {}
    for path in files:
        if (match := _RANK_FILE.fullmatch(path)) and int(match[1]) < _MAX_RANK:
            candidates.setdefault(int(match[1]), []).append(path)
    steps = {rank: _by_step(rank, paths, suffix) for rank, paths in candidates.items()}
    common = set.intersection(*(set(found) for found in steps.values()))
    if not common:
        shown = some(f"rank {r}: {some(found.values(), 2)}" for r, found in sorted(steps.items()))
        wanted = f" ending in {suffix}" if suffix else ""
        raise CoverageError(
            f"no step{wanted} has a file in every one of the {len(steps)} rank folders ({shown}). "
            "Choose one with --suffix, or fetch the missing files."
        )
    step = max(common)
    notes = []
    newer = [rank for rank, found in steps.items() if max(found) > step]
    if newer:
        notes.append(
            f"rank {some(map(str, newer))} has newer files; the newest step that every rank has "
            "is taken."
        )
    return {rank: found[step] for rank, found in steps.items()}, notes


def _by_step(rank: int, paths: list[str], suffix: str | None) -> dict[tuple[int, ...], str]:
    """The files of one rank by the step their names tell."""
    found: dict[tuple[int, ...], str] = {}
    for path in sorted(paths):
        stem = path.rsplit("/", 1)[1].rsplit(".", 1)[0]
        if suffix is not None and not _ends_with(stem, suffix):
            continue
        step = _step(stem, rank)
        if step in found:
            raise CoverageError(
                f"rank_{rank} has both {found[step]} and {path}, and their names do not tell which "
                "is newer. Choose one with --suffix, or move the other away."
            )
        found[step] = path
    return found


def _ends_with(stem: str, suffix: str) -> bool:
    """Whether ``stem`` ends in ``suffix`` and not in the middle of a number."""
    cut = len(stem) - len(suffix)
    return stem.endswith(suffix) and (
        cut == 0 or not (suffix[0].isdigit() and stem[cut - 1].isdigit())
    )


def _step(stem: str, rank: int) -> tuple[int, ...]:
    """The last two numbers of a file's name, its rank aside: (epoch, step).

    >>> _step("net_rank_3-1_10", 3), _step("checkpoint_3", 3)
    ((1, 10), ())
    """
    tail = re.sub(rf"(?:^|(?<=_))(rank_)?{rank}(?=$|[-_])", "", stem, count=1)
    return tuple(int(n) for n in _NUMBERS.findall(tail)[-2:])


def _check_ranks(by_rank: Mapping[int, str], layout: Layout, root: str) -> None:
    beyond = sorted(r for r in by_rank if r >= layout.num_ranks)
    if beyond:
        raise CoverageError(
            f"{root} has rank {some(map(str, beyond))}, but its strategy is one of "
            f"{layout.num_ranks} ranks. Give the strategy files it was written with."
        )


# --- what the files hold ---------------------------------------------------------------


@dataclass(slots=True)
class _Found:
    """One tensor as seen so far."""

    dtype: DType
    shape: tuple[int, ...]
    where: str
    pieces: list[Piece] = field(default_factory=list)


class _Gathered:
    """Tensors gathered from the ranks' headers."""

    def __init__(self, layout: Layout) -> None:
        self.metadata: dict[str, str] = {}
        self.hyper: dict[str, None] = {}
        self._layout = layout
        self._found: dict[str, _Found] = {}

    def add(self, rank: int, file: int, entry: safetensors.Entry, path: str) -> None:
        placements = self._layout.placements.get(entry.name)
        if placements is None:
            self.hyper[entry.name] = None
            shape, box = entry.shape, Box.whole(entry.shape)
        else:
            shape, box = _place(entry, placements, rank, path)
        found = self._found.setdefault(entry.name, _Found(entry.dtype, shape, path))
        if (found.shape, found.dtype) != (shape, entry.dtype):
            raise CoverageError(
                f"{entry.name} is {found.dtype} {found.shape} by {found.where}, but "
                f"{entry.dtype} {shape} by {path}. Give the strategy files these were written with."
            )
        found.pieces.append(Piece(file, entry.start, box))

    def tensors(self) -> dict[str, Tensor]:
        return {
            name: Tensor(name, f.dtype, f.shape, tuple(f.pieces)) for name, f in self._found.items()
        }

    def placements(self) -> dict[str, tuple[Placement, ...]]:
        everywhere = (Placement((("all", self._layout.num_ranks),)),)
        return {name: self._layout.placements.get(name, everywhere) for name in self._found}

    def notes(self) -> list[str]:
        absent = [n for n in self._layout.placements if n not in self._found]
        if not absent:
            return []
        return [f"{len(absent)} tensors of the strategy are in no file: {some(absent)}."]


def _place(
    entry: safetensors.Entry, placements: tuple[Placement, ...], rank: int, path: str
) -> tuple[tuple[int, ...], Box]:
    """The full shape of a rank's tensor, and the box of it that the rank holds."""
    placement = next((p for p in placements if rank in p.ranks), None)
    if placement is None:
        held = ", ".join(f"{p.ranks.start} to {p.ranks.stop - 1}" for p in placements)
        raise CoverageError(
            f"{path} holds {entry.name}, which by the strategy lies on ranks {held} only. Give the "
            "strategy files it was written with."
        )
    if len(placement.spec) > len(entry.shape):
        raise FormatError(
            f"{path}: {entry.name} has shape {entry.shape}, but its strategy cuts "
            f"{len(placement.spec)} dims. Give the strategy files it was written with."
        )
    shape = tuple(n * placement.ways(dim) for dim, n in enumerate(entry.shape))
    return shape, placement.boxes(shape)[rank - placement.first_rank]
