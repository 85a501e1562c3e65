"""Fetch stage: the bytes of a plan, fetched from a remote store ahead of the engine.

A store answers each request after tens of milliseconds, so many must be in flight. The stage
walks the engine's batches ahead of it, joins what neighbouring batches read into requests, keeps
the requests within a window of memory, and lends their answers to the engine: one copy in all.

    batches    b0 b1 b2 | b3 b4 | b5 …        in the order of the engine
    requests   ───r0───   ──r1──   ─r2…       of about 4 MiB, each of one file
    window     r0 lent    r1 here  r2 in flight

An answer is released when all batches of its group are done. The walk does not wait for the
memory that the engine's targets need: only batches that were handed out can free that.
"""

from __future__ import annotations

import posixpath
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import TypeVar

from ..core.catalog import Catalog, File, StoredShard
from .io import GAP_BYTES, Source, Span
from .local import LocalFolder
from .object_store import REQUESTS_AT_ONCE
from .remote import RemoteFolder, is_remote

T = TypeVar("T")

REQUEST_BYTES = 4 << 20  # larger ones need more memory for as many connections
_POLL_SECONDS = 0.1  # how long an interrupt of a run may go unnoticed
_OVERLAPS = 8  # batches that overlap are joined up to so many requests: else fetched twice


@dataclass(slots=True)
class Group:
    """Neighbouring batches whose bytes are fetched together and released together.

    Attributes:
        spans: file, start and stop of each request; large gaps are left out.
        num_batches: how many batches read them and are not done.
        answers: the bytes of each span, once they are here.
    """

    spans: list[Span] = field(default_factory=list)
    num_batches: int = 0
    answers: list[tuple[Span, memoryview]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """What the group needs of the window."""
        return sum(stop - start for _, start, stop in self.spans)

    def takes(self, spans: Sequence[Span]) -> bool:
        """Return whether a batch that reads ``spans`` may join the group."""
        if not spans or not self.spans:
            return True
        files = {file for file, *_ in (*spans, *self.spans)}
        if len(files) > 1:
            return False  # what is far apart is not released as one
        first, last = self.spans[0][1], self.spans[-1][2]
        start, stop = spans[0][1], max(stop for *_, stop in spans)
        limit = REQUEST_BYTES if start >= last else _OVERLAPS * REQUEST_BYTES
        return first <= start <= last + GAP_BYTES and stop - first <= limit

    def add(self, spans: Sequence[Span]) -> None:
        """Have a batch that reads ``spans`` join the group."""
        self.num_batches += 1
        for file, start, stop in spans:
            last = self.spans[-1] if self.spans else None
            if last and last[0] == file and last[1] <= start <= last[2] + GAP_BYTES:
                self.spans[-1] = (file, last[1], max(stop, last[2]))
            else:
                self.spans.append((file, start, stop))


def groups_of(batches: Iterable[Sequence[Span]]) -> Iterator[Group]:
    """Join the spans of batches, in their order, into groups of about a request.

    >>> [g.spans for g in groups_of([[(0, 0, 100)], [(0, 120, 200)], [(1, 0, 50)]])]
    [[(0, 0, 200)], [(1, 0, 50)]]
    """
    group = Group()
    for spans in batches:
        if group.num_batches and not group.takes(spans):
            yield group
            group = Group()
        group.add(spans)
    if group.num_batches:
        yield group


def planned(batches: Iterable[Sequence[Span]]) -> tuple[int, int]:
    """Return the requests that the stage makes for ``batches``, and their bytes.

    >>> planned([[(0, 0, 100)], [(0, 120, 200)], [(1, 0, 50)]])
    (2, 250)
    """
    sizes = [stop - start for group in groups_of(batches) for _, start, stop in group.spans]
    return len(sizes), sum(sizes)


class RemoteFiles(Source):
    """The files of a remote catalog. What the plan reads is fetched ahead, and lent."""

    can_lend = True
    request_bytes = REQUEST_BYTES

    def __init__(self, catalog: Catalog) -> None:
        self._files = catalog.files
        places = [location(catalog.root, file.path) for file in self._files]
        own: dict[str, list[File]] = {}  # of the folder, and of that of adapters
        for file, (folder, name) in zip(self._files, places, strict=True):
            own.setdefault(folder, []).append(replace(file, path=name))
        folders = {at: RemoteFolder(at, files) for at, files in own.items() if is_remote(at)}
        self._folders, self._places = folders, places
        self._pool = RequestThreads(REQUESTS_AT_ONCE)
        self._live: list[Group] = []
        self._room = threading.Condition()
        self._held_bytes, self._is_stopped = 0, False
        self.most_held_bytes = 0

    @property
    def requested(self) -> tuple[int, int]:
        """The requests to the stores so far, and their bytes."""
        folders = self._folders.values()
        return sum(f.num_requests for f in folders), sum(f.bytes_read for f in folders)

    def read(self, piece: StoredShard, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from what was fetched, or by a request of its own."""
        data = self.lend(piece, offset, len(buffer))
        if data is None and len(buffer):
            # in the pool: a request that this thread makes would not be interrupted by Ctrl-C
            request = self._pool.submit(self._get, piece.file, offset, offset + len(buffer))
            data = request.result()
        if data is not None:
            buffer[:] = data

    def lend(self, piece: StoredShard, offset: int, num_bytes: int) -> memoryview | None:
        """Return bytes that the stage has fetched and not released."""
        stop = offset + num_bytes
        for group in tuple(self._live):
            for (file, start, end), data in group.answers:
                if file == piece.file and start <= offset and stop <= end:
                    return data[offset - start : stop - start]
        return None

    def fetched(
        self, batches: Iterable[Sequence[Span]], window_bytes: int
    ) -> Generator[Callable[[], None]]:
        """Yield for each batch, once its bytes are here, what to call when it is done.

        Args:
            batches: what each batch reads, in the order in which the engine has them.
            window_bytes: the most bytes to be held at once; one request is always held.
        """
        self._is_stopped = False
        groups, sent = groups_of(batches), deque[tuple[Group, Future[None]]]()
        following = next(groups, None)
        try:
            while (following is not None or sent) and not self._is_stopped:
                while following is not None and self._has_room(following, window_bytes, bool(sent)):
                    sent.append((following, self._pool.submit(self._fetch, following)))
                    following = next(groups, None)
                if not sent:  # stopped while there was no room
                    return
                group, request = sent.popleft()
                while not request.done() and not self._is_stopped:
                    wait([request], _POLL_SECONDS)
                if self._is_stopped:
                    return
                request.result()
                self._live.append(group)
                for _ in range(group.num_batches):
                    yield lambda group=group: self._done(group)  # type: ignore[misc]
        finally:
            for _, request in sent:
                request.cancel()

    def stop(self) -> None:
        """Wake the threads that wait in ``fetched``, which then ends."""
        with self._room:
            self._is_stopped = True
            self._room.notify_all()

    def _has_room(self, group: Group, window_bytes: int, is_any_sent: bool) -> bool:
        """Take room in the window for ``group``; waits for it if nothing else is on its way."""
        with self._room:
            while self._held_bytes and self._held_bytes + group.num_bytes > window_bytes:
                if is_any_sent or self._is_stopped:
                    return False
                self._room.wait()
            self._held_bytes += group.num_bytes
            self.most_held_bytes = max(self.most_held_bytes, self._held_bytes)
            return True

    def _done(self, group: Group) -> None:
        with self._room:
            group.num_batches -= 1
            if not group.num_batches:
                self._held_bytes -= group.num_bytes
                self._live.remove(group)
                self._room.notify_all()

    def _fetch(self, group: Group) -> None:
        group.answers = [(span, self._get(*span)) for span in group.spans]

    def _get(self, file: int, start: int, stop: int) -> memoryview:
        folder, name = self._places[file]
        if folder in self._folders:
            version = replace(self._files[file], path=name)
            return self._folders[folder].get(version, start, stop)
        return memoryview(LocalFolder(folder).read(name, start, stop - start))

    def close(self) -> None:
        """Make no further requests; those in flight end by themselves, unheeded."""
        self._pool.close()
        self._live.clear()
        for folder in self._folders.values():
            folder.close()


class RequestThreads:
    """Threads that make requests, as many as were submitted up to a limit.

    A request cannot be interrupted. Unlike the threads of an executor these are daemons, so that
    after Ctrl-C Python does not wait at its exit for a store that does not answer.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._num_started, self._is_closed = 0, False
        self._todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Call ``function`` in one of the threads."""
        future: Future[T] = Future()

        def work() -> None:
            if self._is_closed or not future.set_running_or_notify_cancel():
                future.cancel()
                return
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # raised where the result is taken
                future.set_exception(error)

        with self._lock:
            if self._num_started < self._num_threads:
                self._num_started += 1
                threading.Thread(target=self._work, name="jaxshard fetch", daemon=True).start()
        self._todo.put(work)
        return future

    def close(self) -> None:
        """Have each thread end after the request that it makes."""
        self._is_closed = True
        for _ in range(self._num_started):
            self._todo.put(None)

    def _work(self) -> None:
        while (work := self._todo.get()) is not None:
            work()


def location(root: str, path: str) -> tuple[str, str]:
    """Return the folder and the name of a catalog's file; adapters are in another folder.

    >>> location("s3://b/m", "a.safetensors"), location("s3://b/m", "/home/x/a.safetensors")
    (('s3://b/m', 'a.safetensors'), ('/home/x', 'a.safetensors'))
    """
    if "://" in path or posixpath.isabs(path):
        folder, _, name = path.rpartition("/")
        return folder, name
    return root, path
