"""Remote paths and folders: of object stores, of web servers and of the Hub."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..core.catalog import Catalog, File
from ..errors import (
    OVERWRITE,
    RESUME,
    FormatError,
    JaxshardError,
    LayoutError,
    NotFoundError,
    StorageError,
)
from .local import LocalFolder
from .object_store import (
    Client,
    CredentialsError,
    at_once,
    get_range,
    obstore_module,
    store_at,
    store_errors_as,
)

HEAD_BYTES = 64 << 10  # of each weight file at first: dense models have headers of about 10 KB

MARKER = ".jaxshard.partial"  # the object of an upload that is not complete
REQUEST_KEY = "jaxshard"  # in the metadata of each object of a result

_INDEX = "model.safetensors.index.json"
# A web server lists nothing, so these names are tried.
_USUAL = (
    _INDEX,
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
)
_WEIGHTS = (".safetensors", ".ckpt")


class Listing(Protocol):
    """The files of one remote folder, and where each is fetched from."""

    @property
    def root(self) -> str:
        """The URL of the folder, known once its files are listed."""
        ...

    def files(self) -> Iterable[File]:
        """List them."""
        ...

    def place(self, path: str) -> tuple[Client, str]:
        """Return the client and the path of a file for it."""
        ...

    def forget(self, path: str, place: tuple[Client, str]) -> bool:
        """Forget a place that refused its credentials; whether a new one may be had."""
        ...

    def local_copy(self) -> Path | None:
        """Return where all of it is on the disk already."""
        ...


class Bucket:
    """A folder of an object store."""

    root: str

    def __init__(self, url: str) -> None:
        self.root = url

    def files(self) -> Iterator[File]:
        obstore = obstore_module()
        with store_errors_as(self.root):
            found = [entry for page in obstore.list(store_at(self.root)) for entry in page]
        if not found:
            found = list(self._single())
        if any(entry["path"] == MARKER for entry in found):
            raise FormatError(
                f"{self.root} is an unfinished upload. Complete it with {RESUME}, or replace it "
                f"with {OVERWRITE}."
            )
        for entry in found:
            if not any(part.startswith(".") for part in entry["path"].split("/")):
                yield File(entry["path"], entry["size"], version=entry["e_tag"] or "")

    def _single(self) -> Iterator[Any]:
        """The object of this name, if that is what the URL is of."""
        folder, _, name = self.root.rpartition("/")
        if folder.count("/") < 2:
            return
        try:
            with store_errors_as(self.root):
                entry = obstore_module().head(store_at(folder), name)
        except NotFoundError:
            return
        self.root = folder
        yield {**entry, "path": name}

    def place(self, path: str) -> tuple[Client, str]:
        return store_at(self.root), path

    def forget(self, path: str, place: tuple[Client, str]) -> bool:
        return False

    def local_copy(self) -> Path | None:
        return None


class WebFolder(Bucket):
    """A folder of a web server, of which the names in an index and the usual names exist."""

    def files(self) -> Iterator[File]:
        folder, _, name = self.root.rpartition("/")
        if urlsplit(self.root).query or urlsplit(self.root).fragment:
            raise LayoutError(f"{self.root.partition('?')[0]}: a query in a URL is not supported.")
        if name.endswith(_WEIGHTS):
            self.root = folder
            return self._existing([name])
        found = list(self._existing(_USUAL))
        index = next((f for f in found if f.path == _INDEX), None)
        if index is None:
            return iter(found)
        what = f"{self.root}/{_INDEX}"
        data = get_range(store_at(self.root), _INDEX, index, 0, index.num_bytes, what)
        return iter([*found, *self._existing(_names_in(bytes(data), what))])

    def _existing(self, names: Iterable[str]) -> Iterator[File]:
        def head(name: str) -> File | None:
            try:
                with store_errors_as(f"{self.root}/{name}"):
                    entry = obstore_module().head(store_at(self.root), name)
            except NotFoundError:
                return None
            return File(name, entry["size"], version=entry["e_tag"] or "")

        return (file for file in at_once(head, names) if file is not None)


def _names_in(index: bytes, what: str) -> list[str]:
    """The files that an index names, none of which may be outside its folder."""
    try:
        names = set(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{what} is not an index of weight files.") from None
    for name in names:
        if not isinstance(name, str) or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise FormatError(f"{what} names a file outside its folder.")
    return sorted(names - set(_USUAL))


class RemoteFolder:
    """A remote folder, or one file of it, as formats read it."""

    not_followed: tuple[str, ...] = ()

    def __init__(self, url: str, files: Iterable[File] | None = None) -> None:
        """Refer to ``url``; with ``files``, which were listed before, it is not listed again."""
        self._url = url.rstrip("/")
        self._listing = listing_of(self._url)
        self._files: Mapping[str, File] | None = None
        if files is not None:
            self._files = {f.path: f for f in files}
        self._heads: dict[str, memoryview] | None = None
        self._lock = threading.Lock()
        self.num_requests = self.bytes_read = 0

    @property
    def root(self) -> str:
        """The URL of the folder; on the Hub with the commit, so that it opens the same again."""
        self.files()
        return self._listing.root

    def files(self) -> Mapping[str, File]:
        """List the files below the folder; listed once."""
        if self._files is None:
            found = sorted(self._listing.files(), key=lambda f: f.path)
            if not found:
                raise NotFoundError(f"{self._url} does not exist, or is empty. Check the URL.")
            self._files = {f.path: f for f in found}
        return self._files

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Fetch a part of a file; of small files and headers, all are fetched at once.

        Raises:
            NotFoundError, FormatError, StorageError: as ``get_range``.
        """
        file = self.files().get(path)
        if file is None:
            raise NotFoundError(f"{self.root} has no file {path}.")
        stop = offset + length
        if stop > file.num_bytes:
            raise FormatError(
                f"{self.root}/{path} ends at byte {file.num_bytes}; bytes {offset} to {stop} were "
                "requested."
            )
        if not length:
            return b""
        head = self._head(file)
        if stop <= len(head):
            return bytes(head[offset:stop])
        have = bytes(head[offset:])
        return have + bytes(self.get(file, offset + len(have), stop))

    def read_whole(self, path: str) -> bytes:
        """Fetch a file, without the headers of the others (errors as ``read``)."""
        file = self.files()[path]
        return bytes(self.get(file, 0, file.num_bytes)) if file.num_bytes else b""

    def local_copy(self) -> Path | None:
        """Return where all of it is on the disk already."""
        return self._listing.local_copy()

    def get(self, file: File, start: int, stop: int) -> memoryview:
        """Fetch bytes of a file; with a new link where the old one has expired."""
        what = f"{self._url.partition('?')[0]}: {file.path}"
        with self._lock:
            self.num_requests += 1
            self.bytes_read += stop - start
        place = self._listing.place(file.path)
        try:
            return get_range(*place, file, start, stop, what)
        except CredentialsError:
            if not self._listing.forget(file.path, place):
                raise
        try:
            return get_range(*self._listing.place(file.path), file, start, stop, what)
        except CredentialsError:
            raise StorageError(
                f"{what}: the Hub refuses access. Accept the terms on the repository's page, and "
                "log in: set HF_TOKEN, or run hf auth login."
            ) from None

    def _head(self, file: File) -> memoryview:
        with self._lock:
            first = self._heads is None
            if first:
                self._heads = {}
        assert self._heads is not None
        if first:
            wanted = [f for f in self.files().values() if _has_header(f)]
            fetched = at_once(lambda f: self.get(f, 0, min(f.num_bytes, HEAD_BYTES)), wanted)
            self._heads.update(zip([f.path for f in wanted], fetched, strict=True))
        return self._heads.get(file.path, memoryview(b""))

    def close(self) -> None:
        """Forget the headers."""
        self._heads = {}


def _has_header(file: File) -> bool:
    """Whether the first bytes of ``file`` are read when a checkpoint is opened."""
    small = file.path.endswith(".json") and file.num_bytes <= HEAD_BYTES
    return bool(file.num_bytes) and (small or file.path.endswith(_WEIGHTS))


def listing_of(url: str) -> Listing:
    """Return what lists the files of ``url``."""
    scheme = url.partition("://")[0].lower()
    if scheme == "hf":
        return Repository(url)
    return WebFolder(url) if scheme.startswith("http") else Bucket(url)


class RemotePath:
    """A URL with as much of ``pathlib.Path`` as opening a checkpoint needs."""

    def __init__(self, url: str, folder: RemoteFolder | None = None, below: str = "") -> None:
        self.url, self._below = url.rstrip("/"), below
        self.folder = folder or RemoteFolder(self.url)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> RemotePath:
        below = f"{self._below}/{name}" if self._below else name
        return RemotePath(f"{self.url}/{name}", self.folder, below)

    def __str__(self) -> str:
        return self.url

    __fspath__ = __str__

    def local_copy(self) -> Path | None:
        """Return where all of it is on the disk already, in the cache of the Hub."""
        return self.folder.local_copy()

    def opened(self) -> RemoteFolder:
        """Return the folder at this URL; that of the root is listed once."""
        return RemoteFolder(self.url) if self._below else self.folder

    def is_dir(self) -> bool:
        prefix = f"{self._below}/" if self._below else ""
        return not self.is_file() and any(p.startswith(prefix) for p in self._files())

    def is_file(self) -> bool:
        files = self._files()
        return self._below in files if self._below else self.name in files and len(files) == 1

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def _files(self) -> Mapping[str, File]:
        try:
            return self.folder.files()
        except NotFoundError:
            return {}


# --- The Hub: repositories ``hf://ORG/NAME[@REVISION][/FOLDER]``, by ``huggingface_hub``
#
# It resolves names and revisions, and has the user's token and the local cache. Bytes are fetched
# from the content network, by the link that a file resolves to: through the Hub itself each range
# would be two requests, of a kind of which a user has some thousands in five minutes.

_REPOSITORY_URL = re.compile(
    r"hf://(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.+))?"
)


# The revision that the caller named, by repository and commit.
_REVISIONS: dict[tuple[str, str], str | None] = {}


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
            f"hf://{name} is gated. Accept its terms at {_library().constants.ENDPOINT}/{name}, "
            "and log in: set HF_TOKEN, or run hf auth login."
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
    except (known.LocalEntryNotFoundError, known.OfflineModeIsEnabled) as error:
        if not _library().constants.HF_HUB_OFFLINE:
            raise _unreadable(name, error) from None
        raise StorageError(
            f"hf://{name} is not in the local cache, and HF_HUB_OFFLINE is set. Unset it, or "
            f"download first: hf download {name}."
        ) from None
    except known.EntryNotFoundError:
        raise NotFoundError(f"hf://{name} has no such file.") from None
    except Exception as error:
        of_http = type(error).__module__.startswith("http")  # its versions use httpx, or a copy
        if isinstance(error, JaxshardError) or not (
            of_http or isinstance(error, OSError | ValueError)
        ):
            raise
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> StorageError:
    text = re.sub(r"\?[^\s)]*", "", " ".join(str(error).split()))[:300]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"hf://{name} cannot be downloaded: {text}. Make room, set HF_HOME to another disk, or "
            "read it without a copy: stream=True (--stream)."
        )
    return StorageError(f"hf://{name} cannot be read: {text}. Check HF_ENDPOINT, and try again.")


class Repository:
    """A folder of a model repository at one commit: its files, and links to their contents."""

    def __init__(self, url: str) -> None:
        found = _REPOSITORY_URL.fullmatch(url)
        if found is None:
            raise LayoutError(
                f"{url}: expected hf://ORG/NAME, hf://ORG/NAME@REVISION or with /FOLDER."
            )
        self._name, self._folder = found["name"], (found["folder"] or "").strip("/")
        self._revision: str | None = found["revision"]
        # A commit needs no request: that of a root which was listed before.
        self._commit = self._revision if re.fullmatch("[0-9a-f]{40}", self._revision or "") else ""
        self._listed: Sequence[File] | None = None
        self._places: dict[str, tuple[Client, str]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def root(self) -> str:
        """The URL with the commit, and without the name of a single file."""
        folder = f"/{self._folder}" if self._folder else ""
        return f"hf://{self._name}@{self._commit or self._revision or 'main'}{folder}"

    def files(self) -> Sequence[File]:
        """List the files of the folder, by one request."""
        if self._listed is None:
            self._listed = list(self._list())
        return self._listed

    def _list(self) -> Iterator[File]:
        with hub_errors_as(self._name):
            info = (
                _library()
                .HfApi()
                .model_info(self._name, revision=self._revision, files_metadata=True)
            )
        self._commit = info.sha
        _REVISIONS[self._name, self._commit] = self._revision
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
            with hub_errors_as(self._name):  # formats report missing weights by name
                found = library.snapshot_download(
                    self._name,
                    revision=self._revision,
                    local_files_only=True,
                    allow_patterns=self._patterns(()),
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

    def download(self, names: Iterable[str]) -> Path:
        """Download the files ``names`` and all small ones to the local cache; return the folder.

        The library resumes an interrupted download and shows its progress.

        Raises:
            StorageError: the Hub cannot be reached or refuses, or the disk is full.
            NotFoundError: the repository or the commit does not exist any more.
        """
        download = _library().snapshot_download
        patterns = self._patterns(names)
        # With a branch's name the cache records its commit too, which offline runs look up.
        revision = _REVISIONS.get((self._name, self._commit or ""), self._commit)
        with hub_errors_as(self._name):
            found = Path(download(self._name, revision=revision, allow_patterns=patterns))
            if found.name != self._commit:  # the branch moved on since the checkpoint was opened
                found = Path(download(self._name, revision=self._commit, allow_patterns=patterns))
        return found / self._folder

    def _patterns(self, names: Iterable[str]) -> list[str]:
        """Return patterns of the files ``names`` and of every file but the weights below."""
        prefix = f"{self._folder}/" if self._folder else ""
        return [glob.escape(prefix) + pattern for pattern in (*map(glob.escape, names), "*.json")]

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


def downloaded(catalog: Catalog, numbers: Iterable[int]) -> Catalog:
    """Return ``catalog`` as it is in the local cache of the Hub, its files ``numbers`` downloaded.

    Extras are downloaded too. Catalogs of other places are returned unchanged.

    Raises:
        FormatError: a file in the cache has another size than in the listing.
        NotFoundError, StorageError: as ``Repository.download``.
    """
    if not catalog.root.startswith("hf://"):
        return catalog
    paths = {catalog.files[number].path for number in numbers}
    own = {path for path in paths if "://" not in path and not os.path.isabs(path)}
    place = Repository(catalog.root).download(sorted(own.union(catalog.extras)))
    here = LocalFolder(place, own).files() if own else {}
    for file in catalog.files:
        if file.path in own and here[file.path].num_bytes != file.num_bytes:
            raise FormatError(
                f"{place / file.path} has {here[file.path].num_bytes} bytes (expected "
                f"{file.num_bytes}). Remove it from the cache, and try again."
            )
    files = tuple(here.get(file.path, file) for file in catalog.files)
    return replace(catalog, root=str(place), files=files)


_CACHED = re.compile(
    r".*/models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?P<folder>/.+)?"
)


def url_of_cached(path: str) -> str | None:
    """Return the URL of a folder in the local cache of the Hub; None for other folders.

    >>> url_of_cached("/home/me/hub/models--org--llama/snapshots/" + "a" * 40)
    'hf://org/llama@aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'
    """
    found = _CACHED.fullmatch(path)
    if found is None:
        return None
    return f"hf://{found['owner']}/{found['name']}@{found['commit']}{found['folder'] or ''}"


def _in_use(path: str) -> bool:
    """Return whether a checkpoint is read from ``path``, and not only shown on its page."""
    return path.endswith((".safetensors", ".ckpt", ".json"))


# --- Places: paths and URLs, and the folders there, local or remote

Place = Path | RemotePath
ReadFolder = LocalFolder | RemoteFolder

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


def is_fetched(path: str | os.PathLike[str], *, stream: bool) -> bool:
    """Return whether the bytes of ``path`` are fetched by ranges, and not downloaded first."""
    return is_remote(path) and (stream or not os.fspath(path).startswith("hf://"))


def place_at(path: str | os.PathLike[str]) -> Path | RemotePath:
    """Return ``path`` as a path or, if it is a URL, as something that can be used like one.

    For a repository of the Hub that is in the local cache, it is the path in the cache.
    """
    if not is_remote(path):
        return Path(path)
    place = RemotePath(os.fspath(path))
    return place.local_copy() or place


def folder_at(
    place: str | os.PathLike[str], names: Iterable[str] | None = None
) -> LocalFolder | RemoteFolder:
    """Return the folder at ``place``, of a local one only the files ``names``."""
    if isinstance(place, Path) or not is_remote(place):
        return LocalFolder(place, names)
    return place.opened() if isinstance(place, RemotePath) else RemoteFolder(os.fspath(place))


def refuse_remote(destination: str | os.PathLike[str]) -> None:
    """Refuse to write to a store what is published by a rename, because stores have none.

    Raises:
        LayoutError: the destination is a URL, also if ``pathlib`` has removed a slash of it.
    """
    text = os.fspath(destination)
    found = _URL.match(text)
    if found and found[1].lower() in SCHEMES and not os.path.lexists(text):
        raise LayoutError(
            f"{text}: this is written to local paths only. Write to a disk, and upload the folder "
            "with the tools of the store."
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
