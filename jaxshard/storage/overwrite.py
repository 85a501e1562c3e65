"""What ``overwrite`` may replace: checkpoints and nothing else.

A mistyped path must not cost a home directory. So a folder is replaced only if the names in
it are those of a checkpoint as this library writes them, and nothing lies there that such a
checkpoint has not. Names decide: no file is opened, and no link is followed. A single file is
replaced only if its content is of the kind that takes its place.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from ..core.catalog import Catalog
from ..errors import FormatError, JaxshardError, LayoutError, format_list
from ..formats import weight_files
from ..formats.folder import WEIGHTS, is_iteration, is_orbax, kind_of, orbax_item_folder
from ..formats.huggingface import ADAPTER, INDEX, MINDSPORE_INDEX, SINGLE, is_weights
from ..formats.rank_names import LAYOUT_FILE, is_rank_file, rank_of_folder
from .local import LocalFolder
from .remote import is_remote

#: What a result is, which decides what it may replace: a folder, a folder of strategy files, one
#: weight file, one strategy file; "own" is in a folder of jaxshard's own, where all may go.
Kind = Literal["checkpoint", "strategies", "weight file", "strategy file", "own"]

_COMPLETE = {
    SINGLE,
    ADAPTER,
    INDEX,
    MINDSPORE_INDEX,
    weight_files.NAME,
}  # one of them is at the top
_WEIGHT_FOLDER = re.compile(r"iteration_\d+/|(merged_)?strategy/")  # besides those of ranks
_STRATEGY = re.compile(rf"[^/]*strategy[^/]*\.(ckpt|json)|{re.escape(LAYOUT_FILE)}")
_KINDS = (".safetensors", ".ckpt", ".json")  # not an optimizer.pt of the user
_HARMLESS = {".gitattributes", ".gitignore", ".DS_Store", ".cache", ".ipynb_checkpoints"}


def refuse_other(kind: Kind, found: Path, destination: Path) -> None:
    """Refuse to replace ``found``, which lies or lay at ``destination``, by a result of ``kind``.

    Raises:
        LayoutError: with what is there.
    """
    strange = _CHECKS[kind](found)
    if strange:
        raise _refusal(strange, kind, destination)


def _refusal(strange: str, kind: Kind, destination: str | Path) -> LayoutError:
    return LayoutError(
        f"{destination} is not replaced: {strange}. What is replaced (--overwrite) is "
        f"{_REPLACED[kind]}, and nothing else. Choose another destination, or remove this one "
        "yourself."
    )


def refuse_foreign(destination: Path) -> None:
    """Refuse to replace the folder ``destination`` unless it is empty, a checkpoint or a strategy.

    Raises:
        LayoutError: with what is there.
    """
    refuse_other("checkpoint", destination, destination)


def refuse_foreign_names(paths: Iterable[str], destination: str) -> None:
    """Refuse to replace the objects ``paths`` below ``destination`` unless they are a checkpoint.

    Raises:
        LayoutError: with what is there.
    """
    found = sorted(paths)
    strange = _strange_names(found, {path.partition("/")[0] for path in found}) if found else None
    if strange:
        raise _refusal(strange, "checkpoint", destination)


def refuse_source(
    catalog: Catalog, destination: str | os.PathLike[str], what: str = "the source"
) -> None:
    """Refuse a destination whose replacement would remove ``catalog``, or a file of it.

    Raises:
        LayoutError: the destination is the checkpoint, or holds it.
    """
    if not isinstance(destination, Path) and is_remote(destination):
        url = os.fspath(destination).rstrip("/")
        files = (f.path if "://" in f.path else f"{catalog.root}/{f.path}" for f in catalog.files)
        if any(path == url or path.startswith(f"{url}/") for path in (catalog.root, *files)):
            raise _holds(destination, what)
        return
    if is_remote(catalog.root):
        return
    source, place = Path(os.path.realpath(catalog.root)), Path(os.path.realpath(destination))
    linked = (Path(os.path.realpath(source / f.path)) for f in catalog.files)
    if any(p == place or place in p.parents for p in (source, *linked)):
        raise _holds(destination, what)


def _holds(destination: str | os.PathLike[str], what: str) -> LayoutError:
    return LayoutError(
        f"{destination} is {what}, or holds it or files that it links to. Choose another "
        f"destination; {what} is never changed."
    )


def files_of(place: Path) -> dict[str, list[int]]:
    """The files at or below ``place`` by relative path, each with size, time and inode."""
    try:
        if not _is_folder(place):
            return {"": _identity(place)}
    except FileNotFoundError:
        return {}
    found = {}
    for folder, below, names in os.walk(place):
        links = [name for name in below if os.path.islink(os.path.join(folder, name))]
        for path in (Path(folder, name) for name in names + links):
            found[path.relative_to(place).as_posix()] = _identity(path)
    return found


def refuse_changed(before: Mapping[str, list[int]], found: Path, destination: Path) -> None:
    """Refuse to replace ``found``, which lies or lay at ``destination``, if it is not as before.

    Raises:
        LayoutError: files appeared or were written since ``before``, which is of ``files_of``.
    """
    new = sorted(p for p, identity in files_of(found).items() if before.get(p) != identity)
    if new:
        what = f": {format_list(new, 3)}" if any(new) else ""
        raise LayoutError(
            f"{destination} is not replaced: it was written to while the result was being made"
            f"{what}. Run again to replace it as it is now, or choose another destination."
        )


def _identity(path: Path) -> list[int]:
    info = os.lstat(path)
    return [info.st_size, info.st_mtime_ns, info.st_ino]


def _strange(place: Path) -> str | None:
    """Why the folder ``place`` is not a checkpoint or a strategy alone, or None."""
    if not _is_folder(place):
        return "it is not a folder"
    return _strange_names(_files(place), os.listdir(place))


def _strange_names(paths: Iterable[str], at_top: Iterable[str]) -> str | None:
    """Why the files ``paths`` are not a checkpoint or a strategy alone, or None."""
    names, paths = sorted(at_top), list(paths)
    hidden = [n for n in names if n.startswith(".") and n not in _HARMLESS]
    if hidden:
        return f"it holds {format_list(hidden, 3)}, which no checkpoint does"
    if not (all(map(_STRATEGY.fullmatch, names)) or _is_checkpoint(paths)):
        return f"it holds {format_list(names, 3)}, and no checkpoint"
    weights = sorted(filter(is_weights, paths))
    below = [f for f in weights if "/" in f]
    other = [f for f in below if rank_of_folder(f) is None and not _WEIGHT_FOLDER.match(f)]
    if other:
        return f"it contains {format_list(other, 3)}, which belongs to another checkpoint"
    strange = [f for f in weights if not f.endswith(_KINDS)]
    if strange:
        return f"it contains {format_list(strange, 3)}, which jaxshard does not write"
    return None


def _strange_strategies(place: Path) -> str | None:
    """Why the folder ``place`` holds more than strategy files, or None."""
    if not _is_folder(place):
        return "it is not a folder"
    names = sorted(os.listdir(place))
    other = [n for n in names if not _STRATEGY.fullmatch(n) or _strange_weights(place / n) is None]
    return (
        f"it holds {format_list(other, 3)}, which no folder of strategy files does"
        if other
        else None
    )


def _strange_weights(place: Path) -> str | None:
    """Why the file ``place`` is not a weight file by its first bytes, or None."""
    if not stat.S_ISREG(os.lstat(place).st_mode):
        return "it is not a file"
    with _opened(place) as folder:
        kind = kind_of(folder, place.name)
    return None if kind in WEIGHTS or kind == "empty" else "it is not a weight file"


def _strange_strategy(place: Path) -> str | None:
    """Why the file ``place`` is not a strategy file, or None."""
    if not stat.S_ISREG(os.lstat(place).st_mode):
        return "it is not a file"
    with _opened(place) as folder, suppress(JaxshardError):
        from ..formats import strategy_files  # noqa: PLC0415 - only to replace one strategy file

        strategy_files.read_file(folder, place.name)
        return None
    return "it is not a strategy file"


@contextmanager
def _opened(place: Path) -> Iterator[LocalFolder]:
    folder = LocalFolder(place)
    try:
        yield folder
    finally:
        folder.close()


def _is_folder(place: Path) -> bool:
    return stat.S_ISDIR(os.lstat(place).st_mode)


def _is_checkpoint(paths: Iterable[str]) -> bool:
    """Whether those of ``paths`` at the top and just below are of one checkpoint.

    Several steps of a training run are its history, and none of ours to replace.
    """
    near = [path for path in paths if path.count("/") < 2]
    of_ranks = Counter(path.partition("/")[0] for path in near if is_rank_file(path))
    return (
        not _COMPLETE.isdisjoint(near)
        or set(of_ranks.values()) == {1}
        or sum(is_iteration(names) for names in _by_folder(near).values()) == 1
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
        return is_orbax(paths) and orbax_item_folder(paths) is not None
    except FormatError:
        return False


def _files(place: Path) -> Iterator[str]:
    """The files below ``place`` by relative path."""
    for folder, _, names in os.walk(place):
        at = Path(folder).relative_to(place)
        for name in names:
            yield (at / name).as_posix()


_CHECKS: Mapping[Kind, Callable[[Path], str | None]] = {
    "checkpoint": _strange,
    "strategies": _strange_strategies,
    "weight file": _strange_weights,
    "strategy file": _strange_strategy,
    "own": lambda place: None,
}
_REPLACED: Mapping[Kind, str] = {
    "checkpoint": "a checkpoint that jaxshard wrote, or one like it",
    "strategies": "a folder of strategy files",
    "weight file": "a weight file",
    "strategy file": "a strategy file",
    "own": "what lies in a folder of jaxshard's own",
}
