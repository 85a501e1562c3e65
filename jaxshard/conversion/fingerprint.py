"""Fingerprints: a text that two conversions share exactly if they make the same files.

By it ``--resume`` knows its own work. It covers which bytes of which files go where: the same
names and shapes may be stored in other places by another strategy, or made by another mapping.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..box import Box
from ..catalog import Catalog, Piece
from ..garbage import paused
from ..planning.moves import firsts
from ..targets.results import Result


@paused()
def fingerprint(catalog: Catalog, result: Result, only: frozenset[int] | None) -> str:
    """The fingerprint of making the files ``only`` (all, if None) of ``result``."""
    digest = hashlib.sha256()
    pieces = _Pieces()
    numbers: dict[int, int] = {}  # thousands of contents share their entries: each is told once
    for content in result.outputs.contents:
        texts = []
        for entry in content:
            if id(entry) in numbers:
                continue
            numbers[id(entry)] = len(numbers)
            tensor = entry.tensor
            texts.append(f"{tensor.name} {tensor.dtype.name} {entry.shape}\n")
            texts.append(pieces.told(firsts(tensor.pieces)))
        digest.update("".join(texts).encode())
        digest.update(repr([numbers[id(entry)] for entry in content]).encode())
    digest.update(pieces.boxes_told().encode())
    digest.update(repr((result.outputs.paths, result.outputs.content_of)).encode())
    told: dict[int, bytes] = {}  # the ranks of a stage share one strategy
    for name, data in sorted(result.side_files.items()):
        if id(data) not in told:
            told[id(data)] = hashlib.sha256(data).digest()
        digest.update(name.encode() + told[id(data)])
    return json.dumps(
        {
            "source": str(Path(catalog.root).absolute()),
            "files": [[f.path, f.num_bytes, f.mtime_ns] for f in catalog.files],
            "format": [result.format, result.seal is not None],
            "ranks": sorted(only) if only is not None else None,
            "result": digest.hexdigest(),
        },
        indent=1,
    )


class _Pieces:
    """Pieces as text; their boxes, of which there are few, by number."""

    def __init__(self) -> None:
        self._boxes: dict[Box, int] = {}

    def told(self, pieces: tuple[Piece, ...]) -> str:
        """Where ``pieces`` lie, and how."""
        return ";".join(map(self._told, pieces))

    def _told(self, piece: Piece) -> str:
        box = self._boxes.setdefault(piece.box, len(self._boxes))
        view = "" if piece.view is None else repr(piece.view)
        return f"{piece.file} {piece.offset} {box} {view}"

    def boxes_told(self) -> str:
        """The boxes that the numbers mean."""
        return repr([(box.start, box.stop) for box in self._boxes])
