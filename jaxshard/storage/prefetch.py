"""Readahead hints to the kernel.

Telling it with ``fadvise`` has the kernel make a page for every 4 KiB, which is most of what a
cold load then costs. A file's own readahead makes pages of up to 2 MiB, larger ones each time
it is found right. It goes on whenever the first page of what it fetched last is asked for,
even by a reader that will not wait (``RWF_NOWAIT``). So a long run of bytes is asked for a byte
here and there, ahead of the disk, and what that should have missed is told the other way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

_TOLD_BYTES = 1 << 20  # what every device seen takes at once; slower in smaller portions
# Up to so many bytes after the start of a run, how far apart it is asked for: a readahead that
# begins is small, and the first page of one may be a small one until they lie evenly.
_RAMP = ((64 << 10, 4 << 10), (512 << 10, 16 << 10), (8 << 20, 64 << 10))
_STEP_BYTES = 1 << 20
_READAHEADS = ("/sys/class/bdi/{}", "/sys/dev/block/{}/../queue")  # of a file system, a disk
_WINDOWS = 2  # how many readaheads are under way where the first page of one is asked for


def is_cached(descriptor: int, offset: int) -> bool:
    """Whether the byte at ``offset`` is in the page cache; True where nobody can say."""
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return True
    return True


def begin_reading(
    descriptor: int, offset: int, num_bytes: int, *, before: int = 0, ends: bool = True
) -> None:
    """Have the disk fetch these bytes into the page cache; nobody waits for them.

    Args:
        descriptor: of the file, and for nothing else: its readahead is that of one reader.
        offset: the first byte.
        num_bytes: how many.
        before: the bytes just before ``offset`` that were asked for likewise.
        ends: whether what follows is not wanted; then little beyond the end is fetched.
    """
    stop = offset + num_bytes
    with suppress(OSError):
        _go_along(descriptor, offset, before, stop, ends=ends)
    with suppress(OSError, AttributeError):
        for at in range(offset, stop, _TOLD_BYTES):
            length = min(_TOLD_BYTES, stop - at)
            os.posix_fadvise(descriptor, at, length, os.POSIX_FADV_WILLNEED)


def _go_along(descriptor: int, offset: int, before: int, stop: int, *, ends: bool) -> None:
    """Have the file's own readahead fetch what it can of these bytes without going far beyond."""
    info = os.fstat(descriptor)
    window = _window_bytes(info.st_dev)
    if window < _STEP_BYTES:
        return
    if ends and stop < info.st_size:
        stop -= _WINDOWS * window
    for at in _marks(offset, before, stop):
        is_cached(descriptor, at)  # asked for, and not waited for


def _marks(offset: int, before: int, stop: int) -> Iterator[int]:
    """Where a run that began ``before`` bytes ahead of ``offset`` is asked for."""
    start = offset - before
    at = offset
    for until, step in _RAMP:
        end = min(start + until, stop)
        yield from range(at, end, step)
        at = max(at, end)
    yield from range(at, stop, _STEP_BYTES)


@cache
def _window_bytes(device: int) -> int:
    """How much a file's own readahead on this device fetches at once; 0 if nobody can say."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for place in _READAHEADS:
        with suppress(OSError, ValueError):
            return int(Path(place.format(number), "read_ahead_kb").read_text()) << 10
    return 0
