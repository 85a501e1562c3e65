"""Ownership of staging directories.

    .out.partial/
        lock            the first thing that is made in it, empty
        journal.json    its first line names the folder; what is being made follows

Ours is a folder (not a link to one) that this user owns and whose journal names it. The journal
is written before any other content and removed after it, so a kill leaves a folder with a journal,
or one that holds nothing but empty locks. Anything else belongs to another program, and is
neither written into nor deleted.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path

from ..errors import LayoutError, format_list
from .fs import delete, scratch_of, write_file_atomic

JOURNAL, LOCK, TURN, PLACING = "journal.json", "lock", "turn.lock", "placing"
_LAST = (PLACING, JOURNAL, TURN, LOCK)  # what tells that the folder is ours goes in this order
_NAME, _RESUMABLE = "jaxshard", "resumable"
_MOST_BYTES = 64 << 20  # a journal of ours is far smaller


def claim(base: Path) -> None:
    """Have a staging folder of ours at ``base``: a new one, or what an earlier run left.

    Raises:
        LayoutError: what lies there is not ours.
        OSError: the disk refused.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with suppress(FileExistsError):
            os.mkdir(base)
            return
        with suppress(FileNotFoundError):  # removed since, by the run that it was of: make it
            refuse_others(base)
            return


def refuse_others(base: Path) -> None:
    """Refuse what lies at ``base`` unless it is a staging folder that this user made.

    Raises:
        LayoutError: with what is there.
        FileNotFoundError: nothing lies there.
    """
    if why := _why_not_ours(base):
        raise LayoutError(
            f"{base}: this is where the result is made, but {why}. Move it away, or choose another "
            "destination."
        )


def _why_not_ours(base: Path) -> str | None:
    info = os.lstat(base)
    if stat.S_ISLNK(info.st_mode):
        return "it is a link"
    if not stat.S_ISDIR(info.st_mode):
        return "it is not a folder"
    if info.st_uid != os.geteuid() and info.st_uid != _owner_of_new(base.parent):
        return f"it belongs to user {info.st_uid} (expected {os.geteuid()})"
    names = sorted(os.listdir(base))
    if JOURNAL in names:
        return None if read_journal(base) else f"its {JOURNAL} is not jaxshard's"
    other = [n for n in names if not _is_first(base / n, base)]
    return f"it holds {format_list(other, 3)} and no {JOURNAL} of jaxshard's" if other else None


def _owner_of_new(folder: Path) -> int:
    """Which user owns what is made in ``folder``: NFS may map root to another one."""
    import tempfile  # noqa: PLC0415 - seldom needed

    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid


def _is_first(path: Path, base: Path) -> bool:
    """Whether ``path`` may be there before the journal: an empty lock, or the journal's scratch."""
    info = os.lstat(path)
    is_lock = path.name in (LOCK, TURN) and info.st_size == 0
    return stat.S_ISREG(info.st_mode) and (is_lock or path == scratch_of(base / JOURNAL))


def write_journal(
    base: Path, request: str, *, durable: bool = True, resumable: bool = True
) -> None:
    """Note in ``base`` that it is ours, what is being made, and whether a later run can go on."""
    head = json.dumps({_NAME: base.name, _RESUMABLE: resumable})
    write_file_atomic(base / JOURNAL, f"{head}\n{request}".encode(), durable=durable)


def read_journal(base: Path) -> tuple[str, bool] | None:
    """What is being made in ``base``, and whether a later run can go on; None: it is not ours.

    Raises:
        FileNotFoundError: there is no journal.
    """
    journal = base / JOURNAL
    info = os.lstat(journal)
    if not stat.S_ISREG(info.st_mode) or info.st_size > _MOST_BYTES:
        return None
    try:
        head, _, request = journal.read_bytes().decode().partition("\n")
        facts = json.loads(head)
    except (ValueError, RecursionError):
        return None
    is_ours = isinstance(facts, dict) and facts.get(_NAME) == base.name
    return (request, facts.get(_RESUMABLE) is not False) if is_ours else None


def request_in(base: Path) -> str | None:
    """What is being made in ``base``, if anything."""
    with suppress(FileNotFoundError):
        found = read_journal(base)
        return found and found[0]
    return None


def is_resumable(base: Path) -> bool:
    """Whether a later run can go on with what is being made in ``base``."""
    with suppress(FileNotFoundError):
        found = read_journal(base)
        return found is not None and found[1]
    return False


def remove(base: Path) -> None:
    """Remove ``base``, which is ours; what tells so goes last, that a kill changes nothing."""
    with suppress(OSError):
        for entry in sorted(base.iterdir()):
            if entry.name not in _LAST:
                delete(entry)
        for name in _LAST:
            (base / name).unlink(missing_ok=True)
        base.rmdir()
