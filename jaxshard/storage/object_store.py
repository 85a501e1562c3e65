"""Object store: requests for byte ranges, by ``obstore``.

It finds credentials, signs, retries and follows redirects. It is imported when the first remote
path is opened. Each request is pinned to the version that the listing showed, so an object that
changes is an error and never a mixture of two versions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar

from ..core.catalog import File
from ..errors import FormatError, LayoutError, NotFoundError, StorageError

A = TypeVar("A")
B = TypeVar("B")
Client = Any  # the stores of obstore, which have no common type

REQUESTS_AT_ONCE = 64  # a store that answers after 50 ms with 50 MB/s each needs them all

# obstore has no read time-out by default, and its 30 s for a whole request would end each one
# of 4 MiB on a line of less than 140 KB/s.
_CLIENT = {
    "connect_timeout": "5s",
    "read_timeout": "20s",
    "timeout": "120s",
    "pool_max_idle_per_host": str(REQUESTS_AT_ONCE),
}
_RETRY = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=10),
        "base": 2,
    },
}


_process = 0  # that used obstore first


def obstore_module() -> ModuleType:
    """Import obstore.

    Raises:
        StorageError: it is not installed, or was used before this process was forked.
    """
    global _process  # noqa: PLW0603 - a fact about the process
    try:
        import obstore  # noqa: PLC0415 - an extra, and only for remote paths
    except ImportError:
        raise StorageError(
            "remote paths need the package obstore. Install it: pip install 'jaxshard[cloud]'."
        ) from None
    if _process not in (0, os.getpid()):
        # its threads do not exist in the child, where every request would wait for ever
        raise StorageError(
            "remote paths cannot be read in a process that was forked after one was read. "
            "Start processes with the method spawn."
        )
    _process = os.getpid()
    return obstore


@contextmanager
def store_errors_as(what: str, done: str = "read") -> Iterator[None]:
    """Convert errors of a request about ``what``, which is to be ``done``.

    The text of a URL's query is never repeated.
    """
    import obstore.exceptions as known  # noqa: PLC0415 - as in obstore_module

    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(f"{what} does not exist.") from None
    except (known.PreconditionError, known.NotModifiedError):
        raise _changed(what) from None
    except known.AlreadyExistsError:
        raise LayoutError(f"{what} exists.") from None
    except (known.PermissionDeniedError, known.UnauthenticatedError):
        raise CredentialsError(_refused(what)) from None
    except (known.BaseError, ValueError, OSError) as error:
        if re.search(r"status code: 40[13]\b", str(error)):  # of a listing, which has no own class
            raise CredentialsError(_refused(what)) from None
        text = " ".join(str(error).split()).split("Debug source")[0]
        text = re.sub(r"\?[^\s)]*", "", text)[:300].strip()
        raise StorageError(f"{what} cannot be {done}: {text}") from None


def _refused(what: str) -> str:
    return (
        f"{what}: the store refuses these credentials, or they have expired. Log in again, or, for "
        "a public bucket, set AWS_SKIP_SIGNATURE=true or GOOGLE_SKIP_SIGNATURE=true."
    )


class CredentialsError(StorageError):
    """A store refused a request's credentials."""


def _changed(what: str) -> FormatError:
    return FormatError(f"{what} changed while being read. Try again when nothing writes there.")


@lru_cache(maxsize=64)
def store_at(url: str, token: str = "") -> Client:
    """Return obstore's client for the folder ``url``."""
    obstore_module()
    from obstore.store import HTTPStore, from_url  # noqa: PLC0415

    client: dict[str, Any] = dict(_CLIENT)
    if url.startswith("http:") or os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true":
        client["allow_http"] = True
    if token:
        client["default_headers"] = {"Authorization": f"Bearer {token}"}
    make: Any = HTTPStore.from_url if url.startswith("http") else from_url
    with store_errors_as(url.partition("?")[0]):
        return make(url, client_options=client, retry_config=_RETRY)


def get_range(store: Client, path: str, file: File, start: int, stop: int, what: str) -> memoryview:
    """Fetch bytes ``start`` to ``stop`` of the version ``file`` of an object.

    Raises:
        FormatError: the object has another version, or the answer another length.
        NotFoundError, StorageError: as ``store_errors_as``.
    """
    obstore = obstore_module()
    options: dict[str, Any] = {"range": (start, stop)}
    version = file.version
    if version and not version.startswith("W/"):  # a weak tag never matches If-Match
        options["if_match"] = version if version.startswith('"') else f'"{version}"'
    with store_errors_as(what):
        answer = obstore.get(store, path, options=options)
        meta = answer.meta
        data = memoryview(answer.bytes())
    # A server may ignore If-Match, or report a range that is too short. Azure lists tags without
    # the quotes of its headers.
    is_same = not version or (meta["e_tag"] or "").strip('"') == version.strip('"')
    if meta["size"] != file.num_bytes or not is_same:
        raise _changed(what)
    if len(data) != stop - start:
        raise FormatError(
            f"{what}: the server sent {len(data)} bytes of {stop - start}. Try again."
        )
    return data


def at_once(function: Callable[[A], B], arguments: Iterable[A]) -> Iterator[B]:
    """Call ``function`` with each argument, all at once: one round of latency."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - for remote paths only

    todo = list(arguments)
    if not todo:
        return
    with ThreadPoolExecutor(min(REQUESTS_AT_ONCE, len(todo)), "jaxshard headers") as pool:
        yield from pool.map(function, todo)
