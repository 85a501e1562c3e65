"""File names of Checkpoint 2.0 folders.

    latest_checkpointed_iteration.txt            "10"
    iteration_00000010/metadata.json
                       llama-model-0000000-0000004.safetensors

What the files say is read by ``iteration``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .reader import Folder

METADATA, COMMON, TRACKER = "metadata.json", "common.json", "latest_checkpointed_iteration.txt"

_FOLDER = re.compile(r"iteration_(\d{1,18})")
FILE = re.compile(r"(?:[^/]*-)?(?:model|opt)-\d{7}-\d{7}\.safetensors")


def latest(folder: Folder) -> str | None:
    """The iteration folder below ``folder`` that counts, or None if there is none.

    It is the one that the tracker names, if it is there, else the one with the largest number.
    """
    files = folder.files()
    found = dict[int, str]()
    for path in files:
        parent, _, name = path.partition("/")
        match = _FOLDER.fullmatch(parent)
        if match and (name == METADATA or FILE.fullmatch(name)):
            found[int(match[1])] = parent
    if not found:
        return None
    tracker = files.get(TRACKER)
    if tracker is not None and tracker.num_bytes <= 64:
        text = folder.read(TRACKER, 0, tracker.num_bytes).decode("ascii", "replace").strip()
        if text.isdecimal() and int(text) in found:
            return found[int(text)]
    return found[max(found)]


def recognise(files: Iterable[str]) -> bool:
    """Whether these are the files of one iteration, with its metadata."""
    names = set(files)
    return METADATA in names and any(map(FILE.fullmatch, names))
