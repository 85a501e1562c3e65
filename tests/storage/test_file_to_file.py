"""Requests of many views: short answers, many of them, files that end; and what streams take."""

from __future__ import annotations

import os
import subprocess
import sys

import checkpoints
import numpy as np
import pytest

import jaxshard as js
from jaxshard.core.box import Box
from jaxshard.errors import FormatError
from jaxshard.planning.copies import cells
from jaxshard.storage import (
    file_to_file,
    fs,
    local,
)
from jaxshard.storage.local import Handles

NUM = 3000  # more views than the kernel takes at once


@pytest.fixture
def data():
    return np.random.default_rng(0).integers(0, 256, NUM * 8, np.uint8).tobytes()


@pytest.fixture
def short(monkeypatch):
    """A kernel that does only a part of what it is asked, as a signal may make it."""
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)

        def half(descriptor, views, offset, real=real):
            some = list(views)[: max(1, len(views) // 2)]
            some[-1] = some[-1][: max(1, len(some[-1]) // 2)]
            return real(descriptor, some, offset)

        monkeypatch.setattr(local.os, name, half)


@pytest.mark.parametrize("kernel", ["whole", "short"])
def test_every_other_run_of_memory_is_filled_and_stored(data, tmp_path, request, kernel):
    if kernel == "short":
        request.getfixturevalue("short")
    (tmp_path / "in").write_bytes(b"..." + data)
    memory = memoryview(bytearray(NUM * 16))
    views = [memory[i * 16 : i * 16 + 8] for i in range(NUM)]
    Handles(tmp_path).read_views("in", 3, views)
    assert b"".join(views) == data
    assert not any(b"".join(memory[i * 16 + 8 : i * 16 + 16] for i in range(NUM)))
    (tmp_path / "out").write_bytes(b"")
    Handles(tmp_path, os.O_WRONLY).write_views("out", 5, views)
    assert (tmp_path / "out").read_bytes() == bytes(5) + data


def test_a_file_that_ends_within_the_views_is_refused_with_its_size(data, tmp_path):
    (tmp_path / "in").write_bytes(data[:-1])
    memory = memoryview(bytearray(len(data)))
    with pytest.raises(FormatError, match=f"in ends at byte {len(data) - 1}"):
        Handles(tmp_path).read_views("in", 0, [memory[i : i + 8] for i in range(0, len(data), 8)])


WHOLE = Box((0, 0), (64, 1024))
HALVES = (Box((0, 0), (64, 512)), Box((0, 512), (64, 1024)))
SLIVERS = tuple(Box((0, i), (64, i + 64)) for i in range(0, 1024, 64))  # rows of 256 bytes


@pytest.mark.parametrize(
    ("sources", "targets", "is_stream"),
    [
        ((WHOLE,), HALVES, True),
        (HALVES, (WHOLE,), True),
        ((WHOLE,), SLIVERS, False),  # NumPy copies short rows faster
        ((WHOLE,), HALVES[:1], False),  # gaps in what is read
        ((Box((), ()),), (Box((), ()),), False),
    ],
)
def test_streams_take_long_rows_without_gaps(sources, targets, is_stream):
    (cell,) = cells(sources, targets)
    assert (file_to_file.striped(cell, sources, targets, 4, 1 << 20) is not None) == is_stream


def test_a_conversion_that_streams_needs_no_numpy_and_one_that_does_not_still_works(tmp_path):
    arrays = checkpoints.write_llama(tmp_path / "wide", layers=1, hidden=2048, vocab=64)
    code = (
        "import sys; from jaxshard.cli import main; "
        "status = main(['slice', *sys.argv[1:], '--to', 'mp2', '--no-fsync', '--quiet']); "
        "print(status, 'numpy' in sys.modules)"
    )
    for source, is_needed in (("wide", "0 False"), ("thin", "0 True")):
        if source == "thin":
            arrays = checkpoints.write_llama(tmp_path / source, layers=1, hidden=16, vocab=64)
        cut, whole = tmp_path / f"{source}.cut", tmp_path / f"{source}.whole"
        command = [sys.executable, "-c", code, tmp_path / source, cut]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == is_needed
        js.merge(cut, whole, fsync=False)
        assert not js.verify(whole, tmp_path / source).problems
        assert len(js.open(whole).tensors) == len(arrays)


@pytest.mark.parametrize("is_offered", [True, False])
def test_room_is_reserved_or_the_file_is_only_made_long(tmp_path, monkeypatch, is_offered):
    if not is_offered:
        monkeypatch.setattr(fs, "_function", lambda name: None)
    with open(tmp_path / "file", "wb") as file:
        fs.reserve(file.fileno(), 1 << 20)
        fs.start_writing_back(file.fileno())
    info = (tmp_path / "file").stat()
    assert info.st_size == 1 << 20
    assert is_offered or info.st_blocks == 0
