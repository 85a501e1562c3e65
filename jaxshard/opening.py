"""Opening: from a path to a catalog, whatever the format.

The formats recognise themselves by file names; this module only knows the order in
which they are asked.
"""

from __future__ import annotations

import os
from pathlib import Path

from .catalog import Catalog
from .errors import FormatError, NotFoundError
from .formats import huggingface, layout_file, rank_files, strategy_files
from .layout import Layout
from .storage.local import LocalFolder
from .storage.staging import is_unfinished

PathLike = str | os.PathLike[str]


def open_checkpoint(
    path: PathLike, *, strategy: PathLike | None = None, suffix: str | None = None
) -> Catalog:
    """The contents of the checkpoint at ``path``, from headers only.

    Args:
        path: a folder, or a single weight file.
        strategy: for rank folders, the strategy files they were written with (a file or
            a folder); by default ``strategy/`` inside or beside the folder.
        suffix: for rank folders with several files a rank, which one: ``1_10``.

    Raises:
        NotFoundError: nothing there that jaxshard can read.
        FormatError: a file is not what it claims to be.
        CoverageError: files contradict each other.
    """
    where = Path(path)
    if is_unfinished(where):
        raise FormatError(
            f"{where} is an unfinished conversion. Complete it with --resume, or delete it."
        )
    folder = LocalFolder(where)
    try:
        files = folder.files()
        if rank_files.recognise(files):
            return rank_files.read(folder, _source_layout(where, strategy), suffix=suffix)
        if huggingface.recognise(files):
            return huggingface.read(folder)
    finally:
        folder.close()
    raise NotFoundError(
        f"{where} holds no checkpoint that jaxshard can read: neither *.safetensors nor rank_0/ "
        "folders were found."
    )


def open_strategy(path: PathLike) -> Layout:
    """The layout that the strategy files at ``path`` (one file, or a folder of them) say.

    Raises:
        NotFoundError: nothing there.
        FormatError: not strategy files.
        CoverageError: files of one stage contradict each other, or a stage is missing.
    """
    folder = LocalFolder(path)
    try:
        own = layout_file.find(folder)
        if own is not None:
            return layout_file.read(folder, own)
        return strategy_files.layout(strategy_files.read(folder))
    finally:
        folder.close()


def _source_layout(where: Path, given: PathLike | None) -> Layout | None:
    """What the strategy files say, or None: then ``rank_files`` says what it misses."""
    if given is not None:
        return open_strategy(given)
    for place in (where / "strategy", where.parent / "strategy"):
        if place.is_dir():
            return open_strategy(place)
    return None
