"""Checkpoints to measure with: Llama-shaped Hugging Face folders of any size.

They are written a few megabytes at a time, so that making one needs no more memory than
reading it does, and the same arguments make the same bytes. The files are laid out as the
safetensors package lays them out (header padded to 8 bytes, so tensors are *not* aligned
to cache lines), by code that shares nothing with jaxshard's.

    python benchmarks/models.py OUT [--gigabytes 1.7] [--files 4]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

_BASE_ELEMENTS = 1 << 22  # every tensor is a window into this many random numbers, repeated


@dataclass(frozen=True, slots=True)
class Llama:
    """The sizes of a Llama; as they stand, 852 million parameters, 1.70 GB of bfloat16."""

    layers: int = 16
    hidden: int = 2048
    intermediate: int = 5632
    vocab: int = 32000
    heads: int = 32
    kv_heads: int = 8
    tied: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, in the order of the model."""
        kv = self.kv_heads * (self.hidden // self.heads)
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            found |= {
                f"{layer}input_layernorm.weight": (self.hidden,),
                f"{layer}self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{layer}self_attn.k_proj.weight": (kv, self.hidden),
                f"{layer}self_attn.v_proj.weight": (kv, self.hidden),
                f"{layer}self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{layer}post_attention_layernorm.weight": (self.hidden,),
                f"{layer}mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{layer}mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{layer}mlp.down_proj.weight": (self.hidden, self.intermediate),
            }
        found["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocab, self.hidden)
        return found

    def config(self) -> dict[str, object]:
        """What ``config.json`` says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 1,
            "dtype": "bfloat16",
            "eos_token_id": 2,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 4096,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "vocab_size": self.vocab,
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in bfloat16."""
        return sum(2 * math.prod(shape) for shape in self.shapes().values())


SMOKE = Llama(layers=2, hidden=64, intermediate=128, vocab=256, heads=8, kv_heads=4)


def llama_of(num_bytes: int) -> Llama:
    """The Llama of about ``num_bytes``: layers are added, and wide ones from 4 GB on."""
    like = Llama()
    if num_bytes >= 4 * 10**9:
        like = replace(like, hidden=4096, intermediate=11008, kv_heads=32)
    fixed = replace(like, layers=0).num_bytes
    each = replace(like, layers=1).num_bytes - fixed
    return replace(like, layers=max(1, round((num_bytes - fixed) / each)))


def write_llama(
    folder: str | os.PathLike[str], model: Llama = Llama(), *, num_files: int = 4, seed: int = 0
) -> int:
    """Write ``model`` into ``folder`` in ``num_files`` files; the bytes of its tensors."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    base = _base(seed)
    groups = _groups(model, num_files)
    weight_map = {}
    for number, group in enumerate(groups):
        name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        name = "model.safetensors" if len(groups) == 1 else name
        weight_map |= dict.fromkeys(group, name)
        _write_file(out / name, group, base, seed)
    if len(groups) > 1:
        index = {"metadata": {"total_size": model.num_bytes}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (out / "config.json").write_text(json.dumps(model.config(), indent=1))
    return model.num_bytes


def _base(seed: int) -> np.ndarray:
    numbers = np.random.default_rng(seed).standard_normal(_BASE_ELEMENTS, np.float32)
    return (numbers * np.float32(0.02)).astype(ml_dtypes.bfloat16)


def _groups(model: Llama, num_files: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file: filled in order, about as many bytes in each."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    done, each = 0, model.num_bytes / num_files
    for name, shape in model.shapes().items():
        if done >= each * len(groups) and len(groups) < num_files:
            groups.append({})
        groups[-1][name] = shape
        done += 2 * math.prod(shape)
    return groups


def _write_file(
    path: Path, tensors: dict[str, tuple[int, ...]], base: np.ndarray, seed: int
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(len(text) + -len(text) % 8)
    if (8 + len(text)) % 64 == 0:
        text += b" " * 8  # by chance aligned: one file in eight would be, and results would jump
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            for part in _data(name, math.prod(shape), base, seed):
                file.write(part.data)


def _data(name: str, size: int, base: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The ``size`` elements of tensor ``name`` as bytes, in parts."""
    start = zlib.crc32(f"{seed} {name}".encode()) % base.size
    while size:
        part = base[start : start + size]
        yield part.view(np.uint8)
        size -= part.size
        start = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out")
    parser.add_argument("--gigabytes", type=float, default=1.7)
    parser.add_argument("--files", type=int, default=4)
    options = parser.parse_args()
    model = llama_of(int(options.gigabytes * 1e9))
    num_bytes = write_llama(options.out, model, num_files=options.files)
    print(f"{options.out}: {len(model.shapes())} tensors, {num_bytes / 1e9:.2f} GB, {model}")


if __name__ == "__main__":
    main()
