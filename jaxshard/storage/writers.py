"""Writers of output files at their final offsets, from many threads, and of side files.

Every file's header is known from shapes, so files are laid out first and each shard
goes straight to its place. The header itself is written when all else is there, so that
no reader takes an unfinished file for a whole one.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ..core.catalog import Catalog
from ..core.runtime import paused
from ..errors import LayoutError, NotFoundError, StorageError, format_list
from ..formats.mindspore_ckpt import CRC_BYTES, crc_trailer
from ..formats.output_files import Container
from ..formats.rank_names import rank_of_strategy_file
from ..formats.safetensors import FileLayout
from ..planning.bundles import Bundle
from ..planning.copies import TensorCopy
from ..planning.outputs import Outputs
from ..planning.plan import Plan
from .fs import exchange, reserve
from .io import Sink
from .local import Handles
from .remote import RemoteFolder, is_remote
from .shared_transaction import SharedTransaction
from .staging import FILES, os_errors_as, staging_folder
from .transaction import Transaction

_HELD_BYTES = 8 << 20  # the disk works while files are filled, and the fsync at the end is short


class OutputFiles(Sink):
    """The files of a plan, open for writing."""

    def __init__(
        self,
        plan: Plan,
        staging: Transaction | SharedTransaction,
        container: Container,
    ) -> None:
        outputs = plan.outputs
        wanted = range(len(outputs.paths)) if plan.only is None else sorted(plan.only)
        self._paths, self._staging = outputs.paths, staging
        self._content_of = outputs.content_of
        with paused():
            self._layouts: Mapping[int, FileLayout] = {
                c: container.layout(outputs.contents[c])
                for c in {outputs.content_of[r] for r in wanted}
            }
        self._handles, self._crc = Handles(staging.files, os.O_WRONLY), container.crc
        self._lock = threading.Lock()
        sizes = outputs.rank_bytes()
        self._left = {rank: sizes[rank] for rank in wanted}
        self._held = dict.fromkeys(wanted, 0)  # bytes written since the last writeback was started
        for rank in wanted:
            self._create(rank)
        for rank in [r for r, left in self._left.items() if not left]:
            self._finish(rank)

    def write(self, move: TensorCopy, target: int, offset: int, buffer: memoryview) -> int:
        """Store part of a target box in the file of every rank that wants it."""
        return self.write_views(move, target, offset, (buffer,), len(buffer))

    def write_views(
        self,
        move: TensorCopy,
        target: int,
        offset: int,
        views: Sequence[memoryview],
        num_bytes: int,
    ) -> int:
        """Store ``views``, which one after the other are part of a target box."""
        ranks = move.targets[target].ranks
        for rank in ranks:
            path = self._paths[rank]
            spans = self._layouts[self._content_of[rank]].spans(move.name, offset, num_bytes)
            if len(spans) == 1:
                self._handles.write_views(path, spans[0][0], views)
            else:
                joined = views[0] if len(views) == 1 else memoryview(b"".join(views))
                done = 0
                for at, length in spans:
                    self._handles.write(path, at, joined[done : done + length])
                    done += length
            self._count(rank, num_bytes)
        return len(ranks)

    def write_bundle(self, bundle: Bundle, buffer: memoryview) -> int:
        """Store small tensors in the file of every rank that wants them."""
        known: dict[int, list[tuple[int, list[memoryview]]]] = {}  # ranks share contents
        for rank in bundle.ranks:
            content = self._content_of[rank]
            if content not in known:
                known[content] = placed(bundle, self._layouts[content].spans, buffer)
            for offset, views in known[content]:
                self._handles.write_views(self._paths[rank], offset, views)
            self._count(rank, bundle.data_bytes)
        return len(bundle.ranks)

    def _count(self, rank: int, num_bytes: int) -> None:
        """Note that ``num_bytes`` more of the file of ``rank`` are written."""
        with self._lock:
            self._left[rank] -= num_bytes
            self._held[rank] += num_bytes
            is_finished = not self._left[rank]
            is_due = self._staging.durable and self._held[rank] >= _HELD_BYTES
            if is_due:
                self._held[rank] = 0
        if is_finished:
            self._finish(rank)
        elif is_due:
            self._handles.start_writing_back(self._paths[rank])

    def close(self) -> None:
        """Close all handles."""
        self._handles.close()

    def _create(self, rank: int) -> None:
        layout = self._layouts[self._content_of[rank]]
        path = self._staging.files / self._paths[rank]
        with os_errors_as(f"{path} cannot be made"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                reserve(file.fileno(), layout.num_bytes)

    def _finish(self, rank: int) -> None:
        path, layout = self._paths[rank], self._layouts[self._content_of[rank]]
        for offset, data in layout.segments:
            self._handles.write(path, offset, memoryview(data))
        if self._crc:
            append_crc(self._staging.files / path)
        self._staging.finish(path, layout.num_bytes)


def placed(
    bundle: Bundle, place_of: Callable[[str, int, int], Sequence[tuple[int, int]]], data: memoryview
) -> list[tuple[int, list[memoryview]]]:
    """The writes that store ``bundle`` in a file: an offset, and what goes there in a row.

    Args:
        bundle: the tensors, whose bytes are ``data``.
        place_of: ``place_of(name, offset, num_bytes)``: where bytes of a tensor lie in the file.
        data: the buffer of the bundle.
    """
    runs: list[tuple[int, int, int]] = []  # (file offset, start and end in the buffer)
    at, end = -1, -1
    for name, first, length in zip(bundle.names, bundle.starts, bundle.lengths, strict=True):
        start = first
        for offset, part in place_of(name, 0, length):
            if runs and offset == at and start == end:
                runs[-1] = (*runs[-1][:2], end + part)
            else:
                runs.append((offset, start, start + part))
            at, end = offset + part, start + part
            start = end
    writes: list[tuple[int, list[memoryview]]] = []
    at = -1
    for offset, start, end in sorted(runs):
        if offset != at:
            writes.append((offset, []))
        writes[-1][1].append(data[start:end])
        at = offset + end - start
    return writes


# --- Sealing: what can be written only when all else of a file is there

_BLOCK_BYTES = 8 << 20


def append_crc(path: Path) -> None:
    """Fill the room at the end of the ``.ckpt`` at ``path`` with the checksum of what precedes.

    Raises:
        StorageError: the disk refused.
    """
    with os_errors_as(f"{path} cannot be sealed"), open(path, "r+b") as file:
        end = file.seek(0, 2) - CRC_BYTES
        file.seek(0)
        crc, left = 0, end
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            crc = zlib.crc32(block, crc)
            left -= len(block)
        file.seek(end)
        file.write(crc_trailer(crc))


# --- Shared writing: files that several processes fill together, each with bytes of its own

SEEN_WITHIN_S = 60.0  # what a network file system may take to show a new folder to others


def shared_folder(destination: Path, token: str) -> Path:
    """Where the processes that share ``token`` write what becomes ``destination``."""
    return staging_folder(destination) / f"{FILES}-{token}"


def token_of(outputs: Iterable[Outputs]) -> str:
    """A word for one attempt, in which others see whether they would lay out the same files."""
    return f"{secrets.token_hex(8)}-{_digest(outputs)}"


def check_alike(token: str, outputs: Iterable[Outputs], process: int) -> None:
    """Refuse to write into files that process 0 has laid out otherwise.

    Raises:
        LayoutError: they lie otherwise.
    """
    if token.rpartition("-")[2] != _digest(outputs):
        raise LayoutError(
            f"process {process} would lay out other files than process 0 has. Give all processes "
            "arrays of the same names, shapes and dtypes in the same order, and the same options."
        )


def _digest(outputs: Iterable[Outputs]) -> str:
    digest = hashlib.sha256()
    for files in outputs:
        for content in files.contents:
            told = [(e.tensor.name, e.tensor.dtype.name, e.shape) for e in content]
            digest.update(repr(told).encode())
        digest.update(repr((files.paths, files.content_of)).encode())
    return digest.hexdigest()[:16]


def wait_for(folder: Path, within_s: float, process: int) -> None:
    """Wait until the folder that process 0 has made is seen here.

    Raises:
        StorageError: it is not: the hosts do not share that disk.
    """
    until = time.monotonic() + min(SEEN_WITHIN_S, within_s)
    while not folder.is_dir():
        if time.monotonic() > until:
            raise StorageError(
                f"process {process} does not see {folder}, which process 0 has made. Save to a "
                "filesystem that all hosts share, or pass shared_filesystem=False: each process "
                "then writes the files of its own devices to its own disk."
            )
        time.sleep(0.05)


def bring_in(staging: Transaction, folder: Path) -> None:
    """Make what all wrote into ``folder`` what ``staging`` publishes."""
    with os_errors_as(f"{folder} cannot be moved"):
        os.rmdir(staging.files)
        os.rename(folder, staging.files)


class SharedFiles:
    """The files of ``outputs`` below ``folder``."""

    def __init__(self, outputs: Outputs, folder: Path, container: Container) -> None:
        self._outputs, self._folder = outputs, folder
        self._layouts = [container.layout(content) for content in outputs.contents]
        self._handles = Handles(folder, os.O_WRONLY)
        self._written: set[int] = set()
        self._lock = threading.Lock()

    def lay_out(self) -> None:
        """Create all files with their headers; one process does, before the others write.

        Raises:
            StorageError: the disk is full or refuses.
        """
        for rank, path in enumerate(self._outputs.paths):
            layout = self._layouts[self._outputs.content_of[rank]]
            place = self._folder / path
            with os_errors_as(f"{place} cannot be made"):
                place.parent.mkdir(parents=True, exist_ok=True)
                with open(place, "wb") as file:
                    file.truncate(layout.num_bytes)
            for offset, data in layout.segments:
                self._handles.write(path, offset, memoryview(data))
            self._written.add(rank)

    def write(self, rank: int, name: str, offset: int, data: memoryview) -> None:
        """Store ``data`` from byte ``offset`` of what the file of ``rank`` holds of a tensor.

        Raises:
            StorageError: the disk is full or refuses.
        """
        layout, done = self._layouts[self._outputs.content_of[rank]], 0
        for at, length in layout.spans(name, offset, len(data)):
            try:
                self._handles.write(self._outputs.paths[rank], at, data[done : done + length])
            except NotFoundError:
                raise StorageError(
                    f"{self._folder} is gone: the others gave this save up before this process "
                    "had written. Save again, with a longer timeout_s if this one is slower."
                ) from None
            done += length
        if rank not in self._written:
            with self._lock:
                self._written.add(rank)

    def sync(self) -> None:
        """Wait until all that this process wrote is on the disk.

        Raises:
            StorageError: the disk refuses.
        """
        for rank in sorted(self._written):
            self._handles.sync(self._outputs.paths[rank])

    def append_crcs(self) -> None:
        """Append the checksum of every file; one process does, when all have written."""
        for rank, path in enumerate(self._outputs.paths):
            append_crc(self._folder / path)
            self._written.add(rank)

    def close(self) -> None:
        """Close all handles."""
        self._handles.close()


# --- Side files (config, tokenizer) copied into a result


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
        write_files(read_extras(root, extras), into, sync)
        return
    for path in extras:
        if not leave_out(Path(root, path)):
            with os_errors_as(f"{into / path} cannot be written"):
                (into / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(root, path), into / path)
                sync(into / path)


def read_extras(root: str, extras: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield ``extras`` of the folder ``root`` and their contents, one at a time.

    Raises:
        StorageError: they cannot be read.
    """
    folder = RemoteFolder(root) if is_remote(root) else None
    for path in extras:
        if folder is not None:
            yield path, folder.read_whole(path)
        else:
            with os_errors_as(f"{Path(root, path)} cannot be read"):
                data = Path(root, path).read_bytes()
            yield path, data


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
