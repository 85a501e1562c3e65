"""Names at every door: the command line, a config that names a folder, and plain auto."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from mapping_oracle import legacy_concat, mcore_fused
from mapping_random import Sizes, config_of, random_model, write_model
from mapping_worlds import same
from safetensors.numpy import load_file

from jaxshard import mindformers
from jaxshard.api import convert
from jaxshard.conversion.open import open_checkpoint
from jaxshard.errors import LayoutError
from jaxshard.loader import load
from jaxshard.mapping import find_mapping

QUICK = {"workers": 1, "fsync": False}
SIZES = Sizes(layers=2)
SOURCE = random_model("llama", SIZES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "hf", config_of("llama", SIZES), SOURCE)


def weights(where: Path) -> dict[str, np.ndarray]:
    return {n: x for f in sorted(where.rglob("*.safetensors")) for n, x in load_file(f).items()}


def test_the_command_line_gives_other_names_and_the_old_ones_back(folder, tmp_path) -> None:
    there, back = tmp_path / "mf", tmp_path / "back"
    names = "llama-hf:llama-mindformers-concat"
    assert checkpoints.run("convert", folder, there, "--names", names, "--quiet") == 0
    assert same(weights(there), legacy_concat(SOURCE, SIZES.kv))
    cut = tmp_path / "cut"
    how = ("--to", "dp1mp2", "--quiet")
    assert checkpoints.run("slice", folder, cut, "--names", names, *how) == 0
    turned = "llama-mindformers-concat:llama-hf"
    assert checkpoints.run("merge", cut, back, "--names", turned, "--quiet") == 0
    assert same(weights(back), SOURCE)


def test_the_command_line_takes_a_users_own_table(folder, tmp_path, capsys) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        '[[op]]\nop = "substitute"\nrules = [["^model\\\\.layers\\\\.([0-9]+)\\\\.", "h.\\\\1."]]\n'
    )
    assert checkpoints.run("convert", folder, tmp_path / "o", "--names", own, "--quiet") == 0
    assert "h.1.mlp.up_proj.weight" in weights(tmp_path / "o")
    weights_file = folder / "model.safetensors"
    status = checkpoints.run("convert", folder, tmp_path / "x", "--names", weights_file, "--json")
    assert status == 2
    assert "not text" in json.loads(capsys.readouterr().out)["message"]


def test_plain_auto_goes_to_hugging_faces_names(folder, tmp_path) -> None:
    for form in ("hf", "mindformers", "mindformers-concat", "mcore", "nnx", "linen-scan", "tunix"):
        there = tmp_path / f"as {form}"
        convert(folder, there, names=f"hf:{form}", **QUICK)
        convert(there, tmp_path / f"{form} back", names="auto", **QUICK)
        assert same(weights(tmp_path / f"{form} back"), SOURCE)


def test_auto_does_not_choose_between_forms_of_the_same_names(folder, tmp_path) -> None:
    for form in ("mcore-fused", "mcore-fused-blocks"):
        there = tmp_path / form
        convert(folder, there, names=f"hf:{form}", **QUICK)
        expected = mcore_fused(SOURCE, SIZES.kv, interleaved=form == "mcore-fused")
        assert same(weights(there), expected)
        with pytest.raises(LayoutError, match="mcore-fused and mcore-fused-blocks, which di"):
            find_mapping("auto", open_checkpoint(there))
        convert(there, tmp_path / f"{form} back", names=f"{form}:hf", **QUICK)
        assert same(weights(tmp_path / f"{form} back"), SOURCE)


def test_experts_with_equal_rows_in_both_forms_are_accepted(tmp_path) -> None:
    source = random_model("qwen3_moe", SIZES)
    write_model(tmp_path / "hf", config_of("qwen3_moe", SIZES), source)
    convert(tmp_path / "hf", tmp_path / "there", names="hf:mcore-fused-blocks", **QUICK)
    convert(tmp_path / "there", tmp_path / "back", names="auto", **QUICK)
    assert same(weights(tmp_path / "back"), source)


@pytest.mark.parametrize(
    ("form", "oracle"), [("mindformers-concat", legacy_concat), ("mcore-fused", mcore_fused)]
)
def test_a_hugging_face_folder_is_loaded_as_the_pretrained_model(folder, form, oracle) -> None:
    config = {
        "pretrained_model_dir": str(folder),
        "use_parallel": True,
        "auto_trans_ckpt": True,
        "parallel_config": {"data_parallel": 2, "model_parallel": 2},
    }
    arrays = mindformers.load(config, names=f"hf:{form}")
    expected = oracle(SOURCE, SIZES.kv)
    assert arrays.keys() == expected.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(np.asarray(x), expected[name])
    share = mindformers.load_rank(config, 3, names=f"hf:{form}")
    for name, x in share.items():
        shards = [s.data for s in arrays[name].addressable_shards if s.device.id == 3]
        np.testing.assert_array_equal(x, np.asarray(shards[0]))


# --- quantized sources, loaded --------------------------------------------------------------


def quantized(where: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of FP8 in blocks of (8, 4), and its true values in float32."""
    from jaxshard.core.numpy_dtypes import NumpyDType  # noqa: F401, PLC0415 - ml_dtypes known to NumPy

    random = np.random.default_rng(0)
    stored, true = {}, {}
    for name, x in random_model("llama", SIZES).items():
        if not name.endswith("_proj.weight"):
            stored[name] = x.astype(ml_dtypes.bfloat16)
            true[name] = stored[name].astype(np.float32)
            continue
        rows, columns = (-(-n // b) for n, b in zip(x.shape, (8, 4), strict=True))
        scale = random.uniform(0.5, 2, (rows, columns)).astype(np.float32)
        stored[name] = x.astype(ml_dtypes.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        wide = np.repeat(np.repeat(scale, 8, 0), 4, 1)[: x.shape[0], : x.shape[1]]
        true[name] = stored[name].astype(np.float32) * wide
    config = config_of("llama", SIZES) | {
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 4]},
    }
    return write_model(where, config, stored), true


@pytest.mark.parametrize("strategy", ["dp2mp2", "mp4"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_each_shard_of_a_quantized_folder_gets_its_true_values(tmp_path, strategy, dtype) -> None:
    folder, true = quantized(tmp_path / "fp8")
    counts = []
    arrays = load(folder, strategy, dtype=dtype, names="auto", counted=counts.append)
    assert arrays.keys() == true.keys()
    kind = np.dtype(dtype or "bfloat16")
    for name, array in arrays.items():
        assert array.dtype == kind
        for shard in array.addressable_shards:
            expected = true[name][shard.index].astype(kind)
            np.testing.assert_array_equal(np.asarray(shard.data), expected, err_msg=name)
    assert counts[0].bytes_needed == open_checkpoint(folder).num_bytes


def test_a_tree_that_asks_for_float32_gets_it_unrounded(tmp_path) -> None:
    import jax  # noqa: PLC0415
    from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: PLC0415

    folder, true = quantized(tmp_path / "fp8")
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    place = NamedSharding(mesh, PartitionSpec())
    asked = {n: np.dtype("float32" if n.endswith("q_proj.weight") else "bfloat16") for n in true}
    tree = {n: jax.ShapeDtypeStruct(x.shape, asked[n], sharding=place) for n, x in true.items()}
    for name, array in load(folder, tree, names="auto").items():
        np.testing.assert_array_equal(np.asarray(array), true[name].astype(asked[name]))


def test_one_rank_reads_its_half_of_the_weights_and_all_factors(tmp_path) -> None:
    from jaxshard.conversion.load_rank import load_rank  # noqa: PLC0415

    folder, true = quantized(tmp_path / "fp8")
    share = load_rank(folder, "mp2", 1, names="auto")
    for name, x in share.items():
        if x.shape != true[name].shape:
            dim = next(d for d in (0, 1) if x.shape[d] != true[name].shape[d])
            half = np.split(true[name], 2, dim)[1]
            np.testing.assert_array_equal(x, half.astype(ml_dtypes.bfloat16))


# --- the way back, into any layout -------------------------------------------------------------


@pytest.mark.parametrize("form", ["mindformers-concat", "mcore-fused", "nnx-scan", "maxtext"])
@pytest.mark.parametrize("strategy", ["dp2mp2", "dp1mp2pp2"])
def test_another_form_is_taken_apart_into_a_layout(folder, tmp_path, form, strategy) -> None:
    names = f"{form}:hf"
    convert(folder, tmp_path / "there", names=f"hf:{form}", **QUICK)
    convert(tmp_path / "there", tmp_path / "ranks", strategy, names=names, **QUICK)
    convert(tmp_path / "ranks", tmp_path / "whole", **QUICK)
    assert same(weights(tmp_path / "whole"), SOURCE)
    counts = []
    plain = load(folder, strategy)
    for name, x in load(tmp_path / "there", strategy, names=names, counted=counts.append).items():
        assert x.sharding.is_equivalent_to(plain[name].sharding, x.ndim), name
        np.testing.assert_array_equal(np.asarray(x), SOURCE[name])
    assert counts[0].bytes_needed == open_checkpoint(folder).num_bytes
