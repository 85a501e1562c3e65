"""Local files: listing, versions, and I/O through a bounded set of descriptors.

A request is (file, offset, length); this module does not depend on tensors or formats.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.catalog import File
from ..errors import (
    MEND_THE_DISK,
    FormatError,
    NotFoundError,
    StorageError,
    format_list,
)
from .fs import (
    IOV_MAX,
    is_fuse,
    start_writing_back,
)

if TYPE_CHECKING:  # NumPy, which most of what reads files does without
    from .vectored_io import IOVec

_SPARE_HANDLES = 64  # for the rest of the program
_MOST_HANDLES = 4096
_TICK_NS = 10_000_000  # Linux stamps files 100 to 1000 times a second
_TOO_MANY = (errno.EMFILE, errno.ENFILE)


class LocalFolder:
    """A local folder, or a single file, as formats read it.

    Args:
        path: the folder or the file.
        names: the files of the folder; by default all that exist. With names the folder is not
            listed, so files that other processes add and remove do not matter.
    """

    def __init__(self, path: str | os.PathLike[str], names: Iterable[str] | None = None) -> None:
        at = Path(path)
        try:
            is_folder = stat.S_ISDIR(at.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"{at} does not exist.") from None
        except OSError as error:
            raise StorageError(f"{at} cannot be read: {error.strerror}.") from error
        self._only = None if is_folder else at.name
        self._base = at if at.is_dir() else at.parent
        self._names = None if names is None else sorted(names)
        self._files: Mapping[str, File] | None = None
        self._not_followed: tuple[str, ...] = ()
        self._handles = Handles(self._base)

    @property
    def root(self) -> str:
        """The folder, as given."""
        return str(self._base)

    def files(self) -> Mapping[str, File]:
        """Return every file below by relative path, without hidden files.

        Links to files are followed, those to folders only where they stay in this one.
        """
        if self._files is None:
            self._files = dict(self._listed())
        return self._files

    def _listed(self) -> Iterator[tuple[str, File]]:
        names = [self._only] if self._only else self._names
        for name in self._walked() if names is None else names:
            try:
                yield name, _settled(self._base, name)
            except NotFoundError:
                if names is not None:
                    raise
                # removed since it was listed

    @property
    def not_followed(self) -> tuple[str, ...]:
        """Links to folders outside this one, which were not followed."""
        self.files()
        return self._not_followed

    def _walked(self) -> list[str]:
        elsewhere = list[str]()
        names = sorted(_walk(self._base, elsewhere.append))
        self._not_followed = tuple(sorted(elsewhere))
        return names

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes of ``path`` from ``offset`` (errors as in ``Folder.read``)."""
        known = self.files().get(path)
        if known is None:
            raise NotFoundError(f"{self.root} has no file {path}.")
        if offset + length > known.num_bytes:  # before allocating what a header claims
            raise _ended(path, known.num_bytes, offset, length)
        buffer = bytearray(length)
        self._handles.read_into(path, offset, memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        """Close the open handles; a later read opens them again."""
        self._handles.close()


class FolderVersions:
    """The versions of all files of a folder that a library reads by itself."""

    def __init__(self, root: str) -> None:
        """Record the current versions."""
        self._root, self._before = root, LocalFolder(root).files()

    def check(self) -> None:
        """Compare them with the current versions.

        Raises:
            FormatError: a file was changed, replaced, added or removed.
        """
        now = LocalFolder(self._root).files()
        changed = [p for p in {**self._before, **now} if self._before.get(p) != now.get(p)]
        if changed:
            raise changed_while_read(self._root, changed)


def _walk(base: Path, leads_away: Callable[[str], None]) -> Iterator[str]:
    """Yield the files below ``base``; ``leads_away`` is called with links to folders elsewhere."""
    root = os.path.join(os.path.realpath(base), "")
    seen = set[tuple[int, int]]()  # folders by identity: a link to a parent would never end
    stack = [base]
    while stack:
        folder = stack.pop()
        try:
            info = folder.stat()
            entries = [] if (info.st_dev, info.st_ino) in seen else list(os.scandir(folder))
        except OSError as error:
            raise StorageError(f"{folder} cannot be listed: {error.strerror}.") from error
        seen.add((info.st_dev, info.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:
                continue  # a link to itself: a reader that needs it fails
            name = Path(entry.path).relative_to(base).as_posix()
            if is_folder and entry.is_symlink() and not _is_below(entry.path, root):
                leads_away(name)
            elif is_folder:
                stack.append(Path(entry.path))
            elif is_file:
                yield name


def _is_below(path: str, root: str) -> bool:
    return os.path.join(os.path.realpath(path), "").startswith(root)


def _stat(base: Path, name: str) -> File:
    try:
        info = (base / name).stat()
    except FileNotFoundError:
        raise NotFoundError(f"{base / name} is missing.") from None
    except OSError as error:
        raise StorageError(f"{base / name} cannot be read: {error.strerror}.") from error
    return version_of(name, info)


def _settled(base: Path, name: str) -> File:
    """Return the version of a file, taken when any later change must change its times.

    Linux timestamps have the resolution of a clock tick, so a second change in the same tick would
    not be visible.
    """
    found = _stat(base, name)
    age = time.time_ns() - found.ctime_ns
    if not 0 <= age < _TICK_NS:
        return found
    time.sleep((_TICK_NS - age) / 1e9)
    return _stat(base, name)


def _ended(path: str, size: int, offset: int, length: int) -> FormatError:
    return FormatError(
        f"{path} ends at byte {size}, but bytes {offset} to {offset + length} are wanted: it is "
        "truncated or was changed meanwhile. Fetch the file again."
    )


def transfer(
    call: Callable[[int, Sequence[memoryview], int], int],
    descriptor: int,
    offset: int,
    views: Sequence[memoryview],
) -> int:
    """Read or write ``views`` in order from byte ``offset``, and return the number of bytes.

    ``call`` is ``os.preadv`` or ``os.pwritev``, which may do less than requested. Fewer bytes than
    ``views`` have are returned only where the file ends first.
    """
    total = 0
    for first in range(0, len(views), IOV_MAX):
        some = views if len(views) <= IOV_MAX else views[first : first + IOV_MAX]
        left = sum(map(len, some))
        while left:
            done = call(descriptor, some, offset + total)
            if not done:
                return total
            total += done
            left -= done
            if left:
                some = list(_rest(some, done))
    return total


def _rest(views: Sequence[memoryview], done: int) -> Iterator[memoryview]:
    """The views after the first ``done`` bytes."""
    for view in views:
        if done < len(view):
            yield view[done:]
        done = max(0, done - len(view))


class _Use:
    """A descriptor in use, for a ``with`` block; OS errors inside are raised as ``StorageError``.

    A class, because a generator would cost as much as the system call.
    """

    __slots__ = ("_handles", "_held", "_offset", "_path")

    def __init__(self, handles: Handles, held: list[int], path: str, offset: int | None) -> None:
        self._handles, self._held, self._path, self._offset = handles, held, path, offset

    def __enter__(self) -> int:
        return self._held[0]

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._handles.lock:
            self._held[1] -= 1
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise self._handles.error(self._path, self._offset, error) from error


class Handles:
    """Cache of open file descriptors below one folder, with a bounded size.

    Safe to use from several threads.
    """

    def __init__(
        self,
        base: Path,
        flags: int = os.O_RDONLY,
        most: int | None = None,
        versions: Versions | None = None,
    ) -> None:
        """Open files below ``base`` with ``flags``, at most ``most`` at a time.

        Each file that is opened must be the one that ``versions`` expects.
        """
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = most or max(8, min(_MOST_HANDLES, soft - _SPARE_HANDLES) // 2)
        self._base, self._flags = base, flags | os.O_CLOEXEC | os.O_NONBLOCK  # no pipe hangs
        self._versions = versions
        self._open: OrderedDict[str, list[int]] = OrderedDict()  # path -> [descriptor, users]
        self.lock = threading.Lock()

    def use(self, path: str, offset: int | None = None) -> _Use:
        """Return a descriptor of ``path``, kept open at least until the ``with`` block ends.

        OS errors inside the block become ``StorageError``, with ``offset`` in the message.
        """
        with self.lock:
            held = self._open.get(path)
            if held is None:
                self._make_room()
                held = self._open[path] = [self._open_file(path), 0]
            held[1] += 1
            self._open.move_to_end(path)
        return _Use(self, held, path, offset)

    def error(self, path: str, offset: int | None, error: OSError) -> StorageError:
        """Return the error for a system call on ``path`` that failed."""
        at = "" if offset is None else f" at byte {offset}"
        if self._flags & (os.O_WRONLY | os.O_RDWR):
            what = f"cannot be written{at}: {error.strerror}. {MEND_THE_DISK}"
        else:
            what = f"cannot be read{at}: {error.strerror}."
        return StorageError(f"{self._base / path} {what}")

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of ``path``.

        Raises:
            FormatError: the file ends first.
            StorageError: the disk fails.
        """
        self.read_views(path, offset, (buffer,))

    def read_views(self, path: str, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views`` one after the other from byte ``offset`` of ``path``.

        Raises:
            FormatError, StorageError: as ``read_into``.
        """
        num_bytes = sum(map(len, views))
        with self.use(path, offset) as descriptor:
            if transfer(os.preadv, descriptor, offset, views) < num_bytes:
                raise _ended(path, os.fstat(descriptor).st_size, offset, num_bytes)

    def read_rows(self, path: str, offsets: Sequence[int], buffer: memoryview) -> None:
        """Fill equal parts of ``buffer``, each from one of ``offsets`` of ``path``.

        Raises:
            FormatError, StorageError: as ``read_into``.
        """
        width, at = len(buffer) // max(1, len(offsets)), 0
        read = os.preadv
        with self.use(path) as descriptor:
            for offset in offsets:
                row = buffer[at : at + width]
                at += width
                if read(descriptor, (row,), offset) < width:
                    self.read_into(path, offset, row)

    def read_scattered(self, path: str, offset: int, memory: IOVec) -> None:
        """Fill ``memory`` from byte ``offset`` of ``path``.

        Raises:
            FormatError, StorageError: as ``read_into``.
        """
        with self.use(path, offset) as descriptor:
            if memory.fill(descriptor, offset) < memory.num_bytes:
                raise _ended(path, os.fstat(descriptor).st_size, offset, memory.num_bytes)

    def write(self, path: str, offset: int, buffer: memoryview) -> None:
        """Write all of ``buffer`` at byte ``offset`` of ``path``.

        Raises:
            StorageError: the disk is full or fails.
        """
        self.write_views(path, offset, (buffer,))

    def write_views(self, path: str, offset: int, views: Sequence[memoryview]) -> None:
        """Write ``views`` one after the other at byte ``offset`` of ``path``.

        Raises:
            StorageError: the disk is full or fails.
        """
        with self.use(path, offset) as descriptor:
            if transfer(os.pwritev, descriptor, offset, views) < sum(map(len, views)):
                raise OSError(errno.EIO, "nothing was written")

    def start_writing_back(self, path: str) -> None:
        """Start writing ``path`` to the disk, without waiting."""
        with self.use(path) as descriptor:
            start_writing_back(descriptor)

    def sync(self, path: str) -> None:
        """Wait until ``path`` is on the disk.

        Raises:
            StorageError: the disk is full or fails.
        """
        with self.use(path) as descriptor:
            os.fsync(descriptor)

    def close(self) -> None:
        """Close every descriptor that is not in use."""
        with self.lock:
            for path in [p for p, (_, users) in self._open.items() if not users]:
                os.close(self._open.pop(path)[0])

    def _make_room(self) -> None:
        while len(self._open) >= self._most and self._close_idle():
            pass

    def _close_idle(self) -> bool:
        """Close the least recently used idle descriptor; return whether there was one."""
        idle = next((p for p, (_, users) in self._open.items() if not users), None)
        if idle is None:
            return False
        os.close(self._open.pop(idle)[0])
        return True

    def _open_file(self, path: str) -> int:
        descriptor = self._descriptor(path)
        if self._versions is not None:
            try:
                self._versions.opened(path, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    def _descriptor(self, path: str) -> int:
        try:
            while True:
                try:
                    return os.open(self._base / path, self._flags)
                except OSError as error:  # the limit is for the whole process, or was lowered
                    if error.errno not in _TOO_MANY or not self._close_idle():
                        raise
        except FileNotFoundError:
            raise NotFoundError(f"{self._base / path} does not exist (any more).") from None
        except OSError as error:
            raise StorageError(
                f"{self._base / path} cannot be opened: {error.strerror}."
            ) from error

    def __del__(self) -> None:
        self.close()


# --- Versions of files, which detect changes during a read


def version_of(path: str, info: os.stat_result) -> File:
    """Return the file at ``path`` in the state that ``info`` describes."""
    return File(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)


class Versions:
    """The versions of the files below one folder that were opened. Safe to use from threads."""

    def __init__(self, root: str | os.PathLike[str], files: Iterable[File] = ()) -> None:
        """Expect ``files`` in the state that they describe; one without times in any state."""
        self._root = Path(root)
        self._expected = {f.path: f for f in files if f.mtime_ns}
        self._opened: dict[str, File] = {}
        self._lock = threading.Lock()

    def opened(self, path: str, descriptor: int) -> None:
        """Note that ``path`` was opened as ``descriptor``.

        Raises:
            FormatError: it is not the version that is expected, or that was opened before.
        """
        now = version_of(path, os.fstat(descriptor))
        with self._lock:
            before = self._opened.setdefault(path, self._expected.get(path, now))
        if not self._is_same(before, now):
            raise changed_while_read(self._root, [path])

    def check(self) -> None:
        """Compare every file that was opened with its present version.

        Raises:
            FormatError: a file was changed, replaced or removed.
        """
        with self._lock:
            opened = list(self._opened.values())
        changed = [before.path for before in opened if not self._is_current(before)]
        if changed:
            raise changed_while_read(self._root, changed)

    def _is_current(self, before: File) -> bool:
        try:
            info = os.stat(self._root / before.path)
        except OSError:
            return False
        return self._is_same(before, version_of(before.path, info))

    def _is_same(self, before: File, now: File) -> bool:
        if before == now:
            return True
        if replace(before, inode=0) != replace(now, inode=0):
            return False
        # of all systems, those in user space give a file another inode when it is looked up again
        return is_fuse(self._root / now.path)


def changed_while_read(root: str | Path, paths: Iterable[str]) -> FormatError:
    """Return the error that names ``paths`` below ``root``."""
    return FormatError(
        f"{format_list(paths)} of {root} changed while being read. Try again when nothing writes "
        "there."
    )
