"""Local files: listing, reading and a bounded set of descriptors.

Everything above asks for (file, offset, length); this module knows nothing of
tensors or formats.
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
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.catalog import File
from ..errors import MEND_THE_DISK, FormatError, NotFoundError, StorageError
from .linux import start_writing_back
from .versions import Versions, changed_while_read, version_of

if TYPE_CHECKING:  # NumPy, which most of what reads files does without
    from .vectored_io import Places

_SPARE_HANDLES = 64  # left for the rest of the program
_MOST_HANDLES = 4096
_MOST_VECTORS = 1024  # IOV_MAX of Linux
_TICK_NS = 10_000_000  # Linux stamps files 100 to 1000 times a second
_TOO_MANY = (errno.EMFILE, errno.ENFILE)


class LocalFolder:
    """A folder on a disk of this machine, or one file alone, as a format sees it.

    Args:
        path: the folder or the file.
        names: the files in it that count; by default all that are there. The folder is not listed
            then, so it does not matter what other processes add and remove there.
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
        """Every file below, by relative path; hidden ones are left out.

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
                # it was listed, and has gone since: it is no file of this folder

    @property
    def not_followed(self) -> tuple[str, ...]:
        """Links to folders that are not in this one, which were passed by."""
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
    """All files of a folder whose library reads them itself: they must not change meanwhile."""

    def __init__(self, root: str) -> None:
        """Take the present versions."""
        self._root, self._before = root, LocalFolder(root).files()

    def check(self) -> None:
        """Compare them with the versions of now.

        Raises:
            FormatError: a file was changed, replaced, added or removed.
        """
        now = LocalFolder(self._root).files()
        changed = [p for p in {**self._before, **now} if self._before.get(p) != now.get(p)]
        if changed:
            raise changed_while_read(self._root, changed)


def _walk(base: Path, leads_away: Callable[[str], None]) -> Iterator[str]:
    """The files below ``base``; ``leads_away`` is told of links to folders that are not."""
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
                continue  # a link to itself: whoever needs it will miss it
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
    """The version of a file, taken when its times can no longer stay as they are if it changes.

    Linux stamps files with a clock that stands still for a tick: a second change within the
    tick of the first would leave no trace.
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


def _requests(views: Sequence[memoryview]) -> Iterator[Sequence[memoryview]]:
    """``views`` in groups that the kernel takes at once."""
    if len(views) <= _MOST_VECTORS:
        yield views
        return
    for at in range(0, len(views), _MOST_VECTORS):
        yield views[at : at + _MOST_VECTORS]


def _left(views: Sequence[memoryview], done: int) -> Iterator[tuple[memoryview, int]]:
    """The views that a request of ``done`` bytes did not finish, and how much of each it did."""
    for view in views:
        if done < len(view):
            yield view, done
        done = max(0, done - len(view))


class _Use:
    """A descriptor in use; a generator would cost as much as the call it is for."""

    __slots__ = ("_held", "_lock")

    def __init__(self, held: list[int], lock: threading.Lock) -> None:
        self._held, self._lock = held, lock

    def __enter__(self) -> int:
        return self._held[0]

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._held[1] -= 1


class Handles:
    """Open file descriptors below one folder: kept for reuse, and never too many.

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
        self._lock = threading.Lock()

    def use(self, path: str) -> _Use:
        """A descriptor of ``path``, kept open at least until the ``with`` block ends."""
        with self._lock:
            held = self._open.get(path)
            if held is None:
                self._make_room()
                held = self._open[path] = [self._open_file(path), 0]
            held[1] += 1
            self._open.move_to_end(path)
        return _Use(held, self._lock)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from byte ``offset`` of ``path``; the number of requests it took.

        Raises:
            FormatError: the file ends first.
            StorageError: the disk refused.
        """
        done = requests = 0
        with self.use(path) as descriptor:
            while done < len(buffer):
                try:
                    n = os.preadv(descriptor, [buffer[done:]], offset + done)
                except OSError as error:
                    raise StorageError(
                        f"{self._base / path} cannot be read at byte {offset + done}: "
                        f"{error.strerror}."
                    ) from error
                if not n:
                    size = os.fstat(descriptor).st_size
                    raise _ended(path, size, offset, len(buffer))
                done += n
                requests += 1
        return requests

    def read_rows(self, path: str, offsets: Sequence[int], buffer: memoryview) -> None:
        """Fill equal parts of ``buffer``, each from one of ``offsets`` of ``path``.

        Raises:
            FormatError, StorageError: as ``read_into``.
        """
        share, at = len(buffer) // max(1, len(offsets)), 0
        read = os.preadv
        with self.use(path) as descriptor:
            for offset in offsets:
                row = buffer[at : at + share]
                at += share
                try:
                    done = read(descriptor, (row,), offset)
                except OSError:
                    done = 0  # and again, to be told of it
                if done < share:
                    self.read_into(path, offset + done, row[done:])

    def read_views(self, path: str, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views`` one after the other from byte ``offset`` of ``path``.

        Raises:
            FormatError, StorageError: as ``read_into``.
        """
        if len(views) == 1:
            self.read_into(path, offset, views[0])
            return
        with self.use(path) as descriptor:
            for some in _requests(views):
                want = sum(map(len, some))
                try:
                    done = os.preadv(descriptor, some, offset)
                except OSError as error:
                    raise StorageError(
                        f"{self._base / path} cannot be read at byte {offset}: {error.strerror}."
                    ) from error
                for view, skip in _left(some, done) if done < want else ():
                    self.read_into(path, offset + done, view[skip:])
                    done += len(view) - skip
                offset += want

    def read_places(self, path: str, offset: int, places: Places) -> None:
        """Fill ``places`` one after the other from byte ``offset`` of ``path``.

        Raises:
            FormatError, StorageError: as ``read_into``.
        """
        with self.use(path) as descriptor:
            try:
                done = places.fill(descriptor, offset)
            except OSError as error:
                raise StorageError(
                    f"{self._base / path} cannot be read at byte {offset}: {error.strerror}."
                ) from error
            if done < places.num_bytes:
                raise _ended(path, os.fstat(descriptor).st_size, offset, places.num_bytes)

    def write_views(self, path: str, offset: int, views: Sequence[memoryview]) -> None:
        """Write ``views`` one after the other at byte ``offset`` of ``path``.

        Raises:
            StorageError: the disk is full or refused.
        """
        if len(views) == 1:
            self.write(path, offset, views[0])
            return
        with self.use(path) as descriptor:
            for some in _requests(views):
                want = sum(map(len, some))
                try:
                    done = os.pwritev(descriptor, some, offset)
                except OSError as error:
                    raise StorageError(
                        f"{self._base / path} cannot be written: {error.strerror}. {MEND_THE_DISK}"
                    ) from error
                for view, skip in _left(some, done) if done < want else ():
                    self.write(path, offset + done, view[skip:])
                    done += len(view) - skip
                offset += want

    def write(self, path: str, offset: int, buffer: memoryview) -> None:
        """Write all of ``buffer`` at byte ``offset`` of ``path``.

        Raises:
            StorageError: the disk is full or refused.
        """
        done = 0
        with self.use(path) as descriptor:
            while done < len(buffer):
                try:
                    done += os.pwrite(descriptor, buffer[done:], offset + done)
                except OSError as error:
                    raise StorageError(
                        f"{self._base / path} cannot be written: {error.strerror}. {MEND_THE_DISK}"
                    ) from error

    def start_writing_back(self, path: str) -> None:
        """Have the disk begin with ``path``; nobody waits for it."""
        with self.use(path) as descriptor:
            start_writing_back(descriptor)

    def sync(self, path: str) -> None:
        """Wait until ``path`` is on the disk."""
        with self.use(path) as descriptor:
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise StorageError(
                    f"{self._base / path} cannot be put on the disk: {error.strerror}. "
                    f"{MEND_THE_DISK}"
                ) from error

    def close(self) -> None:
        """Close every descriptor that nobody uses."""
        with self._lock:
            for path in [p for p, (_, users) in self._open.items() if not users]:
                os.close(self._open.pop(path)[0])

    def _make_room(self) -> None:
        while len(self._open) >= self._most and self._close_idle():
            pass

    def _close_idle(self) -> bool:
        """Close the descriptor that was not used for longest; whether there was one."""
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
