"""Requests: what lies apart in a file is read exactly, at little cost a row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from ends import From, Into

import jaxshard as js
from jaxshard.core.box import Box
from jaxshard.core.catalog import StoredShard, Tensor
from jaxshard.core.dtypes import BY_NAME
from jaxshard.errors import FormatError, StorageError
from jaxshard.planning.copies import move_into
from jaxshard.storage import engine
from jaxshard.storage.local import Handles
from jaxshard.storage.resources import Budget


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A weight whose columns, cut in four, lie too far apart to be read as one."""
    folder = tmp_path_factory.mktemp("wide")
    values = np.random.default_rng(0).integers(0, 100, (64, 8192)).astype(np.float32)
    config = {"model_type": "llama", "num_hidden_layers": 1}
    name = "model.layers.0.mlp.down_proj.weight"
    checkpoints.write_folder(folder, {name: values}, config=config)
    return folder, values


def test_the_columns_of_one_rank_are_read_exactly_and_not_one_call_a_row(wide, monkeypatch):
    folder, values = wide
    calls, real = [], Handles.use
    monkeypatch.setattr(Handles, "use", lambda *given: calls.append(given) or real(*given))
    planned = js.plan(folder, "mp4", rank=[2]).totals
    calls.clear()
    (share,) = js.load_rank(folder, "mp4", 2).values()
    assert np.array_equal(share, values[:, 4096:6144])
    assert planned.bytes_read == share.nbytes
    assert planned.num_reads == 64
    assert len(calls) < 16  # it was one for each row


def test_rows_are_filled_from_where_they_lie(tmp_path):
    data = os.urandom(10_000)
    (tmp_path / "f").write_bytes(data)
    handles, out = Handles(tmp_path), bytearray(300)
    handles.read_rows("f", [9000, 0, 5000], memoryview(out))
    assert bytes(out) == data[9000:9100] + data[:100] + data[5000:5100]
    with pytest.raises(FormatError, match="ends at byte 10000"):
        handles.read_rows("f", [0, 9950, 5000], memoryview(out))


def test_a_kernel_that_does_half_is_asked_again_and_one_that_refuses_is_told(tmp_path, monkeypatch):
    data = os.urandom(1000)
    (tmp_path / "f").write_bytes(data)
    handles, out, real = Handles(tmp_path), bytearray(200), os.preadv

    def half(descriptor: int, views: Any, offset: int) -> int:
        return real(descriptor, [views[0][: max(1, len(views[0]) // 2)]], offset)

    monkeypatch.setattr(os, "preadv", half)
    handles.read_rows("f", [500, 100], memoryview(out))
    assert bytes(out) == data[500:600] + data[100:200]

    def refusing(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", refusing)
    with pytest.raises(StorageError, match="Input/output error"):
        handles.read_rows("f", [0, 100], memoryview(out))


def test_what_is_lent_is_copied_at_once_and_counted_as_if_it_were_read():
    values = np.arange(64 * 8192, dtype=np.uint8).reshape(64, 8192)
    whole, part = Box((0, 0), (64, 8192)), Box((0, 100), (64, 2100))
    tensor = Tensor("t", BY_NAME["U8"], (64, 8192), (StoredShard(0, 0, whole),))
    out, lent = np.zeros((64, 2000), np.uint8), []

    def lend(piece: StoredShard, offset: int, num_bytes: int) -> memoryview:
        lent.append(num_bytes)
        return values.reshape(-1)[offset : offset + num_bytes].data

    def read(piece: StoredShard, offset: int, buffer: memoryview) -> None:
        np.frombuffer(buffer, np.uint8)[...] = values.reshape(-1)[offset : offset + len(buffer)]

    def write(move: Any, target: int, offset: int, buffer: memoryview) -> int:
        out.reshape(-1)[offset : offset + len(buffer)] = np.frombuffer(buffer, np.uint8)
        return 1

    moves, budget = [move_into(tensor, {part: (0,)})], Budget(1, 1 << 20)
    by_reading = engine.run(moves, From(read), Into(write), budget=budget)
    assert np.array_equal(out, values[:, 100:2100])
    out[:] = 0
    source = From(lambda *_: pytest.fail("read"), lend)
    by_lending = engine.run(moves, source, Into(write), budget=budget)
    assert np.array_equal(out, values[:, 100:2100])
    assert by_lending == by_reading
    assert len(lent) < 4
