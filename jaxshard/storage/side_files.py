"""Side files (config, tokenizer) copied into a result.

A checkpoint may be untrusted, and a link in it may lead anywhere, for example to keys. So a link is
followed only to the checkpoint's own files: below its folder, or in a folder that has one of its
weight files, which is the layout of the Hugging Face cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..core.catalog import Catalog
from ..errors import format_list
from ..formats.rank_names import rank_of_strategy_file
from .fs import exchange
from .places import is_remote
from .staging import os_errors_as


def carried(catalog: Catalog) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the extras of ``catalog`` that are copied, and notes on the others."""
    if is_remote(catalog.root):  # a store has no links
        return tuple(catalog.extras), ()
    root = os.path.realpath(catalog.root)
    homes = {os.path.dirname(os.path.realpath(os.path.join(root, f.path))) for f in catalog.files}
    kept, left = list[str](), list[str]()
    for path in catalog.extras:
        real = os.path.realpath(os.path.join(root, path))
        is_own = os.path.dirname(real) in homes or real.startswith(os.path.join(root, ""))
        (kept if is_own else left).append(path)
    notes = (
        [
            f"{format_list(left)}: links to files that are not the checkpoint's own, so not "
            "carried along."
        ]
        if left
        else []
    )
    return tuple(kept), tuple(notes)


def copy_extras(
    root: str,
    extras: Iterable[str],
    into: Path,
    *,
    leave_out: Callable[[Path], bool],
    sync: Callable[[Path], None],
) -> None:
    """Copy ``extras`` of the folder ``root`` into ``into``, but those to be left out.

    Raises:
        StorageError: the disk is full or refuses.
    """
    if is_remote(root):
        from .remote import RemoteFolder  # noqa: PLC0415 - only for remote paths

        folder = RemoteFolder(root)
        found = ((path, folder.read_whole(path)) for path in extras)
        write_files(found, into, sync)
        return
    for path in extras:
        if not leave_out(Path(root, path)):
            with os_errors_as(f"{into / path} cannot be written"):
                (into / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(root, path), into / path)
                sync(into / path)


def write_files(
    files: Iterable[tuple[str, bytes]], into: Path, sync: Callable[[Path], None]
) -> None:
    """Write ``files``, by path, into ``into``.

    Raises:
        StorageError: the disk is full or refuses.
    """
    for path, data in files:
        with os_errors_as(f"{into / path} cannot be written"):
            (into / path).parent.mkdir(parents=True, exist_ok=True)
            (into / path).write_bytes(data)
            sync(into / path)


# --- The strategy folder next to a result, where MindFormers looks for it

_JOB, _STRATEGY = "checkpoint", "strategy"
_OURS = b"jaxshard_stage_"  # the operator in strategy files that jaxshard made


def put_beside(
    destination: Path, side_files: Mapping[str, bytes], *, overwrite: bool, durable: bool
) -> tuple[str, ...]:
    """Write the strategy files of ``side_files`` next to ``destination``; return notes.

    Raises:
        StorageError: the disk refuses.
    """
    files = {
        name: data
        for path, data in side_files.items()
        if path.startswith(f"{_STRATEGY}/")
        and rank_of_strategy_file(name := path.removeprefix(f"{_STRATEGY}/")) is not None
    }
    if not files or destination.name != _JOB:
        return ()
    place = destination.parent / _STRATEGY
    held = _held(place)
    if held == files:
        return ()
    is_ours = held is not None and bool(held) and all(_OURS in data for data in held.values())
    if os.path.lexists(place) and not (overwrite and is_ours):
        return (
            f"{place} holds other strategy files, and MindFormers looks there: set "
            f"src_strategy_path_or_dir: {destination / _STRATEGY}.",
        )
    with os_errors_as(f"{place} cannot be written"):
        scratch = Path(tempfile.mkdtemp(prefix=f".{_STRATEGY}.", dir=destination.parent))
        try:
            scratch.chmod(0o755)
            for name, data in files.items():
                with open(scratch / name, "wb") as file:
                    file.write(data)
                    if durable:
                        file.flush()
                        os.fsync(file.fileno())
            if held is None:
                os.rename(scratch, place)
            elif not exchange(scratch, place):
                shutil.rmtree(place)
                os.rename(scratch, place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return ()


def _held(place: Path) -> dict[str, bytes] | None:
    """The files in ``place``; None where it does not exist, no files where it has others."""
    if not os.path.lexists(place):
        return None
    if place.is_symlink() or not place.is_dir():
        return {}
    with os_errors_as(f"{place} cannot be read"):
        found = list(place.iterdir())
        if not all(p.is_file() and rank_of_strategy_file(p.name) is not None for p in found):
            return {}
        return {p.name: p.read_bytes() for p in found}
