"""Checkpoints for the tests: saved by transformers where it is installed, or made by hand.

Those made by hand have the names of the Hugging Face families and are written by the
safetensors package, so that most tests need neither torch nor any code of jaxshard's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jaxshard.cli import main

BF16 = np.dtype(ml_dtypes.bfloat16)
HAVE_TRANSFORMERS = bool(find_spec("transformers") and find_spec("torch"))

# --- made by hand --------------------------------------------------------------------


def llama_arrays(
    layers: int = 2, hidden: int = 16, vocab: int = 32, tied: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """The tensors of a small Llama with grouped-query attention, in bfloat16."""
    rng, kv, inner = np.random.default_rng(seed), hidden // 2, 2 * hidden
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }.items()
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return {n: rng.standard_normal(s, np.float32).astype(BF16) for n, s in shapes.items()}


def write_llama(folder: Path, *, num_files: int = 1, **sizes: Any) -> dict[str, np.ndarray]:
    """A Hugging Face folder of ``llama_arrays``; its tensors."""
    arrays = llama_arrays(**sizes)
    config = {
        "model_type": "llama",
        "num_hidden_layers": sizes.get("layers", 2),
        "tie_word_embeddings": sizes.get("tied", False),
    }
    write_folder(folder, arrays, config=config, num_files=num_files)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return arrays


def write_folder(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    config: Mapping[str, Any] | None = None,
    num_files: int = 1,
) -> None:
    """A Hugging Face folder of ``arrays``, written by the safetensors package."""
    folder.mkdir(parents=True, exist_ok=True)
    names, each = list(arrays), -(-len(arrays) // num_files)
    weight_map: dict[str, str] = {}
    for i in range(num_files):
        path = "model.safetensors" if num_files == 1 else f"model-{i + 1:05d}-of-{num_files:05d}"
        path = path if path.endswith(".safetensors") else path + ".safetensors"
        part = {n: np.array(arrays[n], order="C") for n in names[i * each : (i + 1) * each]}
        safetensors.numpy.save_file(part, folder / path, {"format": "pt"})
        weight_map |= dict.fromkeys(part, path)
    if num_files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


# --- saved by transformers -----------------------------------------------------------

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


def _gpt2(t: Any) -> Any:
    config = t.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=4,
        n_head=8,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return t.GPT2LMHeadModel(config)


#: Each makes a small model with random weights, given the transformers module.
MODELS: Mapping[str, Callable[[Any], Any]] = {
    "llama_gqa": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**_SIZES)),
    "llama_tied": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**_SIZES, tie_word_embeddings=True)),
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**_SIZES)),
    "mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**_SIZES, num_local_experts=4)),
    "gpt2": _gpt2,
}


def save_model(name: str, folder: Path, max_shard_size: str = "5GB") -> Any:
    """The model ``name``, saved by transformers into ``folder``: GPT-2 in F32, others BF16."""
    import torch  # noqa: PLC0415 - the light run has no torch
    import transformers  # noqa: PLC0415

    torch.manual_seed(0)
    model = MODELS[name](transformers)
    model.to(torch.float32 if name == "gpt2" else torch.bfloat16).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


# --- looking at what is there ----------------------------------------------------------


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor below ``folder``, as the safetensors package tells."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, told in safetensors.deserialize(path.read_bytes()):
            assert name not in found, name
            found[name] = (told["dtype"], tuple(told["shape"]), bytes(told["data"]))
    return found


def files_of(folder: Path) -> dict[str, str]:
    """A checksum of every file below ``folder``, hidden ones too."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def run(*arguments: object) -> int:
    """The command line, in this process; its exit status."""
    return main([str(a) for a in arguments])
