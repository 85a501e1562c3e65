"""Replacing: what ``--overwrite`` may take away, which is a result like ours and nothing else.

A mistyped path must not cost a home directory. So a folder is replaced only if the names in
it are those of a checkpoint as this library writes them, and nothing lies there that such a
checkpoint has not. Names decide: no file is opened, and no link is followed.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import FormatError, LayoutError, some
from ..formats import complete_ckpt, iteration_names, layout_file, orbax_names, rank_names
from ..formats.huggingface import INDEX, MINDSPORE_INDEX, SINGLE, is_weights

_COMPLETE = {SINGLE, INDEX, MINDSPORE_INDEX, complete_ckpt.NAME}  # one of them is at the top
_OURS = re.compile(r"rank_\d+/|iteration_\d+/|(merged_)?strategy/")  # folders of weights
_STRATEGY = re.compile(rf"[^/]*strategy[^/]*\.(ckpt|json)|{re.escape(layout_file.NAME)}")
_KINDS = (".safetensors", ".ckpt", ".json")  # what we write; an optimizer.pt is somebody's work
_HARMLESS = {".gitattributes", ".gitignore", ".DS_Store", ".cache", ".ipynb_checkpoints"}


def refuse_foreign(destination: Path) -> None:
    """Refuse to replace the folder ``destination`` unless it is empty, a checkpoint or a strategy.

    Raises:
        LayoutError: with what is there.
    """
    strange = _strange(destination)
    if strange:
        raise LayoutError(
            f"{destination} is not replaced: {strange}. What is replaced (--overwrite) is a "
            "checkpoint that jaxshard wrote, or one like it, and nothing else. Choose another "
            "destination, or remove this one yourself."
        )


def refuse_other_file(destination: Path) -> None:
    """Refuse to replace ``destination`` by one weight file unless it is a file.

    Raises:
        LayoutError: it is a folder, or something else.
    """
    if not destination.is_file():
        raise LayoutError(
            f"{destination} is no file, so no file is put in its place. Choose another destination."
        )


def _strange(place: Path) -> str | None:
    """Why ``place`` is not one of ours, or None."""
    if not place.is_dir():
        return "it is no folder"
    names = sorted(os.listdir(place))
    hidden = [n for n in names if n.startswith(".") and n not in _HARMLESS]
    if hidden:
        return f"it holds {some(hidden, 3)}, which no checkpoint does"
    if not (all(map(_STRATEGY.fullmatch, names)) or _is_checkpoint(place)):
        return f"it holds {some(names, 3)}, and no checkpoint"
    weights = sorted(filter(is_weights, _files(place)))
    other = [f for f in weights if "/" in f and not _OURS.match(f)]
    if other:
        return f"below it lies {some(other, 3)}, which is of another checkpoint"
    strange = [f for f in weights if not f.endswith(_KINDS)]
    if strange:
        return f"beside the checkpoint lies {some(strange, 3)}, which none of ours has"
    return None


def _is_checkpoint(place: Path) -> bool:
    """Whether the names at the top of ``place`` and just below are those of one checkpoint.

    Several steps of a training run are its history, and none of ours to replace.
    """
    near = list(_files(place, depth=2))
    of_ranks = Counter(path.partition("/")[0] for path in near if rank_names.is_rank_file(path))
    return (
        not _COMPLETE.isdisjoint(near)
        or set(of_ranks.values()) == {1}
        or sum(iteration_names.recognise(names) for names in _by_folder(near).values()) == 1
        or _is_one_item(near)
    )


def _by_folder(paths: list[str]) -> dict[str, list[str]]:
    """The names in each folder at the top."""
    found: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.partition("/")
        if name:
            found.setdefault(folder, []).append(name)
    return found


def _is_one_item(paths: list[str]) -> bool:
    """Whether these are the files of one Orbax item."""
    try:
        return orbax_names.recognise(paths) and orbax_names.item_folder(paths) is not None
    except FormatError:
        return False


def _files(place: Path, depth: int | None = None) -> Iterator[str]:
    """The files below ``place`` by relative path, at most ``depth`` names long."""
    for folder, below, names in os.walk(place):
        at = Path(folder).relative_to(place)
        if depth is not None and len(at.parts) + 1 >= depth:
            below.clear()
        for name in names:
            yield (at / name).as_posix()
