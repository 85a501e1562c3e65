"""Destinations that name one weight file instead of a folder.

    jaxshard merge cut/ out.safetensors
    jaxshard merge cut/ out.ckpt

Then the file has no limit, the job's numbers are in it too, and what lies beside weights in
a folder (config, tokenizer) is not carried along, which is said. This module decides; it
writes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..core.catalog import Catalog
from ..errors import LayoutError, format_list
from ..formats.output_files import Request, Result
from ..formats.registry import FORMATS
from .open import PathLike

_NO_LIMIT = 1 << 62


def is_named(destination: PathLike | None) -> bool:
    """Whether ``destination`` is the name of one weight file, and not of a folder that exists."""
    return destination is not None and _kind(destination) in _formats()


def refuse(destination: PathLike) -> None:
    """Refuse a destination that names a weight file, where folders are made.

    Raises:
        LayoutError: it does.
    """
    if is_named(destination):
        raise LayoutError(
            f"{destination} names one file, and a folder is made here. Leave out "
            f"{_kind(destination)!r}; jaxshard merge makes one file of the folder."
        )


def implied(request: Request, destination: PathLike | None) -> Request:
    """``request`` with what the name of ``destination`` says and the request does not."""
    if destination is None or request.to is not None or not is_named(destination):
        return request
    name = request.format or _formats()[_kind(destination)]
    limit = request.max_shard_bytes
    if limit is None and name in FORMATS and FORMATS[name].in_shards and FORMATS[name].file_suffix:
        limit = _NO_LIMIT
    return replace(request, format=name, max_shard_bytes=limit, one_file=True)


def name_of(result: Result, destination: PathLike | None) -> str | None:
    """Which file of ``result`` is to be ``destination``; None where that is a folder.

    Raises:
        LayoutError: one file is named, and the result is several, or of another kind.
    """
    if destination is None or not is_named(destination):
        return None
    paths, kind = result.outputs.paths, _kind(destination)
    if len(paths) > 1 or "/" in paths[0]:
        raise LayoutError(
            f"{destination} names one file, but the result is {format_list(paths, 3)}. Name a "
            "folder."
        )
    if not paths[0].endswith(kind):
        raise LayoutError(
            f"{destination} ends in {kind}, but the result is {paths[0]}. Give another name, or "
            f'format="{_formats()[kind]}" (--format {_formats()[kind]}).'
        )
    return paths[0]


def notes(source: Catalog, result: Result, only: str | None) -> tuple[str, ...]:
    """What to say of the files that do not come along where the result is one file."""
    left = [*source.extras, *result.side_files] if only else []
    if not left:
        return ()
    return (
        f"{format_list(left)} not carried along: the result is one file. Name a folder to have "
        "all.",
    )


def _formats() -> dict[str, str]:
    """Return the format of each file suffix."""
    return {f.file_suffix: f.name for f in FORMATS.values() if f.file_suffix}


def _kind(destination: PathLike) -> str:
    path = Path(destination)
    return "" if path.is_dir() else path.suffix
