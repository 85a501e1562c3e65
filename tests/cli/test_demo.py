"""The demo reports that all results are equal, on any checkpoint, and only if they are."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import ml_dtypes
import numpy as np
import pytest

import jaxshard as js
from jaxshard.cli import demo
from jaxshard.errors import CoverageError

pytest.importorskip("jax")

QUICK = {"fsync": False}
SIZES = {"hidden": 64, "vocab": 64}  # divides by eight


@pytest.fixture
def llama(tmp_path):
    checkpoints.write_llama(tmp_path / "llama", num_files=2, **SIZES)
    return tmp_path / "llama"


def cut(llama: Path) -> Path:
    js.slice(llama, llama.parent / "cut", "dp2mp4", remove_redundancy=True, **QUICK)
    return llama.parent / "cut"


def complete_ckpt(llama: Path) -> Path:
    js.merge(llama, llama.parent / "model.ckpt", **QUICK)
    return llama.parent / "model.ckpt"


def of_a_job(llama: Path) -> Path:
    """Elements of several widths, and a scalar that matches no rule."""
    arrays = {n: x for n, x in checkpoints.llama_arrays(**SIZES).items() if "norm" not in n}
    arrays["lm_head.weight"] = arrays["lm_head.weight"].astype(ml_dtypes.float8_e4m3fn)
    arrays["global_step"] = np.array(7, np.int64)
    checkpoints.write_folder(llama.parent / "job", arrays, config={"model_type": "llama"})
    js.slice(llama.parent / "job", llama.parent / "job cut", "dp2mp2", **QUICK)
    return llama.parent / "job cut"


MADE = {"HF": lambda p: p, "ranks": cut, "ckpt": complete_ckpt, "a job's": of_a_job}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_the_demo_runs_on_a_given_checkpoint(llama, capsys, make):
    assert checkpoints.run("demo", make(llama)) == 0
    out, err = capsys.readouterr()
    assert "every result equals the source, bit for bit" in out
    assert err == ""


def test_json_output_lists_the_steps(llama, capsys):
    assert checkpoints.run("demo", llama, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["steps"]) == 7
    assert all(step["seconds"] >= 0 for step in told["steps"])


@pytest.mark.parametrize("file", ["merged/model.safetensors", "saved/model.safetensors"])
def test_a_wrong_bit_in_a_result_is_detected(llama, monkeypatch, file):
    """In the merged checkpoint, and in the one saved from the devices."""
    real = demo._compare

    def spoiled(made: Path, catalog: js.Catalog) -> None:
        path = made.parent / file
        if path.exists() and made == path.parent:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        real(made, catalog)

    monkeypatch.setattr(demo, "_compare", spoiled)
    with pytest.raises(CoverageError, match="differs from the original"):
        demo.run_demo(str(llama), quiet=True)


@pytest.mark.parametrize("as_ranks", [False, True])
def test_a_wrong_bit_in_an_array_is_detected(llama, as_ranks):
    catalog = js.open(cut(llama) if as_ranks else llama)
    arrays = js.load(catalog, "dp2mp4")
    demo._compare_arrays(arrays, catalog)
    name = "model.layers.1.mlp.down_proj.weight"
    wrong = {**arrays, name: arrays[name].at[5, 7].add(1)}
    with pytest.raises(CoverageError, match=f"{name} differs from the original"):
        demo._compare_arrays(wrong, catalog)
    with pytest.raises(CoverageError, match=f"{name}: not in both"):
        demo._compare_arrays({n: x for n, x in arrays.items() if n != name}, catalog)


def test_a_folder_to_keep_must_be_empty(llama, capsys):
    before = checkpoints.files_of(llama.parent)
    assert checkpoints.run("demo", "--keep", llama.parent) == 2
    assert "the folder is not empty (llama)" in capsys.readouterr().err
    assert checkpoints.files_of(llama.parent) == before


def test_results_are_kept_in_the_given_folder(llama, tmp_path):
    keep = tmp_path / "new" / "folder"
    assert checkpoints.run("demo", llama, "--keep", keep, "--quiet") == 0
    assert sorted(p.name for p in keep.iterdir()) == ["dp1mp2pp2", "dp2mp4", "merged", "saved"]
