"""The share of one rank in NumPy arrays is what its file would hold."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import safetensors.numpy

import jaxshard as js
from jaxshard.errors import LayoutError


@pytest.fixture
def llama(tmp_path):
    checkpoints.write_llama(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_is_loaded_as_its_file_is_written(llama, tmp_path, rank):
    js.slice(llama, tmp_path / "cut", "dp1mp2pp2", rank=rank, fsync=False)
    (path,) = (tmp_path / "cut").rglob("*.safetensors")
    written, loaded = safetensors.numpy.load_file(path), js.load_rank(llama, "dp1mp2pp2", rank)
    assert loaded.keys() == written.keys()
    assert all(np.array_equal(loaded[name], array) for name, array in written.items())


def test_a_complete_checkpoint_has_rank_0_only(llama):
    assert js.load_rank(llama, "full").keys() == js.open(llama).tensors.keys()
    with pytest.raises(LayoutError, match="there is rank 0 only"):
        js.load_rank(llama, "full", 1)


def test_the_arrays_do_not_depend_on_threads_and_memory(llama):
    plain = js.load_rank(llama, "mp2", 1)
    small = js.load_rank(llama, "mp2", 1, workers=1, host_bytes=1 << 19)
    assert all(np.array_equal(plain[name], array) for name, array in small.items())
