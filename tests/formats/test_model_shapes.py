"""Strategy files of jobs that have not begun: from a ``config.json``, and from a configuration."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from golden_files import golden, manifest, shapes

from jaxshard import mindformers
from jaxshard.cli import main
from jaxshard.conversion.open import open_strategy
from jaxshard.errors import FormatError, NotFoundError
from jaxshard.formats.huggingface import model_of
from jaxshard.formats.model_shapes import shapes_of
from jaxshard.rules.match import weight_name

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
OWN = {  # numbers that only some types have
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 4},
}
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
VARIANTS = (
    {},
    {"tie_word_embeddings": True, "head_dim": 16},
    {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
)
MODEL = {  # the golden jobs', as MindFormers' configurations say it
    "type": "LlamaConfig",
    "num_layers": 4,
    "hidden_size": 32,
    "num_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 64,
    "intermediate_size": 48,
}
PARALLEL = {"data_parallel": 2, "model_parallel": 2, "pipeline_stage": 2, "vocab_emb_dp": False}


def _config(folder: Path, kind: str = "llama", **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    told = {"model_type": kind, **SMALL, **OWN.get(kind, {}), "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**told, **values}))
    return folder


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return shapes_of(model_of(json.loads((folder / "config.json").read_text())))


def _made(source: Path, out: Path, *flags: str) -> Any:
    assert main(["strategy", "make", str(source), str(out), *flags]) == 0
    return open_strategy(out)


def _yaml(place: Path, **told: Any) -> Path:
    pytest.importorskip("yaml")
    place.write_text(json.dumps({"use_parallel": True, "parallel_config": PARALLEL, **told}))
    return place


# --- names and shapes ----------------------------------------------------------------------


@pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("torch")),
    reason="needs the packages transformers and torch, which make the models",
)
@pytest.mark.parametrize("kind", [*DENSE, *OWN])
def test_a_config_has_the_names_and_shapes_that_transformers_saves(
    kind: str, tmp_path: Path
) -> None:
    import transformers  # noqa: PLC0415 - seconds, and only here

    for number, variant in enumerate(VARIANTS):
        place = tmp_path / str(number)
        config = transformers.AutoConfig.for_model(
            kind, **{**SMALL, **OWN.get(kind, {}), **variant}
        )
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
        saved = safetensors.numpy.load_file(place / "model.safetensors")
        model = model_of(json.loads((place / "config.json").read_text()))
        assert shapes_of(model) == {name: array.shape for name, array in saved.items()}, variant


def test_the_names_and_shapes_of_llama_follow_from_its_numbers() -> None:
    found = shapes_of(model_of({"model_type": "llama", **SMALL, "num_hidden_layers": 1}))
    layer = "model.layers.0."
    assert found == {
        "model.embed_tokens.weight": (64, 32),
        layer + "self_attn.q_proj.weight": (32, 32),
        layer + "self_attn.k_proj.weight": (16, 32),
        layer + "self_attn.v_proj.weight": (16, 32),
        layer + "self_attn.o_proj.weight": (32, 32),
        layer + "mlp.gate_proj.weight": (48, 32),
        layer + "mlp.up_proj.weight": (48, 32),
        layer + "mlp.down_proj.weight": (32, 48),
        layer + "input_layernorm.weight": (32,),
        layer + "post_attention_layernorm.weight": (32,),
        "model.norm.weight": (32,),
    }  # transformers before version 5 left a tie out where it is the default


@pytest.mark.parametrize(
    ("values", "error", "why"),
    [
        ({"model_type": "mamba"}, NotFoundError, "unsupported model_type 'mamba'"),
        ({"model_type": "lama"}, NotFoundError, r"Did you mean llama\?"),
        ({"hidden_size": None}, NotFoundError, "config.json has no hidden_size"),
        ({"hidden_size": -1}, FormatError, "hidden_size is -1 .expected a number of 1"),
        ({"vocab_size": "64"}, FormatError, "vocab_size is '64' .expected a number"),
        (
            {"num_hidden_layers": 10**9},
            FormatError,
            "1000000000 layers with 0 experts .expected at most",
        ),
    ],
)
def test_a_config_that_says_too_little_is_refused(
    values: dict[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        shapes_of(model_of({"model_type": "llama", **SMALL, **values}))


# --- strategy files ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*DENSE, *OWN])
@pytest.mark.parametrize("is_file", [False, True])
def test_a_config_makes_the_strategy_that_its_weights_would_make(
    kind: str, is_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _config(tmp_path / "config", kind)
    arrays = {
        name: np.zeros(shape, np.float32)
        for name, shape in shapes_of(
            model_of(json.loads((folder / "config.json").read_text()))
        ).items()
    }
    whole = _config(tmp_path / "whole", kind)
    safetensors.numpy.save_file(arrays, whole / "model.safetensors")
    source = folder / "config.json" if is_file else folder
    for to in ("dp2mp2pp2", "dp4mp2optall"):
        made = _made(source, tmp_path / f"a{to}", "--to", to)
        assert made == _made(whole, tmp_path / f"b{to}", "--to", to)
        assert made.placements.keys() == arrays.keys()
    assert f"names and shapes are derived from config.json ({kind})" in capsys.readouterr().out


def test_names_and_states_are_those_that_are_asked_for(tmp_path: Path) -> None:
    folder = _config(tmp_path / "config")
    names = ("--names", "llama-hf:llama-mindformers")
    plain = _made(folder, tmp_path / "a", "--to", "dp2mp2pp2", *names)
    found = _made(folder, tmp_path / "b", "--to", "dp2mp2pp2", *names, "--states")
    assert "model.layers.3.feed_forward.w2.weight" in plain.placements
    assert found.placements.keys() == {
        f"{state}{name}" for name in plain.placements for state in ("", "adam_m.", "adam_v.")
    }
    for name, placed in plain.placements.items():
        assert found.placements[name] == found.placements[f"adam_v.{name}"] == placed


@pytest.mark.parametrize("mode", ["train", "finetune", "predict"])
def test_a_configuration_makes_the_strategy_of_a_real_job(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = _yaml(tmp_path / "job.yaml", run_mode=mode, model={"model_config": MODEL})
    made, real = _made(told, tmp_path / "out"), open_strategy(golden("dp2mp2pp2", "strategy"))
    every = shapes("dp2mp2pp2")
    left_out = ("odd_bias", "accu_grads.", *([] if mode != "predict" else ["adam_"]))
    wanted = {n for n in real.placements if not any(x in n for x in left_out)}
    assert (made.num_ranks, made.placements.keys()) == (real.num_ranks, wanted)
    for name in wanted:
        shape = every[weight_name(name)]
        for rank in range(8):
            assert made.box_of(name, shape, rank) == real.box_of(name, shape, rank), name
    said = capsys.readouterr().out
    assert ("adam_m and adam_v of each weight are among the tensors" in said) == (mode != "predict")


@pytest.mark.parametrize("key", ["load_checkpoint", "pretrained_model_dir"])
@pytest.mark.parametrize("has_weights", [False, True])
def test_a_configuration_with_a_checkpoint_takes_its_tensors(
    key: str, has_weights: bool, tmp_path: Path
) -> None:
    folder = _config(tmp_path / "model")
    names = _shapes(folder)
    if has_weights:
        arrays = {n: np.zeros(s, np.float32) for n, s in names.items()}
        safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    told = _yaml(tmp_path / "job.yml", **{key: str(folder)})
    made = _made(told, tmp_path / "out")
    assert (made.num_ranks, made.placements.keys()) == (8, names.keys())
    other = _made(told, tmp_path / "other", "--to", "mp2")  # what is asked for goes first
    assert other.num_ranks == 2


@pytest.mark.parametrize(
    ("more", "width"),
    [
        ({"intermediate_size": 100}, 100),
        ({"intermediate_size": None}, 256),  # 4 x 96 x 2/3 = 256
        ({"intermediate_size": None, "multiple_of": 100}, 300),
        ({"intermediate_size": None, "multiple_of": 8, "ffn_dim_multiplier": 1.3}, 336),
    ],
)
def test_the_width_of_a_layer_is_what_mindformers_makes_of_its_numbers(
    more: dict[str, Any], width: int
) -> None:
    """1.3 is taken as 1.31 there: 503.04 → 503, two thirds of it 335, rounded up to 336."""
    model = {**MODEL, "hidden_size": 96, **more}
    catalog, _, _ = mindformers.job_of({"model": {"model_config": model}})
    assert catalog["model.layers.0.feed_forward.w1.weight"].shape == (width, 96)


def test_fused_and_biased_models_have_their_names() -> None:
    model = {**MODEL, "qkv_concat": True, "qkv_has_bias": True}
    catalog, _, _ = mindformers.job_of({"model": {"model_config": model}})
    assert catalog["model.layers.0.attention.w_qkv.weight"].shape == (64, 32)
    assert catalog["model.layers.0.attention.w_qkv.bias"].shape == (64,)
    assert catalog["model.layers.0.feed_forward.w_gate_hidden.weight"].shape == (96, 32)


@pytest.mark.parametrize(
    ("told", "flags", "why"),
    [
        ({}, [], "model.model_config: has no model"),
        ({"model": {"model_config": {"type": "GLMConfig"}}}, [], "has the type 'GLMConfig'"),
        (
            {"model": {"model_config": {**MODEL, "num_heads": None}}},
            [],
            "has no num_attention_heads",
        ),
        ({"load_checkpoint": "nowhere"}, [], "load_checkpoint: nowhere does not exist"),
        ({"model": {"model_config": MODEL}}, ["--suffix", "1_1"], "--suffix are for a checkpoint"),
    ],
)
def test_a_configuration_that_says_too_little_is_refused(
    told: dict[str, Any],
    flags: list[str],
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = _yaml(tmp_path / "job.yaml", **told)
    assert main(["strategy", "make", str(place), str(tmp_path / "out"), *flags]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_strategy_must_be_given_where_nothing_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _config(tmp_path / "config")
    assert main(["strategy", "make", str(folder), str(tmp_path / "out")]) == 2
    assert "--to is missing" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert (
        main(["strategy", "make", str(tmp_path / "empty"), str(tmp_path / "o"), "--to", "mp2"]) == 2
    )
    assert "holds no checkpoint" in capsys.readouterr().err


def test_the_notes_of_a_configuration_are_those_of_its_strategy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"model_config": {**MODEL, "offset": [1, -1]}}
    place = _yaml(tmp_path / "job.yaml", model=model, transform_process_num=8)
    _made(place, tmp_path / "out")
    said = capsys.readouterr().out
    for note in (
        "offset is [1, -1], but layers",
        "transform_process_num is 8, which has no effect",
    ):
        assert said.count(note) == 1
    assert manifest("dp2mp2pp2")["layout"]["layers"] == MODEL["num_layers"]


@pytest.mark.parametrize("value", [float("nan"), -1, 0, True, 1e30, "x", []])
def test_a_width_of_numbers_that_mean_nothing_is_refused(value: Any) -> None:
    model = {**MODEL, "intermediate_size": None, "ffn_dim_multiplier": value}
    with pytest.raises(FormatError, match="not numbers above 0"):
        mindformers.job_of({"model": {"model_config": model}})
