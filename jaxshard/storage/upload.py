"""Upload: a result in an object store, whose files are sent in parts, several at once.

    out/.jaxshard.partial             first, and removed last: the request, and this run
    out/config.json …                 files without tensors
    out/model-00001-of-00002…         weight files, each sent in the order of its bytes
    out/model.safetensors.index.json  last: without it no reader takes the result for complete

A store has no rename, so an object that makes the result readable is written when all others are
there; if that is the only weight file, its upload is completed then. Each object has the request in
its metadata, by which a later run finds what is finished. Readers of jaxshard refuse a folder
with the first object. A single file needs none: an object appears whole.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import secrets
import tempfile
import threading
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..core.catalog import Catalog
from ..core.runtime import paused
from ..errors import OVERWRITE, RESUME, JaxshardError, LayoutError, StorageError
from ..formats.folder import ITERATION_METADATA, TRACKER
from ..formats.huggingface import INDEX, MINDSPORE_INDEX
from ..formats.mindspore_ckpt import CRC_BYTES, crc_trailer
from ..formats.output_files import Container, Result
from ..formats.rank_names import LAYOUT_FILE
from ..formats.safetensors import FileLayout
from ..planning.copies import TensorCopy
from ..planning.outputs import Outputs
from ..planning.plan import Plan
from . import engine
from .io import Sink, Source
from .object_store import at_once, obstore_module, store_at, store_errors_as
from .overwrite import refuse_foreign_names
from .remote import MARKER, REQUEST_KEY
from .resources import Budget, Counts, default_budget
from .writers import read_extras

PART_BYTES = 8 << 20
_MOST_PARTS = 9_000  # of an object; the stores allow 10,000
_AHEAD = 2  # parts of a file that are filled in memory at once
_FILES_AT_ONCE = 4
_PARTS_AT_ONCE = 16  # in flight; a store of 50 ms and 50 MB/s a connection takes 600 MB/s
_LOOK_AFTER_S = (0.0, 1.0, 4.0)  # for an object whose upload was completed, without an answer
_ABORT_S = 5.0  # an abort is one request; the store may not answer it
_POLL_S = 0.1  # how long an interrupt may go unnoticed
_LAST = (INDEX, MINDSPORE_INDEX, LAYOUT_FILE, ITERATION_METADATA, TRACKER)
_SCHEMES = ("s3", "gs", "az")


def is_last(path: str) -> bool:
    """Return whether the file at ``path`` makes a result readable.

    >>> is_last("model.safetensors.index.json"), is_last("strategy/a.ckpt"), is_last("config.json")
    (True, True, False)
    """
    return path.rpartition("/")[2] in _LAST or path.startswith("strategy/")


def _rank_of_last(path: str) -> int:
    name = path.rpartition("/")[2]
    return _LAST.index(name) if name in _LAST else -1


@dataclass(frozen=True)
class _Marker:
    """The content of the marker: the digest of the request, the run, and what it replaces."""

    request: str
    run: str
    is_resumable: bool
    replaces: tuple[str, ...] = ()


class Upload:
    """A result that is being written to a store.

    Attributes:
        finished: the objects that an interrupted run completed, with their sizes.
        published: whether that run completed all of it.
    """

    def __init__(
        self,
        url: str,
        request: str,
        *,
        resume: bool = False,
        overwrite: bool = False,
        only: bool = False,
        is_resumable: bool = True,
    ) -> None:
        """Begin or resume the upload to ``url``.

        Args:
            url: the URL of the folder; with ``only``, of the file.
            request: a text that two runs share if and only if they make the same result.
            resume: continue an interrupted run of the same request, if there is one.
            overwrite: replace an existing result, and discard an interrupted run.
            only: the result is one file.
            is_resumable: a later run can continue after an interruption.

        Raises:
            LayoutError: the destination exists, or holds an interrupted or a running upload.
            StorageError: the store fails or refuses.
        """
        self._url, self._overwrite = url.rstrip("/"), overwrite
        if self._url.partition("://")[0].lower() not in _SCHEMES:
            raise LayoutError(
                f"{self._url.partition('?')[0]}: results are written to local paths, s3://, gs:// "
                "and az:// only. Write to a disk, and upload the folder (for the Hub: hf upload)."
            )
        folder, _, name = self._url.rpartition("/")
        self._folder, self._name = (folder, name) if only else (self._url, "")
        self._store = store_at(self._folder)
        self._digest = hashlib.sha256(request.encode()).hexdigest()
        self._run, self._replaces, self._has_begun = secrets.token_hex(8), tuple[str, ...](), False
        self._streams: list[PartStream] = []
        self.finished, self.published = dict[str, int](), False
        there = self._listed()
        if only:
            self._enter_file(there, resume=resume and is_resumable)
        else:
            self._enter_folder(there, resume=resume and is_resumable, is_resumable=is_resumable)

    def _listed(self) -> dict[str, int]:
        """Return the size of each object."""
        obstore = obstore_module()
        with store_errors_as(self._url, "listed"):
            pages = obstore.list(self._store, prefix=None)
            found = {e["path"]: e["size"] for page in pages for e in page}
        if not self._name:
            return found
        return {p: size for p, size in found.items() if p == self._name}

    def _enter_file(self, there: Mapping[str, int], *, resume: bool) -> None:
        if there and resume and self._made_here(there):
            self.published = True
        elif there and not self._overwrite:
            raise self._exists()

    def _enter_folder(self, there: Mapping[str, int], *, resume: bool, is_resumable: bool) -> None:
        others = {path: size for path, size in there.items() if path != MARKER}
        mode: Any = "create"
        if MARKER in there:
            before, mode = self._read_marker()
            if resume and before.is_resumable and before.request == self._digest:
                self.finished = self._made_here(others)
                self._replaces = tuple(p for p in before.replaces if p in others)
                self._replaces = tuple(p for p in self._replaces if p not in self.finished)
                return self._put_marker(mode, is_resumable=is_resumable)
            if not self._overwrite:
                raise LayoutError(
                    f"{self._url} holds an interrupted upload, or one that is still running. Go on "
                    f"with {RESUME} and the same arguments, or discard it with {OVERWRITE}."
                )
        elif others:
            if resume and len(self._made_here(others)) == len(others):
                self.published = True
                return None
            if not self._overwrite:
                raise self._exists()
        refuse_foreign_names(others, self._url)
        self._replaces = tuple(others)
        return self._put_marker(mode, is_resumable=is_resumable)

    def _exists(self) -> LayoutError:
        return LayoutError(
            f"{self._url} exists. Choose another destination, or replace it with {OVERWRITE}."
        )

    def _made_here(self, objects: Mapping[str, int]) -> dict[str, int]:
        """Return those of ``objects`` that have this request in their metadata."""
        requests = at_once(self._request_of, objects)
        return {
            path: size
            for (path, size), request in zip(objects.items(), requests, strict=True)
            if request == self._digest
        }

    def _request_of(self, path: str) -> str | None:
        with store_errors_as(f"{self._folder}/{path}"):
            found = obstore_module().get(self._store, path, options={"head": True})
        return found.attributes.get(REQUEST_KEY)  # type: ignore[no-any-return]

    def _read_marker(self) -> tuple[_Marker, dict[str, Any]]:
        """Return the marker and its version, by which stores compare it when it is replaced."""
        with store_errors_as(f"{self._url}/{MARKER}"):
            found = obstore_module().get(self._store, MARKER)
            meta, data = found.meta, bytes(found.bytes())
        version = {name: meta[name] for name in ("e_tag", "version") if meta[name]}
        try:
            fields = json.loads(data)
            return _Marker(**{**fields, "replaces": tuple(fields["replaces"])}), version
        except (ValueError, TypeError, KeyError):
            raise LayoutError(
                f"{self._url}/{MARKER} is not jaxshard's. Remove it, or choose another destination."
            ) from None

    def _put_marker(self, mode: Any, *, is_resumable: bool) -> None:
        """Write the marker unless another run was faster; a lost answer is looked up."""
        obstore = obstore_module()
        marker = _Marker(self._digest, self._run, is_resumable, self._replaces)
        data = json.dumps(asdict(marker)).encode()
        known = obstore.exceptions
        try:
            with store_errors_as(f"{self._url}/{MARKER}", "written"):
                try:
                    obstore.put(self._store, MARKER, data, mode=mode, use_multipart=False)
                except (known.AlreadyExistsError, known.PreconditionError):
                    self._check_marker()
        except StorageError:
            with suppress(JaxshardError):
                return self._check_marker()
            raise

    def _check_marker(self) -> None:
        """Check that no other run has taken over.

        Raises:
            StorageError: one has.
        """
        if not self._name and self._read_marker()[0].run != self._run:
            raise StorageError(
                f"another process is writing {self._url}. Wait for it, or choose another "
                "destination."
            )

    def check_sizes(self, outputs: Outputs, container: Container) -> None:
        """Take no object for finished whose size is not that of its file."""
        for rank, path in enumerate(outputs.paths):
            if path in self.finished:
                size = container.layout(outputs.contents[outputs.content_of[rank]]).num_bytes
                if self.finished[path] != size:
                    del self.finished[path]

    def begin(self) -> None:
        """Remove what is replaced, before the first object.

        Raises:
            StorageError: the store fails or refuses.
        """
        self._has_begun = True
        last = [path for path in self._replaces if is_last(path)]
        weights = [
            p for p in self._replaces if p not in last and p.endswith((".safetensors", ".ckpt"))
        ]
        rest = [path for path in self._replaces if path not in {*last, *weights}]
        for paths in (last, weights, rest):  # first what makes the old result readable
            self._delete(paths)

    def _delete(self, paths: Sequence[str]) -> None:
        if paths:
            with store_errors_as(self._url, "changed"), suppress(FileNotFoundError):
                obstore_module().delete(self._store, list(paths))

    def put(self, path: str, data: bytes) -> None:
        """Write a small file, unless it is finished.

        Raises:
            StorageError: the store fails or refuses.
        """
        if path not in self.finished:
            self._put(path, data, len(data))

    def put_all(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Write small files (errors as ``put``)."""
        for path, data in files:
            self.put(path, data)

    def _put(self, path: str, data: Any, num_bytes: int, **how: Any) -> None:
        attributes = {REQUEST_KEY: self._digest}
        try:
            with store_errors_as(f"{self._folder}/{path}", "written"):
                obstore_module().put(self._store, path, data, attributes=attributes, **how)
        except JaxshardError:
            if not self._is_there(path, num_bytes):
                raise

    def _is_there(self, path: str, num_bytes: int) -> bool:
        """Return whether an upload that failed was completed, and only its answer lost."""
        for delay in _LOOK_AFTER_S:
            time.sleep(delay)
            with suppress(JaxshardError, FileNotFoundError):
                with store_errors_as(path):
                    found = obstore_module().get(self._store, path, options={"head": True})
                ours = found.attributes.get(REQUEST_KEY) == self._digest
                return bool(ours and found.meta["size"] == num_bytes)
        return False

    def open(self, path: str, layout: FileLayout, *, num_at_once: int, is_held: bool) -> PartStream:
        """Start sending a weight file, ``num_at_once`` parts at a time.

        If ``is_held``, its last part is sent by ``publish``.
        """
        stream = PartStream(self._name or path, layout, is_held=is_held)
        self._streams.append(stream)

        def send() -> None:
            try:
                how = {"chunk_size": stream.part_bytes, "max_concurrency": num_at_once}
                self._put(stream.path, iter(stream), layout.num_bytes, **how)
                stream.done.set()
            except BaseException as error:  # raised where the stream is written or awaited
                stream.fail(error)
            finally:
                stream.ended.set()

        threading.Thread(target=send, name="jaxshard upload", daemon=True).start()
        return stream

    def wait(self) -> None:
        """Wait for the uploads that ``publish`` need not complete."""
        for stream in [s for s in self._streams if not s.is_held]:
            stream.wait()
            self._streams.remove(stream)

    def publish(self, last: Mapping[str, bytes]) -> None:
        """Complete the uploads, write the files ``last``, and remove the marker.

        Raises:
            StorageError: the store fails, or another run has taken over.
        """
        self._check_marker()
        for stream in self._streams:
            stream.is_held = False
            stream.wake()
        self.wait()
        for path in sorted(last, key=_rank_of_last):
            self.put(path, last[path])
        if not self._name:
            self._delete([MARKER])

    def abandon(self) -> None:
        """Abort the uploads; finished objects and the marker stay for a later run to resume."""
        for stream in self._streams:
            stream.fail(StorageError(f"the upload to {self._url} was abandoned."))
        until = time.monotonic() + _ABORT_S
        for stream in self._streams:
            stream.ended.wait(max(0.0, until - time.monotonic()))
        if not (self._has_begun or self._name or self.published):
            with suppress(JaxshardError):
                self._check_marker()
                self._delete([MARKER])


class PartStream:
    """A file that threads fill in about the order of its bytes, and that is sent in parts.

    Two parts are filled in memory. A thread that is ahead of them waits while a part is ready to be
    sent. If none is, only what threads write can complete one, so none waits, and parts that do not
    fit are kept in a temporary file: transposed tensors are not filled in order.
    """

    def __init__(self, path: str, layout: FileLayout, *, is_held: bool) -> None:
        size = layout.num_bytes
        self.path, self.is_held, self.num_bytes = path, is_held, size
        self.part_bytes = part_bytes_of(size)
        self.done, self.ended = threading.Event(), threading.Event()
        self._segments, self._starts = layout.segments, [at for at, _ in layout.segments]
        self._crc_at, self._crc = layout.crc_offset, 0
        self._parts: dict[int, list[Any]] = {}  # buffer, bytes to come
        own_bytes = sum(len(data) for _, data in layout.segments)
        own_bytes += CRC_BYTES if self._crc_at is not None else 0
        self._left = size - own_bytes
        self._num_in_memory, self._next = 0, 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def write(self, offset: int, data: memoryview) -> None:
        """Store ``data`` at byte ``offset``.

        Raises:
            StorageError: the upload failed.
        """
        while len(data):
            number, at = divmod(offset, self.part_bytes)
            count = min(len(data), self.part_bytes - at)
            with self._changed:
                while not self._error and self._is_ahead(number):
                    self._changed.wait()
                self._raise()
                part = self._part(number)
            part[0][at : at + count] = data[:count]
            with self._changed:
                part[1] -= count
                self._left -= count
                if not part[1]:
                    self._changed.notify_all()
            offset, data = offset + count, data[count:]

    def _is_ahead(self, number: int) -> bool:
        first = self._parts.get(self._next)
        is_ready = first is not None and not first[1]
        return number not in self._parts and self._num_in_memory >= _AHEAD and is_ready

    def _part(self, number: int) -> list[Any]:
        """Return a part, which has the bytes of the file that are not tensors'."""
        part = self._parts.get(number)
        if part is not None:
            return part
        start = number * self.part_bytes
        size = min(self.part_bytes, self.num_bytes - start)
        if self._num_in_memory < _AHEAD:
            self._num_in_memory += 1
            buffer: Any = bytearray(size)
        else:
            with tempfile.TemporaryFile(prefix="jaxshard-") as file:
                file.truncate(size)
                buffer = mmap.mmap(file.fileno(), size)
        left = size
        for at, data in self._segments[max(0, bisect_right(self._starts, start) - 1) :]:
            if at >= start + size:
                break
            first, stop = max(at, start), min(at + len(data), start + size)
            if first < stop:
                buffer[first - start : stop - start] = data[first - at : stop - at]
                left -= stop - first
        if self._crc_at is not None:
            left -= max(0, start + size - max(start, self._crc_at))
        self._parts[number] = part = [buffer, left]
        return part

    def __iter__(self) -> Iterator[memoryview]:
        num_parts = -(-self.num_bytes // self.part_bytes)
        for number in range(num_parts):
            with self._changed:
                part = self._part(number)
                while not self._error and (part[1] or (self.is_held and number + 1 == num_parts)):
                    self._changed.wait()
                self._raise()
                buffer = self._parts.pop(number)[0]
                self._num_in_memory -= isinstance(buffer, bytearray)
                self._next = number + 1
                self._changed.notify_all()
            self._seal(buffer, number * self.part_bytes)
            yield memoryview(buffer)

    def _seal(self, buffer: Any, start: int) -> None:
        """Continue the checksum of the file, and put in the bytes of it that are in a part."""
        if self._crc_at is None:
            return
        end = max(0, min(len(buffer), self._crc_at - start))
        self._crc = zlib.crc32(memoryview(buffer)[:end], self._crc)
        trailer = crc_trailer(self._crc)
        skip = max(0, start - self._crc_at)
        buffer[end:] = trailer[skip : skip + len(buffer) - end]

    @property
    def is_written(self) -> bool:
        """Whether all of its bytes are there."""
        return not self._left

    def fail(self, error: BaseException) -> None:
        """Let all that wait for this file raise ``error``, unless there was another before."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def wake(self) -> None:
        """Look again whether the last part may be sent."""
        with self._changed:
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until the file is in the store.

        Raises:
            StorageError: it could not be sent.
        """
        while not self.done.wait(_POLL_S):
            self._raise()

    def _raise(self) -> None:
        if self._error:
            raise self._error


def part_bytes_of(num_bytes: int) -> int:
    """Return the size of the parts of an object: larger if there were more than stores allow."""
    return max(PART_BYTES, -(-num_bytes // _MOST_PARTS))


def first_files(result: Result, extras_of: Catalog | None) -> Iterator[tuple[str, bytes]]:
    """Yield the files without tensors of ``result`` that do not make it readable.

    They include the extras of the catalog ``extras_of`` that ``result`` does not have itself.
    """
    if extras_of is not None:
        for path, data in read_extras(extras_of.root, extras_of.extras):
            at = f"{result.extras_to}/{path}".lstrip("/")
            if at not in result.side_files:
                yield at, data
    for path, data in result.side_files.items():
        if not is_last(path):
            yield path, data


# --- The weight files of a plan


class _Streams(Sink):
    """The files that are filled at present, by rank."""

    is_in_order = True

    def __init__(
        self, streams: Mapping[int, PartStream], layouts: Mapping[int, FileLayout]
    ) -> None:
        self._streams, self._layouts = streams, layouts

    def write(self, move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        ranks = move.targets[target].ranks
        for rank in ranks:
            done = 0
            for at, length in self._layouts[rank].spans(move.name, offset, len(buffer)):
                self._streams[rank].write(at, buffer[done : done + length])
                done += length
        return len(ranks)

    def stop(self) -> None:
        """Wake the threads that wait for room; after the last write none does."""
        for stream in self._streams.values():
            if stream.is_written:
                continue
            stream.fail(StorageError(f"{stream.path}: the upload was stopped."))


def upload_files(
    plan: Plan,
    container: Container,
    source: Source,
    upload: Upload,
    *,
    budget: Budget,
    is_last: bool,
    progress: Callable[[int], None] | None = None,
) -> Counts:
    """Send the weight files of ``plan``, some at a time, each in the order of its bytes.

    Files without a common tensor read the source once. Of files by rank, each group of files reads
    what it needs. If the weights themselves make the result readable (``is_last``), the files of
    the last group are completed by ``upload.publish``.

    Raises:
        StorageError: the store or the source fails.
    """
    outputs, counts = plan.outputs, Counts()
    limit = budget.limit_bytes or default_budget()
    room = (limit - budget.host_bytes) // (2 if source.request_bytes else 1)
    budget = replace(budget, limit_bytes=limit - room)
    groups = _groups(plan)
    for ranks in groups:
        is_held = is_last and ranks is groups[-1]
        with paused():
            layouts, moves = _in_file_order(plan, container, ranks)
        largest = max(part_bytes_of(layout.num_bytes) for layout in layouts.values())
        num_at_once = room // largest // len(ranks) - _AHEAD - 1
        num_at_once = max(1, min(num_at_once, _PARTS_AT_ONCE // len(ranks)))
        streams = {
            r: upload.open(outputs.paths[r], layout, num_at_once=num_at_once, is_held=is_held)
            for r, layout in layouts.items()
        }
        sink = _Streams(streams, layouts)
        counts += engine.run(moves, source, sink, budget=budget, progress=progress, ahead=moves)
        upload.wait()
    return counts


def planned_requests(plan: Plan, container: Container, budget: Budget) -> Counts:
    """Return the requests that ``upload_files`` makes to the store of the source."""
    moves = (_in_file_order(plan, container, ranks)[1] for ranks in _groups(plan))
    found = (engine.planned_requests(m, budget=budget, is_in_order=True) for m in moves)
    return sum(found, Counts())


def _groups(plan: Plan) -> list[tuple[int, ...]]:
    """Return the files of ``plan``, by rank, that are written at the same time."""
    wanted = range(len(plan.outputs.paths)) if plan.only is None else sorted(plan.only)
    starts = range(0, len(wanted), _FILES_AT_ONCE)
    return [tuple(wanted[first : first + _FILES_AT_ONCE]) for first in starts]


def _in_file_order(
    plan: Plan, container: Container, ranks: Sequence[int]
) -> tuple[dict[int, FileLayout], list[TensorCopy]]:
    """Return the files of ``ranks``, and copies that fill them from their beginning, evenly."""
    outputs = plan.outputs
    layouts = {r: container.layout(outputs.contents[outputs.content_of[r]]) for r in ranks}

    def place(move: TensorCopy) -> float:
        rank = move.targets[0].ranks[0]
        at, _ = layouts[rank].spans(move.name, 0, 1)[0]
        return at / layouts[rank].num_bytes

    return layouts, sorted(replace(plan, only=frozenset(ranks)).moves(), key=place)
