"""checksums.json: written by every verb on request, found by verify and load, ignored by others."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from pathlib import Path

import checkpoints
import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import jaxshard as js
from jaxshard.cli import main
from jaxshard.storage import checksums
from jaxshard.storage.checksums import (
    check_files,
    compute_checksums,
    read_checksums,
    to_bytes,
)

RESULTS: dict[str, tuple[str, dict[str, object]]] = {
    "huggingface": ("full", {}),
    "ranks": ("dp1mp2pp2", {}),
    "ranks without redundancy": ("dp2mp2", {"remove_redundancy": True}),
    "ranks of .ckpt": ("dp1mp2", {"format": "ckpt"}),
    "one .ckpt": ("full", {"format": "ckpt", "crc": True}),
    "unified": ("full", {"format": "unified"}),
    "iteration": ("dp1mp2", {"format": "iteration"}),
}


@pytest.fixture
def llama(tmp_path):
    checkpoints.write_llama(tmp_path / "hf", num_files=2)
    return tmp_path / "hf"


def below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "checksums.json")


@pytest.mark.parametrize("result", RESULTS)
def test_every_flipped_bit_of_a_result_with_checksums_is_found(llama, tmp_path, result):
    to, options = RESULTS[result]
    js.convert(llama, tmp_path / "out", to, checksums=True, fsync=False, **options)
    assert not js.verify(tmp_path / "out").problems
    js.load(tmp_path / "out", "dp1mp1", verify=True)
    rng = random.Random(0)
    for path in (p for p in below(tmp_path / "out") if p.suffix in (".safetensors", ".ckpt")):
        if "strategy" in path.name:
            continue
        data = bytearray(path.read_bytes())
        at = rng.randrange(len(data) - 40, len(data) - 20)  # in the last tensor's bytes
        data[at] ^= 1 << rng.randrange(8)
        good, _ = path.read_bytes(), path.write_bytes(data)
        try:
            problems = js.verify(tmp_path / "out").problems
        except js.FormatError as error:  # a .ckpt with a checksum of its own
            problems = (str(error),)
        assert any(path.name in problem for problem in problems)
        with pytest.raises(js.FormatError, match=r"damaged|checksum"):
            js.load(tmp_path / "out", "dp1mp1", verify=True)
        path.write_bytes(good)


def test_a_save_of_arrays_has_checksums_by_an_outside_crc(tmp_path):
    arrays = {"w": np.arange(24, dtype=np.float32).reshape(4, 6)}
    js.save(arrays, tmp_path / "out", checksums=True)
    told = json.loads((tmp_path / "out/checksums.json").read_text())
    data = (tmp_path / "out/model.safetensors").read_bytes()
    ((at, length, value),) = told["files"]["model.safetensors"]["chunks"]
    assert (at, length) == (0, len(data))
    compute = zlib.crc32 if told["algorithm"] == "crc32" else _crc32c
    assert int(value, 16) == compute(data)
    loaded = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    assert np.array_equal(loaded["w"], arrays["w"])


def _crc32c(data: bytes) -> int:
    """CRC-32C bit by bit, by its polynomial (RFC 3720, B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_parts_and_an_interrupted_run_end_with_checksums_of_all_files(llama, tmp_path):
    for index in (0, 1):
        part = {"process_index": index, "process_count": 2}
        js.convert(llama, tmp_path / "out", "dp1mp4", **part, checksums=True)
    assert set(read_checksums(tmp_path / "out").files) == {
        p.relative_to(tmp_path / "out").as_posix() for p in below(tmp_path / "out")
    }


def test_checksums_of_the_source_are_not_carried_into_a_result(llama, tmp_path):
    js.convert(llama, tmp_path / "with", checksums=True)
    js.convert(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "without/checksums.json").exists()
    js.convert(llama, tmp_path / "with", "dp1mp2", overwrite=True)  # it is one of our files
    assert not (tmp_path / "with/checksums.json").exists()


def test_verify_says_which_files_have_no_checksums(llama, capsys):
    verdict = js.verify(llama)
    assert not verdict.problems
    assert any("2 of 2 files have no checksums" in note for note in verdict.notes)
    assert main(["verify", str(llama)]) == 0
    assert "--checksums" in capsys.readouterr().out
    with pytest.raises(js.NotFoundError, match=r"has no checksums\.json"):
        js.load(llama, "dp1mp1", verify=True)


def test_files_of_another_save_are_found(llama, tmp_path):
    js.convert(llama, tmp_path / "out", "dp1mp2", checksums=True)
    shutil.copytree(tmp_path / "out/rank_0", tmp_path / "out/rank_2")
    (tmp_path / "out/rank_0").rename(tmp_path / "elsewhere")
    (name,) = (p.name for p in (tmp_path / "out/rank_1").iterdir())
    shutil.copyfile(next((tmp_path / "out/rank_2").iterdir()), tmp_path / "out/rank_1" / name)
    shutil.rmtree(tmp_path / "out/rank_2")
    (tmp_path / "elsewhere").rename(tmp_path / "out/rank_0")
    assert any("is damaged" in p for p in js.verify(tmp_path / "out").problems)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.update(version=2), "version '2'|version 2"),
        (lambda t: t.update(files=[]), "version"),
        (lambda t: t.update(algorithm="md5"), "unknown kind"),
        (
            lambda t: t["files"].update({"../x": {"num_bytes": 0, "chunks": ()}}),
            "not a path inside",
        ),
        (lambda t: t["files"].update(x={"num_bytes": 4, "chunks": [[0, 3, "0"]]}), "cover"),
        (lambda t: t["files"].update(x={"num_bytes": "a"}), "no readable checksums"),
        (lambda t: t["files"].pop("model.safetensors"), "no checksum of model.safetensors"),
    ],
)
def test_damaged_checksums_are_refused_by_name(tmp_path, change, error):
    js.save({"w": np.ones(3, np.float32)}, tmp_path / "out", checksums=True)
    place = tmp_path / "out/checksums.json"
    told = json.loads(place.read_text())
    change(told)
    place.write_text(json.dumps(told))
    with pytest.raises(js.FormatError, match=error):
        js.load(tmp_path / "out", jax.devices()[0], verify=True)
    assert js.load(tmp_path / "out", jax.devices()[0])["w"].sum() == 3  # unasked, they are not read


@pytest.mark.parametrize(("format", "name"), [("orbax", "out"), (None, "out.safetensors")])
def test_checksums_that_have_no_place_are_refused(llama, tmp_path, format, name):
    with pytest.raises(js.LayoutError, match=r"checksums= \(--checksums\)"):
        js.convert(llama, tmp_path / name, format=format, checksums=True)


def test_the_flag_writes_them(llama, tmp_path):
    assert main(["slice", str(llama), str(tmp_path / "o"), "--to", "mp2", "--checksums"]) == 0
    assert read_checksums(tmp_path / "o") is not None


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4), st.integers(1, 64))
def test_checksums_are_read_back_as_written(tmp_path_factory, contents, chunk_bytes):
    folder = tmp_path_factory.mktemp("files")
    for number, data in enumerate(contents):
        (folder / f"{number}").write_bytes(data)
    before, checksums._CHUNK_BYTES = checksums._CHUNK_BYTES, chunk_bytes
    try:
        found = compute_checksums(folder, map(str, range(len(contents))))
    finally:
        checksums._CHUNK_BYTES = before
    (folder / "checksums.json").write_bytes(to_bytes(found))
    assert read_checksums(folder) == found
    check_files(folder, found)
