"""Loading from every format, and what is checked of the files that are read."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxshard.api import convert
from jaxshard.conversion.open import open_checkpoint
from jaxshard.errors import FormatError
from jaxshard.loader import load
from jaxshard.storage.readers import SourceFiles

P = PartitionSpec


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, checkpoints.write_llama(folder, layers=4, num_files=2)


def check(arrays: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    assert set(arrays) == set(expected)
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype, name
        assert np.asarray(array).tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize(
    ("to", "how"),
    [
        ("full", {"format": "ckpt", "crc": True}),
        ("full", {"format": "ckpt"}),
        ("full", {"format": "unified", "max_shard_size": 4096}),
        ("full", {"format": "iteration"}),
        ("full", {"format": "orbax"}),
        ("dp2mp2pp2", {"format": "iteration"}),
        ("mp2pp2", {"format": "ckpt"}),
        ("dp2mp2", {"format": "ranks"}),
    ],
)
def test_every_format_that_is_written_is_loaded(llama, tmp_path, to, how):
    folder, expected = llama
    convert(folder, tmp_path / "there", to, **how)
    catalog = open_checkpoint(tmp_path / "there")
    check(load(catalog, "dp2mp4"), expected)


def test_a_weight_file_alone_is_a_checkpoint(llama, tmp_path):
    folder, expected = llama
    convert(folder, tmp_path / "one", max_shard_size=1 << 30)
    check(load(tmp_path / "one" / "model.safetensors", "mp4"), expected)
    convert(folder, tmp_path / "ckpt", format="ckpt")
    check(load(tmp_path / "ckpt" / "model.ckpt", "mp4"), expected)


# --- checksums --------------------------------------------------------------------------


def damage(path: Path, value: np.ndarray) -> None:
    """Change one byte of ``value`` in the file: no header can tell."""
    data = bytearray(path.read_bytes())
    at = bytes(data).index(value.tobytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_file_with_a_checksum_is_refused(llama, tmp_path):
    folder, expected = llama
    convert(folder, tmp_path / "there", format="ckpt", crc=True)
    damage(tmp_path / "there" / "model.ckpt", expected["lm_head.weight"])
    with pytest.raises(FormatError, match=r"model\.ckpt: the bytes have crc32"):
        load(tmp_path / "there", "mp2")


def test_only_files_that_are_read_are_checked_and_each_once(llama, tmp_path, monkeypatch):
    folder, expected = llama
    convert(folder, tmp_path / "there", "pp2", format="ckpt", crc=True)
    name = "model.layers.3.self_attn.q_proj.weight"
    (last,) = (tmp_path / "there" / "rank_1").glob("*.ckpt")
    damage(last, expected[name])
    seen = []
    at = SourceFiles._at
    monkeypatch.setattr(SourceFiles, "_at", lambda self, path: seen.append(path) or at(self, path))
    here = NamedSharding(jax.make_mesh((8,), ("x",)), P())
    arrays = load(tmp_path / "there", here, include=[r"layers\.[01]\."])
    assert len(arrays) == 18
    assert [path.split("/")[0] for path in seen] == ["rank_0"]
    with pytest.raises(FormatError, match="have crc32"):
        load(tmp_path / "there", here, include=[r"layers\.3\."])
