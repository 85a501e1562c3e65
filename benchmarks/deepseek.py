"""A checkpoint in the shape of DeepSeek-V3, without its bytes: real headers, sparse files.

The names, shapes and dtypes are those of the published checkpoint: 61 layers of which three
are dense, 256 experts in each of the others, one more layer for multi-token prediction, and a
``weight_scale_inv`` beside every quantised weight. That is 91,991 tensors in 163 files, 0.69 TB
with weights of one byte and 1.37 TB with two, none of which the disk has to hold.

    python benchmarks/deepseek.py OUT [--dtype F8_E4M3]
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
_BLOCK = 128  # rows, and columns, that share one factor


@dataclass(frozen=True, slots=True)
class DeepSeek:
    """The sizes of a DeepSeek; as they stand, those of V3."""

    layers: int = 61
    dense_layers: int = 3
    experts: int = 256
    hidden: int = 7168
    intermediate: int = 18432
    expert_intermediate: int = 2048
    vocab: int = 129280
    heads: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    dtype: str = "BF16"  # of the quantised weights; the published checkpoint has F8_E4M3

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, in the order of the model."""
        yield "model.embed_tokens.weight", "BF16", (self.vocab, self.hidden)
        for i in range(self.layers + 1):
            yield from self._layer(i)
        yield "model.norm.weight", "BF16", (self.hidden,)
        yield "lm_head.weight", "BF16", (self.vocab, self.hidden)

    def _layer(self, i: int) -> Iterator[Tensor]:
        at, h = f"model.layers.{i}.", self.hidden
        if i == self.layers:  # multi-token prediction
            yield f"{at}embed_tokens.weight", "BF16", (self.vocab, h)
            yield f"{at}enorm.weight", "BF16", (h,)
            yield f"{at}hnorm.weight", "BF16", (h,)
            yield f"{at}eh_proj.weight", "BF16", (h, 2 * h)
        yield f"{at}input_layernorm.weight", "BF16", (h,)
        attn = f"{at}self_attn."
        yield from self._weight(f"{attn}q_a_proj", self.q_rank, h)
        yield f"{attn}q_a_layernorm.weight", "BF16", (self.q_rank,)
        yield from self._weight(f"{attn}q_b_proj", self.heads * 192, self.q_rank)
        yield from self._weight(f"{attn}kv_a_proj_with_mqa", self.kv_rank + 64, h)
        yield f"{attn}kv_a_layernorm.weight", "BF16", (self.kv_rank,)
        yield from self._weight(f"{attn}kv_b_proj", self.heads * 256, self.kv_rank)
        yield from self._weight(f"{attn}o_proj", h, self.heads * 128)
        yield f"{at}post_attention_layernorm.weight", "BF16", (h,)
        if i < self.dense_layers:
            yield from self._mlp(f"{at}mlp.", self.intermediate)
            return
        yield f"{at}mlp.gate.weight", "BF16", (self.experts, h)
        yield f"{at}mlp.gate.e_score_correction_bias", "F32", (self.experts,)
        yield from self._mlp(f"{at}mlp.shared_experts.", self.expert_intermediate)
        for e in range(self.experts):
            yield from self._mlp(f"{at}mlp.experts.{e}.", self.expert_intermediate)
        if i == self.layers:
            yield f"{at}shared_head.norm.weight", "BF16", (h,)
            yield f"{at}shared_head.head.weight", "BF16", (self.vocab, h)

    def _mlp(self, at: str, inner: int) -> Iterator[Tensor]:
        yield from self._weight(f"{at}gate_proj", inner, self.hidden)
        yield from self._weight(f"{at}up_proj", inner, self.hidden)
        yield from self._weight(f"{at}down_proj", self.hidden, inner)

    def _weight(self, name: str, rows: int, columns: int) -> Iterator[Tensor]:
        yield f"{name}.weight", self.dtype, (rows, columns)
        yield f"{name}.weight_scale_inv", "F32", (-(-rows // _BLOCK), -(-columns // _BLOCK))

    def config(self) -> dict[str, object]:
        """What ``config.json`` says, as far as layouts care."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "moe_intermediate_size": self.expert_intermediate,
            "num_hidden_layers": self.layers,
            "first_k_dense_replace": self.dense_layers,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": self.q_rank,
            "kv_lora_rank": self.kv_rank,
            "tie_word_embeddings": False,
            "vocab_size": self.vocab,
            "quantization_config": {
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [_BLOCK, _BLOCK],
            },
        }


SMOKE = DeepSeek(
    layers=5, experts=16, hidden=256, intermediate=1024, expert_intermediate=512, vocab=1024,
    heads=16, q_rank=128, kv_rank=128,
)  # fmt: skip


def write_deepseek(
    folder: str | os.PathLike[str], model: DeepSeek = DeepSeek(), *, num_files: int = 163
) -> tuple[int, int]:
    """Write ``model`` into ``folder``; how many tensors it has, and how many bytes they claim."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    tensors = list(model.tensors())
    sizes = [ITEM_BYTES[kind] * math.prod(shape) for _, kind, shape in tensors]
    total, done = sum(sizes), 0
    groups: list[list[tuple[Tensor, int]]] = [[] for _ in range(num_files)]
    for tensor, size in zip(tensors, sizes, strict=True):
        groups[min(num_files - 1, done * num_files // total)].append((tensor, size))
        done += size
    weight_map = {}
    for number, group in enumerate(groups):
        name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        weight_map |= {tensor[0]: name for tensor, _ in group}
        _write_sparse(out / name, group)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (out / "config.json").write_text(json.dumps(model.config(), indent=2))
    return len(tensors), total


def _write_sparse(path: Path, group: list[tuple[Tensor, int]]) -> None:
    header: dict[str, object] = {}
    at = 0
    for (name, kind, shape), size in group:
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(len(text) + -len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out")
    parser.add_argument("--dtype", choices=("BF16", "F8_E4M3"), default="BF16")
    options = parser.parse_args()
    num_tensors, num_bytes = write_deepseek(options.out, DeepSeek(dtype=options.dtype))
    print(f"{options.out}: {num_tensors:,} tensors, {num_bytes / 1e12:.2f} TB")


if __name__ == "__main__":
    main()
