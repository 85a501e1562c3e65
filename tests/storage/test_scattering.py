"""Scattering: blocks that targets share by columns are read into their memory, without a copy."""

from __future__ import annotations

import os
from itertools import pairwise

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import safetensors.numpy
from ends import From, Into
from hypothesis import given, settings

from jaxshard.core.box import Box
from jaxshard.core.catalog import StoredShard, Tensor
from jaxshard.core.dtypes import dtype
from jaxshard.errors import FormatError
from jaxshard.loader import load
from jaxshard.planning.copies import block_steps, cell_blocks, move_into
from jaxshard.storage import engine, vectored_io
from jaxshard.storage.local import Handles
from jaxshard.storage.resources import Budget
from jaxshard.storage.vectored_io import scatter_of


def move(shape: tuple[int, ...], targets: list[Box], offset: int = 0):
    """A tensor of a file, and the boxes that are wanted of it."""
    tensor = Tensor("t", dtype("U8"), shape, (StoredShard(0, offset, Box.whole(shape)),))
    return move_into(tensor, {box: (number,) for number, box in enumerate(targets)})


def scatters(wanted, block_bytes: int = 1 << 20) -> list:
    return [
        scatter_of(wanted, block_steps(cell, block, wanted.sources, wanted.forms))
        for cell in wanted.cells
        for block in cell_blocks(cell, wanted.forms, 1, block_bytes)
    ]


def test_columns_are_one_request_a_block():
    wide = 8 * 1024
    columns = [Box((0, at), (6, at + wide // 4)) for at in range(0, wide, wide // 4)]
    first, second = scatters(move((6, wide), columns, offset=5), block_bytes=4 * wide)
    assert (first.runs.offset, first.runs.num_bytes, first.num_rows) == (5, 4 * wide, 4)
    assert first.parts == tuple((n, 0, wide // 4) for n in range(4))
    assert (second.runs.offset, second.num_rows) == (5 + 4 * wide, 2)
    assert second.parts == tuple((n, wide, wide // 4) for n in range(4))


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        ((4, 4096), [Box((0, 0), (4, 4096))]),  # whole rows: nothing to scatter
        ((4, 4096), [Box((0, 0), (4, 2048)), Box((0, 2048), (4, 3072))]),  # a gap at the end
        ((4, 4096), [Box((0, 0), (4, 4096)), Box((0, 0), (4, 4096 // 2))]),  # one twice
        ((4, 1600), [Box((0, 0), (4, 800)), Box((0, 800), (4, 1600))]),  # rows too short
    ],
)
def test_other_blocks_are_left_to_the_engine(shape, targets):
    assert not any(scatters(move(shape, targets)))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_cut_fills_its_targets(data, tmp_path_factory):
    """Against NumPy's slices: any number of dims, cuts and block sizes, also without scattering."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    at = sorted({0, shape[dim], *data.draw(st.lists(st.integers(0, shape[dim]), max_size=3))})
    targets = [
        Box(
            tuple(a if d == dim else 0 for d in range(len(shape))),
            tuple(b if d == dim else n for d, n in enumerate(shape)),
        )
        for a, b in pairwise(at)
    ]
    values = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    folder = tmp_path_factory.mktemp("cut")
    (folder / "f").write_bytes(b"head" + values.tobytes())
    handles, memory = Handles(folder), [np.zeros(box.size, np.uint8) for box in targets]
    calls: list[int] = []

    def scatter(piece, offset, places):
        calls.append(1)
        handles.read_scattered("f", offset, places)

    wanted = move(shape, targets, offset=4)
    before, vectored_io._LEAST_BYTES = vectored_io._LEAST_BYTES, 1
    try:
        expected = sum(found is not None for found in scatters(wanted, block_bytes=1 << 20))
        block_bytes = data.draw(st.sampled_from([1, 4, 16, 1 << 20]))
        scattered = data.draw(st.booleans())
        counts = engine.run(
            [wanted],
            From(
                lambda piece, offset, buffer: handles.read_into("f", offset, buffer),
                scatter=scatter if scattered else None,
            ),
            Into(place=lambda move, target, offset, n: memory[target][offset : offset + n].data),
            budget=Budget(1, block_bytes),
        )
    finally:
        vectored_io._LEAST_BYTES = before
    for box, got in zip(targets, memory, strict=True):
        assert np.array_equal(got.reshape(box.shape), values[box.slices])
    assert counts.bytes_read == counts.bytes_written == values.nbytes
    assert len(calls) == expected * scattered or block_bytes < 1 << 20


@pytest.fixture(scope="module")
def weight(tmp_path_factory):
    """A matrix in a file, of rows that four devices share, each four kilobytes of them."""
    folder = tmp_path_factory.mktemp("weight")
    values = np.random.default_rng(0).standard_normal((600, 4096), np.float32)
    safetensors.numpy.save_file({"w": values}, folder / "model.safetensors")
    return folder, values


def sharding():
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))


def test_a_load_reads_columns_with_few_requests_and_every_byte_once(weight, monkeypatch):
    folder, values = weight
    asked, real = [], Handles.read_scattered

    def read(self, path, offset, places):
        asked.append(places.num_bytes)
        real(self, path, offset, places)

    monkeypatch.setattr(Handles, "read_scattered", read)
    counts: list = []
    (array,) = load(folder, sharding(), counted=counts.append).values()
    assert np.array_equal(array, values)
    assert sum(asked) == counts[0].bytes_read == values.nbytes
    assert len(asked) == counts[0].num_reads == 2  # eight megabytes, and the rest


def test_a_file_that_shrinks_meanwhile_is_an_error(weight, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes((weight[0] / "model.safetensors").read_bytes())
    real = Handles.read_scattered

    def read(self, name, offset, places):
        os.truncate(path, 9_000_000)
        real(self, name, offset, places)

    monkeypatch.setattr(Handles, "read_scattered", read)
    with pytest.raises(FormatError, match="ends at byte 9000000"):
        load(tmp_path, sharding())
