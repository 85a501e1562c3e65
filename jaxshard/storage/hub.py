"""The Hub: repositories ``hf://ORG/NAME[@REVISION][/FOLDER]``, by ``huggingface_hub``.

It resolves names and revisions, and has the user's token and the local cache. Bytes are fetched
from the content network, by the link that a file resolves to: through the Hub itself each range
would be two requests, of a kind of which a user has some thousands in five minutes.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType
from urllib.parse import urlsplit

from ..core.catalog import File
from ..errors import LayoutError, NotFoundError, StorageError
from .object_store import Client, store_at

_URL = re.compile(r"hf://(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.+))?")


def _library() -> ModuleType:
    try:
        import huggingface_hub  # noqa: PLC0415 - an extra, and a second to import
    except ImportError:
        raise StorageError(
            "hf:// paths need the package huggingface_hub. Install it: "
            "pip install 'jaxshard[hub,cloud]'."
        ) from None
    return huggingface_hub


@contextmanager
def hub_errors_as(name: str) -> Iterator[None]:
    """Convert the library's errors about the repository ``name``."""
    import huggingface_hub.errors as known  # noqa: PLC0415

    try:
        yield
    except known.GatedRepoError:
        raise StorageError(
            f"hf://{name} is gated. Accept its terms at {_endpoint()}/{name}, and log in: set "
            "HF_TOKEN, or run hf auth login."
        ) from None
    except known.RevisionNotFoundError:
        raise NotFoundError(
            f"hf://{name} has no such revision. Check what follows the @."
        ) from None
    except known.RepositoryNotFoundError:
        raise NotFoundError(
            f"hf://{name} does not exist, or is private. Check the name; for a private one log in: "
            "set HF_TOKEN, or run hf auth login."
        ) from None
    except (known.LocalEntryNotFoundError, known.OfflineModeIsEnabled):
        raise StorageError(
            f"hf://{name} is not in the local cache, and HF_HUB_OFFLINE is set. Unset it, or "
            f"download first: hf download {name}."
        ) from None
    except known.EntryNotFoundError:
        raise NotFoundError(f"hf://{name} has no such file.") from None
    except (known.HfHubHTTPError, OSError, ValueError) as error:
        text = re.sub(r"\?[^\s)]*", "", " ".join(str(error).split()))[:300]
        raise StorageError(f"hf://{name} cannot be read: {text}") from None


def _endpoint() -> str:
    return str(_library().constants.ENDPOINT)


class Repository:
    """A folder of a model repository at one commit: its files, and links to their contents."""

    def __init__(self, url: str) -> None:
        found = _URL.fullmatch(url)
        if found is None:
            raise LayoutError(
                f"{url}: expected hf://ORG/NAME, hf://ORG/NAME@REVISION or with /FOLDER."
            )
        self._name, self._folder = found["name"], (found["folder"] or "").strip("/")
        self._revision: str | None = found["revision"]
        # A commit needs no request: that of a root which was listed before.
        self._commit = self._revision if re.fullmatch("[0-9a-f]{40}", self._revision or "") else ""
        self._places: dict[str, tuple[Client, str]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def root(self) -> str:
        """The URL with the commit, and without the name of a single file."""
        folder = f"/{self._folder}" if self._folder else ""
        return f"hf://{self._name}@{self._commit or self._revision or 'main'}{folder}"

    def files(self) -> Iterator[File]:
        """List the files of the folder, by one request."""
        with hub_errors_as(self._name):
            info = (
                _library()
                .HfApi()
                .model_info(self._name, revision=self._revision, files_metadata=True)
            )
        self._commit = info.sha
        entries = {e.rfilename: e.size or 0 for e in info.siblings or ()}
        if self._folder in entries:  # one file
            self._folder, _, only = self._folder.rpartition("/")
            entries = {
                f"{self._folder}/{only}".lstrip("/"): entries[f"{self._folder}/{only}".lstrip("/")]
            }
        prefix = f"{self._folder}/" if self._folder else ""
        for path, size in entries.items():
            inside = path.removeprefix(prefix)
            if path.startswith(prefix) and not any(p.startswith(".") for p in inside.split("/")):
                yield File(inside, size)  # the commit is the version

    def local_copy(self) -> Path | None:
        """Return the folder or file in the local cache, if all that is read is there.

        Raises:
            StorageError: it is not there, and the library is offline.
        """
        library = _library()
        if library.constants.HF_HUB_OFFLINE:
            with hub_errors_as(self._name):
                found = library.snapshot_download(
                    self._name, revision=self._revision, local_files_only=True
                )
            return Path(found, self._folder)
        folder = self._folder
        names = [file.path for file in self.files() if _in_use(file.path)]
        prefix = f"{self._folder}/" if self._folder else ""
        found = [
            library.try_to_load_from_cache(self._name, prefix + name, revision=self._commit)
            for name in names
        ]
        if not names or not all(isinstance(path, str) for path in found):
            return None
        root = Path(found[0]).parents[len(PurePosixPath(prefix + names[0]).parts) - 1]
        return root / folder

    def place(self, path: str) -> tuple[Client, str]:
        """Resolve a file once for all threads."""
        with self._lock:
            lock = self._locks.setdefault(path, threading.Lock())
        with lock:
            if path not in self._places:
                self._places[path] = self._resolve(path)
            return self._places[path]

    def _resolve(self, path: str) -> tuple[Client, str]:
        library = _library()
        full = f"{self._folder}/{path}" if self._folder else path
        url = library.hf_hub_url(self._name, full, revision=self._commit)
        with hub_errors_as(self._name):
            link = library.get_hf_file_metadata(url).location
        # The token is for the Hub only, and never for the host of a link.
        same_host = urlsplit(link)[:2] == urlsplit(url)[:2]
        return store_at(link, (library.get_token() or "") if same_host else ""), ""

    def forget(self, path: str, place: tuple[Client, str]) -> bool:
        """Resolve ``path`` again when it is next needed: its link has expired."""
        with self._lock:
            if self._places.get(path) is place:
                del self._places[path]
        return True


def _in_use(path: str) -> bool:
    """Return whether a checkpoint is read from ``path``, and not only shown on its page."""
    return path.endswith((".safetensors", ".ckpt", ".json"))
