"""What processes compare of checkpoints: copies are one, other contents are another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxshard as js
from jaxshard.core.catalog import Catalog
from jaxshard.errors import CoverageError
from jaxshard.lora import with_adapter
from jaxshard.storage.identity import check_same, identity
from jaxshard.storage.readers import SourceFiles

LAYERS = 3


def model(seed: int = 0) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(LAYERS)]
    return {n: chance.standard_normal((16, 8), np.float32) for n in names} | {
        "model.norm.weight": np.ones(8, np.float32)
    }


def write(place: Path, form: str, arrays: dict[str, np.ndarray]) -> Path:
    """A checkpoint of ``arrays`` in the format that ``form`` names."""
    checkpoints.write_folder(place / "hf", arrays, config={"model_type": "llama"}, num_files=2)
    made = place / form
    how = {
        "hf": None,
        "ckpt": {"format": "ckpt"},
        "ranks": {"to": "mp2"},
        "iteration": {"to": "mp2", "format": "iteration"},
        "orbax": {"format": "orbax"},
    }[form]
    if how is not None:
        js.convert(place / "hf", made, **how)
    return made


def agree(*catalogs: Catalog) -> None:
    check_same([identity(c) for c in catalogs], catalogs[0].root, range(len(catalogs)))


def as_it_is(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return arrays


def all_others(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return model(seed=1)


def one_small(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return arrays | {"model.norm.weight": np.full(8, 2, np.float32)}


def a_name(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n.replace("layers.2", "layers.9"): a for n, a in arrays.items()}


def a_dtype(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: a.view(np.int32) for n, a in arrays.items()}


@pytest.mark.parametrize("form", ["hf", "ckpt", "ranks", "iteration", "orbax"])
@pytest.mark.parametrize("change", [as_it_is, all_others, one_small, a_name, a_dtype])
def test_copies_are_one_and_others_are_told_apart(
    tmp_path: Path, form: str, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
) -> None:
    here = write(tmp_path / "a", form, model())
    if change is as_it_is:
        there = shutil.copytree(here, tmp_path / "b")
        for path in there.rglob("*"):
            os.utime(path, (1, 1))
        agree(js.open(here), js.open(there))
        return
    there = write(tmp_path / "b", form, change(model()))
    with pytest.raises(
        CoverageError, match=r"2 different .*: processes 0, 2; processes 1"
    ) as error:
        agree(js.open(here), js.open(there), js.open(here))
    assert str(error.value).startswith(str(here))


def test_servers_with_ranks_of_their_own_are_compared_where_they_can_be(tmp_path: Path) -> None:
    job = write(tmp_path / "job", "ranks", model())
    other = write(tmp_path / "other", "ranks", model(seed=1))

    def server(name: str, source: Path, *ranks: int, step: str = "1_10") -> Catalog:
        place = tmp_path / name
        shutil.copytree(source / "strategy", place / "strategy")
        for rank in ranks:
            (place / f"rank_{rank}").mkdir()
            (held,) = (source / f"rank_{rank}").iterdir()
            shutil.copy(held, place / f"rank_{rank}" / f"net_rank_{rank}-{step}.safetensors")
        return js.open(place)

    zero, one = server("zero", job, 0), server("one", job, 1)
    agree(zero, one)
    agree(zero, server("again", job, 0))
    agree(zero, server("both", job, 0, 1))
    with pytest.raises(CoverageError, match="different contents: processes 0; processes 1"):
        agree(zero, server("older", other, 0))


def test_servers_whose_ranks_are_of_different_steps_are_refused(tmp_path: Path) -> None:
    checkpoints.write_folder(tmp_path / "hf", model(), config={"model_type": "llama"})
    js.convert(tmp_path / "hf", tmp_path / "job", "mp4")
    for name, ranks, step in (("a", (0, 1), "1_10"), ("b", (2, 3), "1_20"), ("c", (2, 3), "1_10")):
        shutil.copytree(tmp_path / "job" / "strategy", tmp_path / name / "strategy")
        for rank in ranks:
            (tmp_path / name / f"rank_{rank}").mkdir()
            (held,) = (tmp_path / "job" / f"rank_{rank}").iterdir()
            place = tmp_path / name / f"rank_{rank}" / f"net_rank_{rank}-{step}.safetensors"
            shutil.copy(held, place)
    a, b, c = (js.open(tmp_path / name) for name in "abc")
    agree(a, c)
    with pytest.raises(CoverageError, match="2 different steps: processes 0; processes 1"):
        agree(a, b)


def test_adapters_that_are_merged_otherwise_are_told_apart(tmp_path: Path) -> None:
    base = write(tmp_path / "base", "hf", model())
    chance = np.random.default_rng(0)
    layer = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    weights = {
        f"{layer}{x}.weight": chance.standard_normal(s, np.float32)
        for x, s in (("A", (2, 8)), ("B", (16, 2)))
    }
    for name, alpha in (("one", 4), ("copy", 4), ("two", 8)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["up_proj"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    one, copy, two = (with_adapter(js.open(base), tmp_path / n) for n in ("one", "copy", "two"))
    agree(one, copy)
    with pytest.raises(CoverageError, match="different"):
        agree(one, two)
    file = tmp_path / "copy" / "adapter_model.safetensors"
    save_file({n: a + 1 for n, a in load_file(file).items()}, file)
    with pytest.raises(CoverageError, match="different"):
        agree(one, with_adapter(js.open(base), tmp_path / "copy"))


@pytest.mark.parametrize("num_files", [1, 5, 200])
def test_as_many_bytes_are_read_of_a_large_checkpoint_as_of_a_small_one(
    tmp_path: Path, num_files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {f"w{i}": np.zeros((256, 1024), np.float32) for i in range(num_files)}
    checkpoints.write_folder(tmp_path / "in", arrays, num_files=num_files)
    read, real = [], SourceFiles.read

    def counted(self: SourceFiles, piece: object, offset: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        real(self, piece, offset, buffer)

    monkeypatch.setattr(SourceFiles, "read", counted)
    said = identity(js.open(tmp_path / "in"))
    assert 32 << 10 < sum(read) <= 64 << 10
    assert len(said) < 300


def test_checksums_tell_apart_what_no_sample_does(tmp_path: Path) -> None:
    arrays = {"w": np.zeros((1024, 1024), np.float32)}
    checkpoints.write_folder(tmp_path / "in", arrays)
    for name in ("a", "b", "plain"):
        js.convert(tmp_path / "in", tmp_path / name, checksums=name != "plain")
        arrays["w"][3, 7] = 1
        checkpoints.write_folder(tmp_path / "in", arrays)
    a, b, plain = (js.open(tmp_path / name) for name in ("a", "b", "plain"))
    agree(a, plain)
    with pytest.raises(CoverageError, match="different files of checksums"):
        agree(a, b)
