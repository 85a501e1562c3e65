"""Plain sequential reads of a folder's weight files: what the machine can do, at its best.

Which way is best depends on the disk and on what is between; so all of them are tried, and
whoever compares takes the fastest.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

_PIECE = 64 << 20  # what each of several threads takes at a time


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def buffered(folder: Path, block_bytes: int, advice: int | None = None) -> None:
    """``read`` into one buffer, through the page cache."""
    buffer = bytearray(block_bytes)
    for path in _files(folder):
        with open(path, "rb", buffering=0) as file:
            if advice is not None:
                os.posix_fadvise(file.fileno(), 0, 0, advice)
            while file.readinto(buffer):
                pass


def direct(folder: Path, block_bytes: int) -> None:
    """``read`` past the page cache.

    Raises:
        OSError: the file system has no such way.
    """
    buffer = mmap.mmap(-1, block_bytes)  # on a page, as the disk wants it
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            at = 0
            while (done := os.preadv(descriptor, [buffer], at)) == block_bytes:
                at += done
        finally:
            os.close(descriptor)


def mapped(folder: Path) -> None:
    """Touch every page of a mapping."""
    for path in _files(folder):
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        memory.madvise(mmap.MADV_SEQUENTIAL)
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE].sum()


def in_threads(folder: Path, num_threads: int) -> None:
    """Several threads, each with a piece of a file at a time."""

    def read(path: Path, start: int) -> None:
        buffer, at = bytearray(1 << 20), start
        with open(path, "rb", buffering=0) as file:
            while at < start + _PIECE and (done := os.preadv(file.fileno(), [buffer], at)):
                at += done

    with ThreadPoolExecutor(num_threads) as pool:
        for path in _files(folder):
            for start in range(0, path.stat().st_size, _PIECE):
                pool.submit(read, path, start)


WAYS: Mapping[str, Callable[[Path], None]] = {
    "read, 8 MiB blocks": partial(buffered, block_bytes=8 << 20),
    "read, 1 MiB blocks": partial(buffered, block_bytes=1 << 20),
    "read, told ahead (WILLNEED)": partial(
        buffered, block_bytes=8 << 20, advice=os.POSIX_FADV_WILLNEED
    ),
    "read past the cache (O_DIRECT)": partial(direct, block_bytes=8 << 20),
    "mapped, every page touched": mapped,
    "read by 2 threads": partial(in_threads, num_threads=2),
    "read by 8 threads": partial(in_threads, num_threads=8),
}

SEVERAL_READERS = {"read by 2 threads", "read by 8 threads"}
"""Those that go through a file at several places at a time."""
