"""Places: paths and URLs, and the folders there, local or remote."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LayoutError, NotFoundError
from .local import LocalFolder

if TYPE_CHECKING:
    from .remote import RemoteFolder, RemotePath

    Place = Path | RemotePath
    ReadFolder = LocalFolder | RemoteFolder
else:  # names for annotations, which are not evaluated
    Place = ReadFolder = object

SCHEMES = ("hf", "s3", "gs", "az", "http", "https")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a URL of a remote store.

    >>> is_remote("s3://bucket/model"), is_remote("llama/")
    (True, False)

    Raises:
        LayoutError: the scheme is unknown, or ``pathlib`` has removed a slash of the URL.
    """
    text = os.fspath(path)
    found = _URL.match(text) if isinstance(text, str) else None
    if found is None or os.path.lexists(text):
        return False
    if found[1].lower() not in SCHEMES:
        if "://" not in text:
            return False
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise LayoutError(
            f"{text.partition('?')[0]}: unknown kind of store (expected {known} or a local path)."
        )
    if "://" not in text:
        raise LayoutError(f"{text}: pathlib has removed a slash. Pass the URL as text.")
    return True


def place_at(path: str | os.PathLike[str]) -> Path | RemotePath:
    """Return ``path`` as a path or, if it is a URL, as something that can be used like one.

    For a repository of the Hub that is in the local cache, it is the path in the cache.
    """
    if not is_remote(path):
        return Path(path)
    from .remote import RemotePath  # noqa: PLC0415 - only for remote paths

    place = RemotePath(os.fspath(path))
    return place.local_copy() or place


def folder_at(
    place: str | os.PathLike[str], names: Iterable[str] | None = None
) -> LocalFolder | RemoteFolder:
    """Return the folder at ``place``, of a local one only the files ``names``."""
    if isinstance(place, Path) or not is_remote(place):
        return LocalFolder(place, names)
    from .remote import RemoteFolder, RemotePath  # noqa: PLC0415 - only for remote paths

    return place.opened() if isinstance(place, RemotePath) else RemoteFolder(os.fspath(place))


def refuse_remote(destination: str | os.PathLike[str]) -> None:
    """Refuse to write to a store: results are published by renames, and stores have none.

    Raises:
        LayoutError: the destination is a URL, also if ``pathlib`` has removed a slash of it.
    """
    text = os.fspath(destination)
    found = _URL.match(text)
    if found and found[1].lower() in SCHEMES and not os.path.lexists(text):
        raise LayoutError(
            f"{text}: results are written to local paths only. Write to a disk, and upload the "
            "folder with the tools of the store."
        )


def refuse_repository(path: str | os.PathLike[str]) -> None:
    """Suggest the URL of the Hub for a missing path that looks like a repository's name.

    Raises:
        NotFoundError: it does.
    """
    text = os.fspath(path)
    if _REPOSITORY.fullmatch(text) and not os.path.lexists(text):
        raise NotFoundError(
            f"{text} does not exist. For the repository of the Hub, write hf://{text}."
        )
